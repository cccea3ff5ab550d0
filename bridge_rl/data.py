"""Problems with verifiable answers, from the hub, a file or a function, as prompts for the trainer."""

import inspect
import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from accelerate import PartialState
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HfHubHTTPError

from bridge_rl.config import DataSection, DataSource
from bridge_rl.errors import UserError

FILE_FORMATS = (".jsonl", ".json", ".parquet")


def load_problems(source: DataSource, key: str, seed: int) -> list[dict[str, Any]]:
    """Rows with `problem` and `answer`, both strings. `key` is the source's place in the recipe, for errors.

    Raises UserError naming the source and, for an answer that is missing or that math-verify cannot read, the row.
    """
    rows = _read(source, key)
    if not rows:
        raise UserError(f"{key}.path: {source.path} holds no rows.")
    for column_key, column in (("problem_column", source.problem_column), ("answer_column", source.answer_column)):
        if column not in rows[0]:
            raise UserError(
                f"{key}.{column_key}: {source.path} has no column '{column}', it has {', '.join(sorted(rows[0]))}."
            )
    order = np.random.default_rng(seed).permutation(len(rows)).tolist() if source.shuffle else list(range(len(rows)))
    order = order[: source.size]
    problems = []
    for number in order:
        problem = rows[number].get(source.problem_column)
        answer = _answer(rows[number].get(source.answer_column), source, key, number)
        if not isinstance(problem, str) or not problem.strip():
            raise UserError(f"{key}: row {number} of {source.path} has an empty '{source.problem_column}'.")
        problems.append({"problem": problem, "answer": answer})
    return _readable(problems, order, source, key) if source.check_answers else problems


def _read(source: DataSource, key: str) -> list[dict[str, Any]]:
    path = Path(source.path)
    if path.suffix in FILE_FORMATS:
        if not path.is_file():
            raise UserError(f"{key}.path: there is no file {path}.")
        if path.stat().st_size == 0:
            raise UserError(f"{key}.path: {path} is empty.")
        try:
            return _read_file(path, f"{key}.path")
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, pyarrow.ArrowException) as error:
            raise UserError(f"{key}.path: {path} cannot be read as {path.suffix[1:]}: {_first_line(error)}.") from error
    if path.is_file():
        raise UserError(f"{key}.path: {path} is no {', '.join(FILE_FORMATS[:-1])} or {FILE_FORMATS[-1]} file.")
    if ":" in source.path:
        function = import_function(source.path, f"{key}.path")
        try:
            inspect.signature(function).bind(**source.kwargs)
        except TypeError as error:
            raise UserError(f"{key}.kwargs: {source.path} cannot be called with {source.kwargs} ({error}).") from error
        return list(function(**source.kwargs))
    try:
        return load_dataset(source.path, source.name, split=source.split, revision=source.revision).to_list()
    except (OSError, ValueError, HfHubHTTPError, DatasetsError) as error:
        raise UserError(
            f"{key}.path: the data set {source.path} cannot be loaded ({_first_line(error)}): check its name, or "
            f"fetch it where there is a network: huggingface-cli download --repo-type dataset {source.path}"
        ) from error


def _read_file(path: Path, key: str) -> list[dict[str, Any]]:
    """Rows of a parquet file, of JSON lines, or of one JSON list."""
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path).to_pylist()
    text = path.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        numbered = list(enumerate(json.loads(text), start=1))
    else:
        numbered = []
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                numbered.append((number, _read_line(line, f"{key}: {path}, line {number},")))
    for number, row in numbered:
        if not isinstance(row, dict):
            raise UserError(f"{key}: {path}, line {number}, is no row with columns.")
    return [row for _, row in numbered]


def _read_line(line: str, place: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{place} is no JSON ({error}): mend or delete the line.") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def import_function(path: str, key: str) -> Any:
    """The object at `package.module:name`. Raises UserError if there is none."""
    module_name, _, name = path.partition(":")
    try:
        return getattr(import_module(module_name), name)
    except (ImportError, AttributeError, SyntaxError, ValueError, TypeError) as error:
        raise UserError(f"{key}: cannot import {path} ({error}).") from error


def _answer(value: Any, source: DataSource, key: str, number: int) -> str:
    """The answer as a string; whole floats (AMC23) lose their `.0`."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    answer = "" if value is None else str(value).strip()
    if source.answer_pattern is not None:
        match = re.search(source.answer_pattern, answer)
        if match is None:
            raise UserError(
                f"{key}.answer_pattern: row {number} of {source.path} does not match {source.answer_pattern!r}."
            )
        answer = match[1].strip()
    if not answer:
        raise UserError(f"{key}: row {number} of {source.path} has an empty '{source.answer_column}'.")
    return answer


def _readable(problems: list[dict[str, Any]], order: list[int], source: DataSource, key: str) -> list[dict[str, Any]]:
    """The problems whose answer math-verify can read. Raises UserError naming the first other row, unless dropped."""
    from bridge_rl.verify import gold_parses

    readable = gold_parses([row["answer"] for row in problems])
    bad = [n for n, ok in enumerate(readable) if not ok]
    kept = [row for row, ok in zip(problems, readable, strict=True) if ok]
    if not bad:
        return kept
    found = (
        f"{key}: math-verify cannot read the answer of row {order[bad[0]]} of {source.path}, "
        f"{problems[bad[0]]['answer']!r} ({len(bad)} of {len(problems)} rows)"
    )
    if source.check_answers != "drop" or not kept:
        raise UserError(
            f"{found}: mend them, set check_answers=drop to go without them, or check_answers=false if your reward "
            "does not use math-verify."
        )
    if PartialState().is_main_process:
        print(f"{found}: dropped.", flush=True)
    return kept


def make_prompts(problems: list[dict[str, Any]], section: DataSection, conversational: bool) -> Dataset:
    """A data set with `prompt`, `problem` and `answer`; `prompt` is a chat, or text for a base without a template."""
    rows = []
    for row in problems:
        text = section.prompt.replace("{problem}", row["problem"])
        prompt: Any = text if section.system_prompt is None else f"{section.system_prompt}\n\n{text}"
        if conversational:
            system = [{"role": "system", "content": section.system_prompt}] if section.system_prompt else []
            prompt = [*system, {"role": "user", "content": text}]
        rows.append({"prompt": prompt, **row})
    return Dataset.from_list(rows)


def prompt_tokens(tokenizer: Any, prompts: list[Any]) -> list[list[int]]:
    """Token ids of prompts, as the trainer makes them."""
    if isinstance(prompts[0], str):
        return tokenizer(prompts)["input_ids"]
    return tokenizer.apply_chat_template(prompts, add_generation_prompt=True, tokenize=True, return_dict=False)
