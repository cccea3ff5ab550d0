"""Starts `job.py`, and reads what its runs have left."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from bridge_rl.report import names

ROOT = Path(__file__).resolve().parents[2]
# 12 problems, 4 a generation batch that serves 2 updates twice: 12 updates an epoch. Saved and logged out of step.
RECIPE = [
    "train",
    "recipes/tiny_arith.yaml",
    "warmup=null",
    "data.eval=null",
    "data.train.kwargs={seed: 10, size: 12}",
    "rewards=[{function: tests/faults/reward.py:even}]",
    "rollout.max_new_tokens=8",
    "training.per_device_train_batch_size=16",
    "training.steps_per_generation=2",
    "training.num_iterations=2",
    "training.max_steps=30",
    "training.logging_steps=4",
    "training.save_strategy=steps",
    "training.save_steps=3",
    "training.save_total_limit=2",
    "training.log_completions=true",
]
TIMED = {
    names.ROLLOUT_SECONDS,
    names.ROLLOUT_TOKENS_PER_SECOND,
    names.REWARD_SECONDS,
    names.STEP_SECONDS,
    names.STEP_ROLLOUT,
    names.STEP_REWARD,
    names.STEP_UPDATE,
    names.STEP_TOKENS_PER_SECOND,
    names.UPDATE_TOKENS_PER_SECOND,
    names.PEAK_MEMORY,
    "step_time",
}


def run_all(directory: Path, runs: list[dict[str, Any]], ranks: int = 1) -> list[list[int]]:
    """Exit codes of each run's ranks. What they print is in `log.txt`."""
    spec = directory / "spec.json"
    spec.write_text(json.dumps({"runs": runs, "ranks": ranks, "log": str(directory / "log.txt")}))
    command = [sys.executable, "tests/faults/job.py", str(spec)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    env["TRL_EXPERIMENTAL_SILENCE"] = "1"
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def history(output: Path) -> list[dict[str, float]]:
    """Every entry of the training log but the summary at its end, without what a clock or the memory decides."""
    entries = [json.loads(line) for line in (output / "history.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if k not in TIMED} for entry in entries if "train_runtime" not in entry]


def weights(output: Path) -> bytes:
    return (output / "model.safetensors").read_bytes()
