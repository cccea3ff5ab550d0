"""Which sampled groups a page shows side by side, and the data it holds for that."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bridge_rl.errors import UserError
from bridge_rl.evaluation.aggregate import by_setting
from bridge_rl.evaluation.results import Summary
from bridge_rl.evaluation.samples import SampledGroup
from bridge_rl.report.labels import CONDITIONS

GROUPS_SHOWN = 40  # a condition and width
TOKENS_SHOWN = 1_000_000  # in all: a page of about 8 MB, which a browser opens in a second or two
MIXED_SHARE = 0.75  # of those shown, where there are enough: groups with right and with wrong rows tell most


def is_mixed(group: SampledGroup) -> bool:
    return any(group.correct) and not all(group.correct)


def regrouped(summaries: Sequence[Summary], groups: Sequence[SampledGroup]) -> list[str]:
    """Conditions whose rows were sampled one by one and then put into groups of every width."""
    found = []
    for condition in CONDITIONS:
        sampled = {group.width for group in groups if group.condition == condition}
        if sampled == {1} and any(s.condition == condition and s.width > 1 for s in summaries):
            found.append(condition)
    return found


def counted(groups: Sequence[SampledGroup], summaries: Sequence[Summary]) -> list[SampledGroup]:
    """Those that results with these summaries are of.

    More are there where a call for more samples or widths was cut off, of which the short ones are written first, and
    where a later call asked for fewer.
    """
    alone, numbers = regrouped(summaries, groups), Counter[tuple[str, int]]()
    for summary in summaries:
        single = summary.condition in alone
        key = (summary.condition, 1 if single else summary.width)
        numbers[key] = max(numbers[key], summary.groups_per_problem * (summary.width if single else 1))
    return [group for group in groups if group.group < numbers[group.condition, group.width]]


def hears(groups: Sequence[SampledGroup]) -> bool:
    """Whether rows of the model were sampled in groups, in which they hear each other."""
    return any(group.condition == "model" and group.width > 1 for group in groups)


def choose_groups(
    groups: Sequence[SampledGroup], most: int = GROUPS_SHOWN, most_tokens: int = TOKENS_SHOWN
) -> list[SampledGroup]:
    """At most `most` of each condition and width, fewer where their tokens would pass an even share of `most_tokens`.

    They are spread evenly over the problems; up to three quarters are mixed ones, if there are so many.
    """
    settings = by_setting(groups)
    chosen = []
    for own in settings.values():
        candidates = sorted(own, key=lambda group: (group.problem, group.group))
        tokens = sum(len(row) for group in candidates for row in group.tokens) / len(candidates)
        fit = int(most_tokens / len(settings) / max(tokens, 1))
        chosen += choose_mixed(candidates, max(1, min(most, fit)))
    return chosen


def choose_mixed(candidates: Sequence[SampledGroup], count: int) -> list[SampledGroup]:
    """`count` of them in their order, mixed ones preferred."""
    mixed = [group for group in candidates if is_mixed(group)]
    others = [group for group in candidates if not is_mixed(group)]
    num_mixed = min(len(mixed), max(round(MIXED_SHARE * count), count - len(others)))
    chosen = evenly(mixed, num_mixed) + evenly(others, count - num_mixed)
    return sorted(chosen, key=lambda group: (group.problem, group.group))


def evenly(items: Sequence[SampledGroup], count: int) -> list[SampledGroup]:
    """`count` of them at even distances; all where there are fewer."""
    count = min(count, len(items))
    return [items[place * len(items) // count] for place in range(count)]


def viewer_data(
    chosen: Sequence[SampledGroup],
    problems: Mapping[int, Mapping[str, Any]],
    pieces: Mapping[str, str],
    start_width: int | None = None,
) -> dict[str, Any]:
    """What the page's script reads. Tokens are places in `pieces`, of which only those are kept that occur.

    start_width: of the group that is shown first, the largest where there is none of it. Raises UserError where a
    problem or the text of a token is missing.
    """
    check_known(chosen, problems, pieces)
    ids = sorted({token for group in chosen for row in group.tokens for token in row})
    widths = {group.width for group in chosen}
    place = {token: number for number, token in enumerate(ids)}
    return {
        "conditions": CONDITIONS,
        "startWidth": start_width if start_width in widths else max(widths),
        "pieces": [pieces[str(token)] for token in ids],
        "problems": {str(number): problems[number] for number in sorted({group.problem for group in chosen})},
        "groups": [
            {
                "condition": group.condition,
                "width": group.width,
                "problem": group.problem,
                "group": group.group,
                "mixed": is_mixed(group),
                "rows": [
                    {
                        "text": group.completions[row],
                        "tokens": [place[token] for token in group.tokens[row]],
                        "correct": group.correct[row],
                        "answer": group.answers[row],
                        "verdict": group.verdicts[row],
                        "finish": group.finish_reasons[row],
                        "logprob": group.logprobs[row],
                    }
                    for row in range(group.width)
                ],
            }
            for group in chosen
        ],
    }


def check_known(
    chosen: Sequence[SampledGroup], problems: Mapping[int, Mapping[str, Any]], pieces: Mapping[str, str]
) -> None:
    """Raise UserError where the files beside the samples lack something that these need."""
    for group in chosen:
        if group.problem not in problems:
            raise UserError(f"problems.jsonl has no problem {group.problem} of the samples: evaluate again.")
        for token in {token for row in group.tokens for token in row}:
            if str(token) not in pieces:
                raise UserError(f"pieces.json has no text for token {token} of the samples: evaluate again.")


def read_problems(path: Path) -> dict[int, dict[str, Any]]:
    """The lines of `problems.jsonl` by number. Raises UserError where there is none, or another kind of file."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
        return {line["problem"]: {key: str(line[key]) for key in ("text", "answer", "prompt")} for line in lines}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}): evaluate again to write it.") from error


def read_pieces(path: Path) -> dict[str, str]:
    """Text of each token id in `pieces.json`. Raises UserError where there is none."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}): evaluate again to write it.") from error
