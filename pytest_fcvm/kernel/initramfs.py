"""The initramfs: the agent as /init and the modules that the kernel does not have built in. Reproducible.

Format: newc cpio, Documentation/driver-api/early-userspace/buffer-format.rst of the kernel. It is left uncompressed: an
emulated guest unpacks slower than the host copies.
"""

from __future__ import annotations

import stat
from pathlib import Path
from typing import BinaryIO

from pytest_fcvm.kernel.modules import read_module, resolve_modules
from pytest_fcvm.kernel.sources import GuestKernel

__all__ = ["INITRAMFS_FORMAT", "build_initramfs"]

INITRAMFS_FORMAT = "1"
_FOLDERS = ("dev", "proc", "sys", "mnt", "newroot", "modules")
_DEVICES = {"dev/console": (5, 1), "dev/null": (1, 3)}


def build_initramfs(*, agent: Path, kernel: GuestKernel, dest: Path) -> None:
    """Write the initramfs for a kernel. Raise HostError when the kernel lacks a module that every guest needs."""
    modules = resolve_modules(kernel.modules_dir) if kernel.modules_dir else []
    names = [f"{number:02}-{path.name.partition('.ko')[0]}.ko" for number, path in enumerate(modules)]
    with dest.open("wb") as file:
        archive = _Archive(file)
        for folder in _FOLDERS:
            archive.add(folder, stat.S_IFDIR | 0o755)
        for name, device in _DEVICES.items():
            archive.add(name, stat.S_IFCHR | 0o600, device=device)
        archive.add("init", stat.S_IFREG | 0o755, agent.read_bytes())
        for name, path in zip(names, modules, strict=True):
            archive.add(f"modules/{name}", stat.S_IFREG | 0o644, read_module(path))
        archive.add("modules/order", stat.S_IFREG | 0o644, "".join(f"{name}\n" for name in names).encode())
        archive.close()


class _Archive:
    """A newc archive whose entries have no time, owner 0 and numbers in order."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._number = 0

    def add(self, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self._number += 1
        links = 2 if stat.S_ISDIR(mode) else 1
        encoded = name.encode() + b"\0"
        fields = (self._number, mode, 0, 0, links, 0, len(data), 0, 0, *device, len(encoded), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields)
        self._file.write(_padded(header + encoded) + _padded(data))

    def close(self) -> None:
        self.add("TRAILER!!!", 0)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
