r"""Find the answer in a completion, bring it into a common form, decide the easy pairs. Pure, no sympy.

A completion's answer is, in this order: the last `\boxed{...}`; what follows `####` in the last line, or a number that
does further up; what follows the last "answer is"; the whole text if it is one bare expression; else its tail, in which
the worker lets math-verify look. A box before `</think>` counts if nothing of the first three, and no expression with a
digit, is after it. A last box that is left open (the completion was cut there), empty boxes alone, or one longer than
MAX_CHARS give no answer at all: falling back to the working would reward a guess at what the writer meant.

Numbers (integers, decimals, fractions of integers) and words are decided here; everything else goes to a worker.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any
from unicodedata import normalize

MAX_CHARS = 1000  # of an answer; a thousand nested parentheses already take sympy's parser 13 s
TAIL_CHARS = 300  # of prose without a marked answer
DECIMALS = 6  # to which decimals are compared, as in math-verify
RELATIVE = Fraction(1, 10_000)  # and what they may differ by beside that, so that 1e-8 is not 2e-8
INTRODUCTION = "The answer is "  # of prose in which what follows these words has to be found


@dataclass(frozen=True)
class Answer:
    """`text` in the common form of `clean`, except when it is `prose` in which an answer has yet to be found."""

    text: str
    prose: bool = False


def completion_text(completion: str | list[dict[str, Any]]) -> str:
    """The text of a completion as TRL hands it to rewards: a string, or the messages of a chat."""
    if isinstance(completion, str):
        return completion
    return completion[-1]["content"] or "" if completion else ""


# -- extraction -------------------------------------------------------------------------------------------------------

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_HASHES = re.compile(r"####[ \t]*(\S[^\n]*)")
_ANSWER_IS = re.compile(r"\banswer\b[^.\n:=]{0,60}?(?:\bis\b|:)[\s:*]*(?=\S)", re.IGNORECASE)
_DELIMITED = re.compile(
    r"\$\$((?:\\.|[^$\\])+)\$\$|\$((?:\\.|[^$\\])+)\$|\\\[((?:(?!\\\]).)+)\\\]|\\\(((?:(?!\\\)).)+)\\\)", re.DOTALL
)
_FURTHER = re.compile(rf"\s*(?:,\s*)?(?:or|and|,)\s*(?:{_DELIMITED.pattern})", re.DOTALL)  # `$5$ or $6$`
_CLAUSE_END = re.compile(r"[ \t*]*(?:[.!?;\n]|\Z)")
_SENTENCE_END = re.compile(r"[.!?;](?:\s|$)")
_GROUP_OF_TEXT = re.compile(r"\\(?:text\w*|mbox|mathrm|operatorname)\s*\{[^{}]*\}|\\[A-Za-z]+")
_WORD = re.compile(r"[^\W\d_]{2,}")


def extract_answer(completion: str) -> str | None:
    """The answer that `completion` marks, or all of it if it is one bare expression; None for anything else."""
    answer = find_answer(completion)
    return None if answer is None or answer.prose else answer.text


def find_answer(completion: str) -> Answer | None:
    """The answer, or the prose it may stand in; None if there is nothing to look at (see the module's docstring)."""
    completion = completion.strip()
    text = completion.rpartition("</think>")[2].strip() or completion
    if _BOX.search(text):
        return _marked(last_box(text if _boxes(text) != [] else completion))
    if (answer := _after_hashes(text)) is not None:
        return answer
    if marks := list(_ANSWER_IS.finditer(text)):
        return _bare_or_prose(_clause(text[marks[-1].end() :]), INTRODUCTION)
    answer = _bare_or_prose(text)
    boxed = last_box(completion)  # of the thinking
    if boxed is not None and (answer is None or answer.prose or not re.search(r"\d", answer.text)):
        return _marked(boxed)
    return answer


def _after_hashes(text: str) -> Answer | None:
    """What follows `####` in the last line, else the last number that does: other text behind it is a heading."""
    for place, line in enumerate(reversed(text.split("\n"))):
        if hashes := _HASHES.search(line):
            answer = _bare_or_prose(hashes[1])
            if place == 0 or (answer is not None and number(answer.text) is not None):
                return answer
    return None


def last_box(text: str) -> str | None:
    r"""The content of the last `\boxed{}` that is not empty, as written; None if it is left open or there is none."""
    boxes = _boxes(text)
    return boxes[-1] if boxes else None


def count_boxes(text: str) -> int | None:
    r"""How many `\boxed{}` that are not empty; None if one is left open. Boxes inside a box belong to it."""
    boxes = _boxes(text)
    return None if boxes is None else len(boxes)


def _boxes(text: str) -> list[str] | None:
    contents, position = [], 0
    while match := _BOX.search(text, position):
        end = closing_brace(text, match.end())
        if end is None:
            return None
        contents.append(text[match.end() : end].strip())
        position = end
    return [content for content in contents if content]


def closing_brace(text: str, start: int) -> int | None:
    r"""Where the group that is open at `start` closes. `\{` and `\}` are no braces."""
    depth = 1
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    return None


def _clause(rest: str) -> str:
    """What stands after "the answer is": formulas between delimiters, as a list, else up to the end of the sentence."""
    formula, found, end = _DELIMITED.match(rest), [], 0
    while formula:
        found.append(_inside(formula))
        end = formula.end()
        formula = _FURTHER.match(rest, end)
    if found:
        change = _CHANGES.match("0 " + rest[end:].lstrip(" *").casefold(), 2)  # as behind a number: `$5$ million`
        listed = ",".join(found) if _CLAUSE_END.match(rest, end) and not _are_one(found) else found[0]
        return listed + (rf"\text{{ {change[0]}}}" if change else "")
    line = rest.split("\n", 1)[0].rstrip()
    sentence_end = _SENTENCE_END.search(line)
    return line[: sentence_end.start()] if sentence_end else line


def _are_one(formulas: list[str]) -> bool:
    r"""Whether they are one number in several forms: `$\frac{1}{2}$ or $0.5$`."""
    values = [value for formula in formulas if (value := number(clean(formula))) is not None]
    written = {(value.value, value.exact) for value in values}
    return len(values) == len(formulas) == len(written) and all(numbers_agree(values[0], value) for value in values)


def _inside(formula: re.Match[str]) -> str:
    return next(group for group in formula.groups() if group is not None).strip()


def _marked(text: str | None) -> Answer | None:
    return Answer(clean(text)) if text and len(text) <= MAX_CHARS else None


def _bare_or_prose(text: str, introduction: str = "") -> Answer | None:
    """`text` as an answer if it is one expression, else as prose; `introduction` tells math-verify where to look."""
    whole = _DELIMITED.fullmatch(text.rstrip("."))
    formula = _inside(whole) if whole else text.strip()
    dollars = "$" in formula.replace(r"\$", "").lstrip("$")
    lines = "\n" in formula and r"\begin" not in formula
    if len(formula) <= MAX_CHARS and not dollars and not lines and len(_words(formula)) < 2:
        return _marked(formula)
    tail = text[-TAIL_CHARS:]
    # math-verify reads LaTeX between delimiters only: of a bare `2\sqrt{3}` it would take the 2.
    undelimited = re.search(r"\\[A-Za-z]", _DELIMITED.split(tail)[-1])
    return None if undelimited else Answer(introduction + tail, prose=True)


def _words(text: str) -> list[str]:
    return _WORD.findall(_GROUP_OF_TEXT.sub(" ", text))


def gold_answer(gold: str) -> Answer | None:
    """The reference answer: as given, freed of its own box if it has one. None if it is empty, too long or unclosed."""
    gold = gold.strip()
    if _BOX.match(gold) and (boxed := last_box(gold)) is not None and gold.endswith("}"):
        gold = boxed
    text = clean(gold).strip("$") if len(gold) <= MAX_CHARS else ""
    return Answer(text) if text and closing_brace(text + "}", 0) == len(text) else None


# -- common form ------------------------------------------------------------------------------------------------------

_SIGNS = str.maketrans(
    {
        "\N{MINUS SIGN}": "-",
        "\N{EN DASH}": "-",
        "\N{MULTIPLICATION SIGN}": r"\times ",
        "\N{MIDDLE DOT}": r"\cdot ",
        "\N{GREEK SMALL LETTER PI}": r"\pi ",
        "\N{INFINITY}": r"\infty ",
        "\N{EMPTY SET}": r"\emptyset ",
        "\N{DEGREE SIGN}": r"^\circ ",
        "\N{FRACTION SLASH}": "/",
        "\N{ELEMENT OF}": r"\in ",
        "\N{ALMOST EQUAL TO}": r"\approx ",
        "\N{EURO SIGN}": r"\$",
        "\N{POUND SIGN}": r"\$",
    }
)
_POWER = re.compile("[\u00b2\u00b3\u00b9\u2070\u2074-\u2079]+")  # digits above the line
_INDEX = re.compile("[\u2080-\u2089]+")  # and below it
_RELATION = re.compile(r"\A(?:=|\\approx(?![A-Za-z]))\s*(?=\S)")  # in front of an answer, to what came before it
_ONE_SIGN = re.compile("(\\d?)([\u00bc-\u00be\u2150-\u215e])")  # fractions such as one half
_ROOT = re.compile(r"\N{SQUARE ROOT}\s*(?:\{([^{}]*)\}|\(([^()]*)\)|(\d+(?:\.\d+)?|[A-Za-z](?![A-Za-z])))")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:\{,\}|,\\!\s?|\\[,!;: ]|[ \u00a0\u2009\u202f])\d{3})+(?!\d)")
_THOUSANDS_COMMA = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_REPEATING = re.compile(r"(?<![\d.])(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{?(\d+)\}?")
_GAP = r"(?:\s|~|\\[,;: ])"
_MIXED = re.compile(rf"(?<![\w.,/^}}])(\d+){_GAP}+(\d+)\s*/\s*(\d+)(?![\w/^!]|\.\d)")
_SCIENTIFIC = re.compile(r"(?<![\w\\.])(\d+(?:\.\d*)?|\.\d+)[eE]([-+]?\d+)(?![\w.])")
_COUNTED = re.compile(rf"(?:\\?\$)?([-+]?\d[\d.,/]*(?:\\?%)?)(?:{_GAP}+[a-z]{{3,}}){{1,3}}")
_MEASURED = re.compile(
    rf"(?:(?<=[\d}}])|(?<=\\pi)){_GAP}*(?:(?:square|cubic){_GAP}+)?"
    r"(?:inch(?:es)?|feet|foot|(?:centi|milli|kilo)?met(?:er|re)s?|yards?|miles?|units?|seconds?|minutes?|hours?|days?"
    r"|weeks?|months?|years?|degrees?|dollars?|cents?|cups?|pounds?|ounces?|gallons?|lit(?:er|re)s?|(?:kilo)?grams?)\Z"
)
_SHORT_UNIT = r"ft|lbs?|oz|hrs|mph|kph"
# Units without a `\text{}` that math-verify would read as products. A single letter may be a variable.
_UNIT = re.compile(
    rf"(?:(?:(?<=[\d}}])|(?<=\\pi)){_GAP}*"
    r"(?:(?:[mcdk]m|in|ft|yd|mi|units?|inch(?:es)?|feet|met(?:er|re)s)\^(?:[23]|\{[23]\})"
    r"|(?:k?m|mi|ft)/(?:h|hr|s|sec|min)|[mcd][lL]|[mck]m|kg)"
    rf"|(?<=\d)(?:{_SHORT_UNIT})|(?<=[\d}}]){_GAP}+(?:{_SHORT_UNIT}|mg|in|yd)"
    rf"|(?<=\d){_GAP}+(?:dm|mi|hr))\Z"
)
# Words that change the number they follow, so that the two are no number with a unit: `5 million`, `3 times seven`.
_CHANGES = re.compile(
    r"\b(?:(hundred|thousand|million|billion|trillion|dozen|score|hal[fv]e?|third|quarter)s?"
    r"|((?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|\w+teen|\w+tie|hundred|thousand|\w+illion)th)s?"
    r"|((?:plus|minus|times|divided|over|less|more|below|base|or|but\s+not)\s+(?:by\s+|than\s+)?"
    r"(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+teen|\w+ty))"
    r"|(or\s+(?:more|less|fewer|above|below))(?!\s*\w)|(?<=\d )(squared|cubed|factorial))\b"
)
_NO_UNIT = re.compile(rf"{_CHANGES.pattern}|\b(?:percent|percentage|pct|and|sqrt)s?\b")
_OPENS_TEXT = r"\\(?:text\w*|mbox|mathrm)\s*\{"
_TEXT = re.compile(_OPENS_TEXT + r"([^{}]*)\}")
_SECOND_NUMBER = re.compile(r"(?<=\d)(?:\s|~|\\[,;: !])*" + _OPENS_TEXT + r"(\s*[-+.]?\d[^{}]*)\}")  # 5\text{6}
_SPACE = re.compile(r"\\[,;:! ]|~")
_HALF_OF_DAY = re.compile(r"\b([ap])\.?\s?m\b")
_FIRST_NUMBER = re.compile(r"\d(?:[\d.,/]*\d)?")
_NOT_THE_VALUE = re.compile(  # in front of it
    r"(?:\b(?:not|never)|n't|\b(?:less|more|greater|fewer|larger|smaller|other) than)"
    r"(?:\s+(?:be|equal|to|exactly|just|simply|necessarily|even))*[\s$*\\(]*\Z"
)
_BOLD = re.compile(r"\\(?:boldsymbol|mathbf|bm)\s*\{([^{}]*)\}")
_NUMBER_IN_TEXT = re.compile(
    _OPENS_TEXT + r"\s*([-+]?(?:\d[\d.,/:]*|\.\d+))(\s(?!\s*[xyzn]\s*\})[^{}\d]*)?\}(\^\{?\d\}?)?"
)
_CONSTANT = re.compile(r"\\(?:text\w*|mbox|mathrm|operatorname)\s*\{\s*([ei])\s*\}")


