"""Checked products: the products of `products.py`, with casting out nines, and an answer behind it.

Problem:  three numbers from 2 to 29, with two digits: `07*12*19`.
Solution: two of them multiplied, then the third; remainders modulo 9 of the factors as they come and of their products
          (of `19`, `07`, `19*07`, `12` and all three: `17733`); running remainders of the digits of the product that
          was written (`01663`); a mark, `:` if the last two agree, else `;`; then the answer:
          `19*07=133;133*12=01596%17733%01663:=01596`. It is right iff it ends in the product.

A row can thus see in its own text that its product is wrong, and still write another one behind the mark, where all
rows write their answers at the same columns. In nothing else does this task differ from products.
"""

import random

from bridge_rl.tiny import products
from bridge_rl.tiny.products import Problem, dataset, make_problems

__all__ = ["CHARACTERS", "Problem", "dataset", "demonstrate", "is_learned", "make_problems"]

CHARACTERS = products.CHARACTERS + "%:"
# How often the demonstrations write a wrong product, so that a base learns to find its own ones. It does not learn to
# write them (`is_learned`): what it gets wrong is what it does not know.
DEMONSTRATED_ERRORS = 0.5
PRODUCT = slice(17, 22)  # where it stands in a solution


def demonstrate(problem: Problem, rng: random.Random) -> str:
    """One supervised solution, in a random order. An error is always found, and the answer is always right."""
    steps = products.demonstrate(problem, rng)
    if rng.random() < DEMONSTRATED_ERRORS:
        steps = steps[: PRODUCT.start] + _wrong(steps[PRODUCT], rng)
    return steps + check(steps) + f"={problem.product:05d}"


def check(steps: str) -> str:
    """What follows the multiplications `19*07=133;133*12=01596`: remainders and a mark, `%17733%01663:`."""
    first, second, third = int(steps[:2]), int(steps[3:5]), int(steps[14:16])
    factors = [first, second, first * second, third, first * second * third]
    digits = steps[PRODUCT]
    running = [sum(map(int, digits[: end + 1])) for end in range(len(digits))]
    of_factors, of_digits = ("".join(str(number % 9) for number in numbers) for numbers in (factors, running))
    return f"%{of_factors}%{of_digits}" + (":" if of_factors[-1] == of_digits[-1] else ";")


def is_learned(problem: Problem, solution: str) -> list[bool]:
    """Of each character of a demonstration: not those of a wrong product."""
    wrong = int(solution[PRODUCT]) != problem.product
    return [not (wrong and PRODUCT.start <= column < PRODUCT.stop) for column in range(len(solution))]


def _wrong(digits: str, rng: random.Random) -> str:
    """With one digit replaced or two, such that the remainder modulo 9 is another."""
    while True:
        changed = list(digits)
        for place in rng.sample(range(len(digits)), rng.choice((1, 2))):
            changed[place] = rng.choice("0123456789")
        if (int("".join(changed)) - int(digits)) % 9:
            return "".join(changed)
