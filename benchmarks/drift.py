"""How far runs that should be one run drift apart: ranks and accumulation over ten steps, from the same start.

`python benchmarks/drift.py` writes `benchmarks/results/drift.json`. A generation batch of 8 groups of 4 rows is updated
at once by one process, by two DDP ranks, in 4 micro-batches, in 2 on each of two ranks, and by two ranks in parts under
a token budget. Each run samples its own completions, from its own weights: the draws come from the seed, so they are
the same as long as the weights are nearly so, and `tokens_equal` says whether they were. Lengths are long-tailed (one
token in six ends a row, which may have 40), so that a loss averaged over the wrong rows or tokens shows.

`bnpo` is averaged over the tokens of a micro-batch by definition (TRL's), and is dapo's loss where there is only one.
Under ranks or accumulation it is what a wrong normalisation of dapo would be: it shows that one would be seen.

Weights drift as floating-point sums in another order do. Adam divides small gradients by their own size, so drift is
given over the way that the weights have gone as well (`over_travel`, of Euclidean norms).
"""

import argparse
import json
import os
import socket
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from rollout import tiny_model
from torch import Tensor
from torch.multiprocessing import start_processes
from transformers import LlamaForCausalLM, PrinterCallback
from trl import GRPOConfig

import bridge_rl as br
from bridge_rl.config import ModelSection, UpdateSection
from bridge_rl.models import load_tokenizer
from bridge_rl.report.results import provenance
from bridge_rl.trainer import BridgeGRPOTrainer

RESULT = Path(__file__).parent / "results" / "drift.json"
STEPS, ROWS, WIDTH, LIMIT = 10, 32, 4, 40
ENDS = list(range(2, 130, 6))  # token ids that end a row
RUNS = [(mode, loss) for mode in ("bridge", "full") for loss in ("dapo", "grpo", "bnpo")]
QUICK = [("full", "dapo"), ("full", "bnpo"), ("bridge", "grpo")]


@dataclass(frozen=True)
class Layout:
    """Who computes the update of a generation batch."""

    ranks: int = 1
    accumulation: int = 1
    token_budget: int | None = None


ONE, BOTH = "one process", "two ranks, accumulation by 2"
LAYOUTS = {
    ONE: Layout(),
    "two ranks": Layout(ranks=2),
    "accumulation by 4": Layout(accumulation=4),
    BOTH: Layout(ranks=2, accumulation=2),
    "two ranks, parts": Layout(ranks=2, token_budget=80),
}


def even_share(completion_ids: list[list[int]], **kwargs: object) -> list[float]:
    """A reward that differs within a group, whatever an untrained model says."""
    return [sum(token % 2 == 0 for token in row) / len(row) for row in completion_ids]


