"""The result of one cell, as it is committed: one JSON file, one list item a line."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from bridge_rl.config import DataSource, Recipe
from bridge_rl.errors import UserError
from bridge_rl.evaluation.results import Aggregated, Comparison, Condition, Estimate, Summary
from bridge_rl.files import write_whole

DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Counts:
    """Right rows of every group that was sampled in a condition at a width.

    groups: one text for each group number, with a digit (base 36) for each problem in the order of the split. Rows that
    do not hear each other were sampled once, and stand here regrouped at every width.
    """

    condition: Condition
    width: int
    groups: list[str]

    def right(self) -> list[list[int]]:
        """[groups][problems]"""
        return [[int(digit, 36) for digit in group] for group in self.groups]


@dataclass(frozen=True)
class Seconds:
    """Of wall clock. training: the sum of its steps. step: their mean. None where nobody measured, as for what was
    interrupted in between.
    """

    warm_up: float | None = None
    training: float | None = None
    evaluation: float | None = None
    step: float | None = None

    @property
    def total(self) -> float:
        return sum(part for part in (self.warm_up, self.training, self.evaluation) if part is not None)


@dataclass(frozen=True)
class CellResult:
    """split: `validation` for the search, else `test`. trained_width: of the rollouts. recipe: as resolved.

    made: how the evaluation was made. trained: the same of each start of the training; empty where it was not started
    by the study, and of the base. tried: learning rate -> validation pass@1, of the search. history: mean training
    reward up to each of the steps. source: of the split's problems; problems: a digest of them. base: a digest of the
    weights that were trained, before; judging: of the reward's file and the verifier when it was evaluated; None where
    they were not looked at.
    """

    task: str
    arm: str
    seed: int
    split: str
    learning_rate: float | None
    overrides: list[str]
    recipe: Recipe
    trained_width: int
    samples: int
    source: DataSource
    problems: str
    made: dict[str, Any]
    trained: list[dict[str, Any]]
    seconds: Seconds
    tried: dict[str, float] = field(default_factory=dict)
    summaries: list[Summary] = field(default_factory=list)
    aggregated: list[Aggregated] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    verdicts: list[str] = field(default_factory=list)
    counts: list[Counts] = field(default_factory=list)
    history: dict[str, list[float]] = field(default_factory=dict)
    base: str | None = None
    judging: str | None = None

    def find(self, metric: str, width: int, condition: str = "model") -> Estimate | None:
        """Of one condition at one width."""
        for summary in self.summaries:
            if (summary.condition, summary.width) == (condition, width):
                return summary.metrics.get(metric)
        return None

    def metric(self, metric: str) -> Estimate:
        """At the width of training. Raises UserError where it was not measured."""
        found = self.find(metric, self.trained_width)
        if found is None:
            raise UserError(
                f"{self.task}/{self.arm}/{self.seed} has no {metric} at width {self.trained_width}: evaluate it again."
            )
        return found

    def right(self, width: int, condition: str = "model") -> list[list[int]] | None:
        """Right rows, [groups][problems]."""
        return next((c.right() for c in self.counts if (c.condition, c.width) == (condition, width)), None)

    @property
    def controlled(self) -> bool:
        """Whether siblings were shuffled, as they are with `controls`."""
        return any(summary.condition == "shuffled" for summary in self.summaries)

    def evaluated(self, widths: list[int], samples: int) -> bool:
        """Whether it was evaluated at these widths with so many samples."""
        own = {summary.width for summary in self.summaries if summary.condition == "model"}
        return own >= set(widths) and self.samples == samples


_ADAPTER = TypeAdapter(CellResult)


def write_cell(result: CellResult, path: Path) -> None:
    write_whole(path, lines(_ADAPTER.dump_python(result, mode="json")))


def lines(content: dict[str, Any]) -> str:
    """JSON in which each entry of the whole, and each item of a list there, has a line: short, for `git diff`."""
    entries = []
    for key, value in content.items():
        text = json.dumps(value)
        if isinstance(value, list) and value:
            text = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
        entries.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(entries) + "\n}\n"


def read_cell(path: Path) -> CellResult:
    """Raises UserError for what is no result of a cell."""
    try:
        return _ADAPTER.validate_json(path.read_bytes())
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(f"{path} is no result of a study's cell ({place}): delete it to make it again.") from error
