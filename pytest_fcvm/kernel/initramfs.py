"""Build the initramfs: the agent as /init, and the modules that are not built into the kernel. Reproducible.

Format: newc cpio, Documentation/driver-api/early-userspace/buffer-format.rst of the kernel. `/modules/order` lists the
module files, one a line, in the order in which the agent loads them.
"""

from __future__ import annotations

import stat
from pathlib import Path

from pytest_fcvm.kernel.modules import check_built_in, read_module, resolve_modules
from pytest_fcvm.kernel.sources import GuestKernel

__all__ = ["INITRAMFS_FORMAT", "build_initramfs"]

# Part of the cache key: increase it when the same agent and modules make another archive.
INITRAMFS_FORMAT = "2"
_DIRECTORIES = ("dev", "proc", "sys", "mnt", "newroot", "modules")
_DEVICES = {"dev/console": (0o600, 5, 1), "dev/null": (0o666, 1, 3)}


def build_initramfs(*, agent: Path, kernel: GuestKernel, dest: Path) -> None:
    """Write the initramfs for a kernel. The same agent and modules make the same bytes. A failure leaves no file.

    Raise HostError if the kernel lacks a module that every guest needs, or if a module cannot be decompressed here.
    """
    archive = _pack(agent, _numbered_modules(kernel))
    try:
        dest.write_bytes(archive)
    except BaseException:
        dest.unlink(missing_ok=True)
        raise


def _numbered_modules(kernel: GuestKernel) -> dict[str, bytes]:
    if kernel.modules_dir is None:
        check_built_in(kernel.bzimage)
        return {}
    modules = resolve_modules(kernel.modules_dir)
    return {f"{at:02}-{path.name.partition('.ko')[0]}.ko": read_module(path) for at, path in enumerate(modules)}


def _pack(agent: Path, modules: dict[str, bytes]) -> bytes:
    archive = _Archive()
    for directory in _DIRECTORIES:
        archive.add(directory, stat.S_IFDIR | 0o755)
    for name, (mode, major, minor) in _DEVICES.items():
        archive.add(name, stat.S_IFCHR | mode, device=(major, minor))
    archive.add("init", stat.S_IFREG | 0o755, agent.read_bytes())
    for name, content in modules.items():
        archive.add(f"modules/{name}", stat.S_IFREG | 0o644, content)
    archive.add("modules/order", stat.S_IFREG | 0o644, "".join(f"{name}\n" for name in modules).encode())
    return archive.close()


class _Archive:
    """A newc archive. Entries have time 0, owner 0 and consecutive inode numbers."""

    def __init__(self) -> None:
        self._content = bytearray()
        self._inode = 0

    def add(self, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        """Append an entry. Add a directory before its content. `device` is (major, minor) of a device node."""
        self._inode += 1
        links = 2 if stat.S_ISDIR(mode) else 1
        path = name.encode() + b"\0"
        # inode mode uid gid links mtime size, major and minor of the file's device, of a device node, name length,
        # checksum
        fields = (self._inode, mode, 0, 0, links, 0, len(data), 0, 0, *device, len(path), 0)
        self._append(b"070701" + b"".join(b"%08X" % field for field in fields) + path)
        self._append(data)

    def close(self) -> bytes:
        """Add the trailer and return the archive."""
        self.add("TRAILER!!!", 0)
        return bytes(self._content)

    def _append(self, data: bytes) -> None:
        self._content += data + bytes(-len(data) % 4)