def clean(text: str) -> str:
    r"""LaTeX with the same meaning in the form that math-verify reads: `10\,000`, `1e3`, `0.\overline{3}`, `oo`."""
    text = text.strip().translate(_SIGNS).strip("*").strip()
    while (whole := _DELIMITED.fullmatch(text)) is not None:
        text = _inside(whole)
    text = _RELATION.sub("", text)
    text = _POWER.sub(lambda match: f"^{{{normalize('NFKC', match[0])}}}", text)
    text = _INDEX.sub(lambda match: f"_{{{normalize('NFKC', match[0])}}}", text)
    text = _ONE_SIGN.sub(_fraction_of_one_sign, text)
    text = _ROOT.sub(lambda match: rf"\sqrt{{{next(part for part in match.groups() if part is not None)}}}", text)
    text = re.sub(r"\\(?:displaystyle|textstyle)(?![A-Za-z])", "", text).strip()
    text = re.sub(r"\^\s*\{\s*\\degree\s*\}|\^?\s*\\degree(?![A-Za-z])", r"^\\circ ", text)
    text = _CONSTANT.sub(r" \1", text).strip()  # which the worker would take for a unit
    if whole := _BOLD.fullmatch(text):
        text = whole[1].strip()
    if whole := _NUMBER_IN_TEXT.fullmatch(text):  # `\text{5 cm}`
        text = whole[1] + (rf"\text{{{whole[2]}}}{whole[3] or ''}" if (whole[2] or "").strip() else "")
    if text.endswith(".") and not text.endswith((r"\.", r"\right.")):
        text = text[:-1].rstrip()
    text = re.sub(r"\\(?:varnothing|empty|O)(?![A-Za-z])", r"\\emptyset", text)
    text = re.sub(r"(?<![A-Za-z\\])oo(?![A-Za-z])", r"\\infty ", text)
    if "=" in text:  # behind an equation math-verify reads these as its end, and takes what follows for the answer
        text = re.sub(r"\\(?:lor|vee)(?![A-Za-z])", r"\\text{ or }", text)
        text = re.sub(r"\\(?:land|wedge)(?![A-Za-z])", ",", text)
    text = _REPEATING.sub(_repeating_fraction, text)
    text = _THOUSANDS.sub(lambda match: re.sub(r"\D", "", match[0]), text)
    text = _MIXED.sub(_improper_fraction, text)
    text = _SCIENTIFIC.sub(r"\1\\times 10^{\2}", text)
    text = _UNIT.sub("", text)
    if (measured := _MEASURED.search(text)) and not _words(text[: measured.start()]):  # not `7 hours 30 minutes`
        text = text[: measured.start()]
    if (counted := _COUNTED.fullmatch(text)) and not _NO_UNIT.search(_plain(text)):
        text = counted[1]
    return text.replace(",", "") if _THOUSANDS_COMMA.fullmatch(text) else text


