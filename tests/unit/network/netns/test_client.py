"""Real network namespaces: their NICs, their connections, and their end."""

from __future__ import annotations

import os
import select
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from pytest_fcvm.errors import EngineError, HostError, UsageProblem
from pytest_fcvm.host.clock import Deadline, wait_until
from pytest_fcvm.host.supervisor.supervisor import Child, Supervisor
from pytest_fcvm.model.net import Namespace
from pytest_fcvm.model.specs import NetworkMode, NetworkSpec
from pytest_fcvm.network.addresses import NICS
from pytest_fcvm.network.netns import egress
from pytest_fcvm.network.netns.client import Namespaces, refusal

ALONE = NetworkSpec(mode=NetworkMode.ROOTLESS)
FRAME = b"\xff" * 6 + b"\x02" * 6 + b"\x88\xb5" + bytes(range(46))  # a broadcast of an experimental protocol
WAIT_S = 20.0


@pytest.fixture
def namespaces(supervisor: Supervisor, children: list[Child]) -> Iterator[Namespaces]:
    with closing(Namespaces(supervisor)) as namespaces:
        try:
            namespaces.open(ALONE, joined=False).close()
        except HostError as error:
            pytest.skip(f"no network namespaces here: {error}")
        yield namespaces


def run_inside(namespace: Namespace, script: str) -> str:
    """Run Python in a namespace."""
    passed = [namespace.net, *([namespace.user] if namespace.user is not None else [])]
    user = [f"--user=/proc/self/fd/{namespace.user}"] if namespace.user is not None else []
    command = ["nsenter", "--preserve-credentials", *user, f"--net=/proc/self/fd/{namespace.net}", sys.executable]
    return subprocess.run([*command, "-c", script], pass_fds=passed, check=True, capture_output=True, text=True).stdout


def descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


OPEN_TAP = """
import fcntl, os, struct
tap = os.open("/dev/net/tun", os.O_RDWR)
fcntl.ioctl(tap, 0x400454CA, struct.pack("16sH22x", b"eth1", 0x1002))
"""


def test_a_vmm_in_a_namespace_finds_its_nics_and_packet_sockets_carry_their_frames(namespaces: Namespaces) -> None:
    namespace = namespaces.open(ALONE, joined=True)
    names = run_inside(namespace, "import socket; print(*(name for _, name in socket.if_nameindex()))").split()
    assert names == ["lo", *NICS]
    first, second = (socket.socket(fileno=os.dup(packets)) for packets in namespace.packet_sockets)
    run_inside(namespace, f"{OPEN_TAP}os.write(tap, {FRAME!r})")
    assert select.select([first], [], [], WAIT_S)[0]
    assert first.recv(2000) == FRAME
    assert not select.select([second], [], [], 0)[0]
    answer = FRAME.replace(b"\x02", b"\x04")
    reader = threading.Thread(target=lambda: _send_until(first, answer, done))
    done = threading.Event()
    reader.start()
    try:
        assert run_inside(namespace, f"{OPEN_TAP}print(os.read(tap, 2000).hex())").strip() == answer.hex()
    finally:
        done.set()
        reader.join()
        namespace.close()
        first.close()
        second.close()


def _send_until(packets: socket.socket, frame: bytes, done: threading.Event) -> None:
    while not done.wait(0.05):
        packets.send(frame)


def test_a_connection_asks_for_the_guest_on_its_first_nic(namespaces: Namespaces) -> None:
    namespace = namespaces.open(ALONE, joined=False)
    assert namespace.tap is not None

    def connect() -> None:
        with suppress(OSError):  # nobody answers
            namespace.connect(80, socket.SOCK_STREAM)

    connecting = threading.Thread(target=connect)
    connecting.start()
    assert select.select([namespace.tap], [], [], WAIT_S)[0]
    frame = os.read(namespace.tap, 2000)
    assert frame[12:14] == b"\x08\x06"  # ARP: who has 10.0.2.15, tell 10.0.2.2
    assert [socket.inet_ntoa(frame[at : at + 4]) for at in (38, 28)] == ["10.0.2.15", "10.0.2.2"]
    connecting.join()
    namespace.close()


