"""Functions of the user's own, in files or modules that a recipe or a flag names."""

import importlib.util
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from bridge_rl.errors import UserError


def load_function(named: str, key: str) -> Callable[..., Any]:
    """The function at `FILE.py:NAME` or `package.module:NAME`. Raises UserError, naming `key`, if there is none."""
    return load_beside(named, key)[0]


def load_beside(named: str, key: str) -> tuple[Callable[..., Any], ModuleType]:
    """As `load_function`, and the module that was named, where the function need not have been defined."""
    path, _, name = named.partition(":")
    if not name:
        raise UserError(f"{key}: '{named}' names no function: write rewards/answer.py:correct.")
    if path.endswith(".py"):
        module = _load_file(path, key)
        function = getattr(module, name, None)
        if function is None:
            raise UserError(f"{key}: {path} has no function '{name}'.")
    else:
        function = import_function(named, key)
        module = sys.modules[path]
    if not callable(function):
        raise UserError(f"{key}: '{named}' is a {type(function).__name__}, no function.")
    return function, module


def _load_file(path: str, key: str) -> ModuleType:
    """A file as a module of its own: one called after a real module must not shadow it."""
    file = find_file(path)
    if file is None:
        raise UserError(f"{key}: there is no file {path}.")
    spec = importlib.util.spec_from_file_location(f"bridge_rl_file_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's own file raises
        raise UserError(f"{key}: {path} cannot be imported ({type(error).__name__}: {error}).") from error
    return module


def import_function(path: str, key: str) -> Any:
    """The object at `package.module:name`. Raises UserError if there is none."""
    module_name, _, name = path.partition(":")
    try:
        return getattr(import_module(module_name), name)
    except Exception as error:  # whatever the user's own module raises
        raise UserError(f"{key}: cannot import {path} ({error}).") from error


def call_users(
    function: Callable[..., Any], name: str, on_what: Callable[[], str], /, *args: Any, **kwargs: Any
) -> Any:
    """What a function of the user's returns. Raises UserError that says where it failed and, by `on_what`, on what.

    The traceback of the user's own code goes to stderr before.
    """
    try:
        return function(*args, **kwargs)
    except UserError:
        raise
    except Exception as error:  # whatever it raises
        frames = traceback.extract_tb(error.__traceback__)[1:]
        print("".join(["In code of yours:\n", *traceback.format_list(frames)]), file=sys.stderr, end="", flush=True)
        place = f" in line {frames[-1].lineno} of {frames[-1].filename}" if frames else ""
        raise UserError(f"{name} failed with {type(error).__name__}{place}{on_what()}: {error}") from error


def find_file(path: str) -> Path | None:
    """A file named in a recipe: relative to where the command runs, else to the repository."""
    for root in (Path.cwd(), Path(__file__).resolve().parents[1]):
        if (root / path).is_file():
            return root / path
    return None
