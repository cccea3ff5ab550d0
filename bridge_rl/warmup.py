"""The warm-up (paper, section 4): SFT of the new parameters on right completions of the base.

Sample `samples` completions a problem from the base; keep the problems of which at least `min_right` are right; the
right completions of one problem are one group; train the blocks on them and nothing else. With `mixed` (beyond the
paper) a group holds the wrong completions too, and the loss is on the right ones.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from trl.trainer.utils import add_fused_lm_head

from bridge_rl import run_checkpoints
from bridge_rl.checkpoint import WEIGHTS_FILE, load_blocks, read_blocks, save_blocks
from bridge_rl.config import UpdateSection, WarmupSection
from bridge_rl.data import prompt_tokens
from bridge_rl.errors import Stopped, UserError
from bridge_rl.evaluation.judge import Judge
from bridge_rl.evaluation.run import ROWS_PER_WRITE, batches
from bridge_rl.evaluation.samples import drop_half_line
from bridge_rl.files import write_whole
from bridge_rl.group import alive_from_mask, pad_left, pad_right
from bridge_rl.guards import poison
from bridge_rl.packed_forward import PACKED, packed_logprobs, serve_packed
from bridge_rl.ranks import together
from bridge_rl.rollout import Rollout, RolloutOptions, SamplingParams
from bridge_rl.rollout.decode import attention
from bridge_rl.stop import Stop
from bridge_rl.surgery import bridge_parameters, disable_bridge, freeze_base
from bridge_rl.update import loss_of_parts, parts_of

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

    def __post_init__(self) -> None:
        ids = [self.prompt_ids, *self.completion_ids]
        if not len(self.completion_ids) == len(self.completions) == len(self.correct):
            raise ValueError("completion_ids, completions and correct must have one entry a completion")
        if not all(ids) or not all(type(token) is int for row in ids for token in row):
            raise ValueError("prompt_ids and each of completion_ids must be token ids, at least one")
        if not all(type(right) is bool for right in self.correct):
            raise ValueError("correct must be true or false for each completion")


class WarmupStore:
    """Groups on disk as they end, one file a rank, so that sampling that was cut off goes on where it was."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        state = PartialState()
        self.path = directory / f"rank_{state.process_index}.jsonl"
        directory.mkdir(parents=True, exist_ok=True)
        if state.is_main_process:
            for path in directory.glob("rank_*.jsonl"):  # the last line that a kill has cut
                drop_half_line(path)
        state.wait_for_everyone()

    def append(self, groups: dict[int, WarmupGroup]) -> None:
        """By the number of the problem; written through to the disk before it returns."""
        with self.path.open("a") as file:
            file.write("".join(json.dumps({"number": n, **asdict(group)}) + "\n" for n, group in groups.items()))
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> dict[int, WarmupGroup]:
        """Those of all ranks, in the order of the problems. Raises UserError naming a damaged line."""
        found = {}
        for path in sorted(self.directory.glob("rank_*.jsonl")):
            for content in read_lines(path):
                number = content.pop("number")
                found[number] = WarmupGroup(**content)
        return dict(sorted(found.items()))


