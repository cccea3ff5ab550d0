"""A recipe: typed YAML (`typed_yaml`) plus `key=value` overrides, section by section."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from bridge_rl.block import BridgeConfig
from bridge_rl.errors import UserError
from bridge_rl.rollout.sampling import LEAST_TEMPERATURE
from bridge_rl.stop import parse_duration
from bridge_rl.typed_yaml import STRICT, apply_override, read_yaml, validate, write_yaml

# An empty one would be the directory that one is in. The shell leaves a `~` behind `key=` as it is.
Place = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]


@dataclass
class ModelSection:
    """The base model, or a checkpoint with a Bridge to go on from.

    path: hub id, directory, or `package://NAME/PATH` inside an installed Python package.
    gguf_file: a GGUF file at `path`, loaded dequantized.
    revision, attn_implementation, trust_remote_code: as in `from_pretrained`.
    chat_template_kwargs: variables of the chat template, such as {enable_thinking: false}; the tokenizer that is saved
        with the model has them in its template.
    dtype: of the base weights (`float32`, `bfloat16`). Weights that are trained are kept in float32 either way.
    quantization: of a frozen base's linear layers but the head: `int8` or `nf4`, by bitsandbytes (the extra
        `quantized`). The Bridge is then one for the quantized base, and its checkpoint says so.
    """

    path: Place
    gguf_file: str | None = None
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    quantization: Literal["int8", "nf4"] | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    __pydantic_config__: ClassVar = STRICT

    def __post_init__(self) -> None:
        for name in self.chat_template_kwargs:
            if not name.isidentifier():
                raise UserError(f"model.chat_template_kwargs has '{name}': use names of variables of the template.")


@dataclass
class DataSource:
    """Problems with verifiable answers.

    path: hub id, directory, a `.jsonl`, `.json` or `.parquet` file, or `package.module:function`, which is called with
        `kwargs` and returns rows.
    name, split, revision: of a data set on a hub (name and split of a directory, too), as in `load_dataset`.
    problem_column, answer_column: where they are in a row.
    answer_pattern: a regular expression whose first group is the answer (GSM8K: `#### (.+)`); None: the whole column.
    check_answers: refuse (true) or `drop` rows whose answer math-verify cannot read; false for other checkers.
    size: use at most the first so many rows, after shuffling by the recipe's seed if `shuffle`.
    """

    path: Place
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    # Null for those that a recipe inherits, over which {} would be laid without effect.
    kwargs: Annotated[dict[str, Any], BeforeValidator(lambda v: {} if v is None else v)] = field(default_factory=dict)
    problem_column: str = "problem"
    answer_column: str = "answer"
    answer_pattern: str | None = None
    check_answers: Literal["drop"] | bool = True
    size: int | None = None
    shuffle: bool = False
    __pydantic_config__: ClassVar = STRICT


@dataclass
class DataSection:
    """Training problems, problems held out for evaluation, and how a problem becomes a prompt.

    system_prompt: the chat's, if any. prompt: the user's turn, with `{problem}` where the problem goes.
    """

    train: DataSource
    eval: DataSource | None = None
    system_prompt: str | None = None
    prompt: str = "{problem}"
    __pydantic_config__: ClassVar = STRICT

    def __post_init__(self) -> None:
        if "{problem}" not in self.prompt:
            raise UserError("data.prompt has no '{problem}' in it: say where the problem goes.")


@dataclass
class DynamicSampling:
    """Prompts whose completions all have one reward, and so no gradient, give way to others of the data (DAPO).

    max_rounds: times that further prompts are sampled, as many as are missing, before the rest stays as it is.
    """

    max_rounds: int = 3
    __pydantic_config__: ClassVar = STRICT

    def __post_init__(self) -> None:
        if self.max_rounds < 1:
            raise UserError(
                f"rollout.dynamic_sampling.max_rounds is {self.max_rounds}: it must be at least 1; to sample once only "
                "set rollout.dynamic_sampling=null."
            )


@dataclass
class RolloutSection:
    """Sampling in training.

    width: rows that think together (w). num_generations: completions of a prompt that share one baseline (G), a
    multiple of the width. max_new_tokens: of a completion, its EOS included. temperature: of the draws, and of the
    log-probs in training; top_p and top_k must leave the distribution whole. mask_truncated: completions cut at the
    limit stay visible to their siblings and out of the loss. max_rows: rows sampled at once, by default all of a
    rank's. max_cache_tokens: tokens whose keys and values are held at once, by default as many as free memory holds.
    cuda_graphs: as in `RolloutOptions`. dynamic_sampling: None trains on every prompt that was sampled.
    """

    width: int = 4
    num_generations: int = 8
    max_new_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    mask_truncated: bool = False
    max_rows: int | None = None
    max_cache_tokens: int | None = None
    cuda_graphs: bool = False
    dynamic_sampling: DynamicSampling | None = None
    __pydantic_config__: ClassVar = STRICT

    def __post_init__(self) -> None:
        if self.width < 1:
            raise UserError(f"rollout.width is {self.width}: it must be at least 1.")
        if self.num_generations < 2 or self.num_generations % self.width != 0:
            raise UserError(
                f"rollout.num_generations is {self.num_generations} and rollout.width {self.width}: "
                "num_generations must be a multiple of the width, and at least 2."
            )
        if self.max_new_tokens < 1:
            raise UserError(f"rollout.max_new_tokens is {self.max_new_tokens}: it must be at least 1.")
        if self.temperature < LEAST_TEMPERATURE:
            raise UserError(
                f"rollout.temperature is {self.temperature}: training must sample, so set it to {LEAST_TEMPERATURE} or "
                "more."
            )
        if self.top_p != 1.0 or self.top_k != 0:
            raise UserError(
                f"rollout.top_p is {self.top_p} and rollout.top_k {self.top_k}: the training log-probs know the "
                "temperature only, so set top_p=1.0 and top_k=0."
            )
        if self.max_rows is not None and self.max_rows < self.width:
            raise UserError(
                f"rollout.max_rows is {self.max_rows}: it must hold a group of {self.width} (rollout.width)."
            )
        if self.max_cache_tokens is not None and self.max_cache_tokens <= self.width * self.max_new_tokens:
            raise UserError(
                f"rollout.max_cache_tokens is {self.max_cache_tokens}: it must hold a prompt and its group, of "
                f"{self.width} (rollout.width) x {self.max_new_tokens} (rollout.max_new_tokens) tokens."
            )


@dataclass
class UpdateSection:
    """How an update is computed, the warm-up's too. None of these changes loss or gradients.

    share_prompt: a prompt is computed once for all rows that continue it, and completions without padding (packed).
    Dropout in the model or LoRA is then drawn once a prompt. trim: rows are padded to the longest of what is computed,
    not of the generation batch. token_budget: at most so many tokens (or one group) are computed at once, each part
    with a backward pass of its own; None: a whole micro-batch.
    """

    share_prompt: bool = True
    trim: bool = True
    token_budget: int | None = None
    __pydantic_config__: ClassVar = STRICT

    def __post_init__(self) -> None:
        if self.token_budget is not None and self.token_budget < 1:
            raise UserError(f"update.token_budget is {self.token_budget}: it must be at least 1.")


@dataclass
class GuardsSection:
    """What ends a run that has gone wrong, before the update that would spoil it; the batch is kept in OUTPUT/guards.

    max_skipped: an update whose loss or gradient is not finite is skipped, and so many in a row end the run; None takes
    such updates. max_rollout_kl: nats a token by which the log-probs that training computes may differ from those of
    the rollout, of which they are the same model's; None: any.
    """

    max_skipped: int | None = 5
    max_rollout_kl: float | None = 0.01
    __pydantic_config__: ClassVar = STRICT

    def __post_init__(self) -> None:
        if self.max_skipped is not None and self.max_skipped < 1:
            raise UserError(
                f"guards.max_skipped is {self.max_skipped}: it must be at least 1 (1 stops at the first), or null."
            )
        if self.max_rollout_kl is not None and not self.max_rollout_kl > 0:
            raise UserError(f"guards.max_rollout_kl is {self.max_rollout_kl}: it must be above 0, or null.")


@dataclass
class RewardSection:
    """One reward: `rewards/answer.py:correct` or `package.module:function`, fixed keyword arguments, and its weight.

    The first reward of a recipe also says which completions count as right in metrics and in the warm-up: above 0.5.
    """

    function: Place
    weight: float = 1.0
    kwargs: dict[str, Any] = field(default_factory=dict)
    __pydantic_config__: ClassVar = STRICT


@dataclass
class LoraSection:
    """PEFT's LoRA on the base, the blocks trained in full beside it. Keys as in `LoraConfig`, alpha its lora_alpha."""

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    __pydantic_config__: ClassVar = STRICT

    def __post_init__(self) -> None:
        if self.r < 1:
            raise UserError(f"lora.r is {self.r}: it must be at least 1.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout is {self.dropout:g}: it must be at least 0 and below 1.")


