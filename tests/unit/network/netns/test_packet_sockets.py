"""NICs in network namespaces on a private network: the switch takes their packet sockets as it takes any port."""

from __future__ import annotations

import select
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from pytest_fcvm.errors import HostError
from pytest_fcvm.host.clock import Deadline, wait_until
from pytest_fcvm.host.supervisor.supervisor import Supervisor
from pytest_fcvm.model.net import Namespace
from pytest_fcvm.model.specs import NetworkMode, NetworkSpec
from pytest_fcvm.network.netns.client import Namespaces
from pytest_fcvm.network.private import Network

ALONE = NetworkSpec(mode=NetworkMode.ROOTLESS)
WAIT_S = 20.0
# A VMM with one NIC: it sends what it reads from standard input, and prints every frame of ours.
VMM = textwrap.dedent("""
    import fcntl, os, select, struct, sys
    tap = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(tap, 0x400454CA, struct.pack("16sH22x", b"eth1", 0x1002))
    print("up", flush=True)
    while True:
        for ready in select.select([tap, 0], [], [])[0]:
            if ready == tap:
                frame = os.read(tap, 2000)
                if frame[12:14] == b"\\x88\\xb5":
                    print(frame.hex(), flush=True)
            else:
                lines = os.read(0, 65536).split()
                if not lines:
                    sys.exit()
                for line in lines:
                    os.write(tap, bytes.fromhex(line.decode()))
""")


class Vmm:
    """A program with a NIC on a private network."""

    def __init__(self, namespace: Namespace) -> None:
        passed = [namespace.net, *([namespace.user] if namespace.user is not None else [])]
        user = [f"--user=/proc/self/fd/{namespace.user}"] if namespace.user is not None else []
        enter = ["nsenter", "--preserve-credentials", *user, f"--net=/proc/self/fd/{namespace.net}"]
        self.process = subprocess.Popen(
            [*enter, sys.executable, "-c", VMM],
            pass_fds=passed,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        assert self.receive() == "up"

    def send(self, frame: bytes) -> None:
        assert self.process.stdin
        self.process.stdin.write(f"{frame.hex()}\n".encode())

    @property
    def has_received(self) -> bool:
        return bool(select.select([self.process.stdout], [], [], 0)[0])

    def receive(self) -> str:
        assert self.process.stdout
        assert select.select([self.process.stdout], [], [], WAIT_S)[0]
        return self.process.stdout.readline().decode().strip()

    def receive_all(self) -> list[str]:
        """Return the frames that come until none has come for half a second."""
        frames = [self.receive()]
        while select.select([self.process.stdout], [], [], 0.5)[0]:
            frames.append(self.receive())
        return frames

    def close(self) -> None:
        with self.process:
            self.process.kill()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_frames_pass_between_nics_of_namespaces_until_a_partition(supervisor: Supervisor, stack: ExitStack) -> None:
    namespaces = Namespaces(supervisor)
    stack.callback(namespaces.close)
    network = stack.enter_context(Network(supervisor, 1))
    vmms = []
    for name in ("one", "two"):
        try:
            namespace = namespaces.open(ALONE, joined=True)
        except HostError as error:
            pytest.skip(f"no network namespaces here: {error}")
        stack.callback(namespace.close)
        attachment = network.plug(name, namespace.packet_sockets[0])
        assert attachment.packet_socket is None
        vmms.append(Vmm(namespace))
        stack.callback(vmms[-1].close)
    one, two = vmms
    frames = [b"\xff" * 6 + bytes([2, 0, 0, 0, 0, number]) + b"\x88\xb5" + bytes([number] * 46) for number in (1, 2, 3)]
    for source, target, frame in ((one, two, frames[0]), (two, one, frames[1])):
        # The kernel drops frames to a NIC that was opened a moment ago.
        assert wait_until(lambda: source.send(frame) or target.has_received, Deadline(WAIT_S), interval_s=0.05)  # noqa: B023
        assert set(target.receive_all()) == {frame.hex()}
    before = network.counters()["one", "two"]
    with network.partition({"one"}, {"two"}):
        one.send(frames[0])
        one.send(frames[0])
    one.send(frames[2])
    received = [two.receive()]
    while received[-1] != frames[2].hex():  # the switch may take frames of the partition after its end
        received.append(two.receive())
    after = network.counters()["one", "two"]
    assert after.delivered + after.cut - before.delivered - before.cut == 3
