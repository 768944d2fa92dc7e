"""Files to and from a guest as tar streams. What a guest sends is untrusted and filtered like tarfile's data filter."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Protocol, cast

from pytest_fcvm.errors import GuestError, UsageProblem
from pytest_fcvm.host.own import os

__all__ = ["pack_path", "pack_text", "unpack_as", "unpack_file"]


class _Sink(io.RawIOBase):
    def __init__(self, send: Callable[[bytes], object]) -> None:
        self._send = send

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        chunk = bytes(cast("bytes", data))
        self._send(chunk)
        return len(chunk)


class Source(Protocol):
    """Where a tar stream is read from."""

    def read(self, size: int = -1) -> bytes:
        """Return `size` bytes, fewer at the end only."""
        ...


def pack_path(source: Path, name: str, send: Callable[[bytes], object], *, read_only: bool = False) -> None:
    """Send a file or folder as a tar stream in which it is called `name`, owned by root in the guest.

    `read_only` clears the write bits. Raise UsageProblem when the source is not there.
    """
    if not source.exists():
        raise UsageProblem(f"{source} does not exist", hint="copy_in takes an existing file or folder")
    with tarfile.open(fileobj=_Sink(send), mode="w|", format=tarfile.PAX_FORMAT) as archive:
        archive.add(source, arcname=name, filter=_read_only_as_root if read_only else _as_root)


def pack_text(data: bytes, name: str, mode: int, send: Callable[[bytes], object]) -> None:
    """Send one file made of `data` as a tar stream."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), mode
    with tarfile.open(fileobj=_Sink(send), mode="w|", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(member, io.BytesIO(data))


def unpack_as(stream: Source, path: Path) -> None:
    """Write what a guest sent as `path`: a folder comes as members of "./", a file as a single member.

    Raise GuestError for what is no archive, and for members that would leave `path` or are devices.
    """
    try:
        with tarfile.open(fileobj=cast("IO[bytes]", stream), mode="r|") as archive:
            first = archive.next()
            if first is not None and _is_inside_folder(first):
                _unpack_folder(archive, first, path)
            elif first is not None:
                first.name = path.name
                _extract(archive, first, path.parent)
                if archive.next() is not None:
                    raise GuestError("the guest sent more than the file that was asked for")
    except tarfile.TarError as error:
        raise GuestError(f"the guest sent a broken archive: {error}") from error


def _unpack_folder(archive: tarfile.TarFile, member: tarfile.TarInfo | None, path: Path) -> None:
    path.mkdir(exist_ok=True)
    while member is not None:
        if not _is_inside_folder(member):
            raise _unsafe(member, "is outside of the folder")
        # Below the folder itself and not its parent: what lies beside it is out of reach for links as well.
        _extract(archive, member, path)
        member = archive.next()


def _extract(archive: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    """Write one member below a folder, by the rules of tarfile's filter "data".

    They are checked here as well, because Python before 3.11.4 (Debian 12 has 3.11.2) has no filters.
    """
    _check(member, folder)
    member.uid, member.gid, member.uname, member.gname = os.getuid(), os.getgid(), "", ""
    member.mode = member.mode & 0o755 | (0o700 if member.isdir() else 0o600)
    if hasattr(tarfile, "data_filter"):
        archive.extract(member, folder, filter="data")
    else:
        archive.extract(member, folder)


def _check(member: tarfile.TarInfo, folder: Path) -> None:
    if not (member.isreg() or member.isdir() or member.issym() or member.islnk()):
        raise _unsafe(member, "is a device or a pipe")
    place = folder / member.name
    targets = [place]
    if member.issym():
        targets.append(place.parent / member.linkname)
    elif member.islnk():
        targets.append(folder / member.linkname)
    root = os.path.realpath(folder)
    for target in targets:
        if os.path.commonpath([root, os.path.realpath(target)]) != root:
            raise _unsafe(member, "leads out of the folder")


def _unsafe(member: tarfile.TarInfo, reason: str) -> GuestError:
    return GuestError(f"the guest sent an unsafe archive member: {member.name!r} {reason}")


def _is_inside_folder(member: tarfile.TarInfo) -> bool:
    return member.name == "." or member.name.startswith("./")


def unpack_file(stream: Source) -> bytes:
    """Return the content of the single regular file in a tar stream. Raise GuestError when it is something else."""
    try:
        with tarfile.open(fileobj=cast("IO[bytes]", stream), mode="r|") as archive:
            member = archive.next()
            content = archive.extractfile(member) if member is not None and member.isreg() else None
            if content is None:
                raise GuestError("the path in the guest is not a regular file", hint="use copy_out for folders")
            return content.read()
    except tarfile.TarError as error:
        raise GuestError(f"the guest sent a broken archive: {error}") from error


def _as_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    return member


def _read_only_as_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.mode &= ~0o222
    return _as_root(member)
