"""One cell, in a process of its own: train what is not trained yet, evaluate, write the result.

`python -m bridge_rl.study.cell STUDY RUNS TASK/ARM/SEED [--search RATE]` is what the runner starts.
"""

import argparse
import json
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from bridge_rl.cli import run_command
from bridge_rl.config import ModelSection, Recipe
from bridge_rl.evaluation.aggregate import by_setting
from bridge_rl.evaluation.analyse import at_every_width
from bridge_rl.evaluation.job import Job, make_job
from bridge_rl.evaluation.results import Results, Summary
from bridge_rl.evaluation.run import listens
from bridge_rl.evaluation.samples import SampledGroup, SampleStore, groups_by_problem
from bridge_rl.evaluation.suites import Suite
from bridge_rl.files import alone_in
from bridge_rl.fingerprint import whole_fingerprint
from bridge_rl.models import load_model, load_tokenizer
from bridge_rl.plan import check, describe
from bridge_rl.report import names
from bridge_rl.report.results import provenance
from bridge_rl.run import train, warm_up
from bridge_rl.run_directory import warmup_directory
from bridge_rl.study.cells import (
    Cell,
    check_trained,
    chosen_rate,
    is_trained,
    overrides_of,
    rate_name,
    recipe_of,
    result_path,
    source_of,
    tried_rates,
)
from bridge_rl.study.config import Study, load_study
from bridge_rl.study.results import DIGITS, CellResult, Counts, Seconds, write_cell

METRICS = ("pass@1", "maj", "any", "all", "mixed/any", "distinct", "length", "truncated", "unparsed", "unjudged")
MOST_POINTS = 50  # of a training's history
STARTS, WARM_UP = "starts.jsonl", "warm_up_seconds.json"


def run_cell(study: Study, cell: Cell, results: Path, runs: Path) -> CellResult:
    """Raises UserError where the directory holds another training, or another process works in it."""
    directory, recipe = runs / cell.place, recipe_of(study, cell, runs)
    base = study.arms[cell.arm].role == "base"
    with alone_in(directory):
        if not base:
            train_cell(recipe, directory)
        job = evaluation_job(study, cell, recipe, directory, base)
        found, groups, seconds = evaluate(job, directory / ("validation" if cell.search else "test"))
        result = CellResult(
            task=cell.task,
            arm=cell.arm,
            seed=cell.seed,
            split="validation" if cell.search else "test",
            learning_rate=cell.learning_rate,
            overrides=overrides_of(study, cell),
            recipe=recipe,
            trained_width=recipe.rollout.width,
            samples=study.samples,
            source=source_of(study, cell),
            problems=job.settings["problems"],
            made=provenance(),
            trained=read_lines(directory / STARTS),
            seconds=Seconds(**training_seconds(directory), evaluation=seconds),
            tried=tried(study, cell, results),
            summaries=[trimmed(summary) for summary in found.summaries],
            aggregated=found.aggregated,
            comparisons=found.comparisons,
            verdicts=found.verdicts,
            counts=count_right(groups, job.section.widths, listens(job.model)),
            history=thinned(read_lines(directory / "history.jsonl")),
            base=whole_fingerprint(load_model(recipe.model)),
            judging=job.settings["judging"],
        )
        write_cell(result, result_path(results, cell))
    return result


# -- training ---------------------------------------------------------------------------------------------------------


def train_cell(recipe: Recipe, directory: Path) -> None:
    """As `bridge-rl train` does; nothing where the same recipe's model is there."""
    if (directory / "recipe.yaml").is_file():  # of a training that may have been cut off: it is not gone on with either
        check_trained(directory, recipe)
    if is_trained(directory):
        print(f"the model is in {directory}: it is only evaluated", flush=True)
        return
    with (directory / STARTS).open("a") as file:
        file.write(json.dumps(provenance()) + "\n")
    print(describe(recipe, check(recipe)), flush=True)
    if recipe.warmup is not None and not warmup_directory(recipe).is_dir():  # a part of one is not worth timing
        start = time.perf_counter()
        warm_up(recipe)
        (directory / WARM_UP).write_text(json.dumps(time.perf_counter() - start))
    train(recipe)


