"""Scratch disks: they hold more than memory, are private to a clone, and survive a power cut."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pytest_fcvm import Clone, CloneFactory, GuestError, Snapshot, UsageProblem
from pytest_fcvm.store import content_digest

pytestmark = pytest.mark.fcvm(disk="2G")


def _read_from(image: Path, name: str) -> bytes | None:
    """Return a file of an image's writable layer as the next boot would find it, after a replay of the journal."""
    subprocess.run(["/sbin/e2fsck", "-fp", image], capture_output=True, check=False)
    done = subprocess.run(["/sbin/debugfs", "-R", f"cat /upper/{name}", image], capture_output=True, check=True)
    return None if b"File not found" in done.stderr else done.stdout


def test_a_workload_writes_more_than_its_memory(fcvm_clone: Clone) -> None:
    assert fcvm_clone.spec.mem_mib == 256
    fcvm_clone.exec("dd if=/dev/zero of=/big bs=1M count=1024 && sync", timeout=300, check=True)
    assert fcvm_clone.succeed("stat -c %s /big") == f"{1 << 30}\n"
    metrics = fcvm_clone.metrics()
    assert int(metrics["overlay_size_bytes"]) > 1900 << 20
    assert int(metrics["overlay_used_bytes"]) > 1 << 30


def test_clones_write_to_their_own_disks_and_never_to_the_snapshots(fcvm_snapshot: Snapshot) -> None:
    disk = fcvm_snapshot.entry.file("disk")
    before = content_digest(disk)
    with fcvm_snapshot.clone() as first, fcvm_snapshot.clone() as second:
        first.succeed("echo first > /who; sync")
        assert second.fail("cat /who") == ""
        second.succeed("echo second > /who; sync")
        assert first.read_text("/who") == "first\n"
    assert content_digest(disk) == before


def test_a_power_cut_keeps_what_was_synced_and_loses_what_was_not(fcvm_clone: Clone, tmp_path: Path) -> None:
    fcvm_clone.succeed("echo kept > /kept; sync -f /kept; echo lost > /lost")
    fcvm_clone.kill()
    image = tmp_path / "image"
    fcvm_clone.disk_image(image)
    assert _read_from(image, "kept") == b"kept\n"
    assert not _read_from(image, "lost")
    fcvm_clone.close()
    with pytest.raises(GuestError, match="freed with its clone"):
        fcvm_clone.disk_image(image)


def test_the_disk_of_a_running_clone_is_saved_in_its_current_state(fcvm_clone: Clone, tmp_path: Path) -> None:
    fcvm_clone.succeed("echo here > /here")
    fcvm_clone.disk_image(tmp_path / "image")
    assert _read_from(tmp_path / "image", "here") == b"here\n"
    assert fcvm_clone.succeed("cat /here") == "here\n"


def test_a_clones_disk_leaves_nothing_in_the_store(fcvm_snapshot: Snapshot) -> None:
    directory = fcvm_snapshot.entry.path
    before = sorted(directory.iterdir())
    with fcvm_snapshot.clone() as clone:
        clone.succeed("echo x > /x; sync")
        assert sorted(directory.iterdir()) == before


def test_a_disk_that_is_too_small_for_a_file_system_is_refused(fcvm_clone_factory: CloneFactory) -> None:
    with pytest.raises(UsageProblem, match="'1M' is too small"):
        fcvm_clone_factory(disk="1M")


def test_a_disk_has_a_file_for_each_4_kib_and_a_touched_file_of_the_image_takes_direct_io(
    fcvm_clone_factory: CloneFactory,
) -> None:
    clone = fcvm_clone_factory(disk="256M")
    files, blocks, block_bytes = map(int, clone.succeed("stat -f -c '%c %b %S' /var").split())
    assert files * 4096 >= blocks * block_bytes
    read = "dd if=/usr/sbin/nginx of=/dev/null bs=4096 count=1 iflag=direct"
    assert "Invalid argument" in clone.exec(read).stderr
    clone.succeed("touch -c /usr/sbin/nginx")
    clone.succeed(read)
