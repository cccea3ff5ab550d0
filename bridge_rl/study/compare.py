"""What the cells of one task say together: means over seeds, paired differences, relative gain, and the bars."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bridge_rl.errors import UserError
from bridge_rl.evaluation.results import Estimate
from bridge_rl.report.labels import estimate
from bridge_rl.study.cautions import votes_count
from bridge_rl.study.cells import find_result, is_ready, result_path, search_cells, seed_cells
from bridge_rl.study.config import Study
from bridge_rl.study.results import CellResult
from bridge_rl.study.statistics import Array, over_seeds, over_seeds_and_problems, ratio

PAPERS_GAIN = 1.39  # of the paper's 7B model over its next best arm
SETS = ("all", "any", "maj")  # beside pass@1, at the width of training


class Setting(NamedTuple):
    """An arm as it was sampled."""

    arm: str
    width: int
    condition: str = "model"


@dataclass(frozen=True)
class Difference:
    """First minus second on the seeds that both have. over_seeds is the headline; over_both: see `statistics`.

    second_metric: what is taken off; `metric` too, but for pass@1 against a vote.
    """

    first: Setting
    second: Setting
    metric: str
    second_metric: str
    seeds: list[int]
    over_seeds: Estimate
    over_both: Estimate | None

    @property
    def above_zero(self) -> bool | None:
        return above_zero(self.over_seeds)


def above_zero(value: Estimate) -> bool | None:
    """Whether the interval is; None without one."""
    return None if value.low is None else value.low > 0


@dataclass(frozen=True)
class RelativeGain:
    """An arm's gain in pass@1 over the base, over that of the next best arm; Fieller's interval.

    difference: of the two gains, paired by seed. relative: None where the next best arm gains nothing over the base: a
    ratio to that says nothing.
    """

    arm: str
    width: int
    next_best: str
    seeds: list[int]
    gain: Estimate
    next_gain: Estimate
    difference: Estimate
    relative: Estimate | None


@dataclass(frozen=True)
class TaskCells:
    """The finished cells of a task. cells: arm -> seed -> result. search: arm -> learning rate -> result."""

    study: Study
    task: str
    cells: dict[str, dict[int, CellResult]]
    search: dict[str, dict[float, CellResult]]

    @property
    def width(self) -> int:
        """Of the headline arm's training; of another's where that has no results."""
        of_headline_first = [self.cells[self.study.headline], *self.cells.values()]
        return next(result.trained_width for own in of_headline_first for result in own.values())

    def values(self, setting: Setting, metric: str) -> dict[int, float]:
        """By seed; of those that were sampled so. No votes where they leave most right rows out."""
        if metric == "maj" and not votes_count(self.cells[setting.arm].values()):
            return {}
        found = {s: r.find(metric, setting.width, setting.condition) for s, r in self.cells[setting.arm].items()}
        return {seed: value.value for seed, value in sorted(found.items()) if value is not None}

    def mean(self, setting: Setting, metric: str) -> Estimate | None:
        """Over the seeds that there are."""
        values = list(self.values(setting, metric).values())
        return over_seeds(values) if values else None

    def missing(self) -> dict[str, list[int]]:
        """Seeds that were planned and are not there, by arm."""
        left = {arm: [seed for seed in self.study.seeds if seed not in own] for arm, own in self.cells.items()}
        return {arm: seeds for arm, seeds in left.items() if seeds}

    def arms(self, role: str | None = None) -> list[str]:
        """Those that have results, of a role where one is given."""
        return [arm for arm, own in self.cells.items() if own and role in (None, self.study.arms[arm].role)]


def read_task(study: Study, task: str, results: Path) -> TaskCells:
    """Nothing of cells whose learning rate is still searched.

    Raises UserError where results are of different problems or bases, or of another recipe than the study's.
    """
    cells: dict[str, dict[int, CellResult]] = {arm: {} for arm in study.arms}
    search: dict[str, dict[float, CellResult]] = {arm: {} for arm in study.arms}
    seen: dict[str, str] = {}
    for cell in [*search_cells(study), *seed_cells(study, results)]:
        result = find_result(study, cell, results) if cell.task == task and is_ready(study, cell) else None
        if result is None:
            continue
        for name, digest in ((f"{result.split} problems", result.problems), ("weights of the base", result.base)):
            if digest is not None and seen.setdefault(name, digest) != digest:
                path = result_path(results, cell)
                raise UserError(f"{path} was made with other {name} than the results beside it: delete one or other.")
        if cell.search:
            assert cell.learning_rate is not None
            search[cell.arm][cell.learning_rate] = result
        else:
            cells[cell.arm][cell.seed] = result
    return TaskCells(study, task, cells, search)


# -- comparisons ------------------------------------------------------------------------------------------------------


def compare(
    task: TaskCells,
    first: Setting,
    second: Setting,
    metric: str = "pass@1",
    second_metric: str | None = None,
    among: Sequence[int] | None = None,
) -> Difference | None:
    """On the seeds that both have, of those `among` where given; None where there are none."""
    second_metric = second_metric or metric
    ours, theirs = task.values(first, metric), task.values(second, second_metric)
    seeds = sorted(seed for seed in ours.keys() & theirs.keys() if among is None or seed in among)
    if not seeds:
        return None
    by_problem = [
        problem_values(task.cells[setting.arm], seeds, setting, of_setting)
        for setting, of_setting in ((first, metric), (second, second_metric))
    ]
    both = None
    if by_problem[0] is not None and by_problem[1] is not None and len(seeds) > 1:
        both = over_seeds_and_problems(by_problem[0] - by_problem[1])
    by_seed = over_seeds([ours[seed] - theirs[seed] for seed in seeds])
    return Difference(first, second, metric, second_metric, seeds, by_seed, both)


def problem_values(results: dict[int, CellResult], seeds: Sequence[int], setting: Setting, metric: str) -> Array | None:
    """[seeds, problems] of what counts of right rows tell: pass@1, any, all. None for other metrics."""
    rows = []
    for seed in seeds:
        right = results[seed].right(setting.width, setting.condition)
        if right is None or metric not in ("pass@1", "any", "all"):
            return None
        counts = np.array(right)  # [groups, problems]
        of_group = {"pass@1": counts / setting.width, "any": counts > 0, "all": counts == setting.width}[metric]
        rows.append(of_group.mean(axis=0))
    return np.array(rows, dtype=np.float64)


def next_best(task: TaskCells, width: int, seeds: Sequence[int]) -> str:
    """The control arm with the best mean pass@1 over `seeds`."""
    values = {arm: task.values(Setting(arm, width), "pass@1") for arm in task.arms("control")}
    return max(values, key=lambda arm: float(np.mean([values[arm][seed] for seed in seeds])))


def relative_gain(task: TaskCells, width: int, arm: str | None = None) -> RelativeGain | None:
    """Of `arm`, else of the headline arm, on the seeds that it, the base and every control that has any have.

    None where there are none.
    """
    arm, base = arm or task.study.headline, task.study.base
    arms = [arm, base, *task.arms("control")]
    values = {arm: task.values(Setting(arm, width), "pass@1") for arm in arms}
    seeds = sorted(set.intersection(*(set(of_arm) for of_arm in values.values())))
    if not seeds or not task.arms("control"):
        return None
    best = next_best(task, width, seeds)
    gain, next_gain = ([values[name][seed] - values[base][seed] for seed in seeds] for name in (arm, best))
    ours, theirs = over_seeds(gain), over_seeds(next_gain)
    difference = over_seeds([one - other for one, other in zip(gain, next_gain, strict=True)])
    relative = ratio(gain, next_gain) if theirs.value > 0 else None
    return RelativeGain(arm, width, best, seeds, ours, theirs, difference, relative)


# -- all of a task ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparisons:
    """Of one task, each made once, for tables and numbers. Empty where there are no results.

    differences: the headline arm minus each other one, at the width of training. gains: of every arm with a Bridge at
    every width. votes: such an arm at widths above 1 against the vote of each control, as pass@1 and as its own vote.
    siblings: such an arm with its own siblings minus the same with shuffled ones, disabled, and alone. bars: see
    `verdicts`.
    """

    differences: list[Difference]
    gains: list[RelativeGain]
    votes: list[tuple[Difference, Difference]]
    siblings: list[Difference]
    bars: list[str]


def all_comparisons(task: TaskCells) -> Comparisons:
    if not task.arms():
        return Comparisons([], [], [], [], [])
    return Comparisons(
        differences(task), gains(task), vote_differences(task), sibling_differences(task), verdicts(task)
    )


def differences(task: TaskCells) -> list[Difference]:
    headline = Setting(task.study.headline, task.width)
    others = [Setting(arm, task.width) for arm in task.arms() if arm != headline.arm]
    found = [compare(task, headline, other, metric) for other in others for metric in ("pass@1", *SETS)]
    return [difference for difference in found if difference is not None]


def gains(task: TaskCells) -> list[RelativeGain]:
    found = [relative_gain(task, width, arm) for arm in task.arms("bridge") for width in task.study.widths]
    return [gain for gain in found if gain is not None]


def vote_differences(task: TaskCells) -> list[tuple[Difference, Difference]]:
    found = []
    for ours in grouped_settings(task):
        for control in task.arms("control"):
            theirs = Setting(control, ours.width)
            row, vote = compare(task, ours, theirs, second_metric="maj"), compare(task, ours, theirs, "maj")
            if row is not None and vote is not None:
                found.append((row, vote))
    return found


def sibling_differences(task: TaskCells) -> list[Difference]:
    found = []
    for own in grouped_settings(task):
        others = own._replace(condition="shuffled"), own._replace(condition="disabled"), own._replace(width=1)
        found += [compare(task, own, other) for other in others]
    return [difference for difference in found if difference is not None]


def grouped_settings(task: TaskCells) -> list[Setting]:
    """Every arm with a Bridge at every width at which a row has siblings."""
    return [Setting(arm, width) for arm in task.arms("bridge") for width in task.study.widths if width > 1]


# -- the bars ---------------------------------------------------------------------------------------------------------


def verdicts(task: TaskCells) -> list[str]:
    """A sentence for each bar of the study, computed from what is there."""
    found = relative_gain(task, task.width) if task.cells[task.study.headline] else None
    if found is None:
        return ["Not known yet: no seed is there of the headline arm, the base and a control."]
    return [gain_verdict(task, found), shuffled_verdict(task, found)]


def incomplete(task: TaskCells, there: int) -> str:
    """What a bar with so many seeds lacks, as a sentence; empty where all is there that it needs."""
    study = task.study
    absent = [study.label(arm) for arm, own in task.cells.items() if study.arms[arm].role == "control" and not own]
    if there == len(study.seeds) and not absent:
        return ""
    return f" Incomplete: {there} of {len(study.seeds)} seeds{''.join(f', none of {label}' for label in absent)}."


def gain_verdict(task: TaskCells, found: RelativeGain) -> str:
    study, ahead = task.study, above_zero(found.difference)
    names = f"{study.label(found.arm)} over {study.label(found.next_best)}, the next best"
    answer = yes_no(ahead and gains_enough(found), ahead)
    return (
        f"Relative gain at least {PAPERS_GAIN}, with the interval of the paired difference above 0: **{answer}**. "
        f"{names}, at width {found.width}: relative gain {relative_text(found)}, "
        f"paired difference {estimate(found.difference)}.{incomplete(task, len(found.seeds))}"
    )


def gains_enough(found: RelativeGain) -> bool:
    """Any gain is, where the next best arm has none."""
    return found.gain.value > 0 if found.relative is None else found.relative.value >= PAPERS_GAIN


def shuffled_verdict(task: TaskCells, found: RelativeGain) -> str:
    """The benefit is lost where own siblings do better than shuffled ones, and with shuffled ones the arm is not shown
    to be ahead of the next best one any more. There is none to lose where it was not with its own."""
    study, width = task.study, found.width
    own, shuffled = Setting(study.headline, width), Setting(study.headline, width, "shuffled")
    lost = compare(task, own, shuffled, among=found.seeds)
    left = compare(task, shuffled, Setting(found.next_best, width), among=found.seeds)
    if lost is None or left is None:
        return "Shuffled siblings lose the benefit: **not known**, they were not sampled."
    ahead = above_zero(found.difference)
    answer = yes_no(lost.above_zero and not left.above_zero, lost.above_zero)
    if not ahead:
        answer = "not known" if ahead is None else "there is none to lose"
    return (
        f"Shuffled siblings lose the benefit: **{answer}**. Own minus shuffled siblings at width {width}: "
        f"{estimate(lost.over_seeds)}; shuffled minus {study.label(found.next_best)}: {estimate(left.over_seeds)}."
        f"{incomplete(task, len(lost.seeds))}"
    )


def relative_text(found: RelativeGain) -> str:
    """A dash, and why, where there is no ratio."""
    if found.relative is None:
        alone = ", and the paired difference alone decides" if found.gain.value > 0 else ""
        return f"- (the next best arm gains nothing over the base{alone})"
    if found.relative.low is None and len(found.seeds) > 1:
        return f"{estimate(found.relative)} (its interval has no end: the gain of the next best is not away from 0)"
    return estimate(found.relative)


def yes_no(holds: bool | None, known: bool | None) -> str:
    """`known` is None where there is no interval."""
    if known is None:
        return "not known"
    return "yes" if holds else "no"
