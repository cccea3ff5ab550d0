"""A reward that has a signal from the first step, whatever the model says."""


def even(completion_ids: list[list[int]], **kwargs: object) -> list[float]:
    """1 for a completion whose ids sum to an even number."""
    return [float(sum(ids) % 2 == 0) for ids in completion_ids]
