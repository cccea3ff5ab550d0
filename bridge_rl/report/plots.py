"""Figures of an evaluation and of the training before it."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
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
    ramp,
    save_png,
    shown_name,
    styled,
)
from bridge_rl.report.labels import CONDITIONS, G_PASS, METRICS, g_pass_families, setting

KL = "KL from sampling (near 0 unless broken)"
KL_FLOOR = 1e-6  # what float32 leaves of 0: below it the axis is linear, so that noise is seen as a flat line
HELD_OUT = "held-out pass@1, by width"
LEAST_TOP = 0.1  # of an axis that starts at 0, lest noise about 0 fill it
# Panels of training, by the names in the trainer's log; those that a run has not logged are left out.
TRAINING = {
    "reward": ("reward",),
    "groups: all right, any right": (names.ALL_RIGHT, names.ANY_RIGHT),
    "completion length, tokens": ("completions/mean_length",),
    "share of rows cut": (names.ROLLOUT_TRUNCATED,),
    "entropy": ("entropy",),
    KL: (names.RECOMPUTE_KL,),
    "gradient norm": ("grad_norm",),
    "norm of block output / of residual": (names.NORM_RATIO,),
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
        figures["lengths"] = lengths_figure(
            results.lengths, results.meta.get("trained_length"), results.meta.get("trained_width")
        )
    curves = training_curves(history)
    if curves:
        figures["training"] = training_figure(curves)
    if results.probes is not None:
        figures["norm_ratio"] = norm_ratio_figure(results.probes)
        if results.probes.sibling_share:  # blocks that do not attend have none
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
        axis.set_xlabel("τ: share of rows that must be right" + too_few_groups(summaries, family, by_tau.values()))
    finish(figure, axes, len(summaries))
    top = max(axis.get_ylim()[1] for axis in axes)
    for axis in axes:
        axis.set_ylim(0, top)
    return figure


def too_few_groups(summaries: Sequence[Summary], family: str, metrics: Iterable[str]) -> str:
    """A line that says why widths are missing from the panel of mixed groups; empty where none is."""
    metrics = list(metrics)
    missing = [s.width for s in summaries if s.width > 1 and not any(name in s.metrics for name in metrics)]
    if not family.startswith("mixed/") or not missing:
        return ""
    return f"\nfewer than w groups a problem at width {', '.join(map(str, missing))}"


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
def lengths_figure(
    lengths: Sequence[LengthPoint], trained_length: int | None, trained_width: int | None = None
) -> Figure:
    """Accuracy, and the share of rows cut, over the limit on a completion's tokens; the trained length is marked.

    The model stands at each width, a control only at the trained one, or else at the largest that it has.
    """
    figure, axes = panels(2)
    limits = sorted({point.limit for point in lengths})
    shown = shown_settings(lengths, trained_width)
    number = sum(condition == "model" for condition, _ in shown)
    for place, chosen in enumerate(shown):
        points = sorted((p for p in lengths if (p.condition, p.width) == chosen), key=lambda p: p.limit)
        at = [point.limit for point in points]
        colour = ramp(place, number) if chosen[0] == "model" else None
        look = place if colour else list(CONDITIONS).index(chosen[0])
        line(axes[0], look, setting(*chosen), at, [point.accuracy for point in points], colour)
        line(axes[1], look, "", at, [Estimate(point.truncated) for point in points], colour)
    for axis, title in zip(axes, ("mean accuracy (pass@1)", "share of rows cut at the limit"), strict=True):
        log_axis(axis, limits, "limit on a completion, tokens")
        axis.set_title(title)
        if trained_length is not None:
            axis.axvline(trained_length, color=INK, linewidth=1, linestyle=(0, (2, 2)), label="limit in training")
    finish(figure, axes, len(shown) + (trained_length is not None))
    return figure


def shown_settings(lengths: Sequence[LengthPoint], trained_width: int | None) -> list[tuple[str, int]]:
    """(condition, width) of each line: of the model all, of a control one."""
    shown = []
    for condition in CONDITIONS:
        widths = sorted({point.width for point in lengths if point.condition == condition})
        if condition != "model" and widths:
            widths = [trained_width if trained_width in widths else widths[-1]]
        shown += [(condition, width) for width in widths]
    return shown


@styled
def training_figure(curves: Mapping[str, Mapping[str, list[tuple[float, float]]]]) -> Figure:
    """One panel a title, one line a name, over the training step."""
    figure, axes = panels(len(curves))
    steps = [step for named in curves.values() for points in named.values() for step, _ in points]
    first, last = min(steps), max(steps)
    margin = 0.05 * (last - first) or 1.0
    for axis, (title, named) in zip(axes, curves.items(), strict=True):
        for place, (name, points) in enumerate(named.items()):
            # Widths of one evaluation are often as good as each other: beside each other none hides another.
            aside = 0.3 * margin * (place - (len(named) - 1) / 2) if title == HELD_OUT else 0.0
            axis.plot(
                [step + aside for step, _ in points],
                [value for _, value in points],
                label=shown_name(curve_name(name)),
                color=ramp(place, len(named)) if title == HELD_OUT else COLOURS[place],
                linestyle=DASHES[place % len(DASHES)],
                marker=MARKERS[place % len(MARKERS)] if len(points) < 25 else "",
                markerfacecolor="none",
            )
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.set_xlim(first - margin, last + margin)
        set_span(axis, title, [value for points in named.values() for _, value in points])
        if len(named) > 1:
            axis.legend()
    return figure


def set_span(axis: Axes, title: str, values: Sequence[float]) -> None:
    """Limits of a panel that do not blow noise up: from 0 where nothing is below it, and at least LEAST_TOP high."""
    if title == KL:
        axis.set_yscale("symlog", linthresh=KL_FLOOR)
        top = max(10 * KL_FLOOR, *(2 * abs(value) for value in values))
        axis.set_ylim(-top, top)
    elif min(values) >= 0:
        axis.set_ylim(0, max(LEAST_TOP, 1.08 * max(values)))
    else:
        reach = max(LEAST_TOP, 1.15 * (max(values) - min(values))) / 2
        middle = (max(values) + min(values)) / 2
        axis.set_ylim(middle - reach, middle + reach)


def curve_name(metric: str) -> str:
    """`group/all_right` as `all right`, `eval_pass@1/w4` as `width 4`."""
    name = metric.rpartition("/")[2]
    return f"width {name[1:]}" if re.fullmatch(r"w\d+", name) else name.replace("_", " ")


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
    """Share of attention on siblings: by layer and head, and by layer and part of the completion.

    White is even attention over the rows. Nothing is drawn of blocks that do not attend.
    """
    figure = Figure(figsize=(8.4, 1.6 + max(1.4, 0.16 * len(probes.layers))), layout="constrained")
    if not probes.sibling_share:
        return figure
    axes = figure.subplots(1, 2)
    even = (probes.width - 1) / probes.width
    shares = np.concatenate([np.ravel(probes.sibling_share), np.ravel(probes.share_by_step)])
    span = max(0.1, float(np.nanmax(np.abs(shares - even))))  # at least .1, lest noise look like a pattern
    for axis, values, label in (
        (axes[0], probes.sibling_share, "head"),
        (axes[1], probes.share_by_step, "part of the completion, first to last"),
    ):
        limits = {"vmin": even - span, "vmax": even + span}
        image = axis.imshow(values, cmap="RdBu_r", **limits, aspect="auto", interpolation="none")
        axis.set_yticks(*every(probes.layers, 16))
        axis.set_xticks(*every(range(len(values[0])), 16))
        axis.set_xlabel(label)
        axis.grid(visible=False)
    axes[0].set_ylabel("layer")
    figure.suptitle(f"attention on siblings at width {probes.width} (white: even attention, {even:.2f})", fontsize=9.5)
    figure.colorbar(image, ax=list(axes), pad=0.01)
    return figure


def training_curves(history: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Points (step, value) by panel and metric name, of what a trainer's log has."""
    prefix = names.evaluation("pass@1", 1).removesuffix("1")
    logged = {name for entry in history for name in entry if name.startswith(prefix)}
    wanted = {**TRAINING, HELD_OUT: tuple(sorted(logged, key=lambda name: int(name.removeprefix(prefix))))}
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for title, metrics in wanted.items():
        for metric in metrics:
            points = [(entry["step"], entry[metric]) for entry in history if is_number(entry.get(metric))]
            if points:
                curves.setdefault(title, {})[metric] = points
    return curves


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
