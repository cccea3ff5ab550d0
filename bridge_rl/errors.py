"""How a command ends otherwise than well: a user's mistake, or an end before its time with everything saved."""

STOPPED_CODE = 85  # Linux's ERESTART: nothing failed, start the same command again


class UserError(ValueError):
    """What is wrong, where (file and key), what to do, in one sentence. The command line prints it and exits with 2."""


class Stopped(Exception):  # noqa: N818
    """Why a run ended before its last step, and where it is saved. The command line exits with STOPPED_CODE."""


def first_line(error: BaseException) -> str:
    """What another library says was wrong, for a sentence of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
