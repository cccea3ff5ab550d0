"""Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): prompts without a signal give way to others of the data.

A prompt has a signal if its rows differ in reward; without, all its advantages are 0. A *slot* is the place of a prompt
in a generation batch, over all ranks; *candidates* are the prompts that may take a slot, numbered in their order.

Further prompts come from an own order of the data, drawn from (seed, number of the generation batch) and without the
problems of that batch; a candidate's draws come from its number. So what is chosen depends neither on the number of
ranks nor on what was sampled beside it, there is nothing to save for a resume, and the sampler's epochs go on as ever.

Shapes: B rows over all ranks, P slots, G rows of a prompt (`num_generations`), N width, F reward functions.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor

from bridge_rl.config import DynamicSampling
from bridge_rl.errors import UserError
from bridge_rl.group import merge_rows, split_rows
from bridge_rl.report import names
from bridge_rl.rollout.sampling import stream_seed

if TYPE_CHECKING:
    from bridge_rl.trainer import BridgeGRPOTrainer


@dataclass
class Row:
    """A completion with all that TRL goes on to ask about it."""

    example: dict[str, Any]
    prompt_ids: list[int]
    completion_ids: list[int]
    mask: list[int] | None  # of the tokens that the loss counts
    completion: Any
    logprobs: list[float]
    fields: dict[str, Any]  # what the rollout gives to rewards beside
    logged: dict[str, Any]  # columns of rewards for the table of completions


@dataclass
class Sampled:
    """What TRL's `_generate` returns for this rank's rows, and the rewards [B, F] of all."""

    generated: tuple[Any, ...]
    rewards: Tensor


@dataclass
class Candidates:
    """Those sampled so far: of each the rewards [G, F] and whether it has a signal, and rows that are on this rank."""

    rewards: list[Tensor] = field(default_factory=list)
    signal: list[bool] = field(default_factory=list)
    rows: dict[tuple[int, int], Row] = field(default_factory=dict)  # by number and place among the prompt's rows


def total_rewards(rewards: Tensor, weights: Tensor) -> Tensor:
    """[B, F] -> [B], as TRL sums them; NaN for a row that no function has scored."""
    total = (rewards * weights.to(rewards.device)).nansum(1)
    return total.masked_fill(rewards.isnan().all(1), float("nan"))


def has_signal(totals: Tensor, num_generations: int) -> list[bool]:
    """[B] -> for each prompt whether its rows differ; rows that no function has scored say nothing."""
    prompts = split_rows(totals, num_generations)
    highest = prompts.masked_fill(prompts.isnan(), -math.inf).amax(1)
    lowest = prompts.masked_fill(prompts.isnan(), math.inf).amin(1)
    return (highest > lowest).tolist()


def choose(missing: int, max_rounds: int, sample_to: Callable[[int], Sequence[bool]]) -> tuple[list[int], int]:
    """Numbers of the candidates that fill the missing slots, and the rounds it took.

    A round looks at as many further candidates as are missing, and takes those with a signal. `sample_to(n)` says of at
    least the first n candidates whether they have one, of fewer if there are no more.
    """
    chosen: list[int] = []
    seen = 0
    for rounds in range(max_rounds):
        wanted = missing - len(chosen)
        signal = sample_to(seen + wanted)[: seen + wanted] if wanted else []
        if len(signal) <= seen:
            return chosen, rounds
        chosen += [number for number in range(seen, len(signal)) if signal[number]]
        seen = len(signal)
    return chosen, max_rounds


def local_rows(trainer: "BridgeGRPOTrainer", rows: int) -> slice:
    """This rank's among those of all, of which each has as many."""
    return slice(trainer.accelerator.process_index * rows, (trainer.accelerator.process_index + 1) * rows)


