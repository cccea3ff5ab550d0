"""One self-contained page a directory of results: figures, tables, and a viewer of sampled groups."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from bridge_rl.evaluation.results import Estimate, Results, Summary
from bridge_rl.report import tables
from bridge_rl.report.labels import estimate, g_pass_families

QUESTIONS = {
    "siblings": "Do siblings make a difference?",
    "coverage": "Is some row of a group right?",
    "votes": "Is a majority vote better?",
    "other": "About these numbers",
}
META = {
    "model": "model",
    "weights": "fingerprint of the weights",
    "config": "fingerprint of the model's configuration",
    "dtype": "computed in",
    "suite": "suite",
    "source": "problems from",
    "source_commit": "their revision",
    "licence": "their licence",
    "problems": "fingerprint of the problems",
    "prompt_ids": "fingerprint of their prompts' tokens",
    "eos_ids": "tokens that end a completion",
    "reward": "reward",
    "judging": "fingerprint of the reward's file and the verifier",
    "prompt": "prompt",
    "samples": "samples a problem",
    "temperature": "temperature",
    "top_p": "top-p",
    "max_new_tokens": "limit on a completion, tokens",
    "lengths": "limits judged besides, tokens",
    "step": "training step",
    "seed": "seed",
    "trained_width": "width in training",
    "trained_length": "limit in training, tokens",
    "command": "command",
    "commit": "commit",
    "hardware": "hardware",
    "python": "Python",
    "versions": "versions",
}


@dataclass(frozen=True)
class Viewer:
    """data: see `viewer.viewer_data`. sampled: groups on disk. shown: groups on the page."""

    data: Mapping[str, Any]
    sampled: int
    shown: int


@dataclass(frozen=True)
class Page:
    """What a page shows. figures: SVG by the names of `plots.draw`. compared: with other runs, where there are any.

    runs: their names, its own first. caution: of runs that were not evaluated alike. regrouped, hears: see `viewer`.
    """

    model: str
    suite: str | None
    results: Results
    figures: Mapping[str, str]
    viewer: Viewer | None = None
    compared: tables.Table | None = None
    runs: Sequence[str] = ()
    caution: str = ""
    regrouped: Sequence[str] = ()
    hears: bool = False


def render(page: Page) -> str:
    """The page as one string of HTML; everything that a model or a user wrote is escaped."""
    environment = Environment(
        loader=PackageLoader("bridge_rl.report", "page"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    results = page.results
    probes = results.probes
    return environment.get_template("page.html.jinja").render(
        page=page,
        results=results,
        headline=headline(results, page.regrouped),
        g_pass_caption=g_pass_caption(results.summaries, page.hears),
        figures={name: Markup(svg) for name, svg in page.figures.items()},  # drawn by us; labels escaped when drawn
        css=source(environment, "page.css"),
        script=source(environment, "page.js"),
        viewer_json=htmlsafe_json_dumps(dict(page.viewer.data)) if page.viewer else "",
        summary=replace(tables.summary_table(results.summaries), note=tables.regrouped_note(page.regrouped)),
        all_metrics=tables.metric_table(results.summaries),
        comparisons=tables.comparison_table(results.comparisons),
        aggregated=tables.aggregated_table(results.aggregated),
        lengths=tables.length_table(results.lengths),
        counterfactuals=tables.counterfactual_table(probes.counterfactuals if probes else []),
        counterfactual_sentence=tables.counterfactual_sentence(probes.counterfactuals if probes else []),
        meta=described(results.meta),
    )


def source(environment: Environment, name: str) -> Markup:
    """A file of the page that goes in as it is."""
    assert environment.loader is not None
    return Markup(environment.loader.get_source(environment, name)[0])


@dataclass(frozen=True)
class Headline:
    """lead: one sentence. notes: below it, always seen. by_question: every verdict, under what it answers."""

    lead: str
    notes: list[str]
    by_question: dict[str, list[str]]


def headline(results: Results, regrouped: Sequence[str] = ()) -> Headline:
    """The verdict at the trained width, or else at the largest; without verdicts, what was measured."""
    lead = lead_sentence(results.verdicts, results.meta.get("trained_width"))
    measured = measured_sentence(results.summaries)
    questions: dict[str, list[str]] = {question: [] for question in QUESTIONS.values()}
    for sentence in results.verdicts:
        questions[QUESTIONS[question_of(sentence)]].append(sentence)
    if lead:
        questions[QUESTIONS["other"]].append(measured)
        notes = []
    else:
        notes = [no_controls_note(regrouped)] if len({s.condition for s in results.summaries}) == 1 else []
    answered = {question: sentences for question, sentences in questions.items() if any(sentences)}
    return Headline(lead or measured, notes, answered)


def question_of(sentence: str) -> str:
    """Key in QUESTIONS of a sentence of `evaluation.controls`."""
    if not sentence.startswith("At width "):
        return "other"
    start = sentence.partition(":")[0]
    return "votes" if "majority vote" in start else "coverage" if "coverage" in start else "siblings"


def lead_sentence(verdicts: Sequence[str], trained_width: int | None) -> str:
    """What is said of siblings at one width, without intervals and remarks; empty where nothing is said of them."""
    by_width: dict[int, dict[str, str]] = {}
    for sentence in verdicts:
        if question_of(sentence) != "other":
            width = int(re.split(r"\D+", sentence)[1])
            by_width.setdefault(width, {})[question_of(sentence)] = sentence
    judged = {width: said for width, said in by_width.items() if "siblings" in said}
    if not judged:
        return ""
    said = judged[trained_width] if trained_width in judged else judged[max(judged)]
    first = re.split(r"\.\s+(?=[A-Z])", said["siblings"])[0].removesuffix(".")
    fell = "; coverage fell" if "coverage" in said else ""  # it is spoken of only then
    return re.sub(r" \((difference|no interval)[^()]*\)", "", first) + fell + "."


def measured_sentence(summaries: Sequence[Summary]) -> str:
    """Accuracy of the model at its least and its largest width."""
    ordered = sorted((s for s in summaries if s.condition == "model"), key=lambda summary: summary.width)
    if not ordered:
        return ""
    ends = [ordered[0], ordered[-1]] if len(ordered) > 1 else ordered
    measured = " and ".join(f"{pass_at_1(s)} at width {s.width}" for s in ends)
    return f"Mean accuracy (pass@1) is {measured}, over {ends[0].problems} problems."


def no_controls_note(regrouped: Sequence[str]) -> str:
    if "model" in regrouped:
        return "Rows of this model do not hear each other, so there are no siblings that could make a difference."
    return (
        "There are no controls in this evaluation, so it does not show whether siblings make a difference: "
        "evaluate a model with a Bridge with --controls."
    )


def g_pass_caption(summaries: Sequence[Summary], hears: bool) -> str:
    """What the figure has: mixed groups stand in it only where a problem has as many groups as rows."""
    own = ", which hear each other" if hears else ""
    text = f"G-Pass over the threshold τ: the chance that at least that share is right of the w rows of a group{own}"
    if any(family.startswith("mixed/") for family in g_pass_families(summaries)):
        mixed = ", which do not" if hears else ""
        return f"{text}; and of w rows, one from each of w groups{mixed}: that needs w groups a problem."
    return text + "."


def pass_at_1(summary: Summary) -> str:
    return estimate(summary.metrics.get("pass@1", Estimate(float("nan"))))


def described(meta: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How it was made, the known keys first, in words."""
    keys = [key for key in META if key in meta] + [key for key in meta if key not in META]
    return [(META.get(key, key), in_words(meta[key])) for key in keys]


def in_words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {part}" for key, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "-" if value is None else str(value)
