"""A run's output directory: what lies where, and whether the recipe that made it was the same."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bridge_rl.config import Recipe, load_recipe
from bridge_rl.errors import UserError
from bridge_rl.files import write_whole

# Keys that decide what is in a directory; going on with others would mix two runs without a sound.
PROBLEMS = ("model", "bridge", "data.train", "data.prompt", "data.system_prompt", "rewards", "seed")
DECIDES_WARMUP = (*PROBLEMS, "warmup", "rollout.max_new_tokens", "rollout.temperature")
# A checkpoint's optimizer has its own: another value in the recipe would be passed over.
OF_OPTIMIZER = ("optim", "optim_args", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
# The checkpoint has none of these: another value would be taken up in the middle of a run.
OF_LOSS = (
    "loss_type",
    "beta",
    "num_iterations",
    "epsilon",
    "epsilon_high",
    "delta",
    "importance_sampling_level",
    "multi_objective_aggregation",
    "scale_rewards",
    "top_entropy_quantile",
    "off_policy_mask_threshold",
    "use_bias_correction_kl",
    "use_adaptive_entropy",
    "router_aux_loss_coef",
    "disable_dropout",
    "max_grad_norm",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    *(f"sapo_temperature_{sign}" for sign in ("neg", "pos")),
    *(f"vespo_{name}_{sign}" for name in ("k", "lambda") for sign in ("neg", "pos")),
    *(f"entropy_{name}" for name in ("coef", "coef_min", "coef_max", "coef_delta", "target")),
)
OF_ROLLOUT = ("width", "num_generations", "max_new_tokens", "temperature", "mask_truncated", "dynamic_sampling")
DECIDES_RUN = (
    *PROBLEMS,
    "train",
    *(f"training.{key}" for key in (*OF_OPTIMIZER, *OF_LOSS)),
    *(f"rollout.{key}" for key in OF_ROLLOUT),
)  # not memory, which changes no token


def warmup_directory(recipe: Recipe) -> Path:
    return Path(recipe.output_dir) / "warmup"


def evaluation_directory(recipe: Recipe, step: int) -> Path:
    return Path(recipe.output_dir) / "evaluation" / f"step_{step:06d}"


def save_recipe(recipe: Recipe, directory: Path) -> None:
    """Write the resolved recipe beside what it made."""
    write_whole(directory / "recipe.yaml", recipe.to_yaml())  # with half of one, the run could not go on


def deciding_keys(recipe: Recipe) -> tuple[str, ...]:
    """Of a run's checkpoints."""
    return (*DECIDES_RUN, "lora") if recipe.train == "lora" else DECIDES_RUN


def check_same_recipe(recipe: Recipe, directory: Path, keys: tuple[str, ...]) -> None:
    """Raise UserError if what is in `directory` was made by a recipe that differs in one of `keys`."""
    path = directory / "recipe.yaml"
    before = asdict(load_recipe(path)) if path.is_file() else {}  # a key that is new since has its default
    for key in keys:
        if look_up(before, key) != look_up(asdict(recipe), key):
            raise UserError(
                f"{directory} was made by a recipe with another '{key}' ({path}): use that one to go on, another "
                "output_dir to start anew, or delete the directory."
            )


def look_up(content: dict[str, Any], key: str) -> Any:
    """The value at a dotted key, None where there is none."""
    for part in key.split("."):
        content = (content or {}).get(part)  # type: ignore[assignment]
    return content


def write_history(history: list[dict[str, float]], directory: Path) -> None:
    """The trainer's log, one entry a line."""
    (directory / "history.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in history))
