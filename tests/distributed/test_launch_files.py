"""Every file in launch/ is read by the library that it is for, and names files that are there."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from pydantic import TypeAdapter

from bridge_rl.config import LaunchSection
from bridge_rl.errors import STOPPED_CODE, UserError
from bridge_rl.run_options import prepare_distributed
from bridge_rl.safety import check_fsdp, keep_outputs

ROOT = Path(__file__).resolve().parents[2]
ACCELERATE = sorted((ROOT / "launch/accelerate").glob("*.yaml"))
DEEPSPEED = sorted((ROOT / "launch/deepspeed").glob("*.json"))
OFFLOADS = {"none": (0, 1, 2, 3), "optimizer": (2, 3), "all": (3,)}  # and the stages at which they are


def stage_of(name: str) -> int:
    return int(re.search(r"zero(\d)", name)[1])


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_reads_its_files(path):
    config = load_config_from_file(str(path))  # refuses keys that it does not know
    deepspeed = config.deepspeed_config
    if path.stem == "fsdp2":
        assert config.distributed_type.value == "FSDP"
        return
    if "zero" not in path.stem:
        assert (config.distributed_type.value, deepspeed) == ("MULTI_GPU", {})
        return
    assert config.distributed_type.value == "DEEPSPEED"
    file = ROOT / deepspeed["deepspeed_config_file"]
    assert file.stem == path.stem
    assert file in DEEPSPEED
    assert deepspeed["zero3_init_flag"] == (stage_of(path.stem) == 3)
    # Or accelerate would start the other nodes itself, by pdsh, and not from the same command there.
    assert deepspeed.get("deepspeed_multinode_launcher") == (None if "cpu" in path.stem else "standard")


@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda path: path.stem)
def test_deepspeed_reads_its_files(path):
    from deepspeed.runtime.config import DeepSpeedConfig

    content = json.loads(path.read_text())
    # What transformers fills in for "auto".
    filled = content | {"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    filled |= {"gradient_clipping": 1.0, "bf16": {"enabled": True}}
    zero = {key: 1000 if value == "auto" else value for key, value in content["zero_optimization"].items()}
    config = DeepSpeedConfig(filled | {"zero_optimization": zero}).zero_config  # refuses keys that it does not know
    assert config.stage == stage_of(path.stem)
    assert (config.offload_optimizer is not None) == ("offload" in path.stem)
    assert (config.offload_param is not None) == path.stem.endswith("offload_all")
    assert config.gather_16bit_weights_on_model_save == (config.stage == 3)
    assert (ROOT / f"launch/accelerate/{path.stem}.yaml").is_file()


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_recipe_asks_for_a_file_that_is_there_or_is_refused(stage, offload):
    given = {"zero_stage": stage, "offload": offload}
    if stage not in OFFLOADS[offload]:
        with pytest.raises(UserError, match=rf"launch.offload is '{offload}' and launch.zero_stage {stage}: set"):
            LaunchSection(**given)
    elif stage > 0:
        path = ROOT / TypeAdapter(LaunchSection).validate_python(given).deepspeed_config
        assert path in DEEPSPEED
        assert stage_of(path.stem) == stage


@pytest.mark.parametrize(("launcher", "turned_on"), [({}, True), ({"ACCELERATE_USE_FSDP": "true"}, False)])
def test_a_launcher_that_asks_for_fsdp_is_not_overruled_by_the_recipes_zero_stage(monkeypatch, launcher, turned_on):
    environment = {"WORLD_SIZE": "2", **launcher}
    monkeypatch.setattr(os, "environ", environment)
    prepare_distributed(SimpleNamespace(launch=LaunchSection(zero_stage=3, offload="all")))
    file = str(ROOT / "launch/deepspeed/zero3_offload_all.json")
    assert environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE") == (file if turned_on else None)


def test_deepspeeds_file_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(os, "environ", {"WORLD_SIZE": "2"})
    monkeypatch.setattr("bridge_rl.run_options.find_file", lambda path: None)
    with pytest.raises(UserError, match=r"launch.zero_stage is 3, and launch/deepspeed/zero3.json is not here"):
        prepare_distributed(SimpleNamespace(launch=LaunchSection(zero_stage=3)))


def test_deepspeeds_file_of_a_launcher_is_found_from_another_directory(monkeypatch, tmp_path):
    environment = {
        "WORLD_SIZE": "2",
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": "launch/deepspeed/zero2.json",  # as launch/accelerate/zero2.yaml says
    }
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", environment)
    prepare_distributed(SimpleNamespace(launch=LaunchSection()))
    assert environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"] == str(ROOT / "launch/deepspeed/zero2.json")


def fsdp_plugin(monkeypatch, changes: dict[str, str]) -> FullyShardedDataParallelPlugin:
    """What accelerate makes of launch/accelerate/fsdp2.yaml with changes."""
    config = load_config_from_file(str(ROOT / "launch/accelerate/fsdp2.yaml")).fsdp_config
    for key, value in (config | changes).items():
        monkeypatch.setenv(key.upper(), str(value))
    return FullyShardedDataParallelPlugin()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"fsdp_version": "1"},
        {"fsdp_state_dict_type": "SHARDED_STATE_DICT"},
        {"fsdp_cpu_ram_efficient_loading": "true"},
        {"fsdp_activation_checkpointing": "true"},
    ],
)
def test_fsdp_is_accepted_as_the_file_has_it_and_otherwise_refused_by_key(monkeypatch, changes):
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.FSDP, state=SimpleNamespace(fsdp_plugin=fsdp_plugin(monkeypatch, changes))
    )
    if not changes:
        check_fsdp(accelerator)
        return
    with pytest.raises(UserError, match=rf"The launcher's {next(iter(changes))} is .*: set it to "):
        check_fsdp(accelerator)


def test_fsdp_in_bf16_does_not_round_what_the_model_returns(monkeypatch):
    """Log-probs among it: accelerate's own policy would."""
    plugin = fsdp_plugin(monkeypatch, {})
    plugin.set_mixed_precision("bf16")
    assert plugin.mixed_precision_policy.output_dtype == torch.bfloat16
    keep_outputs(plugin)
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.output_dtype) == (torch.bfloat16, None)


