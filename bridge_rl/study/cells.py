"""The cells of a study: what each trains and evaluates, where it works, and what it has left behind."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bridge_rl.config import DataSource, Recipe, load_recipe
from bridge_rl.errors import UserError
from bridge_rl.study.config import Study
from bridge_rl.study.results import CellResult, read_cell
from bridge_rl.typed_yaml import nearest
from bridge_rl.user_code import find_file

# Keys of a recipe that decide neither what is trained nor how: a training that differs in them alone is the same one.
WITHOUT_EFFECT = (
    "output_dir",
    "resume",
    "save_before",
    "logging",
    "launch",
    "evaluation",
    "data.eval",
    "training.save_strategy",
    "training.save_steps",
    "training.save_total_limit",
    "training.logging_steps",
)
# Keys of that section that decide how a cell is evaluated; widths and samples are the study's.
EVALUATED_BY = ("evaluation.temperature", "evaluation.top_p", "evaluation.max_new_tokens")
# Keys of a recipe that say what the untrained base is and how it answers; its results stay when other ones change.
OF_BASE = ("model", "data.prompt", "data.system_prompt", "rewards", "rollout.width", "rollout.max_new_tokens")


@dataclass(frozen=True)
class Cell:
    """One training of an arm, and its evaluation: of the search on the validation problems, else on the test ones.

    learning_rate: None of the base, which is not trained, and where none has been chosen yet.
    """

    task: str
    arm: str
    seed: int
    learning_rate: float | None
    search: bool = False

    @property
    def place(self) -> str:
        """Of its working directory below that of the runs, and of its result below that of the results."""
        if self.search:
            assert self.learning_rate is not None
            return f"{self.task}/search/{self.arm}_{rate_name(self.learning_rate)}"
        return f"{self.task}/{self.arm}/seed_{self.seed}"


def rate_name(rate: float) -> str:
    """`5e-05` as `5e-5`, `0.0001` as `1e-4`."""
    digits, power = f"{rate:e}".split("e")
    return f"{float(digits):g}e{int(power)}"


def search_cells(study: Study) -> list[Cell]:
    """All there is to try; of a grid of one learning rate nothing."""
    return [
        Cell(task, name, study.search_seed, rate, search=True)
        for task in study.tasks
        for name, arm in study.arms.items()
        if len(arm.learning_rates) > 1
        for rate in arm.learning_rates
    ]


def seed_cells(study: Study, results: Path) -> list[Cell]:
    """Seed by seed, so that arms can be compared before all is done."""
    rates = {(task, arm): chosen_rate(study, task, arm, results) for task in study.tasks for arm in study.arms}
    return [
        Cell(task, arm, seed, rates[task, arm]) for task in study.tasks for seed in study.seeds for arm in study.arms
    ]


def check_named(study: Study, only: Sequence[str]) -> None:
    """Raise UserError for what is no `TASK`, `TASK/ARM` or `TASK/ARM/SEED` of the study."""
    levels = list(study.tasks), list(study.arms), list(map(str, study.seeds))
    for name in only:
        parts = name.split("/")
        if len(parts) > len(levels):
            raise UserError(f"--only {name}: write TASK, TASK/ARM or TASK/ARM/SEED.")
        for part, known in zip(parts, levels, strict=False):
            if part not in known:
                raise UserError(f"--only {name}: there is no '{part}'{nearest(part, known)}")


def named_cells(cells: Sequence[Cell], only: Sequence[str]) -> list[Cell]:
    """The cells that one of `only` names, and the search that they need; all where `only` is empty."""
    return [cell for cell in cells if not only or any(matches(cell, name.split("/")) for name in only)]


def matches(cell: Cell, parts: Sequence[str]) -> bool:
    named = [cell.task, cell.arm, *([] if cell.search else [str(cell.seed)])]
    return all(part == own for part, own in zip(parts, named, strict=False))


def tried_rates(study: Study, task: str, arm: str, results: Path) -> dict[float, float]:
    """Learning rate -> validation pass@1 at the width of training, of the search cells that are done."""
    found = {}
    for cell in search_cells(study):
        path = result_path(results, cell)
        if (cell.task, cell.arm) == (task, arm) and path.is_file():
            assert cell.learning_rate is not None
            found[cell.learning_rate] = read_cell(path).metric("pass@1").value
    return found


def chosen_rate(study: Study, task: str, arm: str, results: Path) -> float | None:
    """The learning rate with the best mean; the first of those tied. None until all were tried, and of the base."""
    grid = study.arms[arm].learning_rates
    if len(grid) < 2:
        return next(iter(grid), None)
    tried = tried_rates(study, task, arm, results)
    return max(grid, key=lambda rate: tried[rate]) if len(tried) == len(grid) else None


def is_ready(study: Study, cell: Cell) -> bool:
    """Whether its learning rate has been chosen."""
    return cell.learning_rate is not None or study.arms[cell.arm].role == "base"


def result_path(results: Path, cell: Cell) -> Path:
    return results / f"{cell.place}.json"


def source_of(study: Study, cell: Cell) -> DataSource:
    """The problems it is evaluated on."""
    task = study.tasks[cell.task]
    return task.validation if cell.search else task.test


def recipe_path(study: Study, cell: Cell) -> Path:
    named = study.tasks[cell.task].recipe
    path = find_file(named)
    if path is None:
        raise UserError(f"tasks.{cell.task}.recipe: there is no {named}, here or in the repository.")
    return path


def overrides_of(study: Study, cell: Cell) -> list[str]:
    """Of the task's recipe, but for the output directory."""
    arm = study.arms[cell.arm]
    rate = [f"training.learning_rate={rate_name(cell.learning_rate)}"] if cell.learning_rate is not None else []
    of_cell = [*rate, f"seed={cell.seed}", "data.eval=null", "evaluation.every=null"]
    return [*study.overrides, *study.tasks[cell.task].overrides, *arm.overrides, *of_cell]


