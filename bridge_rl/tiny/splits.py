"""Which problems are trained on and which are kept for validation and test."""

import zlib
from collections.abc import Callable, Hashable, Iterable
from itertools import islice
from typing import Literal, TypeVar

from bridge_rl.errors import UserError

MOST_REPEATS = 10_000  # in a row, after which there is nothing new to expect

Problem = TypeVar("Problem")

Split = Literal["train", "validation", "test"]


def split_of(key: object) -> Split:
    """The split of the problem that `key` stands for, by its `repr`: a tenth is test, a tenth validation."""
    tenth = zlib.crc32(repr(key).encode()) % 10
    return "test" if tenth == 0 else "validation" if tenth == 1 else "train"


def take(problems: Iterable[Problem], size: int, key: Callable[[Problem], Hashable], distinct: bool) -> list[Problem]:
    """The first `size` of endless problems; distinct: of those whose `key` was not there before.

    Raises UserError where there are no more of these.
    """
    if not distinct:
        return list(islice(problems, size))
    chosen: dict[Hashable, Problem] = {}
    repeats = 0
    for problem in problems:
        if len(chosen) == size:
            break
        repeats = repeats + 1 if key(problem) in chosen else 0
        if repeats > MOST_REPEATS:
            raise UserError(f"There are only {len(chosen)} different problems, not {size}: ask for fewer (size).")
        chosen.setdefault(key(problem), problem)
    return list(chosen.values())
