"""Files on their way to a guest, as tar streams."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import cast

from pytest_fcvm.errors import UsageProblem
from pytest_fcvm.host.own import os

__all__ = ["pack_path", "pack_text"]

_PIECE = 1 << 15  # a frame of the agent's protocol


class _Sink(io.RawIOBase):
    def __init__(self, send: Callable[[bytes], object]) -> None:
        self._send = send

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        chunk = bytes(cast("bytes", data))
        self._send(chunk)
        return len(chunk)


def pack_path(
    source: Path, name: str, send: Callable[[bytes], object], *, read_only: bool = False, keeps_owner: bool = False
) -> None:
    """Send a file or directory as a tar stream in which it is called `name`, owned by root unless it `keeps_owner`.

    A link is sent as what it leads to; links below a directory stay links. `read_only` clears the write bits. Sockets
    are left out. Raise UsageProblem for what is not there or cannot be read.
    """
    if not source.exists():
        what = "is a link that leads nowhere" if source.is_symlink() else "does not exist"
        raise UsageProblem(f"{source} {what}", hint="copy_in takes an existing file or directory")

    def change(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uname = member.gname = ""
        if not keeps_owner:
            member.uid = member.gid = 0
        if read_only:
            member.mode &= ~0o222
        return member

    with tarfile.open(fileobj=_Sink(send), mode="w|", format=tarfile.PAX_FORMAT, bufsize=_PIECE) as archive:
        try:
            archive.add(os.path.realpath(source), arcname=name, filter=change)
        except OSError as error:
            raise UsageProblem(
                f"{error.filename or source} cannot be read: {error.strerror or error}",
                hint="copy what this user may read, and what nobody changes meanwhile",
            ) from error


def pack_text(data: bytes, name: str, mode: int, send: Callable[[bytes], object]) -> None:
    """Send one file made of `data` as a tar stream."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), mode
    with tarfile.open(fileobj=_Sink(send), mode="w|", format=tarfile.PAX_FORMAT, bufsize=_PIECE) as archive:
        archive.addfile(member, io.BytesIO(data))