def sample_warmup_groups(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    judge: Judge,
    samples: int,
    params: SamplingParams,
    max_rows: int | None,
    store: WarmupStore,
    cancelled: Callable[[], bool],
    progress: Callable[[int], object] = lambda done: None,
) -> None:
    """`samples` completions of each problem of this rank's share that `store` does not hold, until `cancelled`.

    Returns on all ranks at once, or raises RankFailed on all, with what was judged before in `store`.
    """
    state = PartialState()
    options = RolloutOptions(max_rows=max_rows, cancelled=cancelled)
    done = store.read().keys()
    state.wait_for_everyone()  # all have read before one writes
    mine = range(state.process_index, len(rows), state.num_processes)
    with together(), disable_bridge(model):
        for start in range(0, len(mine), PROBLEMS_PER_CALL):
            numbers = [number for number in mine[start : start + PROBLEMS_PER_CALL] if number not in done]
            prompts = prompt_tokens(tokenizer, [rows[n]["prompt"] for n in numbers]) if numbers else []
            rollout = Rollout(model, prompts, samples, params, numbers, options=options)
            with closing(rollout.passes()) as passes:
                ended = ([pair for pair in of_pass if "abort" not in pair[1].finish_reasons] for of_pass in passes)
                for batch in batches(ended, max(1, ROWS_PER_WRITE // samples)):
                    places = [place for place, _ in batch]
                    chosen, tokens = [rows[numbers[place]] for place in places], [group.tokens for _, group in batch]
                    texts = [tokenizer.batch_decode(group, skip_special_tokens=True) for group in tokens]
                    judged = [group.correct for group in judge(chosen, texts, tokens)]
                    made = zip((prompts[place] for place in places), tokens, texts, judged, strict=True)
                    store.append(
                        {
                            numbers[place]: WarmupGroup(row["problem"], *group)
                            for place, row, group in zip(places, chosen, made, strict=True)
                        }
                    )
            progress(min(PROBLEMS_PER_CALL, len(mine) - start))


def collect_groups(store: WarmupStore, num_problems: int, path: Path) -> list[WarmupGroup]:
    """All groups, on every rank, from `path` on, into which the store is emptied.

    Raises UserError where a part is missing, as on nodes that do not share a disk.
    """
    groups: list[WarmupGroup] = []

    def collect() -> None:
        groups.extend(store.read().values())
        if len(groups) < num_problems:
            raise UserError(
                f"{store.directory} holds {len(groups)} of {num_problems} warm-up problems after sampling: all ranks "
                "must write to one disk, so name an output directory that every node shares."
            )
        write_groups(path, groups)
        shutil.rmtree(store.directory)

    run_checkpoints.on_main(collect)
    return broadcast_object_list([groups])[0]


def write_groups(path: Path, groups: Sequence[WarmupGroup]) -> None:
    """One problem a line; the file is there when it is whole."""
    write_whole(path, "".join(json.dumps(asdict(group)) + "\n" for group in groups))


def read_groups(path: Path) -> list[WarmupGroup]:
    """Inverse of `write_groups`. Raises UserError naming a damaged line."""
    return [WarmupGroup(**content) for content in read_lines(path)]


def check_tokens(groups: Sequence[WarmupGroup], tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Raise UserError for completions that other tokens stand for in `tokenizer` than in the one that wrote `path`."""
    for number, group in enumerate(groups, start=1):
        if tokenizer.batch_decode(group.completion_ids, skip_special_tokens=True) != group.completions:
            raise UserError(
                f"{path}, line {number}, was written with another tokenizer: name another warmup.path, or leave it out."
            )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The content of each line, which is a group and may have a number. Raises UserError naming a damaged one."""
    lines = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            content = json.loads(line)
            WarmupGroup(**{key: value for key, value in content.items() if key != "number"})
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path}, line {number}, is no warm-up group ({error}): delete the file.") from error
        lines.append(content)
    return lines


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


def collate(groups: Sequence[WarmupGroup]) -> dict[str, Any]:
    """Groups of any widths as one batch of the widest's width N: ids and masks of prompts and completions, the tokens
    that the loss `counted`, all [G*N, columns], and `width`.

    Narrower groups are filled with rows of the prompt alone. On a prompt all rows of a group are equal, so that one
    more of them changes nothing.
    """
    width = max(len(group.correct) for group in groups)
    prompts, completions, correct = [], [], []
    for group in groups:
        fillers = width - len(group.correct)
        prompts += [group.prompt_ids] * width
        completions += [*group.completion_ids, *([[]] * fillers)]
        correct += [*group.correct, *([False] * fillers)]
    prompt, prompt_mask = pad_left(prompts, 0, "cpu")
    completion, completion_mask = pad_right(completions, 0, "cpu")
    return {
        "prompt_ids": prompt,
        "prompt_mask": prompt_mask,
        "completion_ids": completion,
        "completion_mask": completion_mask,
        "counted": completion_mask.bool() & torch.tensor(correct)[:, None],
        "width": width,
    }


class BlockTrainer(Trainer):
    """SFT of the blocks. Its checkpoints hold them alone, and have their name when they are whole (run_checkpoints).

    update: how a batch is computed; loss and gradients do not depend on it. stop: learns how long saves take.
    """

    def __init__(
        self, model: PreTrainedModel, *, update: UpdateSection, stop: Stop | None = None, **kwargs: Any
    ) -> None:
        add_fused_lm_head(model)
        serve_packed(model)
        super().__init__(model, **kwargs)
        self.update, self.stop = update, stop
        blocks = bridge_parameters(self.accelerator.unwrap_model(self.model))
        self.checkpoint_bytes = 3 * sum(p.numel() * p.element_size() for _, p in blocks)  # with Adam's two moments
        if stop is not None:
            stop.save_bytes = self.checkpoint_bytes
        self._staging: Path | None = None

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """The mean cross-entropy of the tokens counted on all ranks; of all parts but the last the backward pass has
        then been run already."""
        of_ranks = self.accelerator.reduce(inputs["counted"].sum().float(), reduction="mean")  # as gradients are
        parts = parts_of(inputs, inputs["width"], self.update, self.accelerator)

        def loss_of(part: dict[str, Any]) -> Tensor:
            return poison(self.cross_entropy(model, part) / of_ranks)

        return loss_of_parts(loss_of, parts, model, self.accelerator)

    def cross_entropy(self, model: Any, part: dict[str, Any]) -> Tensor:
        """Summed over the counted tokens, by TRL's fused LM head, which never holds all logits."""
        width, counted = part["width"], part["counted"]
        batch = [part[key] for key in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")]
        if self.update.share_prompt:
            logprobs = packed_logprobs(model, self.accelerator.unwrap_model(self.model), batch, width)[0]
            return -(logprobs * counted).sum()
        ids, mask = torch.cat(batch[::2], dim=1), torch.cat(batch[1::2], dim=1)
        labels = torch.cat([torch.full_like(batch[0], IGNORED), batch[2].masked_fill(~counted, IGNORED)], dim=1)
        alive = alive_from_mask(mask, width)
        output = model(input_ids=ids, attention_mask=mask, bridge_alive=alive, labels=labels, fused_lm_head=True)
        return -output.log_probs.sum()

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Of all ranks. Raises UserError, before the step is taken, for one that is not finite."""
        norm = super()._get_grad_norm(model, grad_norm)
        if not self.args.fp16 and not math.isfinite(norm):  # fp16's scaler finds its scale by such
            step = self.state.global_step + 1
            raise UserError(
                f"warmup: the loss or gradient of step {step} is not finite, so it was not taken: "
                "lower warmup.learning_rate, in another output_dir; warmup.path can name the completions of this one "
                "(groups.jsonl)."
            )
        return norm

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if not self.update.share_prompt:
            return super().training_step(*args, **kwargs)
        # Layers that are checkpointed run again in the backward pass, and look up their attention again.
        with attention(self.accelerator.unwrap_model(self.model), PACKED):
            return super().training_step(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        assert output_dir is not None
        if self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_blocks(self.accelerator.unwrap_model(self.model).state_dict(), Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        path = Path(resume_from_checkpoint)
        load_blocks(self.accelerator.unwrap_model(model or self.model), read_blocks(path / WEIGHTS_FILE), path)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        output, step = Path(self.args.output_dir), self.state.global_step
        if run_checkpoints.path_of(output, step).is_dir():  # saved already, and then asked to stop
            return
        with (
            self.stop.timing_save() if self.stop else nullcontext(),
            run_checkpoints.writing(output, step, self.checkpoint_bytes, keep=1) as self._staging,
        ):
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None


def train_blocks(
    model: PreTrainedModel,
    groups: Sequence[WarmupGroup],
    args: TrainingArguments,
    callbacks: list[TrainerCallback],
    stop: Stop | None = None,
    update: UpdateSection | None = None,
) -> list[dict[str, float]]:
    """SFT of the blocks on `groups` (those `usable`), the base frozen; returns the log history.

    Goes on from the last good checkpoint in `args.output_dir`. Raises Stopped, with everything saved, when `stop` has
    ended it.
    """
    freeze_base(model)
    output = Path(args.output_dir)
    checkpoint = run_checkpoints.checkpoint_to_resume("auto", output)
    trainer = BlockTrainer(
        model,
        update=update or UpdateSection(),
        stop=stop,
        args=args,
        train_dataset=list(groups),
        data_collator=collate,
        callbacks=[*callbacks, *([stop] if stop else [])],
    )
    trainer.remove_callback(PrinterCallback)  # the callbacks given show progress
    if checkpoint is None or run_checkpoints.step_of(checkpoint) < args.max_steps:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    else:
        trainer._load_from_checkpoint(str(checkpoint))
        trainer.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    if stop is not None and stop.stopping:
        raise Stopped(stop.sentence(run_checkpoints.path_of(output, trainer.state.global_step)))
    return trainer.state.log_history
