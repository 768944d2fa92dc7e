"""The sources of file contents: the tar files of layers, or a directory of this host."""

from __future__ import annotations

import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Protocol

from pytest_fcvm.errors import HostError, ImageError
from pytest_fcvm.host.own import os
from pytest_fcvm.image.tree import Node, NodeKind, RootTree, broken_layer, split_name

__all__ = ["Contents", "DirectoryContents", "LayerContents", "read_directory"]

_CHUNK = 1 << 20
_ZEROS = bytes(_CHUNK)
_MAX_PATH = 4096
_KINDS = {
    stat.S_IFREG: NodeKind.FILE,
    stat.S_IFDIR: NodeKind.DIRECTORY,
    stat.S_IFLNK: NodeKind.SYMLINK,
    stat.S_IFCHR: NodeKind.CHARACTER,
    stat.S_IFBLK: NodeKind.BLOCK,
    stat.S_IFIFO: NodeKind.FIFO,
}


class Contents(Protocol):
    """A source of file contents."""

    def chunks(self, node: Node) -> Iterator[bytes]:
        """Yield a file's content, `node.size` bytes in all, holes as zeros."""
        ...


class LayerContents:
    """The layers' tar files, in the order of `Node.layer`."""

    def __init__(self, files: Sequence[IO[bytes]]) -> None:
        self._files = files

    def chunks(self, node: Node) -> Iterator[bytes]:
        """Yield a file's content from its layer."""
        position = 0
        for extent in node.extents:
            yield from _zeros(extent.start - position)
            yield from _pread(self._files[node.layer].fileno(), extent.offset, extent.length)
            position = extent.start + extent.length
        yield from _zeros(node.size - position)


class DirectoryContents:
    """The files of a directory of this host."""

    def __init__(self, paths: Mapping[Node, Path], stamps: Mapping[Node, str]) -> None:
        self._paths, self._stamps = paths, stamps

    def stamp(self, node: Node) -> str:
        """Return a string that changes when the file changes."""
        return self._stamps.get(node, "")

    def chunks(self, node: Node) -> Iterator[bytes]:
        """Yield a file's content. Raise ImageError if the file's size has changed since `read_directory`."""
        path = self._paths[node]
        try:
            with path.open("rb", buffering=0) as file:
                if os.fstat(file.fileno()).st_size != node.size:
                    raise ImageError(f"{path} changed while it was read", hint="run again when no program writes to it")
                yield from _pread(file.fileno(), 0, node.size)
        except OSError as error:
            raise _unreadable(path, error) from error


def read_directory(root: Path) -> tuple[RootTree, DirectoryContents]:
    """Return the tree of a directory of this host. Root owns the files that belong to the caller.

    Leave out sockets. Raise HostError for what cannot be read.
    """
    tree, paths, stamps, known = RootTree(), {}, {}, dict[tuple[int, int], Node]()
    for path in sorted(_walk(root)):
        status = path.lstat()
        kind = _KINDS.get(stat.S_IFMT(status.st_mode))
        if kind is None:
            continue
        inode = (status.st_dev, status.st_ino)
        node = known.get(inode) if kind is not NodeKind.DIRECTORY else None
        if node is None:
            node = known[inode] = _node(path, kind, status)
            paths[node], stamps[node] = path, f"{inode} {status.st_mtime_ns} {status.st_ctime_ns}"
        tree.put(split_name(str(path.relative_to(root)), max_path=_MAX_PATH), node)
    return tree, DirectoryContents(paths, stamps)


def _walk(root: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise _unreadable(Path(str(error.filename)), error) from error

    yield root
    for directory, directories, files in os.walk(root, onerror=refuse):
        yield from (Path(directory, name) for name in (*directories, *files))


def _node(path: Path, kind: NodeKind, status: os.stat_result) -> Node:
    ours = os.geteuid()
    node = Node(kind, stat.S_IMODE(status.st_mode), mtime=min(max(int(status.st_mtime), 0), 0xFFFFFFFF))
    node.uid = 0 if status.st_uid == ours else status.st_uid
    node.gid = 0 if ours and status.st_gid == os.getegid() else status.st_gid
    if kind is NodeKind.FILE:
        node.size = status.st_size
    elif kind is NodeKind.SYMLINK:
        node.target = str(path.readlink())
    elif kind in (NodeKind.CHARACTER, NodeKind.BLOCK):
        node.device = (os.major(status.st_rdev), os.minor(status.st_rdev))
    if kind is not NodeKind.SYMLINK:
        node.xattrs = _xattrs(path)
    return node


def _xattrs(path: Path) -> dict[str, bytes]:
    try:
        names = [name for name in os.listxattr(path) if name.startswith(("user.", "security.capability"))]
        return {name: os.getxattr(path, name) for name in names if not name.startswith("user.overlay.")}
    except OSError:
        return {}  # the file system has no xattrs


def _unreadable(path: Path, error: OSError) -> HostError:
    return HostError(
        f"{path} cannot be read: {error.strerror}",
        hint="name a root filesystem that this user may read, or a tar of it",
    )


def _zeros(count: int) -> Iterator[bytes]:
    while count > 0:
        yield _ZEROS[: min(count, _CHUNK)]
        count -= _CHUNK


def _pread(descriptor: int, offset: int, length: int) -> Iterator[bytes]:
    end = offset + length
    while offset < end:
        chunk = os.pread(descriptor, min(_CHUNK, end - offset), offset)
        if not chunk:
            raise broken_layer("a file was truncated while it was read", f"byte {offset}")
        yield chunk
        offset += len(chunk)
