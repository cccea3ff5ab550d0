"""Runs of a recipe one after another, each in processes that may kill themselves at a named point: `job.py SPEC.json`.

SPEC: {"runs": [{"argv": [...], "point": NAME or null, "step": N, "count": N, "rank": N, "send": SIGNAL,
"patch": NAME or null}], "ranks": N, "log": FILE}. A rank sends itself a signal, SIGKILL if not said otherwise, at the
`count`-th time that it comes to the point while `step` optimizer steps are done; when a rank dies of it the driver
kills the others, as a launcher does. Written to stdout: for each run the exit codes of its ranks, -9 for a kill.
Processes are forked, so that torch is imported once.
"""

import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bridge_rl.run
from bridge_rl import resume, run_checkpoints
from bridge_rl.cli import main
from bridge_rl.evaluation.samples import SampleStore
from bridge_rl.rollout import Rollout
from bridge_rl.trainer import BridgeGRPOTrainer, EpochSampler
from bridge_rl.warmup import BlockTrainer, WarmupStore

TRAINER: list[BridgeGRPOTrainer | BlockTrainer] = []  # the last one runs


def step() -> int:
    return TRAINER[-1].state.global_step if TRAINER else 0


def hook(owner: Any, name: str, action: Callable[..., None], after: bool = False) -> None:
    """Have `action` called with the arguments of owner.name, before or after it."""
    original = getattr(owner, name)

    def hooked(*args: Any, **kwargs: Any) -> Any:
        if not after:
            action(*args, **kwargs)
        result = original(*args, **kwargs)
        if after:
            action(*args, **kwargs)
        return result

    setattr(owner, name, hooked)


# Where a run can be killed: (owner, method, whether it has been done by then).
POINTS = {
    "in the rollout": (Rollout, "decode", False),
    "after the rollout": (BridgeGRPOTrainer, "_calculate_rewards", False),
    "before the forward": (BridgeGRPOTrainer, "_compute_loss", False),
    "before the backward": (BridgeGRPOTrainer, "_compute_loss", True),
    "after the backward": (BridgeGRPOTrainer, "training_step", True),
    "in the logging": (BridgeGRPOTrainer, "log", False),
    "before the weights": (BridgeGRPOTrainer, "_save", False),
    "before the optimizer state": (BridgeGRPOTrainer, "_save_optimizer_and_scheduler", False),
    "after the RNG": (BridgeGRPOTrainer, "_save_rng_state", True),
    "before the manifest": (run_checkpoints, "_seal", False),
    "after the manifest": (run_checkpoints, "_seal", True),
    "after the renaming": (run_checkpoints, "_publish", True),
    "before the deletion": (run_checkpoints, "_rotate", False),
    "in the evaluation": (SampleStore, "append", True),
    "after the training": (BridgeGRPOTrainer, "save_model", False),
    "after a write of the warm-up": (WarmupStore, "append", True),
    "after a backward of the warm-up": (BlockTrainer, "training_step", True),
    "before the warm-up's optimizer state": (BlockTrainer, "_save_optimizer_and_scheduler", False),
}
HALF_FILE = "in a file"


def arm(point: str, at: int, count: int, send: int = signal.SIGKILL) -> None:
    """Have this process send itself a signal at the point."""
    seen = 0

    def act(*args: Any, **kwargs: Any) -> None:
        nonlocal seen
        seen += step() == at
        if seen == count and step() == at:
            print(f"signal {send} at micro-step {getattr(TRAINER[-1], '_step', None) if TRAINER else None}", flush=True)
            os.kill(os.getpid(), send)

    def cut(path: Path) -> None:
        if step() == at:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), send)

    if point == HALF_FILE:
        hook(
            resume.Resume,
            "save",
            lambda self, folder: cut(resume.file_of(folder, self.trainer.args.process_index)),
            True,
        )
    else:
        owner, name, after = POINTS[point]
        hook(owner, name, act, after)


def forget_the_epoch() -> None:
    """Negative control: the sampler of a resumed run begins at the first epoch."""
    restored: list[int] = []
    hook(resume, "restore", lambda trainer, saved: restored.append(int(trainer.state.epoch)))
    original = EpochSampler.__init__

    def forgetful(self: EpochSampler, epoch: Callable[[], float | None], **kwargs: Any) -> None:
        original(self, epoch=lambda: int(epoch() or 0) - sum(restored[:1]), **kwargs)

    EpochSampler.__init__ = forgetful


def newest(argv: list[str]) -> Path:
    return run_checkpoints.numbered(output_of(argv))[-1]


def truncate(argv: list[str]) -> None:
    path = newest(argv) / "optimizer.pt"
    os.truncate(path, path.stat().st_size - 1)


def flip_a_bit(argv: list[str]) -> None:
    path = newest(argv) / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def fill_the_disk(argv: list[str]) -> None:
    """From the second save on."""
    original, calls = shutil.disk_usage, []

    def usage(path: Path) -> Any:
        calls.append(path)
        return original(path) if len(calls) == 1 else original(path)._replace(free=1_000_000)

    shutil.disk_usage = usage


def output_of(argv: list[str]) -> Path:
    [output] = [Path(option.partition("=")[2]) for option in argv if option.startswith("output_dir=")]
    return output


PATCHES = {
    "break the reward": lambda argv: (output_of(argv).parent / "broken").touch(),
    "mend the reward": lambda argv: (output_of(argv).parent / "broken").unlink(missing_ok=True),
    "forget the epoch": lambda argv: forget_the_epoch(),
    "truncate": truncate,
    "flip a bit": flip_a_bit,
    "fill the disk": fill_the_disk,
}


def child(run: dict[str, Any], rank: int, ranks: int, port: int, log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    print(f"started at {time.time()}", flush=True)
    if ranks > 1:
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", **{key: str(value) for key, value in world.items()}}
    for trainer in (BlockTrainer, BridgeGRPOTrainer):
        hook(trainer, "__init__", lambda self, *args, **kwargs: TRAINER.append(self), after=True)
    if run.get("patch"):
        PATCHES[run["patch"]](run["argv"])
    if run.get("point") and rank == run.get("rank", 0):
        arm(run["point"], run["step"], run.get("count", 1), signal.Signals[run.get("send", "SIGKILL")])
    main(run["argv"])


def start(run: dict[str, Any], rank: int, ranks: int, port: int, log: str) -> int:
    """The id of a new process that runs a rank."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        child(run, rank, ranks, port, log)
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def execute(run: dict[str, Any], ranks: int, log: str) -> list[int]:
    """Exit codes by rank. When one dies of a signal, so do the others."""
    port = free_port()
    processes = [start(run, rank, ranks, port, log) for rank in range(ranks)]
    codes: dict[int, int] = {}
    while len(codes) < ranks:
        process, status = os.wait()
        codes[process] = os.waitstatus_to_exitcode(status)
        if codes[process] < 0:
            time.sleep(0.1)
            for other in set(processes) - codes.keys():
                os.kill(other, signal.SIGKILL)
    return [codes[process] for process in processes]


if __name__ == "__main__":
    spec = json.loads(Path(sys.argv[1]).read_text())
    assert bridge_rl.run.BridgeGRPOTrainer is BridgeGRPOTrainer
    print(json.dumps([execute(run, spec["ranks"], spec["log"]) for run in spec["runs"]]))
