"""One self-contained page a directory of results: figures, tables, and a viewer of sampled groups."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from bridge_rl.evaluation.results import Estimate, Results, Summary
from bridge_rl.report import tables
from bridge_rl.report.labels import estimate

META = {
    "model": "model",
    "weights": "fingerprint of the weights",
    "suite": "suite",
    "source": "problems from",
    "source_commit": "their revision",
    "licence": "their licence",
    "problems": "fingerprint of the problems",
    "reward": "reward",
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
    """What a page shows. figures: SVG by the names of `plots.draw`. compared: with other runs, where there are any."""

    model: str
    suite: str | None
    results: Results
    figures: Mapping[str, str]
    viewer: Viewer | None = None
    compared: tables.Table | None = None
    others: Sequence[str] = field(default_factory=list)


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
        headline=headline(results),
        figures={name: Markup(svg) for name, svg in page.figures.items()},  # drawn by us; labels escaped when drawn
        css=source(environment, "page.css"),
        script=source(environment, "page.js"),
        viewer_json=htmlsafe_json_dumps(dict(page.viewer.data)) if page.viewer else "",
        summary=tables.summary_table(results.summaries),
        all_metrics=tables.metric_table(results.summaries),
        comparisons=tables.comparison_table(results.comparisons),
        aggregated=tables.aggregated_table(results.aggregated),
        lengths=tables.length_table(results.lengths),
        counterfactuals=tables.counterfactual_table(probes.counterfactuals if probes else []),
        meta=described(results.meta),
    )


def source(environment: Environment, name: str) -> Markup:
    """A file of the page that goes in as it is."""
    assert environment.loader is not None
    return Markup(environment.loader.get_source(environment, name)[0])


def headline(results: Results) -> list[str]:
    """Verdicts in words; without controls, what was measured and what that leaves open."""
    sentences = list(results.verdicts)
    summaries = sorted((s for s in results.summaries if s.condition == "model"), key=lambda summary: summary.width)
    if not summaries:
        return sentences
    ends = [summaries[0], summaries[-1]] if len(summaries) > 1 else summaries
    measured = " and ".join(f"{pass_at_1(s)} at width {s.width}" for s in ends)
    sentences.append(f"Mean accuracy (pass@1) is {measured}, over {ends[0].problems} problems.")
    if not any(summary.condition != "model" for summary in results.summaries):
        sentences.append(
            "There are no controls in this evaluation, so it does not show whether siblings make a difference: "
            "evaluate a model with a Bridge with --controls."
        )
    return sentences


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
