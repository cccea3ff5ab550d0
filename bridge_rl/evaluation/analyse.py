"""From the groups of one evaluation to its results."""

from collections.abc import Sequence
from typing import Any

from bridge_rl.evaluation.aggregate import Chooser, aggregate_answers, by_setting, length_curve, regroup, summarize
from bridge_rl.evaluation.controls import at_equal_cost, judge_controls
from bridge_rl.evaluation.results import Aggregated, Probes, Results, Summary
from bridge_rl.evaluation.samples import SampledGroup

METHODS = ("majority", "best-of-n")
# Metric -> the share above which it is worth a sentence, and what to do.
CAUTIONS = {
    "truncated": (0.1, "were cut at the limit, so accuracy is that of short answers: raise --max-new-tokens"),
    "unparsed": (0.5, "hold no answer that could be read: look at the completions, the prompt or `final_answer`"),
    "unjudged": (0.01, "could not be judged (time-out, error or no score) and count as wrong: look at the reward"),
}
MOST_UNMARKED = 0.1  # share of right rows above which a sentence says so
CAUTION, UNMARKED = "Caution: ", "of right rows mark no answer"  # by which a study finds these sentences


def analyse(
    groups: Sequence[SampledGroup],
    widths: Sequence[int],
    listening: bool,
    meta: dict[str, Any],
    methods: Sequence[str | Chooser] = METHODS,
    probes: Probes | None = None,
) -> Results:
    """Everything that reports show. `listening`: whether the model's rows hear each other; if not, one by one they
    were sampled, and are put into groups of every width here, as are those of the disabled Bridge."""
    at_widths = at_every_width(groups, widths, listening)
    controls = judge_controls(groups)
    summaries = summarize(at_widths)
    return Results(
        meta=meta,
        summaries=summaries,
        comparisons=controls.comparisons,
        verdicts=[*cautions(summaries), *unmarked(groups), *controls.verdicts],
        aggregated=at_equal_cost(groups, methods) if listening else of_every_width(at_widths, methods),
        lengths=length_curve(at_widths),
        probes=probes,
    )


def of_every_width(groups: Sequence[SampledGroup], methods: Sequence[str | Chooser]) -> list[Aggregated]:
    """Each method on independent rows, which have no others to be compared with."""
    return [aggregate_answers(own, method) for own in by_setting(groups).values() for method in methods]


def cautions(summaries: Sequence[Summary]) -> list[str]:
    """What makes the figures say less than they seem to: many rows cut, without an answer, or not judged."""
    found = []
    for name, (most, words) in CAUTIONS.items():
        worst = max(summaries, key=lambda summary: summary.metrics[name].value)
        share = worst.metrics[name].value
        if share > most:
            found.append(f"{CAUTION}{share:.0%} of rows {words} (condition {worst.condition}, width {worst.width}).")
    return found


def unmarked(groups: Sequence[SampledGroup]) -> list[str]:
    """Right rows that no vote counts: a verifier may find an answer in prose, `final_answer` finds marked ones only."""
    right = [answer for group in groups for answer, ok in zip(group.answers, group.correct, strict=True) if ok]
    share = right.count(None) / max(1, len(right))
    return [unmarked_sentence(share)] if share > MOST_UNMARKED else []


def unmarked_sentence(share: float) -> str:
    return (
        f"{CAUTION}{share:.0%} {UNMARKED}, and majority votes and distinct answers leave them out: "
        "let the prompt ask for a mark, or the reward's `final_answer` find it."
    )


def at_every_width(groups: Sequence[SampledGroup], widths: Sequence[int], listening: bool) -> list[SampledGroup]:
    """The groups as sampled, and independent rows in groups of each of `widths` that their number allows."""
    found: list[SampledGroup] = []
    for (condition, _), own in by_setting(groups).items():
        if condition == "disabled" or not listening:
            found += [group for width in widths for group in regroup(own, width)]
        else:
            found += own
    return found
