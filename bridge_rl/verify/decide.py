"""Decide what needs no parser: numbers (integers, decimals, fractions of integers), lists of them, and words.

Of anything else a worker asks sympy.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from bridge_rl.verify.common_form import (
    CHANGES,
    GAP,
    GAPS,
    INTRODUCTION,
    TEXT,
    Answer,
    canonical,
    changes,
    clean,
    plain_text,
)

DECIMALS = 6  # to which decimals are compared, as in math-verify
RELATIVE = Fraction(1, 10_000)  # and what they may differ by beside that, so that 1e-8 is not 2e-8
_DECIMAL = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)")
_RATIO = re.compile(r"([-+]?)(?:\\[dtc]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(-?\d+)\s*\}|(\d+)\s*/\s*(\d+))")
_POWER_OF_TEN = re.compile(r"([-+]?(?:\d+(?:\.\d+)?|\.\d+))\s*\\(?:times|cdot)\s*10\^(?:\{([-+]?\d{1,3})\}|(\d))")
_IN_BASE = re.compile(r"(\d[0-9A-Za-z]*)_(?:\{([1-9]\d?)\}|([1-9]\d?))")
_HALF_OF_DAY = re.compile(r"\b([ap])\.?\s?m\b")
_NUMBER = re.compile(r"\d(?:[\d.,/]*\d)?")
_DENIAL = r"\b(?:not|never|cannot)|n't|\bother than"
_UP_TO_IT = r"(?:\s+(?:be|or|equal|to|exactly|just|simply|necessarily|even))*[\s$*\\(]*\Z"
_DENIED = re.compile(rf"(?:{_DENIAL}){_UP_TO_IT}")  # in front of a number
_NOT_THE_VALUE = re.compile(
    rf"(?:{_DENIAL}|\b(?:either|between)|\bat (?:least|most)|\b(?:less|more|greater|fewer|larger|smaller) than)"
    rf"{_UP_TO_IT}"
)
_CLOCK = re.compile(r"\d:\d")
_OR_ANOTHER = re.compile(rf",?\s*or\s+(?:(?:maybe|perhaps|possibly|even|rather)\s+)?({_NUMBER.pattern})")
_PERCENTAGE = re.compile(rf"(.+?){GAP}*\\?%")
_GOES_ON = re.compile(r",\s*(?:\\[lc]?dots|\.\.\.|\N{HORIZONTAL ELLIPSIS})")  # of a list or set
_CHOICE = re.compile(  # `\textbf{(C) }12` or `(C) 12`, but not `\text{(A)}\text{ or (B)}`
    r"(?P<opens>\\(?:text\w*|mbox|mathrm|mathbf)\s*\{\s*)?\((?P<letter>[A-E])\)"
    rf"(?(opens)\s*\}}{GAPS}|{GAP}+)(?!.*\([A-E]\))"
    r"(?P<value>(?:-|\d|\\\$|\\[dtc]?frac|\\sqrt|\\pi|\\text\s*\{(?!\s*(?:or|and)\b)).*)"
)
_LETTER = re.compile(r"\(?(?P<letter>[A-E])\)?")
_WORDS = re.compile(r"[^\W\d_](?:[^\W\d_]|[ '-])*")
_MIN_WORD, _SHORT_WORDS = 4, ("yes", "no")  # letters: `xyz` and `p - q` are no words, `none` is one


def decide(prediction: Answer, gold: Answer) -> bool | None:
    """The verdict on numbers, lists of them or words, or on numbers in unlike words; None if a worker has to look."""
    if prediction.prose:
        another = _says_another if prediction.text.startswith(INTRODUCTION) else _only_denies
        return False if another(plain_text(prediction.text), gold.text) else None
    if (expected := numbers(gold.text)) and (given := numbers(prediction.text)):
        return len(given) == len(expected) and all(map(numbers_agree, given, expected))
    if (same := _percentages_agree(prediction.text, gold.text)) is not None:
        return same
    if bool(_GOES_ON.search(prediction.text)) != bool(_GOES_ON.search(gold.text)):
        return False
    if (gold_base := _in_base(gold.text)) is not None and (given_base := _in_base(prediction.text)) is not None:
        return gold_base == given_base
    if changes(prediction.text) != changes(gold.text):  # which math-verify drops with all text
        return False
    halves = [_HALF_OF_DAY.findall(plain_text(text)) for text in (prediction.text, gold.text)]
    if all(halves) and set(halves[0]) != set(halves[1]):
        return False
    gold_word, given_word = word(gold.text), word(prediction.text)
    return None if gold_word is None or given_word is None else gold_word == given_word


def _says_another(plain: str, gold: str) -> bool:
    """Whether a sentence changes the number that math-verify would find in it: `not 5`, `5 million dollars`.

    What changes it comes right behind it, unlike in `12 apples, half of them red`.
    """
    if (first := _NUMBER.search(plain)) is None:
        return False
    if (other := _OR_ANOTHER.match(plain, first.end())) and not _equals(other[1], first[0]):
        return True
    change = CHANGES.match(plain, first.end() + 1)
    denied = _NOT_THE_VALUE.search(plain[: first.start()]) and number(gold) is not None
    found = [tuple(group or "" for group in change.groups())] if change else []
    return bool(denied) or found != [words for words in changes(gold) if len(words) > 1][:1]


def _only_denies(plain: str, gold: str) -> bool:
    """Whether prose has the number `gold` nowhere but where it is not meant: `isn't 5`, and `12:30` for 12."""
    named = [match for match in _NUMBER.finditer(plain) if _equals(match[0], gold)]
    return bool(named) and all(
        _DENIED.search(plain[: match.start()]) or _CLOCK.search(plain, max(0, match.start() - 2), match.end() + 2)
        for match in named
    )


def _equals(a: str, b: str) -> bool:
    one, other = (number(text.replace(",", "")) for text in (a, b))
    return one is not None and other is not None and numbers_agree(one, other)


def in_one_form(prediction: Answer, gold: Answer) -> tuple[Answer, Answer]:
    r"""Of a choice and its value (`\textbf{(C) }12`) what the other has: the letter if it has one, else the value."""
    pair = prediction, gold
    choices = [_CHOICE.fullmatch(answer.text) for answer in pair]
    if not any(choices):
        return pair
    letters = [match or _LETTER.fullmatch(canonical(answer.text)) for match, answer in zip(choices, pair, strict=True)]
    if letters[0] and letters[1]:
        return Answer(letters[0]["letter"]), Answer(letters[1]["letter"])
    return value_of(prediction), value_of(gold)


def value_of(answer: Answer) -> Answer:
    """Without the letter of a choice."""
    choice = _CHOICE.fullmatch(answer.text)
    return Answer(clean(choice["value"])) if choice else answer


def readable(gold: Answer) -> bool:
    """Whether `gold` is a number, a percentage or a word, which needs no parser."""
    return any(read(gold.text) is not None for read in (number, percentage, word))


@dataclass(frozen=True)
class Number:
    """A value, and whether it was written without a decimal point."""

    value: Fraction
    exact: bool


def number(text: str) -> Number | None:
    """The value of a plain number in cleaned form."""
    if _DECIMAL.fullmatch(text):
        return Number(Fraction(text.rstrip(".")), "." not in text)
    if match := _RATIO.fullmatch(text):
        sign, above, below = match[1], int(match[2] or match[4]), int(match[3] or match[5])
        return Number((-1 if sign == "-" else 1) * Fraction(above, below), True) if below else None
    if match := _POWER_OF_TEN.fullmatch(text):
        return Number(Fraction(match[1]) * Fraction(10) ** int(match[2] or match[3]), False)
    return None


def percentage(text: str) -> Number | None:
    r"""Of `12.5\%` the 12.5."""
    match = _PERCENTAGE.fullmatch(text)
    return number(match[1]) if match else None


def _percentages_agree(a: str, b: str) -> bool | None:
    r"""`12.5\%` is both 12.5 and 0.125. None unless both are numbers, and one at least a percentage."""
    percentages = [value for text in (a, b) if (value := percentage(text)) is not None]
    plain = [value for text in (a, b) if (value := number(text)) is not None]
    if not percentages or len(percentages) + len(plain) < 2:
        return None
    if not plain:
        return numbers_agree(*percentages)
    [whole], [other] = percentages, plain
    return numbers_agree(whole, other) or numbers_agree(Number(whole.value / 100, whole.exact), other)


def numbers(text: str) -> list[Number]:
    """A number, or those of a list without brackets in order of size, each as often as it is there; else none."""
    found = [number(part.strip()) for part in text.split(",")]
    known = [value for value in found if value is not None]
    return sorted(known, key=lambda value: value.value) if len(known) == len(found) else []


def numbers_agree(a: Number, b: Number) -> bool:
    """Equal, or equal to DECIMALS decimals and within RELATIVE if one of them is a decimal."""
    if a.value == b.value or (a.exact and b.exact):
        return a.value == b.value
    near = abs(a.value - b.value) <= RELATIVE * max(abs(a.value), abs(b.value))
    return near and round(a.value, DECIMALS) == round(b.value, DECIMALS)


def _in_base(text: str) -> int | None:
    match = _IN_BASE.fullmatch(text)
    try:
        return int(match[1], int(match[2] or match[3])) if match else None
    except ValueError:  # no such base, or a digit it lacks
        return None


def word(text: str) -> str | None:
    r"""A word or phrase (`\text{Monday}`, `no solution`) in comparable form; None if it may be a product of symbols."""
    plain = TEXT.sub(r"\1", text).replace("\\ ", " ").strip().rstrip(".")
    if not _WORDS.fullmatch(plain) or "\\" in plain:
        return None
    found = "".join(plain.casefold().split())
    longest = max(map(len, re.findall(r"[^\W\d_]+", plain)))
    return found if longest >= _MIN_WORD or found in _SHORT_WORDS else None
