"""Sample groups in lockstep: all rows of a group are at the same token step, so that they can attend to each other.

Groups are admitted whole as soon as enough rows are free; a finished row leaves at once and costs nothing more. What a
group says does not depend on when it was admitted or on who runs beside it (`tests/parity/test_rollout.py`).

Shapes: R rows running, N width, P prompt columns.
"""

import logging
import time
from collections.abc import Generator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bridge_rl.errors import UserError
from bridge_rl.group import pad_left
from bridge_rl.rollout.budget import CacheBudget
from bridge_rl.rollout.cache import PagedCache, PrefillCache
from bridge_rl.rollout.decode import Decoder, sampling_mode, siblings
from bridge_rl.rollout.ending import Ending
from bridge_rl.rollout.graphs import FilledDecoder, GraphDecoder, spare_pages, why_not_recorded
from bridge_rl.rollout.layout import Layout
from bridge_rl.rollout.packing import packed_weights
from bridge_rl.rollout.ranks import Ranks
from bridge_rl.rollout.request import Group, RolloutOptions, RolloutStats, Row, make_blocks, make_rows
from bridge_rl.rollout.sampling import SamplingParams, draw_tokens, group_uniforms

# Prompts prefilled in one call are padded to the longest: those much shorter wait for the next call.
SHORTEST_OF_LONGEST = 0.75
logger = logging.getLogger(__name__)


@torch.no_grad()
def generate_groups(
    model: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    width: int | Sequence[int],
    params: SamplingParams,
    indices: Sequence[int] | None = None,
    limits: Sequence[Sequence[int]] | None = None,
    options: RolloutOptions | None = None,
    expected_lengths: Sequence[float] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    exchange: Sequence[Sequence[int]] | None = None,
) -> list[Group]:
    """One group of `width` interdependent completions for each prompt, in the order of the prompts.

    A group's tokens depend on its prompt, `params.seed`, its index and the width, not on what else is in the batch (but
    for rounding in bf16, see `RolloutOptions`).
    `width`: of every group, or one a prompt. `indices`: the index of each group, by default its place in `prompt_ids`.
    `limits`: of each group's rows, where they are below `max_new_tokens`. `expected_lengths`: of each group's longest
    row; with them the longest are begun first, which leaves fewer rows alone at the end. `tokenizer`: for
    `params.stop_strings`. `exchange`: places of prompts in blocks of N, for groups of N rows: a row then hears, instead
    of its siblings, one row of each other group of its block (`group.exchanged_circles`). Without Bridge blocks the
    rows are independent samples.
    Raises ValueError for a request that cannot be served, also when one group alone does not fit into memory.
    """
    rollout = Rollout(model, prompt_ids, width, params, indices, limits, options, expected_lengths, tokenizer, exchange)
    return rollout.run()


@dataclass
class Prefill:
    """Prompts on their way through the model, in chunks of columns."""

    places: list[int]
    ids: Tensor  # [prompts, P], padded on the left
    mask: Tensor
    cache: PrefillCache = field(default_factory=PrefillCache)
    done: int = 0  # columns


