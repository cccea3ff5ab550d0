"""Two tries: find the pair that makes a sum. Search under a fixed number of tries, with a cheap check.

Problem:  six different numbers of two digits and a target that is the sum of two of them: `12,35,27,19,31,22:49`.
Solution: exactly two tries, each a pair with its sum and a mark (`:` a hit, `;` a miss), then an answer:
`12+35=47;27+22=49:!27+22`. It is right iff the answer is a pair of the list that makes the target.

Every number and every sum has two digits, so a solution always has 24 characters and the answer stands at a fixed
column. What a row finds out by chance in its two tries, its siblings lack: that is what rows can tell each other.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

CHARACTERS = "0123456789,:;=+!"
NUMBERS = range(10, 40)
NUM_TERMS = 6
# How often the demonstrations try the right pair on purpose. Low, so that the base is a searcher that often misses.
DEMONSTRATED_INSIGHT = 0.12

_ANSWER = re.compile(r"!(\d\d)\+(\d\d)$")


@dataclass(frozen=True)
class Problem:
    """Six different numbers and the sum that two of them make."""

    numbers: tuple[int, ...]
    target: int

    @property
    def text(self) -> str:
        return ",".join(map(str, self.numbers)) + f":{self.target}"

    @classmethod
    def parse(cls, text: str) -> "Problem":
        """Inverse of `text`."""
        numbers, target = text.split(":")
        return cls(tuple(map(int, numbers.split(","))), int(target))


def make_problems(seed: int) -> Iterator[Problem]:
    """Endless problems from `seed`."""
    rng = random.Random(seed)
    while True:
        numbers = tuple(rng.sample(NUMBERS, NUM_TERMS))
        yield Problem(numbers, sum(rng.sample(numbers, 2)))


def is_correct(problem: str, completion: str) -> bool:
    """Whether `completion` ends in a pair of two different numbers of `problem` that make its target."""
    match = _ANSWER.search(completion)
    if match is None:
        return False
    parsed = Problem.parse(problem)
    first, second = int(match[1]), int(match[2])
    return first != second and {first, second} <= set(parsed.numbers) and first + second == parsed.target


def demonstrate(problem: Problem, rng: random.Random) -> str:
    """One supervised solution: two different pairs tried, a hit copied into the answer, else a guess."""
    pairs = [(a, b) for a in problem.numbers for b in problem.numbers if a < b]
    right = [pair for pair in pairs if sum(pair) == problem.target]
    tries: list[tuple[int, int]] = []
    while len(tries) < 2:
        pair = rng.choice(right) if rng.random() < DEMONSTRATED_INSIGHT else rng.choice(pairs)
        if pair not in tries:
            tries.append(pair)
    hits = [pair for pair in tries if sum(pair) == problem.target]
    answer = rng.choice(hits) if hits else rng.choice(pairs)
    steps = []
    for pair in tries:
        first, second = rng.sample(pair, 2)
        steps.append(f"{first}+{second}={sum(pair)}" + (":" if pair in hits else ";"))
    first, second = rng.sample(answer, 2)
    return "".join(steps) + f"!{first}+{second}"


def dataset(seed: int, size: int) -> list[dict[str, str]]:
    """`size` rows with `problem` and `answer`; the answer is the target, since several pairs may be right."""
    problems = islice(make_problems(seed), size)
    return [{"problem": problem.text, "answer": str(problem.target)} for problem in problems]
