"""YAML read into dataclasses that check it: unknown keys and wrong types fail with one sentence, file and key in it.

A file may begin with `extends: other.yaml` (relative to itself): its own keys are then laid over the other's.
"""

import difflib
import json
import os
import re
from collections.abc import Iterator, Sequence
from copy import copy
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from bridge_rl.errors import UserError

STRICT: dict[str, Any] = {"extra": "forbid", "allow_inf_nan": False}
UNKNOWN_KEY = ("unexpected_keyword_argument", "extra_forbidden")
MISSING_KEY = ("missing", "missing_argument")

_DIGITS = "[0-9]+(?:_[0-9]+)*"
# As in YAML 1.2 and JSON: `1e-6` is a number and `010` is 10. PyYAML takes the one for text and the other for 8.
_NUMBERS = {
    "tag:yaml.org,2002:int": rf"[-+]?(?:{_DIGITS}|0x[0-9a-fA-F]+)$",
    "tag:yaml.org,2002:float": (
        rf"[-+]?(?:(?:{_DIGITS}\.?(?:{_DIGITS})?|\.{_DIGITS})(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$"
        r"|\.(?:nan|NaN|NAN)$"
    ),
}
_NOT_AS_PYYAML = (*_NUMBERS, "tag:yaml.org,2002:timestamp")


class _Loader(yaml.SafeLoader):
    """Reads numbers as `_NUMBERS` says and dates as text, and refuses a key that stands twice in one section."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Before `<<` is worked out, which may well bring in a key that stands here.
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"'{key.value}' stands twice", problem_mark=key.start_mark
                )
            seen.add((key.tag, key.value))
        return node


class _Dumper(yaml.SafeDumper):
    """Inverse of `_Loader`: puts quotes around a text that it, or PyYAML alone, takes for something else."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NOT_AS_PYYAML]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in _NUMBERS.items():
    for _cls in (_Loader, _Dumper):
        _cls.add_implicit_resolver(_tag, re.compile(_pattern), list("-+.0123456789"))
_Loader.add_constructor(
    "tag:yaml.org,2002:int", lambda _, node: int(node.value, 16 if "0x" in node.value.lower() else 10)
)

T = TypeVar("T")


def validate(kind: type[T], content: dict[str, Any], path: Path) -> T:
    """`content`, which was read from `path`, as the dataclass `kind`. Raises UserError for the first thing wrong."""
    try:
        made = TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        raise UserError(f"{path}: {_sentence(error.errors(), kind, content)}") from error
    for key, value in _switches_for_numbers(content, made):
        word = "yes" if value else "no"
        raise UserError(f"{path}: the key '{key}' is {value} (YAML takes {word} for that): it must be a number.")
    return made


def _switches_for_numbers(content: Any, made: Any, key: str = "") -> Iterator[tuple[str, bool]]:
    """Keys and values of `content` that are true or false, and that pydantic has taken for 1 or 0 in `made`."""
    if isinstance(content, bool) and type(made) in (int, float):
        yield key, content
    elif isinstance(content, list) and isinstance(made, list):
        for number, (inner, inner_made) in enumerate(zip(content, made, strict=True)):
            yield from _switches_for_numbers(inner, inner_made, f"{key}.{number}")
    elif isinstance(content, dict):
        for name, inner in content.items():
            inner_made = made[name] if isinstance(made, dict) else getattr(made, name, None)
            yield from _switches_for_numbers(inner, inner_made, f"{key}.{name}".lstrip("."))


