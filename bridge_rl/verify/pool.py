"""Verifier processes that can be killed: freshly exec'd, one pair in flight each, the parent owns the deadline.

Each worker belongs to one thread of an executor, so any number of threads may call a pool at once, and nothing depends
on signals in this process. `PR_SET_PDEATHSIG` acts when the spawning thread ends: the executor's live as long as the
pool.
"""

import json
import os
import select
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from numbers import Real
from pathlib import Path
from typing import Literal, cast, get_args

from bridge_rl.errors import UserError, check_kind
from bridge_rl.verify.answer import find_answer, gold_answer
from bridge_rl.verify.common_form import canonical, for_worker
from bridge_rl.verify.decide import decide, in_one_form, readable, value_of, word

Status = Literal["ok", "unparsed", "timeout", "error"]
Reply = Literal["ok", "unparsed", "error", "failed", "timeout", "vanished"]  # the last two are the parent's words
WORKER = Path(__file__).with_name("worker.py")
MEMORY_BYTES = 2 << 30
LONGEST_S = 10**6  # of a deadline: poll() counts milliseconds in 32 bits
START_SECONDS = 120  # a worker needs 0.4 s on an idle machine; a file system may be slow on the first import
STARTS = 3
MAX_WORKERS = 8


@dataclass(frozen=True)
class Verdict:
    """Whether a prediction is right, and how that was found.

    status: `ok` compared; `unparsed` no answer found, or one that does not parse; `timeout` killed at the deadline;
    `error` the gold does not parse, or the worker failed (memory, recursion, killed from outside twice).
    Only `ok` can be correct.
    """

    correct: bool
    status: Status


@dataclass(frozen=True)
class Job:
    """One question for a worker: its `judge`'s arguments. Equal ones are asked once."""


@dataclass(frozen=True)
class MathJob(Job):
    """Whether `prediction` agrees with `gold`; None asks whether `gold` can be read."""

    gold: str
    prediction: str | None
    prose: bool = False
    same: bool = False


class VerifierPool:
    """Up to `size` workers, started when pairs need them.

    size: default BRIDGE_RL_VERIFIER_WORKERS, else the number of CPUs, at most MAX_WORKERS.
    memory_bytes: address space of a worker. counts: verdicts so far by status.
    script: what a worker runs: `worker.main` with a `judge` of its own.
    """

    def __init__(self, size: int | None = None, memory_bytes: int = MEMORY_BYTES, script: Path = WORKER) -> None:
        self.size = _default_size() if size is None else size
        if self.size < 1:
            raise ValueError(f"size is {self.size}: a verifier pool needs at least one worker.")
        self.memory_bytes = memory_bytes
        self.script = script
        self.counts: Counter[str] = Counter(dict.fromkeys(get_args(Status), 0))
        self._lock = threading.Lock()
        self._local = threading.local()
        self._workers: set[_Worker] = set()
        self._executor = ThreadPoolExecutor(self.size, thread_name_prefix="verifier")

    def verify(self, predictions: Sequence[str], gold: Sequence[str], timeout_s: float = 5.0) -> list[Verdict]:
        """One verdict a pair, in order; equal pairs are judged once. See `verify_answers`."""
        for name, texts in {"predictions": predictions, "gold": gold}.items():
            check_kind(name, texts, Sized)
            for place, text in enumerate(texts):
                if not isinstance(text, str):
                    raise UserError(f"{name}: number {place} is {text!r:.60}: give a text.")
        if len(predictions) != len(gold):
            raise UserError(f"{len(predictions)} predictions for {len(gold)} gold answers: pass one gold for each.")
        pairs = list(zip(predictions, gold, strict=True))
        found = {pair: _prepare(*pair) for pair in pairs}
        judged = self.judge_all([job for job in found.values() if isinstance(job, Job)], timeout_s)
        verdicts = [judged[job] if isinstance(job, Job) else job for job in map(found.__getitem__, pairs)]
        with self._lock:
            self.counts.update(verdict.status for verdict in verdicts)
        return verdicts

    def gold_parses(self, gold: Sequence[str], timeout_s: float = 5.0) -> list[bool]:
        """Whether each reference answer can be compared with; one that parses too slowly can not."""
        answers = {text: gold_answer(text) for text in gold}
        values = {text: value_of(answer) for text, answer in answers.items() if answer is not None}
        jobs = {text: MathJob(for_worker(value), None) for text, value in values.items() if not readable(value)}
        judged = self.judge_all(list(jobs.values()), timeout_s)
        return [judged[jobs[text]].status == "ok" if text in jobs else text in values for text in gold]

    @property
    def worker_pids(self) -> list[int]:
        """Of the workers that are running now."""
        with self._lock:
            return [worker.process.pid for worker in self._workers if worker.process.poll() is None]

    def close(self) -> None:
        """Finish what is in flight and end the workers. The pool cannot be used afterwards."""
        self._executor.shutdown(wait=True, cancel_futures=True)
        for worker in list(self._workers):
            self._drop(worker)

    def judge_all(self, jobs: Sequence[Job], timeout_s: float) -> dict[Job, Verdict]:
        """The verdict of each job. Raises ValueError unless 0 < timeout_s <= LONGEST_S."""
        check_kind("timeout_s", timeout_s, Real)
        if not 0 < timeout_s <= LONGEST_S:
            raise UserError(f"timeout_s is {timeout_s}: it must be above 0, and at most {LONGEST_S}.")
        different = list(dict.fromkeys(jobs))
        return dict(zip(different, self._executor.map(self._judge, different, repeat(timeout_s)), strict=True))

    def _judge(self, job: Job, timeout_s: float) -> Verdict:
        """On a thread of the executor. A worker that vanished (the OOM killer, say) is replaced once."""
        for _ in range(2):
            worker = self._worker_of_thread()
            reply, correct = worker.ask(job, timeout_s)
            if reply == "ok" or reply == "unparsed" or reply == "error":
                return Verdict(correct, reply)
            self._drop(worker)
            if reply == "timeout":
                return Verdict(False, "timeout")
            if reply == "failed":
                break
        return Verdict(False, "error")

    def _worker_of_thread(self) -> "_Worker":
        worker: _Worker | None = getattr(self._local, "worker", None)
        if worker is None or worker not in self._workers:
            worker = self._local.worker = _start_worker(self.script, self.memory_bytes)
            with self._lock:
                self._workers.add(worker)
        return worker

    def _drop(self, worker: "_Worker") -> None:
        worker.kill()
        with self._lock:
            self._workers.discard(worker)


