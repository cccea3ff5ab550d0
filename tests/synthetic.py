"""Groups of a made-up policy, of which it is known whether its siblings help."""

from dataclasses import replace

import numpy as np

from bridge_rl.evaluation.samples import SampledGroup


def make_group(right, answers=None, condition="model", problem=0, group=0, lengths=None, logprobs=None):
    """A group from right and wrong; right rows answer `r` and each wrong one something of its own."""
    width = len(right)
    lengths = lengths or [4] * width
    return SampledGroup(
        condition=condition,
        width=width,
        problem=problem,
        group=group,
        completions=[f"text {row}" for row in range(width)],
        tokens=[[7] * length for length in lengths],
        answers=answers if answers is not None else ["r" if x else f"w{row}" for row, x in enumerate(right)],
        correct=[bool(x) for x in right],
        verdicts=["ok"] * width,
        finish_reasons=["stop"] * width,
        logprobs=logprobs or [-1.0] * width,
    )


def made_groups(rng, difficulty, condition, width, groups, copy=0.0):
    """Rows are right with their problem's `difficulty`; then a wrong row copies a right sibling with chance `copy`."""
    shape = (len(difficulty), groups, width)
    found = rng.random(shape) < difficulty[:, None, None]
    right = found | (found.any(axis=2, keepdims=True) & (rng.random(shape) < copy))
    wrong, lengths = rng.integers(0, 4, shape), rng.integers(5, 15, shape)
    return [
        make_group(
            right[p, g].tolist(),
            ["r" if x else f"w{w}" for x, w in zip(right[p, g], wrong[p, g], strict=True)],
            condition,
            p,
            g,
            lengths[p, g].tolist(),
        )
        for p in range(len(difficulty))
        for g in range(groups)
    ]


def policy(seed, copy, problems=200, width=4, groups=4, alone=16):
    """The model at width 1 (`alone` rows) and `width`, with all controls. Shuffled siblings are not worth copying."""
    rng = np.random.default_rng(seed)
    difficulty = rng.beta(1.5, 1.5, problems)
    return [
        *made_groups(rng, difficulty, "model", width, groups, copy),
        *made_groups(rng, difficulty, "model", 1, alone),
        *made_groups(rng, difficulty, "disabled", 1, alone),
        *made_groups(rng, difficulty, "shuffled", width, groups),
    ]


def renamed(groups, **changes):
    return [replace(group, **changes) for group in groups]
