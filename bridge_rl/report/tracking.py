"""Where a run is logged: Weights & Biases in the mode a recipe asks for, offline where there is no key, and others."""

import os
from importlib.util import find_spec

from accelerate import PartialState

from bridge_rl.config import Recipe
from bridge_rl.errors import UserError

OTHERS = ("tensorboard", "trackio")  # what `training.report_to` may name


def trackers(recipe: Recipe) -> list[str]:
    """Value of TRL's `report_to`: what `training.report_to` names, and W&B unless `logging.wandb` is off.

    Raises UserError for another name, and for a package that is not installed.
    """
    asked = recipe.training.get("report_to") or []
    chosen = [asked] if isinstance(asked, str) else list(asked)
    for name in chosen:
        if name not in OTHERS:
            raise UserError(f"training.report_to names {name!r}: use {' or '.join(OTHERS)}, and logging.wandb for W&B.")
        if find_spec(name) is None:
            raise UserError(f"training.report_to names {name!r}, which is not installed: pip install {name}.")
    return [*chosen, *(["wandb"] if recipe.logging.wandb != "off" else [])]


def start_tracking(recipe: Recipe) -> None:
    """Set W&B's mode, project and directory, from which TRL's own integration starts the run."""
    if recipe.logging.wandb == "off":
        return
    mode = recipe.logging.wandb
    if mode == "online" and not has_key():
        mode = "offline"
        if PartialState().is_main_process:
            print("W&B: there is no API key, so this run is logged offline; `wandb login` puts the next one online.")
    os.environ["WANDB_MODE"] = mode
    os.environ["WANDB_PROJECT"] = recipe.logging.project
    os.environ["WANDB_DIR"] = recipe.output_dir
    os.environ.setdefault("WANDB_SILENT", "true")
    os.makedirs(recipe.output_dir, exist_ok=True)


def has_key() -> bool:
    """Whether W&B would find an API key: in the environment, its settings, or where `wandb login` puts it."""
    import wandb

    try:
        return bool(wandb.api.api_key)
    finally:
        wandb.teardown()  # asking has built W&B's settings, in which a mode set later would not count
