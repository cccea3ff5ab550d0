"""Word problems: a dozen templates of GSM-Symbolic, as reasoning-gym makes them. Arithmetic in several steps, told.

Problem:  `A loaf of bread at the store costs $9. bagels cost $4 each. How much more do 9 loaves of bread cost than 8
          bagels?`
Solution: equations of two numbers each, in any order in which they can be worked out: `8*4=32;9*9=81;81-32=49`. It is
right iff the last one ends in the answer.

Source of templates: Mirzadeh et al., "GSM-Symbolic", arXiv 2410.05229, in the package reasoning-gym.
"""

import ast
import random
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from bridge_rl.errors import UserError
from bridge_rl.tiny.splits import Split, split_of, take

# Number of a template -> its answer, by the variables that reasoning-gym names; the elements of a list have numbers.
TEMPLATES = {
    7: "num_ledges * plants_per_ledge + plants_received - num_ledges * plants_to_give",
    9: "num_bills * bill_value - (num_items1 * price1 + num_items2 * price2)",
    12: "time1 * num1 + time2 * num2",
    31: "first_person_slices + (first_person_slices + second_person_extra)"
    " + (first_person_slices + second_person_extra + third_person_extra)",
    33: "(base_rate + multiplier * base_rate) * 7",
    34: "total_items - (2 * items_per_twin + unfound_items)",
    44: "quantities0 * prices0 + quantities1 * prices1 + quantities2 * prices2",
    48: "n1 * price1 - n2 * price2",
    57: "tennis_players + 2 * tennis_players + soccer_boys + soccer_girls",
    58: "volume * num_containers * calories",
    67: "day1_amount + day2_amount + multiplier * day1_amount",
    71: "n1 * p1 + n2 * p2 + n3 * p3",
}
_SIGNS: dict[type, str] = {ast.Add: "+", ast.Mult: "*", ast.Sub: "-"}


@dataclass
class Operation:
    """A sum or product of two terms or more, or a difference of two; a term that is worked out is a number."""

    sign: str
    terms: "list[Operation | int]"


@dataclass(frozen=True)
class Problem:
    """A template's question and what it says: the variables of the template's expression, by name."""

    template: int
    text: str
    values: tuple[tuple[str, int], ...]

    @property
    def operation(self) -> Operation:
        """How the answer is worked out, with nothing worked out yet."""
        parsed = _parsed(ast.parse(TEMPLATES[self.template], mode="eval").body, dict(self.values))
        assert isinstance(parsed, Operation)
        return parsed

    @property
    def answer(self) -> int:
        return _value(self.operation)

    @property
    def split(self) -> Split:
        """The same for all tellings with the same numbers."""
        return split_of((self.template, *self.values))


def make_problems(seed: int, split: Split = "train") -> Iterator[Problem]:
    """Endless problems of `split` from `seed`, as many of each template. Raises UserError without reasoning-gym."""
    generators = _generators()
    rng = random.Random(seed)
    while True:
        number = rng.choice(list(TEMPLATES))
        made = generators[number](rng, 1.0)
        named = _numbered(made["metadata"]["variables"])
        values = tuple((name, named[name]) for name in sorted(_names(number)))
        problem = Problem(number, made["question"], values)
        if problem.split == split:
            yield problem


def demonstrate(problem: Problem, rng: random.Random) -> str:
    """One supervised solution: what can be worked out next is chosen at random, and so is the order of two terms."""
    root, steps = problem.operation, []
    while True:
        node, first, second = rng.choice(_possible_steps(root))
        left, right = node.terms[first], node.terms[second]
        assert isinstance(left, int)
        assert isinstance(right, int)
        result = _applied(node.sign, left, right)
        steps.append(f"{left}{node.sign}{right}={result}")
        node.terms = [term for place, term in enumerate(node.terms) if place not in (first, second)] + [result]
        if node is root and len(root.terms) == 1:
            return ";".join(steps)
        _collapse(root)


def dataset(seed: int, size: int, split: Split = "train", distinct: bool = False) -> list[dict[str, str]]:
    """`size` rows with `problem` and `answer`. distinct: no template twice with the same numbers, however told.

    The templates have unequal numbers of such problems, in the split `test` from 2 to thousands.
    """
    chosen = take(make_problems(seed, split), size, lambda problem: (problem.template, problem.values), distinct)
    return [{"problem": problem.text, "answer": str(problem.answer)} for problem in chosen]


def _generators() -> dict[int, Any]:
    """Number of a template -> (rng, difficulty) -> its dict of `question`, `answer` and `metadata`."""
    package = "reasoning_gym.arithmetic.gsm_symbolic"
    try:
        modules = [import_module(f"{package}.generators_{numbers}") for numbers in ("00_49", "50_99")]
    except ImportError as error:
        raise UserError("The word problems need the package reasoning-gym: pip install reasoning-gym") from error
    return {number: getattr(modules[number // 50], f"generate_{number}") for number in TEMPLATES}


def _numbered(variables: dict[str, Any]) -> dict[str, Any]:
    """`{"prices": [3, 4]}` as `{"prices0": 3, "prices1": 4}`; what is no list stays."""
    found: dict[str, Any] = {}
    for name, value in variables.items():
        found |= {f"{name}{i}": v for i, v in enumerate(value)} if isinstance(value, list) else {name: value}
    return found


def _names(number: int) -> set[str]:
    return {node.id for node in ast.walk(ast.parse(TEMPLATES[number])) if isinstance(node, ast.Name)}


def _parsed(node: ast.expr, values: dict[str, int]) -> Operation | int:
    match node:
        case ast.Constant(value=int(number)):
            return number
        case ast.Name(id=name):
            return values[name]
        case ast.BinOp(left=left, op=op, right=right):
            sign, terms = _SIGNS[type(op)], [_parsed(left, values), _parsed(right, values)]
            return Operation(sign, terms if sign == "-" else _flattened(sign, terms))
    raise AssertionError(f"no part of a template: {ast.unparse(node)}")


def _flattened(sign: str, terms: list[Operation | int]) -> list[Operation | int]:
    """The terms of `a + (b + c)` are three, any two of which may be added first."""
    flat: list[Operation | int] = []
    for term in terms:
        flat += term.terms if isinstance(term, Operation) and term.sign == sign else [term]
    return flat


def _possible_steps(node: Operation) -> list[tuple[Operation, int, int]]:
    """All (operation below `node` or itself, place of a term, place of another) of which both terms are numbers."""
    found = [step for term in node.terms if isinstance(term, Operation) for step in _possible_steps(term)]
    numbers = [place for place, term in enumerate(node.terms) if isinstance(term, int)]
    pairs = [(first, second) for first in numbers for second in numbers if first != second]
    return found + [(node, *pair) for pair in pairs if node.sign != "-" or pair == (0, 1)]


def _collapse(node: Operation) -> None:
    """Put the number in place of every operation below `node` that has one term left."""
    for place, term in enumerate(node.terms):
        if isinstance(term, Operation):
            _collapse(term)
            if len(term.terms) == 1:
                node.terms[place] = term.terms[0]


def _value(term: Operation | int) -> int:
    if isinstance(term, int):
        return term
    total, *others = map(_value, term.terms)
    for other in others:
        total = _applied(term.sign, total, other)
    return total


def _applied(sign: str, left: int, right: int) -> int:
    return {"+": left + right, "-": left - right, "*": left * right}[sign]
