"""Products: multiply three numbers, in any order. Arithmetic that a tiny model has learnt in part.

Problem:  three numbers from 2 to 29, with two digits: `07*12*19`.
Solution: two of them multiplied, then the third: `19*07=133;133*12=01596`. It is right iff it ends in their product.

Every number stands in a fixed number of digits, so a solution always has 22 characters and the digits of the product
stand at fixed columns. Which pair comes first is free: rows that chose differently arrive at the same product by other
multiplications, of which the model has some wrong. That is what rows can tell each other while they write it.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from bridge_rl.tiny.splits import Split, split_of, take

CHARACTERS = "0123456789*;="
SMALLEST, LARGEST = 2, 29


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
        """The same for every order of the same numbers."""
        return split_of(sorted(self.numbers))

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


def demonstrate(problem: Problem, rng: random.Random) -> str:
    """One supervised solution, in a random order."""
    first, second, third = rng.sample(problem.numbers, 3)
    pair = first * second
    return f"{first:02d}*{second:02d}={pair:03d};{pair:03d}*{third:02d}={problem.product:05d}"


def dataset(seed: int, size: int, split: Split = "train", distinct: bool = False) -> list[dict[str, str]]:
    """`size` rows with `problem` and `answer`. distinct: no text twice, though the same numbers in another order."""
    chosen = take(make_problems(seed, split), size, lambda problem: problem.text, distinct)
    return [{"problem": problem.text, "answer": str(problem.product)} for problem in chosen]
