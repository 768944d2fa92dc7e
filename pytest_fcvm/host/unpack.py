"""Unpack tar streams from a guest. They are untrusted: no member may write outside of the destination.

Links are kept as they are, whatever their target. Nothing is written through a link: each directory on the path of a
file is opened separately, and must be a directory.
"""

from __future__ import annotations

import logging
import stat
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Protocol, Self, cast

from pytest_fcvm.errors import FcvmError, GuestError, HostError
from pytest_fcvm.host.own import os

__all__ = ["unpack_as", "unpack_file"]

_log = logging.getLogger(__name__)

_PIECE, _CHUNK = 1 << 15, 1 << 16  # a frame of the agent's protocol; the smallest hole
_ZEROS = bytes(_CHUNK)
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_MOST_NAMED = 5
_MAX_HEADER = 8 << 20  # bytes of all headers of one member
_BROKEN = (tarfile.TarError, ValueError, OverflowError, EOFError, RecursionError)  # what tarfile raises


class Source(Protocol):
    """The source of a tar stream."""

    def read(self, size: int = -1) -> bytes:
        """Return `size` bytes, fewer only at the end."""
        ...


class _Archive:
    """The members of a tar stream. The size of headers is limited, and no member is kept in memory."""

    def __init__(self, stream: Source) -> None:
        self._stream, self._left = stream, _MAX_HEADER
        self._tar = tarfile.open(fileobj=cast("IO[bytes]", self), mode="r|", bufsize=_PIECE)  # noqa: SIM115  it holds no file

    def read(self, size: int = -1) -> bytes:
        """Read from the stream. Raise tarfile.ReadError when the headers of one member are too large."""
        data = self._stream.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise tarfile.ReadError("a header is too large")
        return data

    def next(self) -> tarfile.TarInfo | None:
        """Return the next member, None at the end."""
        self._left = _MAX_HEADER
        self._tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps all members
        return self._tar.next()

    def chunks(self, member: tarfile.TarInfo) -> Iterator[bytes]:
        """Yield a file's content. Raise tarfile.ReadError when the content is incomplete."""
        content = self._tar.extractfile(member) if getattr(member, "sparse", None) is None else None
        if content is None:
            raise _unsafe(member, "is a sparse file")  # its size is unlimited
        left = member.size
        while chunk := content.read(_CHUNK):
            yield chunk
            left -= len(chunk)
            self._left = _MAX_HEADER
        if left:
            raise tarfile.ReadError("unexpected end of data")


def unpack_as(stream: Source, path: Path) -> None:
    """Write a guest's archive to `path`. A directory comes as members of "./", a file as a single member.

    The caller becomes the owner; group and others may not write; nothing is set-user-id. Devices and pipes are left
    out, with a line in the log. Raise GuestError for a broken archive and for members outside of `path`, HostError for
    a file that cannot be written.
    """
    try:
        archive = _Archive(stream)
        first = archive.next()
        if first is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            _unpack(archive, first, path)
    except FcvmError:  # GuestTimeout is an OSError too
        raise
    except _BROKEN as error:
        raise GuestError(f"the guest sent a broken archive: {error}") from error
    except OSError as error:
        raise HostError(
            f"{error.filename or path} cannot be written: {error.strerror or error}",
            hint="name a destination with free space that this user may write to",
        ) from error


def _unpack(archive: _Archive, first: tarfile.TarInfo, path: Path) -> None:
    if not _is_below(first):
        if not first.isreg():
            raise _unsafe(first, "is not the requested file")
        with Path(os.path.realpath(path)).open("wb") as file:  # writes to a device, and does not replace it
            _fill(archive, first, file)
            file.flush()
            if _is_regular(file):
                os.fchmod(file.fileno(), first.mode & 0o755 | 0o600)
                _set_time(first, file.fileno())
        if archive.next() is not None:
            raise GuestError("the guest sent more than the requested file")
        return
    path.mkdir(exist_ok=True)
    left_out: list[str] = []
    with _Tree(path) as tree:
        member: tarfile.TarInfo | None = first
        while member is not None:
            if not tree.put(archive, member):
                left_out.append(member.name)
            member = archive.next()
    if left_out:
        named = ", ".join(left_out[:_MOST_NAMED]) + ", …" * (len(left_out) > _MOST_NAMED)
        _log.warning("%d devices and pipes were not copied to %s: %r", len(left_out), path, named)