def _fraction_of_one_sign(match: re.Match[str]) -> str:
    """`1/2` of the one sign, behind a number `2 1/2`; LaTeX, where letters may follow."""
    before, sign = match.groups()
    above, _, below = normalize("NFKC", sign).partition("\N{FRACTION SLASH}")
    return f"{before} {above}/{below}" if before else rf"\frac{{{above}}}{{{below}}}"


def _repeating_fraction(match: re.Match[str]) -> str:
    whole, fixed, cycle = match.groups()
    shift = 10 ** len(fixed)
    value = Fraction(int((whole or "0") + fixed), shift) + Fraction(int(cycle), shift * (10 ** len(cycle) - 1))
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _improper_fraction(match: re.Match[str]) -> str:
    """Of `2 1/2`, which math-verify reads as 3/2; `2 3/2` is left as it is."""
    whole, above, below = map(int, match.groups())
    return rf"\frac{{{whole * below + above}}}{{{below}}}" if above < below else match[0]


def canonical(text: str) -> str:
    """A cleaned answer for comparison as a string: no spacing, no sizes, no decoration."""
    text = re.sub(r"\\(?:left|right|[Bb]igg?[lr]?)(?![A-Za-z])", "", text)
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    text = _TEXT.sub(r"\1", text)
    text = _SPACE.sub(" ", text)
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)


