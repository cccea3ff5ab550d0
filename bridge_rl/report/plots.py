"""Plots for a terminal's user and a README: PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bridge_rl.evaluation.run import WidthReport

TITLES = {"pass@1": "pass@1", "all": "all rows of a group right", "any": "any row of a group right (coverage)"}


def plot_widths(arms: Mapping[str, Sequence[WidthReport]], path: Path) -> None:
    """One panel a metric, one line an arm, over the width at which it was sampled; bars are 95 % intervals."""
    figure, axes = plt.subplots(1, len(TITLES), figsize=(12, 3.6))
    for axis, (metric, title) in zip(axes, TITLES.items(), strict=True):
        for name, reports in arms.items():
            widths = [report.width for report in reports]
            values = [report.metrics[metric].value for report in reports]
            errors = [1.96 * report.metrics[metric].standard_error for report in reports]
            axis.errorbar(widths, values, yerr=errors, marker="o", capsize=3, label=name)
        axis.set_xscale("log", base=2)
        axis.set_xticks(widths, [str(width) for width in widths])
        axis.set_xlabel("width sampled")
        axis.set_title(title, fontsize=10)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