class Rollout:
    """Rows in lockstep: admit what fits, step what runs, let go what has finished, until nothing waits or runs.

    The arguments are those of `generate_groups`; `stats` says what it took.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompt_ids: Sequence[Sequence[int]],
        width: int | Sequence[int],
        params: SamplingParams,
        indices: Sequence[int] | None = None,
        limits: Sequence[Sequence[int]] | None = None,
        options: RolloutOptions | None = None,
        expected_lengths: Sequence[float] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        exchange: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.model, self.prompt_ids, self.params = model, prompt_ids, params
        self.options = options or RolloutOptions()
        if not isinstance(self.options, RolloutOptions):
            raise UserError(f"options is {options!r:.60}: give bridge_rl.RolloutOptions(...).")
        self.groups = make_rows(model, prompt_ids, width, params, indices, limits, expected_lengths)
        self.blocks = make_blocks(self.groups, exchange)
        self.block_of = {place: block for block in self.blocks for place in block}
        self.indices = range(len(prompt_ids)) if indices is None else indices
        self.prompt_lengths = list(map(len, prompt_ids))
        self.ending = Ending(model, params, tokenizer)
        self.ranks = Ranks(model)
        self.decoder = self._decoder(params)
        self.steps_per_visit = self._steps_per_visit()
        self.waiting = list(self.blocks)
        if expected_lengths is not None:
            self.waiting.sort(key=lambda block: -max(expected_lengths[place] for place in block))
        self.running: list[Row] = []  # row of each slot, those of a group side by side
        self.ended: set[int] = set()  # places of groups whose last row has ended since they were last given out
        self.prefill: Prefill | None = None
        self.cache: PagedCache | None = None
        self.layout: Layout | None = None  # of the rows running, until they change
        self.stats = RolloutStats()
        self.prefill_tokens = self.options.prefill_tokens
        self.widest = max((sum(len(self.groups[place]) for place in block) for block in self.blocks), default=1)
        self.max_rows = max(self.widest, self.options.max_rows or sum(map(len, self.groups)))
        self.budget = CacheBudget.of(
            model, self.groups, self.blocks, self.prompt_lengths, self.max_rows, self.steps_per_visit, self.options
        )

    def _steps_per_visit(self) -> int:
        if self.ending.needs_host or self.ranks.together:
            return 1
        return self.options.steps_per_visit or (1 if self.model.device.type == "cpu" else 8)

    def _decoder(self, params: SamplingParams) -> Decoder:
        if not self.options.cuda_graphs:
            return Decoder(self.model, params, self.ending)
        if self.model.device.type != "cuda" or self.ranks.together or self.ending.needs_host:
            raise UserError(
                "cuda_graphs needs a whole model on a CUDA device and no stop strings: leave it off for this rollout."
            )
        why_not = why_not_recorded(self.model, torch.cuda.get_device_capability(self.model.device))
        if why_not is not None:
            raise UserError(f"cuda_graphs cannot record a step of this model, since {why_not}: leave it off.")
        return GraphDecoder(self.model, params, self.ending)

    def run(self) -> list[Group]:
        """Every group, in the order of the prompts."""
        made = dict(self.stream())
        return [made[place] for place in range(len(self.groups))]

    def stream(self) -> Generator[tuple[int, Group]]:
        """Every group with its place, as soon as its last row has ended. To be read to the end, or closed."""
        with closing(self.passes()) as passes:
            for ended in passes:
                yield from ended

    @torch.no_grad()
    def passes(self) -> Generator[list[tuple[int, Group]]]:
        """After each pass the groups, with their places, whose last row ended in it: often none.

        To be read to the end, or closed: until then the model is in eval mode, with weights packed as they were when it
        was begun.
        """
        started = time.monotonic()
        given: set[int] = set()
        with sampling_mode(self.model), nullcontext() if self.ranks.together else packed_weights(self.model):
            while self.ranks.any_has_work(mine := self.has_work(started)):
                if mine:
                    self.advance_or_shrink()
                else:
                    self.ranks.idle_forward()
                ended = sorted(self.ended - given)
                given.update(ended)
                self.ended.clear()
                yield [(place, self.group_at(place)) for place in ended]
        for row in (row for group in self.groups for row in group):
            row.finish_reason = row.finish_reason or "abort"
        yield [(place, self.group_at(place)) for place in range(len(self.groups)) if place not in given]

    def group_at(self, place: int) -> Group:
        rows = self.groups[place]
        return Group([row.tokens for row in rows], [row.logprobs for row in rows], [row.finish_reason for row in rows])

    def has_work(self, started: float) -> bool:
        options = self.options
        if options.deadline_s is not None and time.monotonic() - started > options.deadline_s:
            return False
        if options.cancelled is not None and options.cancelled():
            return False
        return bool(self.waiting or self.prefill or self.running)

    def advance(self) -> None:
        """One forward pass: a piece of a prefill while whole groups fit, else a step of what runs."""
        if self.prefill is None:
            self.prefill = self.next_prefill()
        if self.prefill is not None:
            self.prefill_chunk(self.prefill)
        else:
            self.decode()

    # Admission

    def next_prefill(self) -> Prefill | None:
        """The next waiting blocks that fit, of prompts of about one length; none: there is no room."""
        fitting = self.fitting()
        if not fitting:
            return None
        longest_of = {block: max(self.prompt_lengths[place] for place in block) for block in fitting}
        longest = max(longest_of.values())
        alike = [block for block in fitting if longest_of[block] >= SHORTEST_OF_LONGEST * longest]
        blocks = alike[: max(1, self.prefill_tokens // longest // len(alike[0]))]
        places = [place for block in blocks for place in block]
        prefill = Prefill(places, *pad_left([self.prompt_ids[place] for place in places], 0, self.model.device))
        taken = set(blocks)
        self.waiting = [block for block in self.waiting if block not in taken]
        return prefill

    def fitting(self) -> list[tuple[int, ...]]:
        """The first waiting blocks that can start beside what runs: rows, prompts, and a page to grow for each row."""
        rows, row_pages, prompt_pages = len(self.running), len(self.running), 0
        if self.cache is not None:
            row_pages, prompt_pages = row_pages + self.cache.rows.used, self.cache.prompts.used
        found: list[tuple[int, ...]] = []
        for block in self.waiting:
            new_rows = sum(len(self.groups[place]) for place in block)
            rows += new_rows
            row_pages += new_rows * self.budget.pages_per_visit
            prompt_pages += sum(self.budget.prompt_pages(self.prompt_lengths[place]) for place in block)
            alone = not self.running and not found  # fits: the budget was made for it
            room = row_pages <= self.budget.num_row_pages and prompt_pages <= self.budget.num_prompt_pages
            if rows > self.max_rows or not (alone or room):
                break
            found.append(block)
        return found

    def prefill_chunk(self, prefill: Prefill) -> None:
        """The next columns of the prompts, once a group; after the last ones the groups run."""
        columns = slice(prefill.done, prefill.done + max(1, self.prefill_tokens // len(prefill.places)))
        mask = prefill.mask[:, : columns.stop]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        # On prompt tokens all rows of a group are equal, and attention over equal rows gives one row's value.
        output = self.model(
            input_ids=prefill.ids[:, columns],
            attention_mask=mask,
            position_ids=positions[:, columns],
            past_key_values=prefill.cache,
            use_cache=True,
            logits_to_keep=1,
            **siblings(self.decoder.has_bridge, mask[:, None, columns].bool()),
        )
        self.stats.forwards += 1
        prefill.done = columns.stop
        if prefill.done >= prefill.ids.shape[1]:
            self.start(prefill, output.logits[:, -1])
            self.prefill = None  # not before: when memory runs out, what is named here starts again

    def start(self, prefill: Prefill, logits: Tensor) -> None:
        """Keep the prompts' keys and values, and draw the first token of every row. `logits`: [prompts, V]."""
        layers = [(layer.keys, layer.values) for layer in prefill.cache.layers]
        if self.cache is None:
            spare = spare_pages(self.max_rows) if isinstance(self.decoder, FilledDecoder) else 0
            self.cache = self.budget.make_cache([values for _, values in layers], spare)
        new = []
        for n, place in enumerate(prefill.places):
            length = self.prompt_lengths[place]
            self.cache.prompts.write(place, [(keys[n, :, -length:], values[n, :, -length:]) for keys, values in layers])
            group = self.groups[place]
            draws = group_uniforms(self.params.seed, [self.indices[place]], len(group), self.params.max_new_tokens)
            for row, uniforms in zip(group, draws.T.numpy(), strict=True):
                row.uniforms = uniforms
            new.extend(group)
        source = torch.tensor([n for n, place in enumerate(prefill.places) for _ in self.groups[place]])
        uniforms = torch.tensor([row.uniforms[0] for row in new], device=logits.device)
        tokens, logprobs = draw_tokens(logits[source.to(logits.device)], uniforms, self.params)
        stopped = self.ending.stopped(tokens, new)
        for row, *drawn in zip(new, tokens.tolist(), logprobs.tolist(), stopped.tolist(), strict=True):
            row.append(*drawn)
        self.running += new
        self.layout = None
        self.let_go(set())

    def decode(self) -> None:
        """The next steps of all rows that run; those go that have ended and were fed their last token."""
        pages = self.reserve(self.steps_per_visit)
        assert self.cache is not None
        if self.layout is None:
            self.layout = Layout.of(
                self.running, self.prompt_lengths, self.cache.rows, self.cache.prompts, self.model.device
            )
        drawn = [len(row.tokens) for row in self.running]
        self.decoder.run(self.running, self.layout, self.cache, pages)
        self.stats.forwards += len(pages)
        self.stats.steps += len(pages)
        self.stats.row_steps += len(pages) * len(self.running)
        rows = zip(self.running, drawn, strict=True)
        self.let_go({row.number for row, before in rows if len(row.tokens) - before < len(pages)})

    def let_go(self, fed: set[int]) -> None:
        """Free rows that have ended and were fed their last token, or whose last token nobody would see."""
        open_circles = {row.circle for row in self.running if not row.finish_reason}
        seen = {row.number for row in self.running if row.finish_reason} if not self.decoder.siblings_listen else fed
        gone = [row for row in self.running if row.number in seen or row.circle not in open_circles]
        if gone:
            assert self.cache is not None
            numbers = {row.number for row in gone}
            self.running = [row for row in self.running if row.number not in numbers]
            self.cache.rows.release(sorted(numbers))
            left = {row.group for row in gone} - {row.group for row in self.running}
            self.cache.prompts.release(sorted(left))
            self.ended |= left
            self.layout = None

    # Memory

    def reserve(self, steps: int) -> Tensor:
        """Pages for the next steps, int64 [steps, R]: that which each row writes to. Groups may have to start again."""
        assert self.cache is not None
        pages = self.cache.rows
        while sum(pages.missing(row.number, self.columns_after(row, steps)) for row in self.running) > pages.free:
            self.preempt_youngest()
        for row in self.running:
            if pages.missing(row.number, self.columns_after(row, steps)):
                pages.grow(row.number, self.columns_after(row, steps))
                self.layout = None
        self.note_peak()
        first = [(pages.of[row.number], len(row.tokens) - 1) for row in self.running]
        table = [[of[(column + step) // pages.columns] for of, column in first] for step in range(steps)]
        return torch.tensor(table, device=self.model.device)

    def columns_after(self, row: Row, steps: int) -> int:
        """The columns a row has when the next steps are done: a token drawn is written in the step that is fed it."""
        return len(row.tokens) - 1 + steps

    def preempt_youngest(self) -> None:
        """Take back the cache of the block admitted last: it starts again later, with the same draws."""
        assert self.cache is not None
        self.restart([self.block_of[self.running[-1].group]])
        self.stats.preempted += 1

    def restart(self, blocks: list[tuple[int, ...]]) -> None:
        places = {place for block in blocks for place in block}
        self.running = [row for row in self.running if row.group not in places]
        self.waiting = [*blocks, *self.waiting]
        self.layout = None
        rows = [row for place in places for row in self.groups[place]]
        for row in rows:
            row.restart()
        if self.cache is not None:  # the last, since moving pages may run out of memory
            self.cache.rows.release([row.number for row in rows])
            self.cache.prompts.release(sorted(places))

    def advance_or_shrink(self) -> None:
        """`advance`; when memory runs out, go on with half the rows and half the cache, and say so."""
        try:
            self.advance()
            return
        except (RuntimeError, MemoryError) as error:
            if self.ranks.together or not (isinstance(error, MemoryError) or should_reduce_batch_size(error)):
                raise  # alone, a rank cannot step back: the others wait in the same forward pass
        # Outside the handler, whose exception keeps the failed pass's tensors.
        self.shrink()

    def shrink(self) -> None:
        places = [row.group for row in self.running] + ([] if self.prefill is None else self.prefill.places)
        rows, tokens = len(self.running), self.budget.tokens
        self.prefill = None
        self.cache = None
        self.decoder.forget()
        self.restart(list(dict.fromkeys(self.block_of[place] for place in places)))
        clear_device_cache(garbage_collection=True)
        if self.max_rows == self.widest and self.prefill_tokens == 1 and self.budget == self.budget.halved():
            raise UserError(
                f"Out of memory with one group of {self.widest} rows at once: lower the width, max_new_tokens or the "
                "prompt."
            )
        self.max_rows = max(self.widest, min(self.max_rows, rows or self.max_rows) // 2)
        self.prefill_tokens = max(1, self.prefill_tokens // 2)
        self.budget = self.budget.halved()
        self.stats.shrunk += 1
        logger.warning(
            "Out of memory with %d rows and a cache of %d tokens: the rollout goes on with at most %d and %d.",
            rows,
            tokens,
            self.max_rows,
            self.budget.tokens,
        )

    def note_peak(self) -> None:
        assert self.cache is not None
        rows, prompts = self.cache.rows, self.cache.prompts
        tokens = rows.used * rows.columns + prompts.used * prompts.columns
        if tokens > self.stats.peak_cache_tokens:
            groups = {row.group for row in self.running}
            held = sum(len(row.tokens) for row in self.running) + sum(self.prompt_lengths[g] for g in groups)
            self.stats.peak_cache_tokens, self.stats.held_tokens_at_peak = tokens, held
