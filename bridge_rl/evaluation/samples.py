"""Sampled groups on disk: appended as they finish, so that an evaluation that was cut off goes on where it was."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from bridge_rl.errors import UserError
from bridge_rl.evaluation.results import Condition


class GroupKey(NamedTuple):
    """Which group of an evaluation: the `group`-th of a problem at a width in a condition."""

    condition: Condition
    width: int
    problem: int
    group: int


@dataclass(frozen=True)
class SampledGroup:
    """One group of one problem, scored; lists are over its rows.

    problem: its place in the suite. tokens: ids, with the EOS where one was drawn. answers: the final answer in
    comparable form, None where there is none. verdicts: `ok`, `unparsed`, or why a row could not be judged (`timeout`,
    `error`). logprobs: of the whole completion, at the sampling temperature. correct_at: right or not if cut at a limit
    of so many tokens, by limit.
    """

    condition: Condition
    width: int
    problem: int
    group: int
    completions: list[str]
    tokens: list[list[int]]
    answers: list[str | None]
    correct: list[bool]
    verdicts: list[str]
    finish_reasons: list[str]
    logprobs: list[float]
    correct_at: dict[int, list[bool]] = field(default_factory=dict)

    @property
    def key(self) -> GroupKey:
        return GroupKey(self.condition, self.width, self.problem, self.group)


class SampleStore:
    """The groups of one evaluation in `directory`, one file a rank, one group a line."""

    def __init__(self, directory: Path, rank: int = 0) -> None:
        self.directory = directory
        self.path = directory / f"rank_{rank}.jsonl"
        self.whole = False  # whether the file is known to end in a whole line

    def append(self, groups: Iterable[SampledGroup]) -> None:
        """Written through to the disk before it returns, behind the last line that a kill has left whole."""
        if not self.whole:
            self.directory.mkdir(parents=True, exist_ok=True)
            drop_half_line(self.path)
            self.whole = True
        text = "".join(json.dumps(asdict(group)) + "\n" for group in groups)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def keys(self) -> set[GroupKey]:
        """Of every group of every rank."""
        lines = (line for path in self.directory.glob("rank_*.jsonl") for line in read_lines(path))
        return {GroupKey(*(line[name] for name in GroupKey._fields)) for line in lines}

    def read(self) -> list[SampledGroup]:
        """Every group of every rank, each once, in the order of their keys."""
        found: dict[GroupKey, SampledGroup] = {}
        for path in sorted(self.directory.glob("rank_*.jsonl")):
            for group in read_groups(path):
                found.setdefault(group.key, group)
        return [found[key] for key in sorted(found)]


def drop_half_line(path: Path) -> None:
    """Cut a file off after its last whole line."""
    if not path.is_file():
        return
    with path.open("rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of one file, but for one that is still being written. Raises UserError for what is no JSON."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                content = json.loads(line)
                GroupKey(*(content[name] for name in GroupKey._fields))
            except (ValueError, TypeError, KeyError) as error:
                raise damaged(path, number, error) from error
            yield content


def damaged(path: Path, number: int, error: Exception) -> UserError:
    return UserError(
        f"{path}, line {number}, is no sampled group ({type(error).__name__}: {error}): delete that line, and the "
        "group is sampled again."
    )


def read_groups(path: Path) -> list[SampledGroup]:
    """The groups of one file. Raises UserError for a line that is no group."""
    groups = []
    for number, content in enumerate(read_lines(path), start=1):
        try:
            content["correct_at"] = {int(limit): right for limit, right in content["correct_at"].items()}
            groups.append(SampledGroup(**content))
        except (ValueError, TypeError, KeyError) as error:
            raise damaged(path, number, error) from error
    return groups


def write_for_readers(
    directory: Path, rows: Sequence[dict[str, Any]], groups: Iterable[SampledGroup], tokenizer: PreTrainedTokenizerBase
) -> None:
    """What a page shows beside samples: `problems.jsonl`, and in `pieces.json` the text of each token."""
    lines = [
        {"problem": number, "text": row["problem"], "answer": row["answer"], "prompt": row["prompt"]}
        for number, row in enumerate(rows)
    ]
    (directory / "problems.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    used = sorted({token for group in groups for row in group.tokens for token in row})
    texts = decode_behind(tokenizer, used[0], [[token] for token in used]) if used else []
    (directory / "pieces.json").write_text(json.dumps(dict(zip(used, texts, strict=True))), encoding="utf-8")


def decode_behind(tokenizer: PreTrainedTokenizerBase, before: int, rows: Sequence[list[int]]) -> list[str]:
    """The texts of rows as they follow the token `before`, since decoders may drop a space at the beginning."""
    start = tokenizer.decode([before])
    return [text.removeprefix(start) for text in tokenizer.batch_decode([[before, *row] for row in rows])]


def groups_by_problem(groups: Sequence[SampledGroup]) -> list[list[SampledGroup]]:
    """Those of each problem together, in the order of the problems."""
    by_problem: dict[int, list[SampledGroup]] = {}
    for group in sorted(groups, key=lambda group: (group.problem, group.group)):
        by_problem.setdefault(group.problem, []).append(group)
    return [by_problem[problem] for problem in sorted(by_problem)]