def _plain(text: str) -> str:
    """In small letters, with single blanks and without LaTeX's marks of text."""
    return " ".join(_SPACE.sub(" ", _TEXT.sub(r" \1", text)).casefold().split())


def changes(text: str) -> list[tuple[str, ...]]:
    r"""What changes a number and math-verify drops: words behind the first digit, in a `\text{}` or not (of a plural
    its singular), and digits in a `\text{}` behind a digit.
    """
    plain = _plain(text)
    digit = re.search(r"\d", plain)
    words = _CHANGES.findall(plain, digit.start()) if digit else []
    return [*words, *((digits,) for digits in _SECOND_NUMBER.findall(text))]


_BRACES = (  # what LaTeX lets one leave out: \frac12, \frac1{72}, \frac{\pi}2, \sqrt2
    (re.compile(r"\\[dtc]?frac\s*(\d)\s*(?=[\d{])"), r"\\frac{\1}"),
    (re.compile(r"\\[dtc]?frac\s*(\{[^{}]*\})\s*(\d)"), r"\\frac\1{\2}"),
    (re.compile(r"\\sqrt\s*(\d)"), r"\\sqrt{\1}"),
)
_NAMED = re.compile(r"[A-Za-z](?:_\w)?\s*=\s*([^=]+)")  # x = 5
_WITH_UNIT = re.compile(
    r"\\?\$?(?P<value>[-+]?(?:\d[\d.]*|\\frac\{-?\d+\}\{-?\d+\}))\s*"
    r"(?P<unit>\^\s*\\circ|\^\s*\{\s*\\circ\s*\}|\\?%|\\(?:text\w*|mbox|mathrm)\s*\{[^{}]*\}(?:\^\{?\d\}?)?)?"
)


