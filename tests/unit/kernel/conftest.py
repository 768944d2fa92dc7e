"""Small kernels, modules and packages with the layout of real ones, and an apt that serves them."""

from __future__ import annotations

import gzip
import lzma
import os
import shutil
import stat
import struct
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

RELEASE = "6.1.0-56-cloud-amd64"
MARKS = (b"virtio-mmio\0", b"virtio_blk\0", b"virtio_console\0", b"squashfs\0", b"overlay\0")
# The dependencies of each module, as in Debian's kernel.
MODULES = {
    "drivers/virtio/virtio_ring": "",
    "drivers/virtio/virtio": "virtio_ring",
    "drivers/virtio/virtio_mmio": "virtio,virtio_ring",
    "drivers/block/virtio_blk": "virtio_ring,virtio",
    "drivers/char/virtio_console": "virtio_ring,virtio",
    "drivers/char/hw_random/virtio-rng": "virtio_ring,virtio",
    "drivers/net/net_failover": "failover",
    "net/core/failover": "",
    "drivers/net/virtio_net": "net_failover,virtio_ring,virtio",
    "fs/squashfs/squashfs": "",
    "fs/overlayfs/overlay": "",
    "fs/xfs/xfs": "libcrc32c",
}


def pack(content: bytes, packing: str) -> bytes:
    """Return the bytes compressed as by the kernel build."""
    match packing:
        case "gz":
            return gzip.compress(content, mtime=0)
        case "xz":
            return lzma.compress(content, check=lzma.CHECK_CRC32)
        case "zst" | "lz4":
            command = ["zstd", "-qc"] if packing == "zst" else ["lz4", "-lqc"]
            if shutil.which(command[0]) is None:
                pytest.skip(f"{command[0]} is not installed")
            return subprocess.run(command, input=content, capture_output=True, check=True).stdout
        case _:
            return content


def make_bzimage(path: Path, kernel: bytes, *, packing: str = "gz", release: str = RELEASE) -> Path:
    """Write a bzImage: one sector of setup code after the boot sector, then the packed kernel and its size."""
    payload = pack(kernel, packing)
    if packing != "gz":
        payload += struct.pack("<I", len(kernel))
    setup = bytearray(2 * 512)
    setup[0x1F1] = 1
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", setup, 0x20E, 0x100)
    banner = f"{release} (builder) #1 SMP".encode()
    setup[0x300 : 0x300 + len(banner)] = banner
    struct.pack_into("<II", setup, 0x248, 0, len(payload))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(setup) + payload)
    return path


def make_vmlinux(*marks: bytes, release: str = RELEASE) -> bytes:
    """Return the start of an ELF kernel with some drivers built in."""
    return b"\x7fELF" + b"".join(marks) + f"Linux version {release} (builder@host) (gcc) #1".encode() + bytes(64)


def make_module(depends: str) -> bytes:
    """Return a module with only the .modinfo that is read."""
    return b"\x7fELF...license=GPL\0depends=" + depends.encode() + b"\0retpoline=Y\0"


def make_tree(
    directory: Path, *, without: tuple[str, ...] = (), built_in: tuple[str, ...] = (), packing: str = ""
) -> Path:
    """Make a /lib/modules/RELEASE directory."""
    directory.mkdir(parents=True)
    for name, depends in MODULES.items():
        if not name.endswith(without) and not name.endswith(built_in):
            path = directory / "kernel" / f"{name}.ko{'.' + packing if packing else ''}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(pack(make_module(depends), packing))
    listed = [f"kernel/{name}.ko\n" for name in MODULES if name.endswith(built_in)]
    (directory / "modules.builtin").write_text("".join(listed))
    return directory


@dataclass
class Apt:
    """Commands apt-cache and apt-get with the output of the real ones, for packages built by the real dpkg-deb."""

    commands: Path
    archive: Path

    def add(self, name: str, root: Path | None, depends: tuple[str, ...] = ()) -> None:
        """Publish a package; a meta package has no `root`."""
        root = root or self.archive.parent / f"meta-{name}"
        (root / "DEBIAN").mkdir(parents=True)
        (root / "DEBIAN").chmod(0o755)  # dpkg-deb requires this mode
        (root / "DEBIAN/control").write_text(
            f"Package: {name}\nVersion: 6.1.192-2\nArchitecture: amd64\nMaintainer: nobody\nDescription: test\n"
        )
        target = self.archive / f"{name}_6.1.192-2_amd64.deb"
        subprocess.run(
            ["dpkg-deb", "--root-owner-group", "-Znone", "-b", root, target], check=True, capture_output=True
        )
        (self.archive / name).write_text(f"{name}\n" + "".join(f"{line}\n" for line in depends))

    def during_download(self, script: str) -> None:
        """Let apt-get run a shell script before it copies the package."""
        (self.archive / "during-download").write_text(script)


_APT_CACHE = """#!/bin/sh
# apt-cache depends --important NAME; translated unless LC_ALL=C
[ "$1 $2" = "depends --important" ] || exit 2
[ -f "{archive}/$3" ] || {{ echo "E: No packages found" >&2; exit 100; }}
if [ "$LC_ALL" = C ]; then cat "{archive}/$3"; else sed s/Depends:/Hängt-ab-von:/ "{archive}/$3"; fi
"""
_APT_GET = """#!/bin/sh
[ "$1" = download ] || exit 2
shift
if [ -f "{archive}/during-download" ]; then . "{archive}/during-download"; fi
for name; do cp "{archive}/$name"_*.deb . || exit 100; done
"""


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Apt:
    """An apt without packages, first on PATH."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("dpkg-deb is not installed (not a Debian)")
    apt = Apt(commands=tmp_path / "bin", archive=tmp_path / "archive")
    apt.commands.mkdir()
    apt.archive.mkdir()
    for name, text in (("apt-cache", _APT_CACHE), ("apt-get", _APT_GET)):
        path = apt.commands / name
        path.write_text(text.format(archive=apt.archive))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{apt.commands}{os.pathsep}{os.environ['PATH']}")
    return apt


@pytest.fixture
def debian(apt: Apt, tmp_path: Path) -> Apt:
    """An apt with a Debian cloud kernel: the modules are in the image's package."""
    root = tmp_path / "linux-image"
    make_bzimage(root / f"boot/vmlinuz-{RELEASE}", make_vmlinux())
    make_tree(root / "lib/modules" / RELEASE)
    apt.add("linux-image-cloud-amd64", None, (f"  Depends: linux-image-{RELEASE}",))
    alternatives = ("  Depends: kmod", "  Depends: linux-base", " |Depends: initramfs-tools", "  Depends: <initramfs>")
    apt.add(f"linux-image-{RELEASE}", root, alternatives)
    return apt


@pytest.fixture
def bzimage(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a bzImage at a path relative to the test's directory."""

    def make(name: str, kernel: bytes, **options: str) -> Path:
        return make_bzimage(tmp_path / name, kernel, **options)

    return make


@pytest.fixture
def vmlinux() -> Callable[..., bytes]:
    """Return the function that makes an ELF kernel; `all_built_in` is one that needs no modules."""
    return make_vmlinux


@pytest.fixture
def all_built_in() -> bytes:
    """An ELF kernel that needs no modules."""
    return make_vmlinux(*MARKS)


@pytest.fixture
def modules_tree() -> Callable[..., Path]:
    """Return the function that makes a /lib/modules/RELEASE directory."""
    return make_tree


@pytest.fixture
def packed() -> Callable[[bytes, str], bytes]:
    """Return the function that compresses as the kernel build does."""
    return pack
