"""What is asked of a rollout, and what it gives back."""

import math
from collections.abc import Callable, Sequence, Sized
from contextlib import suppress
from dataclasses import dataclass, field
from numbers import Integral, Real
from operator import index
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from bridge_rl.errors import UserError, check_kind, is_list
from bridge_rl.group import exchanged_circles
from bridge_rl.rollout.sampling import SamplingParams
from bridge_rl.surgery import check_family, has_bridge


@dataclass(frozen=True)
class Group:
    """The completions of one prompt that were sampled together, each a list over the N rows.

    tokens: ids, with the EOS where one was drawn. logprobs: of each token at the sampling temperature.
    finish_reasons: `stop` at an EOS or a stop string, `length` at the limit, `abort` where the rollout was cut short
    (such a row has the tokens drawn until then, none if its group was never begun or was to start again).
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]
    finish_reasons: list[str]


@dataclass(frozen=True)
class RolloutOptions:
    """How a rollout is run: none of it changes a token, except that it may be cut short.

    That holds in fp32. In bf16 a product rounds by how many rows it has, so that tokens may differ wherever other rows
    are run together; their log-probs are as near to the full forward pass either way.

    max_rows: rows at once (at least one group), by default all.
    max_cache_tokens: tokens whose keys and values are held at once, prompts counted once a group; by default as many
    as free memory holds. When they are used up, the youngest group starts again later.
    deadline_s: seconds after which rows that have not ended are cut. cancelled: asked between steps, cuts
    them when true.
    steps_per_visit: decode steps between two looks of the scheduler, each of which waits for the device; by default 1
    on CPU, 8 on CUDA, and always 1 with stop strings and from shards. A row that ends in between runs on unseen until
    the next look.
    cuda_graphs: record decode steps as CUDA graphs, which spares the launches of their kernels. Not yet run on a GPU.
    prefill_tokens: prompt tokens, padding included, in one forward pass; longer prompts are prefilled in chunks.
    """

    max_rows: int | None = None
    max_cache_tokens: int | None = None
    deadline_s: float | None = None
    cancelled: Callable[[], bool] | None = None
    steps_per_visit: int | None = None
    prefill_tokens: int = 8192
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        for name in ("max_rows", "max_cache_tokens", "deadline_s", "steps_per_visit", "prefill_tokens"):
            value = getattr(self, name)
            if value is None and name != "prefill_tokens":
                continue
            check_kind(name, value, Real if name == "deadline_s" else Integral)
            if not value > 0:
                raise UserError(f"{name} is {value}: it must be above 0.")
        check_kind("cuda_graphs", self.cuda_graphs, bool)
        if self.cancelled is not None and not callable(self.cancelled):
            raise UserError(f"cancelled is {self.cancelled!r}: give a function that says whether to stop.")


@dataclass
class RolloutStats:
    """What a rollout took.

    forwards: passes through the model; steps: those that were decode steps; row_steps: rows over all steps.
    peak_cache_tokens: most columns of pages in use at once; held_tokens_at_peak: of them those that held a token.
    preempted: groups begun again for want of cache; shrunk: times that memory ran out.
    """

    forwards: int = 0
    steps: int = 0
    row_steps: int = 0
    peak_cache_tokens: int = 0
    held_tokens_at_peak: int = 0
    preempted: int = 0
    shrunk: int = 0


@dataclass
class Row:
    """One completion while it is sampled."""

    number: int  # among all rows of the rollout
    group: int  # place of its prompt
    circle: int  # rows of one circle hear each other; that of a group is its place, unless siblings are exchanged
    limit: int  # of its tokens
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = ""
    uniforms: Any = None  # its draws, one a step

    def append(self, token: int, logprob: float, stopped: bool) -> None:
        check_logprob(logprob)
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if stopped:
            self.finish_reason = "stop"
        elif len(self.tokens) == self.limit:
            self.finish_reason = "length"

    def restart(self) -> None:
        self.tokens, self.logprobs, self.finish_reason, self.uniforms = [], [], "", None


def make_rows(
    model: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    width: int | Sequence[int],
    params: SamplingParams,
    indices: Sequence[int] | None,
    limits: Sequence[Sequence[int]] | None,
    expected_lengths: Sequence[float] | None,
) -> list[list[Row]]:
    """The rows of each group, none begun. Raises ValueError for what cannot be sampled."""
    check_family(model, "Sampling")
    if not isinstance(params, SamplingParams):
        raise UserError(f"params is {params!r:.60}: give bridge_rl.SamplingParams(max_new_tokens=...).")
    if getattr(model.config, "bridge", None) and not has_bridge(model):
        raise UserError("The model's config names a Bridge that is not there: load it with bridge_rl.load_bridge.")
    check_prompts(model, prompt_ids)
    if not is_list(width):
        check_kind("width", width, Integral)
    widths: list[int] = list(width) if isinstance(width, Sized) else [int(width)] * len(prompt_ids)
    if len(widths) != len(prompt_ids):
        raise UserError(
            f"width has {len(widths)} entries for {len(prompt_ids)} prompts: give one a prompt, or one int."
        )
    for place, wide in enumerate(widths):
        check_kind(f"width of prompt {place}", wide, Integral)
        if wide < 1:
            raise UserError(f"width is {wide} for prompt {place}: it must be at least 1.")
    if limits is None:
        limits = [[params.max_new_tokens] * wide for wide in widths]
    if lengths_of(limits) != widths or not all(
        isinstance(limit, Integral) and 1 <= int(limit) <= params.max_new_tokens for group in limits for limit in group
    ):
        raise UserError("limits must give each row of each group a whole number from 1 to max_new_tokens.")
    for name, values, kind in (("indices", indices, Integral), ("expected_lengths", expected_lengths, Real)):
        if values is not None:
            check_one_a_prompt(name, values, kind, len(prompt_ids))
    check_positions(model, [len(prompt) + max(group) for prompt, group in zip(prompt_ids, limits, strict=True)])
    numbers = iter(range(sum(widths)))
    return [[Row(next(numbers), place, place, limit) for limit in group] for place, group in enumerate(limits)]


def lengths_of(groups: Any) -> list[int] | None:
    """Of the lists in a list; None where it is none, or one of something else."""
    return list(map(len, groups)) if is_list(groups) and all(map(is_list, groups)) else None


def check_one_a_prompt(name: str, values: Any, kind: type, num_prompts: int) -> None:
    check_kind(name, values, Sized)
    if len(values) != num_prompts:
        raise UserError(f"{name} has {len(values)} entries for {num_prompts} prompts: give one a prompt.")
    for place, value in enumerate(values):
        check_kind(f"{name} of prompt {place}", value, kind)
        if value < 0:
            raise UserError(f"{name} of prompt {place} is {value}: it must not be negative.")


def check_prompts(model: PreTrainedModel, prompt_ids: Any) -> None:
    """Raise UserError unless they are lists of ids that the model knows, at least one in each."""
    check_kind("prompt_ids", prompt_ids, Sized)
    for place, prompt in enumerate(prompt_ids):
        check_tokens(f"Prompt {place}", prompt, model)
        if not len(prompt):
            raise UserError(f"Prompt {place} has no tokens: give every group at least one.")


def check_tokens(name: str, tokens: Any, model: PreTrainedModel) -> None:
    """Raise UserError unless `tokens` is a list of ids that the model knows, be it empty."""
    vocabulary = model.get_input_embeddings().num_embeddings
    ids: list[int] | None = None
    if is_list(tokens):
        with suppress(TypeError):  # of texts, fractions or lists
            ids = [index(token) for token in tokens]
    if ids is None:
        raise UserError(f"{name} is {tokens!r:.60}: give each as a list of token ids.")
    if ids and not 0 <= min(ids) <= max(ids) < vocabulary:
        raise UserError(
            f"{name} has tokens from {min(ids)} to {max(ids)}, and the model knows 0 to {vocabulary - 1}: use its own "
            "tokenizer."
        )


def check_logprob(logprob: float) -> None:
    if math.isnan(logprob):
        raise UserError(
            "The model's logits are not finite: its weights hold NaN or infinities, or overflow in its dtype. "
            "Check the checkpoint, or use another dtype."
        )


def check_positions(model: PreTrainedModel, lengths: Sequence[int]) -> None:
    """Raises UserError if a row may become so long that it changes what other rows of a batch say.

    `lengths`: most tokens of each group's rows.
    """
    known = steady_positions(model.config)
    if known is not None and max(lengths, default=0) > known:
        raise UserError(
            f"Prompt {lengths.index(max(lengths))} and its completion may take {max(lengths)} tokens. Beyond {known} "
            "the model's position embeddings depend on the longest row that runs, and groups would change each other's "
            "tokens: lower max_new_tokens, or shorten the prompt."
        )


def known_positions(config: PretrainedConfig) -> int | None:
    """How many positions a row may take, its prompt included; None: the model declares no limit."""
    return steady_positions(config) or getattr(config.get_text_config(), "max_position_embeddings", None)


def length_limit(config: PretrainedConfig, num_prompt_tokens: int, asked: int | None, default: int) -> int:
    """How many tokens a completion may have: those asked for, else `default`, or what the positions leave of it.

    Raises UserError where they leave less than was asked for, or nothing.
    """
    context = known_positions(config)
    room = max(default, asked or 0) if context is None else context - num_prompt_tokens
    limit = min(default, room) if asked is None else asked
    if room < max(1, limit):
        raise UserError(
            f"The prompt has {num_prompt_tokens} tokens, which leaves {room} of the model's {context} positions: ask "
            "for no more tokens, or shorten the prompt."
        )
    return limit


def steady_positions(config: PretrainedConfig) -> int | None:
    """How many positions have embeddings that do not depend on other rows; None: all.

    transformers chooses the frequencies of `dynamic` and `longrope` rotary embeddings by the longest row of a forward
    pass, above the length that the model was first trained at.
    """
    config = config.get_text_config()
    changing = [rope for rope in ropes(config) if rope.get("rope_type") in ("dynamic", "longrope")]
    known = [rope.get("original_max_position_embeddings") or config.max_position_embeddings for rope in changing]
    return min(known, default=None)


def ropes(config: PretrainedConfig) -> list[dict[str, Any]]:
    """Parameters of rotary embeddings: some families have some for each kind of layer, or none for a kind."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return [rope for rope in (parameters, *parameters.values()) if isinstance(rope, dict)]


def make_blocks(groups: list[list[Row]], exchange: Sequence[Sequence[int]] | None) -> list[tuple[int, ...]]:
    """Places of groups that start together: each alone, or those of `exchange`, whose rows then hear each other.

    Raises ValueError unless `exchange` names every place once, in blocks of as many groups as each has rows.
    """
    if exchange is None:
        return [(place,) for place in range(len(groups))]
    named = [] if lengths_of(exchange) is None else [place for block in exchange for place in block]
    if not all(isinstance(place, Integral) for place in named) or sorted(named) != list(range(len(groups))):
        raise UserError(f"exchange must name each of the {len(groups)} prompts once.")
    for block in exchange:
        widths = {len(groups[place]) for place in block}
        if widths != {len(block)}:
            raise UserError(
                f"exchange has a block of {len(block)} groups of widths {sorted(widths)}: all must be equal."
            )
        for place, circles in zip(block, exchanged_circles(block), strict=True):
            for row, circle in zip(groups[place], circles, strict=True):
                row.circle = circle
    return [tuple(block) for block in exchange]
