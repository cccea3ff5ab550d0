"""How a committed figure was made: hardware, versions, commit, command."""

import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate")


def provenance() -> dict[str, Any]:
    """Goes into every JSON of results."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    ).stdout.strip()
    if torch.cuda.is_available():
        hardware = torch.cuda.get_device_name()
    else:
        hardware = f"CPU, {torch.get_num_threads()} threads, {platform.machine()}"
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit or "unknown",
        "hardware": hardware,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }
