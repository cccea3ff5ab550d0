"""GRPO over groups of interdependent rows: TRL's trainer, overridden only where it would break a group.

What is kept whole and how:
- sampling: `lockstep_rollout`, given to TRL as its `rollout_func`;
- TRL's row-wise shuffle and split of a generation batch: it sees blocks [groups, width, ...], see
  `_generate_and_score_completions`, which `_compute_loss` flattens again;
- everything else (the losses, advantages, ratios, logging) is TRL's own.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerControl
from trl import GRPOConfig, GRPOTrainer
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import RepeatSampler

from bridge_rl import run_checkpoints, safety
from bridge_rl.checkpoint import (
    CARD,
    WEIGHTS_FILE,
    load_blocks,
    other_model,
    read_blocks,
    save_blocks,
    write_config,
)
from bridge_rl.config import DynamicSampling, GuardsSection, UpdateSection
from bridge_rl.dynamic_sampling import DynamicSampler, Sampled, local_rows, total_rewards
from bridge_rl.errors import Stopped, UserError
from bridge_rl.evaluation.metrics import RIGHT
from bridge_rl.group import merge_rows, split_rows
from bridge_rl.guards import Guards, Halted, clip_finite
from bridge_rl.meters import GenerationMeter, StepMeter, record_norm_ratios
from bridge_rl.models import uses_fsdp
from bridge_rl.packed_forward import PACKED, packed_logprobs_of_chunks, serve_packed
from bridge_rl.ranks import RankFailed
from bridge_rl.report import names
from bridge_rl.resume import Resume, TrainingComplete, checkpoint_bytes
from bridge_rl.reward_functions import check_columns, told_apart
from bridge_rl.rollout import RolloutOptions
from bridge_rl.rollout.decode import attention
from bridge_rl.rollout.sampling import stream_seed
from bridge_rl.stop import GivenUp, Stop
from bridge_rl.surgery import bridge_parameters, disable_bridge, find_state, freeze_base, has_bridge
from bridge_rl.training_rollout import lockstep_rollout
from bridge_rl.update import (
    join_metrics,
    loss_of_parts,
    part_conflicts,
    parts_of,
    rows_of_parts,
    share_of_loss,
)


class EpochSampler(RepeatSampler):
    """TRL's sampler with the order of an epoch fixed by (seed, epoch), so that a resumed run sees the same data."""

    def __init__(self, epoch: Callable[[], float | None], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator.manual_seed((self.seed or 0) + int(self.epoch() or 0))
        return super().__iter__()


class BaseReference:
    """The reference policy of a run that leaves the base frozen: the same module, Bridge and adapter switched off."""

    def __init__(self, trainer: "BridgeGRPOTrainer") -> None:
        self.trainer = trainer

    def __call__(self, **inputs: Any) -> Any:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        with ExitStack() as stack:
            if has_bridge(model):
                stack.enter_context(disable_bridge(model))
            if hasattr(model, "disable_adapter"):  # a PeftModel
                stack.enter_context(model.disable_adapter())
            return self.trainer.model(**inputs)


class BridgeGRPOTrainer(GRPOTrainer):
    """GRPO in which the rows of a group attend to each other while they are sampled and trained.

    width: rows that think together, a divisor of `args.num_generations` and of the per-device batch.
    train: `bridge` freezes everything else; `lora` needs `peft_config`; `full` trains all.
    mask_truncated: rows cut at the limit stay visible to siblings and out of the loss. (TRL's `completions/*_length`
        metrics then count them as empty.)
    update: how a micro-batch is computed; loss and gradients do not depend on it.
    guards: what ends a run that has gone wrong; None: those of a recipe that says nothing.
    dynamic_sampling: whether prompts without a signal give way to others; None: they do not.
    evaluator: called by `evaluate` with the trainer, returns metrics; None: no evaluation.
    stop: what may end `train` before its last step; None: nothing that is not an error.
    With beta > 0 the reference is the base without Bridge: the module itself with both switched off, or, with
    `train="full"`, a second copy of the base that TRL loads.
    Raises UserError for options that would break groups.
    """

    _tag_names: ClassVar = ["trl", "grpo", "bridge"]
    _name = "Bridge GRPO"
    control: TrainerControl
    reward_func_names: list[str]

    def __init__(
        self,
        model: PreTrainedModel,
        reward_funcs: list[Callable[..., list[float]]],
        args: GRPOConfig,
        *,
        width: int,
        train: Literal["bridge", "lora", "full"] = "bridge",
        mask_truncated: bool = False,
        rollout_options: RolloutOptions | None = None,
        update: UpdateSection | None = None,
        guards: GuardsSection | None = None,
        dynamic_sampling: DynamicSampling | None = None,
        evaluator: Callable[["BridgeGRPOTrainer"], dict[str, float]] | None = None,
        stop: Stop | None = None,
        **kwargs: Any,
    ) -> None:
        safety.check_safe(vars(args), width)
        for key in ("tools", "environment_factory", "rollout_func"):
            if kwargs.get(key):
                raise UserError(f"{key} is set: it samples rows without their siblings, leave it out.")
        if (train == "lora") != (kwargs.get("peft_config") is not None):
            raise UserError(f"train is '{train}': a peft_config is needed for 'lora' and must not be given otherwise.")
        self.width = width
        self.train_mode = train
        self.mask_truncated = mask_truncated
        self.rollout_options = rollout_options
        if stop is not None:
            self.rollout_options = replace(rollout_options or RolloutOptions(), cancelled=stop.asked)
        self.update = update or UpdateSection()
        of_hooks = safety.hook_conflicts(vars(args)) if has_bridge(model) else ()
        for conflict in (*of_hooks, *part_conflicts(vars(args), model.config, self.update)):
            raise UserError(conflict)
        self._own_attention = model.config.get_text_config()._attn_implementation
        self.evaluator = evaluator
        self.evaluations: dict[int, dict[str, float]] = {}  # those of this process, by their step
        self._staging: Path | None = None  # where a checkpoint is being written
        self._sampled: dict[str, Tensor] | None = None
        self._sampled_at: int | None = None  # the optimizer step before which the present batch was sampled
        self.generation = GenerationMeter()
        self.groups_before = 0  # over all ranks, those that were sampled before for the same generation batch
        self._ready: Sampled | None = None
        if problem := other_model(Path(args.output_dir), train, has_bridge(model)):
            raise UserError(problem)
        if has_bridge(model):
            find_state(model).width = width
        if train == "bridge":
            freeze_base(model)
            if args.gradient_checkpointing:
                # Reentrant checkpoints give no gradient to the first block unless their input asks for one.
                model.enable_input_require_grads()
        beta, shares_reference = args.beta, args.beta != 0.0 and train != "full"
        if shares_reference:
            args.beta = 0.0  # or TRL would load a second model
        # TRL turns checkpoints of LoRA under ZeRO-3 into reentrant ones, for a DeepSpeed older than we need.
        checkpointing, args.gradient_checkpointing_kwargs = args.gradient_checkpointing_kwargs, None
        quantized = getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False)
        blocks = [parameter.detach().clone() for _, parameter in bridge_parameters(model)] if quantized else []
        super().__init__(model, reward_funcs, args, rollout_func=lockstep_rollout, **kwargs)
        args.gradient_checkpointing_kwargs = checkpointing
        self.reward_func_names = told_apart(self.reward_func_names)
        if quantized:
            self._train_in_float32(blocks)
        if uses_fsdp():
            safety.check_fsdp(self.accelerator)
            safety.keep_outputs(self.accelerator.state.fsdp_plugin)
        if shares_reference:
            args.beta = self.beta = beta
            self.ref_model = BaseReference(self)
        for module in (self.model, self.ref_model):
            if isinstance(module, torch.nn.Module):
                serve_packed(self.accelerator.unwrap_model(module))
        self._dynamic = None if dynamic_sampling is None else DynamicSampler(self, dynamic_sampling)
        self._meter, self._resume, self.stop = StepMeter(), Resume(self), stop
        self._guards = Guards(self, guards or GuardsSection())
        self.add_callback(self._guards)
        self.add_callback(self._meter)
        self.add_callback(self._resume)
        if stop is not None:
            self.add_callback(stop)

    def _train_in_float32(self, blocks: list[Tensor]) -> None:
        """TRL rounds what is trained on a quantized base to bf16, in which AdamW's small steps vanish."""
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        for (_, parameter), before in zip(bridge_parameters(self.model), blocks, strict=True):
            parameter.data.copy_(before)

    # -- whole groups -------------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch as blocks [groups, width, ...]: its shuffle and split then act on whole groups."""
        self.generation, self.groups_before = GenerationMeter(), 0
        self._sampled_at = self.state.global_step
        if self.stop is not None:
            self.stop.save_bytes = checkpoint_bytes(self)
        if self._dynamic is not None:
            inputs, self._ready = self._dynamic.sample(inputs)
        try:
            batch = super()._generate_and_score_completions(inputs)
        finally:
            self._ready = None
        batch["rewards"] = self._rewards[local_rows(self, len(inputs))]
        for name, value in self.generation.metrics().items():
            self._log(name, value)
        return {key: split_rows(x, self.width) if _is_per_row(x) else x for key, x in batch.items()}

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        return super()._generate(prompts) if self._ready is None else self._ready.generated

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """The loss of whole groups; of all parts but the last the backward pass has then been run already."""
        inputs = {key: merge_rows(x) if _is_per_row(x) else x for key, x in inputs.items()}
        self._guards.batches.append(inputs)
        self._meter.add_tokens(inputs["prompt_mask"])
        self._meter.add_tokens(inputs["completion_mask"])
        parts = parts_of(inputs, self.width, self.update, self.accelerator)
        logged = self._metrics["train" if self.model.training else "eval"]
        before = {name: len(values) for name, values in logged.items()}
        loss = loss_of_parts(lambda part: self._loss_of_part(model, part, inputs), parts, model, self.accelerator)
        if len(parts) > 1:
            join_metrics(logged, before, parts, self.importance_sampling_level, self.accelerator)
        return loss

    def _loss_of_part(self, model: Any, part: dict[str, Any], whole: dict[str, Any]) -> Tensor:
        if self.state.global_step == self._sampled_at:  # no update since
            self._sampled = {"logps": part["sampling_per_token_logps"], "mask": part["completion_mask"]}
        loss = super()._compute_loss(model, part) * share_of_loss(self.loss_type, part, whole)
        return self._guards.watch_loss(loss)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if not self.update.share_prompt:
            return super().training_step(*args, **kwargs)
        # Layers that are checkpointed run again in the backward pass, and look up their attention again.
        with attention(self.accelerator.unwrap_model(self.model), PACKED):
            return super().training_step(*args, **kwargs)

    def _logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **images: None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """TRL's, [B, C] each, with every prompt computed once; `batch_size` rows at once, or what the budget holds."""
        if not self.update.share_prompt:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, compute_aux_loss
            )
        columns = logits_to_keep
        batch = [x[:, part] for part in (slice(-columns), slice(-columns, None)) for x in (input_ids, attention_mask)]
        chunks = list(torch.arange(len(input_ids), device=input_ids.device).split(batch_size or len(input_ids)))
        if self.update.token_budget is not None and not torch.is_grad_enabled():
            chunks = rows_of_parts(batch[1], batch[3], self.width, self.update, self.accelerator)
        module = self.accelerator.unwrap_model(self.model if isinstance(model, BaseReference) else model)
        with self.accelerator.autocast():
            return packed_logprobs_of_chunks(model, module, batch, self.width, chunks, compute_aux_loss)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Any, Any]:
        if self._sampled is None:
            return self._logps_and_entropies(*args, **kwargs)
        logps, mask = self._sampled["logps"], self._sampled["mask"]
        self._sampled = None
        with record_norm_ratios(self.model, mask) as ratios:
            result = self._logps_and_entropies(*args, **kwargs)
        log_ratio = result[0].detach() - logps
        kl = ((log_ratio.exp() - log_ratio - 1) * mask).sum()
        sums = self.accelerator.reduce(torch.stack([mask.sum(), kl, *ratios.values()]), reduction="sum")
        kl_per_token, *ratio_of_layer = (sums[1:] / sums[0]).tolist()
        self._log(names.RECOMPUTE_KL, kl_per_token)
        for layer, ratio in zip(ratios, ratio_of_layer, strict=True):
            self._log(names.norm_ratio(layer), ratio)
        if ratios:
            self._log(names.NORM_RATIO, sum(ratio_of_layer) / len(ratio_of_layer))
        self._guards.check_kl(kl_per_token)
        return result

    def _clip_grad_norm(self, model: Any) -> Any:
        if self._guards.in_charge:
            return clip_finite(model, self.args.max_grad_norm)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The norm of this update, which is left out if a guard says so: no parameter has a gradient then."""
        if grad_norm is None and self._guards.in_charge:  # nothing is clipped, and the host's way would spoil NaNs
            grad_norm = clip_finite(model, math.inf)
        norm = super()._get_grad_norm(model, grad_norm)
        skips = self._guards.skips(model, norm)
        if self._guards.in_charge:
            self.optimizer._is_overflow = skips  # the schedule then waits, as DeepSpeed's does
            if skips:
                model.zero_grad()
        return norm

    @property
    def _generate_every(self) -> int:
        """Micro-steps that one generation batch serves."""
        return self.args.steps_per_generation * self.num_iterations

    @property
    def generation_number(self) -> int:
        """Of the present generation batch: the same on every rank, and after a resume."""
        return self._step // self._generate_every

    @property
    def rollout_seed(self) -> int:
        return stream_seed(self.args.seed, "training", self.generation_number)

    @contextmanager
    def model_for_sampling(self) -> Iterator[PreTrainedModel]:
        """The module that is trained, under one autocast for all passes: each would cast trained fp32 weights anew.

        Under ZeRO-3 its parameters are gathered inside, once, unless `args.ds3_gather_for_generation` is off: each
        forward pass then gathers them, and `generate_groups` keeps the ranks at equally many."""
        unwrapped = unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            gather_deepspeed3_params=self.args.ds3_gather_for_generation,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
        )
        with unwrapped as model, attention(model, self._own_attention), self.accelerator.autocast():
            yield model

    def _calculate_rewards(self, inputs: list[dict[str, Any]], *args: Any) -> Tensor:
        if self._ready is not None:
            rewards = self._ready.rewards
        else:
            start = time.perf_counter()
            rewards = super()._calculate_rewards(inputs, *args)  # [B over all ranks, functions]
            self.generation.reward_seconds += time.perf_counter() - start
            check_columns(self._pending_extra_logs, len(inputs))
            if self.groups_before == 0:  # or prompts that had to be replaced would count less
                self._log_right(rewards[:, 0] > RIGHT)
        self._rewards = total_rewards(rewards, self.reward_weights)
        return rewards

    def _log_right(self, right: Tensor) -> None:
        """`right`: bool [B over all ranks]."""
        groups, prompts = split_rows(right, self.width), split_rows(right, self.num_generations)
        self._log(names.ALL_RIGHT, groups.all(1).float().mean().item())
        self._log(names.ANY_RIGHT, groups.any(1).float().mean().item())
        self._log(names.PROMPT_ALL_RIGHT, prompts.all(1).float().mean().item())
        self._log(names.PROMPT_ALL_WRONG, (~prompts).all(1).float().mean().item())

    def _log(self, name: str, value: float) -> None:
        self._metrics["train" if self.model.training else "eval"][name].append(value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            kept = self._metrics["train"]
            rollout, reward = (sum(kept.get(name, ())) for name in (names.ROLLOUT_SECONDS, names.REWARD_SECONDS))
            for name, value in self._meter.take(rollout, reward).items():
                self._log(name, value)
            self._log(names.SKIPPED, self._guards.skipped)
        if "train_runtime" in logs and self._resume.checkpoint is not None:
            # transformers divides the steps of the whole run by the time since the resume.
            logs = {key: value for key, value in logs.items() if not key.endswith("_per_second")}
        super().log(logs, start_time)

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Sample the held-out problems at every width asked for; TRL's loop knows one width and reports a loss."""
        if self.evaluator is None:
            return {}
        self._resume.evaluation_due = self.is_in_train
        training = self.model.training
        self.model.eval()  # TRL's log would otherwise empty the training metrics into this entry
        try:
            if self.stop is not None and self.stop.stopping:  # the checkpoint will say that it is due
                raise GivenUp
            metrics = self.evaluator(self)
            self.log(dict(metrics))
        except (GivenUp, RankFailed) as why:
            self._save_checkpoint(self.model_wrapped, None)
            raise self._stopped() if isinstance(why, GivenUp) else self._to_mend(why) from why
        finally:
            self.model.train(training)
        self._resume.evaluation_due = False
        self.evaluations[self.state.global_step] = metrics
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        directory = Path(output_dir or self.args.output_dir)
        model = self.accelerator.unwrap_model(self.model)
        if not self.args.should_save:  # called on every rank; under ZeRO-3 only the saving one has the state dict
            return
        if self.train_mode == "bridge":
            directory.mkdir(parents=True, exist_ok=True)
            if state_dict != {}:  # as it is where ZeRO-3 leaves the weights in their shards
                save_blocks(model.state_dict() if state_dict is None else state_dict, directory)
            self.processing_class.save_pretrained(directory)
            torch.save(self.args, directory / "training_args.bin")
        else:
            super()._save(output_dir, state_dict)
        if has_bridge(model):
            write_config(model, directory)
            path = Path(self.args.output_dir) / directory.name if self._staging else directory
            (directory / "README.md").write_text(CARD.format(title=directory.name, path=path))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.train_mode == "bridge" and not self.is_fsdp_enabled:  # which writes and reads the whole model
            path = Path(resume_from_checkpoint)
            load_blocks(model or self.model, read_blocks(path / WEIGHTS_FILE), path)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """`_save` writes the card: TRL's quick start is a pipeline, which would drop the Bridge."""

    def _get_train_sampler(self, dataset: Any = None) -> EpochSampler:
        return EpochSampler(
            epoch=lambda: self.state.epoch,
            data_source=self.train_dataset if dataset is None else dataset,
            mini_repeat_count=self.num_generations,
            batch_size=self.args.generation_batch_size // self.num_generations,
            repeat_count=self._generate_every,
            shuffle=self.shuffle_dataset,
            seed=self.args.seed,
        )

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """TRL's checkpoint and this rank's state, under the checkpoint's name only when all of it is there."""
        output, step = Path(self.args.output_dir), self.state.global_step
        folder, size = run_checkpoints.path_of(output, step), checkpoint_bytes(self)
        if folder.is_dir():  # this step's, from which the run has just gone on
            return
        with self.stop.timing_save() if self.stop else nullcontext():
            with run_checkpoints.writing(
                output, step, size, self.args.save_total_limit, self.state.best_global_step
            ) as self._staging:
                try:
                    self._resume.save(self._staging / folder.name)
                    super()._save_checkpoint(model, trial)
                finally:
                    self._staging = None
        self.state.best_model_checkpoint = None  # it would lie in the directory that is gone

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """TRL's, from a checkpoint or the start. Raises Stopped, with everything saved, when `stop` has ended it, and
        UserError, likewise, when a reward or a rollout has failed or a guard forbids an update."""
        self._resume.checkpoint = None if resume_from_checkpoint is None else Path(resume_from_checkpoint)
        result = None
        try:
            result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        except (GivenUp, RankFailed, Halted) as why:  # in a rollout, behind it, or before an update
            self._resume.rewind()
            self._save_checkpoint(self.model_wrapped, None)
            if not isinstance(why, GivenUp):
                raise self._to_mend(why) from why
        except TrainingComplete:
            self.is_in_train = False
        if self.stop is not None and self.stop.stopping:
            raise self._stopped()
        return result

    def _stopped(self) -> Stopped:
        assert self.stop is not None
        return Stopped(self.stop.sentence(self._saved_to))

    def _to_mend(self, why: Exception) -> UserError:
        return UserError(f"{why} ({self._saved_to} is whole: when the cause is mended, the same command goes on).")

    @property
    def _saved_to(self) -> Path:
        return run_checkpoints.path_of(Path(self.args.output_dir), self.state.global_step)

    @property
    def resumed_here(self) -> bool:
        """Whether no step has been taken since the checkpoint, of this directory, from which the run went on."""
        checkpoint = self._resume.checkpoint
        return checkpoint is not None and checkpoint.resolve() == self._saved_to.resolve()


def _is_per_row(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() > 0
