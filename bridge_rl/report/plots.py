"""Figures of an evaluation and of the training before it."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bridge_rl.evaluation.results import Estimate, LengthPoint, Probes, Results, Summary
from bridge_rl.report import names
from bridge_rl.report.drawing import (
    COLOURS,
    DASHES,
    HATCHES,
    INK,
    MARKERS,
    arms_of,
    every,
    finish,
    line,
    log_axis,
    panels,
    save_png,
    shown_name,
    styled,
)
from bridge_rl.report.labels import CONDITIONS, G_PASS, METRICS, g_pass_families, setting

# Panels of training, by the names in the trainer's log; those that a run has not logged are left out.
TRAINING = {
    "reward": ("reward",),
    "groups: all right, any right": (names.ALL_RIGHT, names.ANY_RIGHT),
    "completion length, tokens": ("completions/mean_length",),
    "share of rows cut": (names.ROLLOUT_TRUNCATED,),
    "entropy": ("entropy",),
    "KL of the update from sampling": (names.RECOMPUTE_KL,),
    "gradient norm": ("grad_norm",),
    "norm of what blocks add / of the residual": (names.NORM_RATIO,),
}


def plot_widths(arms: Mapping[str, Sequence[Summary]], path: Path) -> None:
    """Save `widths_figure` as PNG."""
    save_png(widths_figure(arms), path)


def draw(results: Results, history: Sequence[Mapping[str, Any]] = ()) -> dict[str, Figure]:
    """Every figure for which there is something to show, by the name of its file."""
    figures = {"widths": widths_figure(by_condition(results.summaries))}
    if g_pass_families(results.summaries):
        figures["g_pass"] = g_pass_figure(results.summaries)
    if len({summary.condition for summary in results.summaries}) > 1:
        figures["controls"] = controls_figure(results.summaries)
    if results.lengths:
        figures["lengths"] = lengths_figure(results.lengths, results.meta.get("trained_length"))
    curves = training_curves(history)
    if curves:
        figures["training"] = training_figure(curves)
    if results.probes is not None:
        figures["norm_ratio"] = norm_ratio_figure(results.probes)
        figures["attention"] = attention_figure(results.probes)
    return figures


def by_condition(summaries: Sequence[Summary]) -> dict[str, list[Summary]]:
    """Summaries of each condition, by its name in words."""
    present = [condition for condition in CONDITIONS if any(s.condition == condition for s in summaries)]
    return {CONDITIONS[name]: [s for s in summaries if s.condition == name] for name in present}


# -- figures --------------------------------------------------------------------------------------------------------


@styled
def widths_figure(arms: Mapping[str, Sequence[Summary]]) -> Figure:
    """One panel a metric, one line an arm, over the width at which it was sampled; bars are 95 % intervals."""
    everything = [summary for summaries in arms.values() for summary in summaries]
    shown = {name: title for name, title in METRICS.items() if any(name in s.metrics for s in everything)}
    figure, axes = panels(len(shown))
    widths = sorted({summary.width for summary in everything})
    for axis, (metric, title) in zip(axes, shown.items(), strict=True):
        for place, (name, summaries) in enumerate(arms.items()):
            points = sorted((s.width, s.metrics[metric]) for s in summaries if metric in s.metrics)
            line(axis, place, name, [width for width, _ in points], [value for _, value in points])
        log_axis(axis, widths, "width sampled")
        axis.set_title(title)
    finish(figure, axes, len(arms))
    return figure


@styled
def g_pass_figure(summaries: Sequence[Summary]) -> Figure:
    """One panel a way of computing G-Pass, one line a width, over the threshold tau; of the model as it is."""
    summaries = [summary for summary in summaries if summary.condition == "model"]
    families = g_pass_families(summaries)
    figure, axes = panels(len(families))
    for axis, (family, by_tau) in zip(axes, families.items(), strict=True):
        for place, summary in enumerate(summaries):
            known = {tau: summary.metrics[name] for tau, name in by_tau.items() if name in summary.metrics}
            line(axis, place, f"width {summary.width}", list(known), list(known.values()))
        axis.set_title(G_PASS.get(family, family))
        axis.set_xticks(list(by_tau))
        axis.set_xlabel("τ: share of rows that must be right")
    finish(figure, axes, len(summaries))
    return figure


@styled
def controls_figure(summaries: Sequence[Summary]) -> Figure:
    """Bars of each condition at each width, with 95 % intervals."""
    conditions = [name for name in CONDITIONS if any(summary.condition == name for summary in summaries)]
    widths = sorted({summary.width for summary in summaries})
    found: dict[tuple[str, int], dict[str, Estimate]] = {
        (summary.condition, summary.width): summary.metrics for summary in summaries
    }
    shown = [name for name in METRICS if all(name in summary.metrics for summary in summaries)][:2]
    figure, axes = panels(len(shown))
    thickness = 0.8 / len(conditions)
    for axis, metric in zip(axes, shown, strict=True):
        for place, condition in enumerate(conditions):
            at = [number for number, width in enumerate(widths) if (condition, width) in found]
            values = [found[condition, widths[number]][metric] for number in at]
            axis.bar(
                [number + (place - (len(conditions) - 1) / 2) * thickness for number in at],
                [value.value for value in values],
                width=0.92 * thickness,
                color=COLOURS[place],
                hatch=HATCHES[place],
                edgecolor="white",
                linewidth=0,
                yerr=arms_of(values),
                error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 2.5},
                label=CONDITIONS[condition],
            )
        axis.set_xticks(range(len(widths)), [str(width) for width in widths])
        axis.set_xlabel("width sampled")
        axis.set_title(METRICS[metric])
        axis.grid(visible=False, axis="x")
    finish(figure, axes, len(conditions))
    return figure


@styled
def lengths_figure(lengths: Sequence[LengthPoint], trained_length: int | None) -> Figure:
    """Accuracy, and the share of rows cut, over the limit on a completion's tokens; the trained length is marked."""
    figure, axes = panels(2)
    settings = list(dict.fromkeys((point.condition, point.width) for point in lengths))
    limits = sorted({point.limit for point in lengths})
    for place, chosen in enumerate(settings):
        points = sorted((p for p in lengths if (p.condition, p.width) == chosen), key=lambda p: p.limit)
        at = [point.limit for point in points]
        line(axes[0], place, setting(*chosen), at, [point.accuracy for point in points])
        line(axes[1], place, "", at, [Estimate(point.truncated) for point in points])
    for axis, title in zip(axes, ("mean accuracy (pass@1)", "share of rows cut at the limit"), strict=True):
        log_axis(axis, limits, "limit on a completion, tokens")
        axis.set_title(title)
        if trained_length is not None:
            axis.axvline(trained_length, color=INK, linewidth=1, linestyle=(0, (2, 2)), label="limit in training")
    finish(figure, axes, len(settings) + (trained_length is not None))
    return figure


