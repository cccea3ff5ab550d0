"""`bridge-rl eval` and `bridge-rl generate`."""

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bridge_rl.cli import parse_numbers
from bridge_rl.config import EvaluationSection, ModelSection
from bridge_rl.data import prompt_tokens
from bridge_rl.errors import UserError
from bridge_rl.evaluation.aggregate import Chooser, method_name
from bridge_rl.evaluation.analyse import METHODS
from bridge_rl.evaluation.job import make_job
from bridge_rl.evaluation.results import Estimate, Results, Summary, write_results
from bridge_rl.evaluation.run import PATIENCE, eos_ids
from bridge_rl.evaluation.settings import SETTINGS_FILE, first, trained_with
from bridge_rl.evaluation.suites import expand
from bridge_rl.fingerprint import whole_fingerprint
from bridge_rl.models import load_model, load_tokenizer
from bridge_rl.report.tables import as_table
from bridge_rl.reward_functions import check_judges
from bridge_rl.rollout import SamplingParams, generate_groups
from bridge_rl.rollout.request import length_limit
from bridge_rl.user_code import call_users, load_function

# How long ranks wait for the main one, which alone tries rows beside other siblings, before the next suite.
PATIENCE_FOR_PROBES = timedelta(days=7)
MAX_ROWS = 64  # that `bridge-rl eval` samples at once, unless asked for another number or a wider group
GENERATED_TOKENS = 256  # by `bridge-rl generate`, unless asked for another number


def evaluate(args: argparse.Namespace) -> None:
    """Evaluate a model on each suite: samples, results, page, plots and tables; print a table and the verdicts."""
    # Without `cpu` it would see one rank there.
    PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE_FOR_PROBES if args.probes else PATIENCE)
    suites = expand(args.suite)
    widths = parse_numbers("--widths", args.widths, "1,2,4,8")
    if args.max_rows is None:
        args.max_rows = max(MAX_ROWS, *widths)
    check_flags(args, widths)
    lengths = None if args.lengths is None else parse_numbers("--lengths", args.lengths, "512,1024,2048")
    root = args.output or output_directory(args.model)
    if len(suites) > 1 and (root / SETTINGS_FILE).is_file():
        raise UserError(
            f"--output: {root} holds the samples of one suite, several have a directory each: name another."
        )
    methods = METHODS if args.aggregate is None else (*METHODS, load_chooser(args.aggregate))
    if args.reward is not None:
        check_judges(load_function(args.reward, "--reward"), args.reward, "--reward")  # before the model is loaded
    model, tokenizer = load_for_sampling(args.model)
    weights = whole_fingerprint(model)
    trained = trained_with(args.model)
    jobs = [make_job(args, suite, widths, lengths, methods, model, weights, tokenizer, trained) for suite in suites]
    if args.output is not None and len(suites) == 1:
        jobs[0].run(root)
        return
    found = {suite.name: job.run(root / suite.name) for suite, job in zip(suites, jobs, strict=True)}
    results = {name: of_suite for name, of_suite in found.items() if of_suite is not None}  # all, on the main rank
    if len(results) > 1:
        overall = Results({"model": args.model, "suites": list(results)}, mean_over_suites(results))
        write_results(overall, root / "results.json")
        print(f"\nmean over {len(suites)} suites\n{as_table(overall.summaries)}")


def check_flags(args: argparse.Namespace, widths: list[int]) -> None:
    """Raise UserError, before the model is loaded, for what a recipe could not have under `evaluation` either."""
    try:
        EvaluationSection(
            widths=widths,
            samples=args.samples,
            temperature=first(args.temperature, 1.0),
            top_p=first(args.top_p, 1.0),
            max_rows=args.max_rows,
        )
    except UserError as error:  # the flags are called as the keys that it names
        flags = re.sub(r"evaluation\.(\w+)", lambda key: "--" + key[1].replace("_", "-"), str(error))
        raise UserError(flags) from error


