r"""One process that scores answers to reasoning-gym's tasks by their own `score_answer`. Run by file path, no torch.

Like `worker.py`, whose loop it runs: several tasks hand the answer to sympy or to `eval`, so an answer may take forever
(`9**9**9`), and one that calls a function is not handed on at all (see `calls_function`).
"""

import importlib.util
import inspect
import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

# A task gives 1 for a right answer. Less is for a near miss (`113` for `13` has 0.67), or for the right form.
FULL_SCORE = 0.99
EVALUATES = ("eval(", "parse_expr(")  # in a task's source: the answer may be run as code
FUNCTIONS = {"sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "exp", "log", "ln", "sqrt", "Abs"}


def judge(task: str, entry: str, answer: str) -> tuple[str, bool]:
    """(status, verdict). entry: the task's own row as JSON. An answer that it cannot read is unparsed."""
    dataset, evaluates = _dataset(task)
    if evaluates and calls_function(answer):
        return "unparsed", False
    try:
        score = dataset.score_answer(answer, json.loads(entry))
    except (MemoryError, RecursionError):
        raise
    except Exception:  # whatever the text makes the task raise: ValueError, SyntaxError, IndexError, ...
        return "unparsed", False
    return "ok", score > FULL_SCORE


@lru_cache(maxsize=256)
def _dataset(task: str) -> tuple[Any, bool]:
    from reasoning_gym import create_dataset

    dataset = create_dataset(task, seed=0, size=1)
    source = inspect.getsource(type(dataset))
    return dataset, any(call in source for call in EVALUATES)


def calls_function(answer: str) -> bool:
    """Whether `answer`, run as Python, might call anything but a FUNCTION of one real number.

    Every call has its parenthesis behind a name, a bracket or a quote; comments and continued lines could hide that.
    """
    if "#" in answer or "\\" in answer or "__" in answer:
        return True
    for match in re.finditer(r"(\w*)(\S?)\s*\(", answer):
        name, before = match.groups()
        if before in (")", "]", "}", "'", '"') or (name and not before and name not in FUNCTIONS):
            return True
    return False


def _worker_main() -> Any:
    """`worker.main`, from the file beside this one: importing the package would bring torch."""
    spec = importlib.util.spec_from_file_location("bridge_rl_worker", Path(__file__).with_name("worker.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


if __name__ == "__main__":
    _worker_main()(judge, lambda: _dataset("countdown"))
