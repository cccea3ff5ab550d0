"""Scores of one document of recipes/lm_eval/two_tries.yaml from all its rows."""

from typing import Any

from bridge_rl.tiny import is_correct


def process_results(doc: dict[str, Any], results: list[list[str]]) -> dict[str, float]:
    """Mean over the rows (pass@1), whether all are right, and whether any is. `results`: one list, of all rows."""
    [rows] = results
    right = [is_correct(doc["problem"], row) for row in rows]
    return {"accuracy": sum(right) / len(right), "all_right": float(all(right)), "any_right": float(any(right))}