class DynamicSampler:
    """Samples and scores a generation batch until its prompts have a signal, at most `max_rounds` times more."""

    def __init__(self, trainer: "BridgeGRPOTrainer", options: DynamicSampling) -> None:
        self.trainer, self.options = trainer, options
        self.num_generations = trainer.num_generations
        ranks = trainer.accelerator.num_processes
        # Prompts that can be sampled at once: every rank takes as many rows, in whole groups.
        self.unit = math.lcm(ranks * trainer.width, self.num_generations) // self.num_generations
        slots = trainer.args.generation_batch_size // self.num_generations
        if not isinstance(trainer.train_dataset, Dataset):
            raise UserError("rollout.dynamic_sampling looks problems up by their number: leave it out for a stream.")
        problems = len(trainer.train_dataset)
        if problems <= slots:
            raise UserError(
                f"rollout.dynamic_sampling: data.train has {problems} problems and a generation batch takes {slots}, "
                "which leaves none to give way to: add problems or lower the batch."
            )

    def sample(self, inputs: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], Sampled]:
        """This rank's examples, one a row, and what was sampled for them. Called by all ranks."""
        rows, rewards = self._sample_rows(inputs)
        signal = self._signal(rewards)
        missing = [slot for slot, found in enumerate(signal) if not found]
        candidates, rounds = Candidates(), 0
        chosen: list[int] = []
        if missing:
            taken = {repr(prompt) for prompt in gather_object([example["prompt"] for example in inputs])}
            candidates, chosen, rounds = self._look_for(len(missing), taken, len(signal))
        before = total_rewards(rewards, self.trainer.reward_weights).nanmean().item()
        rows, rewards = self._fill(rows, rewards, dict(zip(missing, chosen, strict=False)), candidates)
        self._log(len(signal), len(candidates.signal), len(missing) - len(chosen), rounds, before)
        return [row.example for row in rows], self._as_sampled(rows, rewards)

    def _look_for(self, missing: int, taken: set[str], slots: int) -> tuple[Candidates, list[int], int]:
        """Candidates, the numbers of those that fill the missing slots, and the rounds it took."""
        candidates, order = Candidates(), self._order(taken)
        first_round = {name: len(values) for name, values in self._lengths().items()}
        of_rewards = {name: list(values) for name, values in self.trainer._pending_metrics.items()}

        def sample_to(number: int) -> list[bool]:
            if number > len(candidates.signal):
                self._sample_candidates(candidates, order, number - len(candidates.signal), slots)
            return candidates.signal

        chosen, rounds = choose(missing, self.options.max_rounds, sample_to)
        for name, values in self._lengths().items():  # or a round of one prompt would count as much as a whole batch
            del values[first_round[name] :]
        self.trainer._pending_metrics.clear()
        self.trainer._pending_metrics.update(of_rewards)
        return candidates, chosen, rounds

    def _signal(self, rewards: Tensor) -> list[bool]:
        return has_signal(total_rewards(rewards, self.trainer.reward_weights), self.num_generations)

    def _lengths(self) -> dict[str, list[float]]:
        """TRL's metrics of the lengths of completions, which it takes of every call."""
        return {name: x for name, x in self.trainer._metrics["train"].items() if name.startswith("completions/")}

    def _sample_rows(self, inputs: list[dict[str, Any]]) -> tuple[list[Row], Tensor]:
        """Sample and score this rank's rows, in TRL's own way. Returns the rewards [B, F] of all ranks."""
        trainer, prompts = self.trainer, [example["prompt"] for example in inputs]
        ids, completion_ids, masks, completions, logprobs, extra, _, _ = trainer._generate(prompts)
        fields = [{key: values[row] for key, values in extra.items()} for row in range(len(inputs))]
        examples = [{**example, **more} for example, more in zip(inputs, fields, strict=True)]
        rewards = trainer._calculate_rewards(examples, prompts, completions, completion_ids)
        pending = trainer._pending_extra_logs
        logged = [{column: values[row] for column, values in pending.items()} for row in range(len(inputs))]
        pending.clear()
        columns = (inputs, ids, completion_ids, masks or [None] * len(inputs), completions, logprobs, fields, logged)
        return [Row(*row) for row in zip(*columns, strict=True)], rewards

    def _order(self, taken: set[str]) -> Iterator[dict[str, Any]]:
        """The candidates of the present generation batch: all the data but the prompts `taken`."""
        trainer = self.trainer
        seed = stream_seed(trainer.args.seed, "refill", trainer.generation_number)
        data = trainer.train_dataset
        for index in torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist():
            if repr((example := data[index])["prompt"]) not in taken:
                yield example

    def _sample_candidates(
        self, candidates: Candidates, order: Iterator[dict[str, Any]], number: int, slots: int
    ) -> None:
        """At least so many more, in whole units; fewer where the data end, the last unit then filled with repeats."""
        wanted = math.ceil(number / self.unit) * self.unit
        examples = [example for _, example in zip(range(wanted), order, strict=False)]
        if not examples:
            return
        found = len(examples)
        examples += [examples[0]] * (-found % self.unit)  # sampled, or ranks would differ in rows, and not looked at
        trainer, first = self.trainer, len(candidates.signal)
        groups_of_prompt = self.num_generations // trainer.width
        trainer.groups_before = (slots + first) * groups_of_prompt
        places = [(first + n, place) for n in range(len(examples)) for place in range(self.num_generations)]
        mine = local_rows(trainer, len(places) // trainer.accelerator.num_processes)
        rows, rewards = self._sample_rows([dict(examples[number - first]) for number, _ in places[mine]])
        candidates.rows |= zip(places[mine], rows, strict=True)
        candidates.rewards += split_rows(rewards, self.num_generations).unbind()[:found]
        candidates.signal += self._signal(rewards)[:found]

    def _fill(
        self, rows: list[Row], rewards: Tensor, filled: dict[int, int], candidates: Candidates
    ) -> tuple[list[Row], Tensor]:
        """This rank's rows and all rewards, with candidates in the slots that they fill, from whichever rank."""
        if not filled:
            return rows, rewards
        chosen = set(filled.values())
        found = dict(gather_object([item for item in candidates.rows.items() if item[0][0] in chosen]))
        prompts = split_rows(rewards.clone(), self.num_generations)
        for slot, number in filled.items():
            prompts[slot] = candidates.rewards[number]
        places = [(slot, place) for slot in range(len(prompts)) for place in range(self.num_generations)]
        places = places[local_rows(self.trainer, len(rows))]
        rows = [
            found[filled[slot], place] if slot in filled else row
            for row, (slot, place) in zip(rows, places, strict=True)
        ]
        return rows, merge_rows(prompts)

    def _as_sampled(self, rows: list[Row], rewards: Tensor) -> Sampled:
        """In the form in which TRL goes on, and with the rewards' columns where TRL will look for them."""
        for column in sorted({column for row in rows for column in row.logged}):
            self.trainer._pending_extra_logs[column] = [row.logged.get(column) for row in rows]
        masks = None if rows[0].mask is None else [row.mask for row in rows]
        fields = {key: [row.fields[key] for row in rows] for key in rows[0].fields}
        ids = [[row.prompt_ids for row in rows], [row.completion_ids for row in rows]]
        texts, logprobs = [row.completion for row in rows], [row.logprobs for row in rows]
        return Sampled((*ids, masks, texts, logprobs, fields, None, []), rewards)

    def _log(self, slots: int, further: int, unfilled: int, rounds: int, reward_before: float) -> None:
        values = (slots + further, further, unfilled, rounds, reward_before)
        for name, value in zip(names.DYNAMIC, values, strict=True):
            self.trainer._log(name, value)
