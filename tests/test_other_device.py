"""The project on a device that is not the CPU."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_runs_on_another_device_as_on_the_cpu(tmp_path):
    """In a process of its own, whose torch then knows one device more."""
    options = ["-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path}/checks"]
    command = [sys.executable, "-m", "pytest", *options, "tests/other_device/checks.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stdout[-10_000:]
