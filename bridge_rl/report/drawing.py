"""How figures look, and how they are saved: PNG for papers, SVG for pages.

Colours are Okabe and Ito's, told apart by colour-blind readers; markers, dashes and hatches tell them apart in print.
"""

import io
import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from bridge_rl.evaluation.results import Estimate

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31")
MARKERS = "osD^vPX"
RAMP = ("#9ecae1", "#6baed6", "#4292c6", "#2171b5", "#08519c", "#08306b")  # of what has an order, such as widths
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
HATCHES = ("", "///", "...", "xx")
INK, GRID = "#222222", "#b8b8b8"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "hatch.linewidth": 0.6,
    "svg.fonttype": "none",  # text stays text: small, and in the page's font
    "svg.hashsalt": "bridge-rl",  # the same file for the same figure
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}
styled = matplotlib.rc_context(STYLE)


def panels(count: int) -> tuple[Figure, list[Axes]]:
    """`count` axes, at most four side by side."""
    columns = 3 if count in (5, 6, 9) else min(count, 4)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(max(4.2, 3.1 * columns), 2.9 * rows), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, number + 1) for number in range(count)]


def ramp(place: int, count: int) -> str:
    """Colour of one of `count` things in their order, from faint to strong."""
    return RAMP[-1] if count == 1 else RAMP[place * (len(RAMP) - 1) // (count - 1)]


def line(
    axis: Axes, place: int, name: str, at: Sequence[float], values: Sequence[Estimate], colour: str | None = None
) -> None:
    """One arm with its intervals; `place` picks marker, dash and colour; with a `colour` of its own it is undashed."""
    look = place % len(COLOURS)
    axis.errorbar(
        at,
        [value.value for value in values],
        yerr=arms_of(values),
        label=shown_name(name),
        color=colour or COLOURS[look],
        marker=MARKERS[look],
        linestyle=DASHES[0 if colour else look],
        elinewidth=1,
        capsize=2.5,
    )


def arms_of(values: Sequence[Estimate]) -> list[list[float]]:
    """[below, above] of each value, 0 where there is no interval."""
    below = [0.0 if v.low is None else max(0.0, v.value - v.low) for v in values]
    above = [0.0 if v.high is None else max(0.0, v.high - v.value) for v in values]
    return [below, above]


def log_axis(axis: Axes, ticks: Sequence[int], label: str) -> None:
    """Powers of two at even distances, with a tick at each value that was sampled."""
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(FixedLocator(list(ticks)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticks(list(ticks), [str(tick) for tick in ticks])
    axis.set_xlabel(label)


def finish(figure: Figure, axes: Sequence[Axes], entries: int) -> None:
    """Start every axis of shares at 0; put one legend above the panels, where it hides nothing, for several lines."""
    for axis in axes:
        axis.set_ylim(bottom=0)
    if entries > 1:
        found = zip(*axes[0].get_legend_handles_labels(), strict=True)
        handles, labels = zip(*sorted(found, key=lambda pair: isinstance(pair[0], Line2D)), strict=True)  # marks last
        columns = int(14 * figure.get_figwidth() / (6 + max(map(len, labels))))  # about 14 letters fit an inch
        figure.legend(handles, labels, loc="outside upper left", ncols=max(1, min(entries, columns)))


def every(labels: Iterable[int], most: int) -> tuple[list[int], list[str]]:
    """Places and labels of at most about `most` ticks."""
    labels = list(labels)
    places = list(range(0, len(labels), math.ceil(len(labels) / most)))
    return places, [str(labels[place]) for place in places]


def shown_name(name: str) -> str:
    """A user's name for a legend: no formula where it has a dollar, and not hidden where it starts with `_`."""
    return (" " + name if name.startswith("_") else name).replace("$", r"\$")


# -- files ----------------------------------------------------------------------------------------------------------


@styled
def save_png(figure: Figure, path: Path) -> None:
    """On white, at 160 dots an inch."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, facecolor="white")


@styled
def as_svg(figure: Figure, name: str, description: str) -> str:
    """An `<svg>` for a page: ids begin with `name`; colours are the page's `--ink`, `--grid`, `--c0` ..., `--r0` ..."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = re.sub(r'\bid="', f'id="{name}-', text[text.index("<svg") :])
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    variables = {INK: "ink", GRID: "grid"}
    for letter, colours in (("c", COLOURS), ("r", RAMP)):
        variables |= {colour: f"{letter}{place}" for place, colour in enumerate(colours)}
    for colour, variable in variables.items():
        text = text.replace(colour, f"var(--{variable})")
    return text.replace("<svg ", f'<svg class="figure" role="img" aria-label="{escape(description)}" ', 1)
