"""Files of our own, and files in places where a program writes that is not trusted."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

__all__ = ["create_private", "open_regular", "read_regular"]


def create_private(path: Path) -> int:
    """Make a file, which is not there yet, for us alone. Return its descriptor, to read and write. Raise OSError."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)


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
