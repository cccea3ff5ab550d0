"""Leaving before a limit: a signal or the clock asks, all ranks agree, everything is saved, an exit code says so."""

import os
import re
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import reduce
from transformers import TrainerCallback, TrainerControl

from bridge_rl.errors import Stopped, UserError

ECHO_SECONDS = 1.0  # within which a second SIGINT is the launcher's copy of the first
BYTES_PER_SECOND = 2e8  # of a save, until one has been timed: a slow disk
UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def parse_duration(key: str, text: str | int) -> float:
    """`3h50m` -> 13800.0 seconds; units d, h, m, s, each at most once and in this order. Raises UserError."""
    match = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", str(text))
    seconds = sum(int(n or 0) * unit for n, unit in zip(match.groups(), UNITS.values(), strict=True)) if match else 0
    if seconds <= 0:
        raise UserError(f"{key} is {text!r}: write a time with units, largest first, such as 3h50m, 45m or 1d.")
    return float(seconds)


@contextmanager
def handling(numbers: Iterable[int], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Inside, these signals call `handler`."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def raising_stopped(numbers: Iterable[int], why: str) -> AbstractContextManager[None]:
    """Inside, these signals raise Stopped: `stopped by SIGTERM`, and `why` behind it."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise Stopped(f"stopped by {signal.Signals(number).name}{why}")

    return handling(numbers, stop)


class GivenUp(Exception):  # noqa: N818
    """Raised on all ranks in a rollout or an evaluation of which nothing is to be kept."""


class Stop(TrainerCallback):
    """Watches for SIGTERM, SIGINT and a time limit, and ends the run with a checkpoint.

    A rollout that is running is given up: its draws come from the seed, so the resumed run samples it again and nothing
    but its time is lost. An update that is running is finished. An evaluation is given up and goes on after the resume.
    limit: seconds since the process started.
    """

    def __init__(self, limit: float | None = None) -> None:
        self.limit = limit
        self.started = psutil.Process().create_time()
        self.signal: str | None = None
        self.stopping: str | None = None  # why, once all ranks agree
        self.saves: list[float] = []  # seconds each took
        self.save_bytes = 0  # of the next save, as far as is known
        self.longest_step = self.longest_update = self.step_began = self.update_began = self.signalled = 0.0

    def listening(self) -> AbstractContextManager[None]:
        """Inside, the two signals ask for the end; a second SIGINT ends the process at once."""
        return handling((signal.SIGTERM, signal.SIGINT), self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self.signalled = signal.Signals(number).name, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self.signalled > ECHO_SECONDS:
            os._exit(128 + number)  # no cleaning up, which may be what hangs

    def asked(self, ahead: float | None = None) -> bool:
        """Whether this rank should save now: `ahead` seconds later, by default an update's, would be too late."""
        ahead = self.longest_update if ahead is None else ahead
        reserve = 2 * max(self.saves, default=self.save_bytes / BYTES_PER_SECOND)
        late = self.limit is not None and time.time() - self.started + ahead + reserve >= self.limit
        return self.signal is not None or late

    def agree(self, asked: bool) -> bool:
        """Whether any rank is asked to stop: called by all at the same point, so that none waits for one that left."""
        flag = torch.tensor(int(asked), device=PartialState().device)
        if reduce(flag, reduction="sum").item() > 0:
            self.stopping = self.signal or ("save_before" if asked else "what another rank was sent")
            return True
        return False

    def give_up_if_asked(self) -> None:
        """Called by all ranks when their rollouts have ended, by themselves or because `asked`."""
        if self.agree(self.asked()):
            raise GivenUp
        self.update_began = time.monotonic()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.step_began = self.update_began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        self.longest_step = max(self.longest_step, time.monotonic() - self.step_began)
        self.longest_update = max(self.longest_update, time.monotonic() - self.update_began)
        if self.agree(self.asked(self.longest_step)):
            control.should_save = control.should_training_stop = True

    @contextmanager
    def timing_save(self) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.saves.append(time.monotonic() - start)

    def sentence(self, checkpoint: Path) -> str:
        return f"stopped by {self.stopping}: {checkpoint} is whole, and the same command goes on from it"
