"""How a command ends otherwise than well: a user's mistake, the machine's, or an end before its time, all saved."""

import errno
from collections.abc import Mapping, Set, Sized
from numbers import Integral

STOPPED_CODE = 85  # Linux's ERESTART: nothing failed, start the same command again
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR)
# How writers that are not Python's own tell of a write that failed: torch, safetensors.
FAILED_WRITE = ("PytorchStreamWriter", "inline_container", "os error 28", "os error 27", "os error 122")


class UserError(ValueError):
    """What is wrong, where (file and key), what to do, in one sentence. The command line prints it and exits with 2."""


class Stopped(Exception):  # noqa: N818
    """Why a run ended before its last step, and where it is saved. The command line exits with STOPPED_CODE."""


def first_line(error: BaseException) -> str:
    """What another library says was wrong, for a sentence of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def is_failed_write(error: BaseException | None) -> bool:
    """Whether the disk, a quota or a limit on file size refused a write, whoever did the writing."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        if any(sign in str(error) for sign in FAILED_WRITE):
            return True
        error = error.__cause__ or error.__context__
    return False


def fault_of_disk(error: Exception) -> str | None:
    """A sentence for a full disk, or a place that may not be read or written; None for other errors."""
    what = " ".join(str(error).split())
    if is_failed_write(error):
        return f"a write failed ({what}): make room and start the same command again, it goes on from what is saved."
    if isinstance(error, OSError) and error.errno in CLOSED and error.filename is not None:
        return f"{error.filename} cannot be read or written ({what}): change its permissions, or name another."
    return None


def check_kind(name: str, value: object, kind: type) -> None:
    """Raise UserError for what is not of `kind`: bool, Sized for a list, or else a number, which a bool is not."""
    right = is_list(value) if kind is Sized else isinstance(value, kind)
    if right and isinstance(value, bool) == (kind is bool):
        return
    wanted = {bool: "true or false", Sized: "a list"}.get(kind)
    wanted = wanted or ("a whole number" if issubclass(kind, Integral) else "a number")
    raise UserError(f"{name} is {value!r:.60}: it must be {wanted}.")


def is_list(value: object) -> bool:
    """Whether it is a list of Python's, numpy's or torch's: in order, no text, and no number in an array's clothes."""
    others = str | bytes | Set | Mapping
    return isinstance(value, Sized) and not isinstance(value, others) and getattr(value, "shape", None) != ()
