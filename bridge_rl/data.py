"""Problems with verifiable answers, from the hub, a file or a function, as prompts for the trainer."""

import inspect
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from accelerate import PartialState
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from jinja2 import TemplateError

from bridge_rl.config import DataSection, DataSource
from bridge_rl.errors import UserError, first_line
from bridge_rl.user_code import call_users, import_function

FILE_FORMATS = (".jsonl", ".json", ".parquet")
OTHER_FORMATS = (".csv", ".tsv", ".txt")  # which are not read, and are no names on the hub
HUB_TIMEOUT_S = 10.0
# What rewards get beside the columns of the data: from the trainer alone, and in all.
GIVEN_BY_TRAINER = {"group_index", "trainer_state"}
GIVEN_TO_REWARDS = GIVEN_BY_TRAINER | {"prompts", "completions", "completion_ids", "log_extra", "log_metric"}
# Columns that TRL takes for something else: pictures for the model, or completions of its own.
TAKEN_BY_TRL = {"prompt", "completion", "image", "images"}
# Whatever keeps a request from being answered: httpx's error, or httpx2's, as huggingface_hub goes.
HTTPError: type[Exception] = HfHubHTTPError.__bases__[0]


def load_problems(source: DataSource, key: str, seed: int) -> list[dict[str, Any]]:
    """Rows with `problem` and `answer`, both strings. `key` is the source's place in the recipe, for errors.

    Rows that a function makes keep their other columns, which rewards get by name; those of files and the hub do not.
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
        if not isinstance(problem, str | None):
            raise UserError(
                f"{key}: row {number} of {source.path} has {str(problem)[:80]} for its '{source.problem_column}', of "
                f"type {type(problem).__name__}: make it text."
            )
        if problem is None or not problem.strip():
            raise UserError(f"{key}: row {number} of {source.path} has an empty '{source.problem_column}'.")
        others = _other_columns(rows[number], source, key) if is_function(source.path) else {}
        problems.append({"problem": problem, "answer": answer, **others})
    _check_columns(problems, source, key)
    return _readable(problems, order, source, key) if source.check_answers else problems


def _read(source: DataSource, key: str) -> list[dict[str, Any]]:
    path = Path(source.path)
    check_path(source, key)
    for problem in unread_keys(source, key):
        raise UserError(problem)
    if path.suffix in FILE_FORMATS:
        if path.stat().st_size == 0:
            raise UserError(f"{key}.path: {path} is empty.")
        try:
            return _read_file(path, f"{key}.path")
        except UserError:
            raise
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise UserError(f"{key}.path: {path} cannot be read as {path.suffix[1:]}: {first_line(error)}.") from error
    if is_function(source.path):
        function = import_function(source.path, f"{key}.path")
        try:
            inspect.signature(function).bind(**source.kwargs)
        except TypeError as error:
            raise UserError(f"{key}.kwargs: {source.path} cannot be called with {source.kwargs} ({error}).") from error
        made = call_users(function, source.path, lambda: "", **source.kwargs)
        rows = call_users(list, source.path, lambda: "", made)
        if strange := [row for row in rows if not isinstance(row, dict)]:
            raise UserError(f"{key}.path: {source.path} gives {strange[0]!r} for a row: make it a dictionary.")
        return rows
    folder = source.path if path.is_dir() else _hub_snapshot(source, key)
    try:
        return load_dataset(str(folder), source.name, split=source.split).to_list()
    except (OSError, ValueError, DatasetsError) as error:
        raise UserError(
            f"{key}.path: the data set {source.path} cannot be loaded ({first_line(error)}): check its name and split."
        ) from error


def check_path(source: DataSource, key: str) -> None:
    """Raise UserError for a path to what is not here, or is not read. Whether a hub has a set is not asked."""
    path = Path(source.path)
    if path.suffix in FILE_FORMATS:
        if not path.is_file():
            raise UserError(f"{key}.path: there is no file {path}.")
    elif path.is_file() or path.suffix in OTHER_FORMATS:
        raise UserError(f"{key}.path: {path} is no {', '.join(FILE_FORMATS[:-1])} or {FILE_FORMATS[-1]} file.")
    elif is_function(source.path):
        import_function(source.path, f"{key}.path")
    elif source.path.startswith(("/", ".", "~")) and not path.is_dir():
        raise UserError(f"{key}.path: there is no directory {path}.")


def unread_keys(source: DataSource, key: str) -> Iterator[str]:
    """What a source sets and nothing reads, so that its problems would not be the ones that were asked for."""
    unread: tuple[str, ...]
    if source.path.endswith(FILE_FORMATS):
        kind, unread = "a file", ("kwargs", "name", "split", "revision")
    elif is_function(source.path):
        kind, unread = "a function", ("name", "split", "revision")
    elif Path(source.path).is_dir():
        kind, unread = "a directory", ("kwargs", "revision")
    else:
        kind, unread = "a data set on the hub", ("kwargs",)
    for name in unread:
        value = getattr(source, name)
        if value != getattr(DataSource(source.path), name):
            unset = "train" if name == "split" else "null"
            yield f"{key}.{name} is {value!r}, but {source.path} is {kind}, which has none: set {key}.{name}={unset}."


def is_function(path: str) -> bool:
    """Whether a source's path is `package.module:function`."""
    return ":" in path and not path.endswith(FILE_FORMATS)


