"""Score completions with a reward function in TRL's signature, and find their final answers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bridge_rl.config import RewardSection
from bridge_rl.errors import UserError
from bridge_rl.evaluation.metrics import RIGHT
from bridge_rl.group import groups_of, repeat_for_rows
from bridge_rl.reward_functions import load_final_answer, load_reward

VERDICTS = ("ok", "unparsed", "timeout", "error")


@dataclass(frozen=True)
class Judged:
    """Of one group's rows: final answers in comparable form (None: unparsed), right or not, and verdicts.

    verdicts: what the reward logs under that name (one of VERDICTS; any other word is `ok`); of a reward that logs
    none, `ok` or `unparsed` by the answers. A row that gets no score (None, NaN) is an `error`, and not right.
    """

    answers: list[str | None]
    correct: list[bool]
    verdicts: list[str]


def as_completion(text: str, prompt: Any) -> Any:
    """As TRL gives it to rewards: the messages that answer a chat, or text."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def by_answer(answers: Sequence[str | None]) -> list[str]:
    return ["unparsed" if answer is None else "ok" for answer in answers]


def logged_verdicts(words: Any, rows: int) -> list[str]:
    """What a user's reward logs as verdicts. Raises UserError unless there is one a row."""
    if not isinstance(words, list) or len(words) != rows:
        given = f"{len(words)} values" if isinstance(words, list) else f"{str(words)[:80]!r}"
        raise UserError(
            f"The reward's log_extra('verdict', ...) was given {given} for {rows} rows: give it a list of one a row."
        )
    return [word if word in VERDICTS else "ok" for word in words]


@dataclass(frozen=True)
class Judge:
    """A completion is right when its reward is above `metrics.RIGHT`."""

    reward: Callable[..., list[float | None]]
    final_answer: Callable[[str], str | None]

    @classmethod
    def of(cls, section: RewardSection) -> "Judge":
        """By the first reward of a recipe, and the `final_answer` beside it. Raises UserError if there is none."""
        return cls(load_reward(section, 0), load_final_answer(section))

    def __call__(
        self, rows: Sequence[dict[str, Any]], completions: Sequence[list[str]], tokens: Sequence[list[list[int]]]
    ) -> list[Judged]:
        """One group of completions for each of `rows` (with `prompt`, `problem`, `answer`), all of one width.

        Raises UserError where the user's reward or `final_answer` fails, or gives what it must not.
        """
        if not rows:
            return []
        width = len(completions[0])
        columns = {key: repeat_for_rows([row[key] for row in rows], width) for key in rows[0]}
        prompts = columns.pop("prompt")
        texts = [text for group in completions for text in group]
        logged: dict[str, list[Any]] = {}
        scores = self.reward(
            prompts=prompts,
            completions=[as_completion(text, prompt) for text, prompt in zip(texts, prompts, strict=True)],
            completion_ids=[ids for group in tokens for ids in group],
            log_extra=logged.__setitem__,
            log_metric=lambda name, value: None,  # rates of a batch: the verdicts of each row say more
            **columns,
        )
        answers = [self.final_answer(text) for text in texts]
        numbers = [math.nan if score is None else float(score) for score in scores]
        correct = [number > RIGHT for number in numbers]
        verdicts = logged_verdicts(logged["verdict"], len(texts)) if "verdict" in logged else by_answer(answers)
        verdicts = ["error" if math.isnan(n) else verdict for verdict, n in zip(verdicts, numbers, strict=True)]
        by_group = (groups_of(values, width) for values in (answers, correct, verdicts))
        return [Judged(*group) for group in zip(*by_group, strict=True)]
