"""What controls say: whether siblings help, at which width, and whether what siblings say is the reason.

Three questions for each width above 1, each a family of paired comparisons with its own correction for their number:

siblings: pass@1 of the model against its own rows alone (width 1), its Bridge disabled, and shuffled siblings.
coverage: whether any of w rows is right, against as many independent rows.
vote: a majority vote over a group, against one over independent rows that cost as many tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from bridge_rl.evaluation.aggregate import (
    Chooser,
    ProblemMeans,
    aggregate_answers,
    by_setting,
    chosen_means,
    compare_means,
    label_of,
    problem_means,
    regroup,
    samples_at_equal_cost,
    tokens_per_set,
)
from bridge_rl.evaluation.intervals import holm
from bridge_rl.evaluation.results import Aggregated, Comparison
from bridge_rl.evaluation.samples import SampledGroup

Outcome = Literal["helps", "no difference found", "hurts"]
Control = Literal["width 1", "disabled", "shuffled"]
Settings = dict[tuple[str, int], list[SampledGroup]]
LEVEL = 0.05
EQUAL_TOKENS = "majority vote at equal tokens"
FEWER_TOKENS = "majority vote against fewer tokens"  # where too few independent rows were sampled
WORDS = {"width 1": "at width 1", "disabled": "with the Bridge disabled", "shuffled": "with shuffled siblings"}


class Tested(NamedTuple):
    """The model at a width against a control. `p` is corrected, `comparison.p` is not; values on shared problems."""

    width: int
    control: Control
    comparison: Comparison
    first: float
    second: float
    p: float = 1.0

    @property
    def outcome(self) -> Outcome:
        if self.p >= LEVEL:
            return "no difference found"
        return "helps" if self.comparison.difference.value > 0 else "hurts"


@dataclass(frozen=True)
class WidthVerdict:
    """Of pass@1 at one width. `outcome`: helps where it does against every control, hurts where against any."""

    width: int
    outcome: Outcome
    by_control: dict[Control, Outcome]


@dataclass(frozen=True)
class Controls:
    """What the controls say: every comparison (p uncorrected), sentences, and a verdict a width."""

    comparisons: list[Comparison]
    verdicts: list[str]
    by_width: list[WidthVerdict]


def judge_controls(groups: Sequence[SampledGroup]) -> Controls:
    """Compare the model at each width above 1 with whichever controls are among `groups`; all lists may be empty.

    An effect is called one where the p of the paired permutation test, corrected by Holm's method for the number of
    comparisons of its question, is below 0.05.
    """
    settings = by_setting(groups)
    means = {key: problem_means(own) for key, own in settings.items()}
    widths = [width for condition, width in settings if condition == "model" and width > 1]
    siblings = corrected([t for width in widths for t in sibling_tests(settings, means, width)])
    coverage = corrected([t for width in widths for t in coverage_test(settings, means, width)])
    votes = corrected([t for width in widths for t in vote_tests(settings, width)])
    own = {width: [t for t in siblings if t.width == width] for width in widths}
    own = {width: tests for width, tests in own.items() if tests}
    by_width = [WidthVerdict(w, overall(tests), {t.control: t.outcome for t in tests}) for w, tests in own.items()]
    verdicts = [sibling_sentence(width, tests) for width, tests in own.items()]
    verdicts += [coverage_sentence(t) for t in coverage if fell(t, own.get(t.width, []))]
    verdicts += [vote_sentence(t) for t in votes]
    families = {"pass@1": len(siblings), "coverage": len(coverage), "majority votes": len(votes)}
    several = [f"{number} comparisons of {what}" for what, number in families.items() if number > 1]
    if several:
        verdicts.append(f"p values are corrected (Holm) for {', '.join(several)}; intervals are not.")
    return Controls([t.comparison for t in siblings + coverage + votes], verdicts, by_width)


def corrected(tests: list[Tested]) -> list[Tested]:
    """With p corrected for how many there are."""
    ps = holm([test.comparison.p for test in tests])
    return [test._replace(p=p) for test, p in zip(tests, ps, strict=True)]


def independent_arms(settings: Settings, width: int) -> dict[Control, tuple[str, int]]:
    """Where independent rows are found. Of the disabled ones those of this width, else of that with the most rows."""
    arms: dict[Control, tuple[str, int]] = {}
    if ("model", 1) in settings:
        arms["width 1"] = ("model", 1)
    disabled = {key: sum(len(g.correct) for g in own) for key, own in settings.items() if key[0] == "disabled"}
    if disabled:
        same = ("disabled", width)
        arms["disabled"] = same if same in disabled else max(disabled, key=lambda key: disabled[key])
    return arms


def sibling_tests(settings: Settings, means: dict[tuple[str, int], ProblemMeans], width: int) -> list[Tested]:
    arms = independent_arms(settings, width)
    if ("shuffled", width) in settings:
        arms = {"shuffled": ("shuffled", width), **arms}
    mine, label = means["model", width]["pass@1"], label_of(settings["model", width])
    return [
        tested(width, control, "siblings", "pass@1", mine, means[key]["pass@1"], label, label_of(settings[key]))
        for control, key in arms.items()
    ]


def coverage_test(settings: Settings, means: dict[tuple[str, int], ProblemMeans], width: int) -> list[Tested]:
    """Against rows alone, or else those of the disabled Bridge; none where no problem has as many."""
    for control, key in independent_arms(settings, width).items():
        alone = regroup(settings[key], width)
        if alone:
            mine, label = means["model", width]["any"], label_of(settings["model", width])
            other = f"{label_of(settings[key])}, {width} rows"
            return [tested(width, control, "coverage", "any", mine, problem_means(alone)["any"], label, other)]
    return []


def vote_tests(settings: Settings, width: int) -> list[Tested]:
    mine = settings["model", width]
    tests = []
    for control, key in independent_arms(settings, width).items():
        sets = regroup(settings[key], samples_at_equal_cost(mine, settings[key]))
        short = tokens_per_set(sets) * (1 + 1 / sets[0].width) < tokens_per_set(mine)  # a whole row is missing, or more
        label = f"{label_of(mine)}, {tokens_per_set(mine):.0f} tokens"
        other = f"{label_of(settings[key])}, {sets[0].width} rows, {tokens_per_set(sets):.0f} tokens"
        votes = chosen_means(mine, "majority"), chosen_means(sets, "majority")
        tests.append(tested(width, control, FEWER_TOKENS if short else EQUAL_TOKENS, "maj", *votes, label, other))
    return tests


def tested(
    width: int,
    control: Control,
    name: str,
    metric: str,
    first: dict[int, float],
    second: dict[int, float],
    first_label: str,
    second_label: str,
) -> Tested:
    comparison = compare_means(first, second, metric, name, first_label, second_label)
    shared = first.keys() & second.keys()
    sides = (sum(side[problem] for problem in shared) / len(shared) for side in (first, second))
    return Tested(width, control, comparison, *sides)


def overall(tests: Sequence[Tested]) -> Outcome:
    outcomes = {test.outcome for test in tests}
    if "hurts" in outcomes:
        return "hurts"
    return "helps" if outcomes == {"helps"} else "no difference found"


def fell(coverage: Tested, siblings: Sequence[Tested]) -> bool:
    """Whether coverage fell while pass@1 rose against the same rows."""
    rose = any(test.outcome == "helps" for test in siblings if test.control == coverage.control)
    return rose and coverage.outcome == "hurts"


def sibling_sentence(width: int, tests: Sequence[Tested]) -> str:
    """The verdict of a width with the numbers of every control."""
    clauses = [f"{decimal(test.second)} {WORDS[test.control]} {numbers(test)}" for test in tests]
    # The model's own value may differ between controls where these miss some problems; the first control's stands.
    text = f"At width {width} {headline(tests)}: pass@1 {decimal(tests[0].first)} against {', '.join(clauses)}."
    if any(test.outcome == "no difference found" for test in tests):
        text += " Where no difference was found, one as large as the interval's ends is still possible."
    return text


def headline(tests: Sequence[Tested]) -> str:
    outcomes = {test.control: test.outcome for test in tests}
    shuffled = outcomes.pop("shuffled", None)
    if shuffled == "helps" and set(outcomes.values()) == {"helps"}:
        return "siblings help"
    parts = [_against_alone(outcomes)] if outcomes else []
    if shuffled == "helps":
        parts.append("own siblings do better than shuffled ones")
    elif shuffled == "hurts":
        parts.append("own siblings do worse than shuffled ones")
    elif shuffled is not None and gain_is_elsewhere(tests):
        parts.append("shuffled siblings do as well, so what siblings say is not what helps")
    elif shuffled is not None:
        parts.append("own siblings are not shown to do better than shuffled ones")
    elif "helps" in outcomes.values():
        parts.append("without a run with shuffled siblings it is open whether what siblings say is the reason")
    return "; ".join(parts)


def gain_is_elsewhere(tests: Sequence[Tested]) -> bool:
    """Whether rows gain by being together, and by most of that beside shuffled siblings too.

    That is: they do better than all rows alone, and the interval of own over shuffled siblings ends below half of the
    smallest such gain. That no difference was found would not say so.
    """
    gains = [test.comparison.difference.value for test in tests if test.control != "shuffled"]
    if not gains or any(test.outcome != "helps" for test in tests if test.control != "shuffled"):
        return False
    [shuffled] = [test.comparison.difference for test in tests if test.control == "shuffled"]
    return shuffled.high is not None and shuffled.high < min(gains) / 2


def _against_alone(outcomes: dict[Control, Outcome]) -> str:
    found = set(outcomes.values())
    if found == {"helps"}:
        return "rows do better together than alone"
    if found == {"no difference found"}:
        return "no difference between rows together and alone was found"
    if found == {"hurts"}:
        return "rows do worse together than alone"
    clauses = {
        "helps": "do better than",
        "hurts": "do worse than",
        "no difference found": "are not shown to differ from",
    }
    return "rows together " + " and ".join(f"{clauses[outcomes[c]]} those {WORDS[c]}" for c in outcomes)


def coverage_sentence(test: Tested) -> str:
    return (
        f"At width {test.width} coverage fell while pass@1 rose: some row is right in {decimal(test.first)} of groups, "
        f"against {decimal(test.second)} of {test.width} independent rows {WORDS[test.control]} {numbers(test)}. "
        "Whoever picks the best of a group with a verifier loses by that."
    )


def vote_sentence(test: Tested) -> str:
    words = {"helps": "is better than", "hurts": "is worse than", "no difference found": "is not shown to differ from"}
    cost = "at equal cost"
    if test.comparison.name == FEWER_TOKENS:
        cost = "at lower cost (too few were sampled for equal tokens)"
    return (
        f"At width {test.width} the majority vote {words[test.outcome]} that of independent rows {cost}: "
        f"{decimal(test.first)} ({test.comparison.first}) against {decimal(test.second)} ({test.comparison.second}), "
        f"{numbers(test)[1:-1]}."
    )


def numbers(test: Tested) -> str:
    """`(difference .090, 95 % interval .061 to .119, p .0002)`."""
    found = test.comparison.difference
    interval = "no interval from one problem"
    if found.low is not None and found.high is not None:
        interval = f"95 % interval {decimal(found.low)} to {decimal(found.high)}"
    return f"(difference {decimal(found.value)}, {interval}, p {format(test.p, '.2g').removeprefix('0')})"


def decimal(value: float) -> str:
    """`.523`, `-.041`, `1.000`."""
    text = f"{value:.3f}".replace("-0.000", "0.000")
    return text.replace("0.", ".", 1) if text.removeprefix("-").startswith("0.") else text


def at_equal_cost(
    groups: Sequence[SampledGroup], methods: Sequence[str | Chooser] = ("majority", "best-of-n")
) -> list[Aggregated]:
    """Each method at each width of the model, beside independent rows of as many tokens: of width 1, and disabled."""
    settings = by_setting(groups)
    found: list[Aggregated] = []
    for width in [width for condition, width in settings if condition == "model"]:
        mine = settings["model", width]
        arms = [settings[key] for key in independent_arms(settings, width).values()]
        for method in methods:
            found.append(aggregate_answers(mine, method))
            found += [aggregate_answers(alone, method, samples_at_equal_cost(mine, alone)) for alone in arms]
    return list({(a.method, a.condition, a.width, a.samples): a for a in found}.values())
