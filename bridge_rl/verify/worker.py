r"""One verifier process: reads a pair a line, answers with its status and verdict. Run by file path, imports no torch.

A line in is JSON, the keyword arguments of `judge`, with answers as `common_form.for_worker` leaves them. A line out
is `status 0|1`, or `failed 0` before it leaves; the first line is `ready`. Nothing of sympy's leaves the process: not
even `str` of an expression, which may take forever. The deadline is the parent's, by SIGKILL.

Known limits, each with a test of what happens today:
- right and refused: `x<2 \text{ or } x>3` against a union of intervals; `\log 2` (base 10) against `\ln 2`; numbers in
  other words than the gold's (`5000000` against `5\text{ million}`), which the parent refuses; units of one letter that
  are not in a `\text{}` (`5 m`), which may be variables;
- gold that cannot be read: set-builder notation, residues (`3 \pmod 5`), anything with `\bmod`;
- wrong and accepted: `x+1=2` against 2 (math-verify keeps an equation's right side); `1,2` or `{1,2}` against `(1,2)`,
  which is an interval and a pair at once; `no` against `on` (short words are products of symbols); exact numbers
  that differ only after 40 digits; `5km` against 5, where k and m are variables;
- by convention accepted: `50\%` against both 50 and 0.5; `101_2` against `101`, when only one side names its base;
  `5\text{ K}` against 5, as kelvin is a unit.
"""

import ctypes
import json
import logging
import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

DIGITS = 50
EXACT_GAP = 1e-40  # pi is not pi + 1e-20; math-verify compares 15 digits
FLOAT_GAP = 1e-4  # beside math-verify's 6 decimals, so that 1e-8 is not 2e-8
# `1:2:3`, behind its name or not, which math-verify reads as 1/2/3; of two parts a quotient is as good.
_RATIO = re.compile(r"(?:[^=\d]+=)?([^:,=]+(?::[^:,=]+){2,})")
RECYCLE_SHARE = 0.5  # of the memory limit: leave at that size, so that no later pair meets a full process


def main(judge: Callable[..., tuple[str, bool]], warm_up: Callable[[], object]) -> None:
    """Answer with `judge` until the pipe closes. warm_up: imports what it needs, before the worker is ready."""
    memory_bytes, parent = int(sys.argv[1]), int(sys.argv[2])
    _die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes the pipe
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)  # what sympy or antlr print must not enter the protocol
    logging.disable()  # math-verify warns that its own timeouts are off, which is the point
    warm_up()  # an error up to here is seen on the trainer's stderr
    os.dup2(silence, 2)
    replies.write("ready\n")
    for line in sys.stdin:
        try:
            status, correct = judge(**json.loads(line))
        except BaseException:  # whatever it was (memory, recursion), this process is no longer trusted
            replies.write("failed 0\n")
            os._exit(1)
        replies.write(f"{status} {int(correct)}\n")
        if _resident_bytes() > RECYCLE_SHARE * memory_bytes:
            os._exit(0)


def _resident_bytes() -> int:
    """Memory in use now. (Not `ru_maxrss`: it survives exec, and would be the trainer's.)"""
    if sys.platform != "linux":
        return 0
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _die_with_parent(parent: int) -> None:
    """SIGKILL when the parent dies, even while sympy is busy or a fork of the parent holds the pipe open."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)


def judge(gold: str, prediction: str | None, prose: bool = False, same: bool = False) -> tuple[str, bool]:
    """(status, verdict) of one pair. Gold that does not parse is an error, a prediction that does not is unparsed.

    prediction: None asks only whether the gold parses: `ok` or `unparsed`. prose: text that holds the answer somewhere.
    same: the two are equal as strings, so only the gold has to parse.
    """
    reference = _parse_gold(gold)
    if prediction is None:
        return ("unparsed" if reference is None else "ok"), False
    if reference is None:
        return "error", False
    if same:
        return "ok", True
    given = _parse_prose(prediction) if prose else _parse(prediction)
    return ("unparsed", False) if given is None else ("ok", _agree(reference, given))


def _parse(latex: str) -> Any | None:
    """The sympy object of all of `latex`; None if it does not parse. No falling back to a fraction inside it."""
    from latex2sympy2_extended.latex2sympy2 import normalize_latex
    from math_verify import LatexExtractionConfig
    from math_verify.parser import parse_latex_cached

    if "mod" in latex:  # math-verify reads `a \\bmod n` as n
        return None
    if ratio := _RATIO.fullmatch(latex):
        return _shares(ratio[1].split(":"))
    config = replace(LatexExtractionConfig().normalization_config, boxed="none", units=False)
    try:
        return parse_latex_cached(normalize_latex(latex, config=config))
    except (MemoryError, RecursionError):
        raise
    except Exception:  # the parser raises whatever the text makes it raise: LaTeXParsingError, TypeError, KeyError, ...
        return None


_parse_gold = lru_cache(maxsize=4096)(_parse)


def _shares(parts: list[str]) -> Any | None:
    """The parts of a ratio in order, the first being 1, so that `2:4:6` is `1:2:3`; as written if one of them is 0, as
    in the time 10:00:00. Behind a mark that no other answer has. None if one is no number or expression.
    """
    from sympy import Expr, Symbol, Tuple

    shares = [share for share in map(_parse, parts) if isinstance(share, Expr)]
    if len(shares) < len(parts):
        return None
    unit = 1 if 0 in shares else shares[0]
    return Tuple(Symbol(":"), *(share / unit for share in shares))


def _parse_prose(text: str) -> Any | None:
    """What math-verify finds in text without a marked answer."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    config = replace(LatexExtractionConfig().normalization_config, units=False)
    targets = [LatexExtractionConfig(normalization_config=config), ExprExtractionConfig()]
    return next(iter(parse(text, targets, fallback_mode="no_fallback", parsing_timeout=None)), None)


