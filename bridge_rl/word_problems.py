"""One-step word problems with small numbers: what a model of 135 M parameters gets right now and then."""

import random

NAMES = ("Ana", "Ben", "Chloe", "David", "Emma", "Farid", "Grace", "Hugo")
THINGS = ("apples", "books", "coins", "marbles", "pencils", "shells", "stamps", "stickers")
PLUS = (
    "{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?",
    "{name} found {a} {things} on Monday and {b} {things} on Tuesday. How many {things} did {name} find in all?",
    "There are {a} {things} in a box and {b} {things} on a table. How many {things} are there together?",
)
MINUS = (
    "{name} has {a} {things} and gives {b} of them away. How many {things} are left?",
    "{name} had {a} {things} and lost {b}. How many {things} does {name} still have?",
)


def dataset(seed: int, size: int, largest: int = 9) -> list[dict[str, str]]:
    """`size` rows with `problem` and `answer`: sums and differences of numbers from 1 to `largest`."""
    rng = random.Random(seed)
    rows = []
    for _ in range(size):
        a, b = rng.randint(1, largest), rng.randint(1, largest)
        plus = rng.random() < 0.6
        if not plus:
            a, b = max(a, b) + 1, min(a, b)
        template = rng.choice(PLUS if plus else MINUS)
        problem = template.format(name=rng.choice(NAMES), things=rng.choice(THINGS), a=a, b=b)
        rows.append({"problem": problem, "answer": str(a + b if plus else a - b)})
    return rows
