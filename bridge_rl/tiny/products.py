"""Products: multiply three numbers, in any order. Arithmetic that a tiny model has learnt in part.

Problem:  three numbers from 2 to 29, with two digits: `07*12*19`.
Solution: two of them multiplied, then the third: `19*07=133;133*12=01596`. It is right iff it ends in their product.

Every number stands in a fixed number of digits, so a solution always has 23 characters and the digits of the product
stand at fixed columns. Which pair comes first is free: rows that chose differently arrive at the same product by other
multiplications, of which the model has some wrong. That is what rows can tell each other while they write it.
"""

import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

Split = Literal["train", "validation", "test"]

CHARACTERS = "0123456789*;="
SMALLEST, LARGEST = 2, 29

_ANSWER = re.compile(r"=(\d+)$")


@dataclass(frozen=True)
class Problem:
    """Three numbers, in the order in which they are asked."""

    numbers: tuple[int, int, int]

    @property
    def text(self) -> str:
        return "*".join(f"{number:02d}" for number in self.numbers)

    @property
    def product(self) -> int:
        first, second, third = self.numbers
        return first * second * third

    @property
    def split(self) -> Split:
        """The same for every order of the same numbers: a tenth is for testing, a tenth for validation."""
        tenth = zlib.crc32(repr(sorted(self.numbers)).encode()) % 10
        return "test" if tenth == 0 else "validation" if tenth == 1 else "train"

    @classmethod
    def parse(cls, text: str) -> "Problem":
        """Inverse of `text`."""
        first, second, third = map(int, text.split("*"))
        return cls((first, second, third))


def make_problems(seed: int, split: Split = "train") -> Iterator[Problem]:
    """Endless problems of `split` from `seed`."""
    rng = random.Random(seed)
    numbers = range(SMALLEST, LARGEST + 1)
    while True:
        problem = Problem((rng.choice(numbers), rng.choice(numbers), rng.choice(numbers)))
        if problem.split == split:
            yield problem


def final_answer(completion: str) -> str | None:
    """The number that it ends in, without leading zeros; None if there is none."""
    match = _ANSWER.search(completion)
    return None if match is None else str(int(match[1]))


def is_correct(problem: str, completion: str) -> bool:
    """Whether `completion` ends in the product of `problem`."""
    return final_answer(completion) == str(Problem.parse(problem).product)


def demonstrate(problem: Problem, rng: random.Random) -> str:
    """One supervised solution, in a random order."""
    first, second, third = rng.sample(problem.numbers, 3)
    return f"{first:02d}*{second:02d}={first * second:03d};{first * second:03d}*{third:02d}={problem.product:05d}"


def dataset(seed: int, size: int, split: Split = "train") -> list[dict[str, str]]:
    """`size` rows with `problem` and `answer`."""
    chosen = islice(make_problems(seed, split), size)
    return [{"problem": problem.text, "answer": str(problem.product)} for problem in chosen]
