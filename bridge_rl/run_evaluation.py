"""The evaluation in a run: at every width of the recipe, shared out over the ranks."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset

from bridge_rl.config import Recipe
from bridge_rl.evaluation.analyse import analyse
from bridge_rl.evaluation.judge import Judge
from bridge_rl.evaluation.results import write_results
from bridge_rl.evaluation.run import listens, num_completions, plan_evaluation
from bridge_rl.evaluation.samples import SampleStore, write_for_readers
from bridge_rl.evaluation.settings import SETTINGS_FILE, digest, digest_of_reward
from bridge_rl.ranks import together
from bridge_rl.report import names
from bridge_rl.report.progress import Bar
from bridge_rl.report.results import provenance
from bridge_rl.report.tables import as_table
from bridge_rl.run_directory import evaluation_directory
from bridge_rl.stop import Stop
from bridge_rl.trainer import BridgeGRPOTrainer

DECIDES_SAMPLES = ("temperature", "top_p", "max_new_tokens", "seed")  # of an evaluation, beside weights and problems


def make_evaluator(
    recipe: Recipe, eval_set: Dataset, tokenizer: Any, judge: Judge, stop: Stop
) -> Callable[[BridgeGRPOTrainer], dict[str, float]]:
    """Evaluation at every width of the recipe, shared out over the ranks, whose samples and results are kept."""
    rows = eval_set.to_list()
    made = described(recipe)
    judging = digest_of_reward(recipe.rewards[0])
    settings = json.dumps({"problems": digest(rows), "judging": judging, **{key: made[key] for key in DECIDES_SAMPLES}})

    def evaluate(trainer: BridgeGRPOTrainer) -> dict[str, float]:
        state, step, section = PartialState(), trainer.state.global_step, recipe.evaluation
        directory = evaluation_directory(recipe, step)
        # Samples that are there may be of other weights, problems or temperature, or judged otherwise.
        # The main rank looks, before anybody deletes.
        [kept] = broadcast_object_list([trainer.resumed_here and is_text(directory / SETTINGS_FILE, settings)])
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
        with together():  # the others wait for the main rank, which may find samples that are damaged
            groups = evaluation.collected() if state.is_main_process else []
        if state.is_main_process:
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


def is_text(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text() == text
