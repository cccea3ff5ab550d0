"""What fails on one rank fails on all, so that none waits for another and all can save."""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.utils import gather_object

from bridge_rl.errors import UserError


class RankFailed(UserError):  # noqa: N818
    """Raised on all ranks at once when a reward or a rollout has failed on one, so that they can save together."""


@contextmanager
def together() -> Iterator[None]:
    """What fails for the user inside on one rank raises RankFailed on all, once each has come to the end of it."""
    problem = None
    try:
        yield
    except UserError as error:
        problem = str(error)
    found = [text for text in gather_object([problem]) if text is not None]
    if found:
        raise RankFailed(found[0])


def check_same_on_all(digest: str, problem: str) -> None:
    """Raise UserError with the sentence `problem` on all ranks unless all have the same `digest`."""
    if len(set(gather_object([digest]))) > 1:
        raise UserError(problem)
