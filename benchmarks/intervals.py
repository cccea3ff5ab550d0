"""How often 95 % intervals hold the truth: simulated evaluations of a made-up policy whose truth is known.

`python benchmarks/intervals.py` writes `benchmarks/results/intervals.json`. Difficulties of problems have a beta
distribution, groups have 4 rows, and a wrong row copies a right sibling with chance 0.3, so that rows depend on each
other. Each cell is one metric at one rate (the true pass@1), spread of difficulty and number of problems. Lengths are
lognormal; gains are differences to the same problems without copying, or (no gain) sampled anew with it. Rare changes
are differences of which most are 0: of one group a problem, or one row with other siblings. The plain percentile
bootstrap stands beside.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

from bridge_rl.evaluation.intervals import RESAMPLES, estimates, paired_estimates
from bridge_rl.evaluation.results import Estimate
from bridge_rl.report.results import provenance

RESULT = Path(__file__).parent / "results" / "intervals.json"
WIDTH, COPY = 4, 0.3
PROBLEMS, RATES = (30, 100, 500), (0.1, 0.3, 0.5, 0.7, 0.9)
# a + b of the beta distribution, and the groups of a problem. `alike`: all problems are about equally hard, as no suite
# is; `wide`: most are either easy or hard.
SPREADS = {"alike": (200.0, 4), "moderate": (4.0, 4), "wide": (1.0, 8)}
# Problems, and the chance that one of them changes for the better and for the worse.
RARE_CHANGES = (
    (30, 0.06, 0.06),
    (60, 0.03, 0.03),
    (100, 0.02, 0.02),
    (100, 0.1, 0.02),
    (200, 0.01, 0.01),
    (500, 0.005, 0.005),
)
ENOUGH = (0.05, 0.95)  # true rates at which 30 problems tell more than that something is rare
Array = NDArray[np.float64]


def expected(difficulty: Array, copy: float) -> dict[str, Array]:
    """Each metric of one group, given a problem's difficulty, by summing over how many rows are right on their own."""
    alone = np.arange(WIDTH + 1)
    d = difficulty[:, None]
    chance = special.comb(WIDTH, alone) * d**alone * (1 - d) ** (WIDTH - alone)  # [problems, WIDTH + 1]
    share = (alone + (WIDTH - alone) * copy * (alone > 0)) / WIDTH
    everyone = np.where(alone > 0, copy ** (WIDTH - alone), 0.0)
    return {"pass@1": chance @ share, "any": chance @ (alone > 0.0), "all": chance @ everyone}


def truth(mean: float, concentration: float, copy: float) -> dict[str, float]:
    """Mean over problems, by the quantiles of their difficulty."""
    places = (np.arange(100_000) + 0.5) / 100_000
    difficulty = stats.beta.ppf(places, mean * concentration, (1 - mean) * concentration)
    return {name: float(values.mean()) for name, values in expected(difficulty, copy).items()}


def mean_for(rate: float, concentration: float) -> float:
    """The mean difficulty at which pass@1 is `rate`."""
    return optimize.brentq(lambda mean: truth(mean, concentration, COPY)["pass@1"] - rate, 0.001, 0.999, xtol=1e-4)


def draw(rng: np.random.Generator, difficulty: Array, groups: int, copy: float) -> dict[str, Array]:
    """Problem means [problems, simulations] of each metric, for difficulties of that shape."""
    right = rng.binomial(WIDTH, difficulty[..., None], (*difficulty.shape, groups))
    right += np.where(right > 0, rng.binomial(WIDTH - right, copy), 0)
    return {
        "pass@1": right.mean(axis=-1) / WIDTH,
        "any": (right > 0).mean(axis=-1),
        "all": (right == WIDTH).mean(axis=-1),
    }


def covered(means: Array, true: float, found: list[Estimate]) -> dict[str, float]:
    """Share of simulations whose interval holds the truth, where it misses, and the mean width."""
    # A metric without bounds that never varied has no interval: that counts as missing.
    low = np.array([np.nan if e.low is None else e.low for e in found])
    high = np.array([np.nan if e.high is None else e.high for e in found])
    return {
        "coverage": float(np.mean((low <= true) & (true <= high))),
        "below": float(np.mean(high < true)),
        "above": float(np.mean(low > true)),
        "width": float(np.mean(high - low)),
        "percentile_coverage": percentile_coverage(means, true),
    }


def percentile_coverage(means: Array, true: float) -> float:
    """Of the plain percentile bootstrap over problems."""
    problems = len(means)
    counts = np.random.default_rng(0).multinomial(problems, np.full(problems, 1 / problems), RESAMPLES)
    low, high = np.quantile(counts @ means / problems, [0.025, 0.975], axis=0)
    return float(np.mean((low <= true) & (true <= high)))


