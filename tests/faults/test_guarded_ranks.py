"""Ranks that disagree about their own rows skip, refill and stop together: DDP, ZeRO-2, ZeRO-3 and FSDP2 on two."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from chain import ROOT
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
RECIPE = [
    "train",
    "recipes/tiny_arith.yaml",
    "warmup=null",
    "data.eval=null",
    "data.train.kwargs={seed: 10, size: 24}",
    "rewards=[{function: tests/faults/hard_reward.py:hard}]",
    "rollout.max_new_tokens=8",
    "training.logging_steps=1",
    "training.save_strategy=steps",
    "training.save_steps=1",
]
REFILL = "rollout.dynamic_sampling={max_rounds: 3}"
GUARDED = ["training.max_steps=6", "training.gradient_accumulation_steps=2", "guards.max_skipped=2"]
GUARDED += ["training.per_device_train_batch_size=8"]
SHARDED = ["launch.zero_stage=3", "training.ds3_gather_for_generation=false", REFILL]
MODES = {"ddp": ["launch.zero_stage=0"], "zero2": ["launch.zero_stage=2"], "zero3": SHARDED, "fsdp2": []}
# Three prompts of eight rows: on two ranks the second one has a group of four on each.
REFILLED = ["training.max_steps=2", REFILL]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """One launch: twice with dynamic sampling, on one rank and on two; in each mode with steps 2, 4 and 5 broken."""
    output = tmp_path_factory.mktemp("guarded")
    some = [
        ("one", 1, [*REFILLED, "training.per_device_train_batch_size=24"], []),
        ("two", 2, [*REFILLED, "training.per_device_train_batch_size=12"], []),
        *((name, 2, [*GUARDED, *options], [2, 4, 5]) for name, options in MODES.items()),
    ]
    spec = {"log": str(output / "log.txt")}
    spec["runs"] = [
        {
            "argv": [*RECIPE, *options, f"output_dir={output / name}"],
            "ranks": ranks,
            "broken": broken,
            "fsdp": name == "fsdp2",
        }
        for name, ranks, options, broken in some
    ]
    (output / "spec.json").write_text(json.dumps(spec))
    command = [sys.executable, "tests/faults/guards_job.py", str(output / "spec.json")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=480)
    assert done.returncode == 0, done.stderr[-4000:]
    log = (output / "log.txt").read_text()
    assert json.loads(done.stdout.splitlines()[-1]) == [[0], [0, 0], *[[2, 2]] * len(MODES)], log[-4000:]
    return output


def facts(output: Path, rank: int) -> dict:
    return json.loads((output / f"facts_{rank}.json").read_text())


def test_two_ranks_refill_what_one_does(runs):
    one, *two = facts(runs / "one", 0)["batches"], *(facts(runs / "two", rank)["batches"] for rank in (0, 1))
    assert len(one) == 2
    replaced = []
    for alone, *shared in zip(one, *two, strict=True):
        for key in ("given", "prompts", "completions", "rewards"):
            assert shared[0][key] + shared[1][key] == alone[key]
        torch.testing.assert_close(
            torch.tensor(shared[0]["advantages"] + shared[1]["advantages"]), torch.tensor(alone["advantages"])
        )
        replaced.append(
            [sum(given not in prompt for given, prompt in zip(x["given"], x["prompts"], strict=True)) for x in shared]
        )
    assert any(ours != theirs for ours, theirs in replaced)  # ranks that drop different numbers
    assert any(ours % 8 for ours, _ in replaced)  # and one prompt on two ranks
    ours, theirs = (load_file(runs / name / "model.safetensors") for name in ("two", "one"))
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, atol=1e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def tensors(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = [value[key] for key in sorted(value, key=str)]
    return [x for item in value for x in tensors(item)] if isinstance(value, list | tuple) else []


def optimizer_state(checkpoint: Path) -> list[torch.Tensor]:
    """Moments and float32 weights of every rank, in whatever files the mode has them."""
    files = sorted([*checkpoint.glob("global_step*/*optim_states.pt"), *checkpoint.glob("optimizer.*")])
    return [x for file in files for x in tensors(torch.load(file, weights_only=False)) if x.is_floating_point()]


@pytest.mark.parametrize("mode", MODES)
def test_a_loss_that_is_broken_on_one_rank_is_skipped_on_all(runs, mode):
    before, after, next_one = (runs / mode / f"checkpoint-{step}" for step in (1, 2, 3))
    weights = [load_file(folder / "model.safetensors") for folder in (before, after, next_one)]
    assert all(torch.equal(weights[1][name], weight) for name, weight in weights[0].items())
    assert not all(torch.equal(weights[2][name], weight) for name, weight in weights[1].items())
    states = [optimizer_state(folder) for folder in (before, after, next_one)]
    assert sum(map(torch.numel, states[0])) > 2 * 600_000
    assert all(map(torch.equal, states[0], states[1]))
    assert not all(map(torch.equal, states[1], states[2]))
    assert all(x.isfinite().all() for x in states[2])
    for rank in (0, 1):
        assert facts(runs / mode, rank)["skipped"][:3] == [0, 1, 1]
    if mode == "zero2":
        assert facts(runs / mode, 0)["checks_overflow"]


@pytest.mark.parametrize("mode", MODES)
def test_after_the_limit_all_ranks_stop_and_leave_their_batches(runs, mode):
    files = sorted(path.name for path in (runs / mode / "guards").iterdir())
    assert files == [f"step_00000{step}_rank_{rank}.pt" for step in (4, 5) for rank in (0, 1)]
    for rank in (0, 1):
        content = torch.load(runs / mode / "guards" / f"step_000005_rank_{rank}.pt", weights_only=True)
        assert content["rank"] == rank
        assert len(content["batches"]) == 2
        assert all(loss.isfinite() for loss in content["losses"]) is (rank == 0)
        assert bool(content["parameters"]) is (mode in ("ddp", "fsdp2"))
    # Two ranks that write at once may share a line.
    said = re.findall(
        rf"in a row [^()]*\(guards.max_skipped\)[^()]*{mode}/guards/step_000005_rank_(\d).pt "
        rf"\([^()]*{mode}/checkpoint-4 is whole",
        log(runs),
    )
    assert sorted(said) == ["0", "1"]
    assert sorted(p.name for p in (runs / mode).glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (1, 2, 3, 4)]


def log(runs: Path) -> str:
    return (runs / "log.txt").read_text()
