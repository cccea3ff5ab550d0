"""Damaged checkpoints are found and said, the last good one is used, and a full disk costs no checkpoint."""

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import PartialState

from bridge_rl import run_checkpoints
from bridge_rl.errors import UserError, is_failed_write
from bridge_rl.run_checkpoints import (
    MANIFEST,
    checkpoint_to_resume,
    last_good,
    numbered,
    problem_of,
    step_of,
    writing,
)


@pytest.fixture(autouse=True)
def one_process():
    PartialState(cpu=True)


def write(
    output: Path, step: int, more: str = "", keep: int | None = None, size: int = 1000, protected: int | None = None
) -> Path:
    with writing(output, step, size, keep, protected) as staging:
        folder = staging / f"checkpoint-{step}"
        (folder / "global_step").mkdir()
        if more:
            (folder / more).touch()
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        (folder / "global_step" / "rank_0.pt").write_bytes(bytes(range(256)) * step)
    return output / f"checkpoint-{step}"


def flip_a_bit(path: Path, place: int = 100) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "truncated": (lambda folder: (folder / "global_step/rank_0.pt").write_bytes(b"\0" * 9), "9 bytes instead of 512"),
    "a bit is flipped": (lambda folder: flip_a_bit(folder / "global_step/rank_0.pt"), "rank_0.pt is damaged (other"),
    "a file is missing": (lambda folder: (folder / "trainer_state.json").unlink(), "trainer_state.json is missing"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), f"{MANIFEST} is damaged or missing"),
    "half a manifest": (lambda folder: (folder / MANIFEST).write_text("{"), f"{MANIFEST} is damaged or missing"),
    "a bit of the manifest": (
        lambda folder: (folder / MANIFEST).write_text(
            (folder / MANIFEST).read_text().replace('"step": 2', '"step": 3')
        ),
        f"{MANIFEST} is damaged or missing",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_said_in_one_sentence_and_the_checkpoint_before_is_used(tmp_path, capsys, kind):
    damage, reason = DAMAGE[kind]
    good, bad = write(tmp_path, 1), write(tmp_path, 2)
    assert checkpoint_to_resume("auto", tmp_path) == bad
    damage(bad)
    with pytest.raises(UserError, match=r"resume: .*: name another checkpoint"):
        checkpoint_to_resume(str(bad), tmp_path)
    assert last_good(tmp_path) == good
    [line] = capsys.readouterr().out.splitlines()
    assert reason in line
    assert "the checkpoint before it is used" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2.damaged"]
    assert write(tmp_path, 2).is_dir()  # the run comes by there again


def test_every_single_bit_counts(tmp_path):
    folder = write(tmp_path, 1)
    path = folder / "trainer_state.json"
    for place in range(path.stat().st_size):
        flip_a_bit(path, place)
        assert problem_of(folder) is not None
        flip_a_bit(path, place)
    assert problem_of(folder) is None


def test_the_manifest_names_every_file_with_size_and_hash(tmp_path):
    folder = write(tmp_path, 3)
    content = json.loads((folder / MANIFEST).read_text())["content"]
    assert (content["step"], content["num_processes"]) == (3, 1)
    assert content["files"].keys() == {"trainer_state.json", "global_step/rank_0.pt"}
    name = folder / "global_step/rank_0.pt"
    said = subprocess.run(["sha256sum", name], capture_output=True, text=True, check=True).stdout.split()[0]
    assert content["files"]["global_step/rank_0.pt"] == {"bytes": 768, "sha256": said}


def test_a_half_written_checkpoint_is_said_and_never_used(tmp_path, capsys):
    good = write(tmp_path, 1)
    shutil.copytree(good, tmp_path / "checkpoint-2.partial" / "checkpoint-2")
    assert last_good(tmp_path) == good
    assert "checkpoint-2.partial is half-written" in capsys.readouterr().out
    write(tmp_path, 3)
    assert not (tmp_path / "checkpoint-2.partial").exists()


def test_nothing_has_the_checkpoints_name_until_all_of_it_is_there(tmp_path):
    with writing(tmp_path, 1, 10, None) as staging:
        (staging / "checkpoint-1" / "weights").write_text("half")
        assert numbered(tmp_path) == []
    assert numbered(tmp_path) == [tmp_path / "checkpoint-1"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_the_oldest_go_only_after_the_newest_is_whole(tmp_path):
    for step in (8, 9, 10):
        write(tmp_path, step, keep=2)
    assert [folder.name for folder in numbered(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
    with pytest.raises(RuntimeError, match="the run broke"):
        with writing(tmp_path, 11, 10, keep=1):
            raise RuntimeError("the run broke")
    assert [folder.name for folder in numbered(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
    assert last_good(tmp_path) == tmp_path / "checkpoint-10"


def test_the_checkpoint_of_the_best_step_is_kept_beside_the_newest(tmp_path):
    for step in (8, 9, 10, 11):
        write(tmp_path, step, keep=2, protected=8)
    assert [step_of(folder) for folder in numbered(tmp_path)] == [8, 10, 11]


def test_what_does_not_fit_is_not_begun(tmp_path):
    write(tmp_path, 1)
    size = shutil.disk_usage(tmp_path).free + 10**9
    with pytest.raises(
        UserError, match=r"has no room for checkpoint-2: [\d,]{11,} bytes are missing of the [\d,]+ that"
    ):
        write(tmp_path, 2, size=size)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert last_good(tmp_path) == tmp_path / "checkpoint-1"


def save_by_torch(path: Path) -> None:
    import torch

    torch.save(torch.zeros(10**6), path)


@pytest.mark.parametrize("save", [save_by_torch, lambda path: path.write_bytes(bytes(10**6))])
def test_a_disk_that_fills_up_meanwhile_costs_no_checkpoint(tmp_path, save, monkeypatch):
    """The kernel's own refusal: /dev/full under the name of a file. The disk shows 10 bytes, of 4 million needed."""
    write(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)
    sizes = iter([usage.free, 10])
    monkeypatch.setattr(run_checkpoints.shutil, "disk_usage", lambda path: usage._replace(free=next(sizes)))

    def fill() -> None:
        with writing(tmp_path, 2, 4_000_000, 1) as staging:
            full = staging / "checkpoint-2" / "optimizer.pt"
            full.symlink_to("/dev/full")
            save(full)

    with pytest.raises(
        UserError, match="3,999,990 bytes are missing of the 4,000,000 that it takes; the checkpoints bef"
    ):
        fill()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert last_good(tmp_path) == tmp_path / "checkpoint-1"


LIMITED = """
import resource, sys; from pathlib import Path; import torch; from accelerate import PartialState
from safetensors.torch import save_file
from bridge_rl.run_checkpoints import writing; from bridge_rl.cli import run_command
PartialState(cpu=True); resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
def save():
    with writing(Path(sys.argv[1]), 2, 400_000, 1) as staging:
        file = staging / "checkpoint-2" / "some_file"
        x = torch.zeros(100_000)
        torch.save(x, file) if sys.argv[2] == "torch" else save_file({"x": x}, file)
run_command(save)
"""


@pytest.mark.slow
@pytest.mark.parametrize("writer", ["torch", "safetensors"])
def test_a_limit_on_file_size_is_said_where_the_disk_shows_room(tmp_path, writer):
    write(tmp_path, 1)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, tmp_path, writer], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    assert "has no room for checkpoint-2: it takes about 400,000 bytes, and a write failed" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_other_errors_are_not_taken_for_a_full_disk():
    assert is_failed_write(OSError(errno.ENOSPC, "No space left on device"))
    assert not is_failed_write(OSError(errno.EACCES, "Permission denied"))
    assert not is_failed_write(RuntimeError("shapes differ"))


def test_never_refuses_a_directory_with_checkpoints(tmp_path):
    assert checkpoint_to_resume("never", tmp_path) is None
    write(tmp_path, 4)
    with pytest.raises(UserError, match=r"resume is 'never' and .* has checkpoint-4: set another output_dir"):
        checkpoint_to_resume("never", tmp_path)


def test_a_path_is_where_a_run_goes_on_unless_there_is_more_to_lose(tmp_path):
    first, second = write(tmp_path / "a", 1), write(tmp_path / "a", 2)
    assert checkpoint_to_resume(str(second), tmp_path / "a") == second
    assert checkpoint_to_resume(str(first), tmp_path / "new") == first
    with pytest.raises(UserError, match="has checkpoint-2 already: set resume=auto"):
        checkpoint_to_resume(str(first), tmp_path / "a")
    write(tmp_path / "new", 1)  # the run's own, though of an earlier step
    with pytest.raises(UserError, match="new has checkpoint-1 already: set resume=auto"):
        checkpoint_to_resume(str(second), tmp_path / "new")
    with pytest.raises(UserError, match="a path that ends with checkpoint-N"):
        checkpoint_to_resume(str(tmp_path / "a" / "latest"), tmp_path / "a")


@pytest.mark.parametrize(
    ("file", "before", "variable", "now"),
    [
        ("latest", "ZeRO-1 or 2", "", "neither ZeRO nor FSDP"),
        ("optimizer.bin", "FSDP", "", "neither ZeRO nor FSDP"),
        ("optimizer.pt", "neither ZeRO nor FSDP", "ACCELERATE_USE_DEEPSPEED", "ZeRO-1 or 2"),
        ("latest", "ZeRO-1 or 2", "ACCELERATE_USE_FSDP", "FSDP"),
    ],
)
def test_another_sharding_is_refused(file, before, variable, now, tmp_path, monkeypatch):
    """transformers would not find the optimizer's state, and go on without."""
    folder = write(tmp_path, 1, file)
    if variable:
        monkeypatch.setenv(variable, "true")
    with pytest.raises(UserError, match=rf"was written under {before} and this run is under {now}"):
        checkpoint_to_resume("auto", tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", str(before == "ZeRO-1 or 2").lower())
    monkeypatch.setenv("ACCELERATE_USE_FSDP", str(before == "FSDP").lower())
    assert checkpoint_to_resume("auto", tmp_path) == folder


@pytest.mark.parametrize("before", [2, 3])
def test_another_stage_of_zero_is_refused(before, tmp_path, monkeypatch):
    """DeepSpeed would fail with an assertion, once the model is loaded."""
    folder = write(tmp_path, 1, "latest")
    if before == 3:
        (folder / "global_step" / "zero_pp_rank_0_mp_rank_00_model_states.pt").touch()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(run_checkpoints, "is_deepspeed_zero3_enabled", lambda: before == 2)
    with pytest.raises(UserError, match=r"was written under ZeRO-.* and this run is under ZeRO-"):
        checkpoint_to_resume("auto", tmp_path)
    monkeypatch.setattr(run_checkpoints, "is_deepspeed_zero3_enabled", lambda: before == 3)
    assert checkpoint_to_resume("auto", tmp_path) == folder


def test_another_number_of_processes_is_refused(tmp_path, monkeypatch):
    folder = write(tmp_path, 1)
    read = run_checkpoints._read
    monkeypatch.setattr(run_checkpoints, "_read", lambda path: {**read(path), "num_processes": 2})
    with pytest.raises(UserError, match=r"was written by 2 process\(es\) and this run has 1"):
        checkpoint_to_resume(str(folder), tmp_path)
