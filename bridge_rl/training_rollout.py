"""The rollout of a training batch as TRL asks for it: whole groups, sampled in lockstep by the module in training."""

import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from bridge_rl.group import prompts_of_groups, repeat_for_rows
from bridge_rl.ranks import together
from bridge_rl.rollout import Rollout, SamplingParams

if TYPE_CHECKING:
    from bridge_rl.trainer import BridgeGRPOTrainer


def lockstep_rollout(prompts: list[Any], trainer: "BridgeGRPOTrainer") -> dict[str, list[Any]]:
    """TRL's `rollout_func`: one completion a row for this rank's prompts, which come repeated `num_generations` times.

    Raises ValueError if the rows of a group do not share a prompt, and RankFailed on all ranks for a prompt that one
    cannot serve.
    """
    start = time.perf_counter()
    prompt_ids = trainer._tokenize_prompts(prompts)[0]
    per_group = prompts_of_groups(prompt_ids, trainer.width)
    first = trainer.groups_before + trainer.accelerator.process_index * len(per_group)
    indices = range(first, first + len(per_group))
    params = SamplingParams(
        max_new_tokens=trainer.max_completion_length,
        temperature=trainer.temperature,
        seed=trainer.rollout_seed,
        eos_token_id=trainer.eos_token_ids,
    )
    with trainer.model_for_sampling() as model:
        with together():  # a prompt that cannot be served may be one rank's alone
            rollout = Rollout(model, per_group, trainer.width, params, indices, options=trainer.rollout_options)
        with nullcontext() if rollout.ranks.together else together():
            groups = rollout.run()
    if trainer.stop is not None:
        trainer.stop.give_up_if_asked()

    tokens = [row for group in groups for row in group.tokens]
    cut = [reason == "length" for group in groups for reason in group.finish_reasons]
    group_index = repeat_for_rows(indices, trainer.width)
    trainer.generation.add(time.perf_counter() - start, sum(map(len, tokens)), cut, rollout.stats)
    trainer._log_completion_extra("group", group_index)
    output: dict[str, list[Any]] = {
        "prompt_ids": prompt_ids,
        "completion_ids": tokens,
        "logprobs": [row for group in groups for row in group.logprobs],
        "group_index": group_index,
    }
    if trainer.mask_truncated:
        output["env_mask"] = [[int(not c)] * len(row) for c, row in zip(cut, tokens, strict=True)]
    return output
