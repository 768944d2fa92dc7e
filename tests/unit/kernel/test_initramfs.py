"""The initramfs, read back by the rules of its format."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from pytest_fcvm.errors import HostError
from pytest_fcvm.kernel.initramfs import build_initramfs
from pytest_fcvm.kernel.sources import GuestKernel

Build = Callable[..., bytes]


@dataclass(frozen=True)
class Member:
    """An entry of a newc archive; `fields` are the thirteen numbers of its header."""

    fields: tuple[int, ...]
    data: bytes

    @property
    def mode(self) -> int:
        return self.fields[1]

    @property
    def device(self) -> tuple[int, int]:
        return self.fields[9], self.fields[10]


def parse(archive: bytes) -> dict[str, Member]:
    """Read an archive to its end's mark, as Documentation/driver-api/early-userspace/buffer-format.rst has it."""
    members: dict[str, Member] = {}
    at = 0
    while "TRAILER!!!" not in members:
        assert archive[at : at + 6] == b"070701"
        fields = tuple(int(archive[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13))
        name = archive[at + 110 : at + 110 + fields[11]]
        start = -(-(at + 110 + fields[11]) // 4) * 4
        members[name.rstrip(b"\0").decode()] = Member(fields, archive[start : start + fields[6]])
        at = -(-(start + fields[6]) // 4) * 4
    assert at == len(archive)
    return members


@pytest.fixture
def build(tmp_path: Path, modules_tree: Callable[..., Path], bzimage: Callable[..., Path]) -> Build:
    def run(name: str = "one", image: bytes = b"", *, modules: bool = True, **options: tuple[str, ...]) -> bytes:
        directory = tmp_path / name
        tree = modules_tree(directory / "tree", **options) if modules else None
        agent = directory / "agent"
        agent.parent.mkdir(exist_ok=True)
        agent.write_bytes(b"\x7fELF the agent")
        kernel = GuestKernel(
            bzimage=bzimage(f"{name}/vmlinuz", image), modules_dir=tree, release="6.1", origin="test", digest="0"
        )
        dest = directory / "initramfs"
        try:
            build_initramfs(agent=agent, kernel=kernel, dest=dest)
        except HostError:
            assert not dest.exists()
            raise
        return dest.read_bytes()

    return run


def test_the_agent_is_init_and_has_its_directories_and_devices(build: Build) -> None:
    members = parse(build())
    assert members["init"].data == b"\x7fELF the agent"
    assert members["init"].mode == stat.S_IFREG | 0o755
    for directory in ("dev", "proc", "sys", "mnt", "newroot", "modules"):
        assert members[directory].mode == stat.S_IFDIR | 0o755
    assert (members["dev/console"].mode, members["dev/console"].device) == (stat.S_IFCHR | 0o600, (5, 1))
    assert (members["dev/null"].mode, members["dev/null"].device) == (stat.S_IFCHR | 0o666, (1, 3))


def test_a_directory_comes_before_its_content(build: Build) -> None:
    names = list(parse(build()))
    for at, name in enumerate(names):
        assert "/" not in name or name.rpartition("/")[0] in names[:at]


def test_the_order_file_lists_every_module_in_load_order(build: Build) -> None:
    members = parse(build(packing="xz"))
    order = members["modules/order"].data.decode().splitlines()
    assert order[:3] == ["00-virtio_ring.ko", "01-virtio.ko", "02-virtio_mmio.ko"]
    assert order == sorted(order)
    assert {f"modules/{name}" for name in order} | {"modules/order"} == {n for n in members if n.startswith("modules/")}
    assert all(members[f"modules/{name}"].data.startswith(b"\x7fELF") for name in order), "the kernel unpacks no module"


def test_the_same_input_makes_the_same_bytes(build: Build, tmp_path: Path) -> None:
    first = build("one")
    umask = os.umask(0o077)
    try:
        second = build("elsewhere")
    finally:
        os.umask(umask)
    assert first == second
    for member in parse(first).values():
        _inode, _mode, uid, gid, _links, mtime, *_ = member.fields
        assert (uid, gid, mtime) == (0, 0, 0)


def test_entries_have_distinct_inodes(build: Build) -> None:
    inodes = [member.fields[0] for member in parse(build()).values()]
    assert inodes == list(range(1, len(inodes) + 1))


def test_a_kernel_with_all_modules_built_in_gets_an_empty_order(build: Build, all_built_in: bytes) -> None:
    assert parse(build(image=all_built_in, modules=False))["modules/order"].data == b""


def test_a_kernel_without_required_modules_makes_no_initramfs(build: Build, vmlinux: Callable[..., bytes]) -> None:
    with pytest.raises(HostError, match="has no virtio_console\n"):
        build("tree", without=("virtio_console",))
    with pytest.raises(HostError, match="comes without modules"):
        build("bare", image=vmlinux(), modules=False)


def test_a_full_disk_leaves_no_partial_file(tmp_path: Path, build: Build) -> None:
    build()
    dest = tmp_path / "full"
    dest.symlink_to("/dev/full")
    kernel = GuestKernel(
        bzimage=tmp_path / "one/vmlinuz", modules_dir=tmp_path / "one/tree", release="6.1", origin="test", digest="0"
    )
    with pytest.raises(OSError, match="No space left"):
        build_initramfs(agent=tmp_path / "one/agent", kernel=kernel, dest=dest)
    assert not dest.is_symlink()