@dataclass
class WarmupSection:
    """SFT of the new parameters on right completions of the base (paper, section 4).

    data: problems to sample; None: the training problems. samples: completions a problem; a problem is used if at least
    `min_right` of them are right. mixed: beyond the paper, groups hold wrong completions too, with the loss on the
    right rows only. max_new_tokens: of a completion; None: as in the rollout, whose temperature it is sampled at.
    steps, learning_rate: of the SFT. groups_per_step: per rank. path: where the completions are written, and taken from
    if they exist, whatever `problems` and `samples` say.
    """

    problems: int = 512
    samples: int = 8
    min_right: int = 2
    mixed: bool = False
    steps: int = 100
    groups_per_step: int = 16
    learning_rate: float = 1e-3
    max_new_tokens: int | None = None
    data: DataSource | None = None
    path: Place | None = None
    __pydantic_config__: ClassVar = STRICT

    def __post_init__(self) -> None:
        if not 2 <= self.min_right <= self.samples:
            raise UserError(
                f"warmup.min_right is {self.min_right} and warmup.samples {self.samples}: min_right must be between 2 "
                "and samples."
            )
        if min(self.problems, self.steps, self.groups_per_step) < 1:
            raise UserError("warmup.problems, warmup.steps and warmup.groups_per_step must be at least 1.")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise UserError(f"warmup.max_new_tokens is {self.max_new_tokens}: it must be at least 1.")
        if self.learning_rate <= 0:
            raise UserError(f"warmup.learning_rate is {self.learning_rate}: it must be above 0.")


