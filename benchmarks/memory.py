"""Whether a plan's memory is the memory that is used: `--dry-run`'s figure against measured peaks of small shapes.

`python benchmarks/memory.py` writes `benchmarks/results/memory.json`. Each shape is a random model that is trained for
two steps by the real trainer, in a process of its own: the second has optimizer state. Rows never end before the limit,
as the plan assumes. Measured is the most bytes that tensors held at once since before the model was made, apart for
sampling and for the rest of a step (`update`): on CUDA by torch's allocator, on CPU by the profiler's record of every
allocation of torch's, which counts the same thing (a process's resident size also has freed pages, and libraries).
The cache is counted whole, as on a GPU; on CPU the system gives its memory page by page.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import trl.trainer.utils
from datasets import Dataset
from pydantic import TypeAdapter
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

import bridge_rl.trainer
from bridge_rl import memory
from bridge_rl.config import ModelSection, Recipe
from bridge_rl.models import load_tokenizer, trained_in_float32
from bridge_rl.plan import count_parameters, work_out_batches
from bridge_rl.report.results import provenance
from bridge_rl.rollout import pages
from bridge_rl.run_options import lora_config, training_arguments, warmup_arguments
from bridge_rl.surgery import attach_bridge
from bridge_rl.trainer import BridgeGRPOTrainer
from bridge_rl.warmup import WarmupGroup, train_blocks

RESULT = Path(__file__).parent / "results" / "memory.json"
TOLERANCE = 0.15
MIB = 2**20
TRL_TILE = memory.VOCABULARY_CHUNK
PHASES = ("rollout", "update")


@dataclass(frozen=True)
class Shape:
    """A model and how it is trained. `judged`: false for shapes that were looked at while the plan was written.

    tile: columns of the vocabulary that the LM head computes at once, where not TRL's 32768. Without a GPU's kernel a
    tile takes eight times its size, and would hide the rest of the update in all of these shapes.
    """

    name: str
    judged: bool = True
    family: str = "llama"
    hidden: int = 256
    inner: int = 688
    layers: int = 8
    heads: int = 8
    kv_heads: int = 4
    vocabulary: int = 8000
    tied: bool = False
    bridge: dict[str, Any] | None = field(default_factory=lambda: {"num_heads": 4, "head_dim": 16})
    train: str = "bridge"
    dtype: str = "float32"
    checkpointing: bool = False
    width: int = 4
    rows: int = 8
    accumulation: int = 1
    prompt: int = 128
    new_tokens: int = 48
    beta: float = 0.0
    tile: int | None = None
    update: dict[str, Any] = field(default_factory=dict)
    warmup: bool = False  # not a run is measured, but the training of its blocks before

    @property
    def phases(self) -> tuple[str, ...]:
        return ("update",) if self.warmup else PHASES

    def recipe(self, directory: str = "unused") -> Recipe:
        content = {
            "model": {"path": self.name, "dtype": self.dtype},
            "bridge": self.bridge,
            "train": self.train,
            "data": {"train": {"path": "unused.jsonl"}},
            "rewards": [{"function": "rewards/answer.py:correct"}],
            "rollout": {"width": self.width, "num_generations": self.width, "max_new_tokens": self.new_tokens},
            "update": self.update,
            "warmup": {"samples": self.width, "groups_per_step": self.rows // self.width, "steps": 2}
            if self.warmup
            else None,
            "training": {
                "per_device_train_batch_size": self.rows,
                "gradient_accumulation_steps": self.accumulation,
                "gradient_checkpointing": self.checkpointing,
                "beta": self.beta,
                "max_steps": 2,
                "save_strategy": "no",
                "report_to": [],
            },
            "launch": {"num_processes": 1},
            "output_dir": directory,
        }
        return TypeAdapter(Recipe).validate_python(content)

    def config(self) -> PreTrainedConfig:
        return AutoConfig.for_model(
            self.family,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocabulary,
            tie_word_embeddings=self.tied,
        )


TINY = ModelSection("package://bridge_rl/tiny/model")
SMOLLM2: dict[str, Any] = {
    "hidden": 576, "inner": 1536, "layers": 30, "heads": 9, "kv_heads": 3, "vocabulary": 49152, "tied": True,
    "bridge": {"num_heads": 3, "head_dim": 32}, "width": 8, "prompt": 256, "new_tokens": 24,
}  # fmt: skip
QWEN2: dict[str, Any] = {"family": "qwen2", "hidden": 320, "inner": 1280, "layers": 10, "kv_heads": 2}
LLAMA: dict[str, Any] = {"hidden": 384, "inner": 1024, "layers": 12, "heads": 6, "kv_heads": 3, "vocabulary": 16000}
SEEN: dict[str, Any] = {"judged": False, "family": "qwen2", "tile": 256}
SHAPES = (
    Shape("bridge", judged=False),
    Shape("bridge, checkpointing", **SEEN, checkpointing=True),
    Shape("lora, bf16 base", **SEEN, train="lora", dtype="bfloat16", rows=16),
    Shape("full, checkpointing", **SEEN, train="full", checkpointing=True),
    Shape("full, tied, accumulation", **SEEN, train="full", tied=True, checkpointing=True, accumulation=2),
    Shape("bridge, width 8", **LLAMA, tile=1024, width=8, rows=16, prompt=320, new_tokens=40),
    Shape("bridge, width 2, checkpointing", **QWEN2, tile=512, width=2, prompt=60, new_tokens=160, checkpointing=True),
    Shape("bridge, prompt not shared", **LLAMA, tile=512, prompt=200, update={"share_prompt": False}),
    Shape("bridge, bf16 base", **LLAMA, tile=512, prompt=240, dtype="bfloat16"),
    Shape("control of equal size", **QWEN2, tile=512, bridge={"kind": "pmatch", "num_heads": 6, "head_dim": 32}),
    Shape("bridge, 96 rows", hidden=96, inner=256, layers=5, tile=256, rows=96, prompt=40, new_tokens=120),
    Shape("lora", **LLAMA, tile=512, train="lora", prompt=160, width=2),
    Shape(
        "lora, checkpointing, token budget", **QWEN2, tile=512, train="lora", checkpointing=True, rows=16,
        accumulation=2, update={"token_budget": 900},
    ),
    Shape("full", **LLAMA, tile=512, train="full", tied=True, prompt=220, new_tokens=30),
    Shape("full, few tokens", **QWEN2, tile=512, train="full", checkpointing=True, rows=4, prompt=40, new_tokens=8),
    Shape("warm-up", **LLAMA, tile=512, warmup=True, width=8, rows=32, prompt=90, new_tokens=30),
    Shape("warm-up, checkpointing", **QWEN2, tile=512, warmup=True, checkpointing=True, rows=16, dtype="bfloat16"),
    Shape("warm-up, prompt not shared", **QWEN2, tile=256, warmup=True, rows=16, update={"share_prompt": False}),
    Shape("SmolLM2-135M, bridge", **SMOLLM2),
    Shape("SmolLM2-135M, full, checkpointing", **SMOLLM2, train="full", checkpointing=True),
)  # fmt: skip


def prepare(shape: Shape, directory: str) -> Callable[[], object]:
    """What is measured, as `bridge_rl.run` would do it, on a random model."""
    recipe, torch_dtype = shape.recipe(directory), getattr(torch, shape.dtype)
    model = AutoModelForCausalLM.from_config(shape.config(), dtype=torch_dtype)
    if recipe.bridge is not None:
        attach_bridge(model, recipe.bridge)
    trained_in_float32(model, recipe.train)
    if shape.warmup:
        count, width = 2 * shape.rows // shape.width, shape.width
        prompts = torch.randint(3, 60, (count, shape.prompt + 1)).tolist()
        completion = torch.randint(3, 60, (shape.new_tokens,)).tolist()
        groups = [WarmupGroup("", prompt, [completion] * width, [""] * width, [True] * width) for prompt in prompts]
        return lambda: train_blocks(model, groups, warmup_arguments(recipe), [], update=recipe.update)
    return make_trainer(shape, recipe, model).train


def make_trainer(shape: Shape, recipe: Recipe, model: PreTrainedModel) -> BridgeGRPOTrainer:
    count = 2 * recipe.launch.num_processes * shape.rows * shape.accumulation
    trainer = BridgeGRPOTrainer(
        model,
        [lambda completion_ids, **kwargs: [float(ids[0] % 2) for ids in completion_ids]],
        training_arguments(recipe),
        width=shape.width,
        train=recipe.train,
        update=recipe.update,
        train_dataset=Dataset.from_dict({"prompt": [f"{n:04d}".ljust(shape.prompt, "1") for n in range(count)]}),
        processing_class=load_tokenizer(TINY),
        peft_config=lora_config(recipe) if recipe.train == "lora" else None,
    )
    trainer.eos_token_ids = []
    return trainer


@contextmanager
def marked(owner: Any, name: str, label: str) -> Iterator[None]:
    """Inside, calls of `owner.name` leave a range called `label` in a profile."""
    original: Callable[..., Any] = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(label):
            return original(*args, **kwargs)

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, original)


def measure(shape: Shape) -> dict[str, int]:
    """Peak bytes of tensors in each phase of two steps."""
    torch.set_num_threads(1)
    pages._zeros = lambda size, like: like.new_zeros(size)  # counted whole, as on a GPU
    if shape.tile is not None:
        trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE = shape.tile
    with tempfile.TemporaryDirectory() as directory, marked(bridge_rl.trainer, "lockstep_rollout", "rollout"):
        if torch.cuda.is_available():
            return measure_cuda(shape, directory)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            train = prepare(shape, directory)
            with record_function("training"):
                train()
            # What is freed without a profiler would be counted for ever.
            del train
            gc.collect()
        assert record.profiler is not None
        return peaks(record.profiler.kineto_results.experimental_event_tree())


def peaks(roots: list[Any]) -> dict[str, int]:
    """From a profile: the most bytes that were allocated at once in each phase."""
    ranges: dict[str, list[tuple[int, int]]] = {"rollout": [], "training": []}
    counts: list[tuple[int, int]] = []
    nodes = list(roots)
    while nodes:
        node = nodes.pop()
        nodes += node.children
        if node.tag == _EventType.Allocation:
            counts.append((node.start_time_ns, node.extra_fields.total_allocated))
        elif node.name in ranges:
            ranges[node.name].append((node.start_time_ns, node.end_time_ns))
    found = dict.fromkeys(PHASES, 0)
    [(start, end)] = ranges["training"]
    for time, count in counts:
        if start <= time <= end:
            phase = "rollout" if any(a <= time <= b for a, b in ranges["rollout"]) else "update"
            found[phase] = max(found[phase], count)
    return found


def measure_cuda(shape: Shape, directory: str) -> dict[str, int]:
    """The same by torch's allocator. (Written for a GPU, and not yet run on one.)"""
    found = dict.fromkeys(PHASES, 0)
    before = torch.cuda.memory_allocated()

    def note(phase: str) -> None:
        found[phase] = max(found[phase], torch.cuda.max_memory_allocated() - before)
        torch.cuda.reset_peak_memory_stats()

    sample = bridge_rl.trainer.lockstep_rollout

    def sampled(*args: Any) -> Any:
        note("update")
        result = sample(*args)
        note("rollout")
        return result

    bridge_rl.trainer.lockstep_rollout = sampled  # before a trainer is made, which takes it then
    train = prepare(shape, directory)
    torch.cuda.reset_peak_memory_stats()
    train()
    note("update")
    return found


