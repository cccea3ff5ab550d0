"""What metrics and conditions are called in tables and figures, and in which order they stand."""

import math
import re
from collections.abc import Iterable, Sequence

from bridge_rl.evaluation.results import Estimate, Summary

CONDITIONS = {
    "model": "model",
    "shuffled": "shuffled siblings",
    "disabled": "Bridge disabled",
}
# The metrics that tables and figures start with; those that an evaluation has beside them follow in its own order.
METRICS = {
    "pass@1": "mean accuracy (pass@1)",
    "maj": "majority vote",
    "all": "all rows of a group right",
    "any": "any row of a group right (coverage)",
}
ORDER = (*METRICS, "best", "distinct", "length", "truncated", "unparsed")
G_PASS = {
    "g-pass": "G-Pass, rows of one group",
    "mixed/g-pass": "mixed: a row from each of w groups",
}
SIBLINGS = {
    "own": "its own",
    "right": "right rows",
    "wrong": "wrong rows",
    "other_prompt": "rows of another prompt",
}
_G_PASS = re.compile(r"^(?P<family>.*g-pass)_(?P<tau>[01](\.\d+)?)$")


def ordered_metrics(summaries: Iterable[Summary]) -> list[str]:
    """Every metric that some summary has, the important ones first."""
    found = dict.fromkeys(name for summary in summaries for name in summary.metrics)
    return [name for name in ORDER if name in found] + [name for name in found if name not in ORDER]


def g_pass_families(summaries: Sequence[Summary]) -> dict[str, dict[float, str]]:
    """Metric by threshold tau, for each way of computing G-Pass; a metric's name ends with its tau after `_`."""
    families: dict[str, dict[float, str]] = {}
    for name in ordered_metrics(summaries):
        match = _G_PASS.match(name)
        if match is not None:
            families.setdefault(match["family"], {})[float(match["tau"])] = name
    return {family: dict(sorted(names.items())) for family, names in families.items()}


def setting(condition: str, width: int) -> str:
    """A condition at a width in words."""
    return f"{CONDITIONS[condition]}, width {width}"


def number(value: float) -> str:
    """Shares with three digits, counts with one: `0.431`, `12.5`, `1,024`."""
    if math.isnan(value):
        return "-"
    digits = 3 if abs(value) < 10 else 1 if abs(value) < 1000 else 0
    return f"{round(value, digits) + 0.0:,.{digits}f}"  # adding 0.0 makes of -0.0 a 0.0


def estimate(value: Estimate) -> str:
    """`0.431 [0.404, 0.459]`; the value alone where there is no interval."""
    if value.low is None or value.high is None:
        return number(value.value)
    return f"{number(value.value)} [{number(value.low)}, {number(value.high)}]"


def p_value(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def shorter(value: Estimate) -> str:
    """An estimate without the zeros before the points."""
    return re.sub(r"(?<!\d)0\.", ".", estimate(value))
