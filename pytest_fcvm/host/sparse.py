"""Copy and move large sparse files. A copy is a reflink where the file system has them, else holes stay holes."""

from __future__ import annotations

import errno
import fcntl
import stat
from contextlib import ExitStack, suppress
from pathlib import Path

from pytest_fcvm.errors import HostError
from pytest_fcvm.host.files import create_private, open_regular
from pytest_fcvm.host.own import os, shutil

__all__ = ["UNSUPPORTED_ERRORS", "copy_file", "copy_sparse", "creation_error", "move_file"]

UNSUPPORTED_ERRORS = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS)
"""The errors of a file system that lacks an operation."""

_FICLONE = 0x40049409  # linux/fs.h


def creation_error(path: Path, error: OSError) -> HostError:
    """Return the error for a file that cannot be created, for lack of room or of permission."""
    return HostError(f"{path} cannot be made: {error.strerror}", hint="free space there or use --fcvm-cache-dir")


def copy_sparse(source: int, target: int) -> None:
    """Copy between open files, from `source` to `target`. Holes stay holes. Raise OSError."""
    with suppress(OSError):
        fcntl.ioctl(target, _FICLONE, source)
        return
    size = os.fstat(source).st_size
    os.ftruncate(target, size)
    end = 0
    while end < size:
        try:
            start = os.lseek(source, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # holes from here on
                return
            raise
        end = os.lseek(source, start, os.SEEK_HOLE)
        _copy_range(source, target, start, end)


def copy_file(source: Path, dest: Path) -> None:
    """Copy a file to the new file `dest`, with mode 0600. Raise HostError without room."""
    with ExitStack() as files:
        try:
            read = files.enter_context(open_regular(source))
            written = create_private(dest)
            files.callback(os.close, written)
            copy_sparse(read.fileno(), written)
        except OSError as error:
            raise creation_error(dest, error) from error


def move_file(source: Path, dest: Path) -> None:
    """Move a file to any file system, and make it our own, with mode 0600.

    Raise HostError without room, or when `source` is not a regular file.
    """
    try:
        source.rename(dest)
        mode = dest.lstat().st_mode  # after the move: nobody else can replace the file at `dest`
        if not stat.S_ISREG(mode):
            (shutil.rmtree if stat.S_ISDIR(mode) else os.unlink)(dest)
            raise OSError(errno.EINVAL, "not a regular file")
        os.chown(dest, os.geteuid(), os.getegid())
        dest.chmod(0o600)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise creation_error(dest, error) from error
        copy_file(source, dest)
        source.unlink()


def _copy_range(source: int, target: int, start: int, end: int) -> None:
    while start < end:
        try:
            start += os.copy_file_range(source, target, end - start, start, start)
        except OSError as error:
            if error.errno not in UNSUPPORTED_ERRORS:
                raise
            block = os.pread(source, min(end - start, 1 << 20), start)
            start += os.pwrite(target, block, start)
