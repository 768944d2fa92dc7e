"""Kernel modules: which files a guest needs, in the order in which they can be loaded.

A freshly unpacked kernel package has no modules.dep (depmod makes it at installation), so dependencies are read from
the modules themselves: `depends=` in the .modinfo section, names separated by commas (kernel/module, MODULE_INFO).
"""

from __future__ import annotations

import lzma
import re
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path

from pytest_fcvm.errors import HostError
from pytest_fcvm.host.process import resolve_tool

__all__ = ["read_module", "resolve_modules"]

_REQUIRED = ("virtio_mmio", "virtio_blk", "virtio_console", "squashfs", "overlay")
_WELCOME = ("virtio_net", "virtio_rng", "vmw_vsock_virtio_transport", "dummy", "tcp_diag")
_MODULE = re.compile(r"(?P<name>.+)\.ko(?:\.(?:xz|zst|gz))?")
_DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")


def resolve_modules(tree: Path) -> list[Path]:
    """Return the module files a guest needs, dependencies first, those built in left out.

    `tree` is a /lib/modules/RELEASE folder. Raise HostError when a module that no guest can do without is missing.
    """
    files = {_name_of(path): path for path in tree.rglob("*.ko*") if _MODULE.fullmatch(path.name)}
    built_in = set(_built_in(tree))
    ordered: dict[str, Path] = {}
    for wanted in _REQUIRED + _WELCOME:
        if wanted in files:
            _add(wanted, files, ordered)
        elif wanted in _REQUIRED and wanted not in built_in:
            raise HostError(f"the guest kernel in {tree} has no {wanted}", hint="use another --fcvm-kernel")
    return list(ordered.values())


def read_module(path: Path) -> bytes:
    """Return a module as the kernel loads it, unpacked. Raise HostError when the tool for it is missing."""
    data = path.read_bytes()
    match path.suffix:
        case ".xz":
            return lzma.decompress(data)
        case ".gz":
            return zlib.decompress(data, zlib.MAX_WBITS | 16)
        case ".zst":
            zstd = resolve_tool("zstd", package="zstd")
            return subprocess.run([zstd, "-dc", path], stdin=subprocess.DEVNULL, capture_output=True, check=True).stdout
    return data


def _add(name: str, files: dict[str, Path], ordered: dict[str, Path]) -> None:
    if name in ordered or name not in files:
        return
    match = _DEPENDS.search(b"\0" + read_module(files[name]))
    for needed in match[1].decode().split(",") if match else ():
        _add(_plain(needed), files, ordered)
    ordered[name] = files[name]


def _built_in(tree: Path) -> Iterator[str]:
    listing = tree / "modules.builtin"
    if listing.exists():
        yield from (_name_of(Path(line)) for line in listing.read_text().split())


def _name_of(path: Path) -> str:
    match = _MODULE.fullmatch(path.name)
    return _plain(match["name"] if match else path.stem)


def _plain(name: str) -> str:
    return name.replace("-", "_")
