"""Mount namespaces of a program's own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_fcvm.errors import HostError
from pytest_fcvm.host import libc
from pytest_fcvm.host.mounts import open_mounts

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting requires root")


def _inside(mounts: int, *argv: str | Path) -> str:
    command = ["nsenter", f"--mount=/proc/self/fd/{mounts}", "--", *map(str, argv)]
    return subprocess.run(command, pass_fds=[mounts], capture_output=True, text=True, check=True).stdout


def test_files_are_mounted_only_in_the_namespace(tmp_path: Path) -> None:
    (tmp_path / "given").write_text("given")
    (tmp_path / "place").touch()
    (tmp_path / "root").mkdir()
    before = Path("/proc/self/mountinfo").read_text()
    root = tmp_path / "root"
    mounts = open_mounts([(tmp_path, root), (tmp_path / "given", root / "place")])
    try:
        assert _inside(mounts, "cat", root / "given", root / "place") == "givengiven"
        assert not list(root.iterdir())
        assert Path("/proc/self/mountinfo").read_text() == before
        assert not os.get_inheritable(mounts)
    finally:
        os.close(mounts)


@pytest.fixture
def no_devices(tmp_path: Path) -> Iterator[Path]:
    """A file system on which devices do not work, as on many a /run."""
    place = tmp_path / "no-devices"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "nodev", "test", place], check=False).returncode:
        pytest.skip("this root may not mount")
    yield place
    subprocess.run(["umount", place], check=True)


def test_devices_work_although_the_file_system_is_mounted_nodev(no_devices: Path, tmp_path: Path) -> None:
    os.mknod(no_devices / "null", 0o20600, os.makedev(1, 3))
    with pytest.raises(PermissionError):
        (no_devices / "null").read_bytes()
    (tmp_path / "place").mkdir()
    mounts = open_mounts([(no_devices, tmp_path / "place")])
    try:
        assert _inside(mounts, "cat", tmp_path / "place" / "null") == ""
    finally:
        os.close(mounts)


def test_a_missing_file_is_reported_and_leaves_no_descriptor(tmp_path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208  numbers
    with pytest.raises(HostError, match="files cannot be mounted: No such file or directory"):
        open_mounts([(tmp_path / "gone", tmp_path)])
    assert set(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_without_the_privilege_to_mount_the_hint_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_flags: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(libc, "unshare", refuse)
    with pytest.raises(HostError, match="files cannot be mounted: Operation not permitted") as caught:
        open_mounts([(tmp_path, tmp_path)])
    assert "CAP_SYS_ADMIN" in caught.value.hint
