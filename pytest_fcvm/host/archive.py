"""Pack files into tar streams for a guest."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import cast

from pytest_fcvm.errors import FcvmError, UsageProblem
from pytest_fcvm.host.own import os

__all__ = ["pack_path", "pack_text"]

_PIECE = 1 << 15  # a frame of the agent's protocol


class _Writer(io.RawIOBase):
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
    """Send a file or directory as a tar stream in which it has the name `name`. Its owner is root unless `keeps_owner`.

    If `source` is a link, send its target; links below a directory stay links. `read_only` clears the write bits.
    Sockets are left out. Raise UsageProblem for a path that is missing or cannot be read.
    """
    if not source.exists():
        what = "is a link without a target" if source.is_symlink() else "does not exist"
        raise UsageProblem(f"{source} {what}", hint="copy_in takes an existing file or directory")

    def change(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uname = member.gname = ""
        if not keeps_owner:
            member.uid = member.gid = 0
        if read_only:
            member.mode &= ~0o222
        return member

    with tarfile.open(fileobj=_Writer(send), mode="w|", format=tarfile.PAX_FORMAT, bufsize=_PIECE) as archive:
        try:
            archive.add(os.path.realpath(source), arcname=name, filter=change)
        except FcvmError:  # GuestTimeout is an OSError too
            raise
        except OSError as error:
            raise UsageProblem(
                f"{error.filename or source} cannot be read: {error.strerror or error}",
                hint="copy files that this user may read, and that nobody changes meanwhile",
            ) from error


def pack_text(data: bytes, name: str, mode: int, send: Callable[[bytes], object]) -> None:
    """Send one file with the content `data` as a tar stream."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), mode
    with tarfile.open(fileobj=_Writer(send), mode="w|", format=tarfile.PAX_FORMAT, bufsize=_PIECE) as archive:
        archive.addfile(member, io.BytesIO(data))
