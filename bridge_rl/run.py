"""A run from a recipe, read top to bottom: plan, warm-up, model, data, rewards, trainer, train, evaluate."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from peft import LoraConfig
from transformers import PrinterCallback, Trainer, TrainingArguments, get_scheduler
from trl import GRPOConfig

from bridge_rl.checkpoint import WEIGHTS_FILE, is_bridge_checkpoint, load_blocks, read_blocks, save_bridge
from bridge_rl.config import DataSource, Recipe, load_recipe
from bridge_rl.data import load_problems, make_prompts
from bridge_rl.errors import Stopped, UserError
from bridge_rl.evaluation.analyse import analyse
from bridge_rl.evaluation.judge import Judge
from bridge_rl.evaluation.results import write_results
from bridge_rl.evaluation.run import PATIENCE, eos_ids, listens, num_completions, plan_evaluation
from bridge_rl.evaluation.samples import SampleStore, write_for_readers
from bridge_rl.evaluation.settings import SETTINGS_FILE, digest
from bridge_rl.files import write_whole
from bridge_rl.models import (
    find_file,
    load_final_answer,
    load_policy,
    load_reward,
    load_tokenizer,
    uses_deepspeed,
    uses_fsdp,
)
from bridge_rl.report import names
from bridge_rl.report.command import write_report
from bridge_rl.report.progress import Bar, RewardProgress
from bridge_rl.report.results import provenance
from bridge_rl.report.tables import as_table
from bridge_rl.report.tracking import start_tracking, trackers
from bridge_rl.reward_errors import agreed
from bridge_rl.rollout import RolloutOptions, SamplingParams
from bridge_rl.rollout.sampling import stream_seed
from bridge_rl.run_checkpoints import checkpoint_to_resume
from bridge_rl.stop import Stop
from bridge_rl.trainer import BridgeGRPOTrainer
from bridge_rl.warmup import (
    WarmupGroup,
    WarmupStore,
    collect_groups,
    read_groups,
    sample_warmup_groups,
    train_blocks,
    usable,
)

# Keys that decide what is in a directory; going on with others would mix two runs without a sound.
PROBLEMS = ("model", "bridge", "data.train", "data.prompt", "data.system_prompt", "rewards", "seed")
DECIDES_WARMUP = (*PROBLEMS, "warmup", "rollout.max_new_tokens", "rollout.temperature")
OF_ROLLOUT = ("width", "num_generations", "max_new_tokens", "temperature", "mask_truncated", "dynamic_sampling")
DECIDES_RUN = (
    *PROBLEMS,
    "train",
    "training.optim",
    *(f"rollout.{key}" for key in OF_ROLLOUT),
)  # not memory, which changes no token
DECIDES_SAMPLES = ("temperature", "top_p", "max_new_tokens", "seed")  # of an evaluation, beside weights and problems


def train(recipe: Recipe) -> dict[str, float]:
    """Run the recipe and return the final evaluation's metrics. The plan has been checked by the caller."""
    prepare_distributed(recipe)
    output = Path(recipe.output_dir)
    args = training_arguments(recipe)
    check_optimizer(args)
    checkpoint = checkpoint_to_resume(recipe.resume, output)
    if checkpoint is not None:
        check_same_recipe(recipe, checkpoint.parent, deciding_keys(recipe))
    if recipe.warmup is not None:
        warm_up(recipe)
    start_tracking(recipe, resumed=checkpoint is not None)
    tokenizer = load_tokenizer(recipe.model)
    rewards = [load_reward(section, number) for number, section in enumerate(recipe.rewards)]
    judge = Judge(rewards[0], load_final_answer(recipe.rewards[0]))
    train_set = load_prompts(recipe, recipe.data.train, "data.train", tokenizer)
    if len(train_set) * args.num_generations < args.generation_batch_size:
        raise UserError(
            f"data.train: {len(train_set)} problems are fewer than the {args.generation_batch_size} rows / "
            f"{args.num_generations} generations of one generation batch: add problems or lower the batch."
        )
    eval_set = load_eval_prompts(recipe, tokenizer)
    model = load_policy(recipe)
    if recipe.warmup is not None:
        directory = warmup_directory(recipe)
        load_blocks(model, read_blocks(directory / WEIGHTS_FILE), directory)

    stop = Stop(recipe.save_before_seconds)
    try:
        trainer = BridgeGRPOTrainer(
            model,
            [agreed(reward) for reward in rewards],
            args,
            width=recipe.rollout.width,
            train=recipe.train,
            mask_truncated=recipe.rollout.mask_truncated,
            rollout_options=RolloutOptions(
                max_rows=recipe.rollout.max_rows,
                max_cache_tokens=recipe.rollout.max_cache_tokens,
                cuda_graphs=recipe.rollout.cuda_graphs,
            ),
            update=recipe.update,
            guards=recipe.guards,
            dynamic_sampling=recipe.rollout.dynamic_sampling,
            evaluator=None if eval_set is None else make_evaluator(recipe, eval_set, tokenizer, judge, stop),
            stop=stop,
            train_dataset=train_set,
            eval_dataset=eval_set,
            processing_class=tokenizer,
            peft_config=lora_config(recipe) if recipe.train == "lora" else None,
        )
    except ValueError as error:  # how TRL and PEFT refuse options that do not go together
        raise UserError(f"training or lora: {' '.join(str(error).split())}") from error
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(RewardProgress())
    if trainer.accelerator.is_main_process:
        save_recipe(recipe, output)
        print(
            f"going on from {checkpoint}" if checkpoint else f"starting at step 0 ({output} has no checkpoint)",
            flush=True,
        )
    try:
        with stop.listening():  # a signal or the time limit saves everything and raises Stopped
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            trainer.save_model(recipe.output_dir)
            metrics = trainer.evaluate()
    except Stopped:
        trainer.end()
        raise
    if trainer.accelerator.is_main_process:
        write_history(trainer.state.log_history, output)
        if eval_set is not None:
            page = write_report(evaluation_directory(recipe, trainer.state.global_step), output)[0]
            print(f"the evaluation and the curves are in {page}")
        print(f"the model is in {output}: bridge-rl eval --model {output}", flush=True)
    trainer.end()  # closes the trackers and the process group
    return metrics


