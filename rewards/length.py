"""The soft overlong punishment of DAPO (arXiv 2503.14476, eq. 13)."""

from typing import Any

from trl.rewards import get_soft_overlong_punishment


def soft_overlong(
    completion_ids: list[list[int]], *, max_completion_len: int, soft_punish_cache: int, **kwargs: Any
) -> list[float]:
    """0 up to `max_completion_len - soft_punish_cache` tokens, then falling linearly to -1 at `max_completion_len`.

    Raises ValueError unless 0 <= soft_punish_cache <= max_completion_len.
    """
    if not 0 <= soft_punish_cache <= max_completion_len:
        raise ValueError(
            f"soft_punish_cache is {soft_punish_cache}: it must lie between 0 and max_completion_len "
            f"({max_completion_len})."
        )
    return get_soft_overlong_punishment(max_completion_len, soft_punish_cache)(completion_ids)
