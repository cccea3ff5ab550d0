"""Does a wrong row change its answer when a sibling is right? Put other siblings beside it, and ask again.

A wrong row is tried with four kinds of siblings, each given word by word in lockstep:
own: those it had. With the same draws it must say the same: what changes here is the noise floor of the arithmetic.
right, wrong: right or wrong rows of the same problem.
other_prompt: rows of other problems, which have read their own prompts.
All four are tried on the same rows: wrong ones whose problem has at least one right row and another wrong one.

A wrong row that is merely disturbed becomes right now and then by chance. So what tells whether rows take over what
others found is `right` against `other_prompt`, which disturbs a row, and against `wrong`, which may hold it at its
answer (in studies/small rows changed far less beside wrong rows than beside another prompt's); and of the rows that
changed, the share that became right.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bridge_rl.evaluation.forced import ForcedGroup, sample_free_rows, score_free_rows
from bridge_rl.evaluation.intervals import estimate, paired_estimates
from bridge_rl.evaluation.judge import Judged
from bridge_rl.evaluation.results import Counterfactual, Estimate
from bridge_rl.evaluation.samples import SampledGroup
from bridge_rl.rollout.sampling import SamplingParams
from bridge_rl.surgery import find_state

Siblings = Literal["own", "right", "wrong", "other_prompt"]
KINDS: tuple[Siblings, ...] = get_args(Siblings)
# How `evaluation.judge.Judge` is called: problems, and of each a group's texts and ids.
Judging = Callable[[Sequence[dict[str, Any]], Sequence[list[str]], Sequence[list[list[int]]]], list[Judged]]


@dataclass(frozen=True)
class SampledRow:
    """One row of a sampled group."""

    group: SampledGroup
    place: int

    @property
    def problem(self) -> int:
        return self.group.problem

    @property
    def tokens(self) -> list[int]:
        return self.group.tokens[self.place]

    @property
    def correct(self) -> bool:
        return self.group.correct[self.place]

    @property
    def logprob(self) -> float:
        return self.group.logprobs[self.place]

    @property
    def answer(self) -> str | None:
        return self.group.answers[self.place]


@dataclass(frozen=True)
class Trial:
    """A wrong row and the N - 1 siblings of each kind that it is tried with."""

    row: SampledRow
    siblings: dict[Siblings, list[SampledRow]]

    def forced(self, kind: Siblings, prompt_ids: Sequence[Sequence[int]], index: int) -> ForcedGroup:
        """The row free at its own place, the siblings in the others."""
        rows = list(self.siblings[kind])
        rows.insert(self.row.place, self.row)
        prompts = [list(prompt_ids[row.problem]) for row in rows]
        return ForcedGroup(prompts, [row.tokens for row in rows], self.row.place, index)


@dataclass(frozen=True)
class Outcome:
    """What became of one trial with one kind of siblings. logprob: change in nats a token."""

    problem: int
    changed: bool
    became_right: bool
    logprob: float


def run_counterfactuals(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    prompt_ids: Sequence[Sequence[int]],
    groups: Sequence[SampledGroup],
    params: SamplingParams,
    index_of: Callable[[SampledGroup], int],
    judge: Judging,
    max_rows: int = 64,
    rows_at_once: int = 256,
    tokens_at_once: int = 262_144,
    seed: int = 0,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> list[Counterfactual]:
    """One result a kind of siblings, with 95 % intervals over problems, from `groups` of one width.

    rows, prompt_ids: by problem. params, index_of: what the groups were sampled with, so that a row's draws are its
    own. max_rows: wrong rows that are tried, a choice by `seed` from all that can be. rows_at_once, tokens_at_once: in
    one batch, siblings and prompts included, as far as a group allows. progress: told of rows sampled anew, and of how
    many there will be.
    Empty where rows cannot hear each other (width 1, P-Match), and where no wrong row can be tried.
    """
    if find_state(model).config.kind != "bridge" or any(group.width == 1 for group in groups):
        return []
    trials = choose_trials(groups, max_rows, seed)
    if not trials:
        return []
    longest = max(map(len, prompt_ids)) + params.max_new_tokens
    size = max(1, min(rows_at_once, tokens_at_once // longest) // trials[0].row.group.width)
    before = [trial.row.logprob for trial in trials]
    outcomes: dict[Siblings, list[Outcome]] = {}
    for number, kind in enumerate(KINDS):
        forced = [trial.forced(kind, prompt_ids, index_of(trial.row.group)) for trial in trials]
        scores = [sum(row) for row in score_free_rows(model, forced, params.temperature)]
        sampled: list[list[int]] = []
        for start in range(0, len(forced), size):
            sampled += [row.tokens for row in sample_free_rows(model, forced[start : start + size], params, tokenizer)]
            progress(number * len(trials) + len(sampled), len(KINDS) * len(trials))
        texts = tokenizer.batch_decode(sampled, skip_special_tokens=True)
        problems = [rows[trial.row.problem] for trial in trials]
        judged = judge(problems, [[text] for text in texts], [[tokens] for tokens in sampled])
        outcomes[kind] = compare(trials, judged, scores, before)
        if kind == "own":
            before = scores
    return [summarize(kind, outcomes) for kind in KINDS]


def compare(
    trials: Sequence[Trial], judged: Sequence[Judged], scores: Sequence[float], before: Sequence[float]
) -> list[Outcome]:
    """judged: each row sampled anew, as a group of one. scores: log-prob of its own completion beside these siblings.

    before: the same beside its own siblings; for these themselves, what sampling said, which shows the noise floor.
    """
    outcomes = []
    for trial, verdict, score, base in zip(trials, judged, scores, before, strict=True):
        row, [answer], [correct] = trial.row, verdict.answers, verdict.correct
        outcomes.append(Outcome(row.problem, answer != row.answer, correct, (score - base) / len(row.tokens)))
    return outcomes


def summarize(kind: Siblings, outcomes: Mapping[Siblings, Sequence[Outcome]]) -> Counterfactual:
    """Each problem weighs the same, whatever the number of its rows. `outcomes`: of the same rows beside each kind."""
    own = outcomes[kind]
    by_problem: dict[int, list[Outcome]] = {}
    for outcome in own:
        by_problem.setdefault(outcome.problem, []).append(outcome)
    problems = [by_problem[problem] for problem in sorted(by_problem)]
    return Counterfactual(
        siblings=kind,
        rows=len(own),
        changed=estimate([[float(outcome.changed) for outcome in of] for of in problems]),
        became_right=estimate([[float(outcome.became_right) for outcome in of] for of in problems]),
        over_wrong=None if kind == "wrong" else more_often_right(own, outcomes["wrong"]),
        over_other_prompt=None if kind == "other_prompt" else more_often_right(own, outcomes["other_prompt"]),
        logprob=estimate([[outcome.logprob for outcome in of] for of in problems], -math.inf, math.inf),
    )


def more_often_right(first: Sequence[Outcome], second: Sequence[Outcome]) -> Estimate:
    """Of the same rows: the share that became right, first minus second."""
    gains: dict[int, list[float]] = {}
    for one, other in zip(first, second, strict=True):
        gains.setdefault(one.problem, []).append(float(one.became_right) - float(other.became_right))
    means = np.array([np.mean(of) for of in gains.values()])
    return paired_estimates(means[:, None], [1.0])[0]


def choose_trials(groups: Sequence[SampledGroup], max_rows: int, seed: int) -> list[Trial]:
    """At most `max_rows` wrong rows with siblings of every kind, in the order of their problems; chosen by `seed`.

    A row that could not be judged is neither tried nor put beside one.
    """
    rows = [row for group in sorted(groups, key=lambda group: group.key) for row in judged_rows(group)]
    of_problem: dict[int, list[SampledRow]] = {}
    for row in rows:
        of_problem.setdefault(row.problem, []).append(row)
    wrong = [row for row in rows if not row.correct and can_be_tried(row, of_problem)]
    order = np.random.default_rng(seed).permutation(len(wrong))
    trials = []
    for row in (wrong[place] for place in sorted(order[:max_rows])):
        # Of its own, so that a row's siblings do not depend on which others are tried.
        rng = np.random.default_rng([seed, row.problem, row.group.group, row.place])
        trials.append(Trial(row, find_siblings(row, rows, of_problem[row.problem], rng)))
    return trials


def judged_rows(group: SampledGroup) -> Iterator[SampledRow]:
    for place, verdict in enumerate(group.verdicts):
        if verdict in ("ok", "unparsed"):
            yield SampledRow(group, place)


def can_be_tried(row: SampledRow, of_problem: dict[int, list[SampledRow]]) -> bool:
    """Whether its problem has a right row and another wrong one, and there is another problem."""
    mates = of_problem[row.problem]
    return any(mate.correct for mate in mates) and sum(not mate.correct for mate in mates) > 1 and len(of_problem) > 1


def find_siblings(
    row: SampledRow, rows: Sequence[SampledRow], mates: Sequence[SampledRow], rng: np.random.Generator
) -> dict[Siblings, list[SampledRow]]:
    """N - 1 siblings of each kind. `mates`: rows of the same problem.

    Right and wrong ones come from other groups first, since the row has heard those of its own; where there are fewer
    than N - 1 in all, some are there twice. Those of other problems are of as many problems as there are.
    """
    number = row.group.width - 1
    own = [SampledRow(row.group, place) for place in range(row.group.width) if place != row.place]
    others = [mate for mate in mates if mate.group is not row.group or mate.place != row.place]
    strangers = shuffled([other for other in rows if other.problem != row.problem], rng)
    first_of_problem = {other.problem: other for other in reversed(strangers)}
    spread = sorted(strangers, key=lambda other: other is not first_of_problem[other.problem])
    return {
        "own": own,
        "right": repeated(from_other_groups_first([m for m in others if m.correct], row, rng), number),
        "wrong": repeated(from_other_groups_first([m for m in others if not m.correct], row, rng), number),
        "other_prompt": repeated(spread, number),
    }


def from_other_groups_first(pool: Sequence[SampledRow], row: SampledRow, rng: np.random.Generator) -> list[SampledRow]:
    return sorted(shuffled(pool, rng), key=lambda mate: mate.group is row.group)


def shuffled(rows: Sequence[SampledRow], rng: np.random.Generator) -> list[SampledRow]:
    return [rows[place] for place in rng.permutation(len(rows))]


def repeated(rows: Sequence[SampledRow], number: int) -> list[SampledRow]:
    """The first `number`, from the beginning again where there are fewer."""
    return [rows[place % len(rows)] for place in range(number)]