def _own_cores() -> int:
    """Of this process: those that it is bound to, or its share of the machine's, in which each rank has a pool."""
    cores = os.cpu_count() or 1
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores  # not on macOS
    return bound if bound < cores else cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _default_size() -> int:
    asked = os.environ.get("BRIDGE_RL_VERIFIER_WORKERS")
    if asked is None:
        return max(1, min(_own_cores(), MAX_WORKERS))
    if not asked.isdecimal() or int(asked) < 1:
        raise UserError(f"BRIDGE_RL_VERIFIER_WORKERS is {asked!r}: give a number of workers, at least 1.")
    return int(asked)


def _prepare(prediction: str, gold: str) -> Verdict | Job:
    """The verdict where none of sympy is needed, else the question for a worker."""
    reference, answer = gold_answer(gold), find_answer(prediction)
    if reference is None:
        return Verdict(False, "error")
    if answer is None:
        # Without an answer there is nothing to compare, but bad gold is reported all the same.
        value = value_of(reference)
        return Verdict(False, "unparsed") if readable(value) else MathJob(for_worker(value), "")
    answer, reference = in_one_form(answer, reference)
    if (correct := decide(answer, reference)) is not None:
        return Verdict(correct, "ok")
    if word(reference.text) is not None:
        return Verdict(False, "unparsed" if answer.prose else "ok")
    same = canonical(answer.text) == canonical(reference.text)
    return MathJob(for_worker(reference), for_worker(answer), answer.prose, same)


class _Worker:
    """The parent's end of one process. Used by one thread at a time."""

    def __init__(self, script: Path, memory_bytes: int) -> None:
        # Ground types of python: gmpy2 computes big factorials out of reach of every limit but the kill.
        # A fixed hash seed: sympy's order of terms, and with it a verdict here and there, depends on it.
        # One thread of BLAS: each takes address space, whose amount is limited.
        env = os.environ | {"SYMPY_GROUND_TYPES": "python", "PYTHONHASHSEED": "0", "PYTHONSAFEPATH": "1"}
        env |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(memory_bytes), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
            bufsize=0,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._stdin, self._stdout = self.process.stdin, self.process.stdout
        self._poll = select.poll()  # select() fails on file descriptors from 1024 on
        self._poll.register(self._stdout, select.POLLIN)

    def ask(self, job: Job, timeout_s: float) -> tuple[Reply, bool]:
        """(reply, verdict)."""
        try:
            self._stdin.write(json.dumps(vars(job)).encode() + b"\n")  # the worker reads whole lines: no long wait
        except BrokenPipeError:
            return "vanished", False
        line = self.read_line(timeout_s)
        reply, _, correct = line.partition(" ")
        return cast(Reply, reply), correct == "1"

    def read_line(self, timeout_s: float) -> str:
        deadline, line = time.monotonic() + timeout_s, b""
        while not line.endswith(b"\n"):
            if not self._poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                return "timeout"
            piece = os.read(self._stdout.fileno(), 64)
            if not piece:
                return "vanished"
            line += piece
        return line.decode().strip()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._stdin.close()
        self._stdout.close()


def _start_worker(script: Path, memory_bytes: int) -> _Worker:
    """A worker that has said it is ready: the clock of a pair never includes a start."""
    for _ in range(STARTS):
        worker = _Worker(script, memory_bytes)
        said = worker.read_line(START_SECONDS)
        if said == "ready":
            return worker
        worker.kill()
    raise RuntimeError(
        f"A verifier worker did not start ({said}, {STARTS} times): run `{sys.executable} {script} {memory_bytes} 0` "
        "or see the error it printed above."
    )
