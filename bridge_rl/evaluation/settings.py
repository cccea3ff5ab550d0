"""What an evaluation is asked for where nobody says, and whether the samples of a directory were asked for the same."""

import ast
import hashlib
import json
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from importlib.util import find_spec, resolve_name
from pathlib import Path
from sysconfig import get_paths
from typing import Any

from transformers import PreTrainedConfig
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from bridge_rl import verify
from bridge_rl.config import Recipe, RewardSection, load_recipe
from bridge_rl.errors import UserError
from bridge_rl.evaluation.suites import Suite
from bridge_rl.files import write_whole
from bridge_rl.user_code import load_beside
from bridge_rl.verify.answer import completion_text

# What decides the samples of a directory: with other settings they would be others.
SETTINGS_FILE = "evaluation.json"
# Of a model's configuration: where it was loaded from and by what, its dtype, which is a setting of its own, and what
# only says how a forward returns.
DECIDES_NO_SAMPLE = {
    *("_name_or_path", "transformers_version", "architectures", "dtype"),
    *("use_cache", "return_dict", "output_attentions", "output_hidden_states"),
}
# Settings of which only a digest is kept, and what a user has changed when it differs.
DIGESTS = {
    "weights": "other weights",
    "config": "another configuration of the model or its Bridge",
    "problems": "other problems or prompts",
    "prompt_ids": "another chat template or tokenizer",
    "judging": "another version of the reward's file, of what it imports or of the verifier",
}


def trained_with(model: str) -> Recipe | None:
    """The recipe that a run left beside its model, or beside the checkpoints of which this is one.

    Prompts and sampling are then those it was trained for.
    """
    path = Path(model)
    folder = path.parent if path.name.startswith(PREFIX_CHECKPOINT_DIR) else path
    recipe = folder / "recipe.yaml"
    return load_recipe(recipe) if recipe.is_file() else None


def reward_of(named: str | None, suite: Suite, trained: Recipe | None) -> RewardSection:
    """The one that was named; else, of a file of problems, what the run was trained with; else the suite's."""
    if named is not None:
        return RewardSection(named)
    return trained.rewards[0] if trained and suite.is_file else suite.reward


def default_limit(suite: Suite, trained: Recipe | None) -> int:
    """What the run was trained or evaluated with; a suite that needs longer completions gets them."""
    if trained is None:
        return suite.max_new_tokens
    own = trained.evaluation.max_new_tokens or trained.rollout.max_new_tokens
    return own if suite.is_file else max(own, suite.max_new_tokens)


def lengths_below(limit: int, trained: int | None) -> list[int]:
    """The limit, its half, quarter and eighth, and the length of training if that is below."""
    parts = {limit // part for part in (8, 4, 2, 1)} | {trained or limit}
    return sorted(length for length in parts if 0 < length <= limit)


def first(*values: Any) -> Any:
    """The first that is not None."""
    return next(value for value in values if value is not None)


def digest_of_config(config: PreTrainedConfig) -> str:
    """Of what decides samples beside the weights, such as rope's base; of a Bridge, what it was made with."""
    return digest({key: value for key, value in config.to_dict().items() if key not in DECIDES_NO_SAMPLE})


def digest_of_reward(reward: RewardSection) -> str:
    """Of the file that a reward names, the modules of the user's own that it imports, its fixed arguments, and the
    verifier where that judges, or says which answers are one: another would do it otherwise.

    Raises UserError if there is no such reward.
    """
    _, module = load_beside(reward.function, "--reward")
    file = getattr(module, "__file__", None)  # a built-in module has none
    content = Path(file).read_bytes() if file else b""
    judges = [hashlib.sha256(content).hexdigest(), reward.kwargs]
    if own := own_modules(content.decode()):
        judges.append(own)
    asks = b"verify_answers" in content or any(map(_is_of_verifier, vars(module).values()))
    if asks or not hasattr(module, "final_answer"):  # without one, the verifier's says what is voted on
        judges.append(digest_of_verifier())
    if "judge" in reward.kwargs:  # of a reward that asks another one, as `set_aware.py` does
        judges.append(digest_of_reward(RewardSection(reward.kwargs["judge"])))
    return digest(judges)


def own_modules(source: str) -> dict[str, str]:
    """Name and source of each module that is imported, directly or not, and that no installed package has."""
    found: dict[str, str] = {}
    waiting = [(source, "")]
    while waiting:
        for name in imported(*waiting.pop()):
            spec = None if name in found else _own_spec(name)
            if spec is not None and spec.origin is not None and spec.has_location:
                found[name] = Path(spec.origin).read_text()
                waiting.append((found[name], spec.parent or ""))
    return found


def imported(source: str, package: str) -> Iterator[str]:
    """Names of what may be modules in the import statements of a module of `package`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            yield from (module, *(f"{module}.{alias.name}" for alias in node.names))


def _own_spec(name: str) -> ModuleSpec | None:
    """Where a module is, if it is there and of no installed package."""
    top = name.partition(".")[0]
    if top == "bridge_rl" or top in sys.stdlib_module_names:
        return None
    try:
        origin = getattr(find_spec(top), "origin", None)
        installed = origin is not None and any(Path(origin).is_relative_to(path) for path in get_paths().values())
        return None if installed else find_spec(name)
    except (ImportError, AttributeError, ValueError):  # no module, but a function in one
        return None


def _is_of_verifier(value: Any) -> bool:
    named = getattr(value, "__module__", None) or getattr(value, "__name__", "")
    return str(named).startswith(verify.__name__) and value is not completion_text


def digest_of_verifier() -> str:
    sources = [path.read_text() for path in sorted(Path(verify.__file__).parent.glob("*.py"))]
    return digest([version("math-verify"), *sources])


def digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def read_settings(path: Path) -> dict[str, Any]:
    """Raises UserError for a file that is missing or damaged: what the samples beside it are of, nobody can say."""
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path.parent} holds samples, but {path.name} does not say what of ({error}): give another --output, or "
            "delete the directory."
        ) from error
    return settings


def claim(directory: Path, settings: dict[str, Any]) -> None:
    """Write the settings into a new directory; raise UserError if it holds samples of others."""
    path = directory / SETTINGS_FILE
    if not any((directory / "samples").glob("rank_*.jsonl")):
        write_whole(path, json.dumps(settings, indent=2) + "\n")
        return
    before = read_settings(path)
    for key, value in settings.items():
        if before.get(key) != value:
            made = f"made with {key} {before.get(key)!r}, not {value!r}"
            if key in DIGESTS:
                made = f"made with {DIGESTS[key]}"
            if key not in before:  # whether it was the same, nobody can say
                made = f"of an earlier version, which did not write down their {key}"
            raise UserError(
                f"{directory} holds samples {made} ({path}): go on with the same, give another --output, or delete the "
                "directory."
            )
