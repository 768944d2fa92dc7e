"""Large files: copies of sparse ones, and what is said of one that cannot be made.

A copy is a reflink where the file system has them, else only what was written.
"""

from __future__ import annotations

import errno
import fcntl
import stat
from contextlib import ExitStack, suppress
from pathlib import Path

from pytest_fcvm.errors import HostError
from pytest_fcvm.host.files import create_private, open_regular
from pytest_fcvm.host.own import os, shutil

__all__ = ["NOT_HERE", "copy_file", "copy_sparse", "move_file", "unmakable"]

NOT_HERE = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS)
"""What a file system says that cannot do a thing."""

_FICLONE = 0x40049409  # linux/fs.h


def unmakable(path: Path, error: OSError) -> HostError:
    """Return the error of a file for which there is no room, or no right."""
    return HostError(f"{path} cannot be made: {error.strerror}", hint="free space there or use --fcvm-cache-dir")


def copy_sparse(source: int, target: int) -> None:
    """Make the file open as `target` what `source` is, holes as holes. Raise OSError."""
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
    """Make `dest`, which is not there yet, with mode 0600, what the file `source` is. Raise HostError without room."""
    with ExitStack() as files:
        try:
            read = files.enter_context(open_regular(source))
            written = create_private(dest)
            files.callback(os.close, written)
            copy_sparse(read.fileno(), written)
        except OSError as error:
            raise unmakable(dest, error) from error


def move_file(source: Path, dest: Path) -> None:
    """Move a file to a place on any file system, where it is ours, with mode 0600.

    Raise HostError without room, or when it is no regular file.
    """
    try:
        source.rename(dest)
        mode = dest.lstat().st_mode  # looked at where nobody else can put another in its place
        if not stat.S_ISREG(mode):
            (shutil.rmtree if stat.S_ISDIR(mode) else os.unlink)(dest)
            raise OSError(errno.EINVAL, "not a regular file")
        os.chown(dest, os.geteuid(), os.getegid())
        dest.chmod(0o600)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise unmakable(dest, error) from error
        copy_file(source, dest)
        source.unlink()


def _copy_range(source: int, target: int, start: int, end: int) -> None:
    while start < end:
        try:
            start += os.copy_file_range(source, target, end - start, start, start)
        except OSError as error:
            if error.errno not in NOT_HERE:
                raise
            block = os.pread(source, min(end - start, 1 << 20), start)
            start += os.pwrite(target, block, start)
