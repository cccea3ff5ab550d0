"""One model on one suite: what is asked, checked against what is there, sampled, analysed and written."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bridge_rl.config import DataSection, EvaluationSection, Recipe
from bridge_rl.data import make_prompts, prompt_tokens
from bridge_rl.errors import UserError
from bridge_rl.evaluation.aggregate import Chooser
from bridge_rl.evaluation.analyse import analyse
from bridge_rl.evaluation.judge import Judge
from bridge_rl.evaluation.probes import run_probes
from bridge_rl.evaluation.results import Probes, Results, read_results, write_results
from bridge_rl.evaluation.run import (
    Evaluation,
    ModelSampler,
    eos_ids,
    group_index,
    groups_per_problem,
    listens,
    num_completions,
    plan_evaluation,
)
from bridge_rl.evaluation.samples import SampledGroup, SampleStore, write_for_readers
from bridge_rl.evaluation.settings import (
    claim,
    default_limit,
    digest,
    digest_of_config,
    digest_of_reward,
    first,
    lengths_below,
    reward_of,
)
from bridge_rl.evaluation.suites import MATH_REWARD, Suite, load_suite
from bridge_rl.files import alone_in
from bridge_rl.ranks import check_same_on_all
from bridge_rl.report.command import write_report
from bridge_rl.report.progress import Bar
from bridge_rl.report.results import provenance
from bridge_rl.report.tables import as_table
from bridge_rl.rollout.request import known_positions


@dataclass(frozen=True)
class Job:
    """settings: what decides the samples. meta: how the results were made, settings included.

    probing: whether to watch the blocks, and to try `probe_rows` wrong rows beside other siblings.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    rows: list[dict[str, Any]]
    judge: Judge
    section: EvaluationSection
    settings: dict[str, Any]
    meta: dict[str, Any]
    methods: Sequence[str | Chooser]
    controls: bool
    probing: bool
    probe_rows: int

    def run(self, directory: Path) -> Results | None:
        """Sample, analyse, write; on the main rank, which returns the results. Others return None.

        Raises UserError if the directory holds samples of other settings, or another process works in it.
        """
        if not PartialState().is_main_process:
            return self.run_alone(directory)
        with alone_in(directory):
            claim(directory, self.settings)
            return self.run_alone(directory)

    def run_alone(self, directory: Path) -> Results | None:
        state = PartialState()
        state.wait_for_everyone()  # the main rank has claimed the directory
        store = SampleStore(directory / "samples", state.process_index)
        evaluation = self.plan(store)
        if state.is_main_process and evaluation.done:
            print(f"{directory}: going on, {len(evaluation.done)} groups are there already", flush=True)
        with Bar(self.settings["suite"], num_completions(evaluation.shares())) as bar:
            groups = evaluation.run(bar.update)
        if not state.is_main_process:
            return None
        probes = earlier_probes(directory, self.settings)
        results = analyse(groups, self.section.widths, listens(self.model), self.meta, self.methods, probes)
        if self.probing:
            write_results(results, directory / "results.json")  # lest the probes run out of memory
            results = replace(results, probes=self.probe(evaluation, groups))
        self.write(directory, groups, results)
        return results

    def plan(self, store: SampleStore) -> Evaluation:
        limit, seed = self.settings["max_new_tokens"], self.settings["seed"]
        return plan_evaluation(
            self.model,
            self.tokenizer,
            self.rows,
            self.judge,
            self.section,
            limit,
            seed,
            store,
            controls=self.controls,
            limits=self.settings["lengths"],
        )

    def probe(self, evaluation: Evaluation, groups: Sequence[SampledGroup]) -> Probes:
        """At the trained width, else at the largest that was sampled."""
        sweeps = {sweep.width: sweep for sweep in evaluation.sweeps if sweep.condition == "model"}
        sweep = sweeps.get(self.meta["trained_width"]) or sweeps[max(sweeps)]
        assert isinstance(evaluation.sampler, ModelSampler)
        with Bar("probes", 0) as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            return run_probes(
                self.model,
                self.tokenizer,
                self.rows,
                groups,
                sweep.width,
                evaluation.sampler.params,
                lambda group: group_index(group.problem, group.group),
                self.judge,
                max_rows=self.probe_rows,
                progress=progress,
            )

    def write(self, directory: Path, groups: Sequence[SampledGroup], results: Results) -> None:
        """What reports are made of, the reports, and the table on the terminal."""
        write_for_readers(directory, self.rows, groups, self.tokenizer)
        write_results(results, directory / "results.json")
        page = write_report(directory)[0]
        print(f"\n{results.meta['suite']}\n{as_table(results.summaries)}")
        for verdict in results.verdicts:
            print(verdict)
        print(f"results, samples, tables and plots are in {directory}; the page is {page}", flush=True)