def warm_up(recipe: Recipe) -> None:
    """Unless this was done before: make the warm-up's data, train the new parameters, and save the Bridge.

    Cut off anywhere, it goes on where it was. Raises Stopped when a signal or the time limit has ended it.
    """
    assert recipe.warmup is not None
    # Without `cpu`, ranks that torchrun has started on CPU would each believe to be alone.
    state = PartialState(cpu=not torch.cuda.is_available() and not uses_deepspeed(), timeout=PATIENCE)
    section, directory = recipe.warmup, warmup_directory(recipe)
    if is_bridge_checkpoint(directory):
        check_same_recipe(recipe, directory, DECIDES_WARMUP)
        if state.is_main_process:
            print(f"warm-up: taken from {directory}", flush=True)
        return
    if (uses_deepspeed() or uses_fsdp()) and state.num_processes > 1:
        raise UserError(
            "warmup: the warm-up runs without ZeRO and FSDP (it trains the new parameters only), so run it first: "
            "accelerate launch launch/warmup.py with the same recipe and overrides."
        )
    tokenizer = load_tokenizer(recipe.model)
    judge = Judge.of(recipe.rewards[0])
    model = load_policy(replace(recipe, train="bridge")).to(state.device)  # the base stays in its own dtype
    if (directory / "recipe.yaml").is_file():  # a warm-up that was cut off: its completions are good for the same one
        check_same_recipe(recipe, directory, DECIDES_WARMUP)
    state.wait_for_everyone()
    if state.is_main_process:
        save_recipe(recipe, directory)
    stop = Stop(recipe.save_before_seconds)
    with stop.listening():
        groups = warmup_groups(recipe, model, tokenizer, judge, stop)
        kept = usable(groups, section)
        if state.is_main_process:
            right, rows = sum(sum(group.correct) for group in groups), sum(len(group.correct) for group in groups)
            print(
                f"warm-up: {right / rows:.1%} of the base's completions are right; {len(kept)} of {len(groups)} "
                "problems used",
                flush=True,
            )
        args = warmup_arguments(recipe)
        history = train_blocks(model, kept, args, [RewardProgress("warm-up")], stop)
    if state.is_main_process:
        write_history(history, directory)
        save_bridge(model, directory)  # the last: it says that the warm-up is done
        shutil.rmtree(args.output_dir, ignore_errors=True)
    state.wait_for_everyone()


