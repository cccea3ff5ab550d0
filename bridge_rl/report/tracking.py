"""Weights & Biases: the mode a recipe asks for, offline where there is no key."""

import os

from accelerate import PartialState

from bridge_rl.config import Recipe


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