def make_job(
    args: argparse.Namespace,
    suite: Suite,
    widths: list[int],
    lengths: list[int] | None,
    methods: Sequence[str | Chooser],
    model: PreTrainedModel,
    weights: str,
    tokenizer: PreTrainedTokenizerBase,
    trained: Recipe | None,
) -> Job:
    """What the arguments ask for; for what they do not say, what the run's recipe, the suite and the house say.

    trained: that recipe, where the model is to be asked as its run asked it.
    Raises UserError for arguments that cannot be, alone or together.
    """
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {args.max_new_tokens}: it must be at least 1.")
    limit = first(args.max_new_tokens, default_limit(suite, trained))
    section = EvaluationSection(
        widths=widths,
        samples=args.samples,
        temperature=first(args.temperature, trained and trained.evaluation.temperature, 1.0),
        top_p=first(args.top_p, trained and trained.evaluation.top_p, 1.0),
        max_new_tokens=limit,
        max_rows=args.max_rows,
    )
    if args.problems is not None and args.problems < 1:
        raise UserError(f"--problems is {args.problems}: it must be at least 1.")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed is {args.seed}: it must be between 0 and 2**32 - 1.")
    if args.probe_rows < 1:
        raise UserError(f"--probe-rows is {args.probe_rows}: it must be at least 1.")
    say_uneven_samples(section)
    say_if_positions_run_out(model, limit)
    of_suite = DataSection(train=suite.source, prompt=suite.prompt, system_prompt=suite.system_prompt)
    data = trained.data if trained else of_suite
    reward = reward_of(args.reward, suite, trained)
    # A file's answers need be readable to math-verify only if that judges them.
    if suite.is_file and suite.source.check_answers is True and reward.function != MATH_REWARD:
        suite = replace(suite, source=replace(suite.source, check_answers=False))
    problems = load_suite(suite, "--suite", args.seed)[: args.problems]
    rows = make_prompts(problems, data, tokenizer).to_list()
    trained_length = trained.rollout.max_new_tokens if trained else None
    limits = lengths_below(limit, trained_length) if lengths is None else lengths
    if max(limits) > limit:
        raise UserError(
            f"--lengths goes up to {max(limits)}, but completions have at most {limit} tokens: raise --max-new-tokens."
        )
    judge = Judge.of(reward)
    settings = {
        "weights": weights,
        "config": digest_of_config(model.config),
        "dtype": str(model.dtype).removeprefix("torch."),
        "suite": suite.name,
        "problems": digest(rows),
        "prompt_ids": digest(prompt_tokens(tokenizer, [row["prompt"] for row in rows])),
        "eos_ids": eos_ids(model, tokenizer),
        "reward": reward.function,
        "judging": digest_of_reward(reward),
        "temperature": section.temperature,
        "top_p": section.top_p,
        "max_new_tokens": limit,
        "seed": args.seed,
        "lengths": limits,
    }
    meta = {
        "model": args.model,
        **settings,
        "samples": section.samples,
        "prompt": data.prompt,
        "source": suite.source.path,
        "source_commit": suite.commit,
        "licence": suite.licence,
        "trained_width": trained.rollout.width if trained else None,
        "trained_length": trained_length,
        **provenance(),
    }
    check_same_on_all(
        settings["problems"],
        f"{suite.name}: the ranks have read different problems: let its source give the same ones in the same order in "
        "every process.",
    )
    listening = listens(model)
    if (args.controls or args.probes) and not listening and PartialState().is_main_process:
        print("--controls and --probes are left out: without a Bridge no row hears another.", flush=True)
    if args.controls and listening:
        check_shuffling(section, suite, len(rows))
        say_what_shuffling_needs(section)
    return Job(
        model=model,
        tokenizer=tokenizer,
        rows=rows,
        judge=judge,
        section=section,
        settings=settings,
        meta=meta,
        methods=methods,
        controls=args.controls and listening,
        probing=args.probes and listening,
        probe_rows=args.probe_rows,
    )


def say_if_positions_run_out(model: PreTrainedModel, limit: int) -> None:
    most = known_positions(model.config)
    if most is not None and limit >= most and PartialState().is_main_process:
        print(f"completions of up to {limit} tokens pass the {most} positions that the model is made for", flush=True)


def earlier_probes(directory: Path, settings: dict[str, Any]) -> Probes | None:
    """Those of an earlier call on the same samples; None where results are of others, weights included."""
    path = directory / "results.json"
    if not path.is_file():
        return None
    try:
        earlier = read_results(path)
    except UserError:  # of another version, or damaged: these results take its place
        return None
    same = all(earlier.meta.get(key) == value for key, value in settings.items())
    return earlier.probes if same else None


def say_uneven_samples(section: EvaluationSection) -> None:
    for width in section.widths:
        if section.samples % width != 0 and PartialState().is_main_process:
            taken = width * groups_per_problem(section, width)
            print(f"width {width}: {taken} samples a problem, not {section.samples}", flush=True)


def check_shuffling(section: EvaluationSection, suite: Suite, problems: int) -> None:
    """Raise UserError where there are too few problems for a row to have siblings of others."""
    width = max(section.widths)
    if problems < width:
        raise UserError(
            f"--controls: siblings from {width - 1} other prompts need {width} problems at width {width}, {suite.name} "
            f"has {problems}: evaluate more problems, or smaller widths."
        )


def say_what_shuffling_needs(section: EvaluationSection) -> None:
    """A block that exchanges siblings runs as a whole."""
    rows = max(section.widths) ** 2
    if section.max_rows is not None and rows > section.max_rows and PartialState().is_main_process:
        print(
            f"--controls: shuffled siblings at width {max(section.widths)} need {rows} rows at once, and take them "
            f"(--max-rows is {section.max_rows})",
            flush=True,
        )
