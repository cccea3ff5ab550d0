"""`bridge-rl report`: page, figures and tables of evaluations, and comparisons of several."""

import argparse
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bridge_rl.errors import UserError
from bridge_rl.evaluation.aggregate import by_setting, compare, problem_means, regroup
from bridge_rl.evaluation.results import Comparison, Results, Summary, read_results
from bridge_rl.evaluation.samples import SampledGroup, SampleStore
from bridge_rl.report import html, tables
from bridge_rl.report.drawing import as_svg, save_png
from bridge_rl.report.labels import METRICS
from bridge_rl.report.plots import draw, widths_figure
from bridge_rl.report.viewer import choose_groups, counted, hears, read_pieces, read_problems, regrouped, viewer_data

# What a reader who cannot see a figure is told.
DESCRIPTIONS = {
    "widths": "accuracy over width, with intervals",
    "g_pass": "G-Pass over the threshold",
    "controls": "accuracy of the controls",
    "lengths": "accuracy over the limit on length",
    "training": "training curves",
    "norm_ratio": "norm ratio by layer",
    "attention": "attention on siblings by layer",
    "runs": "accuracy of several runs over width",
}
# What runs have to share for their difference to be one of the models, by the names in `Results.meta`.
SETTINGS = ("temperature", "top_p", "max_new_tokens", "reward", "judging", "prompt")
MOST_NAMED = 5


@dataclass(frozen=True)
class Evaluation:
    """A directory of `bridge-rl eval`, read when asked for."""

    directory: Path

    @cached_property
    def results(self) -> Results:
        check_place(self.directory)
        return read_results(self.directory / "results.json")

    @property
    def model(self) -> str:
        return str(self.results.meta.get("model", self.directory))  # a run's own evaluations name none

    @property
    def suite(self) -> str | None:
        return self.results.meta.get("suite")

    @cached_property
    def problems(self) -> dict[int, dict[str, Any]]:
        return read_problems(self.directory / "problems.jsonl")

    @cached_property
    def groups(self) -> list[SampledGroup]:
        """Those that the results are of; empty where there are no samples beside them."""
        samples = self.directory / "samples"
        if not samples.is_dir():
            return []
        groups = counted(SampleStore(samples).read(), self.results.summaries)
        check_whole(groups, self.results.summaries, samples)
        return groups


def report(args: argparse.Namespace) -> None:
    """Write the report of the first directory, with others compared with them; save the W&B view."""
    if not args.directories and args.wandb is None:
        raise UserError("bridge-rl report: name a directory that bridge-rl eval wrote, or --wandb PROJECT.")
    evaluations = [Evaluation(directory) for directory in args.directories]
    check_different(args.directories)
    for other in evaluations[1:]:
        check_comparable(evaluations[0], other)
    if evaluations:
        for path in write_evaluation(evaluations[0], args.run, evaluations[1:]):
            print(path)
    if len(evaluations) > 1:
        say_compared(evaluations)
    if args.wandb is not None:
        from bridge_rl.report.workspace import save_workspace  # a heavy import that only this needs

        print(save_workspace(args.wandb, args.entity, dry_run=args.dry_run))


def write_report(directory: Path, run: Path | None = None) -> list[Path]:
    """Page, PNGs and tables of one evaluation, into its directory; returns what was written, the page first.

    run: of training, for its curves; without it, the model's directory where that is a run. Raises UserError where
    something that belongs to an evaluation is missing.
    """
    return write_evaluation(Evaluation(directory), run)


def write_evaluation(evaluation: Evaluation, run: Path | None, others: Sequence[Evaluation] = ()) -> list[Path]:
    """As `write_report`; with others, also their comparison with this one."""
    results, viewer = without_repeats(evaluation), make_viewer(evaluation)
    figures = draw(results, read_history(run_directory(evaluation, run)))
    alone = regrouped(results.summaries, evaluation.groups)
    made = tables.result_tables(results, alone)
    texts = {"table.md": "\n".join(map(tables.as_markdown, made)), "table.tex": "\n".join(map(tables.as_latex, made))}
    compared, caution = None, settings_caution([evaluation, *others])
    if others:
        compared = comparison_table(evaluation, others)
        figures["runs"] = runs_figure([evaluation, *others])
        texts["comparison.md"] = tables.as_markdown(replace(compared, note=caution))
    page = html.Page(
        evaluation.model,
        evaluation.suite,
        results,
        svgs(figures),
        viewer,
        compared,
        run_names([evaluation, *others]),
        caution,
        alone,
        hears(evaluation.groups),
    )
    return write_files(evaluation.directory, {"report.html": html.render(page), **texts}, figures)


