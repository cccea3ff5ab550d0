r"""The common form of answers: LaTeX as math-verify reads it, with units, signs and spellings brought into one."""

import re
from dataclasses import dataclass
from fractions import Fraction
from unicodedata import normalize

INTRODUCTION = "The answer is "  # of prose in which what follows these words has to be found
DELIMITED = re.compile(
    r"\$\$((?:\\.|[^$\\])+)\$\$|\$((?:\\.|[^$\\])+)\$|\\\[((?:(?!\\\]).)+)\\\]|\\\(((?:(?!\\\)).)+)\\\)", re.DOTALL
)


@dataclass(frozen=True)
class Answer:
    """`text` in the common form of `clean`, except when it is `prose` in which an answer has yet to be found."""

    text: str
    prose: bool = False


_GROUP_OF_TEXT = re.compile(r"\\(?:text\w*|mbox|mathrm|operatorname)\s*\{[^{}]*\}|\\[A-Za-z]+")
_WORD = re.compile(r"[^\W\d_]{2,}")

_SIGNS = str.maketrans(
    {chr(wide): chr(wide - 0xFEE0) for wide in range(0xFF01, 0xFF5F)}  # as wide as Chinese signs
    | {
        "\N{IDEOGRAPHIC FULL STOP}": ".",
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
        "\N{PLUS-MINUS SIGN}": r"\pm ",
        "\N{EURO SIGN}": r"\$",
        "\N{POUND SIGN}": r"\$",
        # that nobody sees
        "\N{ZERO WIDTH SPACE}": "",
        "\N{WORD JOINER}": "",
        "\N{ZERO WIDTH NO-BREAK SPACE}": "",
    }
)
_POWER = re.compile("\u207b?[\u00b2\u00b3\u00b9\u2070\u2074-\u2079]+")  # digits above the line, with their minus
_TIMES_TIMES = re.compile(r"(?<=[\w)\]}])\*\*(?=[\w({\\-])")  # a power, as programs write it
_INDEX = re.compile("[\u2080-\u2089]+")  # and below it
_COLOUR = re.compile(r"\\(?:text)?color\s*(?:\[\w+\])?\s*\{[^{}]*\}")
_RELATION = re.compile(r"\A(?:=|\\approx(?![A-Za-z]))\s*(?=\S)")  # in front of an answer, to what came before it
_ONE_SIGN = re.compile("(\\d?)([\u00bc-\u00be\u2150-\u215e])")  # fractions such as one half
_ROOT = re.compile(r"\N{SQUARE ROOT}\s*(?:\{([^{}]*)\}|\(([^()]*)\)|(\d+(?:\.\d+)?|[A-Za-z](?![A-Za-z])))")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:\{,\}|,\\!\s?|\\[,!;: ]|[ \u00a0\u2009\u202f])\d{3})+(?!\d)")
_THOUSANDS_COMMA = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_REPEATING = re.compile(r"(?<![\d.])(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{?(\d+)\}?")
GAP = r"(?:\s|~|\\[,;: ])"
GAPS = rf"(?:{GAP}|\\!)*"
_ONE_BRACED = r"(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})"  # a sign, or a group
_BRACED = rf"{_ONE_BRACED}*"
_BRACES = (  # what LaTeX lets one leave out, \frac12, \frac1{72}, \frac{\pi}2, \sqrt[3]2
    (re.compile(r"\\[dtc]?frac\s*(\d|\\pi)\s*(?=[\d{]|\\pi)"), r"\\frac{\1}"),
    (re.compile(r"\\[dtc]?frac\s*(\{[^{}]*\})\s*(\d|\\pi)"), r"\\frac\1{\2}"),
    (re.compile(r"\\sqrt\s*(\[\d+\])\s*(\w)"), r"\\sqrt\1{\2}"),
)
_TWO_POINTS = re.compile(  # `(\pm 1, 0)`
    r"(?<![A-Za-z)])(?:\\left\s*)?\(([^()]*)\\pm(?![A-Za-z])([^()]*?)(?:\\right\s*)?\)"
)
_MIXED_FRACTION = re.compile(r"(?<![\w.}^])(\d+)\s*\\[dtc]?frac\{(\d+)\}\{(\d+)\}")
_TWO_IN_FRACTION = re.compile(  # `\frac{1 \pm \sqrt{5}}{2}`, alone or in a list
    rf"((?:\A|[=,]|\\\{{)\s*-?\s*)\\[dtc]?frac\s*\{{({_BRACED})\\pm(?![A-Za-z])((?:(?![+-]){_ONE_BRACED})*)\}}"
    rf"\s*(\{{{_BRACED}\}})(?=\s*(?:\Z|,|(?:\\right\s*)?\\\}}|\\text|\\q?quad))"
)
_ENDS = re.compile(rf"\A(?:{GAP}|\\!)+|(?<!\\)(?:{GAP}|\\!)+\Z")
_MIXED = re.compile(rf"(?<![\w.,/^}}])(\d+){GAP}+(\d+)\s*/\s*(\d+)(?![\w/^!]|\.\d)")
_SCIENTIFIC = re.compile(r"(?<![\w\\.])(\d+(?:\.\d*)?|\.\d+)[eE]([-+]?\d+)(?![\w.])")
_COUNTED = re.compile(rf"(?:\\?\$)?([-+]?\d[\d.,/]*(?:\\?%)?)(?:{GAP}+[a-z]{{3,}}){{1,3}}")
_MEASURED = re.compile(
    rf"(?:(?<=[\d}}])|(?<=\\pi)){GAP}*(?:(?:square|cubic){GAP}+)?"
    r"(?:inch(?:es)?|feet|foot|(?:centi|milli|kilo)?met(?:er|re)s?|yards?|miles?|units?|seconds?|minutes?|hours?|days?"
    r"|weeks?|months?|years?|degrees?|dollars?|cents?|cups?|pounds?|ounces?|gallons?|lit(?:er|re)s?|(?:kilo)?grams?)\Z"
)
_SHORT_UNIT = r"ft|lbs?|oz|hrs|mph|kph"
# Units without a `\text{}` that math-verify would read as products. A single letter may be a variable.
_UNIT = re.compile(
    rf"(?:(?:(?<=[\d}}])|(?<=\\pi)){GAP}*"
    r"(?:(?:[mcdk]m|in|ft|yd|mi|units?|inch(?:es)?|feet|met(?:er|re)s)\^(?:[23]|\{[23]\})"
    r"|(?:k?m|mi|ft)/(?:h|hr|s|sec|min)|[mcd][lL]|[mck]m|kg)"
    rf"|(?<=\d)(?:{_SHORT_UNIT})|(?<=[\d}}]){GAP}+(?:{_SHORT_UNIT}|mg|in|yd)"
    rf"|(?<=\d){GAP}+(?:dm|mi|hr))\Z"
)
# Words that change the number they follow, so that the two are no number with a unit: `5 million`, `3 times seven`.
CHANGES = re.compile(
    r"\b(?:(hundred|thousand|million|billion|trillion|dozen|score|hal[fv]e?|third|quarter)s?"
    r"|((?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|\w+teen|\w+tie|hundred|thousand|\w+illion)th)s?"
    r"|((?:plus|minus|times|divided|over|less|more|below|base|or|but\s+not)\s+(?:by\s+|than\s+)?"
    r"(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+teen|\w+ty))"
    r"|(or\s+(?:more|less|fewer|above|below))(?!\s*\w)|(?<=\d )(squared|cubed|factorial)"
    r"|(and\s+a\s+(?:half|third|quarter)))\b"
)
NO_UNIT = re.compile(rf"{CHANGES.pattern}|\b(?:percent|percentage|pct|and|sqrt)s?\b")
_OPENS_TEXT = r"\\(?:text\w*|mbox|mathrm)\s*\{"
TEXT = re.compile(_OPENS_TEXT + r"([^{}]*)\}")
SECOND_NUMBER = re.compile(rf"(?<=\d){GAPS}" + _OPENS_TEXT + r"(\s*[-+.]?\d[^{}]*)\}")  # 5\text{6}
_CAPTION = re.compile(  # inside of a box: `\text{Answer: }5`
    rf"\A({_OPENS_TEXT})?\s*(?:(?:the|final|correct)\s+)*answer\s*(?:is\b\s*:?|:)\s*", re.IGNORECASE
)
_EXPLAINED = re.compile(r"\s*\(i\.e\.[^()\d]*\)\Z")  # `100 (i.e., all values)`
_FORMULA_AND_UNIT = re.compile(r"\$([^$]*[\d}])\$\s*([A-Za-z][^$\d]*)")  # `$12$ cm`
_BARE_HALF_OF_DAY = re.compile(rf"(?<=:\d\d){GAP}*([ap]\.?\s?m)\Z", re.IGNORECASE)  # `4:30 p.m.`
_ORDINAL = re.compile(  # `4^{\text{th}}`; of `4^{th}` the letters may be variables
    rf"\^\s*(?:(?P<opens>\{{)\s*)?{_OPENS_TEXT}\s*(?:st|nd|rd|th)\s*\}}(?(opens)\s*\}})"
)
_DEGREES = re.compile(  # of an angle, where math-verify leaves the sign out as it does behind an answer
    r"(\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])\s*(?:\^\s*(?:\d|\{\d\})\s*)?(?:(?:\\left\s*)?\(\s*)?)"
    r"(\d+(?:\.\d+)?)\s*\^\s*(?:\\circ(?![A-Za-z])|\{\s*\\circ\s*\})"
)
_UNIT_WORDS = _OPENS_TEXT + r"(?!\s*(?:or|and)\b)[^{}\d]*\}(?:\^\{?-?\d\}?)?"
# `\text{ cm}`, `\text{m}/\text{s}^2` behind a value. math-verify's own rule takes for a unit all from the first
# `\text{` to the last brace, and variables such as `t` and `c`.
_UNIT_IN_TEXT = (
    rf"(?<=[^\W_]|[)\]}}!.%|]){GAPS}{_UNIT_WORDS}(?:{GAPS}(?:(?:/|\\cdot|\\times){GAPS})?{_UNIT_WORDS})*{GAPS}"
)
_LAST_UNIT, _UNIT_OF_FORMULA = re.compile(rf"{_UNIT_IN_TEXT}\Z"), re.compile(rf"{_UNIT_IN_TEXT}(?=\$|\\[\])])")
_PRIMED = re.compile(  # `f'`, which math-verify reads as `f`; a command takes no stroke
    r"\\[A-Za-z]+|([A-Za-z])((?:'|\^\s*\\prime(?![A-Za-z])|\^\s*\{\s*(?:\\prime\s*)+\})+)"
)
_SPACE = re.compile(r"\\[,;:! ]|~")
_DECORATED = re.compile(rf"(?:\\(?:boldsymbol|mathbf|bm|underline)\s*)?\{{({_BRACED})\}}")
_NUMBER_IN_TEXT = re.compile(
    _OPENS_TEXT + r"\s*([-+]?(?:\d[\d.,/:]*|\.\d+))(\s(?!\s*[xyzn]\s*\})[^{}\d]*)?\}(\^\{?\d\}?)?"
)
_LIST_IN_TEXT = re.compile(_OPENS_TEXT + r"([-+\d.,/\s]*\d,?\s+(?:and|or)\s+[-+\d./]+)\s*\}")
_CONSTANT = re.compile(r"\\(?:text\w*|mbox|mathrm|operatorname)\s*\{\s*([ei]|pi)\s*\}")
_NAME = r"\\?[A-Za-z]\w*(?:_\{\w+\})?"
_NEXT_EQUATION = re.compile(  # what may stand between two: `x=5 \quad x=7`
    r"(?:\s|,|;|~|\\[,;: ]|\\q?quad(?![A-Za-z])|\\\\|\\&|\\text\s*\{\s*(?:or|and)\b[^{}=]*\}"
    r"|\b(?:or|and)\b)+"
    rf"(?={_NAME}\s*=)"
)