def cells_of(problems: int, rate: float, spread: str, simulations: int) -> list[dict[str, Any]]:
    """Every metric at one setting."""
    concentration, groups = SPREADS[spread]
    mean = mean_for(rate, concentration)
    rng = np.random.default_rng([problems, int(100 * rate), groups])
    difficulty = rng.beta(mean * concentration, (1 - mean) * concentration, (problems, simulations))
    with_copy, again, without = (draw(rng, difficulty, groups, copy) for copy in (COPY, COPY, 0.0))
    true, true_without = truth(mean, concentration, COPY), truth(mean, concentration, 0.0)
    gain = true["pass@1"] - true_without["pass@1"]
    gains = {
        "gain in pass@1": (with_copy["pass@1"] - without["pass@1"], gain),
        "no gain in pass@1": (with_copy["pass@1"] - again["pass@1"], 0.0),
    }
    setting = {"problems": problems, "rate": rate, "spread": spread}
    return [
        *(level_cell({**setting, "metric": name}, with_copy[name], true[name], (0.0, 1.0)) for name in with_copy),
        *(paired_cell({**setting, "metric": name}, *values) for name, values in gains.items()),
    ]


def level_cell(setting: dict[str, Any], means: Array, true: float, limits: tuple[float, float]) -> dict[str, Any]:
    return {**setting, "true": true, **covered(means, true, estimates(means, [limits] * means.shape[1]))}


def paired_cell(setting: dict[str, Any], differences: Array, true: float) -> dict[str, Any]:
    found = paired_estimates(differences, [2.0] * differences.shape[1])
    return {**setting, "true": true, **covered(differences, true, found)}


def rare_change_cell(problems: int, better: float, worse: float, simulations: int) -> dict[str, Any]:
    """Differences of 1, -1 or, mostly, 0."""
    draws = np.random.default_rng(problems).random((problems, simulations))
    differences = np.where(draws < better, 1.0, np.where(draws > 1 - worse, -1.0, 0.0))
    setting = {"problems": problems, "metric": "rare change", "better": better, "worse": worse}
    return paired_cell(setting, differences, better - worse)


def length_cell(problems: int, simulations: int) -> dict[str, Any]:
    """Mean tokens, lognormal over problems (sigma 0.6)."""
    means = np.random.default_rng(problems).lognormal(5.0, 0.6, (problems, simulations))
    return level_cell({"problems": problems, "metric": "length"}, means, math.exp(5.0 + 0.6**2 / 2), (0.0, math.inf))


def worst(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Least, mean and greatest coverage, by number of problems."""
    table: dict[str, Any] = {}
    for problems in sorted({cell["problems"] for cell in cells}):
        values = [cell["coverage"] for cell in cells if cell["problems"] == problems]
        plain = [cell["percentile_coverage"] for cell in cells if cell["problems"] == problems]
        table[str(problems)] = {
            "cells": len(values),
            "least": min(values),
            "mean": float(np.mean(values)),
            "greatest": max(values),
            "outside_93_to_97": [c for c in cells if c["problems"] == problems and not 0.93 <= c["coverage"] <= 0.97],
            "plain_percentile": {"least": min(plain), "mean": float(np.mean(plain)), "greatest": max(plain)},
        }
    return table


def is_rare(cell: dict[str, Any]) -> bool:
    return cell["metric"] in ("pass@1", "any", "all") and not ENOUGH[0] <= cell["true"] <= ENOUGH[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--simulations", type=int, default=2000, help="of each cell; 2000 give a standard error of .005"
    )
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    cells = [
        cell
        for problems in PROBLEMS
        for spread in SPREADS
        for rate in RATES
        for cell in cells_of(problems, rate, spread, options.simulations)
    ]
    rare_changes = [rare_change_cell(*setting, options.simulations) for setting in RARE_CHANGES]
    lengths = [length_cell(problems, options.simulations) for problems in PROBLEMS]
    report = {
        **provenance(),
        "simulations": options.simulations,
        "resamples": RESAMPLES,
        "moderate_and_wide": worst([cell for cell in cells if not is_rare(cell) and cell["spread"] != "alike"]),
        "alike": worst([cell for cell in cells if not is_rare(cell) and cell["spread"] == "alike"]),
        "rarer_than_.05_or_.95": worst([cell for cell in cells if is_rare(cell)]),
        "rare_change": rare_changes,
        "length": lengths,
        "cells": cells,
    }
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps({key: report[key] for key in list(report)[-6:-1]}, indent=2))


if __name__ == "__main__":
    main()