def training_seconds(directory: Path) -> dict[str, float | None]:
    """`step` is the mean of what the trainer logged; a warm-up's time is known where the study ran it."""
    entries = [entry for entry in read_lines(directory / "history.jsonl") if names.STEP_SECONDS in entry]
    steps = [entry["step"] for entry in entries]
    of_entry = [after - before for before, after in zip([0, *steps], steps, strict=False)]
    training = sum(entry[names.STEP_SECONDS] * count for entry, count in zip(entries, of_entry, strict=True))
    path = directory / WARM_UP
    return {
        "warm_up": json.loads(path.read_text()) if path.is_file() else None,
        "training": training if entries else None,
        "step": training / steps[-1] if entries else None,
    }


def thinned(history: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Mean reward of so many log entries that at most MOST_POINTS are left, and the last step of each."""
    logged = [entry for entry in history if "reward" in entry]
    stride = -(-len(logged) // MOST_POINTS) or 1
    parts = [logged[start : start + stride] for start in range(0, len(logged), stride)]
    return {
        "step": [part[-1]["step"] for part in parts],
        "reward": [round(sum(entry["reward"] for entry in part) / len(part), 5) for part in parts],
    }


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


# -- evaluation -------------------------------------------------------------------------------------------------------


def evaluation_job(study: Study, cell: Cell, recipe: Recipe, directory: Path, base: bool) -> Job:
    """What `bridge-rl eval` would do; of a cell of the test problems with `--controls`, if the study says so."""
    section, source = recipe.evaluation, source_of(study, cell)
    name = f"{cell.task}, {'validation' if cell.search else 'test'}"
    data, reward = recipe.data, recipe.rewards[0]
    suite = Suite(
        name, source, "as in the task", "", reward=reward, prompt=data.prompt, system_prompt=data.system_prompt
    )
    trained = recipe.model if base else ModelSection(str(directory), dtype=recipe.model.dtype)
    model = load_model(trained).to(PartialState().device).eval()
    limit = section.max_new_tokens or recipe.rollout.max_new_tokens
    args = Namespace(
        model=trained.path,
        samples=study.samples,
        problems=None,
        max_new_tokens=limit,
        temperature=section.temperature,
        top_p=section.top_p,
        max_rows=section.max_rows,
        seed=cell.seed,
        reward=None,
        controls=study.controls and not cell.search,
        probes=False,
        probe_rows=1,
    )
    widths = [recipe.rollout.width] if cell.search else sorted(study.widths)
    weights, tokenizer = whole_fingerprint(model), load_tokenizer(trained)
    # The base may be a run of its own: it is asked as the arms are all the same.
    of_run = None if base else recipe
    return make_job(args, suite, widths, [limit], ("majority",), model, weights, tokenizer, of_run)


def evaluate(job: Job, directory: Path) -> tuple[Results, list[SampledGroup], float | None]:
    """Results, all groups, and the seconds; None where a part of the samples was there already."""
    evaluation = job.plan(SampleStore(directory / "samples"))
    start = time.perf_counter()
    results = job.run(directory)
    seconds = time.perf_counter() - start
    assert results is not None  # a cell is one process
    return results, evaluation.collected(), None if evaluation.done else seconds


def count_right(groups: Sequence[SampledGroup], widths: Sequence[int], listening: bool) -> list[Counts]:
    found = []
    for (_, width), own in by_setting(at_every_width(groups, widths, listening)).items():
        # [problems][groups]
        digits = [[DIGITS[sum(group.correct)] for group in of_one] for of_one in groups_by_problem(own)]
        found.append(Counts(own[0].condition, width, ["".join(column) for column in zip(*digits, strict=True)]))
    return found


def trimmed(summary: Summary) -> Summary:
    return replace(summary, metrics={name: summary.metrics[name] for name in METRICS if name in summary.metrics})


def tried(study: Study, cell: Cell, results: Path) -> dict[str, float]:
    if cell.search:
        return {}
    return {rate_name(rate): value for rate, value in tried_rates(study, cell.task, cell.arm, results).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("cell")
    parser.add_argument("--search", type=float, default=None, metavar="RATE")
    args = parser.parse_args()
    run_command(lambda: run_named(args.study, args.runs, args.cell, args.search))


def run_named(path: Path, runs: Path, name: str, rate: float | None) -> None:
    study = load_study(path)
    results = path.parent / study.results
    task, arm, seed = name.split("/")
    chosen = chosen_rate(study, task, arm, results) if rate is None else rate
    run_cell(study, Cell(task, arm, int(seed), chosen, search=rate is not None), results, runs)


if __name__ == "__main__":
    main()
