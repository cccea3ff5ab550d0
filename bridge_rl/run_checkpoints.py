"""A run's checkpoints, which cannot be half: written under another name, hashed, renamed when all of it is there.

OUTPUT/checkpoint-12.partial/checkpoint-12 becomes OUTPUT/checkpoint-12, whose manifest.json names every file of every
rank with its size and SHA-256. Only this module knows that form. Its functions are called on all ranks, which share
the hashing out among themselves.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer import OPTIMIZER_NAME_BIN
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from bridge_rl.checkpoint import SHARDS_OF_ZERO
from bridge_rl.errors import UserError, is_failed_write
from bridge_rl.models import uses_deepspeed, uses_fsdp

MANIFEST = "manifest.json"
PARTIAL = ".partial"  # being written, or being deleted: no good either way
DAMAGED = ".damaged"
SECONDS_TO_SHOW = 60.0  # in which a shared disk shows what another node has written


def step_of(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def is_numbered(folder: Path) -> bool:
    return folder.name.rpartition("-")[2].isdigit()


def path_of(output: Path, step: int) -> Path:
    return output / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def numbered(output: Path) -> list[Path]:
    """Directories with the name of a checkpoint, oldest first; their content is not looked at."""
    return sorted(filter(is_numbered, output.glob(f"{PREFIX_CHECKPOINT_DIR}-*")), key=step_of)


# -- writing ----------------------------------------------------------------------------------------------------------


@contextmanager
def writing(output: Path, step: int, size: int, keep: int | None, protected: int | None = None) -> Iterator[Path]:
    """Inside, every rank writes its files of `checkpoint-STEP` into a directory of that name in the one given; on
    leaving, the checkpoint is hashed, renamed, and older ones are deleted until `keep` are left.

    size: bytes that will be written, about. keep: None keeps all. protected: a step whose checkpoint is never deleted.
    Raises UserError where the disk is full: the checkpoints before are kept and the half one is removed.
    """
    staging = path_of(output, step).with_name(f"{PREFIX_CHECKPOINT_DIR}-{step}{PARTIAL}")
    on_main(lambda: _prepare(output, staging, size))
    try:
        yield staging
        folder = staging / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        _seal(folder, step)
        on_main(lambda: _publish(folder, output))
    except Exception as error:
        # A rank that cannot write leaves at once: others may wait for it inside DeepSpeed, where it cannot tell them.
        shutil.rmtree(staging, ignore_errors=True)
        if is_failed_write(error):
            raise UserError(_full(output, step, size, error)) from error
        raise
    on_main(lambda: _rotate(output, keep, protected))


def on_main(action: Callable[[], None]) -> None:
    """Do it on the main process, with all others waiting; what is wrong there for the user is raised on every rank."""
    problem = None
    if PartialState().is_main_process:
        try:
            action()
        except UserError as error:
            problem = str(error)
    [problem] = broadcast_object_list([problem])
    if problem is not None:
        raise UserError(problem)


def _prepare(output: Path, staging: Path, size: int) -> None:
    _delete_leftovers(output)
    free = shutil.disk_usage(output).free if output.is_dir() else size
    if free < size:
        raise UserError(_full(output, int(staging.stem.rpartition("-")[2]), size, None))
    (staging / staging.stem).mkdir(parents=True)


def _full(output: Path, step: int, size: int, error: Exception | None) -> str:
    """One sentence: what does not fit, how many bytes are missing, what to do."""
    missing = size - shutil.disk_usage(output).free
    if missing > 0:
        why = f"{missing:,} bytes are missing of the {size:,} that it takes"
    else:  # a quota, or a limit on the size of a file
        why = f"it takes about {size:,} bytes, and a write failed ({' '.join(str(error).split())[:200]})"
    return (
        f"{output} has no room for {PREFIX_CHECKPOINT_DIR}-{step}: {why}; the checkpoints before it are kept, so make "
        "room and start the same command again."
    )


def _seal(folder: Path, step: int) -> None:
    """Bring every file to the disk and write the manifest. The hashes are of what reads back."""
    state = PartialState()
    state.wait_for_everyone()  # every rank has written its files
    names = sorted({name for seen in gather_object([list(_files(folder))]) for name in seen})
    on_main(lambda: _check_seen(folder, names))
    share = names[state.process_index :: state.num_processes]
    entries = dict(gather_object([(name, _entry(folder / name)) for name in share]))
    if state.is_main_process:
        content = {"step": step, "num_processes": state.num_processes, "files": {name: entries[name] for name in names}}
        with (folder / MANIFEST).open("w") as file:
            json.dump({"sha256": _digest_of(content), "content": content}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        for directory in {folder, *((folder / name).parent for name in names)}:
            _sync(directory)


def _check_seen(folder: Path, names: Sequence[str]) -> None:
    """Raise UserError for what another rank has written, be it a moment later, to a disk that is not seen here."""
    deadline = time.monotonic() + SECONDS_TO_SHOW
    for name in names:
        while not (folder / name).is_file():
            if time.monotonic() > deadline:
                raise UserError(
                    f"{folder.parent.parent} is not one directory for all ranks: {name} of {folder.name} was written "
                    "elsewhere: name an output_dir that every node shares, and begin the run anew."
                )
            time.sleep(1)


def _files(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*"):
        if path.is_file() and path != folder / MANIFEST:
            yield path.relative_to(folder).as_posix()


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _digest_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(folder: Path, output: Path) -> None:
    folder.rename(output / folder.name)
    _sync(output)
    shutil.rmtree(folder.parent, ignore_errors=True)


def _rotate(output: Path, keep: int | None, protected: int | None) -> None:
    """Delete the oldest. The newest, just written and hashed, is among those that stay."""
    if not keep or keep < 1:
        return
    for folder in numbered(output)[:-keep]:
        if step_of(folder) != protected:
            gone = folder.with_name(folder.name + PARTIAL)
            folder.rename(gone)  # or a kill meanwhile would leave something that looks like a checkpoint
            shutil.rmtree(gone, ignore_errors=True)


def _delete_leftovers(output: Path) -> None:
    for folder in output.glob(f"{PREFIX_CHECKPOINT_DIR}-*{PARTIAL}"):
        shutil.rmtree(folder, ignore_errors=True)


# -- finding ----------------------------------------------------------------------------------------------------------


def checkpoint_to_resume(resume: str, output: Path) -> Path | None:
    """What a recipe's `resume` means here: `auto` the last good checkpoint, None if there is none; `never` None; or a
    path. Damaged and half-written checkpoints are said and set aside.

    Raises UserError for `never` where there are checkpoints, for a path that is none, damaged or not the newest, and
    for a checkpoint of another number of processes or another sharding.
    """
    found = _listed(output)
    if resume == "never":
        if found:
            raise UserError(
                f"resume is 'never' and {output} has {found[-1].name}: set another output_dir, or resume=auto to go on."
            )
        return None
    folder = last_good(output) if resume == "auto" else _explicit(Path(resume), output, found)
    if folder is not None:
        written_by, now = _read(folder)["num_processes"], PartialState().num_processes
        if written_by != now:
            raise UserError(
                f"{folder} was written by {written_by} process(es) and this run has {now}: completions that wait for "
                f"their update belong to ranks, so start {written_by}, or set another output_dir."
            )
        before, here = _sharding_of(folder), _sharding_here()
        if before != here:
            raise UserError(
                f"{folder} was written under {before} and this run is under {here}, which would not find the "
                "optimizer's state: launch as before, or set another output_dir."
            )
    return folder


def _sharding_of(folder: Path) -> str:
    """By the files that the optimizer's state and the weights are in."""
    if (folder / SHARDS_OF_ZERO).is_file():
        return "ZeRO-3" if any(folder.glob("*/zero_pp_rank_*_model_states.pt")) else "ZeRO-1 or 2"
    return "FSDP" if (folder / OPTIMIZER_NAME_BIN).is_file() else "neither ZeRO nor FSDP"


