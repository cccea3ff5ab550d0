"""Sampling groups: ours against what else samples from a Hugging Face model, on the same model, prompts and lengths.

`python benchmarks/rollout.py` writes `benchmarks/results/rollout.json` and `docs/rollout.png`, on CUDA where there is
one, else on CPU (three quarters of an hour on two cores). `--quick --output FILE` tries the script on a tiny model.

The model is a random Llama of the shape of SmolLM2-135M (`block_cost.make_model`) with a Bridge, the lengths of all
rows are fixed beforehand, and useful tokens per second count a row's own tokens only. Measured are:

- scenarios: long-tailed lengths (most rows short, one in sixteen at the limit, a quarter of the limit on average) and
  equal ones, for all engines of `engines.py`; other widths and numbers of rows for ours alone;
- the time of a decode step with all rows running, with the Bridge and with it disabled, step by step in turns;
- the prefill of a long prompt for a group of 8 rows, over that for a single row, in turns;
- tokens of cache in use at the peak of the long-tailed run, over the tokens held there;
- how much of the machine a decode step uses: FLOPs over those of a large matrix product on CPU, bytes read over the
  bandwidth of a large copy on CUDA;
- on CUDA, step and long-tailed scenario of a random Qwen2 of 1.5B parameters in bf16, also with CUDA graphs.

`bars` says of each goal of the engine whether it was met. Engines take turns, and where ours is compared with others it
is measured twice (the slower run counts, both are given), since machines are noisy.
"""

import argparse
import json
import random
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from block_cost import make_model
from engines import (
    Engine,
    Work,
    continuous_batching,
    hf_generate,
    make_rollout,
    measure,
    ours,
    run_rollout,
    synchronized_seconds,
    trl_generate,
    without_bridge,
)
from plot_rollout import plot_rollout
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

import bridge_rl as br
from bridge_rl.report.results import provenance
from bridge_rl.rollout.decode import sampling_mode
from bridge_rl.rollout.engine import Rollout
from bridge_rl.rollout.packing import packed_weights

ROOT = Path(__file__).parent.parent
RESULT, PLOT = ROOT / "benchmarks" / "results" / "rollout.json", ROOT / "docs" / "rollout.png"
REPEATS = 2  # of ours, where it is compared
OURS: dict[str, Engine] = {"ours_with_bridge": ours, "ours_without_bridge": without_bridge(ours)}
OTHERS: dict[str, Engine] = {
    "hf_generate_dynamic": without_bridge(partial(hf_generate, cache="dynamic")),
    "generate_batch": without_bridge(continuous_batching),
    "hf_generate_static": without_bridge(partial(hf_generate, cache="static")),
    "generate_batch_half_rows": without_bridge(partial(continuous_batching, share=0.5)),
    "trl": without_bridge(trl_generate),
}
ARMS = ("with_bridge", "without_bridge")
WARM_UP_PAIRS = 2