def predict(shape: Shape) -> memory.Memory:
    """What a plan says. Prompts have one token more than characters, the first."""
    recipe, config = shape.recipe(), shape.config()
    memory.VOCABULARY_CHUNK = shape.tile or TRL_TILE
    parameters, batches = count_parameters(config, recipe), work_out_batches(recipe)
    groups = (batches.groups_per_micro_batch, batches.groups_per_rank)
    estimate = memory.estimate_warmup if shape.warmup else memory.estimate
    return estimate(recipe, config, parameters, groups, 1, shape.prompt + 1, torch.cuda.is_available())


def compare(shape: Shape, measured: dict[str, int]) -> dict[str, Any]:
    """The shape, and of each phase what was predicted and measured, in MiB, and the ratio."""
    predicted = predict(shape)
    result: dict[str, Any] = {"judged": shape.judged, "shape": asdict(shape)}
    for phase in shape.phases:
        moment: memory.Moment = getattr(predicted, phase)
        ratio = moment.total / measured[phase]
        result[phase] = {
            "predicted_mib": moment.total / MIB,
            "measured_mib": measured[phase] / MIB,
            "ratio": ratio,
            "within": abs(ratio - 1) <= TOLERANCE,
            "moment": moment.phase,
            "terms_mib": {term: size / MIB for term, size in moment.terms.items()},
        }
    return result


def measure_apart(shape: Shape) -> dict[str, int]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--worker", json.dumps(asdict(shape))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(done.stderr)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="shapes whose name begins so, to standard output alone")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(Shape(**json.loads(args.worker)))))
        return
    results = {}
    for shape in SHAPES:
        if shape.name.startswith(args.only or ""):
            result = results[shape.name] = compare(shape, measure_apart(shape))
            ratios = ", ".join(f"{phase} {result[phase]['ratio']:.3f}" for phase in shape.phases)
            print(f"{shape.name:36} {ratios}", flush=True)
    found = (result[phase] for result in results.values() if result["judged"] for phase in PHASES if phase in result)
    judged = [ratio["within"] for ratio in found]
    print(f"{sum(judged)} of {len(judged)} predictions of judged shapes are within {TOLERANCE:.0%}")
    if args.only is None:
        how = "torch.cuda.max_memory_allocated" if torch.cuda.is_available() else "profiler's record of allocations"
        report = {**provenance(), "measure": how, "tolerance": TOLERANCE, "results": results}
        RESULT.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
