"""Where a run is logged: Weights & Biases in the mode a recipe asks for, offline where there is no key, and others."""

import os
from importlib.util import find_spec
from pathlib import Path
from uuid import uuid4

from accelerate import PartialState

from bridge_rl.config import Recipe
from bridge_rl.errors import UserError

# What the user, or a W&B sweep, has set, before a run sets its own.
GIVEN_RUN_ID, GIVEN_TENSORBOARD = os.environ.get("WANDB_RUN_ID"), os.environ.get("TENSORBOARD_LOGGING_DIR")
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


def start_tracking(recipe: Recipe, resumed: bool = False) -> None:
    """Set W&B's mode, project, directory and run id, from which TRL's own integration starts the run.

    A run that goes on from a checkpoint stays the W&B run that it was (offline W&B makes a second directory with the
    same id), and its TensorBoard directory.
    """
    os.environ["TENSORBOARD_LOGGING_DIR"] = GIVEN_TENSORBOARD or str(Path(recipe.output_dir) / "tensorboard")
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
    if PartialState().is_main_process:
        os.environ["WANDB_RUN_ID"], os.environ["WANDB_RESUME"] = run_id(Path(recipe.output_dir), resumed), "allow"


def run_id(output: Path, resumed: bool) -> str:
    """The id that the environment had from the start, else the one that this directory has, else a new one."""
    path = output / "wandb_run_id"
    kept = path.read_text() if resumed and path.is_file() else ""
    chosen = GIVEN_RUN_ID or kept or uuid4().hex[:8]
    path.write_text(chosen)
    return chosen


def has_key() -> bool:
    """Whether W&B would find an API key: in the environment, its settings, or where `wandb login` puts it."""
    import wandb

    try:
        return bool(wandb.api.api_key)
    finally:
        wandb.teardown()  # asking has built W&B's settings, in which a mode set later would not count
