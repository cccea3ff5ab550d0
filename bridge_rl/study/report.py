"""The report of a study: tables in Markdown, the same numbers in JSON, a figure a task, all from committed results."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bridge_rl.evaluation.results import Estimate
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
from bridge_rl.report.labels import METRICS, estimate, number, shorter
from bridge_rl.report.tables import Table, as_markdown
from bridge_rl.study.cells import rate_name
from bridge_rl.study.compare import (
    Difference,
    Setting,
    TaskCells,
    compare,
    read_task,
    relative_gain,
    relative_text,
    verdicts,
)
from bridge_rl.study.config import Study
from bridge_rl.study.statistics import over_seeds

SETS = ("all", "any", "maj")  # beside pass@1, at the width of training


def write_study_report(study: Study, results: Path, directory: Path) -> list[Path]:
    """Returns what was written: `table.md`, `report.json`, and `widths_TASK.png` of tasks that have results."""
    directory.mkdir(parents=True, exist_ok=True)
    tasks = [read_task(study, name, results) for name in study.tasks]
    begun = [task for task in tasks if any(task.cells.values())]
    parts = [header(study, tasks), *(section(task) for task in tasks)]
    content = {"study": asdict(study), "tasks": {task.task: numbers(task) for task in tasks}}
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
    untimed = sum(bool(r.learning_rate) and (not r.trained or r.seconds.evaluation is None) for r in [*done, *searched])
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
        lines.append(f"- Of {untimed} cells a part was not timed: trained before the study, or interrupted.")
    return "\n".join([*lines, *(missing_line(task) for task in tasks if task.missing()), ""])


def commit(made: dict[str, Any]) -> str:
    return f"{made['commit']}{' with changes' if made['dirty'] else ''}"


def hardware(made: dict[str, Any]) -> str:
    return f"{made['cpu']} ({made['hardware']})"


def unique(texts: Iterable[str]) -> str:
    return "; ".join(sorted(set(texts))) or "none yet"


def missing_line(task: TaskCells) -> str:
    arms = [f"{task.study.label(arm)} {', '.join(map(str, seeds))}" for arm, seeds in task.missing().items()]
    return f"- **Incomplete**: of {task.task} these seeds are not there yet: {'; '.join(arms)}."


# -- tables -----------------------------------------------------------------------------------------------------------


def section(task: TaskCells) -> str:
    """The bars and every table of one task."""
    if not any(task.cells.values()):
        return "\n".join([f"## {task.task}", "", "No cell is done yet.", "", *map(as_markdown, search_tables(task))])
    tables = [main_table(task), difference_table(task), sibling_table(task), cost_table(task), *search_tables(task)]
    tables = [table for table in tables if table.rows]
    bars = "".join(f"- {sentence}\n" for sentence in verdicts(task))
    figure = f"![accuracy over width, with intervals over seeds](widths_{task.task}.png)"
    return "\n".join([f"## {task.task}", "", bars, figure, "", *map(as_markdown, tables)])


def arms_with_results(task: TaskCells) -> list[str]:
    return [arm for arm, own in task.cells.items() if own]


def cell_text(value: Estimate | None) -> str:
    return "-" if value is None else shorter(value)


def main_table(task: TaskCells) -> Table:
    """Mean over each arm's own seeds."""
    study, width = task.study, task.width
    header = ["arm", "learning rate", "seeds", *(f"pass@1, w = {w}" for w in study.widths)]
    header += [f"all {width} of {width} right", f"any of {width} right (coverage)", f"vote of {width}"]
    rows = []
    for arm in arms_with_results(task):
        values = [task.mean(Setting(arm, w), "pass@1") for w in study.widths]
        values += [task.mean(Setting(arm, width), metric) for metric in SETS]
        rows.append([study.label(arm), rates(task, arm), str(len(task.cells[arm])), *map(cell_text, values)])
    note = "Mean over seeds and 95 % interval of Student's t over seeds (trainings; each answers the same problems)."
    if len({len(own) for own in task.cells.values()}) > 1:
        note += " Arms have unequal numbers of seeds here, so compare them in the next table, which is paired."
    return Table("Accuracy", header, rows, note=note)


def difference_table(task: TaskCells) -> Table:
    """The headline arm minus each other one at the width of training."""
    study, width = task.study, task.width
    header = ["minus", "metric", "difference", "over seeds and problems", "seeds"]
    rows = [
        [study.label(found.second.arm), METRICS[found.metric], *difference_texts(found)]
        for found in differences(task)
        if found is not None
    ]
    gain = relative_gain(task, width) if task.cells[study.headline] else None
    note = (
        "Paired by seed, on the seeds that both have; the interval that counts is that over seeds (Student's t). The "
        "other one is a two-way bootstrap over seeds and problems, too narrow for few seeds."
    )
    if gain is not None:
        note += (
            f" Gain over the base: {estimate(gain.gain)}, of the next best arm ({study.label(gain.next_best)}, by its "
            f"mean) {estimate(gain.next_gain)}; relative gain {relative_text(gain)}, Fieller's interval over "
            f"{len(gain.seeds)} seeds."
        )
    return Table(f"{study.label(study.headline)} minus each arm at width {width}", header, rows, 2, note)