def load_chooser(named: str) -> Chooser:
    """A user's function that makes one answer of a group (`aggregate.Chooser`)."""
    function = load_function(named, "--aggregate")
    if (name := method_name(function)) in METHODS:
        raise UserError(f"--aggregate: {named} is called '{name}', as the one that is always there: name it otherwise.")

    @wraps(function)
    def choose(rows: list[dict[str, Any]]) -> int | str | None:
        return call_users(function, named, lambda: "", rows)

    return choose


def mean_over_suites(results: Mapping[str, Results]) -> list[Summary]:
    """The mean of each metric over suites, each of one weight, in the conditions and widths that all have.

    Suites share no problem, so the ends of their intervals lie apart from the mean by the root of the summed squares.
    """
    of_suite = [{(s.condition, s.width): s for s in found.summaries} for found in results.values()]
    summaries = []
    for key in [key for key in of_suite[0] if all(key in summaries_of for summaries_of in of_suite)]:
        same = [summaries_of[key] for summaries_of in of_suite]
        shared = [name for name in same[0].metrics if all(name in summary.metrics for summary in same)]
        metrics = {name: mean_of_estimates([summary.metrics[name] for summary in same]) for name in shared}
        groups = min(summary.groups_per_problem for summary in same)
        summaries.append(Summary(same[0].condition, key[1], sum(s.problems for s in same), groups, metrics))
    return summaries


def mean_of_estimates(estimates: Sequence[Estimate]) -> Estimate:
    """Of independent ones; without an interval where one has none."""
    count = len(estimates)
    value = sum(estimate.value for estimate in estimates) / count
    below = [e.value - e.low for e in estimates if e.low is not None]
    above = [e.high - e.value for e in estimates if e.high is not None]
    if len(below) < count or len(above) < count:
        return Estimate(value)
    return Estimate(value, value - math.hypot(*below) / count, value + math.hypot(*above) / count)


def output_directory(model: str) -> Path:
    """Beside a local checkpoint; for a hub id, under runs/."""
    return (Path(model) if Path(model).is_dir() else Path("runs") / Path(model).name) / "eval"


def generate(args: argparse.Namespace) -> None:
    """Print one group of completions for a prompt."""
    if any("\ud800" <= letter <= "\udfff" for letter in args.prompt):  # how Python hands on bytes that are no text
        raise UserError("The prompt is not valid UTF-8: give it in the encoding of the terminal.")
    model, tokenizer = load_for_sampling(args.model)
    prompt: Any = args.prompt
    if tokenizer.chat_template is not None:
        prompt = [{"role": "user", "content": args.prompt}]
    ids = read_prompt(tokenizer, prompt)
    limit = length_limit(model.config, len(ids), args.max_new_tokens, GENERATED_TOKENS)
    params = SamplingParams(limit, args.temperature, seed=args.seed, eos_token_id=eos_ids(model, tokenizer))
    [group] = generate_groups(model, [ids], args.width, params)
    for number, (tokens, reason) in enumerate(zip(group.tokens, group.finish_reasons, strict=True)):
        print(f"--- row {number} ({len(tokens)} tokens, {reason})")
        print(tokenizer.decode(tokens, skip_special_tokens=True))


def read_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict[str, str]]) -> list[int]:
    """The tokens of a text or of messages. Raises UserError if there are none, or the chat template refuses them."""
    try:
        [ids] = prompt_tokens(tokenizer, [prompt])
    except (TemplateError, TypeError, ValueError) as error:  # such as roles in an order that the template does not know
        if isinstance(prompt, str):
            raise
        raise UserError(f"The model's chat template refuses the messages: {error}") from error
    if not ids:
        raise UserError("The prompt has no tokens: it needs at least one.")
    return ids


def load_for_sampling(path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model ready to sample, and its tokenizer."""
    section = ModelSection(path, dtype="bfloat16" if torch.cuda.is_available() else "float32")
    model = load_model(section).to(PartialState().device)
    return model.eval(), load_tokenizer(section)
