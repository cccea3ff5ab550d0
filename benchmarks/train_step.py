"""What an update costs: ours, TRL's own trainer, and ours with one feature after the other left out.

`python benchmarks/train_step.py` writes `benchmarks/results/train_step.json`. The model is a random Llama of the shape
of SmolLM2-135M. Every arm is given the same completions of one prompt of 256 tokens: a group of 8, of long-tailed
lengths, padded as TRL pads them, to the longest of a generation batch. An update is forward, backward and optimizer
step. TRL's arm is its GRPOTrainer on the same model without Bridge, rows independent: it computes less, and cannot
train the Bridge alone. Every measurement is a process of its own, so that its peak memory is; arms take turns. On CPU
one thread runs and its processor time is taken, which does not depend on what else the machine does.
"""

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from block_cost import make_model
from datasets import Dataset
from peft import LoraConfig
from rollout import tiny_model
from transformers import PreTrainedModel
from trl import GRPOConfig, GRPOTrainer

from bridge_rl.config import GuardsSection, ModelSection, UpdateSection
from bridge_rl.group import split_rows
from bridge_rl.models import load_tokenizer
from bridge_rl.report.results import provenance
from bridge_rl.trainer import BridgeGRPOTrainer

RESULT = Path(__file__).parent / "results" / "train_step.json"
MIB = 2**20
ARMS: dict[str, UpdateSection | None] = {
    "ours": UpdateSection(),
    "without_share_prompt": UpdateSection(share_prompt=False),
    "without_share_prompt_and_trim": UpdateSection(share_prompt=False, trim=False),
    "trl": None,
}
MODES = ("bridge", "lora", "full")


@dataclass(frozen=True)
class Plan:
    """padded_to: the longest completion of the generation batch that the micro-batch is part of."""

    prompt: int = 256
    lengths: tuple[int, ...] = (8, 10, 12, 16, 20, 28, 44, 96)
    padded_to: int = 112
    checkpointing: bool = False
    rounds: int = 1
    tiny: bool = False

    @property
    def tokens(self) -> int:
        """Prompt and completion tokens of all rows, padding not counted."""
        return self.prompt * len(self.lengths) + sum(self.lengths)


QUICK = Plan(prompt=32, lengths=(2, 3, 4, 16), padded_to=20, tiny=True)


