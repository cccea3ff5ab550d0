"""The tiny recipe on two real CPU processes: DDP, ZeRO-2 and ZeRO-3 take the steps that one process takes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState

import bridge_rl as br
from bridge_rl import run_checkpoints
from bridge_rl.evaluation.samples import SampleStore
from bridge_rl.report import names

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "rewards=[{function: rewards/two_tries.py:correct}]",
    "training.max_steps=2",
    "training.logging_steps=1",
    "training.lr_scheduler_type=constant",
    "warmup.problems=32",
    "warmup.steps=3",
    "warmup.groups_per_step=4",
    "training.save_strategy=steps",
    "training.save_steps=1",
    "evaluation.problems=33",  # 17 on one of two ranks, 16 on the other
    "evaluation.samples=4",
    "evaluation.widths=[1,4]",
]
TORCHRUN = "torchrun"
QKV_PROJ = 3 * 128 * 128  # elements of a block's W_Q, W_K and W_V in the tiny recipe
pytestmark = pytest.mark.slow


def launched(script: str, *arguments: str, config: str | None = None) -> None:
    done = launch(script, *arguments, config=config)
    assert done.returncode == 0, done.stderr[-4000:]


def launch(script: str, *arguments: str, config: str | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, script, *arguments]
    if config == TORCHRUN:  # what `accelerate launch` does without a configuration file, which on CPU needs --cpu
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    elif config is not None:
        accelerate = ["accelerate.commands.launch", "--main_process_port", "0"]
        command[1:1] = ["-m", *accelerate, "--config_file", f"launch/accelerate/{config}.yaml"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def warmed(tmp_path_factory) -> Path:
    """The warm-up, made by two ranks together."""
    output = tmp_path_factory.mktemp("warm")
    options = [*SMALL, f"output_dir={output}", "launch.zero_stage=3"]  # which is for the training, not for this
    launched("launch/warmup.py", "recipes/tiny_arith.yaml", *options, config="cpu_ddp")
    lines = (output / "warmup" / "groups.jsonl").read_text().splitlines()
    assert len(lines) == 32
    return output / "warmup"


def test_a_warmup_of_two_ranks_in_parts_takes_the_steps_of_one(warmed, tmp_path):
    """Each rank's own lengths ask for another number of parts, and each has another number of tokens."""
    shared = (*SMALL, "warmup.steps=2", f"warmup.path={warmed}/groups.jsonl")
    command = ("launch/warmup.py", "recipes/tiny_arith.yaml", *shared)
    alone, together = tmp_path / "one", tmp_path / "two"
    launched(*command, f"output_dir={alone}", "warmup.groups_per_step=8")
    launched(*command, f"output_dir={together}", "update.token_budget=300", config="cpu_ddp")
    ours, theirs = (
        [json.loads(line) for line in (output / "warmup/history.jsonl").read_text().splitlines()]
        for output in (together, alone)
    )
    assert [entry["loss"] for entry in ours[:2]] == pytest.approx([entry["loss"] for entry in theirs[:2]], abs=1e-5)
    blocks = [dict(br.bridge_parameters(br.load_bridge(output / "warmup"))) for output in (together, alone)]
    for name, parameter in blocks[1].items():
        torch.testing.assert_close(blocks[0][name], parameter, atol=1e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def run(warmed: Path, output: Path, rows: int, config: str | None = None, *overrides: str) -> dict:
    shutil.copytree(warmed, output / "warmup")
    facts = output / "facts.json"
    launched(
        "tests/distributed/job.py",
        str(facts),
        "recipes/tiny_arith.yaml",
        *SMALL,
        f"training.per_device_train_batch_size={rows}",
        f"output_dir={output}",
        *overrides,
        config=config,
    )
    return json.loads(facts.read_text())


@pytest.fixture(scope="module")
def one_rank(warmed, tmp_path_factory) -> tuple[dict, Path]:
    output = tmp_path_factory.mktemp("one")
    facts = run(warmed, output, 64)
    assert facts["num_processes"] == 1
    return facts, output


def assert_same_end(output: Path, expected: Path) -> None:
    """The saved model, the checkpoint of the first step, and what the evaluation sampled."""
    for part in (".", "checkpoint-1"):
        ours, theirs = (dict(br.bridge_parameters(br.load_bridge(d / part))) for d in (output, expected))
        assert ours.keys() == theirs.keys()
        for name, parameter in theirs.items():
            torch.testing.assert_close(ours[name], parameter, atol=1e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    ours, theirs = (SampleStore(d / "evaluation/step_000002/samples").read() for d in (output, expected))
    assert [(group.key, group.tokens, group.correct) for group in ours] == [
        (group.key, group.tokens, group.correct) for group in theirs
    ]


def assert_same_steps(found: dict, expected: dict) -> None:
    assert len(found["steps"]) == len(expected["steps"]) == 2
    for ours, theirs in zip(found["steps"], expected["steps"], strict=True):
        assert ours["reward"] == pytest.approx(theirs["reward"], abs=1e-6)
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        assert ours["entropy"] == pytest.approx(theirs["entropy"], rel=1e-4)
        for name in (names.ALL_RIGHT, names.ANY_RIGHT, names.NORM_RATIO):  # of all ranks
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name


@pytest.mark.parametrize(
    ("config", "distributed_type", "zero_stage", "shard_elements"),
    [
        ("cpu_ddp", "MULTI_CPU", None, QKV_PROJ),
        ("cpu_zero2", "DEEPSPEED", 2, QKV_PROJ),
        ("cpu_zero3", "DEEPSPEED", 3, QKV_PROJ // 2),
    ],
)
def test_two_ranks_take_the_steps_of_one(
    warmed, one_rank, tmp_path, config, distributed_type, zero_stage, shard_elements
):
    facts = run(warmed, tmp_path, 32, config)
    assert facts["distributed_type"] == distributed_type
    assert facts["num_processes"] == 2
    assert facts["zero_stage"] == zero_stage
    assert facts["shard_elements"] == shard_elements
    assert not facts["sharded_while_sampling"]
    assert_same_steps(facts, one_rank[0])
    assert_same_end(tmp_path, one_rank[1])


def test_two_ranks_that_sample_from_shards_take_the_steps_of_one(warmed, one_rank, tmp_path):
    facts = run(warmed, tmp_path, 32, "cpu_zero3", "training.ds3_gather_for_generation=false")
    assert facts["zero_stage"] == 3
    assert facts["sharded_while_sampling"]
    assert_same_steps(facts, one_rank[0])
    assert_same_end(tmp_path, one_rank[1])


def test_bridge_only_under_zero3_with_checkpointing_takes_the_steps_of_one(warmed, tmp_path):
    alone = run(warmed, tmp_path / "one", 64, None, "train=bridge")
    options = ("train=bridge", "training.gradient_checkpointing=true")
    facts = run(warmed, tmp_path / "two", 32, "cpu_zero3", *options)
    assert facts["zero_stage"] == 3
    assert_same_steps(facts, alone)
    assert_same_end(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize("config", ["cpu_ddp", "cpu_zero2", "cpu_zero3"])
def test_two_ranks_that_cut_updates_into_parts_take_the_steps_of_one(warmed, one_rank, tmp_path, config):
    """Each rank's own lengths ask for another number of parts; under ZeRO-3 each pass is a collective."""
    facts = run(warmed, tmp_path, 32, config, "update.token_budget=150")
    assert facts["num_processes"] == 2
    assert_same_steps(facts, one_rank[0])
    assert_same_end(tmp_path, one_rank[1])


def test_the_recipe_alone_can_turn_zero_on(warmed, one_rank, tmp_path):
    """A launch with no DeepSpeed configuration, as the 8-GPU recipes are started."""
    facts = run(warmed, tmp_path, 32, TORCHRUN, "launch.zero_stage=3")
    assert facts["distributed_type"] == "DEEPSPEED"
    assert facts["zero_stage"] == 3
    assert_same_steps(facts, one_rank[0])


UNSEEDED = """
import random

def rows(size):
    rows = [{"problem": f"{n},2,3,4,5,6:{n + 2}", "answer": str(n)} for n in range(10, 10 + size)]
    random.shuffle(rows)
    return rows
"""


def test_ranks_that_read_different_problems_are_refused(tmp_path, monkeypatch):
    """The rows of one prompt are shared out over ranks: those of two problems would be compared with each other."""
    (tmp_path / "unseeded.py").write_text(UNSEEDED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    data = "data.train={path: 'unseeded:rows', kwargs: {size: 40}, check_answers: false}"
    options = (*SMALL, data, f"output_dir={tmp_path / 'run'}")
    done = launch("launch/train.py", "recipes/tiny_arith.yaml", *options, config=TORCHRUN)
    assert done.returncode != 0
    assert done.stderr.count("error: data.train: the ranks have read different problems from unseeded:rows") == 2
    assert not (tmp_path / "run" / "warmup").exists()


ON_DISKS_OF_THEIR_OWN = """
import os
import sys
from pathlib import Path

from accelerate import PartialState

from bridge_rl import run_checkpoints
from bridge_rl.cli import run_command

rank = PartialState(cpu=True).process_index
os.makedirs(f"node{rank}", exist_ok=True)
os.chdir(f"node{rank}")
run_checkpoints.SECONDS_TO_SHOW = 1.0

def save():
    with run_checkpoints.writing(Path("run"), 1, 100, None) as staging:
        folder = staging / "checkpoint-1"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"rollout_state_{rank}.pt").touch()

def resume():
    run_checkpoints.checkpoint_to_resume("auto", Path("run"))

run_command({"save": save, "resume": resume}[sys.argv[1]])
"""


def on_disks_of_their_own(directory: Path, action: str) -> subprocess.CompletedProcess:
    (directory / "job.py").write_text(ON_DISKS_OF_THEIR_OWN)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "job.py", action]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=directory, env=env, capture_output=True, text=True, timeout=240
    )


def test_a_checkpoint_of_which_a_part_is_on_another_disk_is_no_checkpoint(tmp_path):
    done = on_disks_of_their_own(tmp_path, "save")
    assert done.returncode != 0
    assert "error: run is not one directory for all ranks: rollout_state_1.pt of checkpoint-1" in done.stderr
    assert not list(tmp_path.glob("node*/run/checkpoint-1"))


def test_a_manifest_that_only_one_rank_can_read_is_refused_on_both(tmp_path):
    """The second disk is without it. Nothing is set aside, on either."""
    PartialState(cpu=True)
    for node in ("node0", "node1"):
        with run_checkpoints.writing(tmp_path / node / "run", 1, 100, None):
            pass
    (tmp_path / "node1" / "run" / "checkpoint-1" / run_checkpoints.MANIFEST).unlink()
    done = on_disks_of_their_own(tmp_path, "resume")
    assert done.returncode != 0
    assert done.stderr.count("error: run/checkpoint-1/manifest.json can be read by some ranks and not by others") == 2
    assert [path.name for path in tmp_path.glob("node*/run/*")] == ["checkpoint-1", "checkpoint-1"]


def test_a_warmup_under_zero_is_refused_with_the_command_to_run_first(tmp_path):
    done = launch("launch/train.py", "recipes/tiny_arith.yaml", *SMALL, f"output_dir={tmp_path}", config="cpu_zero2")
    assert done.returncode != 0
    assert "error: warmup: " in done.stderr
    assert "accelerate launch launch/warmup.py" in done.stderr
