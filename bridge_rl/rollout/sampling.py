"""Draw tokens so that a group's draws depend on nothing but its seed, its index and the step."""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bridge_rl.errors import UserError, check_kind, is_list
from bridge_rl.group import merge_rows

LEAST_TEMPERATURE = 0.01  # of draws; the next is 0, greedy
CDF_BLOCK = 128  # divides the vocabularies of the served families, so that nothing is padded


@dataclass(frozen=True)
class SamplingParams:
    """How completions are drawn.

    max_new_tokens: limit of each completion, EOS included.
    temperature: 0 is greedy; log-probs are then those of temperature 1.
    seed: of all draws; those of a group depend on it and on the group's index alone.
    top_p, top_k: 1.0 and 0 switch them off. They choose tokens; the log-probs are of the full distribution.
    eos_token_id: one id or several; None: those of the model's generation config.
    stop_strings: a row ends with the token that completes one of them, which it keeps; they need a tokenizer.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    eos_token_id: int | Sequence[int] | None = None
    stop_strings: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "top_k", "seed"):
            check_kind(name, getattr(self, name), Integral)
        check_kind("top_p", self.top_p, Real)
        for token in ids_of(self.eos_token_id):
            check_kind("eos_token_id", token, Integral)
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}: it must be at least 1.")
        check_temperature(self.temperature)
        if not 1e-6 <= self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}: it must be between 1e-6 and 1.")
        if not is_list(self.stop_strings) or not all(isinstance(stop, str) and stop for stop in self.stop_strings):
            raise UserError(f"stop_strings is {self.stop_strings!r}: give a list of strings that are not empty.")
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}: it must not be negative.")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}: it must not be negative (0 switches it off).")


def check_temperature(temperature: float) -> None:
    """Raise UserError for one at which the scaled logits overflow, or no token is left, in float32."""
    check_kind("temperature", temperature, Real)
    if temperature != 0 and not LEAST_TEMPERATURE <= temperature < float("inf"):
        raise UserError(f"temperature is {temperature}: it must be 0 (greedy) or at least {LEAST_TEMPERATURE}.")


def ids_of(eos_token_id: Any) -> list[int]:
    """One id, several or None, as a list."""
    if eos_token_id is None:
        return []
    return list(eos_token_id) if is_list(eos_token_id) or isinstance(eos_token_id, Set) else [eos_token_id]


def stream_seed(seed: int, purpose: Literal["training", "warmup", "evaluation", "refill"], number: int = 0) -> int:
    """A seed for each use of a run's seed, so that no two of them draw alike. `number`: of the batch.

    With `seed` 0 single groups still do: what numpy's SeedSequence makes of (number, index) is the same for some.
    """
    purposes = ("training", "warmup", "evaluation", "refill")
    return (seed << 40) + (purposes.index(purpose) << 32) + number


def group_uniforms(seed: int, indices: Sequence[int], width: int, steps: int) -> Tensor:
    """Uniform draws [steps, B], fp32. Those of a group depend on `seed` and its index alone."""
    draws = []
    for index in indices:
        state = int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0])
        generator = torch.Generator().manual_seed(state)
        draws.append(torch.rand(steps, width, generator=generator, dtype=torch.float32))  # whatever torch's default is
    return merge_rows(torch.stack(draws).permute(0, 2, 1)).T.contiguous()


def scaled_logprobs(logits: Tensor, temperature: float) -> Tensor:
    """log-softmax in fp32 of `logits` [..., V] over the temperature (1 for greedy)."""
    return (logits.float() / (temperature or 1.0)).log_softmax(dim=-1)


def draw_tokens(logits: Tensor, uniforms: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """One token a row from `logits` [B, V] by inverting the CDF at `uniforms` [B] -> (tokens [B], log-probs [B])."""
    if params.temperature == 0:
        logprobs = scaled_logprobs(logits, params.temperature)
        tokens = logprobs.argmax(dim=-1)
        return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]
    # Where there is nothing to do, a pass over [B, V] is spared here and in `invert_cdf`.
    scaled = logits.float() if params.temperature == 1 else logits.float() / params.temperature
    probs = scaled.softmax(dim=-1)
    tokens = invert_cdf(_truncate(probs, params), uniforms)
    return tokens, probs.gather(-1, tokens[:, None])[:, 0].log()


def invert_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The first index of each row at which the running sum of `weights` [B, V] passes its share of the total, [B].

    First the block, then the place in it: one pass over the weights, and two short running sums. Of weights that are
    NaN it is any index.
    """
    missing = -weights.shape[-1] % CDF_BLOCK
    blocks = (F.pad(weights, (0, missing)) if missing else weights).unflatten(-1, (-1, CDF_BLOCK))
    sums = blocks.sum(dim=-1).cumsum(dim=-1)
    target = _below(uniforms * sums[:, -1], sums[:, -1])
    block = torch.searchsorted(sums, target[:, None], right=True).clamp_(max=blocks.shape[1] - 1)  # [B, 1]
    before = F.pad(sums, (1, 0)).gather(-1, block)[:, 0]
    within = blocks.gather(1, block[:, :, None].expand(-1, 1, CDF_BLOCK))[:, 0].cumsum(dim=-1)
    place = torch.searchsorted(within, _below(target - before, within[:, -1])[:, None], right=True)
    return (block * CDF_BLOCK + place)[:, 0].clamp_(max=weights.shape[-1] - 1)


def _below(x: Tensor, total: Tensor) -> Tensor:
    """`x`, or what comes just under the total: so that, after rounding too, no index of weight 0 is found."""
    return torch.minimum(x, torch.nextafter(total, torch.zeros_like(total)))


def _truncate(probs: Tensor, params: SamplingParams) -> Tensor:
    """Zero the probabilities [B, V] outside the top k and the smallest set whose mass reaches top_p."""
    if 0 < params.top_k < probs.shape[-1]:
        kth = probs.topk(params.top_k, dim=-1).values[:, -1:]
        probs = probs.masked_fill(probs < kth, 0.0)
    if params.top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True)
        ordered = ordered / ordered.sum(dim=-1, keepdim=True)
        beyond = ordered.cumsum(dim=-1) - ordered >= params.top_p
        probs = probs.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), 0.0)
    return probs
