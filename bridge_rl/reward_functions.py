"""Rewards as a recipe names them: loaded, checked in what they take and give, and located where they fail."""

import asyncio
import inspect
import time
from collections.abc import Callable
from functools import update_wrapper, wraps
from numbers import Real
from typing import Any

import numpy as np
import torch

from bridge_rl.config import RewardSection
from bridge_rl.data import GIVEN_BY_TRAINER, GIVEN_TO_REWARDS
from bridge_rl.errors import UserError
from bridge_rl.ranks import together
from bridge_rl.user_code import call_users, load_beside, load_function
from bridge_rl.verify.answer import comparable_answer

SECONDS_FOR_ROW = 10.0  # for rows that are tried one by one, which may each ask a service


def load_reward(section: RewardSection, number: int) -> Callable[..., Any]:
    """The reward function that a recipe names, its fixed keyword arguments bound.

    Raises UserError if there is none, and for a first one that can only be called in training.
    """
    function = load_function(section.function, f"rewards.{number}.function")
    if number == 0:
        check_judges(function, section.function, "rewards.0.function")
    for name in section.kwargs:
        if name in GIVEN_TO_REWARDS:
            raise UserError(f"rewards.{number}.kwargs.{name}: the trainer gives '{name}' itself, name it otherwise.")
    return counted(function, section)


def check_judges(function: Callable[..., Any], named: str, key: str) -> None:
    """Raise UserError, naming `key`, for a reward that cannot do without what the trainer alone gives."""
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # compiled functions may have none
        return
    for name in sorted(GIVEN_BY_TRAINER & parameters.keys()):
        if parameters[name].default is inspect.Parameter.empty:
            raise UserError(
                f"{key}: {named} needs {name}, which neither the warm-up nor an evaluation gives the reward that they "
                "judge by: give the parameter a default, or judge by another function."
            )


def load_final_answer(section: RewardSection) -> Callable[[str], str | None]:
    """What finds the answer in a completion for majority votes: `final_answer` beside the reward function.

    It returns the answer in a form in which equal answers are equal strings, None where there is none. A file without
    one gets that of `rewards/answer.py`. Raises UserError as `load_reward`; what is returned, where it fails or gives
    what is no answer.
    """
    _, module = load_beside(section.function, "rewards.0.function")
    own = getattr(module, "final_answer", None)
    return comparable_answer if own is None else answering(own, f"final_answer beside {section.function}")


def answering(function: Callable[[str], Any], name: str) -> Callable[[str], str | None]:
    """A user's function that finds an answer; UserError if it fails or returns neither a string nor None."""

    def final_answer(completion: str) -> str | None:
        answer = call_users(function, name, lambda: f" on {completion[:80]!r}", completion)
        if not isinstance(answer, str | None):
            raise UserError(f"{name} returned {answer!r} on {completion[:80]!r}: return a string or None.")
        return answer

    return final_answer


def counted(function: Callable[..., Any], section: RewardSection) -> Callable[..., Any]:
    """The function with its fixed keyword arguments; UserError if it does not return one value a row.

    An `async` one is awaited here, in one event loop of its own: TRL would in another thread, and others not at all.
    """
    if inspect.iscoroutinefunction(function):
        function = awaited(function)

    def reward(**columns: Any) -> list[float]:
        rows = len(columns["completions"] if "completions" in columns else columns["completion_ids"])
        given = {**columns, **section.kwargs}
        values = call_users(function, section.function, lambda: failing_row(function, given, rows), **given)
        if not hasattr(values, "__len__") or isinstance(values, dict) or getattr(values, "ndim", 1) == 0:
            raise UserError(
                f"{section.function} returned {values!r}: return a list, with a number or None for each row"
            )
        if len(values) != rows:
            raise UserError(f"{section.function} returned {len(values)} values for {rows} rows: return one a row.")
        strange = [v for v in values if v is not None and not isinstance(v, Real | np.generic | torch.Tensor)]
        if strange:
            raise UserError(f"{section.function} returned {strange[0]!r} for a row: return a number or None.")
        return values

    return update_wrapper(reward, function)


def awaited(function: Callable[..., Any]) -> Callable[..., Any]:
    runner = asyncio.Runner()

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        return runner.run(function(*args, **kwargs))

    return run


def agreed(reward: Callable[..., Any]) -> Callable[..., Any]:
    """The reward, for a trainer whose ranks all call it equally often: what fails on one rank fails on all."""

    def on_all(**columns: Any) -> Any:
        with together():
            return reward(**columns)

    return update_wrapper(on_all, reward)


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
