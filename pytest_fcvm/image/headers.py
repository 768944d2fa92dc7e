"""Tar headers for `mksquashfs -tar`: ustar, with a PAX header for values that do not fit.

Formats: POSIX pax, "ustar Interchange Format" and "pax Extended Header"; GNU tar's manual, "Basic Tar Format", for long
links. Python's tarfile is several times slower, and writes binary xattr values only with `hdrcharset` in the header.
"""

from __future__ import annotations

from itertools import starmap

from pytest_fcvm.image.tree import Node, NodeKind

__all__ = ["BLOCK", "END_OF_ARCHIVE", "member_header"]

END_OF_ARCHIVE = bytes(1024)
BLOCK = 512
_TYPES = {
    NodeKind.FILE: b"0",
    NodeKind.SYMLINK: b"2",
    NodeKind.CHARACTER: b"3",
    NodeKind.BLOCK: b"4",
    NodeKind.DIRECTORY: b"5",
    NodeKind.FIFO: b"6",
}


def member_header(path: str, node: Node, *, link: str | None = None) -> bytes:
    """Return the header blocks of a node at `path`; with `link`, of a hard link to the node at `link`."""
    name = _encode(path)
    if node.kind is NodeKind.DIRECTORY:
        name += b"/"
    target = _encode(link if link is not None else node.target)
    size = node.size if link is None and node.kind is NodeKind.FILE else 0
    pax: list[tuple[bytes, bytes]] = []
    if len(name) > 100:
        pax.append((b"path", name))
    for key, value, digits in ((b"size", size, 11), (b"uid", node.uid, 7), (b"gid", node.gid, 7)):
        if value >= 8**digits:
            pax.append((key, b"%d" % value))
    if link is None:
        pax += [(b"SCHILY.xattr." + _encode(key), node.xattrs[key]) for key in sorted(node.xattrs)]
    kind = b"1" if link is not None else _TYPES[node.kind]
    plain = _block(name, target, kind, node, size)
    return b"".join((_long_link(target), _pax(pax), plain))


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _octal(value: int, digits: int) -> bytes:
    return b"%0*o\0" % (digits, value if value < 8**digits else 0)


def _block(name: bytes, target: bytes, kind: bytes, node: Node, size: int) -> bytes:
    major, minor = node.device
    head = b"".join(
        (
            name[:100].ljust(100, b"\0"),
            _octal(node.mode, 7),
            _octal(node.uid, 7),
            _octal(node.gid, 7),
            _octal(size, 11),
            _octal(node.mtime, 11),
            b" " * 8,
            kind,
            target[:100].ljust(100, b"\0"),
            b"ustar\x0000",
            bytes(64),
            _octal(major, 7),
            _octal(minor, 7),
            bytes(167),
        )
    )
    return _with_checksum(head)


def _with_checksum(head: bytes) -> bytes:
    return head[:148] + b"%06o\0 " % sum(head) + head[156:]


def _long_link(target: bytes) -> bytes:
    """Return GNU's header for a link target that is too long for ustar.

    mksquashfs 4.5.1 strips every leading `/`, `./` and `../` from PAX's `linkpath`, for symbolic links too. Write this
    header before the PAX header: otherwise the PAX `size` applies to this header.
    """
    return _carry(b"././@LongLink", b"K", target + b"\0") if len(target) > 100 else b""


def _pax(records: list[tuple[bytes, bytes]]) -> bytes:
    return _carry(b"PaxHeader", b"x", b"".join(starmap(_record, records))) if records else b""


def _carry(name: bytes, kind: bytes, body: bytes) -> bytes:
    return _block(name, b"", kind, Node(NodeKind.FILE, 0o644), len(body)) + body + bytes(-len(body) % BLOCK)


def _record(key: bytes, value: bytes) -> bytes:
    bare = len(key) + len(value) + 3  # space, equals sign, newline
    length = bare + len(str(bare))
    if bare + len(str(length)) > length:
        length += 1
    return b"%d %b=%b\n" % (length, key, value)
