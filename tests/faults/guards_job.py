"""Runs of a recipe in processes of their own, with losses that are broken: `guards_job.py SPEC.json`.

SPEC: {"runs": [{"argv": [...], "ranks": N, "broken": [STEP, ...], "fsdp": BOOL}], "log": FILE}. At the named steps
(counted from 1) the loss of the last rank alone is not a number. Every rank leaves `facts_RANK.json` in the run's
directory: what it trained on and which update it skipped. Written to stdout: for each run the exit codes of its ranks.
"""

import json
import sys
from pathlib import Path
from typing import Any

import job

sys.path.insert(0, "tests/distributed")
import table_job

from bridge_rl.trainer import BridgeGRPOTrainer

FACTS: dict[str, Any] = {"batches": [], "skipped": [], "checks_overflow": None}


def break_losses(steps: list[int], rank: int, ranks: int) -> None:
    original = BridgeGRPOTrainer._loss_of_part

    def broken(self: BridgeGRPOTrainer, model: Any, part: dict[str, Any], whole: dict[str, Any]) -> Any:
        if self.state.global_step + 1 in steps and rank == ranks - 1:
            part = {**part, "advantages": part["advantages"] * float("nan")}
        return original(self, model, part, whole)

    BridgeGRPOTrainer._loss_of_part = broken


def record(argv: list[str], rank: int) -> None:
    """Write down what TRL was given, and at every step's end what the guard has done."""
    [output] = [option.partition("=")[2] for option in argv if option.startswith("output_dir=")]
    original = BridgeGRPOTrainer._generate_and_score_completions

    def recorded(self: BridgeGRPOTrainer, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        given = [example["prompt"][-1]["content"] for example in inputs]
        batch = original(self, inputs)
        rows = {key: batch[key].flatten(0, 1) for key in ("completion_ids", "completion_mask", "rewards", "advantages")}
        ids = [x[m.bool()].tolist() for x, m in zip(rows["completion_ids"], rows["completion_mask"], strict=True)]
        FACTS["batches"].append(
            {
                "given": given,
                "prompts": self.processing_class.batch_decode(batch["prompt_ids"].flatten(0, 1)),
                "completions": ids,
                "rewards": rows["rewards"].tolist(),
                "advantages": rows["advantages"].tolist(),
            }
        )
        return batch

    def write(self: BridgeGRPOTrainer, *args: Any, **kwargs: Any) -> None:
        optimizer = getattr(self.model_wrapped, "optimizer", None)
        FACTS["checks_overflow"] = getattr(optimizer, "check_grad_overflow", None)
        FACTS["skipped"].append(self._guards.skipped)
        Path(output, f"facts_{rank}.json").write_text(json.dumps(FACTS))

    BridgeGRPOTrainer._generate_and_score_completions = recorded
    job.hook(BridgeGRPOTrainer, "log", write)


def execute(run: dict[str, Any], log: str) -> list[int]:
    def child(spec: dict[str, Any], rank: int, ranks: int, *more: Any) -> None:
        if run["fsdp"]:
            table_job.launched_by_fsdp2()
        record(run["argv"], rank)
        break_losses(run["broken"], rank, ranks)
        original(spec, rank, ranks, *more)

    original, job.child = job.child, child
    try:
        return job.execute(run, run["ranks"], log)
    finally:
        job.child = original


if __name__ == "__main__":
    spec = json.loads(Path(sys.argv[1]).read_text())
    print(json.dumps([execute(run, spec["log"]) for run in spec["runs"]]))
