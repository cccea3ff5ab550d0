"""Roll out REQUESTS on a model sharded over two ranks in each of SHARDINGS: `sharded_job.py DIRECTORY`.

Each rank writes `DIRECTORY/rank_<n>.json`: {"alone" or a sharding: {"elements": [before, after], "served": {request:
[groups, forward passes]}}}. Elements are those of one layer that the rank held before and after the rollouts. Alone, it
has the whole model and no other ranks.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import mkdtemp

import torch
import torch.distributed as dist
from accelerate import PartialState
from conftest import make_bridged
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

import bridge_rl as br
from bridge_rl.config import EvaluationSection, ModelSection
from bridge_rl.errors import UserError
from bridge_rl.evaluation.judge import Judge
from bridge_rl.evaluation.run import plan_evaluation
from bridge_rl.evaluation.samples import SampleStore
from bridge_rl.models import load_tokenizer
from bridge_rl.ranks import RankFailed
from bridge_rl.rollout import budget
from bridge_rl.surgery import find_state

PARAMS = br.SamplingParams(max_new_tokens=24, seed=3, eos_token_id=[2, 4, 5, 6])


@dataclass
class Request:
    """What one rank asks of its rollout."""

    prompts: list[list[int]] = field(default_factory=list)
    width: int | list[int] = 4
    limit: int = PARAMS.max_new_tokens  # of every row
    first_index: int = 0
    options: br.RolloutOptions = field(default_factory=br.RolloutOptions)

    @property
    def widths(self) -> list[int]:
        return [self.width] * len(self.prompts) if isinstance(self.width, int) else self.width


def prompt(length: int, start: int) -> list[int]:
    return [7 + (start + 5 * place) % 40 for place in range(length)]


LONG = [prompt(length, start) for start, length in enumerate([3, 40, 9, 1, 17, 33, 8])]
SHORT = [prompt(length, 30 + length) for length in (2, 5)]
# (rank 0, rank 1); those of one rank follow each other without a pause.
REQUESTS = {
    "one rank has much more work": (
        Request(LONG, options=br.RolloutOptions(max_rows=8, prefill_tokens=16)),
        Request(SHORT, limit=3, first_index=len(LONG)),
    ),
    "one rank has no prompts": (Request(), Request(SHORT, first_index=2)),
    "no rank has prompts": (Request(), Request()),
    "widths differ": (
        Request(SHORT, width=1, limit=9),
        Request(LONG, width=[2, 4, 1, 3, 4, 1, 2], first_index=5, options=br.RolloutOptions(max_rows=5)),
    ),
    "one rank is cancelled": (Request(LONG), Request(LONG, options=br.RolloutOptions(cancelled=lambda: True))),
    "one rank is short of cache": (
        Request(LONG, options=br.RolloutOptions(max_cache_tokens=256)),
        Request(SHORT, first_index=9, options=br.RolloutOptions(prefill_tokens=1)),
    ),
}


def make_model() -> PreTrainedModel:
    model = make_bridged("llama")
    find_state(model).width = 4  # as the trainer leaves it
    return model


def serve(model: nn.Module, request: Request) -> tuple[list[dict], int]:
    """The groups, and the forward passes that this rank ran for them."""
    passes = []
    with model.register_forward_pre_hook(lambda *_: passes.append(1)):
        groups = br.generate_groups(
            model,
            request.prompts,
            request.width,
            PARAMS,
            range(request.first_index, request.first_index + len(request.prompts)),
            limits=[[request.limit] * width for width in request.widths],
            options=request.options,
        )
    return [asdict(group) for group in groups], len(passes)


def fsdp2(model: PreTrainedModel) -> PreTrainedModel:
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def fsdp1(model: PreTrainedModel) -> nn.Module:
    policy = ModuleWrapPolicy({type(model.model.layers[0])})
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"))


def zero3(model: PreTrainedModel) -> PreTrainedModel:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, for minutes
    zero = {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 1,
        "stage3_prefetch_bucket_size": 0,
    }
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    return deepspeed.initialize(model=model, config=config)[0].module


SHARDINGS: dict[str, Callable[[PreTrainedModel], nn.Module]] = {"fsdp2": fsdp2, "fsdp1": fsdp1, "zero3": zero3}


def elements_held(layer: nn.Module) -> int:
    """Elements of the layer's parameters that are on this rank now."""
    total = 0
    for parameter in layer.parameters():
        if isinstance(parameter, DTensor):
            parameter = parameter.to_local()
        elif hasattr(parameter, "ds_tensor") and parameter.numel() == 0:  # ZeRO-3's, not gathered
            parameter = parameter.ds_tensor
        total += parameter.numel()
    return total


def serve_all(shard: Callable[[PreTrainedModel], nn.Module], rank: int) -> dict:
    model = make_model()
    layer = model.model.layers[1]
    sharded = shard(model)
    before = elements_held(layer)
    served = {name: serve(sharded, requests[rank]) for name, requests in REQUESTS.items()}
    return {"elements": [before, elements_held(layer)], "served": served}


def evaluate_with_a_reward_that_fails(rank: int) -> list:
    """On rank 1, at width 1, in its first batch of several."""

    def reward(completion_ids: list[list[int]], **columns: object) -> list[float]:
        if rank == 1 and not failed:
            failed.append(len(completion_ids))
            raise UserError("mine.py:score failed")
        return [0.0] * len(completion_ids)

    failed: list[int] = []
    return evaluate(fsdp2(make_model()), rank, reward)


def evaluate_with_a_cache_that_is_refused(rank: int) -> list:
    """On rank 1, which has no memory left."""
    free = budget.free_memory
    budget.free_memory = lambda device: free(device) * (rank == 0)
    found = evaluate(zero3(make_model()), rank, lambda completion_ids, **columns: [0.0] * len(completion_ids))
    budget.free_memory = free
    return found


def evaluate(model: PreTrainedModel, rank: int, reward: Callable[..., list[float]]) -> list:
    """What this rank is told, and how much it has kept."""
    sampled: list[int] = []
    tokenizer = load_tokenizer(ModelSection("package://bridge_rl/tiny/model"))
    rows = [{"prompt": f"<bos>{n}:2=", "problem": str(n), "answer": "0"} for n in range(6)]
    section = EvaluationSection(widths=[1, 2], samples=44)
    store = SampleStore(Path(mkdtemp(dir=sys.argv[1])), rank)
    PartialState(cpu=True)
    evaluation = plan_evaluation(model, tokenizer, rows, Judge(reward, str), section, 8, 0, store)
    try:
        evaluation.sample(sampled.append)
    except RankFailed as error:
        return [str(error), sum(sampled)]
    return ["", sum(sampled)]


if __name__ == "__main__":
    rank = int(os.environ["RANK"])
    found = {"alone": serve_all(lambda model: model, rank)}
    dist.init_process_group("gloo")
    found["failed"] = evaluate_with_a_reward_that_fails(rank)
    found["refused"] = evaluate_with_a_cache_that_is_refused(rank)
    found |= {name: serve_all(shard, rank) for name, shard in SHARDINGS.items()}
    (Path(sys.argv[1]) / f"rank_{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