def rates(task: TaskCells, arm: str) -> str:
    """The learning rate of its cells; of the base a dash."""
    found = {result.learning_rate for result in task.cells[arm].values()} - {None}
    return ", ".join(rate_name(rate) for rate in sorted(found) if rate is not None) or "-"


def differences(task: TaskCells) -> list[Difference | None]:
    headline, width = task.study.headline, task.width
    others = [arm for arm in arms_with_results(task) if arm != headline]
    pairs = [(arm, metric) for arm in others for metric in ("pass@1", *SETS)]
    return [compare(task, Setting(headline, width), Setting(arm, width), metric) for arm, metric in pairs]


def difference_texts(found: Difference) -> list[str]:
    return [cell_text(found.over_seeds), cell_text(found.over_both), str(len(found.seeds))]


def sibling_differences(task: TaskCells) -> list[Difference]:
    """Of every arm with a Bridge, at each width above 1: against shuffled siblings, disabled, and alone."""
    found = []
    for arm in [arm for arm in arms_with_results(task) if task.study.arms[arm].role == "bridge"]:
        for width in [width for width in task.study.widths if width > 1]:
            own = Setting(arm, width)
            others = (Setting(arm, width, "shuffled"), Setting(arm, width, "disabled"), Setting(arm, 1))
            found += [compare(task, own, other) for other in others]
    return [difference for difference in found if difference is not None]


def sibling_table(task: TaskCells) -> Table:
    words = {"shuffled": "shuffled siblings", "disabled": "Bridge disabled", "model": "width 1"}
    header = ["arm", "width", "minus", "difference", "over seeds and problems", "seeds"]
    rows = [
        [task.study.label(d.first.arm), str(d.first.width), words[d.second.condition], *difference_texts(d)]
        for d in sibling_differences(task)
    ]
    return Table("The same checkpoint with its own siblings, minus without them (pass@1)", header, rows, 3)


def cost_table(task: TaskCells) -> Table:
    """Means over seeds of what was timed."""
    header = ["arm", "step, s", "warm-up, s", "training, min", "evaluation, min", "tokens a completion"]
    rows = []
    for arm in arms_with_results(task):
        own = list(task.cells[arm].values())
        seconds = [mean_of(result.seconds.step for result in own), mean_of(result.seconds.warm_up for result in own)]
        minutes = [mean_of(result.seconds.training for result in own), mean_of(r.seconds.evaluation for r in own)]
        length = task.mean(Setting(arm, task.width), "length")
        times = [*seconds, *(None if value is None else value / 60 for value in minutes)]
        texts = ["-" if value is None else number(value) for value in times]
        rows.append([task.study.label(arm), *texts, "-" if length is None else number(length.value)])
    note = "Arms with a Bridge are evaluated at every width and under every control, others once for all widths."
    return Table("Cost of a cell", header, rows, note=note)


def mean_of(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def search_tables(task: TaskCells) -> list[Table]:
    """One, or none where nothing was searched."""
    rows = []
    for arm, tried in task.search.items():
        grid = task.study.arms[arm].learning_rates
        values = {rate: result.metric("pass@1") for rate, result in sorted(tried.items())}
        best = max(grid, key=lambda rate: values[rate].value) if len(values) == len(grid) and grid else None
        for rate, value in values.items():
            rows.append([task.study.label(arm), rate_name(rate), cell_text(value), "chosen" if rate == best else ""])
    note = (
        f"Seed {task.study.search_seed}, pass@1 on the validation problems at the width of training, interval over "
        "problems; the best mean is chosen. One training each: a lead within the spread of seeds is chance."
    )
    return [Table("Learning rates tried", ["arm", "learning rate", "pass@1", ""], rows, note=note)] if rows else []


# -- the same as numbers ----------------------------------------------------------------------------------------------


def numbers(task: TaskCells) -> dict[str, Any]:
    """Everything that the tables show, and the values of each seed."""
    begun = any(task.cells.values())
    gain = relative_gain(task, task.width) if begun and task.cells[task.study.headline] else None
    return {
        "missing": task.missing(),
        "bars": verdicts(task) if begun else [],
        "arms": {arm: arm_numbers(task, arm) for arm in arms_with_results(task)},
        "differences": [asdict(found) for found in differences(task) if found is not None] if begun else [],
        "siblings": [asdict(found) for found in sibling_differences(task)] if begun else [],
        "relative_gain": None if gain is None else asdict(gain),
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
    return {"seeds": sorted(own), "learning_rate": rates(task, arm), "seconds": seconds, "metrics": by_width}


# -- the figure -------------------------------------------------------------------------------------------------------


@styled
def widths_figure(task: TaskCells) -> Figure:
    """One panel a metric, one line an arm over the width sampled; bands are 95 % intervals over seeds."""
    study = task.study
    figure, axes = panels(len(METRICS))
    arms = arms_with_results(task)
    for axis, (metric, title) in zip(axes, METRICS.items(), strict=True):
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
        axis.set_title(title)
    finish(figure, axes, len(arms))
    return figure
