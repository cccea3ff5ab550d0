"""The warm-up (paper, section 4): SFT of the new parameters on right completions of the base.

Sample `samples` completions a problem from the base; keep the problems of which at least `min_right` are right; the
right completions of one problem are one group; train the blocks on them and nothing else. With `mixed` (beyond the
paper) a group holds the wrong completions too, and the loss is on the right ones.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from bridge_rl.config import WarmupSection
from bridge_rl.data import prompt_tokens
from bridge_rl.errors import UserError
from bridge_rl.evaluation.judge import Judge
from bridge_rl.evaluation.run import eos_ids
from bridge_rl.group import alive_from_mask, pad_left, pad_right
from bridge_rl.rollout import RolloutOptions, SamplingParams, generate_groups
from bridge_rl.rollout.sampling import stream_seed
from bridge_rl.surgery import disable_bridge, freeze_base

IGNORED = -100
PROBLEMS_PER_CALL = 16


@dataclass(frozen=True)
class WarmupGroup:
    """All completions sampled for one problem."""

    problem: str
    prompt_ids: list[int]
    completion_ids: list[list[int]]
    completions: list[str]
    correct: list[bool]


def sample_warmup_groups(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    judge: Judge,
    section: WarmupSection,
    max_new_tokens: int,
    max_rows: int | None,
    seed: int,
    progress: Callable[[int], object] = lambda done: None,
) -> list[WarmupGroup]:
    """Completions of the base for every problem, in order, sampled by all ranks together."""
    state = PartialState()
    params = SamplingParams(
        section.max_new_tokens or max_new_tokens,
        seed=stream_seed(seed, "warmup"),
        eos_token_id=eos_ids(model, tokenizer),
    )
    mine = list(range(state.process_index, len(rows), state.num_processes))
    sampled = []
    with disable_bridge(model):
        for start in range(0, len(mine), PROBLEMS_PER_CALL):
            numbers = mine[start : start + PROBLEMS_PER_CALL]
            chosen = [rows[n] for n in numbers]
            prompts = prompt_tokens(tokenizer, [row["prompt"] for row in chosen])
            options = RolloutOptions(max_rows=max_rows)
            groups = generate_groups(model, prompts, section.samples, params, numbers, options=options)
            tokens = [group.tokens for group in groups]
            texts = [tokenizer.batch_decode(group, skip_special_tokens=True) for group in tokens]
            judged = [group.correct for group in judge(chosen, texts, tokens)]
            for number, *made in zip(numbers, prompts, tokens, texts, judged, strict=True):
                sampled.append((number, WarmupGroup(rows[number]["problem"], *made)))
            progress(len(numbers))
    return [group for _, group in sorted(gather_object(sampled), key=lambda pair: pair[0])]


def write_groups(path: Path, groups: Sequence[WarmupGroup]) -> None:
    """One problem a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(asdict(group)) + "\n" for group in groups))


def read_groups(path: Path) -> list[WarmupGroup]:
    """Inverse of `write_groups`. Raises UserError naming a damaged line."""
    groups = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            groups.append(WarmupGroup(**json.loads(line)))
        except (json.JSONDecodeError, TypeError) as error:
            raise UserError(f"{path}, line {number}, is no warm-up group ({error}): delete the file.") from error
    return groups


def usable(groups: Sequence[WarmupGroup], section: WarmupSection) -> list[WarmupGroup]:
    """The groups with enough right completions; without `mixed`, cut down to those. UserError if none is left."""
    kept = []
    for group in groups:
        if sum(group.correct) < section.min_right:
            continue
        chosen = [n for n, right in enumerate(group.correct) if right or section.mixed]
        kept.append(
            WarmupGroup(
                group.problem,
                group.prompt_ids,
                [group.completion_ids[n] for n in chosen],
                [group.completions[n] for n in chosen],
                [group.correct[n] for n in chosen],
            )
        )
    if not kept:
        raise UserError(
            f"warmup: none of {len(groups)} problems had {section.min_right} right completions of {section.samples}: "
            "use easier problems (warmup.data), more samples, or a stronger base."
        )
    return kept


def collate(groups: Sequence[WarmupGroup]) -> dict[str, Tensor]:
    """Groups of any widths as one batch of the widest's width N: ids, mask and labels [G*N, T], layout [G, N, T].

    Narrower groups are filled with copies of their first row that no sibling sees and no loss counts.
    """
    width = max(len(group.correct) for group in groups)
    prompts, completions, correct, real = [], [], [], []
    for group in groups:
        for n in range(width):
            row = n if n < len(group.correct) else 0
            prompts.append(group.prompt_ids)
            completions.append(group.completion_ids[row])
            real.append(n == row)
            correct.append(n == row and group.correct[row])
    prompt, prompt_mask = pad_left(prompts, 0, "cpu")
    completion, completion_mask = pad_right(completions, 0, "cpu")
    mask = torch.cat([prompt_mask, completion_mask], dim=1)
    counted = completion_mask.bool() & torch.tensor(correct)[:, None]
    labels = torch.cat([torch.full_like(prompt, IGNORED), completion.masked_fill(~counted, IGNORED)], dim=1)
    alive = alive_from_mask(mask * torch.tensor(real)[:, None], width)
    return {
        "input_ids": torch.cat([prompt, completion], dim=1),
        "attention_mask": mask,
        "labels": labels,
        "bridge_alive": alive,
    }


def train_blocks(
    model: PreTrainedModel,
    groups: Sequence[WarmupGroup],
    args: TrainingArguments,
    callbacks: list[TrainerCallback],
) -> list[dict[str, float]]:
    """SFT of the blocks on `groups` (those `usable`), the base frozen; returns the log history."""
    freeze_base(model)
    trainer = Trainer(model=model, args=args, train_dataset=list(groups), data_collator=collate, callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)  # the callbacks given show progress
    trainer.train()
    return trainer.state.log_history
