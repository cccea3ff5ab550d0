"""From sampled groups to summaries, paired comparisons, voted answers and length curves."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np

from bridge_rl.errors import UserError
from bridge_rl.evaluation.intervals import Array, estimate, estimates, paired_estimates, sign_flip_p
from bridge_rl.evaluation.metrics import (
    best_row,
    bounds,
    group_metrics,
    majority_row,
    mixed_metrics,
    pooled_metrics,
)
from bridge_rl.evaluation.results import Aggregated, Comparison, Condition, Estimate, LengthPoint, Summary
from bridge_rl.evaluation.samples import SampledGroup, groups_by_problem

CONDITIONS = get_args(Condition)
# By metric, the mean over its groups of each problem that has a value.
ProblemMeans = dict[str, dict[int, float]]
# Gets one dictionary a row (completion, answer, logprob in nats of the whole, tokens: how many); gives the index of the
# row it chooses, or an answer that a row has, or None for no answer.
Chooser = Callable[[list[dict[str, Any]]], int | str | None]


def independent(groups: Sequence[SampledGroup]) -> bool:
    """Whether no row depends on another: the Bridge is switched off, or no row has siblings."""
    return all(group.condition == "disabled" or group.width == 1 for group in groups)


def by_setting(groups: Iterable[SampledGroup]) -> dict[tuple[str, int], list[SampledGroup]]:
    """Groups of each condition and width, in the order of `Condition`, then of the widths."""
    found: dict[tuple[str, int], list[SampledGroup]] = {}
    for group in groups:
        found.setdefault((group.condition, group.width), []).append(group)
    return {key: found[key] for key in sorted(found, key=lambda key: (CONDITIONS.index(key[0]), key[1]))}


def problem_means(groups: Sequence[SampledGroup]) -> ProblemMeans:
    """Every metric of every problem; all groups of one condition and width.

    mixed/.. where width > 1 and a problem has as many groups as rows; pooled/.. where rows are independent.
    """
    means: ProblemMeans = {}
    shares: dict[int, dict[int, list[float]]] = {}  # by number of groups, since arrays have no ragged rows
    alone = independent(groups)
    for own in groups_by_problem(groups):
        problem, width = own[0].problem, own[0].width
        found = [group_metrics(group) for group in own]
        values = {name: sum(metrics[name] for metrics in found) / len(own) for name in found[0]}
        if alone:
            values |= pooled_metrics(len(own) * width, sum(sum(group.correct) for group in own))
        for name, value in values.items():
            means.setdefault(name, {})[problem] = value
        if 1 < width <= len(own):
            shares.setdefault(len(own), {})[problem] = [metrics["pass@1"] for metrics in found]
    for alike in shares.values():
        for name, mixed in mixed_metrics(np.array(list(alike.values())), groups[0].width).items():
            means.setdefault(name, {}).update(zip(alike, map(float, mixed), strict=True))
    return means


def summarize(groups: Sequence[SampledGroup]) -> list[Summary]:
    """One summary for each condition and width, in the order of `by_setting`.

    `groups_per_problem` is the least of any problem.
    """
    summaries = []
    for (_, width), own in by_setting(groups).items():
        means, numbers = problem_means(own), [len(of_one) for of_one in groups_by_problem(own)]
        found = estimates(as_matrix(means), [bounds(name, width) for name in means])
        metrics = dict(zip(means, found, strict=True))
        summaries.append(Summary(own[0].condition, width, len(numbers), min(numbers), metrics))
    return summaries


def as_matrix(means: ProblemMeans) -> Array:
    """[problems, metrics], NaN where a problem has no value."""
    problems = sorted({problem for values in means.values() for problem in values})
    columns = [[values.get(problem, np.nan) for problem in problems] for values in means.values()]
    return np.array(columns).T


def compare(
    first: Sequence[SampledGroup],
    second: Sequence[SampledGroup],
    metric: str,
    name: str,
    first_label: str | None = None,
    second_label: str | None = None,
) -> Comparison:
    """First minus second, paired on the problems that both have; each side of one condition and width.

    The interval is that of the mean difference over problems, p that of `sign_flip_p`. Labels are by default condition
    and width. Raises UserError where a side has no such metric, or they share no problem.
    """
    labels = (first_label or label_of(first), second_label or label_of(second))
    sides = problem_means(first), problem_means(second)
    for label, means in zip(labels, sides, strict=True):
        if metric not in means:
            raise UserError(f"{label} has no metric {metric}: it has {', '.join(means)}.")
    limits = bounds(metric, max(first[0].width, second[0].width))
    return compare_means(sides[0][metric], sides[1][metric], metric, name, *labels, limits=limits)


def label_of(groups: Sequence[SampledGroup]) -> str:
    """`model, width 4`."""
    return f"{groups[0].condition}, width {groups[0].width}"


def compare_means(
    first: dict[int, float],
    second: dict[int, float],
    metric: str,
    name: str,
    first_label: str,
    second_label: str,
    limits: tuple[float, float] = (0.0, 1.0),
) -> Comparison:
    """As `compare`, from each problem's value."""
    shared = sorted(first.keys() & second.keys())
    if not shared:
        raise UserError(f"{first_label} and {second_label} have no problem in common: compare runs on the same suite.")
    differences = np.array([first[problem] - second[problem] for problem in shared])
    [found] = paired_estimates(differences[:, None], [limits[1] - limits[0]])
    return Comparison(name, metric, first_label, second_label, found, sign_flip_p(differences), len(shared))