def _other_columns(row: dict[str, Any], source: DataSource, key: str) -> dict[str, Any]:
    """Raises UserError for a name under which prompts and rewards get something else."""
    taken = {source.problem_column, source.answer_column, "problem", "answer"}
    others = {column: value for column, value in row.items() if column not in taken}
    if double := sorted(others.keys() & (TAKEN_BY_TRL | GIVEN_TO_REWARDS)):
        raise UserError(
            f"{key}.path: the rows of {source.path} have a column '{double[0]}', which the recipe or the trainer "
            "gives or takes for something else: name it otherwise."
        )
    return others


def _check_columns(problems: list[dict[str, Any]], source: DataSource, key: str) -> None:
    """Raises UserError for a column that no data set can hold: of several types, or with half a character in a text."""
    for column in column_names(problems):
        try:
            Dataset.from_dict({column: [row.get(column) for row in problems]})
        except (pyarrow.ArrowException, UnicodeEncodeError) as error:
            raise UserError(
                f"{key}.path: the column '{column}' of {source.path} cannot be read as one column "
                f"({first_line(error)}): give all its rows one type, and whole characters."
            ) from error


# -- the hub ----------------------------------------------------------------------------------------------------------


def _hub_snapshot(source: DataSource, key: str) -> Path:
    """The directory of a hub set at its revision, fetched if need be; its name is the commit.

    Not `load_dataset` by name: without a network that takes what was loaded last, at whatever revision, and does not
    see what `hf download` has fetched. A commit that is here is taken as it is; a missing network shows within
    HUB_TIMEOUT_S, as looking up a commit is not tried again. Raises UserError with the command that fetches.
    """
    if is_commit(source.revision) and (folder := _cached_snapshot(source)) is not None:
        return folder
    try:
        HfApi().dataset_info(source.path, revision=source.revision, timeout=HUB_TIMEOUT_S)
        return Path(snapshot_download(source.path, repo_type="dataset", revision=source.revision))
    except (HTTPError, OSError, ValueError) as error:
        if (folder := _cached_snapshot(source)) is not None:
            return folder
        reason = "HF_HUB_OFFLINE is set" if isinstance(error, OfflineModeIsEnabled) else first_line(error).rstrip(".")
        raise UserError(
            f"{key}.path: the data set {source.path} is not in the cache of this machine and the hub does not give it "
            f"({reason}): check its name, or run `{fetch_command(source)}` where there is a network and "
            "bring the cache here (the folder HF_HOME, ~/.cache/huggingface by default)."
        ) from error


def fetch_command(source: DataSource) -> str:
    """What fetches a hub set into the cache, to be used without a network."""
    revision = f" --revision {source.revision}" if source.revision else ""
    return f"hf download --repo-type dataset {source.path}{revision}"