def _agree(gold: Any, given: Any) -> bool:
    """math-verify's verdict, after ruling out false equations and numbers it takes for equal because they are close."""
    if _states_falsehood(given) or _only_one_is_a_set(gold, given):
        return False
    as_complex = _with_imaginary_unit(gold), _with_imaginary_unit(given)
    return _equal(gold, given) or (as_complex != (gold, given) and _equal(*as_complex))


def _equal(gold: Any, given: Any) -> bool:
    from math_verify import verify

    try:
        agree = verify(gold, given, allow_set_relation_comp=True, timeout_seconds=None, raise_on_error=True)
    except (MemoryError, RecursionError):
        raise
    except Exception:  # not comparable: division by zero, a matrix against an inequality, ...
        return False
    return agree and not _differ_as_numbers(gold, given)


def _with_imaginary_unit(expression: Any) -> Any:
    """Of numbers and sets of them: with `i`, which math-verify reads as a variable, as the imaginary unit."""
    from latex2sympy2_extended.sets import FiniteSet
    from sympy import Expr, I

    parts = expression.args if isinstance(expression, FiniteSet) else (expression,)
    if not all(isinstance(part, Expr) for part in parts):
        return expression
    symbols = expression.free_symbols
    return expression.subs(dict.fromkeys(symbols, I)) if {symbol.name for symbol in symbols} == {"i"} else expression


def _states_falsehood(expression: Any) -> bool:
    """Whether it sets two different numbers equal, as `3=2` and `5=x=7` do. `\\sqrt{2}=1.414` is let pass."""
    from latex2sympy2_extended.logic import And
    from sympy import Eq, Float

    parts = expression.args if isinstance(expression, And) else (expression,)
    if len(parts) > 1 and not all(isinstance(part, Eq) for part in parts):  # not one chain: `1<x=2`
        return any(map(_states_falsehood, parts))
    numbers = [side for part in parts if isinstance(part, Eq) for side in part.args if _is_number(side)]
    tolerance = 1e-2 if any(number.has(Float) for number in numbers) else 1e-12
    return any(_gap(numbers[0], number) > tolerance for number in numbers[1:])


def _only_one_is_a_set(gold: Any, given: Any) -> bool:
    r"""Where one is the empty set, for which math-verify takes `x<\infty` and `0<1`, too."""
    from sympy import S, Set

    empty = gold is S.EmptySet or given is S.EmptySet
    return empty and not (isinstance(gold, Set) and isinstance(given, Set))


def _differ_as_numbers(a: Any, b: Any) -> bool:
    from sympy import Float, UnevaluatedExpr

    if not _is_number(a) or not _is_number(b) or a.has(UnevaluatedExpr) or b.has(UnevaluatedExpr):
        return False  # unevaluated: a percentage, which agrees with both 50 and 0.5
    if a.has(Float) or b.has(Float):
        return _gap(a, b) > FLOAT_GAP
    return _gap(a, b) > EXACT_GAP and abs(a - b).evalf(DIGITS) > EXACT_GAP


def _is_number(expression: Any) -> bool:
    from sympy import Expr

    return isinstance(expression, Expr) and bool(expression.is_number)


def _gap(a: Any, b: Any) -> float:
    """Relative difference of two numbers; 0 if they have no finite value."""
    x, y = a.doit().evalf(DIGITS), b.doit().evalf(DIGITS)
    if not (x.is_finite and y.is_finite):
        return 0.0
    size = max(abs(x), abs(y))
    return float(abs(x - y) / size) if size else 0.0


if __name__ == "__main__":
    main(judge, lambda: judge("1", "1"))