def regroup(groups: Sequence[SampledGroup], width: int) -> list[SampledGroup]:
    """The same rows in groups of another width, in their order; rows that fill no whole group are left out.

    Only where rows are independent (condition `disabled`, or width 1): there, which rows stand in one group is
    arbitrary. Rows of a Bridge's group heard each other, and a group put together from several never was sampled:
    raises ValueError. The result keeps its condition: do not put it among groups that were sampled at that width.
    """
    if not independent(groups):
        raise ValueError("Rows that heard each other cannot be regrouped: only those of disabled or of width 1 can.")
    made = []
    for own in groups_by_problem(groups):
        pool = concatenate(own)
        for number in range(len(pool.correct) // width):
            made.append(rows_of(pool, slice(number * width, (number + 1) * width), width, number))
    return made


ROW_FIELDS = ("completions", "tokens", "answers", "correct", "verdicts", "finish_reasons", "logprobs")


def concatenate(groups: Sequence[SampledGroup]) -> SampledGroup:
    """One group with all rows, and the length limits that all of them have."""
    rows: dict[str, Any] = {name: [x for group in groups for x in getattr(group, name)] for name in ROW_FIELDS}
    limits = set.intersection(*(set(group.correct_at) for group in groups))
    cut = {limit: [x for group in groups for x in group.correct_at[limit]] for limit in sorted(limits)}
    return replace(groups[0], width=len(rows["correct"]), correct_at=cut, **rows)


def rows_of(group: SampledGroup, part: slice, width: int, number: int) -> SampledGroup:
    """Some rows as a group of their own."""
    rows: dict[str, Any] = {name: getattr(group, name)[part] for name in ROW_FIELDS}
    cut = {limit: right[part] for limit, right in group.correct_at.items()}
    return replace(group, width=width, group=number, correct_at=cut, **rows)


def chosen_row(group: SampledGroup, method: str | Chooser) -> int | None:
    """The row whose answer a method gives: `majority`, `best-of-n` (mean log-prob a token), or a user's function.

    Raises UserError for another name, and where a function gives what is neither a row nor the answer of one.
    """
    if method == "majority":
        return majority_row(group)
    if method == "best-of-n":
        return best_row(group)
    if isinstance(method, str):
        raise UserError(f"There is no way to aggregate named '{method}': take majority, best-of-n or a function.")
    fields = zip(group.completions, group.answers, group.logprobs, map(len, group.tokens), strict=True)
    chosen = method([dict(zip(("completion", "answer", "logprob", "tokens"), row, strict=True)) for row in fields])
    if chosen is None:
        return None
    if isinstance(chosen, str) and chosen in group.answers:
        return group.answers.index(chosen)
    if isinstance(chosen, (int, np.integer)) and not isinstance(chosen, bool) and 0 <= chosen < len(group.answers):
        return int(chosen)
    raise UserError(
        f"{method_name(method)} chose {chosen!r} of problem {group.problem}: give the index of a row, from 0 to "
        f"{len(group.answers) - 1}, or the answer of one."
    )


def method_name(method: str | Chooser) -> str:
    return method if isinstance(method, str) else getattr(method, "__name__", type(method).__name__)


def chosen_means(sets: Sequence[SampledGroup], method: str | Chooser) -> dict[int, float]:
    """Of each problem, the share of its sets from which the method gives a right answer."""
    means = {}
    for own in groups_by_problem(sets):
        rows = [chosen_row(group, method) for group in own]
        right = [row is not None and group.correct[row] for row, group in zip(rows, own, strict=True)]
        means[own[0].problem] = sum(right) / len(right)
    return means


def aggregate_answers(
    groups: Sequence[SampledGroup], method: str | Chooser = "majority", samples: int | None = None
) -> Aggregated:
    """One answer a problem from each set of completions, all of one condition and width.

    A set is a group; where rows are independent it can be of any number of `samples`, and `width` is then 1. The first
    row that gave an answer says whether it is right; no answer is wrong. Raises ValueError for other `samples` of a
    Bridge's groups, and as `chosen_row` does.
    """
    alone = independent(groups)
    sets = groups if samples in (None, groups[0].width) else regroup(groups, samples or 1)
    accuracy = estimate([[mean] for mean in chosen_means(sets, method).values()])
    size, width = sets[0].width, 1 if alone else sets[0].width
    return Aggregated(method_name(method), sets[0].condition, width, size, tokens_per_set(sets), accuracy)


def tokens_per_set(groups: Sequence[SampledGroup]) -> float:
    """Tokens sampled for a group, mean over problems."""
    spent = [[sum(map(len, group.tokens)) for group in own] for own in groups_by_problem(groups)]
    return float(np.mean([np.mean(of_problem) for of_problem in spent]))


def samples_at_equal_cost(groups: Sequence[SampledGroup], alone: Sequence[SampledGroup]) -> int:
    """How many independent rows take as many tokens as one of `groups`: the nearest whole number, so within half a row.

    At least 1, and at most what every problem has, so compare `Aggregated.tokens` where samples are few.
    """
    per_row = tokens_per_set(alone) / alone[0].width
    available = min(sum(len(group.correct) for group in own) for own in groups_by_problem(alone))
    return max(1, min(available, round(tokens_per_set(groups) / max(per_row, 1e-9))))


def length_curve(groups: Sequence[SampledGroup]) -> list[LengthPoint]:
    """Accuracy (pass@1) of each condition and width at every limit that all its groups were judged at, sorted.

    A row is cut by a limit if it is longer, or if sampling itself stopped there.
    """
    points = []
    for (_, width), own in by_setting(groups).items():
        limits = set.intersection(*(set(group.correct_at) for group in own))
        problems = groups_by_problem(own)
        for limit in sorted(limits):
            accuracy: Estimate = estimate(
                [[sum(group.correct_at[limit]) / width for group in of_one] for of_one in problems]
            )
            cut = [np.mean([share_cut(group, limit) for group in of_one]) for of_one in problems]
            points.append(LengthPoint(own[0].condition, width, limit, accuracy, float(np.mean(cut))))
    return points


def share_cut(group: SampledGroup, limit: int) -> float:
    rows = zip(group.tokens, group.finish_reasons, strict=True)
    return sum(len(t) > limit or (len(t) == limit and reason == "length") for t, reason in rows) / len(group.tokens)
