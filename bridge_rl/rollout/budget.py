"""How much cache a rollout may have, in pages, from the memory that is free."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import psutil
import torch
from transformers import PreTrainedModel

from bridge_rl.errors import UserError
from bridge_rl.rollout.cache import PagedCache
from bridge_rl.rollout.pages import Pages, pages_for
from bridge_rl.rollout.request import RolloutOptions, Row

# Half a page is unused on average. Rows that may be long can afford larger ones, which are fewer to add up: at least
# LEAST_PAGES of them hold a row at its limit.
LEAST_ROW_PAGE, LARGEST_ROW_PAGE, LEAST_PAGES = 8, 64, 32
PROMPT_PAGES, PROMPT_PADDING = (128, 64, 32), 1.05
# Share of free memory for the cache; the rest is for activations. On CPU other programs live there too.
CUDA_SHARE, CPU_SHARE = 0.8, 0.5


@dataclass(frozen=True)
class CacheBudget:
    """Pages for rows and for prompts. `least_*`: what the largest block needs alone; `visit`: columns a visit adds."""

    row_page: int
    prompt_page: int
    num_row_pages: int
    num_prompt_pages: int
    least_row_pages: int
    least_prompt_pages: int
    visit: int

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        groups: Sequence[Sequence[Row]],
        blocks: Sequence[Sequence[int]],
        prompt_lengths: Sequence[int],
        max_rows: int,
        visit: int,
        options: RolloutOptions,
    ) -> "CacheBudget":
        """What all rows could need, bounded by the options or by free memory.

        `blocks`: places of groups that run together. Raises ValueError if that is less than one of them needs.
        """
        limits = sorted((row.limit for group in groups for row in group), reverse=True)
        row_page = row_page_for(limits[0] if limits else 0)
        prompt_page = prompt_page_for(prompt_lengths)
        needs = [sum(pages_for(row.limit + visit, row_page) for row in group) for group in groups]
        prompts = [pages_for(length, prompt_page) for length in prompt_lengths]
        budget = cls(
            row_page=row_page,
            prompt_page=prompt_page,
            # One page more than a row can need, since admission leaves one free for each row that runs.
            num_row_pages=sum(pages_for(limit + visit, row_page) + 1 for limit in limits[:max_rows]),
            num_prompt_pages=sum(sorted(prompts, reverse=True)[:max_rows]),  # of each group one row may be left
            least_row_pages=max((sum(needs[place] for place in block) for block in blocks), default=0),
            least_prompt_pages=max((sum(prompts[place] for place in block) for block in blocks), default=0),
            visit=visit,
        )
        tokens = options.max_cache_tokens
        if tokens is None:
            tokens = int(free_memory(model.device) // bytes_per_token(model))
        return budget.bounded(tokens)

    def bounded(self, tokens: int) -> "CacheBudget":
        """With room for at most `tokens`; prompts have at most half of it, unless one alone needs more."""
        if tokens >= self.tokens:
            return self
        least = self.least_row_pages * self.row_page + self.least_prompt_pages * self.prompt_page
        if tokens < least:
            raise UserError(
                f"The cache has room for {tokens} tokens, and one group with its prompt can need {least} (all groups "
                "of a block, where siblings are exchanged): raise max_cache_tokens, free memory, or lower the width, "
                "max_new_tokens or the prompt."
            )
        half = max(self.least_prompt_pages, tokens // 2 // self.prompt_page)
        prompts = min(self.num_prompt_pages, half)
        rows = (tokens - prompts * self.prompt_page) // self.row_page
        if rows < self.least_row_pages:
            rows = self.least_row_pages
            prompts = (tokens - rows * self.row_page) // self.prompt_page
        return replace(self, num_row_pages=min(rows, self.num_row_pages), num_prompt_pages=prompts)

    def halved(self) -> "CacheBudget":
        """Half the room, or that of one block."""
        rows = max(self.least_row_pages, self.num_row_pages // 2)
        return replace(
            self, num_row_pages=rows, num_prompt_pages=max(self.least_prompt_pages, self.num_prompt_pages // 2)
        )

    @property
    def tokens(self) -> int:
        return self.num_row_pages * self.row_page + self.num_prompt_pages * self.prompt_page

    @property
    def pages_per_visit(self) -> int:
        return pages_for(self.visit, self.row_page)

    def prompt_pages(self, length: int) -> int:
        return pages_for(length, self.prompt_page)

    def make_cache(self, values: Sequence[torch.Tensor], spare: int = 0) -> PagedCache:
        """An empty cache for a model whose layers have `values` [B, H, T, K], with `spare` more pages for rows."""
        return PagedCache(
            rows=Pages(self.num_row_pages, self.row_page, values, spare),
            prompts=Pages(self.num_prompt_pages, self.prompt_page, values),
        )


def row_page_for(limit: int) -> int:
    """Columns of a page of rows that have at most `limit`: a power of two."""
    columns = max(LEAST_ROW_PAGE, limit // LEAST_PAGES)
    return min(LARGEST_ROW_PAGE, 1 << (columns.bit_length() - 1))


def prompt_page_for(lengths: Sequence[int]) -> int:
    """The largest page that pads the prompts by no more than PROMPT_PADDING."""
    for page in PROMPT_PAGES:
        if sum(pages_for(length, page) * page for length in lengths) <= PROMPT_PADDING * sum(lengths):
            return page
    return LEAST_ROW_PAGE


def bytes_per_token(model: PreTrainedModel) -> int:
    """Of keys and values in all layers."""
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    device_type = model.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else model.dtype
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * dtype.itemsize


def free_memory(device: torch.device) -> float:
    """Bytes for the cache, of those free on `device`, which on CPU the ranks of a machine share."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return CUDA_SHARE * (free + kept)
    return CPU_SHARE * psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
