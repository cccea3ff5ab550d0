"""What the Bridge costs: time of decoding and of an update with it, over the same model and run with it disabled.

`python benchmarks/block_cost.py` writes `benchmarks/results/block_cost.json`. The model is a random Llama of the shape
of SmolLM2-135M, with the Bridge of its recipe. Both arms alternate, and medians are compared, since machines are noisy.
"""

import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import bridge_rl as br
from bridge_rl.report.results import provenance
from bridge_rl.surgery import find_state, freeze_base

RESULT = Path(__file__).parent / "results" / "block_cost.json"
WIDTH, ROWS, PROMPT, NEW_TOKENS, REPEATS = 8, 64, 32, 16, 5


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    if torch.cuda.is_available():
        model = model.to("cuda", torch.bfloat16)
    br.attach_bridge(model, br.BridgeConfig(num_heads=3, head_dim=32))
    find_state(model).width = WIDTH
    return model


def decode(model: LlamaForCausalLM) -> None:
    prompts = [[5 + n] * PROMPT for n in range(ROWS // WIDTH)]
    br.generate_groups(model, prompts, WIDTH, br.SamplingParams(NEW_TOKENS, eos_token_id=[]))


def update(model: LlamaForCausalLM) -> None:
    ids = torch.full((16, PROMPT + NEW_TOKENS), 7, device=model.device)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    model.zero_grad()


def seconds(work: Callable[[LlamaForCausalLM], None], model: LlamaForCausalLM) -> float:
    start = time.perf_counter()
    work(model)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(work: Callable[[LlamaForCausalLM], None], model: LlamaForCausalLM) -> dict[str, float]:
    """Median seconds of both arms, taken in turns, and their ratio."""
    times: dict[str, list[float]] = {"with": [], "without": []}
    for repeat in range(REPEATS + 1):
        for arm, values in times.items():
            with nullcontext() if arm == "with" else br.disable_bridge(model):
                value = seconds(work, model)
            if repeat > 0:  # the first turn warms up
                values.append(value)
    medians = {arm: statistics.median(values) for arm, values in times.items()}
    return {**medians, "ratio": medians["with"] / medians["without"]}


def main() -> None:
    model = make_model()
    new = sum(p.numel() for _, p in br.bridge_parameters(model))
    results = {"decode": compare(decode, model)}
    results["update_full"] = compare(update, model)
    freeze_base(model)
    # Without its Bridge a frozen model has nothing to train: compare Bridge-only with the full update.
    bridge_only = statistics.median(seconds(update, model) for _ in range(REPEATS))
    results["update_bridge_only"] = {"with": bridge_only, "ratio_to_full": bridge_only / results["update_full"]["with"]}
    shape = {"rows": ROWS, "width": WIDTH, "prompt": PROMPT, "new_tokens": NEW_TOKENS, "new_parameters": new}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({**provenance(), "shape": shape, "results": results}, indent=2) + "\n")
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
