r"""Find the answer in a completion. Pure, no sympy.

A completion's answer is, in this order: the last `\boxed{...}`; in the last `<answer>...</answer>`, or in all if there
is none, what follows `####` in the last line, or a number that does further up; what follows the last "answer is"; the
whole text if it is one bare expression; else its tail, in which the worker lets math-verify look. A box before
`</think>` counts if nothing of the first three, and no expression with a digit, is after it. A last box that is left
open (the completion was cut there), empty boxes alone, or one longer than MAX_CHARS give no answer at all: falling back
to the working would reward a guess at what the writer meant.

What is found is brought into a common form (`common_form.py`); easy pairs are decided without sympy (`decide.py`), and
of all others a worker asks it.
"""

import re
from typing import Any

from bridge_rl.verify.common_form import (
    CHANGES,
    DELIMITED,
    GAPS,
    INTRODUCTION,
    NO_UNIT,
    SECOND_NUMBER,
    Answer,
    canonical,
    clean,
    has_words_in_a_row,
    inside,
    plain_text,
    words_of,
)
from bridge_rl.verify.decide import number, numbers, numbers_agree, word

MAX_CHARS = 1000  # of an answer; a thousand nested parentheses already take sympy's parser 13 s
TAIL_CHARS = 300  # of prose without a marked answer

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_HASHES = re.compile(r"####[ \t]*(\S[^\n]*)")
_NEXT_STEP = re.compile(r"\d+[.)]\s+\S")  # a heading: `#### 2. Add them`
_TAGGED = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
_EMPHASIS = re.compile(r"(?<![\w)\]}])\*\*|\*\*(?![\w({\\-])")  # `**5** apples`, but no power
_ANSWER_IS = re.compile(
    r"\banswer\b[^.\n:=]{0,60}?(?:\bis\b(?:\s+(?:therefore|thus|hence|simply|indeed)\b,?)?|:)[\s:*]*(?=\S)"
    r"|答案\s*(?:应?[是为]|[:\N{FULLWIDTH COLON}])[\s:\N{FULLWIDTH COLON}*]*(?=\S)",
    re.IGNORECASE,
)
_FURTHER = re.compile(rf"\s*(?:,\s*)?(?:or|and|[,或和、])\s*(?:{DELIMITED.pattern})", re.DOTALL)  # `$5$ or $6$`
_CLAUSE_END = re.compile(r"[ \t*]*(?:[.!?;\n\N{IDEOGRAPHIC FULL STOP}]|\Z)")
_SENTENCE_END = re.compile(r"[.!?;](?:\s|$)|\N{IDEOGRAPHIC FULL STOP}")


def completion_text(completion: str | list[dict[str, Any]]) -> str:
    """The text of a completion as TRL hands it to rewards: a string, or the messages of a chat."""
    if isinstance(completion, str):
        return completion
    return completion[-1]["content"] or "" if completion else ""


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
    if tagged := _TAGGED.findall(text):
        text = tagged[-1].strip()
    text = _EMPHASIS.sub("", text)
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
            if _ANSWER_IS.search(hashes[1]):
                return None
            if place > 0 and _NEXT_STEP.match(hashes[1]):
                continue
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
    formula, found, end = DELIMITED.match(rest), [], 0
    while formula:
        found.append(inside(formula))
        end = formula.end()
        formula = _FURTHER.match(rest, end)
    if found:
        change = CHANGES.match("0 " + rest[end:].lstrip(" *").casefold(), 2)  # as behind a number: `$5$ million`
        listed = ",".join(found) if _CLAUSE_END.match(rest, end) and not _are_one(found) else found[0]
        return f"${listed}$" if change is None else rf"${listed}\text{{ {change[0]}}}$"
    line = rest.split("\n", 1)[0].rstrip()
    sentence_end = _SENTENCE_END.search(line)
    return line[: sentence_end.start()] if sentence_end else line