def make_batch(plan: Plan, vocabulary: int) -> dict[str, torch.Tensor]:
    """What TRL hands to its loss, [B, columns] each."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = len(plan.lengths), torch.arange(plan.padded_to)
    mask = (columns < torch.tensor(plan.lengths)[:, None]).long()
    completions = torch.randint(3, vocabulary, mask.shape, generator=generator) * mask
    return {
        "prompt_ids": torch.randint(3, vocabulary, (1, plan.prompt), generator=generator).repeat(rows, 1),
        "prompt_mask": torch.ones(rows, plan.prompt, dtype=torch.long),
        "completion_ids": completions,
        "completion_mask": mask,
        "advantages": torch.randn(rows, generator=generator),
        "sampling_per_token_logps": -5.0 * mask,
        "num_items_in_batch": mask.sum(),
    }


def make_trainer(arm: str, mode: str, plan: Plan, directory: str) -> GRPOTrainer:
    """The trainer of an arm, ready for `update`."""
    update, width = ARMS[arm], len(plan.lengths)
    model: PreTrainedModel = tiny_model() if plan.tiny else make_model()
    if update is None:
        model = type(model)(model.config)  # the same shape without Bridge
    args = GRPOConfig(
        directory,
        per_device_train_batch_size=width,
        num_generations=width,
        max_completion_length=plan.padded_to,
        gradient_checkpointing=plan.checkpointing,
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        report_to=[],
        disable_tqdm=True,
    )
    common: dict[str, Any] = {
        "model": model,
        "reward_funcs": [lambda completion_ids, **kwargs: [0.0] * len(completion_ids)],
        "args": args,
        "train_dataset": Dataset.from_dict({"prompt": ["1"] * width}),
        "processing_class": load_tokenizer(ModelSection("package://bridge_rl/tiny/model")),
    }
    bridge = {"modules_to_save": ["bridge"]} if update is not None else {}
    if mode == "lora":
        common["peft_config"] = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", **bridge)
    if update is None:
        trainer = GRPOTrainer(**common)
    else:
        common["guards"] = GuardsSection(max_rollout_kl=None)  # the completions are made up
        trainer = BridgeGRPOTrainer(**common, width=width, train=mode, update=update)  # type: ignore[arg-type]
    trainer._step = 1000  # past the sampling, whose log-probs ours would be compared with
    trainer.current_gradient_accumulation_steps = 1
    trainer.create_optimizer()
    return trainer


def update(trainer: GRPOTrainer, batch: dict[str, torch.Tensor]) -> float:
    """Forward, backward and step; returns the norm of the gradient."""
    if isinstance(trainer, BridgeGRPOTrainer):
        batch = {key: split_rows(x, trainer.width) if x.dim() else x for key, x in batch.items()}
    batch = {key: x.to(trainer.args.device) for key, x in batch.items()}
    trainer._prepare_inputs = lambda _: batch
    trainer.training_step(trainer.model, {}, None)
    norm = torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
    trainer.optimizer.step()
    trainer.model.zero_grad()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return norm.item()


def measure(arm: str, mode: str, plan: Plan) -> dict[str, float]:
    """One update, after one of a few tokens that warms up, and the peak memory of both."""
    cuda = torch.cuda.is_available()
    clock = time.perf_counter if cuda else time.process_time
    with tempfile.TemporaryDirectory() as directory:
        trainer = make_trainer(arm, mode, plan, directory)
        before = psutil.Process().memory_info().rss
        vocabulary = trainer.model.config.vocab_size
        update(trainer, make_batch(replace(plan, prompt=2, lengths=(2,) * len(plan.lengths), padded_to=2), vocabulary))
        batch = make_batch(plan, vocabulary)
        start, start_wall = clock(), time.perf_counter()
        norm = update(trainer, batch)
        seconds, wall = clock() - start, time.perf_counter() - start_wall
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    return {
        "seconds": seconds,
        "wall_seconds": wall,
        "peak_mib": peak / MIB,
        "before_mib": before / MIB,
        "gradient_norm": norm,
        "trained_parameters": trained,
    }


def measure_apart(arm: str, mode: str, plan: Plan) -> dict[str, float]:
    if plan.tiny:  # only to try the script: a process each would take a minute, and tell nothing
        return measure(arm, mode, plan)
    command = [sys.executable, __file__, "--worker", json.dumps([arm, mode, asdict(plan)])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(done.stderr)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"{mode:6} {arm:30} {result['seconds']:7.2f} s {result['peak_mib']:7.0f} MiB", file=sys.stderr, flush=True)
    return result


def pairs() -> list[tuple[str, str]]:
    """(mode, arm): features are left out where the whole model is trained."""
    return [("bridge", "ours"), ("lora", "ours"), ("lora", "trl"), *(("full", arm) for arm in ARMS)]


def run_plan(plan: Plan) -> dict[str, Any]:
    """Medians over the rounds by mode and arm."""
    runs: dict[tuple[str, str], list[dict[str, float]]] = {pair: [] for pair in pairs()}
    for _ in range(plan.rounds):
        for mode, arm in runs:
            runs[mode, arm].append(measure_apart(arm, mode, plan))
    results: dict[str, Any] = {mode: {} for mode in MODES}
    for (mode, arm), measured in runs.items():
        medians = {key: statistics.median(run[key] for run in measured) for key in measured[0]}
        results[mode][arm] = {**medians, "tokens_per_second": plan.tokens / medians["seconds"]}
    check_gradients(results)
    return results


def check_gradients(results: dict[str, Any]) -> None:
    """Arms of one model must have computed the same. (TRL's has no Bridge; ours starts at zero, but has gradients.)

    On a GPU in bf16, in which the norm is rounded too, by up to 0.4 %.
    """
    tolerance = 2e-2 if torch.cuda.is_available() else 1e-3
    for arms in results.values():
        norms = [run["gradient_norm"] for arm, run in arms.items() if arm != "trl"]
        assert all(math.isclose(norm, norms[0], rel_tol=tolerance) for norm in norms), norms


def bars(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The goals of the update. Bridge-only is held against TRL's full update: TRL has none of its own."""
    lines = []
    for mode, against in (("full", "full"), ("lora", "lora"), ("bridge", "full")):
        ours, trl = results[mode]["ours"], results[against]["trl"]
        name = f"{mode} of ours, {against} of TRL"
        lines.append(bar(f"1 speed, {name}", trl["seconds"] / ours["seconds"], 3))
        lines.append(bar(f"1 peak memory, {name}", ours["peak_mib"] / trl["peak_mib"], 0.5, at_most=True))
    ratio = results["full"]["ours"]["seconds"] / results["bridge"]["ours"]["seconds"]
    lines.append(bar("1 speed, Bridge-only over full", ratio, 1.3))
    return lines


def bar(name: str, measured: float, threshold: float, at_most: bool = False) -> dict[str, Any]:
    met = measured <= threshold if at_most else measured >= threshold
    return {"name": name, "measured": measured, "threshold": f"{'<=' if at_most else '>='} {threshold}", "met": met}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing in every arm")
    parser.add_argument("--rounds", type=int, default=1, help="measurements of each arm, taken in turns")
    parser.add_argument("--output", type=Path, help="JSON to write")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)  # of the workers, and as the report says
    if args.worker:
        arm, mode, plan = json.loads(args.worker)
        print(json.dumps(measure(arm, mode, Plan(**plan))))
        return
    if (args.quick or args.checkpointing) and args.output is None:
        parser.error("--quick and --checkpointing need --output, so that they do not overwrite the committed figures")
    shape = asdict(QUICK if args.quick else Plan())
    plan = Plan(**{**shape, "checkpointing": args.checkpointing, "rounds": args.rounds})
    results = run_plan(plan)
    lines = bars(results)
    output = args.output or RESULT
    output.parent.mkdir(parents=True, exist_ok=True)
    report = {**provenance(), "plan": {**asdict(plan), "tokens": plan.tokens}, "results": results, "bars": lines}
    output.write_text(json.dumps(report, indent=2) + "\n")
    for line in lines:
        print(f"{'met' if line['met'] else 'missed'}: {line['name']}: {line['measured']:.2f} ({line['threshold']})")


if __name__ == "__main__":
    main()