def comparable_answer(completion: str) -> str | None:
    r"""The answer of a completion in a form for voting: `1/2`, `\frac12` and `0.5` give the same text.

    Numbers are exact fractions without their unit; words lose case and spacing; anything else is compared as written,
    but for spacing and sizes, so that `x+1` and `1+x` are two answers. None where no answer is marked, even if
    math-verify would find one in the prose.
    """
    answer = find_answer(completion)
    if answer is None or answer.prose:
        return None
    text = answer.text
    for pattern, braced in _BRACES:
        text = pattern.sub(braced, text)
    if named := _NAMED.fullmatch(text):
        text = named[1].strip()
    goes_on = _SECOND_NUMBER.search(text)
    if not goes_on and (measured := _WITH_UNIT.fullmatch(text)) and not _NO_UNIT.search(measured["unit"] or ""):
        text = measured["value"]
    if (value := number(text)) is not None:
        return str(value.value)
    return word(text) or canonical(text)


# -- the fast path ----------------------------------------------------------------------------------------------------

_DECIMAL = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)")
_RATIO = re.compile(r"([-+]?)(?:\\[dtc]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(-?\d+)\s*\}|(\d+)\s*/\s*(\d+))")
_POWER_OF_TEN = re.compile(r"([-+]?(?:\d+(?:\.\d+)?|\.\d+))\s*\\(?:times|cdot)\s*10\^(?:\{([-+]?\d{1,3})\}|(\d))")
_IN_BASE = re.compile(r"(\d[0-9A-Za-z]*)_(?:\{([1-9]\d?)\}|([1-9]\d?))")
_WORDS = re.compile(r"[^\W\d_](?:[^\W\d_]|[ '-])*")
_MIN_WORD = 4  # letters: `xyz` is a product, `none` a word


