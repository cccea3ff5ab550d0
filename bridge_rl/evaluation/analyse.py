"""From the groups of one evaluation to its results."""

from collections.abc import Sequence
from typing import Any

from bridge_rl.evaluation.aggregate import Chooser, by_setting, length_curve, regroup, summarize
from bridge_rl.evaluation.controls import at_equal_cost, judge_controls
from bridge_rl.evaluation.results import Probes, Results
from bridge_rl.evaluation.samples import SampledGroup

METHODS = ("majority", "best-of-n")


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
    return Results(
        meta=meta,
        summaries=summarize(at_widths),
        comparisons=controls.comparisons,
        verdicts=controls.verdicts,
        aggregated=at_equal_cost(groups if listening else at_widths, methods),
        lengths=length_curve(at_widths),
        probes=probes,
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