def _are_one(formulas: list[str]) -> bool:
    r"""Whether they are one number in several forms: `$\frac{1}{2}$ or $0.5$`."""
    values = [value for formula in formulas if (value := number(clean(formula))) is not None]
    written = {(value.value, value.exact) for value in values}
    return len(values) == len(formulas) == len(written) and all(numbers_agree(values[0], value) for value in values)


def _marked(text: str | None) -> Answer | None:
    return Answer(clean(text)) if text and len(text) <= MAX_CHARS else None


def _bare_or_prose(text: str, introduction: str = "") -> Answer | None:
    """`text` as an answer if it is one expression, else as prose; `introduction` tells math-verify where to look."""
    whole = DELIMITED.fullmatch(text.rstrip("."))
    formula = inside(whole) if whole else text.strip()
    dollars = "$" in formula.replace(r"\$", "").lstrip("$")
    lines = "\n" in formula and r"\begin" not in formula
    if len(formula) <= MAX_CHARS and not dollars and not lines:
        sentence = has_words_in_a_row(formula) if whole else len(words_of(formula)) >= 2
        if not sentence:
            return _marked(formula)
    tail = text[-TAIL_CHARS:]
    # math-verify reads LaTeX between delimiters only: of a bare `2\sqrt{3}` it would take the 2.
    undelimited = re.search(r"\\[A-Za-z]", DELIMITED.split(tail)[-1])
    return None if undelimited else Answer(introduction + tail, prose=True)


def gold_answer(gold: str) -> Answer | None:
    """The reference answer: as given, freed of its own box if it has one. None if it is empty, too long or unclosed."""
    gold = gold.strip()
    if _BOX.match(gold) and (boxed := last_box(gold)) is not None and gold.endswith("}"):
        gold = boxed
    text = clean(gold).strip("$") if len(gold) <= MAX_CHARS else ""
    return Answer(text) if text and closing_brace(text + "}", 0) == len(text) else None


_NAMED = re.compile(r"(?:(?!\d)[^=+\-*/^<>,;]+|\([A-Za-z, ]+\)\s*)=\s*([^=]+)")  # x = 5, f(x) = x + 1, (a,b) = (1,2)
_WITH_UNIT = re.compile(
    r"\\?\$?(?P<value>[-+]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d[\d.]*|\\frac\{-?\d+\}\{-?\d+\}))"
    rf"{GAPS}"
    r"(?P<unit>\^\s*\\circ|\^\s*\{\s*\\circ\s*\}|\\?%|\\(?:text\w*|mbox|mathrm)\s*\{[^{}\d]*\}(?:\^\{?\d\}?)?)?"
)
_AND = re.compile(r",?\s*\\text\s*\{\s*(?:and|or)\s*\}")  # of a list
_OF_SET = re.compile(r"(?:\\(?:left|right)\s*)?\\[{}]")


def comparable_answer(completion: str) -> str | None:
    r"""The answer of a completion in a form for voting: `1/2`, `\frac12` and `0.5` give the same text.

    Numbers are exact fractions without their unit, in lists and sets in order of size; words lose case and spacing;
    anything else is compared as written, but for spacing and sizes, so that `x+1` and `1+x` are two answers. None
    where no answer is marked, even if math-verify would find one in the prose.
    """
    answer = find_answer(completion)
    if answer is None or answer.prose:
        return None
    text = re.sub(r"\\sqrt\s*(\d)", r"\\sqrt{\1}", answer.text)
    if named := _NAMED.fullmatch(text):
        text = named[1].strip()
    goes_on = SECOND_NUMBER.search(text)
    if not goes_on and (measured := _WITH_UNIT.fullmatch(text)) and not NO_UNIT.search(plain_text(text)):
        text = measured["value"].replace(",", "")
    if values := numbers(_OF_SET.sub("", _AND.sub(",", text))):
        return ",".join(str(value.value) for value in values)
    return word(text) or canonical(text)
