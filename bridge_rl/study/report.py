"""The report of a study: tables in Markdown, the same numbers in JSON, a figure a task, all from committed results."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bridge_rl.report.drawing import (
    COLOURS,
    DASHES,
    MARKERS,
    arms_of,
    finish,
    log_axis,
    panels,
    save_png,
    shown_name,
    styled,
)
from bridge_rl.report.labels import METRICS
from bridge_rl.report.tables import as_markdown
from bridge_rl.study.cautions import arm_cautions
from bridge_rl.study.cells import rate_name
from bridge_rl.study.compare import SETS, Comparisons, Setting, TaskCells, all_comparisons, read_task
from bridge_rl.study.config import Study
from bridge_rl.study.results import CellResult
from bridge_rl.study.statistics import over_seeds
from bridge_rl.study.tables import (
    cost_table,
    difference_table,
    gain_table,
    main_table,
    rates,
    search_tables,
    sibling_table,
    vote_table,
)


def write_study_report(study: Study, results: Path, directory: Path) -> list[Path]:
    """Returns what was written: `table.md`, `report.json`, and `widths_TASK.png` of tasks that have results."""
    directory.mkdir(parents=True, exist_ok=True)
    tasks = [read_task(study, name, results) for name in study.tasks]
    begun = [task for task in tasks if task.arms()]
    compared = {task.task: all_comparisons(task) for task in tasks}
    parts = [header(study, tasks), *(section(task, compared[task.task]) for task in tasks)]
    content = {"study": asdict(study), "tasks": {task.task: numbers(task, compared[task.task]) for task in tasks}}
    (directory / "table.md").write_text("\n".join(parts), encoding="utf-8")
    (directory / "report.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    figures = [directory / f"widths_{task.task}.png" for task in begun]
    for task, path in zip(begun, figures, strict=True):
        save_png(widths_figure(task), path)
    return [directory / "table.md", directory / "report.json", *figures]


# -- how it was made --------------------------------------------------------------------------------------------------


def header(study: Study, tasks: Sequence[TaskCells]) -> str:
    """What was planned, what is there, on which commit and hardware, and how long it took."""
    done = [result for task in tasks for own in task.cells.values() for result in own.values()]
    searched = [result for task in tasks for own in task.search.values() for result in own.values()]
    planned = len(study.tasks) * len(study.seeds) * len(study.arms)
    made = [made for result in [*done, *searched] for made in (result.made, *result.trained)]
    hours = sum(result.seconds.total for result in [*done, *searched]) / 3600
    untimed = sum(not wholly_timed(result) for result in [*done, *searched])
    lines = [
        "<!-- made by `bridge-rl study ... --report`: do not edit -->",
        "",
        f"- {len(done)} of {planned} cells are done, and {len(searched)} trainings of the learning-rate search.",
        f"- Commits: {unique(commit(entry) for entry in made)}.",
        f"- Hardware: {unique(hardware(entry) for entry in made)}.",
        f"- Versions: {unique(' '.join(f'{k} {v}' for k, v in entry['versions'].items()) for entry in made)}.",
        f"- {hours:.1f} hours of training and evaluation, cell after cell.",
    ]
    if untimed:
        lines.append(f"- Of {untimed} cells a part was not timed: trained before the study, or cut off.")
    lines += [caution for task in tasks if (caution := judged_otherwise(task))]
    return "\n".join([*lines, *(missing_line(task) for task in tasks if task.missing()), ""])


def judged_otherwise(task: TaskCells) -> str:
    """A line where the reward's file or the verifier was edited between cells; empty where they were not."""
    results = [result for own in task.cells.values() for result in own.values()]
    results += [result for own in task.search.values() for result in own.values()]
    versions = len({result.judging for result in results} - {None})
    judged = f"results of {task.task} were judged by {versions} versions of the reward's file or of the verifier"
    return f"- **Caution**: {judged}, and may differ by that." if versions > 1 else ""


def wholly_timed(result: CellResult) -> bool:
    trained_elsewhere = result.learning_rate is not None and not result.trained
    return result.seconds.evaluation is not None and not trained_elsewhere


def commit(made: dict[str, Any]) -> str:
    return f"{made['commit']}{' with changes' if made['dirty'] else ''}"


def hardware(made: dict[str, Any]) -> str:
    return f"{made['cpu']} ({made['hardware']})"