def warmup_groups(recipe: Recipe, model: Any, tokenizer: Any, judge: Judge, stop: Stop) -> list[WarmupGroup]:
    """The base's completions: those in the file, or sampled into it. Raises Stopped when `stop` has ended that."""
    section, directory = recipe.warmup, warmup_directory(recipe)
    assert section is not None
    path = Path(section.path) if section.path else directory / "groups.jsonl"
    if path.is_file():
        return read_groups(path)
    rows = load_prompts(recipe, section.data or recipe.data.train, "warmup.data", tokenizer).to_list()
    rows = rows[: section.problems]
    store, rollout = WarmupStore(directory / "sampled"), recipe.rollout
    params = SamplingParams(
        section.max_new_tokens or rollout.max_new_tokens,
        rollout.temperature,
        seed=stream_seed(recipe.seed, "warmup"),
        eos_token_id=eos_ids(model, tokenizer),
    )
    with Bar("warm-up samples", len(rows) // PartialState().num_processes) as bar:
        options = (section.samples, params, rollout.max_rows, store, stop.asked, bar.update)
        sample_warmup_groups(model, tokenizer, rows, judge, *options)
    if stop.agree(stop.asked()):
        raise Stopped(
            f"stopped by {stop.stopping}: {len(store.read())} of {len(rows)} warm-up problems are sampled in "
            f"{store.directory}, and the same command goes on from them"
        )
    return collect_groups(store, len(rows), path)


def warmup_arguments(recipe: Recipe) -> TrainingArguments:
    """Of the warm-up's SFT, which saves every tenth of its steps if the run saves any."""
    section = recipe.warmup
    assert section is not None
    return TrainingArguments(
        output_dir=str(warmup_directory(recipe) / "trainer"),
        max_steps=section.steps,
        per_device_train_batch_size=section.groups_per_step,
        learning_rate=section.learning_rate,
        lr_scheduler_type="cosine",
        logging_steps=max(1, section.steps // 20),
        save_strategy="no" if recipe.training.get("save_strategy") == "no" else "steps",
        save_steps=max(1, section.steps // 10),
        report_to=[],
        seed=recipe.seed,
        remove_unused_columns=False,
        disable_tqdm=True,
        gradient_checkpointing=recipe.training.get("gradient_checkpointing", True),
        **device_arguments(recipe),
    )


def warmup_directory(recipe: Recipe) -> Path:
    return Path(recipe.output_dir) / "warmup"


def save_recipe(recipe: Recipe, directory: Path) -> None:
    """Write the resolved recipe beside what it made."""
    write_whole(directory / "recipe.yaml", recipe.to_yaml())  # with half of one, the run could not go on


def deciding_keys(recipe: Recipe) -> tuple[str, ...]:
    """Of a run's checkpoints."""
    return (*DECIDES_RUN, "lora") if recipe.train == "lora" else DECIDES_RUN


def check_same_recipe(recipe: Recipe, directory: Path, keys: tuple[str, ...]) -> None:
    """Raise UserError if what is in `directory` was made by a recipe that differs in one of `keys`."""
    path = directory / "recipe.yaml"
    before = asdict(load_recipe(path)) if path.is_file() else {}  # a key that is new since has its default
    for key in keys:
        if look_up(before, key) != look_up(asdict(recipe), key):
            raise UserError(
                f"{directory} was made by a recipe with another '{key}' ({path}): use that one to go on, another "
                "output_dir to start anew, or delete the directory."
            )


def look_up(content: dict[str, Any], key: str) -> Any:
    """The value at a dotted key, None where there is none."""
    for part in key.split("."):
        content = (content or {}).get(part)  # type: ignore[assignment]
    return content


def write_history(history: list[dict[str, float]], directory: Path) -> None:
    """The trainer's log, one entry a line."""
    (directory / "history.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in history))


# -- pieces of a run ------------------------------------------------------------------------------------------------


def prepare_distributed(recipe: Recipe) -> None:
    """Turn DeepSpeed on where the recipe asks for it and the launcher did not, in the launcher's own words.

    On CPU, keep DeepSpeed from compiling its shared-memory operator, which takes minutes and is not used.
    """
    stage = recipe.launch.zero_stage
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    if stage > 0 and not uses_deepspeed() and not uses_fsdp():
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(find_file(recipe.launch.deepspeed_config))
        os.environ["ACCELERATE_DEEPSPEED_ZERO3_INIT"] = str(stage == 3).lower()
    if uses_deepspeed() and not torch.cuda.is_available():
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def device_arguments(recipe: Recipe) -> dict[str, Any]:
    """Where and in what precision to run: bf16 on a GPU, fp32 on CPU (over gloo with several processes)."""
    if torch.cuda.is_available():
        return {"bf16": recipe.training.get("bf16", not recipe.training.get("fp16"))}
    if uses_deepspeed():
        # With use_cpu accelerate would believe in a world of one process.
        return {"bf16": False, "use_cpu": False, "ddp_backend": "gloo"}
    return {"bf16": False, "use_cpu": True}


def training_arguments(recipe: Recipe) -> GRPOConfig:
    """TRL's configuration: the recipe's `training` section beside what other sections decide."""
    rollout = recipe.rollout
    evaluating = recipe.data.eval is not None and recipe.evaluation.every is not None
    options = {
        "num_generations": rollout.num_generations,
        "max_completion_length": rollout.max_new_tokens,
        "temperature": rollout.temperature,
        "reward_weights": [section.weight for section in recipe.rewards],
        "seed": recipe.seed,
        "output_dir": recipe.output_dir,
        "run_name": recipe.logging.name or Path(recipe.output_dir).name,
        "project": recipe.logging.project,
        "eval_strategy": "steps" if evaluating else "no",
        "eval_steps": recipe.evaluation.every if evaluating else None,
        "per_device_eval_batch_size": rollout.num_generations,  # of TRL's evaluation loop, which ours replaces
        "log_completions": recipe.logging.wandb != "off",  # the dashboard's table
        "num_completions_to_print": 0,
        "ddp_timeout": int(PATIENCE.total_seconds()),
        "disable_tqdm": True,  # our own bar shows the reward
        "ddp_find_unused_parameters": False,
    }
    decided = {"report_to": trackers(recipe), **device_arguments(recipe)}
    try:
        return GRPOConfig(**{**options, **recipe.training, **decided})
    except (ValueError, TypeError) as error:
        raise UserError(f"training: {' '.join(str(error).split())}") from error


def check_optimizer(args: GRPOConfig) -> None:
    """Raise UserError, before anything is computed, for an optimizer or a schedule that could not be made later."""
    try:
        cls, options = Trainer.get_optimizer_cls_and_kwargs(args)
    except ImportError as error:
        raise UserError(f"training.optim is {args.optim.value}: {' '.join(str(error).split())}") from error
    except ValueError:  # of those that need the model
        cls, options = torch.optim.AdamW, {"lr": args.learning_rate}
    if cls.__module__.startswith("torch.optim."):
        try:
            cls([torch.nn.Parameter(torch.zeros(1))], **options)
        except ValueError as error:
            raise UserError(f"training.learning_rate or training.adam_*: {error}.") from error
    schedule, optimizer = args.lr_scheduler_type, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    try:
        get_scheduler(schedule, optimizer, 0, 10, args.lr_scheduler_kwargs)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"training.lr_scheduler_type is {schedule.value} with training.lr_scheduler_kwargs "
            f"{args.lr_scheduler_kwargs}: {' '.join(str(error).split())}"
        ) from error


def lora_config(recipe: Recipe) -> LoraConfig:
    """LoRA on the base; the blocks are trained in full and kept free of it."""
    return LoraConfig(
        r=recipe.lora.r,
        lora_alpha=recipe.lora.alpha,
        lora_dropout=recipe.lora.dropout,
        target_modules=recipe.lora.target_modules,
        modules_to_save=["bridge"] if recipe.bridge is not None else None,
        task_type="CAUSAL_LM",
    )


def load_prompts(recipe: Recipe, source: DataSource, key: str, tokenizer: Any) -> Dataset:
    problems = load_problems(source, key, recipe.seed)
    return make_prompts(problems, recipe.data, conversational=tokenizer.chat_template is not None)


def load_eval_prompts(recipe: Recipe, tokenizer: Any) -> Dataset | None:
    """The held-out problems that are evaluated, if the recipe has any."""
    if recipe.data.eval is None:
        return None
    prompts = load_prompts(recipe, recipe.data.eval, "data.eval", tokenizer)
    return prompts.select(range(min(recipe.evaluation.problems, len(prompts))))


def evaluation_directory(recipe: Recipe, step: int) -> Path:
    return Path(recipe.output_dir) / "evaluation" / f"step_{step:06d}"


def is_text(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text() == text


def described(recipe: Recipe) -> dict[str, Any]:
    """What a page says of how an evaluation in a run was made."""
    assert recipe.data.eval is not None
    section, rollout = recipe.evaluation, recipe.rollout
    return {
        "model": recipe.output_dir,
        "suite": recipe.data.eval.path,
        "reward": recipe.rewards[0].function,
        "prompt": recipe.data.prompt,
        "temperature": section.temperature,
        "top_p": section.top_p,
        "max_new_tokens": section.max_new_tokens or rollout.max_new_tokens,
        "samples": section.samples,
        "seed": recipe.seed,
        "trained_width": rollout.width,
        "trained_length": rollout.max_new_tokens,
    }


def make_evaluator(
    recipe: Recipe, eval_set: Dataset, tokenizer: Any, judge: Judge, stop: Stop
) -> Callable[[BridgeGRPOTrainer], dict[str, float]]:
    """Evaluation at every width of the recipe, shared out over the ranks, whose samples and results are kept."""
    rows = eval_set.to_list()
    made = described(recipe)
    settings = json.dumps({"problems": digest(rows), **{key: made[key] for key in DECIDES_SAMPLES}})

    def evaluate(trainer: BridgeGRPOTrainer) -> dict[str, float]:
        state, step, section = PartialState(), trainer.state.global_step, recipe.evaluation
        directory = evaluation_directory(recipe, step)
        # Samples that are there may be of other weights, problems or temperature.
        kept = trainer.resumed_here and is_text(directory / SETTINGS_FILE, settings)
        if state.is_local_main_process and not kept:
            shutil.rmtree(directory, ignore_errors=True)
        state.wait_for_everyone()
        if state.is_main_process and not kept:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / SETTINGS_FILE).write_text(settings)
        store = SampleStore(directory / "samples", state.process_index)
        with trainer.model_for_sampling() as model:
            limit = recipe.rollout.max_new_tokens
            evaluation = plan_evaluation(
                model, tokenizer, rows, judge, section, limit, recipe.seed, store, cancelled=stop.asked
            )
            with Bar("evaluation", num_completions(evaluation.shares())) as bar:
                evaluation.sample(bar.update)
            listening = listens(model)
        stop.give_up_if_asked()
        metrics: dict[str, float] = {}
        if state.is_main_process:
            groups = evaluation.collected()
            meta = {"step": step, **made, **provenance()}
            results = analyse(groups, section.widths, listening, meta)
            print(as_table(results.summaries), flush=True)
            write_for_readers(directory, rows, groups, tokenizer)
            write_results(results, directory / "results.json")
            for summary in results.summaries:
                values = {metric: summary.metrics[metric].value for metric in names.EVALUATION}
                metrics |= {names.evaluation(metric, summary.width): value for metric, value in values.items()}
        return broadcast_object_list([metrics])[0]

    return evaluate