def recipe_of(study: Study, cell: Cell, runs: Path) -> Recipe:
    overrides = [*overrides_of(study, cell), f"output_dir={runs / cell.place}"]
    return load_recipe(recipe_path(study, cell), overrides)


def difference(first: Recipe, second: Recipe) -> str | None:
    """A key in which two recipes differ and train differently, as `training.max_steps`."""
    return next((key for key in differing(first, second) if not under(key, WITHOUT_EFFECT)), None)


def base_difference(first: Recipe, second: Recipe) -> str | None:
    """A key in which they differ and by which the untrained base answers differently, or is read at another width."""
    return next((key for key in differing(first, second) if under(key, OF_BASE)), None)


def differing(first: Recipe, second: Recipe) -> list[str]:
    one, other = flat(asdict(first)), flat(asdict(second))
    return [key for key in sorted(one.keys() | other.keys()) if one.get(key) != other.get(key)]


def under(key: str, names: Sequence[str]) -> bool:
    """Whether it is one of `names`, or lies in a section that is."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def flat(content: dict[str, Any], before: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        inside = isinstance(value, dict) and bool(value)
        found |= flat(value, f"{before}{key}.") if inside else {f"{before}{key}": value}
    return found


def is_trained(directory: Path) -> bool:
    """A run writes its history when its model is saved."""
    return (directory / "history.jsonl").is_file()


def check_trained(directory: Path, recipe: Recipe) -> None:
    """Raise UserError where the training in `directory`, whole or cut off, is of another recipe."""
    key = difference(load_recipe(directory / "recipe.yaml"), recipe)
    if key is not None:
        raise UserError(
            f"{directory} holds what was trained with another {key} (recipe.yaml there): delete it, or name another "
            "--runs."
        )


def find_result(study: Study, cell: Cell, results: Path) -> CellResult | None:
    """Its result, if there is one. Raises UserError for one of another recipe, evaluated otherwise, or on others."""
    path = result_path(results, cell)
    if not path.is_file():
        return None
    result = read_cell(path)
    check_same(path, study, cell, result, recipe_of(study, cell, Path()))  # where it is trained makes no difference
    return result


def check_same(path: Path, study: Study, cell: Cell, result: CellResult, recipe: Recipe) -> None:
    own = (result.task, result.arm, result.seed, result.split)  # the learning rate is one of the recipe's keys
    asked = (cell.task, cell.arm, cell.seed, "validation" if cell.search else "test")
    if own != asked:
        there, missing = ("{}/{}/{} ({} problems)".format(*whose) for whose in (own, asked))
        raise UserError(
            f"{path} holds the result of {there} in the place of {missing}: delete it to make that again, or put it "
            "where it belongs."
        )
    base = study.arms[cell.arm].role == "base"
    of_recipe = base_difference(result.recipe, recipe) if base else difference(result.recipe, recipe)
    key = of_recipe or evaluation_difference(study, cell, result, recipe)
    if key is not None:
        raise UserError(
            f"{path} was made with another {key} than the study says now: delete it to make it again, or name another "
            "directory of results in the study."
        )


def evaluation_difference(study: Study, cell: Cell, result: CellResult, recipe: Recipe) -> str | None:
    """A key in which the evaluation of a result is not what the study says."""
    widths = [recipe.rollout.width] if cell.search else study.widths
    if not result.evaluated(widths, study.samples):
        return "widths or samples"
    if shuffles(study, cell) and not result.controlled:
        return "controls"
    if result.source != source_of(study, cell):
        return f"tasks.{cell.task}.{result.split}"
    return next((key for key in differing(result.recipe, recipe) if under(key, EVALUATED_BY)), None)


def shuffles(study: Study, cell: Cell) -> bool:
    """Whether its evaluation has shuffled siblings: at width 1 there are none to shuffle."""
    asked = study.controls and not cell.search
    return asked and study.arms[cell.arm].role == "bridge" and max(study.widths) > 1
