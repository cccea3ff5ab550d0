"""Sets of problems to evaluate on, as data: where they come from, how they are asked and judged, under what licence.

Revisions are commits of the data set's repository. A suite that names none is loaded at the newest one, and `commit`
gives what that was, for the results.
"""

import json
import re
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path
from typing import Any

from accelerate import PartialState

from bridge_rl.config import DataSource, RewardSection
from bridge_rl.data import FILE_FORMATS, hub_commit, load_problems
from bridge_rl.errors import UserError
from bridge_rl.typed_yaml import nearest

BOXED = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
TAGGED = "{problem}\n\nPlease reason step by step, and give the final answer alone between <answer> and </answer>."
MATH_REWARD = "rewards/answer.py:correct"


@dataclass(frozen=True)
class Suite:
    """One set of problems.

    answers: their form in the source. problems: how many there are, None for any number. max_new_tokens: the default.
    prompt, system_prompt: for models of which no run's recipe says their own.
    """

    name: str
    source: DataSource
    answers: str
    licence: str
    note: str = ""
    problems: int | None = None
    reward: RewardSection = field(default_factory=lambda: RewardSection(MATH_REWARD))
    prompt: str = BOXED
    system_prompt: str | None = None
    max_new_tokens: int = 1024

    @property
    def is_file(self) -> bool:
        """Whether it is a user's own file."""
        return self.source.path.endswith(FILE_FORMATS)

    @property
    def commit(self) -> str | None:
        """Of the hub set as it was loaded; None for others."""
        return hub_commit(self.source)


# -- the table --------------------------------------------------------------------------------------------------------

CC_BY_NC_SA = "CC-BY-NC-SA-4.0"
LATEX = "LaTeX or an integer, as text"


def _math_arena(name: str, path: str, revision: str, problems: int, answers: str = LATEX, note: str = "") -> Suite:
    source = DataSource(f"MathArena/{path}", revision=revision)
    return Suite(name, source, answers, CC_BY_NC_SA, note, problems)


_SUITES = (
    Suite(
        "math500",
        DataSource("HuggingFaceH4/MATH-500", split="test", revision="6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be"),
        answers="LaTeX, a number or a word",
        licence="none stated",
        note="500 problems of MATH's test set, chosen in arXiv 2305.20050",
        problems=500,
    ),
    Suite(
        "aime24",
        DataSource(
            "Maxwell-Jia/AIME_2024",
            revision="8d88b2876a82a080e2f172cc9b25d0d9d2cb4792",
            problem_column="Problem",
            answer_column="Answer",
        ),
        answers="integer",
        licence="MIT",
        note="with I-5, I-6 and II-10 as they were set; aime24_h4 has errors in them, and is what many figures are for",
        problems=30,
    ),
    _math_arena("aime25", "aime_2025", "c94da77eb22bbd6439e62a323bec18493a421302", 30, answers="integer"),
    Suite(
        "amc23",
        DataSource(
            "math-ai/amc23",
            split="test",
            revision="80815d37005feb82cd7f8fbc6901d5d3eff43057",
            problem_column="question",
        ),
        answers="integer, stored as a float",
        licence="none stated",
        note="40 problems of AMC 12 A and B, reworded from multiple choice to integers",
        problems=40,
    ),
    _math_arena(
        "brumo25", "brumo_2025", "6de9bc0987f5710c6376ee980e1483dbeb55cfda", 30, note="one problem has two answers"
    ),
    _math_arena("cmimc25", "cmimc_2025", "8f27517ce4ad1d05e023c0e7eca4344754ba2a04", 40),
    _math_arena(
        "hmmt_feb25",
        "hmmt_feb_2025",
        "6fdc4277120810ff75aa22d2d5489b91f7a262a1",
        30,
        note="one problem has two answers",
    ),
    Suite(
        "gsm8k",
        DataSource(
            "openai/gsm8k",
            name="main",
            split="test",
            revision="740312add88f781978c0658806c59bc2815b9866",
            problem_column="question",
            answer_pattern="#### (.+)",
        ),
        answers="integer after `####`, with commas in thousands",
        licence="MIT",
        problems=1319,
    ),
    Suite(
        "aime24_h4",
        DataSource("HuggingFaceH4/aime_2024", revision="2fe88a2f1091d5048c0f36abc874fb997b3dd99a"),
        answers="integer of three digits, as text (`033`)",
        licence="none stated",
        note="see aime24",
        problems=30,
    ),
    Suite(
        "champ",
        DataSource(f"{__name__}:champ_problems"),
        answers="integer, fraction, power or root",
        licence="MIT",
        note="of CHAMP's 270 problems (arXiv 2401.06961) those whose whole answer is one number, unedited",
        problems=88,
    ),
    Suite(
        "tiny",
        DataSource("bridge_rl.tiny.task:dataset", kwargs={"seed": 11, "size": 512}, check_answers=False),
        answers="the sum that a pair of the list must make",
        licence="Apache-2.0",
        note="the embedded task; ships with the package",
        problems=512,
        reward=RewardSection("rewards/two_tries.py:correct"),
        prompt="{problem}",
        max_new_tokens=32,
    ),
    *(
        Suite(
            f"tiny_{task}",
            DataSource(
                f"bridge_rl.tiny.{task}:dataset",
                kwargs={"seed": 11, "size": 512, "split": "test", "distinct": True},
                check_answers=False,
            ),
            answers="a number",
            licence="Apache-2.0",
            note=note,
            problems=512,
            reward=RewardSection("rewards/last_number.py:correct"),
            prompt="{problem}",
            max_new_tokens=max_new_tokens,
        )
        for task, note, max_new_tokens in (
            ("products", "of three numbers; ships with the package", 32),
            ("checked_products", "of three numbers, with remainders; ships with the package", 44),
            ("word_problems", "templates of GSM-Symbolic; needs reasoning-gym", 80),
        )
    ),
)
SUITES = {suite.name: suite for suite in _SUITES}
COLLECTIONS = {"math": ("math500", "aime24", "aime25", "amc23", "brumo25", "cmimc25", "hmmt_feb25")}
KNOWN = (*COLLECTIONS, *SUITES, "rg:TASK", "FILE.jsonl")


