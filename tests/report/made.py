"""A whole evaluation directory as `bridge-rl eval` leaves it, and a training run, made up: no model is sampled."""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

from bridge_rl.evaluation.results import (
    Aggregated,
    Comparison,
    Counterfactual,
    Estimate,
    LengthPoint,
    Probes,
    Results,
    Summary,
    write_results,
)
from bridge_rl.evaluation.samples import SampledGroup, SampleStore

EOS = 0
HOSTILE = '</script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 1">'
WORDS = [
    *("<eos>", "So", " the", " sum", " of", " two", " numbers", " is", " 12", "+", "35", "=", "47", ";", "\n", " try"),
    *(" 27", "22", ":", " therefore", " \\boxed{", "49", "}", " hit", " miss", "!", " we", " get", "  ", "é", " 猫"),
    *(HOSTILE, "&amp;", "\t"),
]
BASE = {"model": 0.43, "shuffled": 0.37, "disabled": 0.36}
TAUS = (0.25, 0.5, 0.75, 1.0)


def estimate(value: float, half: float = 0.03) -> Estimate:
    return Estimate(value, max(0.0, value - half), min(1.0, value + half))


def summary(condition: str, width: int, problems: int) -> Summary:
    gain = 0.05 * math.log2(width) if condition == "model" else 0.0
    right = BASE[condition] + gain
    metrics = {
        "pass@1": estimate(right),
        "maj": estimate(min(1.0, right + 0.02 * math.log2(width))),
        "all": estimate(right ** (1 + 0.5 * math.log2(width))),
        "any": estimate(1 - (1 - right) ** (1 + 0.6 * math.log2(width))),
        "best": estimate(right + 0.01),
        **({"mg-pass": estimate(0.7 * right)} if width > 1 else {}),
        **{f"g-pass_{tau}": estimate(right * (1 - tau) + tau * right**2) for tau in TAUS},
        **{f"mixed/g-pass_{tau}": estimate(right ** (1 + tau)) for tau in TAUS if width < 8},
        "distinct": Estimate(1 + 0.4 * (width - 1), 1.0, 1 + 0.5 * (width - 1)),
        "length": Estimate(231.4, 220.1, 243.9),
        "truncated": estimate(0.04, 0.01),
        "unparsed": estimate(0.02, 0.01),
    }
    return Summary(condition, width, problems, max(1, 8 // width), metrics)  # type: ignore[arg-type]


def counterfactuals() -> list[Counterfactual]:
    return [
        Counterfactual("own", 120, estimate(0.05), estimate(0.01), Estimate(0.0, -0.02, 0.02)),
        Counterfactual(
            "right",
            120,
            estimate(0.41),
            estimate(0.33),
            Estimate(-0.12, -0.14, -0.1),
            Estimate(0.27, 0.2, 0.34),
            Estimate(0.31, 0.24, 0.38),
        ),
        Counterfactual("wrong", 120, estimate(0.22), estimate(0.06), Estimate(-0.05, -0.07, -0.03)),
        Counterfactual("other_prompt", 120, estimate(0.19), estimate(0.02), Estimate(-0.21, -0.23, -0.19)),
    ]


def length_point(width: int, limit: int) -> LengthPoint:
    right = 0.4 * (1 - math.exp(-limit / 90)) + 0.005 * width
    return LengthPoint("model", width, limit, estimate(right), math.exp(-limit / 150))


def make_results(widths: Sequence[int] = (1, 2, 4, 8), model: str = "runs/demo_$x_1", problems: int = 60) -> Results:
    """Every section filled: a model whose siblings help."""
    summaries = [summary("model", width, problems) for width in widths]
    summaries += [summary(name, width, problems) for name in ("shuffled", "disabled") for width in widths if width > 1]
    top = max(widths)
    best = f"model, width {top}"
    return Results(
        meta={
            "model": model,
            "suite": "math & <b>more</b>",
            "reward": "rewards/answer.py:correct",
            "prompt": "{problem}",
            "temperature": 1.0,
            "top_p": 1.0,
            "max_new_tokens": 512,
            "seed": 0,
            "samples": 8,
            "trained_width": 4,
            "trained_length": 256,
            "command": "bridge-rl eval --model runs/demo_$x_1 --suite math --controls",
            "commit": "0123abc",
            "hardware": "CPU, 2 threads, x86_64",
            "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        },
        summaries=summaries,
        comparisons=[
            Comparison("siblings", "pass@1", best, f"shuffled, width {top}", estimate(0.18), 0.0002, 60),
            Comparison("width", "pass@1", best, "model, width 1", estimate(0.15), 0.0004, 60),
            Comparison("disabled", "any", best, f"disabled, width {top}", Estimate(-0.06, -0.13, 0.01), 0.09, 60),
        ],
        verdicts=[
            "At width 2 no difference between rows together and alone was found: pass@1 .480 against .430 at width 1 "
            "(difference .050, 95 % interval -.010 to .110, p .12). Where no difference was found, one as large as the "
            "interval's ends is still possible.",
            f"At width {top} siblings help: pass@1 .580 against .370 with shuffled siblings (difference .210, 95 % "
            "interval .180 to .240, p .0006), .430 at width 1 (difference .150, 95 % interval .120 to .180, p .0008).",
            f"At width {top} coverage fell while pass@1 rose: some row is right in .700 of groups, against .760 of "
            f"{top} independent rows at width 1 (difference -.060, 95 % interval -.100 to -.020, p .01). Whoever picks "
            "the best of a group with a verifier loses by that.",
            f"At width {top} the majority vote is better than that of independent rows at equal cost: .640 against "
            ".520, difference .120, 95 % interval .060 to .180, p .0018.",
            "p values are corrected (Holm) for 3 comparisons of pass@1; intervals are not.",
        ],
        aggregated=[
            Aggregated(method, condition, width, 8, 1851.2, estimate(accuracy))  # type: ignore[arg-type]
            for method, condition, width, accuracy in [
                ("majority vote", "model", 8, 0.63),
                ("majority vote", "model", 1, 0.52),
                ("majority vote", "disabled", 8, 0.5),
                ("best of n by log-prob", "model", 8, 0.6),
            ]
        ],
        lengths=[length_point(width, limit) for width in (1, top) for limit in (64, 128, 256, 384, 512)],
        probes=Probes(
            width=top,
            groups=32,
            layers=list(range(0, 12)),
            norm_ratio=[0.02 + 0.01 * layer for layer in range(12)],
            sibling_share=[[(layer * 7 + head * 3) % 11 / 14 for head in range(8)] for layer in range(12)],
            share_by_step=[[0.1 + 0.05 * step + 0.02 * layer for step in range(10)] for layer in range(12)],
            counterfactuals=counterfactuals(),
        ),
    )


def make_group(rng: random.Random, condition: str, width: int, problem: int, group: int, steps: int) -> SampledGroup:
    """Rows of differing lengths; about a tenth are cut at `steps`, some have no answer."""
    tokens, answers, correct, verdicts, reasons = [], [], [], [], []
    for _ in range(width):
        length = steps if rng.random() < 0.1 else rng.randint(steps // 3, steps - 1)
        ends = length < steps
        row = [rng.randrange(1, len(WORDS)) for _ in range(length - ends)] + [EOS] * ends
        right = rng.random() < BASE[condition]
        unparsed = not right and rng.random() < 0.1
        tokens.append(row)
        answers.append(None if unparsed else str(40 + problem) if right else str(rng.randint(1, 30)))
        correct.append(right)
        verdicts.append("unparsed" if unparsed else "ok")
        reasons.append("stop" if ends else "length")
    completions = ["".join(WORDS[token] for token in row if token != EOS) for row in tokens]
    return SampledGroup(
        condition,
        width,
        problem,
        group,
        completions,
        tokens,
        answers,
        correct,
        verdicts,
        reasons,
        [-0.4 * len(row) for row in tokens],
    )  # type: ignore[arg-type]


def make_samples(results: Results, problems: int = 20, steps: int = 48, seed: int = 0) -> list[SampledGroup]:
    rng = random.Random(seed)
    return [
        make_group(rng, summary.condition, summary.width, problem, group, steps)
        for summary in results.summaries
        for problem in range(problems)
        for group in range(summary.groups_per_problem)
    ]


def make_evaluation(
    directory: Path,
    widths: Sequence[int] = (1, 2, 4, 8),
    problems: int = 20,
    steps: int = 48,
    seed: int = 0,
    model: str = "runs/demo_$x_1",
) -> Path:
    """Write one to `directory` and return that."""
    results = make_results(widths, model, problems)
    write_results(results, directory / "results.json")
    SampleStore(directory / "samples").append(make_samples(results, problems, steps, seed))
    lines = [
        {
            "problem": number,
            "text": f"Which two of 12, 35, {27 + number} and 22 sum to {40 + number}? If a < b && b > c {HOSTILE}",
            "answer": str(40 + number),
            "prompt": f"12,35,{27 + number},22:{40 + number}=",
        }
        for number in range(problems)
    ]
    (directory / "problems.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (directory / "pieces.json").write_text(json.dumps({str(number): piece for number, piece in enumerate(WORDS)}))
    return directory


def make_run(directory: Path, steps: int = 200) -> Path:
    """A run's `history.jsonl`, as TRL logs it, with ours."""
    rng = random.Random(1)
    history = []
    for step in range(5, steps + 1, 5):
        risen = 1 - math.exp(-step / 80)
        history.append(
            {
                "step": step,
                "loss": rng.gauss(0, 0.01),
                "reward": 0.19 + 0.3 * risen + rng.gauss(0, 0.02),
                "grad_norm": 0.4 + rng.random() / 5,
                "entropy": 0.9 - 0.5 * risen,
                "completions/mean_length": 30 + 2 * rng.random(),
                "group/all_right": 0.02 + 0.2 * risen,
                "group/any_right": 0.6 + 0.1 * risen,
                "rollout/truncated": 0.05,
                "rollout/recompute_kl": 1e-6 * rng.random(),
                "time": "not a number",
            }
        )
        if step % 50 == 0:
            history.append({"step": step, **{f"eval_pass@1/w{w}": 0.2 + 0.3 * risen + 0.02 * w for w in (1, 2, 4, 8)}})
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "history.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in history))
    return directory
