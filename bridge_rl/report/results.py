"""How a committed figure was made: hardware, versions, commit, command."""

import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate")
CODE = ("bridge_rl", "recipes", "rewards", "benchmarks", ":!benchmarks/results")


def provenance() -> dict[str, Any]:
    """Goes into every JSON of results. dirty: whether the code differs from the commit."""
    if torch.cuda.is_available():
        hardware = torch.cuda.get_device_name()
    else:
        hardware = f"CPU, {torch.get_num_threads()} threads, {platform.machine()}"
    # An installation may lie in the repository of something else, as an environment in a project does.
    tracked = _git("ls-files", "--error-unmatch", str(Path(__file__).resolve())).returncode == 0
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": _git("rev-parse", "--short", "HEAD").stdout.strip() if tracked else "unknown",
        "dirty": tracked and _git("diff", "--quiet", "HEAD", "--", *CODE).returncode == 1,
        "hardware": hardware,
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parents[2]
    if shutil.which("git") is None:  # as in many images
        return subprocess.CompletedProcess(arguments, 127, "", "")
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)


def cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.is_file() else ""
    found = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return found[0] if found else platform.processor() or platform.machine()