def hub_commit(source: DataSource) -> str | None:
    """The commit of a hub set as it was loaded; None for files and functions, and for what is not in the cache.

    Asks no network. For a source without a pinned revision this is what makes an evaluation repeatable.
    """
    if is_function(source.path) or source.path.endswith(FILE_FORMATS) or Path(source.path).is_dir():
        return None
    folder = _cached_snapshot(source)
    return None if folder is None else folder.name


def is_commit(revision: str | None) -> bool:
    return revision is not None and re.fullmatch("[0-9a-f]{40}", revision) is not None


def _cached_snapshot(source: DataSource) -> Path | None:
    """None too for one that was fetched in part."""
    try:
        return Path(
            snapshot_download(source.path, repo_type="dataset", revision=source.revision, local_files_only=True)
        )
    except (LocalEntryNotFoundError, ValueError):
        return None


def _read_file(path: Path, key: str) -> list[dict[str, Any]]:
    """Rows of a parquet file, of JSON lines, or of one JSON list."""
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path).to_pylist()
    text = path.read_text(encoding="utf-8-sig")  # Windows puts a mark at the beginning
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
    except ValueError as error:
        raise UserError(f"{place} is no JSON ({error}): mend or delete the line.") from error


def _answer(value: Any, source: DataSource, key: str, number: int) -> str:
    """The answer as a string; whole floats (AMC23) lose their `.0`, and where math-verify reads it, one its list."""
    if source.check_answers and isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    # As text math-verify reads `['5', '6']` as an interval, and `b'5'` as nothing.
    if isinstance(value, bytes) or (source.check_answers and isinstance(value, list | dict)):
        raise UserError(
            f"{key}: row {number} of {source.path} has {str(value)[:80]} for its '{source.answer_column}', of type "
            f"{type(value).__name__}: make it text, or set check_answers=false if your reward does not use math-verify."
        )
    missing = value is None or (isinstance(value, float) and math.isnan(value))  # as pandas writes what is missing
    answer = "" if missing else str(value).strip()
    if source.answer_pattern is not None:
        match = re.search(source.answer_pattern, answer)
        if match is None or match[1] is None:
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


def make_prompts(problems: list[dict[str, Any]], section: DataSection, tokenizer: Any) -> Dataset:
    """A data set with `prompt`, `problem` and `answer`; `prompt` is a chat, or text for a base without a template.

    Raises UserError where the template refuses such a chat.
    """
    rows, conversational = [], tokenizer.chat_template is not None
    for row in problems:
        text = section.prompt.replace("{problem}", row["problem"])
        prompt: Any = text if section.system_prompt is None else f"{section.system_prompt}\n\n{text}"
        if conversational:
            system = [{"role": "system", "content": section.system_prompt}] if section.system_prompt else []
            prompt = [*system, {"role": "user", "content": text}]
        rows.append({"prompt": prompt, **row})
    try:
        prompt_tokens(tokenizer, [rows[0]["prompt"]])
    except TemplateError as error:
        key, cure = "model.path", "set what it asks for in model.chat_template_kwargs"
        if section.system_prompt is not None:  # which some do not know
            key, cure = "data.system_prompt", "leave it out, and write its text into data.prompt"
        raise UserError(
            f"{key}: the chat template refuses the chat of a prompt ({first_line(error)}): {cure}."
        ) from error
    # Not `from_list`, which leaves out what the first row does not have.
    return Dataset.from_dict({column: [row.get(column) for row in rows] for column in column_names(rows)})


def column_names(rows: list[dict[str, Any]]) -> list[str]:
    """Of all rows: those of a function need not have the same ones."""
    return list(dict.fromkeys(column for row in rows for column in row))


def prompt_tokens(tokenizer: Any, prompts: list[Any]) -> list[list[int]]:
    """Token ids of prompts, as the trainer makes them."""
    if isinstance(prompts[0], str):
        return tokenizer(prompts)["input_ids"]
    return tokenizer.apply_chat_template(prompts, add_generation_prompt=True, tokenize=True, return_dict=False)