def _sharding_here() -> str:
    if uses_deepspeed():
        return "ZeRO-3" if is_deepspeed_zero3_enabled() else "ZeRO-1 or 2"
    return "FSDP" if uses_fsdp() else "neither ZeRO nor FSDP"


def _explicit(folder: Path, output: Path, found: list[Path]) -> Path:
    if not is_numbered(folder):
        raise UserError(
            f"resume is {folder}: write 'auto', 'never', or a path that ends with {PREFIX_CHECKPOINT_DIR}-N."
        )
    elsewhere = folder.parent.resolve() != output.resolve()
    later = [other for other in found if elsewhere or step_of(other) > step_of(folder)]
    if later:
        raise UserError(
            f"resume is {folder}, but {output} has {later[-1].name} already: set resume=auto to go on from that one, "
            "or another output_dir."
        )
    problem = problem_of(folder)
    if problem is not None:
        raise UserError(f"resume: {problem}: name another checkpoint.")
    return folder


def last_good(output: Path) -> Path | None:
    """The newest checkpoint that is whole. Of newer ones it says what is wrong, and renames them to `*.damaged`."""
    on_main(lambda: _say_half_written(output))
    for folder in reversed(_listed(output)):
        problem = problem_of(folder)
        if problem is None:
            return folder
        on_main(partial(_set_aside, folder, problem))
    return None


