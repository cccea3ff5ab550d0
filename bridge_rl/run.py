"""A run from a recipe, read top to bottom: plan, warm-up, model, data, rewards, trainer, train, evaluate."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainingArguments

from bridge_rl.checkpoint import (
    WEIGHTS_FILE,
    check_same_base,
    is_bridge_checkpoint,
    load_blocks,
    read_blocks,
    save_bridge,
)
from bridge_rl.config import DataSource, Recipe
from bridge_rl.data import load_problems, make_prompts, prompt_tokens
from bridge_rl.errors import Stopped, UserError
from bridge_rl.evaluation.judge import Judge
from bridge_rl.evaluation.run import PATIENCE, eos_ids
from bridge_rl.evaluation.settings import digest
from bridge_rl.models import load_policy, load_tokenizer, model_config, uses_deepspeed, uses_fsdp
from bridge_rl.ranks import check_same_on_all, together
from bridge_rl.report.command import write_report
from bridge_rl.report.progress import Bar, RewardProgress
from bridge_rl.report.tracking import start_tracking
from bridge_rl.reward_functions import agreed, load_final_answer, load_reward
from bridge_rl.rollout import RolloutOptions, SamplingParams
from bridge_rl.rollout.request import steady_positions
from bridge_rl.rollout.sampling import stream_seed
from bridge_rl.run_checkpoints import checkpoint_to_resume
from bridge_rl.run_directory import (
    DECIDES_WARMUP,
    check_same_recipe,
    deciding_keys,
    evaluation_directory,
    save_recipe,
    warmup_directory,
    write_history,
)
from bridge_rl.run_evaluation import make_evaluator
from bridge_rl.run_options import (
    check_optimizer,
    lora_config,
    prepare_distributed,
    training_arguments,
    warmup_arguments,
)
from bridge_rl.stop import Stop
from bridge_rl.trainer import BridgeGRPOTrainer
from bridge_rl.warmup import (
    WarmupGroup,
    WarmupStore,
    check_tokens,
    collect_groups,
    read_groups,
    sample_warmup_groups,
    train_blocks,
    usable,
)


def train(recipe: Recipe) -> dict[str, float]:
    """Run the recipe and return the final evaluation's metrics. The plan has been checked by the caller."""
    prepare_distributed(recipe)
    output = Path(recipe.output_dir)
    args = training_arguments(recipe)
    check_optimizer(args)
    checkpoint = checkpoint_to_resume(recipe.resume, output)
    if checkpoint is not None:
        check_same_recipe(recipe, checkpoint.parent, deciding_keys(recipe))
    tokenizer = training_tokenizer(recipe)
    rewards = [load_reward(section, number) for number, section in enumerate(recipe.rewards)]
    judge = Judge(rewards[0], load_final_answer(recipe.rewards[0]))
    train_set = load_prompts(recipe, recipe.data.train, "data.train", tokenizer)
    if len(train_set) * args.num_generations < args.generation_batch_size:
        raise UserError(
            f"data.train: {len(train_set)} problems are fewer than the {args.generation_batch_size} rows / "
            f"{args.num_generations} generations of one generation batch: add problems or lower the batch."
        )
    eval_set = load_eval_prompts(recipe, tokenizer)
    check_positions_of(recipe, tokenizer, train_set, eval_set)
    if recipe.warmup is not None:
        warm_up(recipe)
        clear_device_cache(garbage_collection=True)  # its model and trainer refer to each other
    start_tracking(recipe, resumed=checkpoint is not None)
    model = load_policy(recipe)
    made_before = [] if checkpoint is None or recipe.bridge is None else [checkpoint]
    if recipe.warmup is not None:
        directory = warmup_directory(recipe)
        made_before.append(directory)
        load_blocks(model, read_blocks(directory / WEIGHTS_FILE), directory)
    with together():
        for directory in made_before:
            check_same_base(model, directory)

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
            metrics = trainer.evaluations.get(trainer.state.global_step)
            if metrics is None:
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
    if uses_deepspeed() or uses_fsdp():
        raise UserError(
            "warmup: the warm-up runs without ZeRO and FSDP (it trains the new parameters only), so run it first: "
            "accelerate launch launch/warmup.py with the same recipe and overrides."
        )
    if section.path is not None and Path(section.path).is_dir():
        raise UserError(f"warmup.path is {section.path}, a directory: name a file in it, such as groups.jsonl.")
    tokenizer = training_tokenizer(recipe)
    judge = Judge.of(recipe.rewards[0])
    model = load_policy(replace(recipe, train="bridge")).to(state.device)  # the base stays in its own dtype
    if (directory / "recipe.yaml").is_file():  # a warm-up that was cut off: its completions are good for the same one
        check_same_recipe(recipe, directory, DECIDES_WARMUP)
    state.wait_for_everyone()
    if state.is_main_process:
        save_recipe(recipe, directory)
    stop = Stop(recipe.save_before_seconds)
    args = warmup_arguments(recipe)
    with stop.listening():
        with in_precision(args, state.device):
            groups = warmup_groups(recipe, model, tokenizer, judge, stop)
        kept = usable(groups, section)
        if state.is_main_process:
            right, rows = sum(sum(group.correct) for group in groups), sum(len(group.correct) for group in groups)
            print(
                f"warm-up: {right / rows:.1%} of the base's completions are right; {len(kept)} of {len(groups)} "
                "problems used",
                flush=True,
            )
        history = train_blocks(model, kept, args, [RewardProgress("warm-up")], stop, recipe.update)
    if state.is_main_process:
        write_history(history, directory)
        save_bridge(model, directory)  # the last: it says that the warm-up is done
        shutil.rmtree(args.output_dir, ignore_errors=True)
    state.wait_for_everyone()


