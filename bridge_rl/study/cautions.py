"""What evaluations of an arm's cells warn of, and whether their majority votes say anything."""

import re
from collections.abc import Iterable

from bridge_rl.evaluation.analyse import CAUTION, MOST_UNMARKED, UNMARKED, unmarked_sentence
from bridge_rl.study.results import CellResult

MOST_OUTSIDE_VOTES = 0.5  # share of right rows without a marked answer above which votes are not shown
_SHARE = re.compile(r"(?P<percent>\d+)% ")
_SETTING = re.compile(r" \(condition \w+, width \d+\)(?=\.$)")  # the worst one, which differs between seeds


def arm_cautions(results: Iterable[CellResult]) -> list[str]:
    """One sentence a kind, of all seeds of an arm: `2 of 5 seeds: 25% to 40% of rows were cut ...`."""
    own = list(results)
    found: dict[str, list[int]] = {}  # words -> percent, of each seed
    for caution in (caution for result in own for caution in cell_cautions(result)):
        percent = _SHARE.match(caution)
        words = _SETTING.sub("", caution[percent.end() :] if percent else caution)
        found.setdefault(words, []).append(int(percent["percent"]) if percent else 0)
    sentences = [f"{len(of)} of {len(own)} seeds: {percents(of)}{words}" for words, of in found.items()]
    if not votes_count(own):
        sentences = [f"{text} Its votes are left out." if UNMARKED in text else text for text in sentences]
    return sentences


def percents(found: list[int]) -> str:
    """`25% to 40% `; nothing where a caution has no share."""
    low, high = min(found), max(found)
    return "" if high == 0 else f"{low}% " if low == high else f"{low}% to {high}% "


def cell_cautions(result: CellResult) -> list[str]:
    """As its evaluation put them; that right rows mark no answer also where it did not look at that yet."""
    said = [verdict.removeprefix(CAUTION) for verdict in result.verdicts if verdict.startswith(CAUTION)]
    share = unmarked_share(result)
    if share > MOST_UNMARKED and not any(UNMARKED in caution for caution in said):
        said.append(unmarked_sentence(share).removeprefix(CAUTION))
    return said


def votes_count(results: Iterable[CellResult]) -> bool:
    """Whether in every cell most right rows mark the answer that a vote counts."""
    return all(unmarked_share(result) <= MOST_OUTSIDE_VOTES for result in results)


def unmarked_share(result: CellResult) -> float:
    """Of right rows without a marked answer: as the evaluation says, else by votes of single rows.

    Such a vote is right where its row is right and marked. 0 where neither is there.
    """
    for verdict in result.verdicts:
        percent = _SHARE.match(verdict.removeprefix(CAUTION))
        if UNMARKED in verdict and percent:
            return int(percent["percent"]) / 100
    right, voted = result.find("pass@1", 1), result.find("maj", 1)
    return 0.0 if right is None or voted is None or right.value == 0 else 1 - voted.value / right.value
