"""The members of a layer's tar file as nodes of a root filesystem, with checks.

Formats: V7, ustar, GNU (long names, base-256 numbers, sparse), PAX (xattrs as `SCHILY.xattr.NAME`, sparse 0.0 to 1.0).
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, cast

from pytest_fcvm.host.own import os
from pytest_fcvm.image.tree import Extent, Node, NodeKind, broken_layer, split_name

__all__ = ["GuardedFile", "Limits", "Member", "read_members"]

_BLOCK = tarfile.BLOCKSIZE
_MAX_HEADER = 8 << 20  # bytes in the headers of one member; a PAX header with Linux's largest xattrs is below 1 MiB
_XATTR = "SCHILY.xattr."
_XATTR_STORED = ("user.", "trusted.", "security.")  # squashfs stores these
_XATTR_DROPPED = ("trusted.overlay.", "user.overlay.")  # the guest's own overlay would apply them
_KINDS = {
    tarfile.REGTYPE: NodeKind.FILE,
    tarfile.AREGTYPE: NodeKind.FILE,
    tarfile.CONTTYPE: NodeKind.FILE,
    tarfile.GNUTYPE_SPARSE: NodeKind.FILE,
    tarfile.DIRTYPE: NodeKind.DIRECTORY,
    tarfile.SYMTYPE: NodeKind.SYMLINK,
    tarfile.CHRTYPE: NodeKind.CHARACTER,
    tarfile.BLKTYPE: NodeKind.BLOCK,
    tarfile.FIFOTYPE: NodeKind.FIFO,
}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Upper limits for an image. `unpacked_bytes` counts every layer, with the holes of sparse files."""

    entries: int = 1_000_000
    unpacked_bytes: int = 64 << 30
    path_bytes: int = 4096


@dataclass(slots=True)
class Member:
    """One member at the path `parts`: a `node`, or a hard link to the path `link`."""

    parts: tuple[str, ...]
    node: Node | None = None
    link: tuple[str, ...] = ()


def read_members(file: IO[bytes], layer: int, limits: Limits) -> Iterator[Member]:
    """Yield the members in order. Raise ImageError for a broken archive and for names that leave the root."""
    size = os.fstat(file.fileno()).st_size
    if not size:
        return
    try:
        guarded = GuardedFile(file)
        with tarfile.open(fileobj=cast("IO[bytes]", guarded), mode="r:", errors="surrogateescape") as archive:
            while (info := archive.next()) is not None:
                guarded.spent = 0
                archive.members.clear()  # type: ignore[attr-defined]  # it would grow with every member
                yield _member(info, layer, size, limits)
            _check_end(file, archive)
    except (tarfile.TarError, ValueError, OverflowError, EOFError, RecursionError) as error:
        raise broken_layer(f"broken archive ({error})", f"layer {layer + 1}") from error


class GuardedFile:
    """A file that limits how much a header makes tarfile read, and that refuses to go back."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._furthest, self.spent = file, 0, 0
        self.tell = file.tell
        file.seek(0)

    def seek(self, position: int) -> int:
        """Move forward to a position. Raise tarfile.ReadError for an earlier one."""
        if position < self._furthest:
            raise tarfile.ReadError("a header points backwards")
        self._furthest = position
        return self._file.seek(position)

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes. Raise tarfile.ReadError when headers take more than the limit."""
        self.spent += size  # tarfile reads sparse maps block by block
        if size < 0 or self.spent > _MAX_HEADER:
            raise tarfile.ReadError("a header is too large")
        return self._file.read(size)


def _check_end(file: IO[bytes], archive: tarfile.TarFile) -> None:
    """Raise ReadError if the archive ends with a damaged header, which tarfile takes for the end."""
    file.seek(archive.offset)
    block = file.read(_BLOCK)
    if block.strip(b"\0"):
        raise tarfile.ReadError("a header is damaged")


def _member(info: tarfile.TarInfo, layer: int, size: int, limits: Limits) -> Member:
    parts = split_name(info.name, max_path=limits.path_bytes)
    if info.type == tarfile.LNKTYPE:
        return Member(parts, link=split_name(info.linkname, max_path=limits.path_bytes))
    kind = _KINDS.get(info.type)
    if kind is None:
        raise broken_layer(f"member of unknown type {info.type!r}", info.name)
    if min(info.uid, info.gid, info.size) < 0 or max(info.uid, info.gid) > 0xFFFFFFFF:
        raise broken_layer("owner or size is out of range", info.name)
    node = Node(kind, info.mode & 0o7777, info.uid, info.gid, _mtime(info.mtime), layer=layer)
    if info.pax_headers:
        node.xattrs = _xattrs(info.pax_headers)
    if kind is NodeKind.FILE:
        node.size, node.extents = info.size, _extents(info, size)
    elif kind is NodeKind.SYMLINK:
        node.target = _target(info, limits)
    elif kind in (NodeKind.CHARACTER, NodeKind.BLOCK):
        node.device = (info.devmajor, info.devminor)
    return Member(parts, node)


def _mtime(value: float) -> int:
    return min(max(int(value), 0), 0xFFFFFFFF)


def _target(info: tarfile.TarInfo, limits: Limits) -> str:
    if not info.linkname or "\0" in info.linkname or len(os.fsencode(info.linkname)) >= limits.path_bytes:
        raise broken_layer("symbolic link with an invalid target", info.name)
    return info.linkname


def _xattrs(headers: Mapping[str, str]) -> dict[str, bytes]:
    return {
        name: value.encode("utf-8", "surrogateescape")
        for key, value in headers.items()
        if key.startswith(_XATTR)
        and (name := key.removeprefix(_XATTR)).startswith(_XATTR_STORED)
        and not name.startswith(_XATTR_DROPPED)
    }


def _extents(info: tarfile.TarInfo, size: int) -> tuple[Extent, ...]:
    sparse: list[tuple[int, int]] | None = getattr(info, "sparse", None)
    if sparse is None:
        sparse = [(0, info.size)]
    extents, offset, end = [], info.offset_data, 0
    for start, length in sparse:
        if not length:  # padding of GNU's table
            continue
        if length < 0 or start < end or start + length > info.size:
            raise broken_layer("sparse map is broken", info.name)
        extents.append(Extent(start, offset, length))
        offset, end = offset + length, start + length
    if offset > size:
        raise broken_layer("the archive ends early", info.name)
    return tuple(extents)
