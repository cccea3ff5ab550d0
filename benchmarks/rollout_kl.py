"""By how much the log-probs of a full-sequence forward differ from the rollout's, in nats a token.

`python benchmarks/rollout_kl.py` writes `benchmarks/results/rollout_kl.json`, from which the default of
`guards.max_rollout_kl` is taken. The model is SmolLM2-135M-Instruct in fp32, bf16, 8 and 4 bits (the extra
`quantized`), with a random Bridge in fp32 of which `strength` is the standard deviation of the last projection. `deaf`
is a training forward in which no row hears its siblings, `disabled` one without the Bridge: what a run would train
whose groups had come apart.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import bridge_rl as br
from bridge_rl.config import load_recipe
from bridge_rl.group import groups_of
from bridge_rl.models import load_model, load_policy, load_tokenizer
from bridge_rl.report.results import provenance
from bridge_rl.word_problems import dataset

RESULT = Path(__file__).parent / "results" / "rollout_kl.json"
RECIPE = "recipes/smollm2_135m.yaml"
WIDTH, TOKENS, PROMPTS = 4, 64, 4
CASES = (("float32", None), ("bfloat16", None), ("float32", "int8"), ("bfloat16", "int8"), ("bfloat16", "nf4"))
Logprobs = Sequence[Sequence[Sequence[float]]]  # by group, row and token


def kl(sampled: Logprobs, computed: Logprobs) -> float:
    """Mean over tokens of r - 1 - log r, r being the ratio of the probabilities, as the trainer logs it."""
    flat = [torch.tensor([p for group in logprobs for row in group for p in row]) for logprobs in (sampled, computed)]
    log_ratio = flat[1] - flat[0]
    return (log_ratio.exp() - log_ratio - 1).mean().item()


def save_base(directory: str) -> None:
    """The recipe's base in safetensors: bitsandbytes does not quantize a GGUF file."""
    section = load_recipe(RECIPE).model
    load_model(section).save_pretrained(directory)
    load_tokenizer(section).save_pretrained(directory)


def measure(base: str, dtype: str, quantization: str | None, strength: float) -> dict[str, Any]:
    overrides = [f"model={{path: {base}, dtype: {dtype}, quantization: {quantization or 'null'}}}"]
    recipe = load_recipe(RECIPE, overrides)
    model, tokenizer = load_policy(recipe).eval(), load_tokenizer(recipe.model)
    if torch.cuda.is_available() and quantization is None:  # bitsandbytes has put the others there
        model.cuda()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in br.bridge_parameters(model):
            if "o_proj" in name:
                parameter.copy_(strength * torch.randn(parameter.shape, generator=generator))
    prompts = [tokenizer(row["problem"]).input_ids for row in dataset(seed=1, size=PROMPTS)]
    groups = br.generate_groups(model, prompts, WIDTH, br.SamplingParams(TOKENS, seed=3))
    completions, sampled = [group.tokens for group in groups], [group.logprobs for group in groups]
    rows = [[row] for group in completions for row in group]
    deaf = br.group_logprobs(model, [prompt for prompt in prompts for _ in range(WIDTH)], rows)
    with br.disable_bridge(model):
        disabled = br.group_logprobs(model, prompts, completions)
    return {
        "dtype": dtype,
        "quantization": quantization,
        "strength": strength,
        "tokens": sum(len(row) for [row] in rows),
        "as_sampled": kl(sampled, br.group_logprobs(model, prompts, completions)),
        "deaf": kl(sampled, groups_of([row for [row] in deaf], WIDTH)),
        "disabled": kl(sampled, disabled),
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as base:
        save_base(base)
        results = []
        for dtype, quantization in CASES:
            results.append(measure(base, dtype, quantization, 0.02))
            print(results[-1], flush=True)
    RESULT.write_text(json.dumps({**provenance(), "results": results}, indent=2) + "\n")
