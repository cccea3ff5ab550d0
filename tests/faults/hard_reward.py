"""A reward without a signal on about half of the problems, whatever the model says."""


def hard(prompts: list[str], completion_ids: list[list[int]], **kwargs: object) -> list[float]:
    """0 where the characters of the prompt sum to an odd number; else 1 for ids that sum to an even one."""
    hopeless = [sum(map(ord, str(prompt))) % 2 == 1 for prompt in prompts]
    return [0.0 if lost else float(sum(ids) % 2 == 0) for lost, ids in zip(hopeless, completion_ids, strict=True)]