def decide(prediction: Answer, gold: Answer) -> bool | None:
    """The verdict on numbers, lists of them or words, or on numbers in unlike words; None if a worker has to look."""
    if prediction.prose:
        return False if prediction.text.startswith(INTRODUCTION) and _says_another(prediction.text, gold.text) else None
    if (expected := numbers(gold.text)) and (given := numbers(prediction.text)):
        return len(given) == len(expected) and all(map(numbers_agree, given, expected))
    if (gold_base := _in_base(gold.text)) is not None and (given_base := _in_base(prediction.text)) is not None:
        return gold_base == given_base
    if changes(prediction.text) != changes(gold.text):  # which math-verify drops with all text
        return False
    halves = [_HALF_OF_DAY.findall(_plain(text)) for text in (prediction.text, gold.text)]
    if all(halves) and set(halves[0]) != set(halves[1]):
        return False
    gold_word, given_word = word(gold.text), word(prediction.text)
    return None if gold_word is None or given_word is None else gold_word == given_word


def _says_another(sentence: str, gold: str) -> bool:
    """Whether a sentence changes the number that math-verify would find in it: `not 5`, `5 million dollars`.

    What changes it comes right behind it, unlike in `12 apples, half of them red`.
    """
    plain = _plain(sentence)
    if (first := _FIRST_NUMBER.search(plain)) is None:
        return False
    change = _CHANGES.match(plain, first.end() + 1)
    denied = _NOT_THE_VALUE.search(plain[: first.start()]) and number(gold) is not None
    found = [tuple(group or "" for group in change.groups())] if change else []
    return bool(denied) or found != [words for words in changes(gold) if len(words) > 1][:1]


def readable(gold: Answer) -> bool:
    """Whether `gold` is a number or a word, which needs no parser."""
    return number(gold.text) is not None or word(gold.text) is not None


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
    plain = _TEXT.sub(r"\1", text).replace("\\ ", " ").strip().rstrip(".")
    if not _WORDS.fullmatch(plain) or len(plain) < _MIN_WORD or "\\" in plain:
        return None
    return "".join(plain.casefold().split())