class _Tree:
    """A directory that is being filled."""

    def __init__(self, root: Path) -> None:
        self._root = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._last: tuple[tuple[str, ...], int] = ((), self._root)  # the directory that was opened last
        self._directories: list[tuple[tuple[str, ...], tarfile.TarInfo]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish_directories()
        finally:
            self._close_last()
            os.close(self._root)

    def put(self, archive: _Archive, member: tarfile.TarInfo) -> bool:
        """Write a member. Return False if it is left out. Raise GuestError for a member outside of the root."""
        components = _components(member.name)
        if components is None or not _is_below(member):
            raise _unsafe(member, "is outside of the directory")
        if member.ischr() or member.isblk() or member.isfifo():
            return False
        if member.isdir():
            self._make_directory(member, components)
            return True
        if not components or not (member.isreg() or member.issym() or member.islnk()):
            raise _unsafe(member, "is not a file, directory or link")
        parent = self._open(components[:-1], member)
        with suppress(FileNotFoundError):
            os.unlink(components[-1], dir_fd=parent)
        if member.islnk():
            self._link(member, components, parent)
        elif member.issym():
            os.symlink(member.linkname, components[-1], dir_fd=parent)
            _set_time(member, components[-1], parent)
        else:
            with os.fdopen(os.open(components[-1], _NEW_FILE, 0o600, dir_fd=parent), "wb") as file:
                _fill(archive, member, file)
                os.fchmod(file.fileno(), member.mode & 0o755 | 0o600)
            _set_time(member, components[-1], parent)  # after the last write, which changes the time
        return True

    def _make_directory(self, member: tarfile.TarInfo, components: tuple[str, ...]) -> None:
        if components:
            parent = self._open(components[:-1], member)
            with suppress(FileNotFoundError, IsADirectoryError):
                os.unlink(components[-1], dir_fd=parent)  # a file, or a link that must not be followed
            with suppress(FileExistsError):
                os.mkdir(components[-1], 0o700, dir_fd=parent)
        self._directories.append((components, member))

    def _link(self, member: tarfile.TarInfo, components: tuple[str, ...], parent: int) -> None:
        target = _components(member.linkname)
        if not target:
            raise _unsafe(member, "is a link to a file outside of the directory")
        held = os.dup(parent)
        try:
            other = self._open(target[:-1], member)
            os.link(target[-1], components[-1], src_dir_fd=other, dst_dir_fd=held, follow_symlinks=False)
        except FileNotFoundError as error:
            raise _unsafe(member, "is a link to a file that was not sent") from error
        finally:
            os.close(held)

    def _open(self, components: tuple[str, ...], member: tarfile.TarInfo) -> int:
        """Return the descriptor of a directory below the root, open until the next call. Follow no link."""
        if components == self._last[0]:
            return self._last[1]
        self._close_last()
        here = self._root
        for component in components:
            try:
                inside = os.open(component, _DIRECTORY, dir_fd=here)
            except OSError as error:
                raise _unsafe(member, "is below a path that is not a directory") from error
            finally:
                if here != self._root:
                    os.close(here)
            here = inside
        self._last = components, here
        return here

    def _close_last(self) -> None:
        if self._last[1] != self._root:
            os.close(self._last[1])
        self._last = (), self._root

    def _finish_directories(self) -> None:
        """Set mode and time of all directories, the innermost first: writing their entries changed the time."""
        for components, member in sorted(self._directories, key=lambda one: -len(one[0])):
            directory = self._open(components, member)
            os.fchmod(directory, member.mode & 0o755 | 0o700)
            _set_time(member, directory)


def _components(name: str) -> tuple[str, ...] | None:
    """Return the components of a name below the root, None for a name outside of it."""
    if name.startswith("/"):
        return None
    components = tuple(component for component in name.split("/") if component not in ("", "."))
    return None if ".." in components else components


def _fill(archive: _Archive, member: tarfile.TarInfo, file: IO[bytes]) -> None:
    """Write a file's content, with holes for long runs of zeros."""
    has_holes = _is_regular(file)
    for chunk in archive.chunks(member):
        if has_holes and chunk == _ZEROS:
            file.seek(_CHUNK, os.SEEK_CUR)
        else:
            file.write(chunk)
    if has_holes:
        file.truncate()


def _is_regular(file: IO[bytes]) -> bool:
    return stat.S_ISREG(os.fstat(file.fileno()).st_mode)


def _set_time(member: tarfile.TarInfo, place: str | int, parent: int | None = None) -> None:
    times = (member.mtime, member.mtime)
    with suppress(OverflowError, ValueError):  # a year out of range
        if isinstance(place, int):
            os.utime(place, times)
        else:
            os.utime(place, times, dir_fd=parent, follow_symlinks=False)


def _unsafe(member: tarfile.TarInfo, reason: str) -> FcvmError:
    return GuestError(f"the guest sent an unsafe archive member: {member.name!r} {reason}")


def _is_below(member: tarfile.TarInfo) -> bool:
    return member.name == "." or member.name.startswith("./")


def unpack_file(stream: Source) -> bytes:
    """Return the content of the only member of a tar stream, a regular file. Raise GuestError for anything else."""
    try:
        archive = _Archive(stream)
        member = archive.next()
        if member is None or not member.isreg():
            raise GuestError("the path in the guest is not a regular file", hint="use copy_out for directories")
        return b"".join(archive.chunks(member))
    except _BROKEN as error:
        raise GuestError(f"the guest sent a broken archive: {error}") from error
