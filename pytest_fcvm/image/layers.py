"""Flatten an image's layers into one tar stream that has every path once.

The rules are those of OCI's image-spec layer.md: `.wh.NAME` removes NAME of the lower layers, `.wh..wh..opq` removes
all that lower layers have in its directory, wherever the whiteout is in its layer. So the steps for a layer are: read
its members, apply its whiteouts to the tree of the lower layers, add its members.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from pytest_fcvm.errors import ImageError
from pytest_fcvm.host.own import os
from pytest_fcvm.image.blobs import LayerBlob, spool_layer
from pytest_fcvm.image.contents import Contents, LayerContents
from pytest_fcvm.image.headers import BLOCK, END_OF_ARCHIVE, member_header
from pytest_fcvm.image.members import Limits, Member, read_members
from pytest_fcvm.image.tree import Node, NodeKind, RootTree, broken_layer

__all__ = ["flatten", "write_tree"]

_WHITEOUT = ".wh."
_META = ".wh..wh."  # aufs' own files; only the opaque marker matters
_OPAQUE = ".wh..wh..opq"

Write = Callable[[bytes], object]


def flatten(
    blobs: Sequence[LayerBlob], write: Write, *, directory: Path, whiteouts: bool = True, limits: Limits | None = None
) -> None:
    """Write the layers, lowest first, as one uncompressed tar stream. The same layers make the same bytes.

    `directory` holds the decompressed copies meanwhile. `whiteouts=False` is for a plain root filesystem. Raise
    ImageError for layers that are damaged, leave the root or exceed the limits.
    """
    with ExitStack() as stack:
        tree, contents = _read_layers(blobs, stack, directory=directory, whiteouts=whiteouts, limits=limits or Limits())
        write_tree(tree, contents, write)


def _read_layers(
    blobs: Sequence[LayerBlob], stack: ExitStack, *, directory: Path, whiteouts: bool, limits: Limits
) -> tuple[RootTree, LayerContents]:
    """Return the file system of the layers and its contents. `stack` closes their files."""
    tree, files = RootTree(), list[IO[bytes]]()
    budget = _Budget(limits)
    for number, blob in enumerate(blobs):
        file = stack.enter_context(spool_layer(blob, directory, max_bytes=budget.bytes))
        budget.spend_bytes(os.fstat(file.fileno()).st_size)
        files.append(file)
        members = []
        for member in read_members(file, number, limits):
            budget.spend(member)
            members.append(member)
        _apply(tree, members, whiteouts=whiteouts)
    return tree, LayerContents(files)


def write_tree(tree: RootTree, contents: Contents, write: Write) -> None:
    """Write a file system as a tar stream in the order of its walk. Leave out the root: mksquashfs makes its own."""
    first_names: dict[Node, str] = {}
    for path, node in tree.walk():
        if node.kind is NodeKind.DIRECTORY:
            if path:
                write(member_header(path, node))
            continue
        known = first_names.setdefault(node, path)
        if known is not path:
            write(member_header(path, node, link=known))
            continue
        write(member_header(path, node))
        if node.kind is NodeKind.FILE:
            for chunk in contents.chunks(node):
                write(chunk)
            write(bytes(-node.size % BLOCK))
    write(END_OF_ARCHIVE)


class _Budget:
    def __init__(self, limits: Limits) -> None:
        self.entries, self.bytes = limits.entries, limits.unpacked_bytes

    def spend_bytes(self, count: int) -> None:
        self.bytes -= count
        if self.bytes < 0:
            raise ImageError("the image unpacks to more than the limit", hint="use a smaller image")

    def spend(self, member: Member) -> None:
        self.entries -= 1
        if self.entries < 0:
            raise ImageError("the image has too many files", hint="use a smaller image")
        if member.node is not None and member.node.size:
            self.spend_bytes(member.node.size - sum(extent.length for extent in member.node.extents))


def _apply(tree: RootTree, members: Sequence[Member], *, whiteouts: bool) -> None:
    removed: dict[tuple[str, ...], Node] = {}
    kept = members
    if whiteouts:
        kept = [member for member in members if not _is_marker(member.parts)]
        made = {member.parts for member in members if member.node and member.node.kind is NodeKind.DIRECTORY}
        # Shallow ones first: removing a parent removes what is below it.
        for parts in sorted((member.parts for member in members if _is_marker(member.parts)), key=len):
            if not _was_link(tree, parts[:-1], made):
                _remove(tree, parts, removed)
    for member in kept:
        node = member.node
        if node is None:
            node = _linked(tree, member, removed)
        if not (node.kind is NodeKind.CHARACTER and node.device == (0, 0)):  # overlayfs' own whiteout
            tree.put(member.parts, node)


def _is_marker(parts: tuple[str, ...]) -> bool:
    return any(part.startswith(_META) for part in parts) or (bool(parts) and parts[-1].startswith(_WHITEOUT))


def _was_link(tree: RootTree, parts: tuple[str, ...], made: set[tuple[str, ...]]) -> bool:
    """Say whether the layer replaces a link in the path by a directory; the whiteout then does not follow the link."""
    for depth in range(1, len(parts) + 1):
        if parts[:depth] in made:
            old = tree.find(parts[:depth])
            if old is not None and old.kind is NodeKind.SYMLINK:
                return True
    return False


def _remove(tree: RootTree, parts: tuple[str, ...], removed: dict[tuple[str, ...], Node]) -> None:
    *above, name = parts
    if any(part.startswith(_META) for part in above) or (name.startswith(_META) and name != _OPAQUE):
        return
    directory = tree.find_directory(tuple(above))
    if name == _OPAQUE:
        if directory is not None:
            removed.update({(*above, child): node for child, node in directory.children.items()})
            directory.children.clear()
        return
    hidden = name.removeprefix(_WHITEOUT)
    if hidden in ("", ".", ".."):
        raise broken_layer("whiteout without a name", "/".join(parts))
    if directory is not None and (node := directory.children.pop(hidden, None)) is not None:
        removed[*above, hidden] = node


def _linked(tree: RootTree, member: Member, removed: dict[tuple[str, ...], Node]) -> Node:
    """Return the node that a hard link names, even if this layer whites it out."""
    node = tree.find(member.link) or _find_removed(removed, member.link)
    if node is None:
        raise broken_layer(
            f"hard link to {'/'.join(member.link)[:100]!r}, which does not exist", "/".join(member.parts)
        )
    if node.kind is NodeKind.DIRECTORY:
        raise broken_layer("hard link to a directory", "/".join(member.parts))
    return node


def _find_removed(removed: dict[tuple[str, ...], Node], parts: tuple[str, ...]) -> Node | None:
    for depth in range(len(parts), 0, -1):
        node = removed.get(parts[:depth])
        for name in parts[depth:]:
            node = node.children.get(name) if node else None
        if node is not None:
            return node
    return None
