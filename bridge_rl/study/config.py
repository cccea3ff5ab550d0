"""A study's YAML: tasks, arms and seeds, typed as recipes are: what is wrong in it is one sentence."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from bridge_rl.config import DataSource, Place
from bridge_rl.errors import UserError
from bridge_rl.typed_yaml import STRICT, read_yaml, validate

MOST_WIDTH = 35  # counts of right rows are kept as digits of base 36


@dataclass
class Task:
    """recipe: what every arm's overrides are laid over. validation: problems by which learning rates are chosen, and
    for nothing else. test: the held-out problems of the results. Both are the same for every seed.
    """

    recipe: Place
    validation: DataSource
    test: DataSource
    overrides: list[str] = field(default_factory=list)
    __pydantic_config__: ClassVar = STRICT

    def __post_init__(self) -> None:
        for name in ("validation", "test"):
            if getattr(self, name).shuffle:
                raise UserError(f"{name}.shuffle is true: leave it out, the problems must be the same for every seed.")


@dataclass
class Arm:
    """One way of training. overrides: of the task's recipe, such as `bridge=null`.

    role: `base` is the untrained model, and has no learning rates. Of the `control` arms the best on average is the
    next best one. `bridge`: arms with a Bridge. label: its name in tables.
    """

    role: Literal["base", "control", "bridge"]
    learning_rates: list[float] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    label: str | None = None
    __pydantic_config__: ClassVar = STRICT

    def __post_init__(self) -> None:
        if (self.role == "base") == bool(self.learning_rates):
            raise UserError("An arm has learning_rates unless its role is base: list them, or make it the base.")
        if len(set(self.learning_rates)) < len(self.learning_rates) or min(self.learning_rates, default=1) <= 0:
            raise UserError(f"learning_rates is {self.learning_rates}: each must be above 0, and listed once.")


@dataclass
class Study:
    """Every trained arm gets as many learning rates as the others, tried at `search_seed` on the validation problems.

    headline: the arm that the others are compared with. seeds: of the cells, paired over arms. widths, samples: of the
    evaluations, as in a recipe. controls: whether arms with a Bridge are evaluated under them, too, which doubles the
    completions. threads: of each cell's process; sums are rounded otherwise with other numbers. overrides: of every
    recipe, before those of task and arm. results: their directory, seen from the study's; another study's, to go on
    from its cells.
    """

    tasks: dict[str, Task]
    arms: dict[str, Arm]
    headline: str
    seeds: list[int]
    search_seed: int
    widths: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    samples: int = 16
    controls: bool = True
    threads: int = 1
    overrides: list[str] = field(default_factory=list)
    results: Place = "results"
    __pydantic_config__: ClassVar = STRICT

    def __post_init__(self) -> None:
        if not self.tasks or not self.seeds:
            raise UserError("tasks and seeds: name at least one of each.")
        if len(set(self.seeds)) < len(self.seeds) or self.search_seed in self.seeds:
            raise UserError(f"seeds is {self.seeds}: each must be there once, and none may be search_seed.")
        if self.headline not in self.arms or self.arms[self.headline].role != "bridge":
            raise UserError(f"headline is '{self.headline}': name an arm whose role is bridge.")
        if sum(arm.role == "base" for arm in self.arms.values()) != 1:
            raise UserError("arms: exactly one has the role base.")
        if all(arm.role != "control" for arm in self.arms.values()):
            raise UserError("arms: at least one has the role control.")
        grids = {name: len(arm.learning_rates) for name, arm in self.arms.items() if arm.role != "base"}
        if len(set(grids.values())) > 1:
            raise UserError(f"learning_rates: every arm must have as many as the others, not {grids}.")
        if "search" in self.arms or any("/" in name for name in [*self.arms, *self.tasks]):
            raise UserError("arms and tasks: names may have no slash, and 'search' is the name of a directory.")
        if not self.widths or not all(1 <= width <= MOST_WIDTH for width in self.widths):
            raise UserError(f"widths is {self.widths}: name at least one, each from 1 to {MOST_WIDTH}.")
        if len(set(self.widths)) < len(self.widths):
            raise UserError(f"widths is {self.widths}: name each once.")
        if self.samples < 1 or self.threads < 1:
            raise UserError("samples and threads must be at least 1.")

    @property
    def base(self) -> str:
        return next(name for name, arm in self.arms.items() if arm.role == "base")

    def label(self, arm: str) -> str:
        return self.arms[arm].label or arm


def load_study(path: Path) -> Study:
    """Raises UserError naming the file and the key."""
    return validate(Study, read_yaml(path, "study"), path)
