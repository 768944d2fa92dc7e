"""Files of our own, and files in places where a program writes that is not trusted."""

from __future__ import annotations

import errno
import stat
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from pytest_fcvm.host.own import getpid, os

__all__ = [
    "SEALED",
    "create_private",
    "leave_mark",
    "open_regular",
    "read_regular",
    "replace_file",
    "sync_directory",
    "sync_path",
]

SEALED = (errno.EROFS, errno.EACCES, errno.EPERM)
"""The errors of a place that can only be read."""


def create_private(path: Path) -> int:
    """Make a file, which is not there yet, for us alone. Return its descriptor, to read and write. Raise OSError."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)


def leave_mark(path: Path) -> None:
    """Make an empty file that spares others work. Where there is no room for it, they do the work."""
    with suppress(OSError):
        path.touch()


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading. No link is followed, and no pipe waited for. Raise OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_regular(path: Path) -> bytes:
    """Return what is in a regular file. Raise OSError for what is none, a link too."""
    with open_regular(path) as file:
        return file.read()


def replace_file(path: Path, text: str) -> None:
    """Write a file of our own in one step, or leave it as it was. Raise OSError."""
    fresh = path.with_name(f"{path.name}.{getpid()}")
    try:
        fresh.touch(mode=0o600)
        fresh.write_text(text)
        fresh.replace(path)
    except OSError:
        with suppress(OSError):
            fresh.unlink()
        raise


def sync_path(path: Path) -> None:
    """Bring a file, or the names in a directory, to the disk. Raise OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(directory: Path) -> None:
    """Bring a directory and the files in it to the disk. Raise OSError."""
    for path in directory.iterdir():
        if path.is_file() and not path.is_symlink():
            sync_path(path)
    sync_path(directory)
