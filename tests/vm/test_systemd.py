"""An image whose command is systemd: process 1 of a whole system, cloned while it runs."""

from __future__ import annotations

import signal
import urllib.request
from collections.abc import Callable

import pytest

from pytest_fcvm import Clone, Snapshot, VmSpec


@pytest.fixture(scope="session")
def fcvm_spec(image: Callable[[str], str]) -> VmSpec:
    """A system with nginx as one of its units."""
    return VmSpec(image=image("systemd"), mem_mib=384)


pytestmark = pytest.mark.fcvm(ready="exec:systemctl is-system-running --wait | grep -qx -e running -e degraded")


def test_units_run_and_the_journal_can_be_read(fcvm_clone: Clone) -> None:
    assert fcvm_clone.succeed("systemctl is-active multi-user.target nginx").split() == ["active", "active"]
    assert fcvm_clone.succeed("systemctl --failed --no-legend") == ""
    assert fcvm_clone.succeed("systemctl is-system-running") == "running\n"
    assert fcvm_clone.succeed("systemd-detect-virt --container").strip() == "container-other"
    assert "Started nginx" in fcvm_clone.succeed("journalctl --no-pager --unit nginx")
    with urllib.request.urlopen(fcvm_clone.url(80), timeout=30) as answer:
        assert answer.status == 200


def test_a_clone_starts_and_stops_units_of_its_own(fcvm_snapshot: Snapshot) -> None:
    with fcvm_snapshot.clone() as first, fcvm_snapshot.clone() as second:
        first.succeed("systemctl stop nginx")
        assert first.exec("systemctl is-active nginx").stdout == "inactive\n"
        assert second.succeed("systemctl is-active nginx") == "active\n"
        first.succeed("systemd-run --wait --quiet sh -c 'echo from a unit > /from-a-unit'")
        assert first.read_text("/from-a-unit") == "from a unit\n"
        assert first.read_text("/etc/machine-id") != second.read_text("/etc/machine-id")


def test_commands_run_beside_the_units_and_do_not_affect_them(fcvm_clone: Clone) -> None:
    own = fcvm_clone.succeed("cat /proc/self/cgroup")
    assert own == "0::/fcvm\n"
    assert fcvm_clone.succeed("cat /proc/1/cgroup") == "0::/init.scope\n"
    assert fcvm_clone.succeed("cat /proc/1/comm") == "systemd\n"
    assert "nginx.service" in fcvm_clone.succeed("systemctl status --no-pager nginx")


def test_stop_shuts_the_system_down(fcvm_clone: Clone) -> None:
    status = fcvm_clone.stop(120)
    assert status.signal == signal.SIGINT, status  # reboot(2): the init of a halted PID namespace ends so