def without_repeats(evaluation: Evaluation) -> Results:
    """The results, in which a line of rows sampled one by one does not stand once more as one of another width."""
    results = evaluation.results
    if "model" not in regrouped(results.summaries, evaluation.groups):
        return results
    kept = {(a.method, a.condition, a.samples): a for a in sorted(results.aggregated, key=lambda a: -a.width)}
    return replace(results, aggregated=[a for a in results.aggregated if a in kept.values()])


def write_files(directory: Path, texts: Mapping[str, str], figures: Mapping[str, Figure]) -> list[Path]:
    """Also removes what an earlier report wrote and this one does not: it would show other results."""
    for name in {"comparison.md", *(f"{name}.png" for name in DESCRIPTIONS)}:
        if name not in texts and name.removesuffix(".png") not in figures:
            (directory / name).unlink(missing_ok=True)
    for name, text in texts.items():
        (directory / name).write_text(text, encoding="utf-8")
    for name, figure in figures.items():
        save_png(figure, directory / f"{name}.png")
    return [directory / name for name in [*texts, *(f"{name}.png" for name in figures)]]


def svgs(figures: Mapping[str, Figure]) -> dict[str, str]:
    return {name: as_svg(figure, name, DESCRIPTIONS[name]) for name, figure in figures.items()}


def make_viewer(evaluation: Evaluation) -> html.Viewer | None:
    """None where an evaluation has no samples beside its results."""
    if not evaluation.groups:
        return None
    chosen = choose_groups(evaluation.groups)
    pieces = read_pieces(evaluation.directory / "pieces.json")
    start_width = evaluation.results.meta.get("trained_width")
    data = viewer_data(chosen, evaluation.problems, pieces, start_width)
    return html.Viewer(data, len(evaluation.groups), len(chosen))


def run_directory(evaluation: Evaluation, run: Path | None) -> Path | None:
    """The run that was named; else the one that made the model or in whose directory the evaluation is, if any."""
    if run is not None:
        if not (run / "history.jsonl").is_file():
            raise UserError(f"--run: there is no {run / 'history.jsonl'}: name the output_dir of a finished run.")
        return run
    if evaluation.results.meta.get("trained_width") is None:  # no run made it: a base, kept beside a run's evaluations
        return None
    candidates = [Path(evaluation.model), evaluation.directory.absolute().parent.parent]
    return next((candidate for candidate in candidates if (candidate / "history.jsonl").is_file()), None)


def read_history(run: Path | None) -> list[dict[str, Any]]:
    """What a run logged. Raises UserError for a line that is damaged."""
    if run is None:
        return []
    path = run / "history.jsonl"
    entries = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entry = json.loads(line)
            entries.append({"step": entry["step"], **entry})
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number}, is no log entry ({error}): mend or delete the line.") from error
    return entries


# -- what was asked for ---------------------------------------------------------------------------------------------


def check_place(directory: Path) -> None:
    """Raise UserError that names the evaluations in a directory that has some and is none."""
    patterns = ("*/results.json", "eval/*/results.json", "evaluation/*/results.json")
    inside = [] if (directory / "results.json").is_file() else [p for name in patterns for p in directory.glob(name)]
    if inside:
        found = sorted(str(path.parent) for path in inside)
        names = ", ".join(found[:MOST_NAMED]) + (f" and {len(found) - MOST_NAMED} more" if found[MOST_NAMED:] else "")
        raise UserError(
            f"There is no {directory / 'results.json'}, but there are evaluations in it: name one of {names}."
        )


def check_whole(groups: Sequence[SampledGroup], summaries: Sequence[Summary], samples: Path) -> None:
    """Raise UserError unless the groups are those that the results are of: some may be gone, or not copied."""
    alone, found = regrouped(summaries, groups), by_setting(groups)
    for summary in summaries:
        single = summary.condition in alone
        own = found.get((summary.condition, 1 if single else summary.width), [])
        own = regroup(own, summary.width) if single else own
        expected = summary.problems * summary.groups_per_problem
        # Where rows of a model that heard each other are gone, those of width 1 are no more of the same accuracy.
        same = not single or not own or is_close(problem_means(own)["pass@1"], summary.metrics["pass@1"].value)
        if len(own) != expected or not same:
            raise UserError(
                f"{samples} holds other groups than those of results.json (condition {summary.condition}, width "
                f"{summary.width}: {len(own)} of {expected}{'' if same else ', with another accuracy'}): run the same "
                "bridge-rl eval again, which samples what is missing."
            )


def is_close(means: Mapping[int, float], value: float) -> bool:
    return math.isclose(sum(means.values()) / len(means), value, abs_tol=1e-6)


def check_different(directories: Sequence[Path]) -> None:
    """Raise UserError where one directory is named twice."""
    for place, directory in enumerate(directories):
        if directory.resolve() in [earlier.resolve() for earlier in directories[:place]]:
            raise UserError(f"{directory} is named twice: name each directory once, a run is not compared with itself.")


