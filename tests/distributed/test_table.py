"""ZeRO stage x what is trained x checkpointing on two CPU ranks: the steps that one process takes without any."""

import json
import os
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from table_job import CHECKPOINTING, OFFLOADED, RECIPE, RESUMED, SCATTERED, STEPS, TRAINS, ways

import bridge_rl as br
from bridge_rl.cli import main
from bridge_rl.config import ModelSection, load_recipe
from bridge_rl.convert import convert
from bridge_rl.errors import UserError
from bridge_rl.models import load_policy, load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TABLE = [(stage, train, name) for stage in (0, 2, 3) for train in TRAINS for name in CHECKPOINTING]
pytestmark = pytest.mark.slow


def run_all(*commands: list[str], **environment: str) -> None:
    """Run commands side by side."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    started = [
        subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command in commands
    ]
    with ThreadPoolExecutor() as threads:  # each output is read, or a full pipe would stop its process
        outputs = list(threads.map(lambda process: process.communicate(timeout=500)[0], started))
    for process, output in zip(started, outputs, strict=True):
        assert process.returncode == 0, output[-4000:]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """The embedded model with a Bridge whose blocks all matter, so that every parameter has a gradient."""
    directory = tmp_path_factory.mktemp("start")
    model, generator = load_policy(load_recipe(ROOT / RECIPE)), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in br.bridge_parameters(model):
            if parameter.dim() > 1:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    br.save_bridge(model, directory)
    return directory


@pytest.fixture(scope="module")
def runs(start, tmp_path_factory) -> Path:
    """What every way leaves, each in a directory of its name: one launch of one process, one of two."""
    directory = tmp_path_factory.mktemp("runs")
    job = ["tests/distributed/table_job.py", str(directory), str(start)]
    run_all([sys.executable, *job])
    # As two nodes of one process each, by the script for that.
    nodes = {"NNODES": "2", "NPROC": "1", "PORT": str(free_port())}
    run_all(["launch/torchrun.sh", *job], ["launch/torchrun.sh", *job], **nodes)
    assert {path.parent.name for path in directory.glob("*/facts.json")} == set(ways())
    return directory


def facts_of(run: Path) -> dict:
    return json.loads((run / "facts.json").read_text())


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """All weights of the model that `load_bridge` reads there; a LoRA is merged into them."""
    model = br.load_bridge(directory)
    return (model.merge_and_unload() if isinstance(model, PeftModel) else model).state_dict()


def assert_equal_weights(found: Path, expected: Path) -> None:
    ours, theirs = weights(found), weights(expected)
    assert ours.keys() == theirs.keys()
    assert [name for name, tensor in theirs.items() if not torch.equal(ours[name], tensor)] == []


def assert_same_weights(found: Path, expected: Path, start: Path) -> None:
    """Equal but for 1e-4 of the way that training went, of which 2e-5 at most was seen."""
    ours, theirs, before = (weights(directory) for directory in (found, expected, start))
    assert ours.keys() == theirs.keys() == before.keys()
    way, drift = (torch.cat([(theirs[n] - other[n]).flatten() for n in theirs]) for other in (before, ours))
    assert way.norm() > 0.01
    assert drift.norm() <= 1e-4 * way.norm(), (drift.norm(), way.norm())


def assert_same_steps(found: dict, expected: dict) -> None:
    assert len(found["steps"]) == len(expected["steps"]) == STEPS
    for ours, theirs in zip(found["steps"], expected["steps"], strict=True):
        assert ours["reward"] == pytest.approx(theirs["reward"], abs=1e-6)
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)


def assert_sharded(facts: dict, stage: int) -> None:
    """Each of the two ranks holds half of what the stage shards, and all of the rest."""
    assert facts["num_processes"] == 2
    assert facts["distributed_type"] == ("DEEPSPEED" if stage else "MULTI_CPU")
    assert facts["zero_stage"] == (stage or None)
    assert facts["optimizer_elements"] * (2 if stage >= 1 else 1) == facts["trained_elements"]
    assert facts["elements_held"] * (2 if stage == 3 else 1) == facts["elements"]


def assert_as_alone(run: Path, alone: Path, start: Path, train: str, checkpointing: str) -> None:
    facts, expected = facts_of(run), facts_of(alone)
    # A layer runs again in the backward pass; reentrant checkpoints run it without a graph first.
    assert facts["grad_modes"] == [not CHECKPOINTING[checkpointing], True]
    assert expected["grad_modes"] == [True]
    assert facts["frozen"] == expected["frozen"] == {"bridge": 38, "lora": 50, "full": 0}[train]
    assert facts["frozen_and_changed"] == expected["frozen_and_changed"] == []
    assert_same_steps(facts, expected)
    assert_same_weights(run, alone, start)
    assert_equal_weights(run / f"checkpoint-{STEPS}", run)


@pytest.mark.parametrize(("stage", "train", "checkpointing"), TABLE)
def test_two_ranks_with_checkpointing_take_the_steps_of_one_without(runs, start, stage, train, checkpointing):
    run = runs / f"zero{stage}-{train}-{checkpointing}"
    assert_sharded(facts_of(run), stage)
    assert_as_alone(run, runs / f"alone-{train}", start, train, checkpointing)


@pytest.mark.parametrize("train", TRAINS)
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_two_ranks_under_fsdp2_take_the_steps_of_one(runs, start, train, checkpointing):
    """Those of RESUMED were ended after a step and went on from their checkpoint."""
    name = f"fsdp2-{train}-{checkpointing}"
    facts = facts_of(runs / name)
    assert (facts["distributed_type"], facts["num_processes"]) == ("FSDP", 2)
    # FSDP2 shards rows, of which the embedding has an odd number: 128 elements more on this rank.
    assert abs(2 * facts["elements_held"] - facts["elements"]) <= 128
    assert abs(2 * facts["optimizer_elements"] - facts["trained_elements"]) <= 128
    assert (runs / name / "checkpoint-1").is_dir() == (name in RESUMED)
    assert_as_alone(runs / name, runs / f"alone-{train}", start, train, checkpointing)


def test_zero1_by_the_recipe_takes_the_steps_of_one(runs, start):
    facts = facts_of(runs / "zero1-full")
    assert_sharded(facts, 1)
    assert_same_steps(facts, facts_of(runs / "alone-full"))
    assert_same_weights(runs / "zero1-full", runs / "alone-full", start)


@pytest.mark.parametrize("config", OFFLOADED)
def test_offload_takes_the_steps_of_one(runs, start, config):
    facts = facts_of(runs / f"{config}-full")
    assert facts["zero_stage"] == int(config[4])
    assert facts["offload"]["offload_optimizer"]["device"] == "cpu"
    assert ("offload_param" in facts["offload"]) == config.endswith("all")
    assert_same_steps(facts, facts_of(runs / "alone-full"))
    assert_same_weights(runs / f"{config}-full", runs / "alone-full", start)


# -- conversion -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", TRAINS)
@pytest.mark.parametrize("stage", [2, 3])
def test_shards_convert_to_what_was_saved_whole(runs, tmp_path, stage, train):
    run = runs / f"zero{stage}-{train}-reentrant"
    main(["convert", str(run / f"checkpoint-{STEPS}"), str(tmp_path / "whole")])
    assert_equal_weights(tmp_path / "whole", run)
    kept = {path.name for path in (tmp_path / "whole").iterdir()} - {"README.md"}
    assert kept == {path.name for path in run.iterdir()} & kept  # a checkpoint like the run's own, no part of a run
    assert load_tokenizer(ModelSection(str(tmp_path / "whole"))).pad_token is not None


@pytest.mark.parametrize("train", SCATTERED)
def test_a_run_that_saves_shards_only_says_how_to_convert_them(runs, tmp_path, train):
    run, gathered = runs / f"zero3-{train}-scattered", runs / f"zero3-{train}-reentrant"
    for part in (run, run / f"checkpoint-{STEPS}"):
        assert not list(part.glob("*.safetensors"))
        with pytest.raises(UserError, match=f"bridge-rl convert {part} OUTPUT"):
            br.load_bridge(part)
        convert(part, tmp_path / part.name)
        assert_equal_weights(tmp_path / part.name, gathered)


def test_what_cannot_be_converted_is_said_in_a_sentence(runs, tmp_path):
    whole, checkpoint = runs / "alone-full", runs / f"zero2-full-reentrant/checkpoint-{STEPS}"
    with pytest.raises(UserError, match=f"{tmp_path} holds no Bridge"):
        convert(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match=f"{whole} holds no shards"):
        convert(whole, tmp_path / "out")
    with pytest.raises(UserError, match=f"{tmp_path} exists already"):
        convert(checkpoint, tmp_path)
    damaged = tmp_path / checkpoint.name
    shutil.copytree(checkpoint, damaged)
    shard = next(damaged.glob("global_step*/*optim_states.pt"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"{shard} is damaged \([\d,]+ bytes instead of"):
        convert(damaged, tmp_path / "out")
    assert not (tmp_path / "out").exists()
