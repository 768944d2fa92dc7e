"""Reading kernel files, valid and broken."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_fcvm.errors import FcvmError, HostError, UsageProblem
from pytest_fcvm.kernel.decompress import unpack
from pytest_fcvm.kernel.vmlinux import extract_vmlinux, read_release

PACKINGS = ("gz", "xz", "zst", "lz4")


def test_the_release_of_a_bzimage_is_read(bzimage: Callable[..., Path]) -> None:
    assert read_release(bzimage("vmlinuz", b"", release="6.8.0-31-generic")) == "6.8.0-31-generic"


def test_the_release_of_a_vmlinux_is_read_from_its_banner(tmp_path: Path, vmlinux: Callable[..., bytes]) -> None:
    path = tmp_path / "vmlinux"
    path.write_bytes(b"\x7fELFLinux version %s\0" + vmlinux(release="6.12.117"))
    assert read_release(path) == "6.12.117"


@pytest.mark.parametrize("packing", PACKINGS)
def test_every_compression_gives_the_same_kernel(packing: str, bzimage: Callable[..., Path], tmp_path: Path) -> None:
    kernel = b"\x7fELF" + os.urandom(1000) + bytes(9 * 1024 * 1024)  # more than one block of legacy LZ4
    dest = tmp_path / "vmlinux"
    extract_vmlinux(bzimage("vmlinuz", kernel, packing=packing), dest)
    assert dest.read_bytes() == kernel


def test_a_vmlinux_is_copied_unchanged(tmp_path: Path, vmlinux: Callable[..., bytes]) -> None:
    (tmp_path / "vmlinux").write_bytes(vmlinux())
    extract_vmlinux(tmp_path / "vmlinux", tmp_path / "dest")
    assert (tmp_path / "dest").read_bytes() == vmlinux()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a bzImage"),
        (b"#!/bin/sh\n" * 1000, "is not a bzImage"),
        (bytes(0x202) + b"HdrS", "is not a bzImage"),
        (bytes(0x202) + b"HdrS" + bytes(4096), "has no valid release"),
        (b"\x7fELF" + bytes(4096), "has no valid release"),
    ],
)
def test_a_file_that_is_not_a_kernel_is_a_usage_problem(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(UsageProblem, match=message) as caught:
        read_release(path)
    assert "--fcvm-kernel" in caught.value.hint


@pytest.mark.parametrize(("name", "reason"), [("missing", "No such file"), (".", "Is a directory")])
def test_an_unreadable_file_is_a_usage_problem(name: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UsageProblem, match=reason):
        read_release(tmp_path / name)


@pytest.mark.parametrize("release", ["6.1/../../../etc", "../modules", "/etc"])
def test_a_release_that_leaves_its_directory_is_refused(release: str, bzimage: Callable[..., Path]) -> None:
    with pytest.raises(UsageProblem, match="has no valid release"):
        read_release(bzimage("vmlinuz", b"", release=release))


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_truncated_bzimage_is_reported(packing: str, bzimage: Callable[..., Path], tmp_path: Path) -> None:
    image = bzimage("vmlinuz", b"\x7fELF" + os.urandom(100_000), packing=packing)
    image.write_bytes(image.read_bytes()[:-50_000])
    with pytest.raises(UsageProblem, match="is truncated"):
        extract_vmlinux(image, tmp_path / "vmlinux")
    assert not (tmp_path / "vmlinux").exists()


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_truncated_stream_is_reported(packing: str, packed: Callable[[bytes, str], bytes]) -> None:
    stream = packed(os.urandom(100_000), packing)
    with pytest.raises(HostError, match=r"^the kernel in X cannot be unpacked: .") as caught:
        unpack(stream[:-50_000], what="the kernel in X")
    assert "--fcvm-kernel" in caught.value.hint


@pytest.mark.parametrize("packing", ["gz", "xz"])
def test_a_broken_stream_is_reported(packing: str, packed: Callable[[bytes, str], bytes]) -> None:
    stream = bytearray(packed(os.urandom(1000), packing))
    stream[100:900] = bytes(800)
    with pytest.raises(HostError, match=r"^the kernel in X cannot be unpacked: ."):
        unpack(bytes(stream), what="the kernel in X")


def test_the_content_must_be_a_kernel(bzimage: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(HostError, match="contains no ELF kernel"):
        extract_vmlinux(bzimage("vmlinuz", b"something else"), tmp_path / "vmlinux")


def test_a_full_disk_leaves_no_partial_kernel(bzimage: Callable[..., Path], tmp_path: Path) -> None:
    dest = tmp_path / "vmlinux"
    dest.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        extract_vmlinux(bzimage("vmlinuz", b"\x7fELF"), dest)
    assert not dest.is_symlink()


def test_an_unknown_compression_is_reported_with_its_first_bytes(bzimage: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"unknown compression \(it begins with 425a68"):
        extract_vmlinux(bzimage("vmlinuz", b"BZh91AY", packing="none"), tmp_path / "vmlinux")


@pytest.mark.parametrize(("packing", "tool"), [("zst", "zstd"), ("lz4", "lz4")])
def test_a_missing_command_is_reported_with_its_package(
    packing: str, tool: str, bzimage: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = bzimage("vmlinuz", b"\x7fELF", packing=packing)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FcvmError, match=f"{tool} is not installed") as caught:
        extract_vmlinux(image, tmp_path / "vmlinux")
    assert caught.value.hint == f"apt-get install {tool}"
