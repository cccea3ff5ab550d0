"""What an evaluation found, as it is written to `results.json` and read by reports."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from bridge_rl.errors import UserError
from bridge_rl.files import write_whole

# model: the checkpoint as it is. shuffled: each row hears rows of other prompts instead of its siblings. disabled: its
# Bridge switched off, so that rows are independent.
Condition = Literal["model", "shuffled", "disabled"]


@dataclass(frozen=True)
class Estimate:
    """A mean over problems and its 95 % interval; without one where a single problem was evaluated."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Summary:
    """Metrics of one condition at one width over all problems."""

    condition: Condition
    width: int
    problems: int
    groups_per_problem: int
    metrics: dict[str, Estimate] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """First minus second on the same problems: the paired difference, and the p of a paired permutation test."""

    name: str
    metric: str
    first: str
    second: str
    difference: Estimate
    p: float
    problems: int


@dataclass(frozen=True)
class Aggregated:
    """One answer a problem made from `samples` completions, in groups of `width`, that took `tokens` on average."""

    method: str
    condition: Condition
    width: int
    samples: int
    tokens: float
    accuracy: Estimate


@dataclass(frozen=True)
class LengthPoint:
    """Accuracy of the same samples cut at `limit` tokens; `truncated`: the share of rows that the limit cuts."""

    condition: Condition
    width: int
    limit: int
    accuracy: Estimate
    truncated: float


@dataclass(frozen=True)
class Counterfactual:
    """What becomes of wrong rows when other siblings are put beside them (see `evaluation.counterfactual`).

    siblings: what they are replaced by. rows: how many were tried. changed: share whose answer changes. became_right:
    share that becomes right. over_wrong, over_other_prompt: that share minus the one beside wrong siblings, and minus
    the one beside rows of another prompt, paired on the same rows; None of these siblings themselves, and where it was
    not computed yet. Wrong siblings may hold a row at its answer, where rows of another prompt only disturb it: then
    over_wrong is the larger. logprob: mean change, in nats a token, of the row's own completion, re-scored.
    """

    siblings: Literal["own", "right", "wrong", "other_prompt"]
    rows: int
    changed: Estimate
    became_right: Estimate
    logprob: Estimate
    over_wrong: Estimate | None = None
    over_other_prompt: Estimate | None = None


@dataclass(frozen=True)
class Probes:
    """What the blocks do on sampled groups (see `evaluation.probes`).

    layers: indices of the layers that carry a block. norm_ratio: of each, mean norm of what the block adds over that of
    what it is added to. sibling_share: [layers][heads], attention on siblings, where a row alone has 0 and equal
    attention over w rows gives (w - 1) / w. share_by_step: [layers][bins], the mean over heads in equal parts of a
    completion.
    """

    width: int
    groups: int
    layers: list[int]
    norm_ratio: list[float]
    sibling_share: list[list[float]]
    share_by_step: list[list[float]]
    counterfactuals: list[Counterfactual] = field(default_factory=list)


@dataclass(frozen=True)
class Results:
    """All of one evaluation. `meta`: how it was made."""

    meta: dict[str, Any]
    summaries: list[Summary]
    comparisons: list[Comparison] = field(default_factory=list)
    verdicts: list[str] = field(default_factory=list)
    aggregated: list[Aggregated] = field(default_factory=list)
    lengths: list[LengthPoint] = field(default_factory=list)
    probes: Probes | None = None


_ADAPTER = TypeAdapter(Results)


def write_results(results: Results, path: Path) -> None:
    """As JSON."""
    write_whole(path, _ADAPTER.dump_json(results, indent=2).decode() + "\n")


def read_results(path: Path) -> Results:
    """Raises UserError where there is no file, or one of another kind."""
    if not path.is_file():
        raise UserError(f"There is no {path}: make it with bridge-rl eval.")
    try:
        return _ADAPTER.validate_json(path.read_bytes())
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(f"{path} is no result of bridge-rl eval ({place}): evaluate again.") from error