def test_fsdp_that_accelerate_would_leave_out_is_refused():
    with pytest.raises(UserError, match="accelerate would run without it"):
        check_fsdp(SimpleNamespace(distributed_type=DistributedType.MULTI_CPU))


def run_slurm(tmp_path, ends: dict[str, int]) -> subprocess.CompletedProcess:
    """launch/slurm.sh with two nodes of two tasks, whose programs leave as `ends` says; srun, scontrol and python are
    stubs here."""
    exits = "".join(f"[ $1 = launch/{script}.py ] && exit {code}\n" for script, code in ends.items())
    stubs = {
        "scontrol": "if [ $1 = show ]; then printf 'node7\\nnode8\\n'; else echo \"$@\"; fi",
        "srun": 'echo "$@" >> srun.log; while [[ $1 = --* ]]; do shift; done\n'
        'for n in 0 1 2 3; do SLURM_PROCID=$n SLURM_LOCALID=$((n % 2)) "$@" || exit $?; done',
        "python": f'echo $RANK/$WORLD_SIZE $LOCAL_RANK/$LOCAL_WORLD_SIZE $MASTER_ADDR "$@"\n{exits}exit 0',
    }
    bin_directory = tmp_path / ".venv/bin"
    bin_directory.mkdir(parents=True)
    (bin_directory / "activate").write_text(f"PATH={bin_directory}:$PATH\n")
    for name, body in stubs.items():
        (bin_directory / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (bin_directory / name).chmod(0o755)
    slurm = {"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "1"}
    slurm["SLURM_CPUS_PER_TASK"] = "8"  # of sbatch, which srun does not take over by itself
    command = ["bash", str(ROOT / "launch/slurm.sh"), "recipe.yaml", "launch.num_processes=4"]
    return subprocess.run(command, cwd=tmp_path, env=os.environ | slurm, capture_output=True, text=True, timeout=60)


def test_slurm_starts_the_ranks_of_all_nodes(tmp_path):
    done = run_slurm(tmp_path, {})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        f"{rank}/4 {rank % 2}/2 node7 launch/{script}.py recipe.yaml launch.num_processes=4"
        for script in ("warmup", "train")
        for rank in range(4)
    ]
    assert all("--cpus-per-task=8 " in call for call in (tmp_path / "srun.log").read_text().splitlines())


@pytest.mark.parametrize("script", ["warmup", "train"])
@pytest.mark.parametrize("code", [2, STOPPED_CODE])
def test_slurm_queues_again_what_was_stopped_and_nothing_that_failed(tmp_path, script, code):
    done = run_slurm(tmp_path, {script: code})
    assert (done.returncode, done.stderr) == (code, "")
    assert ("requeue 1" in done.stdout.splitlines()) is (code == STOPPED_CODE)
    assert ("launch/train.py" in done.stdout) is (script == "train")


@pytest.mark.slow
def test_accelerate_starts_one_of_several_nodes(tmp_path):
    """Two nodes here: the command of the README, with a program that says which rank it is."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    program = tmp_path / "program.py"
    names = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "ACCELERATE_DEEPSPEED_CONFIG_FILE")
    program.write_text(f"import os\nprint('rank:', *(os.environ[name] for name in {names}))")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/accelerate/zero3.yaml"]
    nodes = ["--num_machines=2", "--num_processes=2", "--main_process_ip=127.0.0.1", f"--main_process_port={port}"]
    started = [
        subprocess.Popen(
            [*launcher, *nodes, f"--machine_rank={rank}", str(program)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank, process in enumerate(started):
        output = process.communicate(timeout=120)[0]
        assert f"rank: {rank} 2 1 launch/deepspeed/zero3.json" in output
