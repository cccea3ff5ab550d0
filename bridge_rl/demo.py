"""`make demo`: the embedded recipe from warm-up to evaluation, beside the base and beside RLVR without a Bridge."""

import json
import os
import time
from dataclasses import asdict, replace
from itertools import chain, count
from pathlib import Path

from accelerate import PartialState

from bridge_rl.config import Recipe, load_recipe
from bridge_rl.errors import UserError
from bridge_rl.evaluation.analyse import analyse
from bridge_rl.evaluation.judge import Judge
from bridge_rl.evaluation.results import Summary, read_results
from bridge_rl.evaluation.run import num_completions, plan_evaluation
from bridge_rl.evaluation.samples import SampleStore
from bridge_rl.models import load_model, load_tokenizer
from bridge_rl.plan import check, describe
from bridge_rl.report.plots import plot_widths
from bridge_rl.report.progress import Bar
from bridge_rl.report.results import provenance
from bridge_rl.report.tables import as_table
from bridge_rl.run import load_eval_prompts, train
from bridge_rl.user_code import find_file

SAMPLES, FIGURES = Path("base", "samples"), "demo.json"  # what a demo writes first and last
# Made by `bridge-rl train recipes/tiny_arith_rlvr_only.yaml`: the same steps take as long as the demo itself.
SHIPPED = Path(__file__).parent / "tiny" / "rlvr_only.json"


def demo(output: Path) -> None:
    """Train the embedded model and print the base, RLVR only (shipped figures) and Bridge at every width."""
    start = time.perf_counter()
    recipe_path = find_file("recipes/tiny_arith.yaml")
    if recipe_path is None:
        raise UserError("recipes/tiny_arith.yaml is not here: run the demo in a clone of the repository.")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one process trains on one GPU
    directory = place_of_demo(output)
    recipe = replace(load_recipe(recipe_path, ["logging.wandb=offline"]), output_dir=str(directory))
    print(describe(recipe, check(recipe)), flush=True)

    base = evaluate_base(recipe, directory / SAMPLES)
    train(recipe)
    results = sorted((directory / "evaluation").glob("step_*/results.json"))[-1]
    arms = {
        "base": base,
        "RLVR only (shipped figures)": read_results(SHIPPED).summaries,
        "Bridge": read_results(results).summaries,
    }
    for name, summaries in arms.items():
        print(f"\n{name}\n{as_table(summaries)}")
    plot_widths(arms, directory / "widths.png")
    minutes = (time.perf_counter() - start) / 60
    content = {**provenance(), "minutes": minutes, "arms": {n: [asdict(r) for r in rs] for n, rs in arms.items()}}
    (directory / FIGURES).write_text(json.dumps(content, indent=2) + "\n")
    print(f"\n{minutes:.1f} minutes; the plot is {directory / 'widths.png'}, the figures are in demo.json beside it")
    print(f"sample it yourself:  bridge-rl generate --model {directory} --width 4 12,35,27,19,31,22:49")
    print(f"send the W&B logs:   wandb sync {directory}/wandb/offline-run-*")


def place_of_demo(path: Path) -> Path:
    """`path`, or the first of path-2, path-3, ... that does not exist, or where a demo was cut off, which goes on."""
    if path.name in ("", ".."):  # such as `.`
        path = path.resolve()
    if not path.name:
        raise UserError(f"--output is {path}: name a directory that the demo may make.")
    candidates = chain([path], (path.with_name(f"{path.name}-{number}") for number in count(2)))
    return next(c for c in candidates if not c.exists() or ((c / SAMPLES).is_dir() and not (c / FIGURES).exists()))


def evaluate_base(recipe: Recipe, samples: Path) -> list[Summary]:
    """The base at the recipe's widths; its rows are independent, so only what is said of sets depends on the width."""
    model, tokenizer = load_model(recipe.model).to(PartialState().device), load_tokenizer(recipe.model)
    prompts = load_eval_prompts(recipe, tokenizer)
    assert prompts is not None  # the embedded recipe has held-out problems
    rows, judge = prompts.to_list(), Judge.of(recipe.rewards[0])
    section, limit, store = recipe.evaluation, recipe.rollout.max_new_tokens, SampleStore(samples)
    evaluation = plan_evaluation(model, tokenizer, rows, judge, section, limit, recipe.seed, store)
    with Bar("base", num_completions(evaluation.shares())) as bar:
        return analyse(evaluation.run(bar.update), section.widths, listening=False, meta={}).summaries
