"""The plot of `rollout.py`: useful tokens per second of each engine."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LABELS = {
    "ours_with_bridge": "bridge_rl, with Bridge",
    "ours_without_bridge": "bridge_rl, Bridge disabled",
    "hf_generate_dynamic": "generate, dynamic cache",
    "hf_generate_static": "generate, static cache",
    "generate_batch": "generate_batch",
    "generate_batch_half_rows": "generate_batch, half the rows",
    "trl": "TRL without vLLM",
}
TITLES = {"long_tailed": "long-tailed lengths", "equal": "equal lengths"}


def plot_rollout(scenarios: Mapping[str, Mapping[str, Mapping[str, Any]]], path: Path) -> None:
    """One panel a scenario, one bar an engine with its value; the whiskers of ours are its slowest and fastest run."""
    figure, axes = plt.subplots(1, len(scenarios), figsize=(12, 3.6), sharey=True)
    for axis, (name, engines) in zip(axes, scenarios.items(), strict=True):
        shown = [engine for engine in LABELS if engine in engines]
        speeds = [engines[engine]["useful_tokens_per_second"] for engine in shown]
        colors = ["tab:blue" if engine.startswith("ours") else "tab:gray" for engine in shown]
        drawn = axis.barh([LABELS[engine] for engine in shown], speeds, color=colors, xerr=whiskers(engines, shown))
        axis.bar_label(drawn, fmt="%.0f", padding=6, fontsize=9)
        axis.set_xlim(right=1.15 * max(speeds))
        axis.set_xlabel("useful tokens per second")
        axis.set_title(TITLES.get(name, name), fontsize=10)
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
    axes[0].invert_yaxis()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def whiskers(engines: Mapping[str, Mapping[str, Any]], shown: list[str]) -> list[list[float]]:
    """How far below and above its speed each engine's runs were."""
    below, above = [], []
    for engine in shown:
        run = engines[engine]
        fastest, slowest = run["seconds_range"]
        below.append(run["useful_tokens_per_second"] - run["useful_tokens"] / slowest)
        above.append(run["useful_tokens"] / fastest - run["useful_tokens_per_second"])
    return [below, above]
