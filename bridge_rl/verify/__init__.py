"""Verify math answers in processes that can be killed."""

import os
import threading
from collections.abc import Sequence

from bridge_rl.verify.answer import extract_answer
from bridge_rl.verify.pool import Verdict, VerifierPool

__all__ = ["Verdict", "VerifierPool", "extract_answer", "gold_parses", "shared_pool", "verify_answers"]

_pool: VerifierPool | None = None
_lock = threading.Lock()


def verify_answers(predictions: Sequence[str], gold: Sequence[str], timeout_s: float = 5.0) -> list[Verdict]:
    """One verdict a pair, in order.

    predictions: whole completions, or bare answers. gold: raw answers (`2\\sqrt{3}`, `(3,4)`, `Monday`).
    timeout_s: for each pair, from when a worker takes it up. Raises ValueError if the lengths differ.
    From any thread; processes start on first use and are shared.
    """
    return shared_pool().verify(predictions, gold, timeout_s)


def gold_parses(gold: Sequence[str], timeout_s: float = 5.0) -> list[bool]:
    """Whether each answer can serve as gold: what `verify_answers` would call an error is found when data is loaded."""
    return shared_pool().gold_parses(gold, timeout_s)


def shared_pool() -> VerifierPool:
    """The pool of this process, its `counts` included."""
    global _pool
    with _lock:
        if _pool is None:
            _pool = VerifierPool()
        return _pool


def _forget_pool() -> None:
    """In a fork (a data loader's process) the pool's threads are gone and its workers are the parent's."""
    global _pool, _lock
    _pool, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_pool)
