"""Files in places where others write."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_fcvm.errors import HostError
from pytest_fcvm.host.files import read_regular
from pytest_fcvm.host.sparse import move_file


def _link(path: Path) -> None:
    (path.parent / "secret").write_text("secret")
    (path.parent / "secret").chmod(0o644)
    path.symlink_to("secret")


_NOT_FILES = [_link, os.mkfifo, Path.mkdir, lambda _path: None]


@pytest.mark.parametrize("make", _NOT_FILES)
def test_only_a_regular_file_is_read(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "file")
    with pytest.raises(OSError, match=r"not a regular file|symbolic links|No such file"):
        read_regular(tmp_path / "file")


def test_a_regular_file_is_read_in_full(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 100_000)
    assert read_regular(tmp_path / "file") == b"x" * 100_000


@pytest.mark.parametrize("make", _NOT_FILES)
def test_only_a_regular_file_is_moved_and_a_failure_changes_nothing(
    make: Callable[[Path], None], tmp_path: Path
) -> None:
    make(tmp_path / "file")
    with pytest.raises(HostError, match="dest cannot be made"):
        move_file(tmp_path / "file", tmp_path / "dest")
    assert not os.path.lexists(tmp_path / "dest")
    if make is _link:
        assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o644


def test_a_moved_file_is_private_and_our_own(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("moved")
    (tmp_path / "file").chmod(0o666)
    move_file(tmp_path / "file", tmp_path / "dest")
    assert (tmp_path / "dest").read_text() == "moved"
    assert (tmp_path / "dest").stat().st_mode & 0o777 == 0o600
    assert not (tmp_path / "file").exists()
