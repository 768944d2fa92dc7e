"""Which modules a guest gets, and in which order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_fcvm.errors import HostError
from pytest_fcvm.kernel.modules import check_built_in, find_lacking, read_module, resolve_modules

Tree = Callable[..., Path]


def names(tree: Path) -> list[str]:
    return [path.name.split(".")[0] for path in resolve_modules(tree)]


def test_modules_come_after_their_dependencies(tmp_path: Path, modules_tree: Tree) -> None:
    assert names(modules_tree(tmp_path / "tree")) == [
        "virtio_ring", "virtio", "virtio_mmio", "virtio_blk", "virtio_console", "squashfs", "overlay",
        "failover", "net_failover", "virtio_net", "virtio-rng",
    ]  # fmt: skip


def test_a_guest_gets_the_modules_that_programs_use(tmp_path: Path, modules_tree: Tree) -> None:
    tree = modules_tree(tmp_path / "tree")
    assert "nftables" in find_lacking(tree)
    plain = next(tree.rglob("xfs.ko"))
    for name in ("nf_tables", "tun", "nls_iso8859-1"):
        plain.with_name(f"{name}.ko").write_bytes(plain.read_bytes())
    assert {"nf_tables", "tun", "nls_iso8859-1"} <= set(names(tree))
    assert "nftables" not in find_lacking(tree)


def test_other_modules_are_left_out(tmp_path: Path, modules_tree: Tree) -> None:
    tree = modules_tree(tmp_path / "tree")
    assert list(tree.rglob("xfs.ko"))
    assert "xfs" not in names(tree)


def test_built_in_modules_are_not_loaded(tmp_path: Path, modules_tree: Tree) -> None:
    tree = modules_tree(tmp_path / "tree", built_in=("virtio_ring", "virtio", "virtio_mmio", "virtio_net", "overlay"))
    assert names(tree) == ["virtio_blk", "virtio_console", "squashfs", "virtio-rng"]


def test_drivers_of_optional_devices_may_be_missing(tmp_path: Path, modules_tree: Tree) -> None:
    tree = modules_tree(tmp_path / "tree", without=("virtio_net", "virtio-rng"))
    assert names(tree)[-1] == "overlay"


def test_missing_required_modules_are_reported(tmp_path: Path, modules_tree: Tree) -> None:
    tree = modules_tree(tmp_path / "tree", without=("squashfs", "virtio_mmio"))
    with pytest.raises(HostError, match="has no virtio_mmio, squashfs\n") as caught:
        resolve_modules(tree)
    assert "--fcvm-kernel" in caught.value.hint


@pytest.mark.parametrize("packing", ["xz", "gz", "zst"])
def test_compressed_modules_are_handled_like_plain_ones(packing: str, tmp_path: Path, modules_tree: Tree) -> None:
    plain = resolve_modules(modules_tree(tmp_path / "plain"))
    packed = resolve_modules(modules_tree(tmp_path / "packed", packing=packing))
    assert [path.name for path in packed] == [f"{path.name}.{packing}" for path in plain]
    assert [read_module(path) for path in packed] == [read_module(path) for path in plain]


def test_a_broken_compressed_module_is_reported(tmp_path: Path, modules_tree: Tree) -> None:
    tree = modules_tree(tmp_path / "tree", packing="xz")
    path = next(tree.rglob("virtio_blk.ko.xz"))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(HostError, match=r"the module .*virtio_blk\.ko\.xz cannot be unpacked"):
        resolve_modules(tree)


def test_a_kernel_with_all_built_in_needs_no_modules(bzimage: Callable[..., Path], all_built_in: bytes) -> None:
    check_built_in(bzimage("vmlinuz", all_built_in))


def test_a_kernel_without_its_modules_is_refused(bzimage: Callable[..., Path], vmlinux: Callable[..., bytes]) -> None:
    image = bzimage("vmlinuz", vmlinux(b"virtio_blk\0", b"overlay\0"))
    with pytest.raises(HostError, match="comes without modules and has no virtio_mmio, virtio_console, squashfs\n"):
        check_built_in(image)


def test_a_kernel_that_cannot_be_decompressed_is_accepted(bzimage: Callable[..., Path]) -> None:
    check_built_in(bzimage("vmlinuz", b"BZh91AY", packing="none"))
