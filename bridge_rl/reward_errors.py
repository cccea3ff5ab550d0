"""A user's reward, or a rollout, that fails in the middle of a run: what it says, and how all ranks learn of it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import update_wrapper
from typing import Any

from accelerate.utils import gather_object

from bridge_rl.errors import UserError

SECONDS_FOR_ROW = 10.0  # for rows that are tried one by one, which may each ask a service


class RankFailed(UserError):  # noqa: N818
    """Raised on all ranks at once when a reward or a rollout has failed on one, so that they can save together."""


def agreed(reward: Callable[..., Any]) -> Callable[..., Any]:
    """The reward, for a trainer whose ranks all call it equally often: what fails on one rank fails on all."""

    def on_all(**columns: Any) -> Any:
        with together():
            return reward(**columns)

    return update_wrapper(on_all, reward)


@contextmanager
def together() -> Iterator[None]:
    """What fails for the user inside on one rank raises RankFailed on all, once each has come to the end of it."""
    problem = None
    try:
        yield
    except UserError as error:
        problem = str(error)
    found = [text for text in gather_object([problem]) if text is not None]
    if found:
        raise RankFailed(found[0])


def check_same_on_all(digest: str, problem: str) -> None:
    """Raise UserError with the sentence `problem` on all ranks unless all have the same `digest`."""
    if len(set(gather_object([digest]))) > 1:
        raise UserError(problem)


def check_columns(columns: dict[str, list[Any]], rows: int) -> None:
    """Raise RankFailed, on all ranks, where rewards have not logged one value for each completion on one."""
    with together():
        for name, values in sorted(columns.items()):
            if len(values) != rows:
                given = f"{len(values)} values for {rows} completions"
                raise UserError(
                    f"log_extra({name!r}) of the rewards gave {given}: give one for each, and two rewards two names."
                )


def told_apart(names: list[str]) -> list[str]:
    """The names of rewards; of equal ones all but the first get a number, or their metrics would be one."""
    return [f"{name}_{n}" if (n := names[: place + 1].count(name)) > 1 else name for place, name in enumerate(names)]


def failing_row(function: Callable[..., Any], columns: dict[str, Any], rows: int) -> str:
    """` at row 3 (COMPLETION)`, if a row fails alone as well: a reward sees a whole batch, and tells only its line."""
    logs: dict[str, Any] = {k: lambda *args: None for k in ("log_extra", "log_metric") if k in columns}
    started = time.monotonic()
    for row in range(rows):
        alone = {k: [v[row]] if isinstance(v, list) and len(v) == rows else v for k, v in columns.items()}
        try:
            function(**{**alone, **logs})
        except Exception:  # whatever it raises
            [shown] = alone.get("completions") or alone["completion_ids"]
            return f" at row {row} ({str(shown)[:80]!r})"
        if time.monotonic() - started > SECONDS_FOR_ROW:
            break
    return ""