# -- by name ----------------------------------------------------------------------------------------------------------


def expand(text: str) -> list[Suite]:
    """The suites of `--suite`, with commas between: names, `math` (the paper's seven), files, `rg:TASK[:SIZE[:SEED]]`.

    Raises UserError for an unknown name, with the nearest one.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise UserError(f"--suite names no suite{nearest('', KNOWN)}")
    names = [name for part in parts for name in COLLECTIONS.get(part, (part,))]
    suites = [_suite(name) for name in dict.fromkeys(names)]
    labels = [suite.name for suite in suites]
    if double := next((label for label in labels if labels.count(label) > 1), None):
        raise UserError(
            f"--suite names two suites that are both called {double}: rename a file, or evaluate them apart."
        )
    return suites


def _suite(name: str) -> Suite:
    if name.endswith(FILE_FORMATS):
        source = DataSource(name)
        return Suite(Path(name).stem, source, "what math-verify reads, in `answer`", "that of the file")
    if name.startswith("rg:"):
        return _reasoning_gym(name)
    if name in SUITES:
        return SUITES[name]
    raise UserError(f"--suite: there is no suite '{name}'{nearest(name, KNOWN)}")


def load_suite(suite: Suite, key: str, seed: int) -> list[dict[str, Any]]:
    """Rows with `problem`, `answer` and what the suite's reward needs besides. `key`: where it was named, for errors.

    Raises UserError if it is not here and cannot be fetched, or is not all here.
    """
    rows = load_problems(suite.source, key, seed)
    if suite.problems is not None and len(rows) != suite.problems:
        raise UserError(
            f"{key}: {suite.name} ({suite.source.path}) holds {len(rows)} problems, not {suite.problems}: the copy in "
            "the cache is not whole or of another version, fetch it again."
        )
    return rows


# -- suites that come as packages -------------------------------------------------------------------------------------

_NUMBER = re.compile(r"-?\d+(?:/\d+|\^\d+)?|sqrt\(\d+\)")


def champ_problems() -> list[dict[str, str]]:
    """CHAMP's problems whose whole answer is an integer (79), a fraction, a power or a root of integers (9 together).

    Left out: answers with variables, which depend on how a model names them; sets; yes or no, which are half guessed;
    and answers with words, which would have to be edited.
    """
    try:
        import champ_dataset
    except ImportError as error:
        raise UserError("--suite champ needs the package champ-dataset: pip install champ-dataset") from error
    problems = champ_dataset.load("v0").problems.values()
    return [
        {"problem": problem.text, "answer": _as_latex(problem.answer.strip())}
        for problem in problems
        if _NUMBER.fullmatch(problem.answer.strip())
    ]


def _as_latex(answer: str) -> str:
    answer = re.sub(r"sqrt\((\d+)\)", r"\\sqrt{\1}", answer)
    return re.sub(r"\^(\d+)", r"^{\1}", answer)


RG_SIZE, RG_SEED = 100, 11
RG_CHECKED = 3  # rows whose own answer must be right, and the answers of the others not all


def _reasoning_gym(name: str) -> Suite:
    _, task, *numbers = name.split(":")
    if not task or len(numbers) > 2 or not all(number.isdecimal() for number in numbers):
        raise UserError(
            f"--suite: '{name}' is no reasoning-gym suite: write rg:TASK, rg:TASK:SIZE or rg:TASK:SIZE:SEED."
        )
    size, seed = map(int, [*numbers, *map(str, (RG_SIZE, RG_SEED)[len(numbers) :])])
    if size < 1:
        raise UserError(f"--suite: '{name}' has no problems: its size must be at least 1.")
    return Suite(
        name.replace(":", "_"),
        DataSource(
            f"{__name__}:reasoning_gym_problems",
            kwargs={"task": task, "size": size, "seed": seed},
            check_answers=False,
        ),
        answers="judged by the task's own score_answer",
        licence="Apache-2.0",
        reward=RewardSection("rewards/reasoning_gym.py:correct"),
        prompt=TAGGED,
    )


def reasoning_gym_problems(task: str, size: int, seed: int) -> list[dict[str, str]]:
    """Rows of a reasoning-gym generator with the columns that `rewards/reasoning_gym.py` needs: `task` and `entry`.

    entry: the task's row as JSON. Rows whose own answer is empty are left out, and counted on the terminal: an empty
    completion is no answer. Raises UserError for a task that is unknown, or cannot be judged by it.
    """
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise UserError("--suite rg: needs the package reasoning-gym: pip install reasoning-gym") from error
    if task not in DATASETS:
        raise UserError(f"--suite: reasoning-gym has no task '{task}'{nearest(task, sorted(DATASETS))}")
    try:
        dataset = create_dataset(task, size=size, seed=seed)
        entries = [dataset[index] for index in range(size)]
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(
            f"--suite: reasoning-gym's task '{task}' needs a configuration of its own ({error})."
        ) from error
    kept = [entry for entry in entries if entry["answer"] is None or str(entry["answer"]).strip()]
    if not kept:
        raise UserError(f"--suite: all {size} answers of '{task}' are empty: ask for more problems, or another task.")
    if len(kept) < size and PartialState().is_main_process:
        print(f"--suite: {size - len(kept)} of {size} answers of '{task}' are empty: dropped.", flush=True)
    rows = [
        {
            "problem": entry["question"],
            "answer": str(entry["answer"] or "any that its task accepts"),
            "task": task,
            # What JSON does not know, such as gsm_symbolic's fractions, as text: `_check_judge` sees whether that does.
            "entry": json.dumps(entry, default=str),
        }
        for entry in kept
    ]
    _check_judge(task, dataset, rows[:RG_CHECKED])
    return rows


def _check_judge(task: str, dataset: Any, rows: list[dict[str, str]]) -> None:
    """Raises UserError if a task denies its own answer once its row was JSON, or takes any text or the others' answers.

    A model that always gives one and the same answer would seem to solve such a task.
    """
    entries = [json.loads(row["entry"]) for row in rows]
    nonsense = "no such answer"
    for entry in entries:
        if entry["answer"] is not None and dataset.score_answer(entry["answer"], entry) < 1:
            raise UserError(f"--suite: '{task}' cannot be judged from stored rows: it denies its own answer.")
        if _accepts(dataset, nonsense, entry):
            raise UserError(f"--suite: '{task}' cannot be judged: it accepts the text '{nonsense}'.")
    others = [
        _accepts(dataset, other["answer"], entry)
        for entry, other in permutations(entries, 2)
        if entry["question"] != other["question"] and other["answer"] not in (None, entry["answer"])
    ]
    if others and all(others):
        raise UserError(f"--suite: '{task}' cannot be judged: it accepts for each problem the answers of the others.")


def _accepts(dataset: Any, answer: str, entry: dict[str, Any]) -> bool:
    try:
        return bool(dataset.score_answer(answer, entry) >= 1)
    except Exception:  # what the reward counts as unparsed
        return False