@dataclass
class EvaluationSection:
    """Sampling the held-out problems at several widths, in the loop and at the end.

    samples: completions a problem at each width, in samples / width groups (at least one): widths cost the same.
    every: training steps between evaluations, None: at the end only. temperature, top_p: of the draws. max_new_tokens:
    of a completion; None: as in the rollout. max_rows: rows sampled at once.
    """

    widths: list[int] = field(default_factory=lambda: [1, 4])
    problems: int = 128
    samples: int = 8
    every: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int | None = None
    max_rows: int | None = 64
    __pydantic_config__: ClassVar = STRICT

    def __post_init__(self) -> None:
        if not self.widths or min(self.widths) < 1:
            raise UserError(f"evaluation.widths is {self.widths}: name at least one width, each at least 1.")
        if len(set(self.widths)) < len(self.widths):
            raise UserError(f"evaluation.widths is {self.widths}: name each width once.")
        for key in ("problems", "samples", "every", "max_new_tokens"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"evaluation.{key} is {value}: it must be at least 1.")
        if self.max_rows is not None and self.max_rows < max(self.widths):
            raise UserError(
                f"evaluation.max_rows is {self.max_rows}: it must hold a group of the largest of evaluation.widths, "
                f"{max(self.widths)}."
            )
        if not (self.temperature == 0 or self.temperature >= LEAST_TEMPERATURE) or not 0 < self.top_p <= 1:
            raise UserError(
                f"evaluation.temperature is {self.temperature} and evaluation.top_p {self.top_p}: the temperature must "
                f"be 0 (greedy) or at least {LEAST_TEMPERATURE}, top_p above 0 and at most 1."
            )


@dataclass
class LoggingSection:
    """Weights & Biases: `off`, `offline` or `online`. Without a key `online` goes offline and says so.

    project: its name there. name: the run's; None: that of output_dir.
    """

    # YAML takes an `off` without quotes for false.
    wandb: Annotated[Literal["off", "offline", "online"], BeforeValidator(lambda v: "off" if v is False else v)] = "off"
    project: str = "bridge-rl"
    name: str | None = None
    __pydantic_config__: ClassVar = STRICT


