"""Files to and from a guest as tar streams. What a guest sends is untrusted and filtered like tarfile's data filter."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import IO, Protocol, cast

from pytest_fcvm.errors import GuestError, UsageProblem

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

    Raise GuestError for members that would leave `path` or are devices.
    """
    with tarfile.open(fileobj=cast("IO[bytes]", stream), mode="r|") as archive:
        for member in archive:
            inside = PurePosixPath(member.name).parts if member.name.startswith("./") or member.name == "." else ()
            member.name = str(PurePosixPath(path.name, *inside))
            if member.islnk():
                member.linkname = str(PurePosixPath(path.name, member.linkname))
            try:
                archive.extract(member, path.parent, filter="data")
            except tarfile.FilterError as error:
                raise GuestError(f"the guest sent an unsafe archive member: {error}") from error


def unpack_file(stream: Source) -> bytes:
    """Return the content of the single regular file in a tar stream. Raise GuestError when it is something else."""
    with tarfile.open(fileobj=cast("IO[bytes]", stream), mode="r|") as archive:
        member = archive.next()
        content = archive.extractfile(member) if member is not None and member.isreg() else None
        if content is None:
            raise GuestError("the path in the guest is not a regular file", hint="use copy_out for folders")
        return content.read()


def _as_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    return member


def _read_only_as_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.mode &= ~0o222
    return _as_root(member)
