"""Images of scratch disks: sparse, copied with their holes, freed with their owner."""

from __future__ import annotations

import gc
import os
import subprocess
from pathlib import Path

import pytest

from pytest_fcvm.engine.disk import Disk, make_image
from pytest_fcvm.errors import GuestError, HostError


def _allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A file of 64 MiB with data at both ends and in the middle, and holes between."""
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(64 << 20)
        for offset in (0, 30 << 20, (64 << 20) - 5):
            file.seek(offset)
            file.write(b"hello")
    return path


def test_an_image_is_sparse_private_and_a_valid_file_system(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    make_image(path, 2048)
    assert (path.stat().st_size, path.stat().st_mode & 0o777) == (2 << 30, 0o600)
    assert _allocated(path) < 20 << 20
    checked = subprocess.run(["/sbin/e2fsck", "-fn", path], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_an_image_never_replaces_a_file(image: Path) -> None:
    with pytest.raises(HostError, match="File exists"):
        make_image(image, 64)


def test_a_copy_is_equal_has_holes_and_no_name(image: Path, tmp_path: Path) -> None:
    disk = Disk.copy_of(image)
    assert list(tmp_path.iterdir()) == [image]
    saved = tmp_path / "saved"
    disk.save(saved)
    assert saved.read_bytes() == image.read_bytes()
    assert _allocated(saved) <= 1 << 20
    disk.close()
    disk.close()
    with pytest.raises(GuestError, match="freed with its clone"):
        disk.save(saved)


def test_a_write_to_a_copy_does_not_change_the_image(image: Path, tmp_path: Path) -> None:
    disk = Disk.copy_of(image)
    os.pwrite(disk.descriptor, b"HELLO", 0)
    disk.save(tmp_path / "saved")
    assert (image.read_bytes()[:5], (tmp_path / "saved").read_bytes()[:5]) == (b"hello", b"HELLO")
    disk.close()


def test_a_copy_without_an_owner_is_freed(image: Path) -> None:
    before = _open_files()
    disk = Disk.copy_of(image)
    assert _open_files() == before + 1
    del disk
    gc.collect()
    assert _open_files() == before


def test_a_missing_image_is_reported_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="No such file") as caught:
        Disk.copy_of(tmp_path / "missing")
    assert "--fcvm-cache-dir" in caught.value.hint
