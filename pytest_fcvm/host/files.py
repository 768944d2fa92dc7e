"""Write our own files, and read files in directories where an untrusted program writes."""

from __future__ import annotations

import errno
import stat
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from pytest_fcvm.host.own import getpid, os

__all__ = [
    "READ_ONLY_ERRORS",
    "create_private",
    "open_regular",
    "read_regular",
    "read_tail",
    "replace_file",
    "stamp_of",
    "sync_directory",
    "sync_path",
    "touch_marker",
]

READ_ONLY_ERRORS = (errno.EROFS, errno.EACCES, errno.EPERM)
"""The errors of a place that can only be read."""

_TAIL_BYTES = 16384


def create_private(path: Path) -> int:
    """Create a new file with mode 0600. Return its descriptor, open for reading and writing. Raise OSError."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)


def touch_marker(path: Path) -> None:
    """Create an empty file that saves other processes work. Ignore a failure: they then do the work."""
    with suppress(OSError):
        path.touch()


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading. Follow no link, and wait for no pipe. Raise OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_regular(path: Path) -> bytes:
    """Return the content of a regular file. Raise OSError for anything else, links included."""
    with open_regular(path) as file:
        return file.read()


def read_tail(path: Path) -> str:
    """Return the last 16 KiB of a regular text file, "" where there is none."""
    try:
        with open_regular(path) as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


def replace_file(path: Path, content: str | bytes) -> None:
    """Write one of our own files atomically, with mode 0600. Raise OSError; the file is then as it was."""
    temporary = path.with_name(f"{path.name}.{getpid()}")
    try:
        temporary.touch(mode=0o600)
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


def stamp_of(path: Path) -> list[int]:
    """Return numbers that change when the content of a file changes. Raise OSError."""
    found = path.stat()
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def sync_path(path: Path) -> None:
    """Write a file, or the names in a directory, through to the disk. Raise OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(directory: Path) -> None:
    """Write a directory and the files in it through to the disk. Raise OSError."""
    for path in directory.iterdir():
        if path.is_file() and not path.is_symlink():
            sync_path(path)
    sync_path(directory)
