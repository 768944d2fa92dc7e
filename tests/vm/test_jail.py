"""Firecracker in its jailer: which parts of the host it can reach. Everything else is as without the jailer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pytest_fcvm import CloneFactory

pytestmark = pytest.mark.skipif(not os.environ.get("FCVM_JAILER"), reason="FCVM_JAILER is not set")


def test_a_jailed_firecracker_has_its_own_user_and_sees_only_its_own_files(fcvm_clone_factory: CloneFactory) -> None:
    clones = [fcvm_clone_factory(disk="128M") for _ in range(2)]
    users = set()
    for clone in clones:
        assert clone.running
        process = Path("/proc") / str(clone.running.vm.pid)
        status = dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines())
        assert (status["Name"], status["CapEff"], status["Seccomp"]) == ("firecracker", "0" * 16, "2")
        users |= set(status["Uid"].split())
        assert not (process / "root" / "etc").exists()
        assert not (process / "root" / "proc").exists()
        links = [link.readlink() for link in (process / "fd").iterdir()]
        held = {link.parts[1] for link in links if link.is_absolute() and link.parts[1] != "dev"}
        assert held <= {"console.log", "drive1", "drive2", "memory", "metrics.json", "null", "rootfs", "tmp", "run"}
    assert len(users) == 2
    assert min(map(int, users)) >= 1 << 30
    clones[0].succeed("echo written > /var/tmp/file && sync")
    assert clones[1].exec("test -e /var/tmp/file").exit_code == 1
