"""Sample problems at several widths and under controls, judge every completion, and keep what was sampled on disk.

What is to be sampled is a list of units, whole groups that go together; what is on disk is not sampled again. A group's
draws depend on its problem and number alone, so neither the number of ranks nor an interruption changes a sample, more
samples can be asked for later, and conditions are compared on the same draws at each width.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bridge_rl.config import EvaluationSection
from bridge_rl.data import prompt_tokens
from bridge_rl.errors import UserError
from bridge_rl.evaluation.judge import Judge
from bridge_rl.evaluation.results import Condition
from bridge_rl.evaluation.samples import GroupKey, SampledGroup, SampleStore
from bridge_rl.ranks import together
from bridge_rl.rollout import Group, Rollout, RolloutOptions, SamplingParams
from bridge_rl.rollout.ranks import is_sharded
from bridge_rl.rollout.sampling import ids_of, stream_seed
from bridge_rl.surgery import disable_bridge, find_state, has_bridge

MOST_GROUPS = 2**20  # of a problem
# How long ranks wait for one that samples longer.
PATIENCE = timedelta(hours=2)
# Finished groups are judged and written together, at the latest when they have so many rows or have waited so long.
ROWS_PER_WRITE, SECONDS_PER_WRITE = 64, 30.0


class Unit(NamedTuple):
    """(problem, group) pairs that must be sampled together. Of a unit that is filled up, only the first `own` count."""

    pairs: tuple[tuple[int, int], ...]
    own: int


class Sweep(NamedTuple):
    """Groups of one condition at one width."""

    condition: Condition
    width: int
    units: list[Unit]

    def keys(self, unit: Unit) -> list[GroupKey]:
        return [GroupKey(self.condition, self.width, *pair) for pair in unit.pairs[: unit.own]]


# Samples the units of a sweep; gives their own groups out as they end, judged.
Sampler = Callable[[Sweep], Iterable[list[SampledGroup]]]


def plan_sweeps(
    section: EvaluationSection, num_problems: int, listening: bool, controls: bool, seed: int
) -> list[Sweep]:
    """What is sampled, in this order. `listening`: whether the model's rows hear each other.

    Rows that do not are independent: sampled one by one, they serve every width (`aggregate.regroup`). So it is with
    the Bridge disabled, which is a control, as are width 1 and rows that hear other prompts (`shuffled`).
    """
    widths = sorted({*section.widths, 1} if controls or not listening else section.widths)
    single = max(section.samples, widths[-1])
    if not listening:
        return [Sweep("model", 1, single_units(num_problems, single))]
    numbers = {width: groups_per_problem(section, width) for width in widths}
    sweeps = [Sweep("model", width, single_units(num_problems, number)) for width, number in numbers.items()]
    if controls:
        sweeps.append(Sweep("disabled", 1, single_units(num_problems, single)))
        for width in widths[1:]:
            sweeps.append(Sweep("shuffled", width, exchange_units(num_problems, numbers[width], width, seed)))
    return sweeps


def group_index(problem: int, group: int) -> int:
    """What a group's draws come from, whatever else is sampled: more groups or problems later change none."""
    return problem * MOST_GROUPS + group


def single_units(num_problems: int, per_problem: int) -> list[Unit]:
    return [Unit(((problem, group),), 1) for problem in range(num_problems) for group in range(per_problem)]


def exchange_units(num_problems: int, per_problem: int, width: int, seed: int) -> list[Unit]:
    """Blocks of `width` different problems, drawn anew for each group number; the last one is filled up."""
    assert num_problems >= width
    units = []
    for group in range(per_problem):
        order = np.random.default_rng([seed, width, group]).permutation(num_problems).tolist()
        for start in range(0, num_problems, width):
            own = order[start : start + width]
            filled = own + order[: width - len(own)]
            units.append(Unit(tuple((problem, group) for problem in filled), len(own)))
    return units


