"""Sample problems at several widths, score every completion, and aggregate by group."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bridge_rl.config import EvaluationSection
from bridge_rl.data import prompt_tokens
from bridge_rl.evaluation.metrics import RIGHT, Estimate, set_metrics
from bridge_rl.group import groups_of, repeat_for_rows
from bridge_rl.rollout import Group, RolloutOptions, SamplingParams, generate_groups
from bridge_rl.rollout.sampling import stream_seed

PROBLEMS_PER_CALL = 16


@dataclass(frozen=True)
class SampledGroup:
    """One group of one problem at one width, scored."""

    width: int
    problem: int
    group: int
    completions: list[str]
    correct: list[bool]
    finish_reasons: list[str]


@dataclass(frozen=True)
class WidthReport:
    """Metrics of one width over all problems."""

    width: int
    problems: int
    groups_per_problem: int
    metrics: dict[str, Estimate] = field(default_factory=dict)


@dataclass(frozen=True)
class ScoredGroup:
    """A sampled group with its prompt, texts and verdicts."""

    prompt_ids: list[int]
    group: Group
    completions: list[str]
    correct: list[bool]


def sample_and_score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    reward: Callable[..., list[float]],
    width: int,
    params: SamplingParams,
    indices: Sequence[int],
    max_rows: int | None,
) -> list[ScoredGroup]:
    """One group for each of `rows` (with `prompt`, `problem`, `answer`); right is a reward above RIGHT."""
    prompts = prompt_tokens(tokenizer, [row["prompt"] for row in rows]) if rows else []
    groups = generate_groups(model, prompts, width, params, indices, options=RolloutOptions(max_rows=max_rows))
    if not rows:
        return []
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for group in groups for tokens in group.tokens]
    columns = {key: repeat_for_rows([row[key] for row in rows], width) for key in rows[0]}
    scores = reward(completions=texts, **columns)
    correct = [score is not None and score > RIGHT for score in scores]
    made = zip(prompts, groups, groups_of(texts, width), groups_of(correct, width), strict=True)
    return [ScoredGroup(list(prompt), *rest) for prompt, *rest in made]


def sample_groups(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    reward: Callable[..., list[float]],
    section: EvaluationSection,
    max_new_tokens: int,
    seed: int,
    rank: int = 0,
    num_ranks: int = 1,
    progress: Callable[[int], object] = lambda done: None,
) -> Iterator[SampledGroup]:
    """Every problem in `rows` (with `prompt`, `problem`, `answer`) at every width; this rank's share of them.

    A group's seed index comes from its problem and number, so results do not depend on the number of ranks.
    `progress` is told of completions sampled.
    """
    params = SamplingParams(
        max_new_tokens=section.max_new_tokens or max_new_tokens,
        temperature=section.temperature,
        top_p=section.top_p,
        seed=stream_seed(seed, "evaluation"),
        eos_token_id=eos_ids(model, tokenizer),
    )
    mine = list(range(rank, len(rows), num_ranks))
    largest_share = len(range(0, len(rows), num_ranks))  # ranks that hold shards of a model must call equally often
    for width in section.widths:
        per_problem = groups_per_problem(section, width)
        for start in range(0, largest_share, PROBLEMS_PER_CALL):
            problems = repeat_for_rows(mine[start : start + PROBLEMS_PER_CALL], per_problem)
            numbers = [place % per_problem for place in range(len(problems))]
            scored = sample_and_score(
                model,
                tokenizer,
                [rows[p] for p in problems],
                reward,
                width,
                params,
                [p * per_problem + n for p, n in zip(problems, numbers, strict=True)],
                section.max_rows,
            )
            for problem, number, made in zip(problems, numbers, scored, strict=True):
                yield SampledGroup(width, problem, number, made.completions, made.correct, made.group.finish_reasons)
            progress(len(scored) * width)


def groups_per_problem(section: EvaluationSection, width: int) -> int:
    """How many groups of `width` give each problem its samples."""
    return max(1, section.samples // width)


def num_completions(section: EvaluationSection, num_problems: int) -> int:
    """Completions that an evaluation of `num_problems` samples in all."""
    return num_problems * sum(width * groups_per_problem(section, width) for width in section.widths)


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a completion: the tokenizer's, and those the model declares (as TRL's trainer does)."""
    declared = model.generation_config.eos_token_id
    declared = [] if declared is None else [declared] if isinstance(declared, int) else list(declared)
    return sorted({tokenizer.eos_token_id, *declared})


def aggregate(groups: Sequence[SampledGroup]) -> list[WidthReport]:
    """One report a width."""
    reports = []
    for width in sorted({group.width for group in groups}):
        by_problem: dict[int, list[list[bool]]] = {}
        for group in groups:
            if group.width == width:
                by_problem.setdefault(group.problem, []).append(group.correct)
        correct = [by_problem[problem] for problem in sorted(by_problem)]
        reports.append(WidthReport(width, len(correct), len(correct[0]), set_metrics(correct)))
    return reports


def write_results(directory: Path, groups: Sequence[SampledGroup], reports: Sequence[WidthReport], meta: dict) -> None:
    """`samples.jsonl`, one group a line, and `results.json`, metrics by width beside how they were made."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "samples.jsonl").open("w") as file:
        for group in groups:
            file.write(json.dumps(asdict(group)) + "\n")
    content = {**meta, "widths": [asdict(report) for report in reports]}
    (directory / "results.json").write_text(json.dumps(content, indent=2) + "\n")


def as_table(reports: Sequence[WidthReport]) -> str:
    """A plain-text table with standard errors."""
    metrics = list(reports[0].metrics)
    lines = ["width  " + "".join(f"{name:>17}" for name in metrics)]
    for report in reports:
        cells = [f"{e.value:.3f} +- {e.standard_error:.3f}" for e in report.metrics.values()]
        lines.append(f"{report.width:>5}  " + "".join(f"{cell:>17}" for cell in cells))
    return "\n".join(lines)
