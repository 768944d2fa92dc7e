"""Scratch disks: the image that a snapshot holds, and the private copy that a clone writes to.

A clone's copy has no name, so nothing is left of it however the clone ends. It is in the image's file system, so that
the copy is a reflink where the file system has them.
"""

from __future__ import annotations

import errno
import weakref
from pathlib import Path

from pytest_fcvm.errors import GuestError
from pytest_fcvm.host.files import create_private
from pytest_fcvm.host.own import getpid, os
from pytest_fcvm.host.process import resolve_tool, run_tool
from pytest_fcvm.host.sparse import UNSUPPORTED_ERRORS, copy_sparse, creation_error

__all__ = ["DISK_FORMAT", "Disk", "freed_error", "make_image"]

DISK_FORMAT = 2
"""Version of the format of images. It is part of a snapshot's key."""

_MAKE_S = 60.0
# Write as little as possible: no reserved blocks, no inode tables, a small journal. There is an inode for each block,
# so that small files can fill the disk.
_OPTIONS = ("-q", "-F", "-t", "ext4", "-m", "0", "-i", "4096", "-J", "size=8", "-E")
_EXTENDED = "lazy_itable_init=1,root_owner=0:0,nodiscard"


def make_image(path: Path, size_mib: int) -> None:
    """Create an empty ext4 file system in a sparse file with mode 0600. Raise HostError."""
    tool = resolve_tool("mke2fs", package="e2fsprogs")
    try:
        with path.open("xb") as file:
            os.fchmod(file.fileno(), 0o600)
            file.truncate(size_mib << 20)
    except OSError as error:
        raise creation_error(path, error) from error
    run_tool([tool, *_OPTIONS, _EXTENDED, path], timeout_s=_MAKE_S)


def freed_error() -> GuestError:
    """Return the error for a disk that ended with its clone."""
    return GuestError("the disk was freed with its clone", hint="save it after kill() and before close()")


class Disk:
    """A clone's private copy of an image. Any thread may save it. `close` or the end of this object frees the space."""

    def __init__(self, descriptor: int, image: Path) -> None:
        self._descriptor, self._image = descriptor, image
        self._finalizer = weakref.finalize(self, os.close, descriptor)

    @classmethod
    def copy_of(cls, image: Path, dest: Path | None = None) -> Disk:
        """Copy an image to `dest`, which the caller removes, else to a file without a name in the image's directory.

        Raise HostError without room.
        """
        source = _open_image(image)
        try:
            copy = create_private(dest) if dest else _open_nameless(image.parent)
            try:
                copy_sparse(source, copy)
            except BaseException:
                os.close(copy)
                raise
        except OSError as error:
            raise creation_error(dest or image.parent, error) from error
        finally:
            os.close(source)
        return cls(copy, image)

    def restore(self) -> None:
        """Put the image's content back, while no VMM writes. Raise HostError without room."""
        source = _open_image(self._image)
        try:
            os.ftruncate(self._descriptor, 0)
            copy_sparse(source, self._descriptor)
        except OSError as error:
            raise creation_error(self._image.parent, error) from error
        finally:
            os.close(source)

    @property
    def descriptor(self) -> int:
        """Return the open file, -1 once it is closed."""
        return self._descriptor

    def save(self, dest: Path) -> None:
        """Write the disk's content to a sparse file. Raise GuestError after `close`, HostError without room."""
        if self._descriptor < 0:
            raise freed_error()
        try:
            target = os.open(dest, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                copy_sparse(self._descriptor, target)
            finally:
                os.close(target)
        except OSError as error:
            raise creation_error(dest, error) from error

    def close(self) -> None:
        """Free the space, once nobody else has the file open."""
        self._descriptor = -1
        self._finalizer()


def _open_image(image: Path) -> int:
    try:
        return os.open(image, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise creation_error(image, error) from error


def _open_nameless(directory: Path) -> int:
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (*UNSUPPORTED_ERRORS, errno.EISDIR, errno.ENOENT):
            raise
    path = directory / f"disk-{getpid()}-{os.urandom(4).hex()}"  # a file system without O_TMPFILE
    descriptor = create_private(path)
    path.unlink()
    return descriptor
