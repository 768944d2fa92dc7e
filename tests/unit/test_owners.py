"""Every resource has an owner as soon as it is acquired: a step that fails in between leaves nothing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import pytest

from pytest_fcvm.cli import shell
from pytest_fcvm.errors import HostError
from pytest_fcvm.guest.session import Session
from pytest_fcvm.host import mounts, own, paths
from pytest_fcvm.host.admission.admission import Admission
from pytest_fcvm.host.admission.reservations import close_reservations, open_reservations
from pytest_fcvm.host.clock import Deadline, wait_until
from pytest_fcvm.host.paths import RunDir
from pytest_fcvm.host.supervisor import messages, supervisor
from pytest_fcvm.host.supervisor import protocol as engine_spawner
from pytest_fcvm.host.supervisor import spawner as host_spawner
from pytest_fcvm.host.supervisor.supervisor import Supervisor
from pytest_fcvm.host.threads import ServiceThread, ThreadGroup
from pytest_fcvm.model.net import Namespace, Proto, PublishedPort
from pytest_fcvm.model.specs import NetworkMode, NetworkSpec
from pytest_fcvm.network.helper import Helper
from pytest_fcvm.network.links import Links
from pytest_fcvm.network.netns import egress
from pytest_fcvm.network.netns.client import Namespaces
from pytest_fcvm.network.ports.datagrams import DatagramPort
from pytest_fcvm.network.ports.relay import Dialled, Relay
from pytest_fcvm.network.ports.reverse import ReversePorts
from pytest_fcvm.network.private import Network

NO_THREAD = RuntimeError("can't start new thread")
FAULTS = (OSError(24, "Too many open files"), KeyboardInterrupt("injected"))


def descriptors() -> set[tuple[str, str]]:
    """Return the open descriptors and their targets."""
    found = set()
    for path in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            found.add((path.name, str(path.readlink())))
    return {(number, target) for number, target in found if "/proc/" not in target}


def ours() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("fcvm")}


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before, threads = descriptors(), ours()
    yield
    assert wait_until(lambda: ours() <= threads, Deadline(10)), ours() - threads
    assert descriptors() == before


@pytest.fixture
def running() -> Iterator[Supervisor]:
    with RunDir() as run, Supervisor.start(run.path) as running:
        yield running


def raising(fault: BaseException) -> Callable[..., Any]:
    def fail(*_arguments: object, **_named: object) -> Any:
        raise fault

    return fail


class Stubborn:
    """Make threads. Only the first `startable` of them can be started."""

    def __init__(self, startable: int = 0) -> None:
        self.startable = startable

    def __call__(self, target: Callable[..., object], *arguments: Any, name: str) -> threading.Thread:
        thread = ServiceThread(target, *arguments, name=name)
        self.startable -= 1
        if self.startable < 0:
            thread.start = raising(NO_THREAD)  # type: ignore[method-assign]
        return thread


class Stream:
    """A connection into a guest that only records its end."""

    def __init__(self) -> None:
        self.ends: list[str] = []
        self.over = threading.Event()

    def recv(self, _size: float) -> bytes:
        assert self.over.wait(10)
        raise ConnectionAbortedError

    def send(self, _data: bytes) -> None:
        pass

    def reset(self) -> None:
        self.ends.append("reset")
        self.over.set()

    def close(self) -> None:
        self.ends.append("close")
        self.over.set()


# -- helper programs


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
@pytest.mark.parametrize("step", ["socketpair", "spawn"])
@pytest.mark.parametrize("what", ["network", "namespaces", "slirp"])
def test_a_helper_program_that_does_not_start_leaves_no_directory(
    running: Supervisor, monkeypatch: pytest.MonkeyPatch, what: str, step: str, fault: BaseException
) -> None:
    before = set(running.run_dir.iterdir())
    namespace = Namespace(net=0, user=None, tap=None, packet_sockets=(), connect=raising(fault), close=lambda: None)
    start: dict[str, Callable[[], object]] = {
        "network": lambda: Network(running, 1),
        "namespaces": lambda: Namespaces(running).open(NetworkSpec(mode=NetworkMode.ROOTLESS), joined=False),
        "slirp": lambda: egress.start_slirp(running, namespace),
    }
    monkeypatch.setattr(egress, "find_tool", lambda name: name)
    with monkeypatch.context() as patch:
        if step == "spawn":
            patch.setattr(running, "spawn", raising(fault))
        else:
            patch.setattr({"slirp": egress}.get(what, engine_spawner), "socket_pair", raising(fault))
        with pytest.raises((HostError, KeyboardInterrupt)):
            start[what]()
    assert set(running.run_dir.iterdir()) == before


def test_egress_whose_start_is_interrupted_ends(
    running: Supervisor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "slirp4netns"
    script.write_text("#!/bin/sh\nexec sleep 100\n")
    script.chmod(0o755)
    monkeypatch.setattr(egress, "find_tool", lambda _name: str(script))
    monkeypatch.setattr(egress, "_is_ready", raising(KeyboardInterrupt("injected")))
    namespace = Namespace(net=0, user=None, tap=None, packet_sockets=(), connect=raising(NO_THREAD), close=lambda: None)
    before = set(running.run_dir.iterdir())
    with pytest.raises(KeyboardInterrupt):
        egress.start_slirp(running, namespace)
    assert wait_until(lambda: set(running.run_dir.iterdir()) == before, Deadline(10))
    assert not running._children or wait_until(lambda: not running._children, Deadline(10))


def test_the_answer_to_an_interrupted_request_is_not_taken_for_anothers(
    running: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Network(running, 1) as network:
        with monkeypatch.context() as patch:
            patch.setattr(Helper, "_receive", raising(KeyboardInterrupt("injected")))
            with pytest.raises(KeyboardInterrupt):
                network.counters()
        network.heal()
        assert network.counters() == {}


@pytest.mark.parametrize("step", ["_receive", "_check", "dup"])
def test_a_namespace_whose_making_is_interrupted_is_released(
    running: Supervisor, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    alone, namespaces = NetworkSpec(mode=NetworkMode.ROOTLESS), Namespaces(running)
    try:
        namespaces.open(alone, joined=False).close()
    except HostError as error:
        pytest.skip(f"no network namespaces here: {error}")
    before = descriptors()
    with monkeypatch.context() as patch, Path(os.devnull).open() as user:
        patch.setattr(namespaces, "_user", namespaces._user or user.fileno())  # root requires none
        patch.setattr(own.os if step == "dup" else Helper, step, raising(KeyboardInterrupt("injected")))
        with pytest.raises(KeyboardInterrupt):
            namespaces.open(alone, joined=False)
    assert descriptors() == before
    namespaces.open(alone, joined=False).close()
    assert descriptors() == before
    namespaces.close()


# -- ports


@pytest.mark.parametrize("proto", [Proto.TCP, Proto.UDP])
def test_a_port_whose_thread_does_not_start_does_not_listen(proto: Proto) -> None:
    serve = lambda listener, _port, report: Dialled(raising(NO_THREAD), Stubborn(), listener, report)  # noqa: E731
    relay = Relay(serve, raising(NO_THREAD), Stubborn())
    with pytest.raises(RuntimeError, match="can't start"):
        relay.publish(PublishedPort(guest_port=80, proto=proto))
    relay.close()


def test_a_client_without_a_thread_is_reset_and_the_next_one_served() -> None:
    seen: list[Stream] = []

    def dial() -> Any:
        seen.append(Stream())
        return seen[-1]

    make_thread = Stubborn(1)
    relay = Relay(
        lambda listener, _port, report: Dialled(dial, make_thread, listener, report), raising(NO_THREAD), make_thread
    )
    endpoint = relay.publish(PublishedPort(guest_port=80))
    with pytest.raises(ConnectionResetError), socket.create_connection(endpoint, timeout=10) as client:
        client.recv(1)
    make_thread.startable = 1  # its own, but not that of the other direction
    with pytest.raises(ConnectionResetError), socket.create_connection(endpoint, timeout=10) as client:
        client.recv(1)
    assert wait_until(lambda: bool(seen) and seen[0].ends[-1:] == ["close"], Deadline(10))
    relay.close()


def test_a_datagram_without_a_thread_is_lost_with_its_stream() -> None:
    streams = [Stream(), Stream()]
    make_thread = Stubborn(1)
    port = DatagramPort(PublishedPort(guest_port=53, proto=Proto.UDP), lambda _port: cast(Any, streams[0]), make_thread)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.sendto(b"x", port.endpoint)
        assert wait_until(lambda: streams[0].ends == ["close"], Deadline(10))
        assert port._clients == {}
    port.close()


def test_reverse_ports_take_no_connection_when_one_has_no_thread() -> None:
    over, streams = threading.Event(), [Stream(), Stream()]
    waiting: list[Any] = list(streams)

    def accept(_port: int) -> Any:
        assert over.wait(10)
        return waiting.pop()

    with pytest.raises(RuntimeError, match="can't start"):
        ReversePorts(accept, [1, 2, 3], Stubborn(2))
    over.set()
    assert wait_until(lambda: all(stream.ends == ["reset", "close"] for stream in streams), Deadline(10))


def test_a_guests_connection_without_a_thread_is_reset() -> None:
    stream, over = Stream(), threading.Event()
    waiting: list[Any] = [stream]

    def accept(_port: int) -> Any:
        if waiting:
            return waiting.pop()
        assert over.wait(10)
        raise ConnectionAbortedError

    ports = ReversePorts(accept, [1], Stubborn(1))
    assert wait_until(lambda: stream.ends == ["reset", "close"], Deadline(10))
    assert "host port 1 was reset: can't start new thread" in ports.fault
    ports.close()
    over.set()


def test_a_link_whose_second_thread_does_not_start_ends() -> None:
    near, far = socket.socketpair()
    stream = Stream()
    with near:
        Links(Stubborn()).join(far, cast(Any, stream))
        assert near.recv(1) == b""
    assert stream.ends == ["reset", "close"]


# -- sessions


class _Interrupted(ServiceThread):
    """A thread whose first join is interrupted."""

    joined = 0

    def join(self, timeout: float | None = None) -> None:
        type(self).joined += 1
        if self.joined == 1:
            raise KeyboardInterrupt("injected")
        super().join(timeout)


def test_a_session_whose_close_is_interrupted_closes_its_channel() -> None:
    near, far = socket.socketpair()
    session = Session(near, bytes(16))
    session._thread = _Interrupted(session._run, name="fcvm-session")
    session.start()
    with pytest.raises(KeyboardInterrupt):
        session.close()
    assert wait_until(lambda: near.fileno() < 0, Deadline(10))
    far.close()
    session.close()


def test_a_session_that_cannot_resume_closes_its_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    near, far = socket.socketpair()
    session = Session(near, bytes(16))
    session.start()
    session.close()
    other, there = socket.socketpair()
    with pytest.raises(Exception, match="closed by the host"):
        session.resume_session(other, cast(Any, _Opening()))
    assert other.fileno() < 0
    far.close()
    there.close()


class _Opening:
    kind, what, fields, sink = 1, "nothing", (), None


# -- the supervisor


def zombies() -> set[int]:
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if fields[0] == "Z" and int(fields[1]) == os.getpid():
                found.add(int(path.parent.name))
    return found


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_a_supervisor_that_cannot_watch_its_guard_leaves_no_process(
    monkeypatch: pytest.MonkeyPatch, fault: BaseException
) -> None:
    calls: list[int] = []
    original = os.pidfd_open

    def fail_second(pid: int) -> int:
        calls.append(pid)
        if len(calls) == 2:
            raise fault
        return original(pid)

    before = zombies()
    with RunDir() as run:
        monkeypatch.setattr(own.os, "pidfd_open", fail_second)
        with pytest.raises((HostError, KeyboardInterrupt)):
            Supervisor.start(run.path)
        with pytest.raises(ChildProcessError):
            os.waitpid(calls[1], os.WNOHANG)
    assert zombies() == before


def test_a_spawn_without_a_thread_to_watch_its_end_is_undone_and_the_next_one_works(
    running: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = running.make_dir("sleep")
    with monkeypatch.context() as patch:
        patch.setattr(supervisor.ServiceThread, "start", raising(NO_THREAD))
        with pytest.raises((RuntimeError, HostError)):
            running.spawn(["sleep", "100"], name="sleep", stdout=Path("log"), owned_dir=directory)
    child = running.spawn(["sh", "-c", "exit 3"], name="sh", stdout=Path("log"))
    assert child.wait(10).code == 3
    assert wait_until(lambda: not directory.exists(), Deadline(10))


def test_descriptors_are_duplicated_all_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = messages.fcntl.fcntl

    def fail_second(descriptor: int, *arguments: int) -> int:
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(24, "Too many open files")
        return original(descriptor, *arguments)

    before = descriptors()
    monkeypatch.setattr(messages.fcntl, "fcntl", fail_second)
    with pytest.raises(OSError, match="Too many"):
        messages.duplicate_above({1000: 0, 1: 1, 2: 2})
    assert descriptors() == before


def test_a_process_that_cannot_be_forked_leaves_no_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fork", raising(BlockingIOError(11, "Resource temporarily unavailable")))
    with pytest.raises(BlockingIOError):
        host_spawner.spawn_bound([b"/bin/true"], {}, [(0, 0)])


_DIES = """
import os, sys
from pathlib import Path
from pytest_fcvm.host.paths import RunDir
from pytest_fcvm.host.supervisor.supervisor import Supervisor
root = Path(sys.argv[1])
shared, run = RunDir(root).__enter__(), RunDir(root).__enter__()
supervisor = Supervisor.start(run.path, extra_dir=shared.path)
supervisor.spawn(["true"], name="true", stdout=Path("log")).wait(10)
print(shared.path, flush=True)
if sys.argv[2] == "close":
    supervisor.close()
    assert shared.path.exists()