def clean(text: str) -> str:
    r"""LaTeX with the same meaning in the form that math-verify reads: `10\,000`, `1e3`, `0.\overline{3}`, `oo`."""
    text = text.strip().translate(_SIGNS).strip("*").strip()
    while (whole := DELIMITED.fullmatch(text)) is not None:
        text = inside(whole)
    if text.isdecimal() and text.isascii():  # as most answers are, and nothing below changes one
        return text
    if apart := _FORMULA_AND_UNIT.fullmatch(text):
        text = rf"{apart[1]}\text{{ {apart[2]}}}"
    text = _EXPLAINED.sub("", _COLOUR.sub("", text))
    text = re.sub(_OPENS_TEXT + r"\s*\}", "", _CAPTION.sub(r"\1", text)).strip()
    text = _RELATION.sub("", text)
    text = _POWER.sub(lambda match: f"^{{{normalize('NFKC', match[0]).translate(_SIGNS)}}}", text)
    text = _TIMES_TIMES.sub("^", text)
    text = _INDEX.sub(lambda match: f"_{{{normalize('NFKC', match[0])}}}", text)
    text = _ONE_SIGN.sub(_fraction_of_one_sign, text)
    text = _ROOT.sub(lambda match: rf"\sqrt{{{next(part for part in match.groups() if part is not None)}}}", text)
    text = re.sub(r"\\(?:displaystyle|textstyle|[Ll]arge|bf|rm)(?![A-Za-z])", "", text).strip()
    text = re.sub(r"\^\s*\{\s*\\degree\s*\}|\^?\s*\\degree(?![A-Za-z])", r"^\\circ ", text)
    text = _DEGREES.sub(r"\1(\\frac{\2\\pi}{180})", text)
    text = _ORDINAL.sub("", text)
    text = re.sub(r"\\langle(?![A-Za-z])", "(", re.sub(r"\\rangle(?![A-Za-z])", ")", text))
    text = _CONSTANT.sub(r" \1", text).strip()  # which the worker would take for a unit
    if text.endswith(".") and not text.endswith((r"\.", r"\right.")):
        text = text[:-1].rstrip()
    text = _ENDS.sub("", _BARE_HALF_OF_DAY.sub(r"\\text{ \1}", text))
    text = re.sub(r"\{([^{}]*)\\choose(?![A-Za-z])([^{}]*)\}", r"\\binom{\1}{\2}", text)
    if whole := _DECORATED.fullmatch(text):
        text = whole[1].strip()
    if whole := _NUMBER_IN_TEXT.fullmatch(text):  # `\text{5 cm}`
        text = whole[1] + (rf"\text{{{whole[2]}}}{whole[3] or ''}" if (whole[2] or "").strip() else "")
    elif whole := _LIST_IN_TEXT.fullmatch(text):
        text = whole[1].strip()
    text = re.sub(r"\\(?:varnothing|empty|O)(?![A-Za-z])", r"\\emptyset", text)
    text = re.sub(r"(?<![A-Za-z\\])oo(?![A-Za-z])", r"\\infty ", text)
    text = re.sub(r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi ", text).strip()
    if "=" in text:  # behind an equation math-verify reads these as its end, and takes what follows for the answer
        text = re.sub(r"\\(?:lor|vee)(?![A-Za-z])", r"\\text{ or }", text)
        text = re.sub(r"\\(?:land|wedge)(?![A-Za-z])", ",", text)
        if text.count("=") > 1 and r"\begin" not in text:
            text = _solutions(_NEXT_EQUATION.sub(", ", text))
    text = _REPEATING.sub(_repeating_fraction, text)
    text = _THOUSANDS.sub(lambda match: re.sub(r"\D", "", match[0]), text)
    for pattern, braced in _BRACES:
        text = pattern.sub(braced, text)
    text = _MIXED_FRACTION.sub(improper_fraction, text)
    text = _MIXED.sub(improper_fraction, text)
    text = _TWO_IN_FRACTION.sub(_two_fractions, text)
    text = _TWO_POINTS.sub(_both_points, text)
    text = re.sub(r"\A\((\d\w*)\)(?=_)", r"\1", text)  # a number and its base: `(101)_2`
    text = _SCIENTIFIC.sub(r"\1\\times 10^{\2}", text)
    text = _UNIT.sub("", text)
    if (measured := _MEASURED.search(text)) and not words_of(text[: measured.start()]):  # not `7 hours 30 minutes`
        text = text[: measured.start()]
    if (counted := _COUNTED.fullmatch(text)) and not NO_UNIT.search(plain_text(text)):
        text = counted[1]
    return text.replace(",", "") if _THOUSANDS_COMMA.fullmatch(text) else text


def for_worker(answer: Answer) -> str:
    """The text without its unit, which `decide` has to see before (`5 million`), and with the strokes of `f'` as an
    index; in prose those of formulas.
    """
    if answer.prose:
        return DELIMITED.sub(lambda formula: _strokes_as_index(formula[0]), _UNIT_OF_FORMULA.sub("", answer.text))
    return _strokes_as_index(_LAST_UNIT.sub("", answer.text))


def _strokes_as_index(latex: str) -> str:
    def with_index(match: re.Match[str]) -> str:
        strokes = match[2].count("'") + match[2].count("prime") if match[1] else 0
        return f"{match[1]}_{{{'p' * strokes}}}" if strokes else match[0]

    return _PRIMED.sub(with_index, latex)


def inside(formula: re.Match[str]) -> str:
    return next(group for group in formula.groups() if group is not None).strip()


def words_of(text: str) -> list[str]:
    return _WORD.findall(_GROUP_OF_TEXT.sub(" ", text))


def has_words_in_a_row(formula: str) -> bool:
    """Unlike `xy + yz`: what is between two signs of money, `5 and not`."""
    return re.search(rf"{_WORD.pattern}\s+{_WORD.pattern}", _GROUP_OF_TEXT.sub("|", formula)) is not None


def _solutions(text: str) -> str:
    """Of `x=1, y=2, x=3, y=4` the pairs `(1,2),(3,4)`: which values belong together is a part of the answer."""
    solutions: list[dict[str, str]] = [{}]
    for equation in text.split(","):
        name, _, value = map(str.strip, equation.partition("="))
        if not re.fullmatch(_NAME, name):
            return text
        if name in solutions[-1]:
            solutions.append({})
        solutions[-1][name] = value
    names = sorted(solutions[0])
    several = len(solutions) > 1 and len(names) > 1
    if not several or any(sorted(solution) != names or "=" in "".join(solution.values()) for solution in solutions):
        return text
    return ",".join("(" + ",".join(solution[name] for name in names) + ")" for solution in solutions)


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


def improper_fraction(match: re.Match[str]) -> str:
    """Of `2 1/2`, which math-verify reads as 3/2; `2 3/2` is left as it is."""
    whole, above, below = map(int, match.groups())
    return rf"\frac{{{whole * below + above}}}{{{below}}}" if above < below else match[0]


def _two_fractions(match: re.Match[str]) -> str:
    r"""`\frac{1}{2} \pm \frac{\sqrt{5}}{2}`: inside of a fraction math-verify does not read the sign."""
    start, above, changing, below = match.groups()
    return start + (rf"\frac{{{above}}}{below}" if above.strip() else "") + rf"\pm\frac{{{changing}}}{below}"


def _both_points(match: re.Match[str]) -> str:
    before, after = match.groups()
    if "," not in before + after or r"\pm" in before + after:
        return match[0]
    return f"({before}+{after}),({before}-{after})"


def canonical(text: str) -> str:
    """A cleaned answer for comparison as a string: no spacing, no sizes, no decoration."""
    text = re.sub(r"\\(?:left|right|[Bb]igg?[lr]?)(?![A-Za-z])", "", text)
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    text = TEXT.sub(r"\1", text)
    text = _SPACE.sub(" ", text)
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)


def plain_text(text: str) -> str:
    """In small letters, with single blanks and without LaTeX's marks of text."""
    return " ".join(_SPACE.sub(" ", TEXT.sub(r" \1", text)).casefold().split())


def changes(text: str) -> list[tuple[str, ...]]:
    r"""What changes a number and math-verify drops: words behind the first digit, in a `\text{}` or not (of a plural
    its singular), and digits in a `\text{}` behind a digit.
    """
    plain = plain_text(text)
    digit = re.search(r"\d", plain)
    words = CHANGES.findall(plain, digit.start()) if digit else []
    return [*words, *((digits,) for digits in SECOND_NUMBER.findall(text))]