def in_precision(args: TrainingArguments, device: torch.device) -> torch.autocast:
    """The autocast in which accelerate will run a model, for one that no trainer has wrapped yet."""
    dtype = torch.bfloat16 if args.bf16 else torch.float16
    return torch.autocast(device.type, dtype, enabled=args.bf16 or args.fp16)


def warmup_groups(recipe: Recipe, model: Any, tokenizer: Any, judge: Judge, stop: Stop) -> list[WarmupGroup]:
    """The base's completions: those in the file, or sampled into it. Raises Stopped when `stop` has ended that."""
    section, directory = recipe.warmup, warmup_directory(recipe)
    assert section is not None
    path = Path(section.path) if section.path else directory / "groups.jsonl"
    if path.is_file():
        groups = read_groups(path)
        check_tokens(groups, tokenizer, path)
        return groups
    source, key = (recipe.data.train, "data.train") if section.data is None else (section.data, "warmup.data")
    rows = load_prompts(recipe, source, key, tokenizer).to_list()[: section.problems]
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


def training_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(recipe.model)
    if tokenizer.eos_token is None:
        raise UserError(
            f"model.path: the tokenizer of {recipe.model.path} has no EOS token, which TRL needs: set eos_token in its "
            "tokenizer_config.json."
        )
    return tokenizer


def load_prompts(recipe: Recipe, source: DataSource, key: str, tokenizer: Any) -> Dataset:
    """Raises UserError, on all ranks, where they are not the same: the rows of one prompt are shared out over ranks."""
    with together():
        prompts = make_prompts(load_problems(source, key, recipe.seed), recipe.data, tokenizer)
    check_same_on_all(
        digest(prompts.to_list()),
        f"{key}: the ranks have read different problems from {source.path}: let it give the same ones in the same "
        "order in every process (seeded draws, no order of a set).",
    )
    return prompts


def check_positions_of(recipe: Recipe, tokenizer: Any, train_set: Dataset, eval_set: Dataset | None) -> None:
    """Raise UserError for a prompt that the rollout would refuse in the step that draws it."""
    known = steady_positions(model_config(recipe.model))
    if known is None:
        return
    limit = recipe.rollout.max_new_tokens
    for key, prompts, new in (
        ("data.train", train_set, limit),
        ("data.eval", eval_set, recipe.evaluation.max_new_tokens or limit),
    ):
        longest = 0 if prompts is None else max(map(len, prompt_tokens(tokenizer, list(prompts["prompt"]))))
        if longest + new > known:
            raise UserError(
                f"{key}: its longest prompt has {longest} tokens, which with completions of {new} are more than the "
                f"{known} positions beyond which this model's rows change each other: leave such problems out, or "
                "shorten the completions."
            )


def load_eval_prompts(recipe: Recipe, tokenizer: Any) -> Dataset | None:
    """The held-out problems that are evaluated, if the recipe has any."""
    if recipe.data.eval is None:
        return None
    prompts = load_prompts(recipe, recipe.data.eval, "data.eval", tokenizer)
    return prompts.select(range(min(recipe.evaluation.problems, len(prompts))))
