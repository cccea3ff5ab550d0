"""Files that are whole or not there, in directories that one process has for itself."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bridge_rl.errors import UserError


def write_whole(path: Path, text: str) -> None:
    """Make or replace `path`, and its directory: a kill or a full disk leaves what was there before, never a half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


@contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """Two processes in one directory would delete what the other is writing. Makes the directory.

    Raises UserError where another process is inside, or nothing can be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / ".lock").open("w")
    except OSError as error:
        raise UserError(f"Nothing can be written to {directory} ({error}): name another directory.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"Another process works in {directory}: wait for it, or end it.") from error
        except OSError:  # a file system without locks
            pass
        yield