@dataclass(frozen=True)
class Scenario:
    """Groups to sample. Prompts have `prompt_low` to `prompt_high` tokens; a row has at most `limit`."""

    name: str
    groups: int
    width: int
    max_rows: int
    prompt_low: int
    prompt_high: int
    limit: int
    lengths: Literal["long_tailed", "equal"] = "long_tailed"

    def work(self, vocab_size: int) -> Work:
        rng = random.Random(1)
        prompts = [
            [rng.randrange(3, vocab_size) for _ in range(rng.randint(self.prompt_low, self.prompt_high))]
            for _ in range(self.groups)
        ]
        rows = self.groups * self.width
        drawn = [self.limit // 4] * rows if self.lengths == "equal" else long_tailed(rows, self.limit, rng)
        lengths = [drawn[start : start + self.width] for start in range(0, rows, self.width)]
        return Work(prompts, lengths, self.prompt_high, limit=max(drawn), max_rows=self.max_rows)


def long_tailed(rows: int, limit: int, rng: random.Random) -> list[int]:
    """One row in sixteen at the limit, the others exponential and cut at it: the mean is a quarter of the limit."""
    at_limit = set(rng.sample(range(rows), max(1, rows // 16)))
    return [limit if n in at_limit else min(limit, 1 + int(rng.expovariate(5 / limit))) for n in range(rows)]


@dataclass(frozen=True)
class Plan:
    """What is measured, in which sizes. `compared` run on all engines, `others` on ours alone."""

    compared: tuple[Scenario, ...]
    others: tuple[Scenario, ...]
    step_prompts: tuple[int, ...] = (32, 256)
    step_rows: int = 64
    step_width: int = 8
    step_pairs: int = 60  # of steps with and without the Bridge
    pairs: int = 12  # of prefills
    prefill_prompt: int = 512
    prefill_width: int = 8
    large: bool = True  # the 1.5B model, on CUDA
    peak_size: int = 2048  # of the matrices that find the machine's peak; a copy has 256 times as many elements


FULL = Plan(
    compared=(
        Scenario("long_tailed", 48, 4, 64, 32, 96, 256),
        Scenario("equal", 48, 4, 64, 32, 96, 256, "equal"),
    ),
    others=(
        Scenario("width_1", 96, 1, 64, 32, 96, 64),
        Scenario("width_8", 12, 8, 64, 32, 96, 64),
        Scenario("width_16", 6, 16, 64, 32, 96, 64),
        Scenario("max_rows_16", 12, 4, 16, 32, 96, 64),
        Scenario("max_rows_128", 48, 4, 128, 32, 96, 64),
    ),
)
QUICK = Plan(
    compared=(Scenario("long_tailed", 6, 2, 8, 4, 12, 16), Scenario("equal", 6, 2, 8, 4, 12, 16, "equal")),
    others=(Scenario("width_1", 6, 1, 4, 4, 12, 16),),
    step_prompts=(8, 16),
    step_rows=8,
    step_width=2,
    step_pairs=4,
    pairs=2,
    prefill_prompt=32,
    prefill_width=4,
    large=False,
    peak_size=128,
)
QWEN = Scenario("qwen2_1_5b", 64, 4, 128, 32, 96, 512)


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=128, num_hidden_layers=2, tie_word_embeddings=True, **shape)
    model = LlamaForCausalLM(config).to("cuda" if torch.cuda.is_available() else "cpu")
    br.attach_bridge(model, br.BridgeConfig(num_heads=2, head_dim=8))
    return model


def qwen_1_5b() -> Qwen2ForCausalLM:
    """A random Qwen2 of the shape of Qwen2.5-1.5B in bf16, with a Bridge of the default size."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    with torch.device("cuda"):
        model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    br.attach_bridge(model, br.BridgeConfig())
    return model


def run_scenario(model: PreTrainedModel, scenario: Scenario, others: dict[str, Engine]) -> dict[str, Any]:
    """Every engine on one scenario: ours in each of the rounds, the others spread over them."""
    work = scenario.work(model.config.vocab_size)
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    names = list(others)
    repeats = REPEATS if others else 1
    for turn in range(repeats):
        for name in (*OURS, *names[turn::repeats]):
            run = measure({**OURS, **others}[name], model, work)
            runs[name].append(run)
            say(f"{scenario.name} {name}: {run['useful_tokens_per_second']:.1f} useful tokens/s")
    engines = {name: slowest_run(runs[name]) for name in (*OURS, *others)}
    mean = work.useful_tokens / (scenario.groups * scenario.width)
    return {"scenario": {**asdict(scenario), "mean_length": mean}, "engines": engines}


def slowest_run(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The slowest of the runs, with the extremes of all."""
    runs = sorted(runs, key=lambda run: run["seconds"])
    return {**runs[-1], "runs": len(runs), "seconds_range": [runs[0]["seconds"], runs[-1]["seconds"]]}


def equal_work(prompt: int, groups: int, width: int, length: int) -> Work:
    """Groups of one length, all running at once."""
    rng = random.Random(2)
    prompts = [[rng.randrange(3, 100) for _ in range(prompt)] for _ in range(groups)]
    return Work(prompts, [[length] * width for _ in range(groups)], prompt, length, groups * width)


def step_cost(model: PreTrainedModel, plan: Plan, prompt: int, recorded: bool = False) -> dict[str, Any]:
    """Time of a decode step with all rows running, in both arms, and the ratios of the pairs.

    Both arms in turns within a rollout; or, `recorded`, as CUDA graphs, which hold one arm: a rollout for each.
    """
    visits = plan.step_pairs + WARM_UP_PAIRS  # of each arm
    made = visits if recorded else 2 * visits
    length = made * (8 if torch.cuda.is_available() else 1) + 2  # steps_per_visit of RolloutOptions
    work = equal_work(prompt, plan.step_rows // plan.step_width, plan.step_width, length)
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    with sampling_mode(model), packed_weights(model), torch.no_grad():
        for turn in ([arm] for arm in ARMS) if recorded else [ARMS]:
            rollout = make_rollout(model, work, cuda_graphs=recorded)
            while not rollout.running:
                rollout.advance()
            for visit in range(made):
                arm = turn[visit % len(turn)]
                with nullcontext() if arm == "with_bridge" else br.disable_bridge(model):
                    seconds[arm] += seconds_per_step(rollout)
    shape = {"prompt": prompt, "rows": plan.step_rows, "width": plan.step_width, "generated": rollout.stats.steps / 2}
    return {**shape, **paired({arm: values[WARM_UP_PAIRS:] for arm, values in seconds.items()})}


def seconds_per_step(rollout: Rollout) -> list[float]:
    """Of the rollout's next pass over its rows; none if it had to record a graph, which later passes replay."""
    graphs = getattr(rollout.decoder, "graphs", ())
    start, steps, recorded = synchronized_seconds(), rollout.stats.steps, len(graphs)
    rollout.advance()
    seconds = (synchronized_seconds() - start) / (rollout.stats.steps - steps)
    return [seconds] if len(graphs) == recorded else []


def prefill_cost(model: PreTrainedModel, plan: Plan) -> dict[str, Any]:
    """Seconds to the first token of all rows of a group, over those of a single row, in turns."""
    widths = (plan.prefill_width, 1)
    seconds: dict[str, list[float]] = {f"width_{width}": [] for width in widths}
    for pair in range(plan.pairs + 1):
        for width in widths if pair % 2 else reversed(widths):
            start = synchronized_seconds()
            run_rollout(model, equal_work(plan.prefill_prompt, 1, width, 1))
            if pair > 0:
                seconds[f"width_{width}"].append(synchronized_seconds() - start)
    return {"prompt": plan.prefill_prompt, **paired(seconds)}


def paired(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Median seconds of two arms, and median and quartiles of the first over the second, pair by pair."""
    first, second = seconds.values()
    ratios = [a / b for a, b in zip(first, second, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    medians = {f"seconds_{arm}": statistics.median(values) for arm, values in seconds.items()}
    return {**medians, "ratio": statistics.median(ratios), "ratio_quartiles": [low, high], "pairs": len(ratios)}


def machine_peak(size: int) -> dict[str, float]:
    """The best of several: on CPU FLOP/s of an fp32 matrix product, on CUDA bytes/s, read and written, of a copy."""
    if torch.cuda.is_available():
        source = torch.zeros(256 * size**2, dtype=torch.bfloat16, device="cuda")
        target = torch.empty_like(source)
        seconds = fastest(lambda: target.copy_(source))
        return {"bytes_per_second": 2 * source.nbytes / seconds}
    a, b = torch.rand(2, size, size)
    return {"flops_per_second": 2 * size**3 / fastest(lambda: torch.mm(a, b))}


def fastest(work: Any, repeats: int = 10) -> float:
    times = []
    for _ in range(repeats):
        start = synchronized_seconds()
        work()
        times.append(synchronized_seconds() - start)
    return min(times)


def roofline(model: PreTrainedModel, cost: dict[str, Any], peak: dict[str, float]) -> dict[str, Any]:
    """The share of the machine's peak in decode steps of `step_cost`, for both arms.

    CPU, FLOPs: two for each weight of a linear layer (the head is one) and row, and of attention four for each head's
    element and token of context. CUDA, bytes: the weights of the linear layers, and the keys and values held, those of
    a prompt once a group. Norms, embeddings, sampling and attention between siblings are not counted, but take time.
    """
    config = model.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rows, groups, prompt, generated = cost["rows"], cost["rows"] // cost["width"], cost["prompt"], cost["generated"]
    shares = {}
    for arm in ARMS:
        weights = linear_weights(model, bridge=arm == "with_bridge")
        if "flops_per_second" in peak:
            attention = 4 * config.num_hidden_layers * config.num_attention_heads * head * (prompt + generated)
            rate, best = rows * (2 * weights + attention), peak["flops_per_second"]
        else:
            held = groups * prompt + rows * generated
            cache = 2 * config.num_hidden_layers * config.num_key_value_heads * head * held
            rate, best = model.dtype.itemsize * (weights + cache), peak["bytes_per_second"]
        shares[arm] = rate / cost[f"seconds_{arm}"] / best
    return {"prompt": prompt, "rows": rows, **shares}


def linear_weights(model: nn.Module, bridge: bool) -> int:
    return sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (bridge or ".bridge." not in name)
    )


def large_model(peak: dict[str, float]) -> dict[str, Any] | None:
    """Steps at 128 rows and a long-tailed scenario of a 1.5B model, in bf16 on CUDA; on CPU nothing, and it says so."""
    if not torch.cuda.is_available():
        say("qwen2_1_5b: skipped, there is no CUDA device")
        return None
    model = qwen_1_5b().eval().requires_grad_(False)
    plan = Plan((), (), step_rows=QWEN.max_rows)
    cost, with_graphs = (step_cost(model, plan, prompt=64, recorded=recorded) for recorded in (False, True))
    others = {name: OTHERS[name] for name in ("hf_generate_dynamic", "hf_generate_static")}
    others["ours_with_graphs"] = partial(ours, cuda_graphs=True)
    scenario = run_scenario(model, QWEN, others)
    return {
        **scenario,
        "step": cost,
        "roofline": roofline(model, cost, peak),
        "step_with_graphs": with_graphs,
        "roofline_with_graphs": roofline(model, with_graphs, peak),
    }


def bars(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The goals of the engine. Those of speed are given for both arms; only `without_bridge` computes the same."""
    lines = []
    generate = ("hf_generate_dynamic", "hf_generate_static")
    batching = ("generate_batch", "generate_batch_half_rows")
    scenarios, large, cache = results["scenarios"], results["qwen2_1_5b"], results["cache"]
    for arm in ARMS:
        ratio = speedup(scenarios["long_tailed"], arm, (*generate, *batching))
        lines.append(bar(f"1 long-tailed {arm} over the best of generate and generate_batch", ratio, 4))
        ratio = speedup(scenarios["equal"], arm, generate)
        lines.append(bar(f"1 equal lengths {arm} over the best of generate", ratio, 1.3))
    for cost in results["step"]:
        lines.append(bar(f"2 decode step with Bridge over without, prompt {cost['prompt']}", cost["ratio"], 1.05, True))
    name = f"3 prefill of {results['prefill']['prompt']} tokens, whole group over one row"
    lines.append(bar(name, results["prefill"]["ratio"], 1.2, True))
    lines.append(bar("4 peak tokens of cache over tokens held", cache["ratio"], 1.1, True))
    for arm in ARMS:
        for kind in ("", "_with_graphs"):
            share = large and large[f"roofline{kind}"][arm]
            lines.append(bar(f"5 1.5B on CUDA, share of bandwidth {arm}{kind}", share, 0.6))
    for arm in (*ARMS, "with_graphs"):
        ratio = large and speedup(large, arm, generate)
        lines.append(bar(f"5 1.5B on CUDA, {arm} over the best of generate", ratio, 10))
    return lines


def bar(name: str, measured: float | None, threshold: float, at_most: bool = False) -> dict[str, Any]:
    """`met` is null where nothing was measured."""
    met = None if measured is None else (measured <= threshold if at_most else measured >= threshold)
    return {"name": name, "measured": measured, "threshold": f"{'<=' if at_most else '>='} {threshold}", "met": met}


def speedup(scenario: dict[str, Any], arm: str, others: Sequence[str]) -> float:
    speed = {name: run["useful_tokens_per_second"] for name, run in scenario["engines"].items()}
    return speed[f"ours_{arm}"] / max(speed[name] for name in others)


def describe(model: PreTrainedModel) -> dict[str, Any]:
    weights = {"weights_of_linear_layers": linear_weights(model, bridge=False)}
    bridge = {"parameters_of_bridge": sum(parameter.numel() for _, parameter in br.bridge_parameters(model))}
    return {"config": type(model.config).__name__, "dtype": str(model.dtype), **weights, **bridge}


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def run_plan(model: PreTrainedModel, plan: Plan) -> dict[str, Any]:
    peak = machine_peak(plan.peak_size)
    steps = [step_cost(model, plan, prompt) for prompt in plan.step_prompts]
    prefill = prefill_cost(model, plan)
    scenarios = {scenario.name: run_scenario(model, scenario, OTHERS) for scenario in plan.compared}
    scenarios |= {scenario.name: run_scenario(model, scenario, {}) for scenario in plan.others}
    run = scenarios["long_tailed"]["engines"]["ours_with_bridge"]
    return {
        "model": describe(model),
        "plan": asdict(plan),
        "machine_peak": peak,
        "scenarios": scenarios,
        "step": steps,
        "roofline": [roofline(model, cost, peak) for cost in steps],
        "prefill": prefill,
        "cache": {"ratio": run["peak_cache_tokens"] / run["held_tokens_at_peak"]},
        "qwen2_1_5b": large_model(peak) if plan.large else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model and few groups, to try the script")
    parser.add_argument("--output", type=Path, help="JSON to write; the plot goes beside it")
    args = parser.parse_args()
    if args.quick and args.output is None:
        parser.error("--quick needs --output, so that it does not overwrite the committed figures")
    model = (tiny_model() if args.quick else make_model()).eval().requires_grad_(False)
    results = run_plan(model, QUICK if args.quick else FULL)
    output, plot = args.output or RESULT, args.output.with_suffix(".png") if args.output else PLOT
    output.parent.mkdir(parents=True, exist_ok=True)
    lines = bars(results)
    output.write_text(json.dumps({**provenance(), "results": results, "bars": lines}, indent=2) + "\n")
    plot_rollout({name: results["scenarios"][name]["engines"] for name in ("long_tailed", "equal")}, plot)
    for line in lines:
        outcome = {True: "met", False: "missed", None: "not measured"}[line["met"]]
        print(f"{outcome}: {line['name']}: {line['measured']} ({line['threshold']})")


if __name__ == "__main__":
    main()
