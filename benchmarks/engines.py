"""Engines that sample the same rows of one model: ours, Hugging Face `generate`, continuous batching, TRL's own path.

An engine takes a model and a `Work` and returns what it counted. Rows end by length only, each at a length fixed
beforehand, which ours takes as `limits`, continuous batching as `max_new_tokens` of a request, and `generate` as a
stopping criterion in the place of an EOS. All sample from the plain softmax at temperature 1. Only ours can run a
Bridge: the others are measured with it disabled, which leaves the base model.
"""

import ctypes
import gc
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.utils import WorkloadHints
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import pad

import bridge_rl as br
from bridge_rl.rollout.engine import Rollout, RolloutOptions

Rows = list[tuple[list[int], int]]  # (prompt, length)
STATM = Path("/proc/self/statm")
PAGE_BYTES = 4096
CPU_PAGE_TOKENS = 16  # of continuous batching: prompts are shared by whole pages


@dataclass(frozen=True)
class Work:
    """What all engines sample: a prompt for each group, a length for each row of it, `max_rows` at once.

    They may prepare for prompts of `prompt_limit` tokens and rows of `limit`, in the warm-up too.
    """

    prompts: list[list[int]]
    lengths: list[list[int]]
    prompt_limit: int
    limit: int
    max_rows: int

    @property
    def width(self) -> int:
        return len(self.lengths[0])

    @property
    def useful_tokens(self) -> int:
        return sum(map(sum, self.lengths))

    def rows(self) -> Rows:
        """(prompt, length) of every row, group by group, for engines to which rows are independent."""
        return [(prompt, length) for prompt, group in zip(self.prompts, self.lengths, strict=True) for length in group]

    def warm_up(self) -> "Work":
        """Two tokens a row, on other prompts, lest a cache of prefixes find them again.

        A GPU gets as many rows as will run at once, since kernels are compiled for a shape.
        """
        groups = max(1, self.max_rows // self.width) if torch.cuda.is_available() else 2
        lengths = [[min(2, length) for length in group] for group in self.lengths[:groups]]
        return replace(self, prompts=[prompt[::-1] for prompt in self.prompts[:groups]], lengths=lengths)


Counts = dict[str, int]  # `useful_tokens` and, of ours, what its cache held
Engine = Callable[[PreTrainedModel, Work], Counts]


def without_bridge(engine: Engine) -> Engine:
    def run(model: PreTrainedModel, work: Work) -> Counts:
        with br.disable_bridge(model):
            return engine(model, work)

    return run


def make_rollout(model: PreTrainedModel, work: Work, cuda_graphs: bool = False) -> Rollout:
    params = br.SamplingParams(work.limit, eos_token_id=[])
    options = RolloutOptions(max_rows=work.max_rows, cuda_graphs=cuda_graphs)
    return Rollout(model, work.prompts, work.width, params, limits=work.lengths, options=options)


def run_rollout(model: PreTrainedModel, work: Work, cuda_graphs: bool = False) -> tuple[Rollout, int]:
    """Ours, for its statistics, and the number of tokens sampled."""
    rollout = make_rollout(model, work, cuda_graphs)
    groups = rollout.run()
    return rollout, sum(len(row) for group in groups for row in group.tokens)


def ours(model: PreTrainedModel, work: Work, cuda_graphs: bool = False) -> Counts:
    rollout, tokens = run_rollout(model, work, cuda_graphs)
    stats = rollout.stats
    return {
        "useful_tokens": tokens,
        "steps": stats.steps,
        "peak_cache_tokens": stats.peak_cache_tokens,
        "held_tokens_at_peak": stats.held_tokens_at_peak,
    }


class RowLengths(StoppingCriteria):
    """Ends each row of a batch at a length of its own, as an EOS would."""

    def __init__(self, prompt: int, lengths: list[int], device: torch.device) -> None:
        self.prompt, self.lengths = prompt, torch.tensor(lengths, device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return input_ids.shape[1] - self.prompt >= self.lengths


def plain_sampling(model: PreTrainedModel, work: Work, **more: Any) -> GenerationConfig:
    """Temperature 1, nothing cut off, no logits processor. The EOS lies outside the vocabulary: it is never drawn."""
    never = model.config.get_text_config().vocab_size
    return GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=work.limit, eos_token_id=never, pad_token_id=0, **more
    )


def padded(rows: Rows, device: torch.device) -> dict[str, Tensor]:
    """Left-padded prompts of rows and their mask, by TRL's own function."""
    prompts = [torch.tensor(prompt) for prompt, _ in rows]
    ids = pad(prompts, padding_value=0, padding_side="left")
    mask = pad([torch.ones_like(prompt) for prompt in prompts], padding_value=0, padding_side="left")
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def stop_at_lengths(inputs: dict[str, Tensor], rows: Rows) -> StoppingCriteriaList:
    ids = inputs["input_ids"]
    return StoppingCriteriaList([RowLengths(ids.shape[1], [length for _, length in rows], ids.device)])


def hf_generate(model: PreTrainedModel, work: Work, cache: str) -> Counts:
    """`model.generate` on independent rows in batches of `max_rows`; each batch runs until its longest row ends.

    cache: `dynamic` grows by concatenation; `static` is preallocated, once for the longest prompt and the limit, so
    that all batches have one shape. transformers compiles the decode step of a static cache on CUDA by itself (the
    warm-up pays for it) and never on CPU, where `static` is thus the preallocated cache alone.
    """
    longest = work.prompt_limit + work.limit
    static = {"cache_implementation": "static", "max_cache_len": longest} if cache == "static" else {}
    config = plain_sampling(model, work, **static)
    rows = work.rows()
    for start in range(0, len(rows), work.max_rows):
        batch = rows[start : start + work.max_rows]
        inputs = padded(batch, model.device)
        output = model.generate(**inputs, generation_config=config, stopping_criteria=stop_at_lengths(inputs, batch))
        assert output.shape[1] == inputs["input_ids"].shape[1] + max(length for _, length in batch)
    return {"useful_tokens": work.useful_tokens}


def continuous_batching(model: PreTrainedModel, work: Work, share: float = 1.0) -> Counts:
    """transformers' continuous batching, at most `share * max_rows` rows at once: new rows enter as others end.

    This is `model.generate_batch`, opened up, since that takes one `max_new_tokens` for all: the same manager, with a
    request for each row. It is kept from the warm-up on (`persistent_manager`), so that graphs are captured once, and
    gives the model its attention back. On CUDA its defaults stand: flash attention where it is installed, pages of 256.

    On CPU it packs all rows into one sequence under a block-diagonal mask, so that each token is compared with the keys
    of every row, and attention grows with the square of the rows. Its fastest settings there are SDPA rather than
    paged eager, no more tokens in a step than rows (its default is 8,192), small pages, by which rows of a group share
    most of their prompt, and at times fewer rows at once: hence `share`, of which two values are measured.
    """
    max_rows = max(1, int(work.max_rows * share))
    manager_kwargs: dict[str, Any] = {
        "generation_config": plain_sampling(model, work),
        "continuous_batching_config": paged_config(work, max_rows),
        "workload_hints": WorkloadHints(work.prompt_limit, work.limit, len(work.rows())),
        "persistent_manager": True,  # `measure` destroys it
    }
    tokens = 0
    with model.continuous_batching_context_manager(**manager_kwargs) as manager:
        wanted = {manager.add_request(prompt, max_new_tokens=length): length for prompt, length in work.rows()}
        while wanted:
            result = manager.get_result(timeout=1)
            if result is None and not manager.is_running():
                raise RuntimeError("Continuous batching ended before its requests did.")
            if result is not None and result.is_finished():
                length = wanted.pop(result.request_id)
                assert len(result.generated_tokens) == length, result.error
                tokens += length
    return {"useful_tokens": tokens}


def paged_config(work: Work, max_rows: int) -> ContinuousBatchingConfig:
    """Pages for `max_rows` of the longest rows, and a sixth more: below 15 % free pages it admits no row.

    Left to itself it would take most of the memory of the machine.
    """
    cuda = torch.cuda.is_available()
    page = 256 if cuda else CPU_PAGE_TOKENS
    pages_a_row = -(-(work.prompt_limit + work.limit) // page)
    return ContinuousBatchingConfig(
        page_size=page,
        num_blocks=int(max_rows * pages_a_row / 0.85) + 1,
        max_batch_tokens=None if cuda else max_rows,
        max_requests_per_batch=max_rows,
    )


def trl_generate(model: PreTrainedModel, work: Work) -> Counts:
    """What `GRPOTrainer._generate_single_turn` of TRL 1.16 does without vLLM, by TRL's functions, without a trainer.

    It is `generate` with a dynamic cache, compilation off, on left-padded prompts, each repeated for its rows. It
    differs from `hf_generate` in that TRL does not bound the rows: all run as one batch until the longest ends, in as
    much memory as that takes. The stopping criterion stands for the EOS. TRL's `use_transformers_continuous_batching`
    is `generate_batch`, which is measured as such.
    """
    never = model.config.get_text_config().vocab_size
    kwargs: dict[str, Any] = {
        "max_new_tokens": work.limit,
        "do_sample": True,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": [never],
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": None,
        "repetition_penalty": 1.0,
        "cache_implementation": None,
    }
    config = GenerationConfig(**kwargs, disable_compile=True)
    rows = work.rows()
    inputs = padded(rows, model.device)
    with unwrap_model_for_generation(model, Accelerator(), generation_kwargs=kwargs) as unwrapped, torch.no_grad():
        stop = stop_at_lengths(inputs, rows)
        output = unwrapped.generate(**inputs, generation_config=config, stopping_criteria=stop)
    completions = output[:, inputs["input_ids"].shape[1] :].tolist()
    return {"useful_tokens": sum(len(row[:length]) for row, (_, length) in zip(completions, rows, strict=True))}


class PeakMemory:
    """MiB at the peak of a `with` block. CUDA: all that was allocated, weights included. Linux: how much the resident
    memory grew, read every 10 ms. Elsewhere: None."""

    def __init__(self) -> None:
        self.mib: float | None = None
        self.ended = threading.Event()
        self.thread: threading.Thread | None = None

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        elif sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)  # give back what an earlier engine has freed
            self.before = self.peak = resident_bytes()
            self.thread = threading.Thread(target=self.watch, daemon=True)
            self.thread.start()
        return self

    def watch(self) -> None:
        while not self.ended.wait(0.01):
            self.peak = max(self.peak, resident_bytes())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.ended.set()
        if self.thread is not None:
            self.thread.join()
            self.mib = (self.peak - self.before) / 2**20
        elif torch.cuda.is_available():
            self.mib = torch.cuda.max_memory_allocated() / 2**20


def resident_bytes() -> int:
    return int(STATM.read_text().split()[1]) * PAGE_BYTES


def synchronized_seconds() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(engine: Engine, model: PreTrainedModel, work: Work) -> dict[str, Any]:
    """Once, after a short warm-up: seconds, useful tokens per second, peak memory. Every row must reach its length."""
    engine(model, work.warm_up())
    with PeakMemory() as memory:
        start = synchronized_seconds()
        counts = engine(model, work)
        seconds = synchronized_seconds() - start
    model.destroy_cached_continuous_batching_manager()
    assert counts["useful_tokens"] == work.useful_tokens
    speed = work.useful_tokens / seconds
    return {"seconds": seconds, "useful_tokens_per_second": speed, "peak_memory_mib": memory.mib, **counts}
