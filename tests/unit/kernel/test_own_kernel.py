"""The kernel of our own: what its fragment asks for, and what the installed wheel was made of."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from pytest_fcvm.kernel.vmlinux import read_release

_FRAGMENT = Path(__file__).parents[3] / "guest_image/kernel/microvm.config"
# What the agent cannot do without, beside processes and files.
_NEEDED = (
    *("SQUASHFS", "SQUASHFS_LZ4", "OVERLAY_FS", "TMPFS", "TMPFS_XATTR", "DEVTMPFS", "BLK_DEV_INITRD", "RD_GZIP"),
    *("VIRTIO_MMIO", "VIRTIO_BLK", "VIRTIO_NET", "VIRTIO_CONSOLE", "VIRTIO_VSOCKETS", "HW_RANDOM_VIRTIO", "ACPI"),
    *("CGROUPS", "MEMCG", "CGROUP_FREEZER", "CGROUP_PIDS", "PID_NS", "UTS_NS", "NET_NS", "USER_NS"),
    *("INET_DIAG_DESTROY", "DUMMY", "IPV6", "SERIAL_8250_PNP", "UNIX98_PTYS", "POSIX_MQUEUE", "EXT4_FS"),
)


def _options(path: Path) -> list[tuple[str, str]]:
    return re.findall(r"^CONFIG_(\w+)=(.+)$", path.read_text(), re.MULTILINE)


def test_the_fragment_has_each_option_once_and_no_modules() -> None:
    options = _options(_FRAGMENT)
    names = [name for name, _ in options]
    assert sorted(set(names)) == sorted(names)
    assert {value for _, value in options if not re.fullmatch(r'".*"|-?\d+', value)} == {"y", "n"}


def test_the_fragment_has_what_the_agent_needs() -> None:
    options = dict(_options(_FRAGMENT))
    assert [name for name in _NEEDED if options.get(name) != "y"] == []


@pytest.fixture
def wheel() -> Path:
    """The directory of the installed kernel wheel."""
    found = importlib.util.find_spec("pytest_fcvm_kernel_x86_64")
    directory = Path(next(iter(found.submodule_search_locations or []))) if found else None
    if directory is None or not (directory / "bzImage").exists():
        pytest.skip("the kernel's wheel is not installed: make kernel")
    return directory


def test_the_wheel_names_its_sources(wheel: Path) -> None:
    facts = json.loads((wheel / "source.json").read_text())
    assert facts["package"] == "linux-source-6.12"
    assert all(re.fullmatch("[0-9a-f]{64}", facts[name]) for name in ("deb_sha256", "tar_sha256"))
    assert read_release(wheel / "bzImage") == f"{facts['version'].split('-')[0]}-fcvm"
    assert "GENERAL PUBLIC LICENSE" in (wheel / "COPYING").read_text()
    assert (wheel / "build").read_text().startswith("#!/usr/bin/env python3")


def test_the_wheels_configuration_has_every_option_of_the_fragment(wheel: Path) -> None:
    built = dict(_options(wheel / "config"))
    lost = [name for name, value in _options(wheel / "microvm.config") if built.get(name, "n") != value]
    assert lost == []
    assert "m" not in built.values()
