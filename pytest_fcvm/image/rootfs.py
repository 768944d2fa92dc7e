"""Build one squashfs file from a pulled image, without root: `mksquashfs - FILE -tar` reads the flattened layers."""

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
from pytest_fcvm.host.process import condense, killed_at_deadline, killed_with_us, resolve_tool, start_tool
from pytest_fcvm.image.contents import read_directory
from pytest_fcvm.image.layers import flatten, write_tree
from pytest_fcvm.image.reference import ImageKind
from pytest_fcvm.image.source import PulledImage
from pytest_fcvm.model.results import Progress

__all__ = ["ROOTFS_FORMAT", "build_rootfs"]

# Part of the cache key: change it when the bytes of a root filesystem change.
ROOTFS_FORMAT = "squashfs-lz4-2"

_DEADLINE_S = 1800.0
_MEMORY = "512M"
_PIPE_BYTES = 1 << 20
# lz4: an emulated guest reads 75 MB of an image's files in 2.4 s (zstd: 3.6 s, uncompressed: 2.3 s). The build is as
# fast as zstd's fastest; the file is a third larger. The kernels of Debian, Ubuntu and Firecracker read it.
_OPTIONS = (
    *("-tar", "-noappend", "-no-progress", "-quiet"),
    *("-comp", "lz4", "-b", "131072"),
    *("-mkfs-time", "0", "-root-mode", "0755", "-mem", _MEMORY),
    "-noI",  # uncompressed metadata: cheaper to read in the guest, and `_settle_root_time` can edit it
)
_SUPERBLOCK = struct.Struct("<4sIIIIHHHHHHQQQQQQQQ")  # Documentation/filesystems/squashfs.rst
_ROOT_INODE, _INODE_TABLE = 11, 15
_METADATA_PLAIN = 0x8000

Write = Callable[[bytes], object]


def build_rootfs(image: PulledImage, dest: Path, *, progress: Progress) -> None:
    """Write the image's root filesystem to `dest`. The same image makes the same bytes.

    Raise ImageError for invalid layers, HostError without mksquashfs, at the deadline and when the disk is full.
    Nothing is left at `dest` then.
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
            f"cannot build the root filesystem in {dest.parent}: {error.strerror}",
            hint="free disk space or name another --fcvm-cache-dir",
        ) from error
    except BaseException:
        dest.unlink(missing_ok=True)
        raise


def _settle_root_time(dest: Path) -> None:
    """Set the time of the root directory to 0, so that builds are reproducible.

    With -tar, mksquashfs 4.5.1 ignores -root-uid and -root-time: the root belongs to the caller and has the current
    time. The owner does not matter: the guest's overlay has its own root.
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
    """Run mksquashfs and yield a function that writes to it. Raise HostError when it fails."""
    tool = resolve_tool("mksquashfs", package="squashfs-tools")
    # mksquashfs refuses this variable together with -mkfs-time.
    variables = {name: value for name, value in environment().items() if name != "SOURCE_DATE_EPOCH"}
    command = [*killed_with_us(), tool, "-", dest, *_OPTIONS]
    with (
        tempfile.TemporaryFile(dir=dest.parent) as output,
        start_tool(command, stdin=subprocess.PIPE, stdout=output, stderr=output, env=variables) as process,
        killed_at_deadline(process, _DEADLINE_S) as late,
    ):
        assert process.stdin is not None
        with suppress(OSError):
            fcntl.fcntl(process.stdin.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        pipe_broke = False
        try:
            yield partial(_write_all, process.stdin.fileno())
        except BrokenPipeError:
            pipe_broke = True
        process.stdin.close()
        code = process.wait()
        if code or pipe_broke:
            raise _failure(output, code, dest, late=late.is_set())


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _failure(output: IO[bytes], code: int, dest: Path, *, late: bool) -> HostError:
    output.seek(0)
    text = output.read(64 * 1024).decode("utf-8", "replace")
    if "No space left" in text or "File too large" in text:
        return HostError(
            f"no room left in {dest.parent} for the root filesystem",
            hint="free disk space or name another --fcvm-cache-dir",
        )
    if late:
        return HostError(f"mksquashfs did not end within {_DEADLINE_S:.0f} s", hint="use a smaller image")
    how = f"exit code {code}" if code >= 0 else f"signal {-code}"
    return HostError(
        f"mksquashfs failed with {how}: {condense(text)}",
        hint="apt-get install squashfs-tools (4.5 or later)",
        evidence={"mksquashfs": text[-4000:]},
    )