def _listed(output: Path) -> list[Path]:
    [found] = broadcast_object_list([numbered(output) if PartialState().is_main_process else None])
    return found


def _say_half_written(output: Path) -> None:
    for folder in output.glob(f"{PREFIX_CHECKPOINT_DIR}-*{PARTIAL}"):
        print(f"{folder} is half-written (the run ended while it was saved) and is not used.", flush=True)


def _set_aside(folder: Path, problem: str) -> None:
    aside = folder.with_name(folder.name + DAMAGED)
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    print(f"{problem}: it is set aside as {aside.name}, and the checkpoint before it is used.", flush=True)


def problem_of(folder: Path) -> str | None:
    """The first thing that is not as it was written, such as `PATH is damaged (why)`; None if all is.

    Raises UserError where some ranks can read the manifest and others cannot: that is no damage.
    """
    state, unread = PartialState(), 0
    try:
        files = _read(folder)["files"]
        names = sorted(files)[state.process_index :: state.num_processes]
        mine = [found for name in names if (found := _difference(folder / name, files[name])) is not None]
    except (OSError, ValueError, KeyError, TypeError) as error:
        mine, unread = [f"{folder / MANIFEST} is damaged or missing ({type(error).__name__})"], 1
    if 0 < sum(gather_object([unread])) < state.num_processes:
        raise UserError(
            f"{folder / MANIFEST} can be read by some ranks and not by others: name an output_dir that every node "
            "shares, or mend the disk; nothing was set aside."
        )
    problems = sorted(gather_object(mine))
    return problems[0] if problems else None


def _read(folder: Path) -> dict[str, Any]:
    """The manifest's content. Raises OSError if there is none, ValueError, KeyError or TypeError if it is damaged."""
    manifest = json.loads((folder / MANIFEST).read_text())
    if manifest["sha256"] != _digest_of(manifest["content"]):
        raise ValueError("the manifest's own hash differs")
    return manifest["content"]


def _difference(path: Path, expected: dict[str, Any]) -> str | None:
    if not path.is_file():
        return f"{path} is missing"
    if path.stat().st_size != expected["bytes"]:
        return f"{path} is damaged ({path.stat().st_size:,} bytes instead of {expected['bytes']:,})"
    if _entry(path)["sha256"] != expected["sha256"]:
        return f"{path} is damaged (other content than was written)"
    return None