def read_yaml(path: Path, what: str = "recipe", extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping in a YAML file, laid over the one that it extends. `what`: how errors call such a file."""
    if os.path.isdir(path):  # which, unlike pathlib's, takes a name that is too long
        raise UserError(f"{path} is a directory: name a {what} in it.")
    if not os.path.isfile(path):
        known = [p.stem for p in path.parent.glob("*.yaml") if p.is_file()]
        near = difflib.get_close_matches(path.stem, known, 1)
        place = f" (which {extended_by[-1]} extends)" if extended_by else ""
        cure = f": did you mean {path.parent / near[0]}.yaml?" if near else "."
        raise UserError(f"There is no {what} {path}{place}{cure}")
    try:
        content = _load(path.read_text(encoding="utf-8"))
    # ValueError: bytes that are no text, a number of 5000 digits; RecursionError: thousands of brackets.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is empty or no mapping: a {what} has keys, each with a value.")
    base = content.pop("extends", None)
    if base is None:
        return content
    if not isinstance(base, str):
        raise UserError(f"{path}: the key 'extends' is {base!r}: it must name one other recipe.")
    chain = (*extended_by, path)
    below = path.parent / os.path.expanduser(base)
    if below.resolve() in [p.resolve() for p in chain]:
        raise UserError(f"{path}: the key 'extends' is {base!r}, and that recipe extends this one: break the circle.")
    return _merge(read_yaml(below, what, chain), content)


def _load(text: str) -> Any:
    content = yaml.load(text, _Loader)
    json.dumps(content, default=str, skipkeys=True)  # ValueError for an anchor inside of what it names
    return content


def write_yaml(content: dict[str, Any]) -> str:
    """Inverse of `read_yaml`."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def apply_override(content: dict[str, Any], override: str) -> None:
    """Lay one `key=value` over `content`; dots in the key go into sections, numbers into lists (`rewards.0.weight`)."""
    key, equals, value = override.partition("=")
    if not equals:
        raise UserError(f"The argument '{override}' is not key=value, such as rollout.width=8.")
    *sections, last = key.removeprefix("--").split(".")
    inner: Any = content
    for name in sections:
        place = _place(inner, name, override)
        section = inner[place] if isinstance(inner, list) else inner.get(place)
        if not isinstance(section, dict | list | None):
            raise UserError(f"The argument '{override}' goes into '{name}', which is not a section.")
        # A copy, as an anchor may have put the same section in a second place.
        inner[place] = {} if section is None else copy(section)
        inner = inner[place]
    inner[_place(inner, last, override)] = _read_value(value, override)


def _place(section: dict[str, Any] | list[Any], name: str, override: str) -> Any:
    """What `name` is in a section, or in a list: the number of an entry that is there."""
    if isinstance(section, dict):
        return name
    if not name.isdecimal() or int(name) >= len(section):
        there = f"from 0 to {len(section) - 1}" if section else "but the list is empty"
        raise UserError(
            f"The argument '{override}' goes into a list by '{name}': name an entry by its number, {there}."
        )
    return int(name)


def _read_value(text: str, override: str) -> Any:
    """The value of an override: YAML, but text where YAML would take a part of it (`#### (.+)`) for a comment."""
    try:
        return text if _has_comment(text) else _load(text)
    except (yaml.YAMLError, ValueError) as error:
        why = error.problem if isinstance(error, yaml.MarkedYAMLError) else error
        raise UserError(
            f"The argument '{override}' has a value that is not valid YAML ({why}): mind quotes and brackets."
        ) from error


def _has_comment(text: str) -> bool:
    """Whether there is a `#` between two tokens, where only blanks and comments are."""
    tokens = pairwise(yaml.scan(text, _Loader))
    return any("#" in text[one.end_mark.index : other.start_mark.index] for one, other in tokens)


def _sentence(errors: list[ErrorDetails], kind: type, content: Any) -> str:
    """One sentence for the first thing that pydantic found wrong in `content`; an unknown key comes first, since it is
    often why another one is missing."""
    error = min(errors, key=lambda found: found["type"] not in UNKNOWN_KEY)
    keys = _keys(error, content)
    key = ".".join(keys)
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if error["type"] in UNKNOWN_KEY:
        return f"unknown key '{key}'{nearest(keys[-1], _known_keys(keys[:-1], kind))}"
    if error["type"] in MISSING_KEY:
        return f"the key '{key}' is missing."
    # One error for each form that the value might have, also of what is in a list.
    first, *others = [
        found["msg"]
        for found in errors
        if (own := _keys(found, content))[: len(keys)] == keys and all(map(str.isdigit, own[len(keys) :]))
    ]
    forms = dict.fromkeys([f"{first[0].lower()}{first[1:]}", *(m.removeprefix("Input should be ") for m in others)])
    return f"the key '{key}' is {error['input']!r}: {' or '.join(forms)}."


def _keys(error: ErrorDetails, content: Any) -> list[str]:
    """Where the error is. Pydantic's tags, as "function-after[...]", come between a union and its members: left out."""
    keys = []
    for part in map(str, error["loc"]):
        entries = dict(enumerate(content)) if isinstance(content, list) else content
        inside = {str(key): entry for key, entry in entries.items()} if isinstance(entries, dict) else {}
        if part in inside:
            keys.append(part)
            content = inside[part]
    return [*keys, str(error["loc"][-1])] if error["type"] in MISSING_KEY else keys


def nearest(key: str, known: Sequence[str]) -> str:
    """`: did you mean 'x'?` for an unknown key, or the known ones where none is near. Capitals make no difference."""
    small = {name.lower(): name for name in known}
    near = difflib.get_close_matches(key.lower(), small, 1)
    return f": did you mean '{small[near[0]]}'?" if near else f": known are {', '.join(known)}."


def _known_keys(sections: list[str], kind: type) -> list[str]:
    """Keys of the (nested) section, from the schema."""
    schema = TypeAdapter(kind).json_schema()
    node = schema
    for section in sections:
        named = node.get("properties", {}).get(section) or node.get("additionalProperties", {})
        node = node["items"] if section.isdigit() else named
        for option in node.get("anyOf", []):
            node = option if "$ref" in option or option.get("type") == "array" else node
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
    return sorted(node["properties"])
