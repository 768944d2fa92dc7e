"""A pulled image as one squashfs file, without root: `mksquashfs - FILE -tar` reads the flattened layers."""

from __future__ import annotations

import fcntl
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO

from pytest_fcvm.errors import HostError
from pytest_fcvm.host.own import environment, os, subprocess
from pytest_fcvm.host.process import condense, ends_with_us, killed_at_deadline, resolve_tool, start_tool
from pytest_fcvm.image.contents import read_directory
from pytest_fcvm.image.layers import flatten, write_tree
from pytest_fcvm.image.reference import ImageKind
from pytest_fcvm.image.source import PulledImage

__all__ = ["ROOTFS_FORMAT", "build_rootfs"]

# Part of the cache's key: change it with anything that changes the bytes of a root filesystem.
ROOTFS_FORMAT = "squashfs-lz4-2"

_DEADLINE_S = 1800.0
_MEMORY = "512M"
_PIPE_BYTES = 1 << 20
# lz4: an emulated guest reads 75 MB of an image's files in 2.4 s, with zstd in 3.6 s, uncompressed in 2.3 s; it is
# built as fast as zstd at its fastest, and a third larger. Debian's, Ubuntu's and Firecracker's kernels all read it.
_OPTIONS = (
    *("-tar", "-noappend", "-no-progress", "-quiet"),
    *("-comp", "lz4", "-b", "131072"),
    *("-mkfs-time", "0", "-root-mode", "0755", "-mem", _MEMORY),
    "-noI",  # metadata is cheaper to read in the guest, and the root's time can be set (`_settle_root_time`)
)
_SUPERBLOCK = struct.Struct("<4sIIIIHHHHHHQQQQQQQQ")  # Documentation/filesystems/squashfs.rst
_ROOT_INODE, _INODE_TABLE = 11, 15
_METADATA_PLAIN = 0x8000

Write = Callable[[bytes], object]


def build_rootfs(image: PulledImage, dest: Path, *, progress: Callable[[str], None]) -> None:
    """Write the image's root filesystem to `dest`, the same bytes for the same image.

    Raise ImageError for layers that are not sound, HostError without mksquashfs, at the deadline and when the disk is
    full. Nothing is left at `dest` then.
    """
    layers = image.layers
    progress(f"unpacking {len(layers)} layers" if layers else "reading the directory")
    try:
        with _squashing(dest) as write:
            if image.reference.kind is ImageKind.ROOTFS_DIR:
                assert image.reference.path is not None
                tree, contents = read_directory(image.reference.path)
                write_tree(tree, contents, write)
            else:
                flatten(layers, write, directory=dest.parent, whiteouts=not image.reference.kind.is_rootfs)
        _settle_root_time(dest)
    except OSError as error:
        dest.unlink(missing_ok=True)
        raise HostError(
            f"the root filesystem cannot be built in {dest.parent}: {error.strerror}",
            hint="free some disk or name another --fcvm-cache-dir",
        ) from error
    except BaseException:
        dest.unlink(missing_ok=True)
        raise


def _settle_root_time(dest: Path) -> None:
    """Set the root's time to 0.

    For a tar mksquashfs 4.5.1 heeds neither -root-uid nor -root-time: the root is its caller's, of today. The owner is
    never seen (the guest's overlay has a root of its own); the time would make every build another file.
    """
    with dest.open("r+b") as file:
        fields = _SUPERBLOCK.unpack(file.read(_SUPERBLOCK.size))
        block, offset = fields[_INODE_TABLE] + (fields[_ROOT_INODE] >> 16), fields[_ROOT_INODE] & 0xFFFF
        file.seek(block)
        (length,) = struct.unpack("<H", file.read(2))
        if length & _METADATA_PLAIN:
            file.seek(block + 2 + offset + 8)  # after type, mode, owner and group, two bytes each
            file.write(bytes(4))


@contextmanager
def _squashing(dest: Path) -> Iterator[Write]:
    """Run mksquashfs; yield the function that feeds it. Raise HostError when it fails."""
    tool = resolve_tool("mksquashfs", package="squashfs-tools")
    # It refuses to run with this variable beside -mkfs-time.
    variables = {name: value for name, value in environment().items() if name != "SOURCE_DATE_EPOCH"}
    command = [*ends_with_us(), tool, "-", dest, *_OPTIONS]
    with (
        tempfile.TemporaryFile(dir=dest.parent) as words,
        start_tool(command, stdin=subprocess.PIPE, stdout=words, stderr=words, env=variables) as process,
        killed_at_deadline(process, _DEADLINE_S) as late,
    ):
        assert process.stdin is not None
        with suppress(OSError):
            fcntl.fcntl(process.stdin.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        broken = False
        try:
            yield partial(_write_all, process.stdin.fileno())
        except BrokenPipeError:
            broken = True
        process.stdin.close()
        code = process.wait()
        if code or broken:
            raise _failure(words, code, dest, late=late.is_set())


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _failure(words: IO[bytes], code: int, dest: Path, *, late: bool) -> HostError:
    words.seek(0)
    text = words.read(64 * 1024).decode("utf-8", "replace")
    if "No space left" in text or "File too large" in text:
        return HostError(
            f"no room left in {dest.parent} for the root filesystem",
            hint="free some disk or name another --fcvm-cache-dir",
        )
    if late:
        return HostError(f"mksquashfs did not end within {_DEADLINE_S:.0f} s", hint="use a smaller image")
    how = f"exit code {code}" if code >= 0 else f"signal {-code}"
    return HostError(
        f"mksquashfs failed with {how}: {condense(text)}",
        hint="apt-get install squashfs-tools (4.5 or later)",
        evidence={"mksquashfs": text[-4000:]},
    )