os._exit(0)
"""


@pytest.mark.parametrize("how", ["die", "close"])
def test_a_shared_directory_is_removed_only_when_its_process_dies(
    how: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("r")
    done = subprocess.run([sys.executable, "-c", _DIES, root, how], check=True, capture_output=True, text=True)
    shared = Path(done.stdout.strip())
    if how == "die":
        assert wait_until(lambda: not list(root.iterdir()), Deadline(10)), list(root.iterdir())
    else:
        assert shared.exists()


# -- directories and locks


@pytest.mark.parametrize("step", ["open", "_holds"])
def test_a_run_directory_that_cannot_be_locked_is_not_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, step: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(own.os if step == "open" else paths, step, raising(OSError(24, "Too many open files")))
        with pytest.raises((HostError, OSError)):
            RunDir(tmp_path).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_a_reservation_that_cannot_be_written_is_not_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    user = object()
    reservations = open_reservations(tmp_path / "admission", user)
    with monkeypatch.context() as patch:
        patch.setattr(own.os, "pwrite", raising(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            reservations.add("a test", 100)
    assert reservations.own_clones() == 0
    close_reservations(tmp_path / "admission", user)


def test_the_last_admission_of_a_process_closes_its_reservations_and_removes_their_file(tmp_path: Path) -> None:
    first, second = Admission(tmp_path), Admission(tmp_path)
    kept = first.admit(1, holder="a", first=True, deadline_s=10)
    second.admit(1, holder="b", first=True, deadline_s=10).release()
    second.close()
    assert len(list((tmp_path / "admission").glob("*-*"))) == 1
    first.close()
    kept.release()
    assert list((tmp_path / "admission").glob("*-*")) == []
    with first.admit(1, holder="a", first=True, deadline_s=10):  # a clone that outlives its harness, or a second run
        pass
    first.close()


# -- threads


def test_a_thread_whose_start_was_interrupted_is_still_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    group, over = ThreadGroup(), threading.Event()
    thread = ServiceThread(over.wait, 10, name="fcvm-test")
    original = ServiceThread.start

    def start(self: ServiceThread) -> None:
        original(self)
        raise KeyboardInterrupt("injected")

    monkeypatch.setattr(ServiceThread, "start", start)
    with pytest.raises(KeyboardInterrupt):
        group.start(thread)
    over.set()
    group.join(10)
    assert not thread.is_alive()


def test_mounts_whose_making_is_interrupted_leave_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounts, "_make", lambda _binds: os.dup(0))
    _Interrupted.joined = 0
    monkeypatch.setattr(mounts, "ServiceThread", _Interrupted)
    with pytest.raises(KeyboardInterrupt):
        mounts.open_mounts([])


def test_a_shell_whose_input_has_no_thread_leaves_no_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shell.ServiceThread, "start", raising(NO_THREAD))
    with pytest.raises(RuntimeError, match="can't start"), shell._typed_into(cast(Any, None)):
        raise AssertionError
