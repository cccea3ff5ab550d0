"""Sampling long-tailed groups: ours against Hugging Face `generate`, on the same model, prompts and lengths.

`python benchmarks/rollout.py` writes `benchmarks/results/rollout.json`. The model is a random Llama of the shape of
SmolLM2-135M. Every row's length is fixed beforehand (most short, few at the limit), the same for all engines; useful
tokens per second count a row's own tokens only. At most 64 rows run at once.
"""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from block_cost import make_model
from transformers import LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList

import bridge_rl as br
from bridge_rl.report.results import provenance

RESULT = Path(__file__).parent / "results" / "rollout.json"
GROUPS, WIDTH, MAX_ROWS, PROMPT, LIMIT = 32, 4, 64, 32, 96
NO_EOS = 49151  # never drawn: rows end by length


def long_tailed_lengths() -> list[list[int]]:
    """Mean about a quarter of the limit: an exponential, cut at the limit, with one row in sixteen at it."""
    rng = random.Random(0)

    def draw() -> int:
        return LIMIT if rng.random() < 1 / 16 else min(LIMIT, 1 + int(rng.expovariate(5 / LIMIT)))

    return [[draw() for _ in range(WIDTH)] for _ in range(GROUPS)]


class RowLengths(StoppingCriteria):
    """Ends each row of a batch at a length of its own."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        return (input_ids.shape[1] - PROMPT >= self.lengths).to(input_ids.device)


def ours(model: LlamaForCausalLM, prompts: list[list[int]], lengths: list[list[int]]) -> int:
    params = br.SamplingParams(LIMIT, eos_token_id=[])
    groups = br.generate_groups(model, prompts, WIDTH, params, max_rows=MAX_ROWS, limits=lengths)
    return sum(len(row) for group in groups for row in group.tokens)


def hf_generate(model: LlamaForCausalLM, prompts: list[list[int]], lengths: list[list[int]]) -> int:
    """Independent rows in batches of `MAX_ROWS`; each batch runs until its longest row ends."""
    rows = [(prompt, length) for prompt, group in zip(prompts, lengths, strict=True) for length in group]
    for start in range(0, len(rows), MAX_ROWS):
        batch = rows[start : start + MAX_ROWS]
        ids = torch.tensor([prompt for prompt, _ in batch], device=model.device)
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=0,
            max_new_tokens=LIMIT,
            eos_token_id=NO_EOS,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([RowLengths([length for _, length in batch])]),
        )
    return sum(map(sum, lengths))


def measure(
    engine: Callable[[LlamaForCausalLM, list[list[int]], list[list[int]]], int],
    model: LlamaForCausalLM,
    prompts: list[list[int]],
    lengths: list[list[int]],
) -> dict[str, float]:
    engine(model, prompts[:2], [[2] * WIDTH] * 2)  # warm up
    start = time.perf_counter()
    tokens = engine(model, prompts, lengths)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "useful_tokens": tokens, "useful_tokens_per_second": tokens / seconds}


def main() -> None:
    model = make_model().eval()
    rng = random.Random(1)
    prompts = [[rng.randrange(3, 49000) for _ in range(PROMPT)] for _ in range(GROUPS)]
    results = {}
    for name, lengths in (("long_tailed", long_tailed_lengths()), ("equal", [[LIMIT // 4] * WIDTH] * GROUPS)):
        with_bridge = measure(ours, model, prompts, lengths)
        with br.disable_bridge(model):
            without = measure(ours, model, prompts, lengths)
            reference = measure(hf_generate, model, prompts, lengths)
        ratio = without["useful_tokens_per_second"] / reference["useful_tokens_per_second"]
        results[name] = {
            "ours_with_bridge": with_bridge,
            "ours_without_bridge": without,
            "hf_generate": reference,
            "speedup_over_hf_generate": ratio,
            "bridge_time_ratio": with_bridge["seconds"] / without["seconds"],
        }
    shape = {"groups": GROUPS, "width": WIDTH, "max_rows": MAX_ROWS, "prompt": PROMPT, "limit": LIMIT}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({**provenance(), "shape": shape, "results": results}, indent=2) + "\n")
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
