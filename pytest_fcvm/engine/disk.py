"""Scratch disks: the image that a snapshot holds, and the private copy that a clone writes to.

A clone's copy has no name, so nothing is left of it however the clone ends. It lies in the file system of the image, so
that copying is a reflink where that file system has them, and else only what was written.
"""

from __future__ import annotations

import errno
import weakref
from pathlib import Path

from pytest_fcvm.errors import GuestError
from pytest_fcvm.host.files import create_private
from pytest_fcvm.host.own import getpid, os
from pytest_fcvm.host.process import resolve_tool, run_tool
from pytest_fcvm.host.sparse import NOT_HERE, copy_sparse, unmakable

__all__ = ["DISK_FORMAT", "Disk", "make_image"]

DISK_FORMAT = 2
"""Number of the way images are made, part of a snapshot's key."""

_MAKE_S = 60.0
# Nothing is written that the guest does not need: no reserved blocks, inode tables left to the holes, a small journal.
# Each block has an inode, so that files run out with the bytes.
_OPTIONS = ("-q", "-F", "-t", "ext4", "-m", "0", "-i", "4096", "-J", "size=8", "-E")
_EXTENDED = "lazy_itable_init=1,root_owner=0:0,nodiscard"


def make_image(path: Path, size_mib: int) -> None:
    """Make an empty ext4 file system in a sparse file of mode 0600. Raise HostError."""
    tool = resolve_tool("mke2fs", package="e2fsprogs")
    try:
        with path.open("xb") as file:
            os.fchmod(file.fileno(), 0o600)
            file.truncate(size_mib << 20)
    except OSError as error:
        raise unmakable(path, error) from error
    run_tool([tool, *_OPTIONS, _EXTENDED, path], timeout_s=_MAKE_S)


class Disk:
    """A clone's private copy of an image. Any thread may save it; it is given back by `close`, or with this object."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._finalizer = weakref.finalize(self, os.close, descriptor)

    @classmethod
    def copy_of(cls, image: Path, dest: Path | None = None) -> Disk:
        """Copy an image to `dest`, which is the caller's to remove, else into a file without a name beside the image.

        Raise HostError without room.
        """
        try:
            source = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise unmakable(image, error) from error
        try:
            copy = create_private(dest) if dest else _open_nameless(image.parent)
            try:
                copy_sparse(source, copy)
            except BaseException:
                os.close(copy)
                raise
        except OSError as error:
            raise unmakable(dest or image.parent, error) from error
        finally:
            os.close(source)
        return cls(copy)

    @property
    def descriptor(self) -> int:
        """Return the open file, -1 once it is closed."""
        return self._descriptor

    def save(self, dest: Path) -> None:
        """Write what the disk holds now to a sparse file. Raise GuestError once it is given back, HostError."""
        if self._descriptor < 0:
            raise GuestError("the disk is given back with its clone", hint="save it after kill() and before close()")
        try:
            target = os.open(dest, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                copy_sparse(self._descriptor, target)
            finally:
                os.close(target)
        except OSError as error:
            raise unmakable(dest, error) from error

    def close(self) -> None:
        """Give the space back once nobody else has it open."""
        self._descriptor = -1
        self._finalizer()


def _open_nameless(directory: Path) -> int:
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (*NOT_HERE, errno.EISDIR, errno.ENOENT):
            raise
    path = directory / f"disk-{getpid()}-{os.urandom(4).hex()}"  # a file system without O_TMPFILE
    descriptor = create_private(path)
    path.unlink()
    return descriptor