@styled
def training_figure(curves: Mapping[str, Mapping[str, list[tuple[float, float]]]]) -> Figure:
    """One panel a title, one line a name, over the training step."""
    figure, axes = panels(len(curves))
    for axis, (title, named) in zip(axes, curves.items(), strict=True):
        for place, (name, points) in enumerate(named.items()):
            marker = MARKERS[place] if len(points) < 25 else ""
            steps, values = zip(*points, strict=True)
            axis.plot(
                steps,
                values,
                label=shown_name(name.rpartition("/")[2]),
                color=COLOURS[place],
                linestyle=DASHES[place],
                marker=marker,
            )
        if len(named) > 1:
            axis.legend()
        axis.set_title(title)
        axis.set_xlabel("step")
    return figure


@styled
def norm_ratio_figure(probes: Probes) -> Figure:
    """Norm of what each block adds over the norm of what it is added to."""
    figure, axes = panels(1)
    axes[0].bar([str(layer) for layer in probes.layers], probes.norm_ratio, color=COLOURS[0])
    axes[0].set_title("norm of the block's output / norm of the residual")
    axes[0].set_xlabel("layer")
    axes[0].grid(visible=False, axis="x")
    if len(probes.layers) > 16:
        axes[0].tick_params(axis="x", labelsize=6, rotation=90)
    finish(figure, axes, 1)
    return figure


@styled
def attention_figure(probes: Probes) -> Figure:
    """Share of attention on siblings: by layer and head, and by layer and part of the completion."""
    figure = Figure(figsize=(8.4, 1.6 + max(1.4, 0.16 * len(probes.layers))), layout="constrained")
    axes = figure.subplots(1, 2)
    top = max(0.01, *(max(row) for row in [*probes.sibling_share, *probes.share_by_step]))
    for axis, values, label in (
        (axes[0], probes.sibling_share, "head"),
        (axes[1], probes.share_by_step, "part of the completion, first to last"),
    ):
        image = axis.imshow(values, cmap="cividis", vmin=0, vmax=top, aspect="auto", interpolation="none")
        axis.set_yticks(*every(probes.layers, 16))
        axis.set_xticks(*every(range(len(values[0])), 16))
        axis.set_xlabel(label)
        axis.grid(visible=False)
    axes[0].set_ylabel("layer")
    even = (probes.width - 1) / probes.width
    figure.suptitle(f"attention on siblings at width {probes.width} (even attention: {even:.2f})", fontsize=9.5)
    figure.colorbar(image, ax=list(axes), pad=0.01)
    return figure


def training_curves(history: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Points (step, value) by panel and metric name, of what a trainer's log has."""
    prefix = names.evaluation("pass@1", 1).removesuffix("1")
    logged = {name for entry in history for name in entry if name.startswith(prefix)}
    evaluated = sorted(logged, key=lambda name: int(name.removeprefix(prefix)))
    wanted = {**TRAINING, "held-out pass@1, by width": tuple(evaluated[: len(COLOURS)])}
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for title, metrics in wanted.items():
        for metric in metrics:
            points = [(entry["step"], entry[metric]) for entry in history if is_number(entry.get(metric))]
            if points:
                curves.setdefault(title, {})[metric] = points
    return curves


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