@dataclass
class LaunchSection:
    """What the recipe is planned for; a run on other hardware is refused until this says so.

    num_processes: None accepts any. gpu_memory_gb: of one GPU, for the plan. zero_stage: of DeepSpeed, which a run of
    several processes turns on, with the file in launch/deepspeed, unless the launcher has configured it. offload: what
    is kept in the machine's memory, `optimizer` (its state, stages 2 and 3) or `all` (parameters too, stage 3).
    """

    num_processes: int | None = None
    gpu_memory_gb: float | None = None
    zero_stage: Literal[0, 1, 2, 3] = 0
    offload: Literal["none", "optimizer", "all"] = "none"
    __pydantic_config__: ClassVar = STRICT

    def __post_init__(self) -> None:
        if self.num_processes is not None and self.num_processes < 1:
            raise UserError(f"launch.num_processes is {self.num_processes}: it must be at least 1, or null for any.")
        if self.gpu_memory_gb is not None and self.gpu_memory_gb <= 0:
            raise UserError(f"launch.gpu_memory_gb is {self.gpu_memory_gb:g}: it must be above 0, or null.")
        lowest = {"none": 0, "optimizer": 2, "all": 3}[self.offload]
        if self.zero_stage < lowest:
            raise UserError(
                f"launch.offload is '{self.offload}' and launch.zero_stage {self.zero_stage}: set zero_stage={lowest}"
                f"{'' if lowest == 3 else ' or 3'}, or offload=none."
            )

    @property
    def deepspeed_config(self) -> str:
        """The file that configures what the section asks for; only with a stage."""
        offload = "" if self.offload == "none" else f"_offload_{self.offload}"
        return f"launch/deepspeed/zero{self.zero_stage}{offload}.json"


@dataclass
class Recipe:
    """A whole run. `training` holds fields of TRL's GRPOConfig under their own names.

    output_dir: where checkpoints, model, samples and the resolved recipe go. seed: of everything random in the run.
    resume: `auto` goes on from the last good checkpoint in output_dir if there is one, `never` refuses a directory that
    has checkpoints, anything else is the checkpoint to go on from. save_before: time since the process started, such as
    `3h50m`, before which the run saves a checkpoint and leaves with exit code 85.
    """

    model: ModelSection
    data: DataSection
    rewards: list[RewardSection]
    output_dir: Place
    bridge: BridgeConfig | None = field(default_factory=BridgeConfig)
    train: Literal["bridge", "lora", "full"] = "bridge"
    lora: LoraSection = field(default_factory=LoraSection)
    rollout: RolloutSection = field(default_factory=RolloutSection)
    update: UpdateSection = field(default_factory=UpdateSection)
    guards: GuardsSection = field(default_factory=GuardsSection)
    warmup: WarmupSection | None = None
    training: dict[str, Any] = field(default_factory=dict)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    logging: LoggingSection = field(default_factory=LoggingSection)
    launch: LaunchSection = field(default_factory=LaunchSection)
    seed: int = 0
    resume: Place = "auto"
    save_before: str | int | None = None
    __pydantic_config__: ClassVar = STRICT

    def __post_init__(self) -> None:
        for key in ("save_strategy", "logging_strategy"):  # YAML takes a `no` without quotes for false
            if self.training.get(key) is False:
                self.training[key] = "no"
        if self.save_before is not None:
            parse_duration("save_before", self.save_before)
        if not self.rewards:
            raise UserError("rewards is empty: name at least one function, such as rewards/answer.py:correct.")
        aggregation = self.training.get("multi_objective_aggregation", "sum_then_normalize")
        if self.rollout.dynamic_sampling is not None and aggregation != "sum_then_normalize":
            raise UserError(
                f"rollout.dynamic_sampling is set with training.multi_objective_aggregation={aggregation}, where equal "
                "sums of rewards may have a gradient: leave one of them out."
            )
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed is {self.seed}: it must be between 0 and 2**32 - 1.")
        if self.bridge is None and self.train == "bridge":
            raise UserError("train is 'bridge' but bridge is null: set train=full or train=lora for a run without it.")
        if self.bridge is None and self.warmup is not None:
            # The warm-up trains the new parameters only; a run without any has none to warm up.
            self.warmup = None

    @property
    def save_before_seconds(self) -> float | None:
        return None if self.save_before is None else parse_duration("save_before", self.save_before)

    def to_yaml(self) -> str:
        return write_yaml(asdict(self))


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe, lay `key=value` overrides over it (dots go into sections) and check it.

    Raises UserError naming the file and the key.
    """
    path = Path(path)
    content = read_yaml(path)
    for override in overrides:
        apply_override(content, override)
    return validate(Recipe, content, path)
