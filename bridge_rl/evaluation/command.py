"""`bridge-rl eval` and `bridge-rl generate`."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bridge_rl.config import (
    DataSection,
    DataSource,
    EvaluationSection,
    ModelSection,
    Recipe,
    RewardSection,
    load_recipe,
)
from bridge_rl.data import load_problems, make_prompts, prompt_tokens
from bridge_rl.errors import UserError
from bridge_rl.evaluation.run import (
    aggregate,
    as_table,
    eos_ids,
    groups_per_problem,
    num_completions,
    sample_groups,
    write_results,
)
from bridge_rl.models import load_model, load_reward, load_tokenizer
from bridge_rl.report.plots import plot_widths
from bridge_rl.report.progress import Bar
from bridge_rl.report.results import provenance
from bridge_rl.rollout import SamplingParams, generate_groups

# The suite that ships with the project; any other is a file of problems whose answers math-verify reads.
TINY = DataSource("bridge_rl.tiny.task:dataset", kwargs={"seed": 11, "size": 512}, check_answers=False)
TINY_REWARD = RewardSection("rewards/two_tries.py:correct")
MATH_REWARD = RewardSection("rewards/answer.py:correct")
TINY_MAX_NEW_TOKENS = 32
DEFAULT_MAX_NEW_TOKENS = 1024


def evaluate(args: argparse.Namespace) -> None:
    """Sample a suite at several widths; print a table; write samples, results and a plot."""
    state = PartialState()
    tiny = args.suite == "tiny"
    source = TINY if tiny else DataSource(args.suite)
    trained = trained_with(args.model)
    section = EvaluationSection(
        widths=parse_widths(args.widths),
        problems=args.problems,
        samples=args.samples,
        temperature=first(args.temperature, trained and trained.evaluation.temperature, 1.0),
        top_p=first(args.top_p, trained and trained.evaluation.top_p, 1.0),
        max_new_tokens=first(
            args.max_new_tokens,
            trained and (trained.evaluation.max_new_tokens or trained.rollout.max_new_tokens),
            TINY_MAX_NEW_TOKENS if tiny else DEFAULT_MAX_NEW_TOKENS,
        ),
        max_rows=args.max_rows,
    )
    for width in section.widths:
        if state.is_main_process and section.samples % width != 0:
            print(
                f"width {width}: {width * groups_per_problem(section, width)} samples a problem, not {section.samples}"
            )
    data = replace(trained.data, train=source) if trained else DataSection(train=source)
    problems = load_problems(source, "--suite", args.seed)[: section.problems]
    model, tokenizer = load_for_sampling(args.model)
    rows = make_prompts(problems, data, conversational=tokenizer.chat_template is not None).to_list()
    if args.reward is not None:
        judge = RewardSection(args.reward)
    else:
        judge = TINY_REWARD if tiny else trained.rewards[0] if trained else MATH_REWARD
    reward = load_reward(judge, 0)
    with Bar("evaluation", num_completions(section, len(rows)) // state.num_processes) as bar:
        mine = sample_groups(
            model,
            tokenizer,
            rows,
            reward,
            section,
            DEFAULT_MAX_NEW_TOKENS,
            args.seed,
            state.process_index,
            state.num_processes,
            bar.update,
        )
        groups = gather_object(list(mine))
    if not state.is_main_process:
        return
    reports = aggregate(groups)
    directory = args.output or output_directory(args.model) / Path(args.suite).stem
    meta = {
        "model": args.model,
        "suite": args.suite,
        "reward": judge.function,
        "prompt": data.prompt,
        "temperature": section.temperature,
        "top_p": section.top_p,
        "max_new_tokens": section.max_new_tokens,
        "seed": args.seed,
        **provenance(),
    }
    write_results(directory, groups, reports, meta)
    plot_widths({Path(args.model).name: reports}, directory / "widths.png")
    print(as_table(reports))
    print(f"samples, results and plot are in {directory}")


def trained_with(model: str) -> Recipe | None:
    """The recipe that a run left beside its model: prompts and sampling are then those it was trained for."""
    path = Path(model) / "recipe.yaml"
    return load_recipe(path) if path.is_file() else None


def first(*values: Any) -> Any:
    """The first that is not None."""
    return next(value for value in values if value is not None)


def output_directory(model: str) -> Path:
    """Beside a local checkpoint; for a hub id, under runs/."""
    return (Path(model) if Path(model).is_dir() else Path("runs") / Path(model).name) / "eval"


def generate(args: argparse.Namespace) -> None:
    """Print one group of completions for a prompt."""
    model, tokenizer = load_for_sampling(args.model)
    prompt: Any = args.prompt
    if tokenizer.chat_template is not None:
        prompt = [{"role": "user", "content": args.prompt}]
    params = SamplingParams(
        args.max_new_tokens, args.temperature, seed=args.seed, eos_token_id=eos_ids(model, tokenizer)
    )
    [group] = generate_groups(model, prompt_tokens(tokenizer, [prompt]), args.width, params)
    for number, (tokens, reason) in enumerate(zip(group.tokens, group.finish_reasons, strict=True)):
        print(f"--- row {number} ({len(tokens)} tokens, {reason})")
        print(tokenizer.decode(tokens, skip_special_tokens=True))


def parse_widths(text: str) -> list[int]:
    """`1,2,4` -> [1, 2, 4]. Raises UserError for anything else."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"--widths is '{text}': write numbers with commas between, such as 1,2,4,8.") from error


def load_for_sampling(path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model ready to sample, and its tokenizer."""
    section = ModelSection(path, dtype="bfloat16" if torch.cuda.is_available() else "float32")
    model = load_model(section).to(PartialState().device)
    return model.eval(), load_tokenizer(section)
