"""Freezing a workload with a process that waits in the kernel for ever."""

import contextlib
import ctypes
import os
import select
import struct
import threading
import time
from pathlib import Path

import pytest

FUSE_INIT = 26
CLONE_NEWNS = 0x00020000


class HangingFiles:
    """A FUSE file system in the guest that never answers after its greeting. `end` makes every request fail."""

    def __init__(self, process, place):
        self._fd = os.open("/dev/fuse", os.O_RDWR)
        self._over = threading.Event()
        mounted = []
        thread = threading.Thread(target=lambda: mounted.append(self._mount(process, place)))
        thread.start()
        thread.join()
        if not mounted[0]:
            os.close(self._fd)
            pytest.skip("FUSE cannot be mounted here")
        threading.Thread(target=self._serve, daemon=True).start()

    def _mount(self, process, place):
        """Mount it in the guest's namespace, on a thread that stays there."""
        libc = ctypes.CDLL(None, use_errno=True)
        with Path(f"/proc/{process}/ns/mnt").open() as namespace:
            libc.unshare(CLONE_NEWNS)
            libc.setns(namespace.fileno(), CLONE_NEWNS)
        options = f"fd={self._fd},rootmode=40000,user_id=0,group_id=0"
        return libc.mount(b"hang", place.encode(), b"fuse", 0, options.encode()) == 0

    def _serve(self):
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        while not self._over.is_set():
            if poll.poll(100):
                with contextlib.suppress(OSError):
                    self._answer(os.read(self._fd, 1 << 20))

    def _answer(self, request):
        _, opcode, unique = struct.unpack_from("<IIQ", request)
        if opcode == FUSE_INIT:
            body = struct.pack("<IIIIHHII", 7, 31, 65536, 0, 0, 0, 65536, 0) + bytes(32)
            os.write(self._fd, struct.pack("<IiQ", 16 + len(body), 0, unique) + body)

    def end(self):
        self._over.set()
        os.close(self._fd)


@pytest.fixture
def hanging(guest):
    """A guest whose workload waits for a file that hangs."""
    if os.geteuid() or not Path("/dev/fuse").exists():
        pytest.skip("FUSE is not allowed here")
    guest.start("mkdir -p /tmp/hang; while :; do [ -e /tmp/go ] && stat /tmp/hang/x; sleep 0.05; done")
    pid = int(Path(f"/proc/{guest.agent_pid}/task/{guest.agent_pid}/children").read_text().split()[0])
    if b"0::/fcvm" not in Path(f"/proc/{pid}/cgroup").read_bytes():
        pytest.skip("cgroups are not allowed here")
    guest.client.run("sh", "-c", "until [ -d /tmp/hang ]; do sleep 0.05; done")
    files = HangingFiles(pid, "/tmp/hang")
    guest.client.run("sh", "-c", "touch /tmp/go; until pidof stat; do sleep 0.05; done; sleep 0.2")
    yield guest
    files.end()


def test_a_process_that_waits_in_the_kernel_does_not_keep_the_workload_from_being_frozen(hanging, p):
    started = time.monotonic()
    hanging.client.call(p.FREEZE)
    assert time.monotonic() - started < 3
    assert hanging.client.call(p.STATUS)[p.STATE] == ["frozen"]
    hanging.client.call(p.PERSONALISE, (p.REALTIME_NS, time.time_ns()))
    assert hanging.client.call(p.STATUS)[p.STATE] == ["running"]
    assert hanging.client.run("sh", "-c", "echo alive").data[0] == b"alive\n"
