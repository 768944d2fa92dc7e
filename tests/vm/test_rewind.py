"""Rewinding real VMs: the next clone runs in the same process, and finds nothing of the clone before it.

The QEMU of guest_image/vmm rewinds; `make qemu` installs it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pytest_fcvm import Clone, GuestError, VmSpec
from pytest_fcvm.engine.qemu.installation import find_qemu
from pytest_fcvm.harness import Harness
from pytest_fcvm.host.clock import Deadline, wait_until
from pytest_fcvm.host.libc import real_time_ns
from pytest_fcvm.host.paths import package_dir
from pytest_fcvm.options import Options
from pytest_fcvm.snapshot import OpenSnapshot
from tests.patience import PATIENCE

OpenOne = Callable[..., OpenSnapshot]
_LIVES = int(os.environ.get("FCVM_TEST_REWINDS", "50"))
# Rewrites one function again and again, and counts the calls that did not run the new code.
_REWRITES_ITSELF = r"""
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

int main(void)
{
    unsigned char *code = mmap(NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    unsigned wrong = 0;
    for (uint32_t number = 0; number < 10000; number++) {
        code[0] = 0xb8; /* mov $number, %eax; ret */
        memcpy(code + 1, &number, sizeof number);
        code[5] = 0xc3;
        wrong += ((uint32_t (*)(void))code)() != number;
    }
    printf("%u wrong\n", wrong);
    return wrong != 0;
}
"""


@pytest.fixture(scope="module")
def qemu() -> Path:
    """The QEMU that rewinds."""
    named = os.environ.get("FCVM_TEST_QEMU")
    binary = Path(named) if named else find_qemu() if package_dir("pytest_fcvm_qemu_x86_64") else None
    if binary is None:
        pytest.skip("pytest-fcvm-qemu is not installed: run `make qemu`")
    return binary


@pytest.fixture(scope="module")
def open_one(qemu: Path, fcvm_spec: VmSpec, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenOne]:
    """Return a function that opens a snapshot whose clones are rewound. Its arguments are fields of the options."""
    harnesses: list[Harness] = []

    def make(spec: VmSpec = fcvm_spec, **fields: object) -> OpenSnapshot:
        options = Options(**{"qemu": qemu, "engine": "qemu", "accel": "tcg", "pool": 0, **fields})  # type: ignore[arg-type]
        harnesses.append(Harness(options, shared_dir=tmp_path_factory.mktemp("shared"), announce=print))
        return harnesses[-1].snapshot(spec, "test_rewind.py")

    yield make
    for harness in harnesses:
        harness.close()


@pytest.fixture(scope="module")
def snapshot(open_one: OpenOne) -> OpenSnapshot:
    """A snapshot of nginx, without prewarmed clones."""
    return open_one()


def _pid(clone: Clone) -> int:
    pid = clone.running.vm.pid  # type: ignore[attr-defined]
    assert isinstance(pid, int)
    return pid


def _get(clone: Clone) -> bytes:
    with urllib.request.urlopen(clone.url(80), timeout=20 * PATIENCE) as answer:
        return bytes(answer.read())


def _who(clone: Clone) -> tuple[str, ...]:
    script = "od -An -N16 -tx1 /dev/urandom; cat /etc/machine-id /proc/sys/kernel/random/boot_id; ip -o link show eth0"
    random, machine, boot, link = clone.succeed(script).splitlines()
    return random, machine, boot, link.split("link/ether ")[1].split()[0]


_STATE = """
ls -laR /tmp /var/www /root /etc /run | grep -v machine-id; cat /etc/hostname /proc/mounts; ip -o addr | grep -v ether
ls /proc | grep -c '^[0-9]'; cat /proc/sys/net/ipv4/ip_forward
"""


def test_the_next_clone_finds_nothing_of_the_one_before(snapshot: OpenSnapshot) -> None:
    with snapshot.clone() as first:
        page, state, pid = _get(first), first.succeed(_STATE), _pid(first)
        first.succeed(
            "echo gone > /var/www/html/index.html; rm -r /usr/share/doc; echo x > /tmp/x; ip link add v type veth"
        )
        first.succeed("echo 1 > /proc/sys/net/ipv4/ip_forward; echo to the kernel > /dev/kmsg; mkdir /mnt/x")
        first.popen("dd if=/dev/urandom of=/dev/shm/much bs=1M count=40; exec sleep 1000", detach=True)
        first.succeed("kill -9 $(cat /run/nginx.pid) || true")
        assert first.port(80)
        before = _who(first)
    with snapshot.clone() as second:
        assert _pid(second) == pid
        assert "rewind" in dict(second.timeline.phases)
        assert _get(second) == page
        assert second.succeed(_STATE) == state
        assert not set(_who(second)) & set(before)
        assert "to the kernel" not in second.console()
        assert abs(int(second.succeed("date +%s%N")) - real_time_ns()) < 2e9 * PATIENCE
        started = time.monotonic()
        second.succeed("sleep 0.5")
        assert time.monotonic() - started > 0.45
        with pytest.raises(GuestError, match="closed"):
            first.logs()


def test_many_lives_in_one_process_are_all_fresh(snapshot: OpenSnapshot) -> None:
    seen: list[tuple[str, ...]] = []
    pids: set[int] = set()
    for number in range(_LIVES):
        with snapshot.clone() as clone:
            assert clone.succeed("ls /tmp") == ""
            clone.succeed(f"echo {number} > /tmp/mine; echo {number} > /var/www/html/index.html")
            assert _get(clone) == f"{number}\n".encode()
            seen.append(_who(clone))
            pids.add(_pid(clone))
    assert len(pids) == 1
    for values in zip(*seen, strict=True):
        assert len(set(values)) == len(seen), values


def test_memory_and_devices_are_the_snapshots_after_each_rewind(open_one: OpenOne) -> None:
    snapshot = open_one(verify_rewind=True)
    for number in range(8):
        with snapshot.clone() as clone:
            clone.succeed(f"dd if=/dev/urandom of=/dev/shm/much bs=1M count={number + 1} 2>/dev/null")
            clone.succeed("perl -e 'print 1 for 1..1000'; echo to the kernel > /dev/kmsg")
            assert _get(clone)
    assert (snapshot.rewound, snapshot.rewinds_failed) == (7, 0)


def test_programs_that_write_code_while_they_run_are_right(snapshot: OpenSnapshot, tmp_path: Path) -> None:
    (tmp_path / "self.c").write_text(_REWRITES_ITSELF)
    subprocess.run(["gcc", "-O1", "-static", "-o", tmp_path / "self", tmp_path / "self.c"], check=True)
    for number in range(10):
        with snapshot.clone() as clone:
            clone.copy_in(tmp_path / "self", "/tmp/self")
            assert clone.succeed("/tmp/self; /tmp/self").split("\n")[:2] == ["0 wrong", "0 wrong"]
            code = f"eval 'sub f {{ $_[0] * {number} }}'; print f(7)"
            assert clone.succeed(["perl", "-e", code]) == str(7 * number)


def test_a_vm_that_dies_idle_fails_no_test(snapshot: OpenSnapshot) -> None:
    with snapshot.clone() as clone:
        pid = _pid(clone)
    os.kill(pid, signal.SIGKILL)
    with snapshot.clone() as clone:
        assert _pid(clone) != pid
        assert _get(clone)


def test_a_vm_that_hangs_is_replaced(snapshot: OpenSnapshot) -> None:
    with snapshot.clone() as clone:
        pid = _pid(clone)
        os.kill(pid, signal.SIGSTOP)
    with snapshot.clone() as clone:
        assert _pid(clone) != pid
        assert _get(clone)
    assert wait_until(lambda: not Path(f"/proc/{pid}/fd").exists() or not os.path.exists(f"/proc/{pid}"), Deadline(10))  # noqa: PTH110


def test_a_clone_is_reset_in_its_process_behind_the_same_port(snapshot: OpenSnapshot) -> None:
    with snapshot.clone() as clone:
        pid, port = _pid(clone), clone.port(80)
        clone.succeed("echo changed > /var/www/html/index.html")
        clone.reset()
        assert (_pid(clone), clone.port(80)) == (pid, port)
        assert b"changed" not in _get(clone)


def test_a_scratch_disk_has_its_first_content_again(open_one: OpenOne, fcvm_spec: VmSpec, tmp_path: Path) -> None:
    snapshot = open_one(fcvm_spec.merged({"disk_mib": 64}), verify_rewind=True)
    with snapshot.clone() as clone:
        pid, before = _pid(clone), clone.succeed("ls -la /root; df -k / | tail -n 1")
        clone.succeed("head -c 20000000 /dev/urandom > /root/much; rm /var/www/html/index.html; sync")
    with pytest.raises(GuestError, match="freed with its clone"):
        clone.disk_image(tmp_path / "disk")
    for _ in range(3):
        with snapshot.clone() as clone:
            assert _pid(clone) == pid
            assert clone.succeed("ls -la /root; df -k / | tail -n 1") == before
            assert _get(clone)
            clone.succeed("head -c 3000000 /dev/urandom > /root/more; sync; rm /root/more")
    with snapshot.clone() as clone:
        clone.kill()
        clone.disk_image(tmp_path / "disk")
    assert (tmp_path / "disk").stat().st_size == 64 << 20


def test_forks_take_new_processes(snapshot: OpenSnapshot) -> None:
    with snapshot.clone() as clone:
        pid = _pid(clone)
        (fork,) = clone.fork()
        assert _get(fork)
    with snapshot.clone() as clone:
        assert _pid(clone) != pid


def test_a_guest_with_two_cpus_is_rewound(open_one: OpenOne, fcvm_spec: VmSpec) -> None:
    snapshot = open_one(fcvm_spec.merged({"cpus": 2}))
    pids = set()
    for _ in range(10):
        with snapshot.clone() as clone:
            assert clone.succeed("nproc; ls /tmp").split() == ["2"]
            clone.succeed(
                "touch /tmp/x; (head -c 3000000 /dev/zero | md5sum) & head -c 3000000 /dev/zero | md5sum; wait"
            )
            assert _get(clone)
            pids.add(_pid(clone))
    assert len(pids) == 1


def test_prewarmed_clones_take_over_idle_vms(open_one: OpenOne, fcvm_spec: VmSpec) -> None:
    snapshot = open_one(fcvm_spec, pool=1)
    seen = set()
    for _ in range(12):
        with snapshot.clone() as clone:
            assert clone.succeed("ls /tmp") == ""
            clone.succeed("touch /tmp/x")
            assert _get(clone)
            seen.add(_who(clone))
    assert len(seen) == 12
    assert snapshot.rewound >= 8


def test_what_is_idle_ends_with_its_harness(qemu: Path, fcvm_spec: VmSpec, tmp_path: Path) -> None:
    options = Options(qemu=qemu, engine="qemu", accel="tcg", pool=0)
    harness = Harness(options, shared_dir=tmp_path, announce=print)
    try:
        with harness.snapshot(fcvm_spec, "test_rewind.py").clone() as clone:
            pid = _pid(clone)
        assert os.path.exists(f"/proc/{pid}")  # noqa: PTH110
    finally:
        harness.close()
    assert wait_until(lambda: not os.path.exists(f"/proc/{pid}"), Deadline(10))  # noqa: PTH110