def unique(texts: Iterable[str]) -> str:
    return "; ".join(sorted(set(texts))) or "none yet"


def missing_line(task: TaskCells) -> str:
    arms = [f"{task.study.label(arm)} {', '.join(map(str, seeds))}" for arm, seeds in task.missing().items()]
    return f"- **Incomplete**: of {task.task} these seeds are not there yet: {'; '.join(arms)}."


def section(task: TaskCells, found: Comparisons) -> str:
    """The bars, the cautions and every table of one task."""
    if not task.arms():
        return "\n".join([f"## {task.task}", "", "No cell is done yet.", "", *map(as_markdown, search_tables(task))])
    tables = [
        main_table(task),
        difference_table(task, found.differences),
        gain_table(task, found.gains),
        vote_table(task, found.votes),
        sibling_table(task, found.siblings),
        cost_table(task),
        *search_tables(task),
    ]
    tables = [table for table in tables if table.rows]
    bars = "".join(f"- {sentence}\n" for sentence in [*found.bars, *cautions(task)])
    figure = f"![accuracy over width, with intervals over seeds](widths_{task.task}.png)"
    return "\n".join([f"## {task.task}", "", bars, figure, "", *map(as_markdown, tables)])


def cautions(task: TaskCells) -> list[str]:
    """What the evaluations of each arm warn of."""
    return [
        f"**Caution**, {task.study.label(arm)}, {text}"
        for arm in task.arms()
        for text in arm_cautions(task.cells[arm].values())
    ]


# -- the same as numbers ----------------------------------------------------------------------------------------------


def numbers(task: TaskCells, found: Comparisons) -> dict[str, Any]:
    """Everything that the tables show, and the values of each seed."""
    return {
        "missing": task.missing(),
        "bars": found.bars,
        "arms": {arm: arm_numbers(task, arm) for arm in task.arms()},
        "differences": [asdict(difference) for difference in found.differences],
        "siblings": [asdict(difference) for difference in found.siblings],
        "gains": [asdict(gain) for gain in found.gains],
        "votes": [asdict(difference) for pair in found.votes for difference in pair],
        "search": {
            arm: {rate_name(rate): asdict(result.metric("pass@1")) for rate, result in tried.items()}
            for arm, tried in task.search.items()
        },
    }


def arm_numbers(task: TaskCells, arm: str) -> dict[str, Any]:
    own = task.cells[arm]
    by_width: dict[str, Any] = {}
    for width in task.study.widths:
        for metric in ("pass@1", *SETS):
            values = task.values(Setting(arm, width), metric)
            if values:
                mean = asdict(over_seeds(list(values.values())))
                by_width.setdefault(metric, {})[width] = {**mean, "by_seed": values}
    seconds = {seed: asdict(result.seconds) for seed, result in own.items()}
    return {
        "seeds": sorted(own),
        "learning_rate": rates(task, arm),
        "seconds": seconds,
        "cautions": arm_cautions(own.values()),
        "metrics": by_width,
    }


# -- the figure -------------------------------------------------------------------------------------------------------


@styled
def widths_figure(task: TaskCells) -> Figure:
    """A panel a metric that an arm has, a line an arm over the width sampled; bands are 95 % intervals over seeds."""
    study, arms = task.study, task.arms()
    settings = [Setting(arm, width) for arm in arms for width in study.widths]
    metrics = [metric for metric in METRICS if any(task.values(setting, metric) for setting in settings)]
    figure, axes = panels(len(metrics))
    for axis, metric in zip(axes, metrics, strict=True):
        for place, arm in enumerate(arms):
            found = {width: task.mean(Setting(arm, width), metric) for width in study.widths}
            known = {width: value for width, value in found.items() if value is not None}
            look, widths = place % len(COLOURS), list(known)
            means = np.array([value.value for value in known.values()])
            below, above = arms_of(list(known.values()))  # 0 of one seed
            axis.fill_between(widths, means - below, means + above, color=COLOURS[look], alpha=0.15, linewidth=0)
            axis.plot(
                widths,
                means,
                label=shown_name(study.label(arm)),
                color=COLOURS[look],
                marker=MARKERS[look],
                linestyle=DASHES[look],
            )
        log_axis(axis, sorted(study.widths), "width sampled")
        axis.set_title(METRICS[metric])
    finish(figure, axes, len(arms))
    return figure
