"""YAML read into dataclasses that check it: unknown keys and wrong types fail with one sentence, file and key in it.

A file may begin with `extends: other.yaml` (relative to itself): its own keys are then laid over the other's.
"""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from bridge_rl.errors import UserError

STRICT: dict[str, Any] = {"extra": "forbid", "allow_inf_nan": False}
UNKNOWN_KEY = ("unexpected_keyword_argument", "extra_forbidden")


class _Loader(yaml.SafeLoader):
    """Reads `1e-6` as the number that it is in YAML 1.2 and JSON; PyYAML alone takes it for text."""


class _Dumper(yaml.SafeDumper):
    """Inverse of `_Loader`: puts quotes around a text such as `1e-6`."""


for _cls in (_Loader, _Dumper):
    _cls.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
    )

T = TypeVar("T")


def validate(kind: type[T], content: dict[str, Any], path: Path) -> T:
    """`content`, which was read from `path`, as the dataclass `kind`. Raises UserError for the first thing wrong."""
    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        # An unknown key first: it is often why another one is missing.
        first = min(error.errors(), key=lambda found: found["type"] not in UNKNOWN_KEY)
        raise UserError(f"{path}: {_sentence(first, kind)}") from error


def read_yaml(path: Path, what: str = "recipe", extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping in a YAML file, laid over the one that it extends. `what`: how errors call such a file."""
    if not path.is_file():
        near = difflib.get_close_matches(path.stem, [p.stem for p in path.parent.glob("*.yaml")], 1)
        place = f" (which {extended_by[-1]} extends)" if extended_by else ""
        cure = f": did you mean {path.parent / near[0]}.yaml?" if near else "."
        raise UserError(f"There is no {what} {path}{place}{cure}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is empty or no mapping: a {what} has keys, each with a value.")
    base = content.pop("extends", None)
    if base is None:
        return content
    if not isinstance(base, str):
        raise UserError(f"{path}: the key 'extends' is {base!r}: it must name one other recipe.")
    chain = (*extended_by, path)
    if (path.parent / base).resolve() in [p.resolve() for p in chain]:
        raise UserError(f"{path}: the key 'extends' is {base!r}, and that recipe extends this one: break the circle.")
    return _merge(read_yaml(path.parent / base, what, chain), content)


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
    """Lay one `key=value` over `content`; dots in the key go into sections."""
    key, equals, value = override.partition("=")
    if not equals:
        raise UserError(f"The argument '{override}' is not key=value, such as rollout.width=8.")
    *sections, last = key.removeprefix("--").split(".")
    for section in sections:
        if content.get(section) is None:
            content[section] = {}
        if not isinstance(content[section], dict):
            raise UserError(f"The argument '{override}' goes into '{section}', which is not a section.")
        content = content[section]
    try:
        content[last] = yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise UserError(
            f"The argument '{override}' has a value that is not valid YAML: mind quotes and brackets."
        ) from error


def _sentence(error: ErrorDetails, kind: type) -> str:
    """One sentence for the first thing pydantic found wrong."""
    # Tags such as "function-after[...]" or a dataclass name come between a union and its members.
    keys = [str(part) for part in error["loc"] if not str(part)[:1].isupper() and "[" not in str(part)]
    key = ".".join(keys)
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if error["type"] in UNKNOWN_KEY:
        return f"unknown key '{key}'{nearest(keys[-1], _known_keys(keys[:-1], kind))}"
    if error["type"] in ("missing", "missing_argument"):
        return f"the key '{key}' is missing."
    return f"the key '{key}' is {error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}."


def nearest(key: str, known: Sequence[str]) -> str:
    """`: did you mean 'x'?` for an unknown key, or the known ones where none is near."""
    near = difflib.get_close_matches(key, known, 1)
    return f": did you mean '{near[0]}'?" if near else f": known are {', '.join(known)}."


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
