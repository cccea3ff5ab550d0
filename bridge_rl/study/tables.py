"""The tables of a study's report, each of one task."""

from collections.abc import Iterable, Sequence

from bridge_rl.evaluation.results import Estimate
from bridge_rl.report.labels import METRICS, estimate, number, shorter
from bridge_rl.report.tables import Table
from bridge_rl.study.cells import rate_name
from bridge_rl.study.compare import (
    SETS,
    Difference,
    RelativeGain,
    Setting,
    TaskCells,
    relative_gain,
    relative_text,
)


def cell_text(value: Estimate | None) -> str:
    return "-" if value is None else shorter(value)


def main_table(task: TaskCells) -> Table:
    """Mean over each arm's own seeds."""
    study, width = task.study, task.width
    header = ["arm", "learning rate", "seeds", *(f"pass@1, w = {w}" for w in study.widths)]
    header += [f"all {width} of {width} right", f"any of {width} right (coverage)", f"vote of {width}"]
    rows = []
    for arm in task.arms():
        values = [task.mean(Setting(arm, w), "pass@1") for w in study.widths]
        values += [task.mean(Setting(arm, width), metric) for metric in SETS]
        rows.append([study.label(arm), rates(task, arm), str(len(task.cells[arm])), *map(cell_text, values)])
    note = "Mean over seeds and 95 % interval of Student's t over seeds (trainings; each answers the same problems)."
    if len({frozenset(task.cells[arm]) for arm in task.arms()}) > 1:
        note += " Arms have other seeds than others here, so compare them in the next table, which is paired."
    return Table("Accuracy", header, rows, note=note)


def difference_table(task: TaskCells, differences: Sequence[Difference]) -> Table:
    """The headline arm minus each other one at the width of training."""
    study, width = task.study, task.width
    header = ["minus", "metric", "difference", "over seeds and problems", "seeds"]
    rows = [[study.label(found.second.arm), METRICS[found.metric], *difference_texts(found)] for found in differences]
    gain = relative_gain(task, width) if task.cells[study.headline] else None
    note = (
        "Paired by seed, on the seeds that both have; the interval that counts is that over seeds (Student's t). The "
        "other one is a two-way bootstrap over seeds and problems, too narrow for few seeds."
    )
    if gain is not None:
        has_interval = gain.relative is not None and gain.relative.low is not None
        fieller = ", with Fieller's interval" if has_interval else ""
        note += (
            f" Gain over the base: {estimate(gain.gain)}, of the next best arm ({study.label(gain.next_best)}, by its "
            f"mean) {estimate(gain.next_gain)}; relative gain {relative_text(gain)}{fieller} "
            f"(paired seeds: {len(gain.seeds)})."
        )
    return Table(f"{study.label(study.headline)} minus each arm at width {width}", header, rows, 2, note)


def gain_table(task: TaskCells, gains: Sequence[RelativeGain]) -> Table:
    """Of every arm with a Bridge at every width."""
    study = task.study
    header = ["arm", "width", "gain over the base", "next best arm", "its gain", "difference", "relative gain", "seeds"]
    rows = [
        [
            study.label(found.arm),
            str(found.width),
            shorter(found.gain),
            study.label(found.next_best),
            shorter(found.next_gain),
            shorter(found.difference),
            "-" if found.relative is None else shorter(found.relative),
            str(len(found.seeds)),
        ]
        for found in gains
    ]
    note = (
        f"The bar is asked of {study.label(study.headline)} at width {task.width} alone; the other rows were not "
        "chosen beforehand. The next best arm at a width is the control with the best mean there."
    )
    return Table("Gains over the base (pass@1)", header, rows, 4, note)


def vote_table(task: TaskCells, votes: Sequence[tuple[Difference, Difference]]) -> Table:
    """What the tokens of a group give: one row of it, or a vote of its rows."""
    study = task.study
    header = ["arm", "width", "minus the vote of", "a row of the group", "a vote of the group", "seeds"]
    rows = [
        [
            study.label(row.first.arm),
            str(row.first.width),
            study.label(row.second.arm),
            shorter(row.over_seeds),
            shorter(vote.over_seeds),
            str(len(row.seeds)),
        ]
        for row, vote in votes
    ]
    note = "Both sides spend the tokens of as many completions; rows of the controls do not hear each other."
    return Table("Against a vote of as many rows", header, rows, 3, note)


def rates(task: TaskCells, arm: str) -> str:
    """The learning rate of its cells; of the base a dash."""
    found = {result.learning_rate for result in task.cells[arm].values()}
    return ", ".join(rate_name(rate) for rate in sorted(rate for rate in found if rate is not None)) or "-"


def difference_texts(found: Difference) -> list[str]:
    return [cell_text(found.over_seeds), cell_text(found.over_both), str(len(found.seeds))]


def sibling_table(task: TaskCells, siblings: Sequence[Difference]) -> Table:
    words = {"shuffled": "shuffled siblings", "disabled": "Bridge disabled", "model": "width 1"}
    header = ["arm", "width", "minus", "difference", "over seeds and problems", "seeds"]
    rows = [
        [task.study.label(d.first.arm), str(d.first.width), words[d.second.condition], *difference_texts(d)]
        for d in siblings
    ]
    return Table("The same checkpoint with its own siblings, minus without them (pass@1)", header, rows, 3)


def cost_table(task: TaskCells) -> Table:
    header = ["arm", "step, s", "warm-up, s", "training, min", "evaluation, min", "tokens a completion"]
    rows = []
    for arm in task.arms():
        own = list(task.cells[arm].values())
        seconds = [least(r.seconds.step for r in own), least(r.seconds.warm_up for r in own)]
        minutes = [least(r.seconds.training for r in own), least(r.seconds.evaluation for r in own)]
        length = task.mean(Setting(arm, task.width), "length")
        times = [*seconds, *(None if value is None else value / 60 for value in minutes)]
        texts = ["-" if value is None else number(value) for value in times]
        rows.append([task.study.label(arm), *texts, "-" if length is None else number(length.value)])
    note = (
        "Each of the seed that took least of what was timed, since other work on the machine only adds. Arms with a "
        f"Bridge are evaluated at every width{' and under every control' if task.study.controls else ''}, others once "
        "for all widths."
    )
    return Table("Cost of a cell", header, rows, note=note)


def least(values: Iterable[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)


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