def test_other_networks_are_refused_at_once_without_egress(namespaces: Namespaces) -> None:
    namespace = namespaces.open(ALONE, joined=True)
    printed = run_inside(
        namespace,
        "import errno, socket\nprint(errno.errorcode[socket.socket().connect_ex(('192.0.2.1', 80))])",
    )
    assert printed.strip() == "EHOSTUNREACH"
    namespace.close()


def test_a_closed_namespace_leaves_no_descriptor_and_no_namespace(namespaces: Namespaces) -> None:
    before = descriptors()
    opened = [namespaces.open(ALONE, joined=joined) for joined in (True, False)]
    numbers = {os.fstat(namespace.net).st_ino for namespace in opened}
    assert len(numbers) == 2
    for namespace in opened:
        namespace.close()
        namespace.close()
    assert descriptors() == before
    assert wait_until(lambda: not numbers & _held(), Deadline(WAIT_S))


def _held() -> set[int]:
    return {inode for process in Path("/proc").glob("[0-9]*") for inode in _namespaces_of(process)}


def _namespaces_of(process: Path) -> Iterator[int]:
    for link in (process / "ns" / "net", *_entries(process / "fd")):
        try:
            yield link.stat().st_ino
        except OSError:
            continue


def _entries(directory: Path) -> list[Path]:
    try:
        return list(directory.iterdir())
    except OSError:
        return []


def test_a_connection_into_a_closed_namespace_is_refused_and_others_go_on(namespaces: Namespaces) -> None:
    gone, other = (namespaces.open(ALONE, joined=False) for _ in range(2))
    gone.close()
    with pytest.raises(HostError, match="namespace: No such file"):
        gone.connect(80, socket.SOCK_STREAM)
    run_inside(other, "")
    other.close()
    namespaces.open(ALONE, joined=False).close()


def test_many_namespaces_are_made_at_once(namespaces: Namespaces) -> None:
    made: list[Namespace] = []
    threads = [threading.Thread(target=lambda: made.append(namespaces.open(ALONE, joined=False))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({os.fstat(namespace.net).st_ino for namespace in made}) == 8
    for namespace in made:
        namespace.close()


def test_the_end_of_the_netns_server_is_reported(namespaces: Namespaces, children: list[Child]) -> None:
    namespace = namespaces.open(ALONE, joined=False)
    children[0].kill()
    children[0].wait(WAIT_S)
    with pytest.raises(EngineError, match="the netns server has ended"):
        namespaces.open(ALONE, joined=False)
    namespace.close()


def test_egress_that_is_not_installed_is_named(namespaces: Namespaces, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(egress, "find_tool", lambda name: None if name == "slirp4netns" else shutil.which(name))
    before = descriptors()
    with pytest.raises(HostError, match="slirp4netns is not installed") as caught:
        namespaces.open(NetworkSpec(mode=NetworkMode.ROOTLESS, egress=True), joined=False)
    assert "apt-get install slirp4netns" in caught.value.hint
    assert descriptors() == before


def test_a_system_call_that_is_refused_has_a_hint() -> None:
    error = refusal("/dev/net/tun: No such file or directory")
    assert error.message == "no network namespace is available: /dev/net/tun: No such file or directory"
    assert error.hint.startswith("modprobe tun")


def test_allowed_names_become_addresses() -> None:
    allowed = egress.resolve_allowed(["10.0.0.0/8", "192.0.2.7", "localhost"])
    assert allowed == ["10.0.0.0/8", "192.0.2.7/32", "127.0.0.1"]
    with pytest.raises(UsageProblem, match=r"allow=nobody\.invalid"):
        egress.resolve_allowed(["nobody.invalid"])


def test_the_hosts_resolver_is_no_loopback_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = tmp_path / "stub", tmp_path / "real"
    monkeypatch.setattr(egress, "_RESOLVERS", files)
    assert egress.find_resolver() == ""
    files[0].write_text("# of systemd\nnameserver 127.0.0.53\nnameserver ::1\n")
    files[1].write_text("search example\nnameserver 192.0.2.53\n")
    assert egress.find_resolver() == "192.0.2.53"