# -- several runs ---------------------------------------------------------------------------------------------------


def check_comparable(first: Evaluation, second: Evaluation) -> None:
    """Raise UserError unless both answered the same problems of the same suite."""
    for one in (first, second):
        if suites := one.results.meta.get("suites"):
            inside = one.directory / suites[0]
            raise UserError(f"{one.directory} is a mean over suites, without samples: compare one suite, as {inside}.")
        if not one.groups:
            raise UserError(
                f"{one.directory} has no samples ({one.directory / 'samples'}), of which a comparison is made: copy "
                "them too, or evaluate again."
            )
    if first.suite != second.suite:
        raise UserError(
            f"{first.directory} and {second.directory} cannot be compared: one is on {first.suite}, the other on "
            f"{second.suite}; evaluate both on one suite."
        )
    asked = [{n: (p["text"], p["answer"]) for n, p in e.problems.items()} for e in (first, second)]
    if asked[0] != asked[1]:
        raise UserError(
            f"{first.directory} and {second.directory} cannot be compared: their problems differ; evaluate both with "
            "the same --suite, --problems and --seed."
        )


def settings_caution(evaluations: Sequence[Evaluation]) -> str:
    """A sentence that names what runs were evaluated with otherwise; empty where all is the same."""
    names = run_names(evaluations)
    metas = [evaluation.results.meta for evaluation in evaluations]  # a run's own evaluations name no settings
    differing = []
    for key in SETTINGS:
        known = {name: meta[key] for name, meta in zip(names, metas, strict=True) if key in meta}
        if len(set(map(str, known.values()))) > 1:
            values = [f"{textwrap.shorten(str(value), 80)} in {name}" for name, value in known.items()]
            differing.append(f"{html.META[key]} ({', '.join(values)})")
    asked = [{n: p["prompt"] for n, p in e.problems.items()} for e in evaluations] if len(evaluations) > 1 else []
    if any(prompts != asked[0] for prompts in asked) and not any(text.startswith("prompt (") for text in differing):
        differing.append("what stands around each problem, as a system prompt (problems.jsonl)")
    if not differing:
        return ""
    return (
        f"Caution: these runs were evaluated with other settings, which may be why they differ: {'; '.join(differing)}."
    )


def say_compared(evaluations: Sequence[Evaluation]) -> None:
    """Where the comparison is, and what to beware of."""
    caution = settings_caution(evaluations)
    if caution:
        print(caution)
    first, *others = evaluations
    named = ", ".join(str(other.directory) for other in others)
    print(f"{first.directory} is compared with {named} in {first.directory / 'report.html'}, under 'Runs compared'")


def comparison_table(evaluation: Evaluation, others: Sequence[Evaluation]) -> tables.Table:
    comparisons = [comparison for other in others for comparison in compare_runs(evaluation, other)]
    return tables.comparison_table(comparisons, "Runs compared")


def runs_figure(evaluations: Sequence[Evaluation]) -> Figure:
    """Accuracy over width, one line a run."""
    names = run_names(evaluations)
    return widths_figure(
        {
            name: [summary for summary in evaluation.results.summaries if summary.condition == "model"]
            for name, evaluation in zip(names, evaluations, strict=True)
        }
    )


def compare_runs(first: Evaluation, second: Evaluation) -> list[Comparison]:
    """Each of the important metrics at every width that both have: first minus second."""
    names = run_names([first, second])
    ours, theirs = by_width(first), by_width(second)
    widths = sorted(ours.keys() & theirs.keys())
    if not widths:
        raise UserError(f"{first.directory} and {second.directory} have no width in common: evaluate both at one.")
    return [
        compare(ours[width], theirs[width], metric, f"width {width}", *names)
        for width in widths
        for metric in (METRICS if width > 1 else ["pass@1"])  # of a row alone they are all the same
    ]


def by_width(evaluation: Evaluation) -> dict[int, list[SampledGroup]]:
    """Groups of the model as it is. Rows of a model without a Bridge were sampled one by one and serve every width."""
    settings = by_setting(evaluation.groups)
    sampled = {width: own for (condition, width), own in settings.items() if condition == "model"}
    widths = {summary.width for summary in evaluation.results.summaries if summary.condition == "model"}
    regrouped = {width: regroup(sampled[1], width) for width in widths - sampled.keys() if 1 in sampled}
    return {**sampled, **regrouped}


def run_names(evaluations: Sequence[Evaluation]) -> list[str]:
    """Each one's model; its directory where two have the same model."""
    models = [evaluation.model for evaluation in evaluations]
    if len(set(models)) == len(models):
        return models
    return [str(evaluation.directory) for evaluation in evaluations]
