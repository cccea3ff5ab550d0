"""Files that are whole or not there, in directories that one process has for itself."""

import errno
from pathlib import Path

import pytest

from bridge_rl import files
from bridge_rl.errors import UserError
from bridge_rl.files import alone_in, write_whole


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "new" / "f.json"
    write_whole(path, "before")
    write = Path.write_text

    def refuse(self, text, **kwargs):
        write(self, text[:2], **kwargs)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, "after")
    assert path.read_text() == "before"


def test_two_processes_do_not_work_in_one_directory(tmp_path):
    with alone_in(tmp_path), pytest.raises(UserError, match="Another process works in"):
        with alone_in(tmp_path):
            pass
    with alone_in(tmp_path):
        pass


def test_a_file_system_without_locks_is_worked_on(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with alone_in(tmp_path):
        pass