def groups_per_problem(section: EvaluationSection, width: int) -> int:
    """How many groups of `width` give each problem its samples."""
    return max(1, section.samples // width)


@dataclass(frozen=True)
class ModelSampler:
    """Samples from a model with its Bridge.

    rows: the problems, with `prompt`, `problem`, `answer`. limits: lengths at which completions are judged again as if
    they had been cut there. cancelled: asked between steps, ends it; groups that it cuts are not given out.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    rows: Sequence[dict[str, Any]]
    judge: Judge
    params: SamplingParams
    max_rows: int | None
    limits: Sequence[int] = ()
    cancelled: Callable[[], bool] | None = None

    def __call__(self, sweep: Sweep) -> Iterator[list[SampledGroup]]:
        pairs = [pair for unit in sweep.units for pair in unit.pairs]
        kept = [number < unit.own for unit in sweep.units for number in range(len(unit.pairs))]
        prompts = prompt_tokens(self.tokenizer, [self.rows[problem]["prompt"] for problem, _ in pairs]) if pairs else []
        exchange = None
        if sweep.condition == "shuffled":
            places = iter(range(len(pairs)))
            exchange = [[next(places) for _ in unit.pairs] for unit in sweep.units]
        with disable_bridge(self.model) if sweep.condition == "disabled" else nullcontext():
            # What one rank cannot sample must not leave the others waiting for its shards.
            with together() if is_sharded(self.model) else nullcontext():
                rollout = Rollout(
                    self.model,
                    prompts,
                    sweep.width,
                    self.params,
                    indices=[group_index(*pair) for pair in pairs],
                    options=RolloutOptions(max_rows=self.max_rows, cancelled=self.cancelled),
                    exchange=exchange,
                )
            with closing(rollout.passes()) as passes:
                ended = (
                    [
                        (*pairs[place], group)
                        for place, group in of_pass
                        if kept[place] and "abort" not in group.finish_reasons
                    ]
                    for of_pass in passes
                )
                try:
                    for batch in batches(ended, max(1, ROWS_PER_WRITE // sweep.width)):
                        yield self.judged(sweep, batch)
                except UserError:
                    if rollout.ranks.together:  # the others need this rank's shards to the end
                        deque(passes, maxlen=0)
                    raise

    def judged(self, sweep: Sweep, batch: Sequence[tuple[int, int, Group]]) -> list[SampledGroup]:
        rows = [self.rows[problem] for problem, _, _ in batch]
        tokens = [group.tokens for _, _, group in batch]
        texts = [self.decode(group) for group in tokens]
        verdicts = self.judge(rows, texts, tokens)
        cut = {limit: self.correct_at(limit, rows, tokens, [v.correct for v in verdicts]) for limit in self.limits}
        return [
            SampledGroup(
                condition=sweep.condition,
                width=sweep.width,
                problem=problem,
                group=number,
                completions=text,
                tokens=group.tokens,
                answers=judged.answers,
                correct=judged.correct,
                verdicts=judged.verdicts,
                finish_reasons=group.finish_reasons,
                logprobs=[sum(row) for row in group.logprobs],
                correct_at={limit: right[place] for limit, right in cut.items()},
            )
            for place, ((problem, number, group), text, judged) in enumerate(zip(batch, texts, verdicts, strict=True))
        ]

    def correct_at(
        self,
        limit: int,
        rows: Sequence[dict[str, Any]],
        tokens: Sequence[list[list[int]]],
        correct: Sequence[list[bool]],
    ) -> list[list[bool]]:
        """As if sampled with that limit: rows in lockstep reach it together, so what came before is the same."""
        right = [list(group) for group in correct]
        longer = [(g, r) for g, group in enumerate(tokens) for r, row in enumerate(group) if len(row) > limit]
        cut = [[tokens[g][r][:limit]] for g, r in longer]
        judged = self.judge([rows[g] for g, _ in longer], [self.decode(row) for row in cut], cut)
        for (g, r), verdict in zip(longer, judged, strict=True):
            [right[g][r]] = verdict.correct
        return right

    def decode(self, tokens: list[list[int]]) -> list[str]:
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=True)


def batches(passes: Iterable[Sequence[Any]], size: int) -> Iterator[list[Any]]:
    """What ended in each pass, be it nothing, in lists of `size`.

    Of fewer at the end, and after a pass before which an item has waited for SECONDS_PER_WRITE.
    """
    batch: list[Any] = []
    started = 0.0
    for ended in passes:
        for item in ended:
            if not batch:
                started = time.monotonic()
            batch.append(item)
            if len(batch) >= size:
                yield batch
                batch = []
        if batch and time.monotonic() - started > SECONDS_PER_WRITE:
            yield batch
            batch = []
    if batch:
        yield batch


@dataclass
class Evaluation:
    """One evaluation: what is sampled, by whom, and where it is kept. `done`: what was there at the start."""

    sweeps: list[Sweep]
    sampler: Sampler
    store: SampleStore
    state: PartialState = field(default_factory=PartialState)
    done: set[GroupKey] = field(init=False)

    def __post_init__(self) -> None:
        self.done = self.store.keys()
        self.state.wait_for_everyone()  # all have read before one writes

    def run(self, progress: Callable[[int], object] = lambda completions: None) -> list[SampledGroup]:
        """Sample this rank's share of what is missing; returns the groups of all ranks, on the main one.

        `progress` is told of completions sampled.
        """
        self.sample(progress)
        return self.collected() if self.state.is_main_process else []

    def sample(self, progress: Callable[[int], object]) -> None:
        """In every sweep, be it nothing: ranks that hold shards of a model must call equally often.

        Returns on all ranks at once, or raises RankFailed on all, with what was judged before on disk.
        """
        problems = []
        with together():
            for sweep in self.shares():
                try:
                    for groups in self.sampler(sweep):
                        self.store.append(group for group in groups if group.key not in self.done)
                        progress(sum(len(group.correct) for group in groups))
                except UserError as error:
                    problems.append(error)
                    if self.state.num_processes == 1:  # else the others, in this sweep and the next, are waited for
                        break
            if problems:
                raise problems[0]

    def collected(self) -> list[SampledGroup]:
        """All that was asked for. Raises UserError where a part is missing, as on nodes that do not share a disk."""
        wanted = {key for sweep in self.sweeps for unit in sweep.units for key in sweep.keys(unit)}
        groups = [group for group in self.store.read() if group.key in wanted]
        if len(groups) < len(wanted):
            raise UserError(
                f"{self.store.directory} holds {len(groups)} of {len(wanted)} groups after sampling: all ranks must "
                "write to one disk, so name an output directory that every node shares."
            )
        return groups

    def shares(self) -> list[Sweep]:
        """This rank's share of the units of which a group is not on disk yet."""
        rank, num_ranks = self.state.process_index, self.state.num_processes
        missing = [
            [unit for unit in sweep.units if not self.done.issuperset(sweep.keys(unit))] for sweep in self.sweeps
        ]
        return [sweep._replace(units=units[rank::num_ranks]) for sweep, units in zip(self.sweeps, missing, strict=True)]


def num_completions(sweeps: Iterable[Sweep]) -> int:
    """Completions in all, without those that only fill up."""
    return sum(sweep.width * unit.own for sweep in sweeps for unit in sweep.units)


def plan_evaluation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    judge: Judge,
    section: EvaluationSection,
    max_new_tokens: int,
    seed: int,
    store: SampleStore,
    controls: bool = False,
    limits: Sequence[int] = (),
    cancelled: Callable[[], bool] | None = None,
) -> Evaluation:
    """An evaluation of `rows` (with `prompt`, `problem`, `answer`), to be run."""
    params = SamplingParams(
        max_new_tokens=section.max_new_tokens or max_new_tokens,
        temperature=section.temperature,
        top_p=section.top_p,
        seed=stream_seed(seed, "evaluation"),
        eos_token_id=eos_ids(model, tokenizer),
    )
    sweeps = plan_sweeps(section, len(rows), listens(model), controls, seed)
    sampler = ModelSampler(model, tokenizer, rows, judge, params, section.max_rows, limits, cancelled)
    return Evaluation(sweeps, sampler, store)


def listens(model: PreTrainedModel) -> bool:
    """Whether rows of a group hear each other."""
    return has_bridge(model) and find_state(model).config.kind == "bridge"


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a completion: the tokenizer's, and those the model declares (as TRL's trainer does)."""
    return sorted({*ids_of(model.generation_config.eos_token_id), tokenizer.eos_token_id} - {None})