def make_model() -> LlamaForCausalLM:
    """Random, with blocks that are not zero, so that every parameter has a gradient from the first step."""
    model, generator = tiny_model().cpu(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in br.bridge_parameters(model):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.generation_config.eos_token_id = ENDS
    return model


class Recorded(BridgeGRPOTrainer):
    """Keeps the trained weights, the completions, the loss and the gradient's norm of every step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weights, self.completions = [self.trained_weights()], list[list[list[int]]]()

    def trained_weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters() if p.requires_grad])

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        ids, mask = batch["completion_ids"].flatten(0, 1), batch["completion_mask"].flatten(0, 1).bool()
        rows = [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
        self.completions.append(gather_object(rows))
        return batch

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "grad_norm" in logs:
            self.weights.append(self.trained_weights())
        super().log(logs, start_time)


def train(rank: int, layout: Layout, mode: str, loss: str, port: int, path: Path) -> None:
    """One rank's part in a run; the first writes what was recorded to `path`."""
    torch.set_num_threads(1)
    if layout.ranks > 1:
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": layout.ranks, "LOCAL_WORLD_SIZE": layout.ranks}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", **{k: str(v) for k, v in {**world, "MASTER_PORT": port}.items()}}
    args = GRPOConfig(
        str(path.with_suffix("")),
        per_device_train_batch_size=ROWS // layout.ranks // layout.accumulation,
        gradient_accumulation_steps=layout.accumulation,
        num_generations=WIDTH,
        max_completion_length=LIMIT,
        loss_type=loss,
        max_steps=STEPS,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        ddp_find_unused_parameters=False,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Recorded(
        make_model(),
        [even_share],
        args,
        width=WIDTH,
        train=mode,  # type: ignore[arg-type]
        update=UpdateSection(token_budget=layout.token_budget),
        train_dataset=Dataset.from_dict({"prompt": [str(n) * (1 + n % 5) for n in range(64)]}),
        processing_class=load_tokenizer(ModelSection("package://bridge_rl/tiny/model")),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    assert trainer.accelerator.num_processes == layout.ranks
    if rank == 0:
        steps = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
        assert len(steps) == len(trainer.completions) == STEPS
        kept = {"weights": torch.stack(trainer.weights), "completions": trainer.completions}
        torch.save({**kept, **{key: [entry[key] for entry in steps] for key in ("loss", "grad_norm")}}, path)
    trainer.end()


def run(layout: Layout, mode: str, loss: str) -> dict[str, Any]:
    """What was recorded in a run, whose ranks are forked so that torch is imported once."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "run.pt"
        start_processes(train, (layout, mode, loss, port, path), nprocs=layout.ranks, start_method="fork")
        recorded: dict[str, Any] = torch.load(path, weights_only=True)
    return recorded


def compare(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """How far a run has drifted from another: the weights by step, maxima and means over the steps for the rest."""
    difference = (found["weights"] - expected["weights"])[1:].double()  # [STEPS, parameters]
    travel = (expected["weights"][1:] - expected["weights"][0]).double()
    loss = [abs(a - b) for a, b in zip(found["loss"], expected["loss"], strict=True)]
    norm = [abs(a / b - 1) for a, b in zip(found["grad_norm"], expected["grad_norm"], strict=True)]
    return {
        "tokens_equal": found["completions"] == expected["completions"],
        "weights": {
            "max": difference.abs().amax(1).tolist(),
            "mean": difference.abs().mean(1).tolist(),
            "over_travel": (difference.norm(dim=1) / travel.norm(dim=1)).tolist(),
        },
        "loss": {"max": max(loss), "mean": statistics.mean(loss)},
        "grad_norm_relative": {"max": max(norm), "mean": statistics.mean(norm)},
    }


def describe(run: dict[str, Any]) -> dict[str, Any]:
    """What the runs that are compared have done."""
    lengths = sorted(len(row) for batch in run["completions"] for row in batch)
    return {
        "lengths": {"median": statistics.median(lengths), "mean": statistics.mean(lengths), "longest": lengths[-1]},
        "cut": sum(length == LIMIT for length in lengths),
        "rows": len(lengths),
        "loss": run["loss"],
        "grad_norm": run["grad_norm"],
        "largest_way_of_a_weight": (run["weights"][-1] - run["weights"][0]).abs().max().item(),
    }


def summary(found: dict[str, Any]) -> str:
    """A drift in a line; of the weights, after the last step."""
    last = {key: by_step[-1] for key, by_step in found["weights"].items()}
    return (
        f"tokens {'equal' if found['tokens_equal'] else 'DIFFER'}; weights: max {last['max']:.1e}, mean "
        f"{last['mean']:.1e}, over travel {last['over_travel']:.1e}; loss {found['loss']['max']:.1e}; gradient norm "
        f"{found['grad_norm_relative']['max']:.1e}"
    )


def measure(runs: Sequence[tuple[str, str]], layouts: Sequence[str]) -> dict[str, Any]:
    """By mode and loss: the run of one process, and the drift of the other layouts from it."""
    results: dict[str, Any] = {mode: {} for mode, _ in runs}
    for mode, loss in runs:
        alone = run(LAYOUTS[ONE], mode, loss)
        drift = {name: compare(run(LAYOUTS[name], mode, loss), alone) for name in layouts}
        results[mode][loss] = {ONE: describe(alone), "drift": drift}
        for name, found in drift.items():
            print(f"{mode:6} {loss:5} {name:29} {summary(found)}", file=sys.stderr, flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three runs, and without the fourth layout")
    parser.add_argument("--output", type=Path, help="JSON to write")
    args = parser.parse_args()
    if args.quick and args.output is None:
        parser.error("--quick needs --output, so that it does not overwrite the committed figures")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # all of it runs on CPU, as the report is to say
    layouts = [name for name in LAYOUTS if name != ONE and not (args.quick and name == BOTH)]
    results = measure(QUICK if args.quick else RUNS, layouts)
    plan = {"steps": STEPS, "rows": ROWS, "width": WIDTH, "limit": LIMIT}
    described = {name: asdict(layout) for name, layout in LAYOUTS.items()}
    report = {**provenance(), "plan": plan, "layouts": described, "results": results}
    output = args.output or RESULT
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
