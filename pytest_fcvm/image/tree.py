"""A root filesystem in memory: names and attributes, and the places of the contents.

Every path is inside the root. Symbolic links among the parents are followed as the kernel does after chroot, except
that a link or a relative name that leaves the root is an error.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

from pytest_fcvm.errors import ImageError

__all__ = ["Extent", "Node", "NodeKind", "RootTree", "broken_layer", "split_name"]

_NO_XATTRS: Mapping[str, bytes] = MappingProxyType({})
_MAX_LINKS = 40  # as the kernel's MAXSYMLINKS
_MAX_NAME = 255  # bytes; squashfs has 256, every other file system 255


class NodeKind(StrEnum):
    """The type of a node."""

    DIRECTORY = "directory"
    FILE = "file"
    SYMLINK = "symlink"
    CHARACTER = "character device"
    BLOCK = "block device"
    FIFO = "fifo"


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of a file's bytes: at `start` in the file, at `offset` in the layer's tar. Zeros fill the gaps."""

    start: int
    offset: int
    length: int


@dataclass(slots=True, eq=False)
class Node:
    """One inode. Hard links are one node under several names. `layer` is the number of the layer with the contents."""

    kind: NodeKind
    mode: int
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    size: int = 0
    target: str = ""
    device: tuple[int, int] = (0, 0)
    xattrs: Mapping[str, bytes] = field(default_factory=lambda: _NO_XATTRS)
    layer: int = -1
    extents: tuple[Extent, ...] = ()
    children: dict[str, Node] = field(default_factory=dict)

    def take_attributes(self, other: Node) -> None:
        """Take the attributes that a later layer gives this directory. Keep the children."""
        self.mode, self.uid, self.gid = other.mode, other.uid, other.gid
        self.mtime, self.xattrs, self.layer = other.mtime, other.xattrs, other.layer


def broken_layer(what: str, path: str) -> ImageError:
    """Return the error for an invalid layer, with the path escaped for a terminal."""
    shown = path if len(path) <= 200 else f"{path[:200]}…"
    return ImageError(
        f"a layer of the image is invalid: {what}: {shown!r}", hint="rebuild the image, or name another image"
    )


def split_name(name: str, *, max_path: int) -> tuple[str, ...]:
    """Return the parts of a member's name. The name starts at the root, with or without a slash.

    Raise ImageError for names that leave the root or cannot be stored. `..` removes the part before it, as in Docker
    and containerd (Go's path.Clean).
    """
    # intern: a large layer repeats directory names a hundred thousand times
    parts = tuple(sys.intern(part) for part in name.split("/") if part not in ("", "."))
    if ".." in parts:
        parts = _climb_back(name, parts)
    if "\0" in name:
        raise broken_layer("name with a NUL byte", name)
    encoded = [part.encode("utf-8", "surrogateescape") for part in parts]
    if sum(map(len, encoded)) + len(parts) > max_path or any(len(part) > _MAX_NAME for part in encoded):
        raise broken_layer("name is too long", name)
    return parts


def _climb_back(name: str, parts: tuple[str, ...]) -> tuple[str, ...]:
    kept: list[str] = []
    for part in parts:
        if part != "..":
            kept.append(part)
        elif kept:
            kept.pop()
        elif not name.startswith("/"):
            raise broken_layer("name leaves the root", name)
    return tuple(kept)


class RootTree:
    """The file system that the layers make."""

    def __init__(self) -> None:
        self.root = Node(NodeKind.DIRECTORY, 0o755)

    def find_directory(self, parts: tuple[str, ...]) -> Node | None:
        """Return a directory, following links, or None if it does not exist."""
        return self._walk(parts, "/".join(parts), make=False)

    def find(self, parts: tuple[str, ...]) -> Node | None:
        """Return the node at a path, following links only among the parents."""
        if not parts:
            return self.root
        parent = self.find_directory(parts[:-1])
        return parent.children.get(parts[-1]) if parent else None

    def make_directory(self, parts: tuple[str, ...]) -> Node:
        """Return a directory, following links. Create what is missing, with mode 0755, owned by root."""
        found = self._walk(parts, "/".join(parts), make=True)
        assert found is not None
        return found

    def put(self, parts: tuple[str, ...], node: Node) -> None:
        """Add a node. A directory over a directory changes its attributes; anything else replaces what was there."""
        if not parts:
            self._put_root(node)
            return
        parent = self.make_directory(parts[:-1])
        old = parent.children.get(parts[-1])
        if old is not None and old.kind is node.kind is NodeKind.DIRECTORY:
            old.take_attributes(node)
        else:
            parent.children[parts[-1]] = node

    def walk(self) -> Iterator[tuple[str, Node]]:
        """Yield (path, node) in a fixed order: the root as "" first, parents before children."""
        pending = [("", self.root)]
        while pending:
            path, node = pending.pop()
            yield path, node
            prefix = f"{path}/" if path else ""
            pending.extend((f"{prefix}{name}", node.children[name]) for name in sorted(node.children, reverse=True))

    def _put_root(self, node: Node) -> None:
        if node.kind is not NodeKind.DIRECTORY:
            raise broken_layer("the root is not a directory", "/")
        self.root.take_attributes(node)

    def _walk(self, parts: tuple[str, ...], shown: str, *, make: bool) -> Node | None:
        trail, links = [self.root], 0
        pending = list(reversed(parts))
        while pending:
            name = pending.pop()
            if name == "..":
                _climb(trail, shown)
                continue
            child = trail[-1].children.get(name)
            if child is None and make:
                child = trail[-1].children[name] = Node(NodeKind.DIRECTORY, 0o755)
            if child is not None and child.kind is NodeKind.SYMLINK:
                links += 1
                _follow(child.target, links, trail, pending, shown)
            elif child is not None and child.kind is NodeKind.DIRECTORY:
                trail.append(child)
            elif child is not None and make:
                raise broken_layer(f"a parent is a {child.kind}", shown)
            else:
                return None
        return trail[-1]


def _climb(trail: list[Node], shown: str) -> None:
    if len(trail) == 1:
        raise broken_layer("a symbolic link among the parents leaves the root", shown)
    trail.pop()


def _follow(target: str, links: int, trail: list[Node], pending: list[str], shown: str) -> None:
    if links > _MAX_LINKS:
        raise broken_layer("too many symbolic links among the parents", shown)
    if target.startswith("/"):
        del trail[1:]
    pending.extend(part for part in reversed(target.split("/")) if part not in ("", "."))
