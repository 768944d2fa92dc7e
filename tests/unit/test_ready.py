"""Readiness probes of real servers: what counts as an answer, when to give up, and what the error says."""

from __future__ import annotations

import http.server
import os
import re
import resource
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `fakes`

from fakes.ready import Health, Target

from pytest_fcvm.errors import EngineError, GuestError, GuestTimeout, UsageProblem, WorkloadExited
from pytest_fcvm.host.clock import monotonic
from pytest_fcvm.model.guest import ExitStatus
from pytest_fcvm.model.net import PROBE_PORT, Endpoint, PublishedPort
from pytest_fcvm.model.results import ExecResult
from pytest_fcvm.model.specs import ReadyMode, ReadySpec
from pytest_fcvm.ready import ClientPath, finalize_ready, wait_until_ready

_HTTP = ReadySpec(mode=ReadyMode.HTTP, port=80, text="/health")
_TCP = ReadySpec(mode=ReadyMode.TCP, port=80)
_HEALTH = ReadySpec(mode=ReadyMode.HEALTHCHECK, argv=("check",))
_LONG_S, _SHORT_S = 20.0, 0.5


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """A stack that is closed after the test."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def target() -> Target:
    """A VM without a service."""
    return Target()


@pytest.fixture
def serve_http(stack: ExitStack, target: Target) -> Callable[..., list[tuple[str, str]]]:
    """Serve on guest port 80. Each request gets the next status, the last one repeats. Return the requests."""

    def serve(*statuses: int) -> list[tuple[str, str]]:
        asked: list[tuple[str, str]] = []
        server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Health", (Health,), {"statuses": _repeat_last(statuses), "asked": asked})
        )
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        stack.callback(server.server_close)
        stack.callback(server.shutdown)
        target.ports[80] = Endpoint(*server.server_address[:2])
        return asked

    return serve


@pytest.fixture
def serve_tcp(stack: ExitStack, target: Target) -> Callable[[Callable[[socket.socket], None]], None]:
    """Serve on guest port 80. A function gets each connection."""

    def serve(take: Callable[[socket.socket], None]) -> None:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        stack.callback(lambda: listener.shutdown(socket.SHUT_RDWR))

        def accept() -> None:
            with suppress(OSError):  # closed after the test
                while True:
                    take(stack.enter_context(listener.accept()[0]))

        threading.Thread(target=accept, daemon=True).start()
        target.ports[80] = Endpoint(*listener.getsockname())

    return serve


def _repeat_last(statuses: Sequence[int]) -> Iterator[int]:
    yield from statuses
    while True:
        yield statuses[-1]


def _free_port() -> Endpoint:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return Endpoint(*free.getsockname())


def _hang_up(connection: socket.socket) -> None:
    connection.close()


def _reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def _keep(_connection: socket.socket) -> None:
    """Send nothing, as most servers do before a request."""


def _greet(connection: socket.socket) -> None:
    connection.sendall(b"220 ready\r\n")


def test_a_service_that_answers_is_ready_at_once(
    target: Target, serve_http: Callable[..., list[tuple[str, str]]]
) -> None:
    asked = serve_http(200)
    wait_until_ready(target, _HTTP, _LONG_S)
    host, port = target.ports[80]
    assert asked == [("/health", f"{host}:{port}")]


def test_a_service_that_starts_slowly_is_probed_until_it_is_healthy(
    target: Target, serve_http: Callable[..., list[tuple[str, str]]]
) -> None:
    asked = serve_http(503, 500, 404, 204)
    wait_until_ready(target, _HTTP, _LONG_S)
    assert len(asked) == 4


def test_a_service_that_listens_late_is_waited_for(
    target: Target, serve_http: Callable[..., list[tuple[str, str]]]
) -> None:
    target.ports[80] = _free_port()
    target.on_pause = lambda: None if target.commands else (target.commands.append("started"), serve_http(301))[0]
    wait_until_ready(target, _HTTP, _LONG_S)
    assert target.commands == ["started"]


@pytest.mark.parametrize("take", [_keep, _greet])
def test_a_listener_that_keeps_a_connection_is_ready(
    take: Callable[[socket.socket], None], target: Target, serve_tcp: Callable[[Callable[[socket.socket], None]], None]
) -> None:
    serve_tcp(take)
    wait_until_ready(target, _TCP, _LONG_S)


_LAST_ANSWERS: list[tuple[ReadySpec, Callable[[socket.socket], None] | int | None, str]] = [
    (_HTTP, 500, r"http:80/health: HTTP status 500"),
    (_HTTP, None, r"http:80/health: ConnectionRefusedError: .*Connection refused"),
    (_HTTP, _hang_up, r"http:80/health: (RemoteDisconnected: Remote end closed|ConnectionResetError|BrokenPipeError)"),
    (_HTTP, _greet, r"http:80/health: BadStatusLine: 220 ready"),
    (_TCP, None, r"tcp:80: ConnectionRefusedError: .*Connection refused"),
    (_TCP, _hang_up, r"tcp:80: the connection was closed"),
    (_TCP, _reset, r"tcp:80: ConnectionResetError"),
]


@pytest.mark.parametrize(("ready", "service", "last"), _LAST_ANSWERS)
def test_the_last_answer_is_reported_at_the_deadline(
    ready: ReadySpec,
    service: Callable[[socket.socket], None] | int | None,
    last: str,
    target: Target,
    serve_http: Callable[..., list[tuple[str, str]]],
    serve_tcp: Callable[[Callable[[socket.socket], None]], None],
) -> None:
    target.ports[80] = _free_port()
    if isinstance(service, int):
        serve_http(service)
    elif service:
        serve_tcp(service)
    with pytest.raises(GuestTimeout) as caught:
        wait_until_ready(target, ready, _SHORT_S)
    assert re.match(f"not ready after [01] s: {last}", caught.value.message)
    assert caught.value.hint == "give --fcvm-ready another condition, or --fcvm-ready-timeout more time"


def test_a_port_that_accepts_without_a_listener_in_the_guest_is_not_ready(
    target: Target, serve_tcp: Callable[[Callable[[socket.socket], None]], None]
) -> None:
    serve_tcp(_keep)  # as slirp accepts for every port
    target.listens = False
    with pytest.raises(GuestTimeout, match="tcp:80: nothing listens on port 80, or only on a loopback address"):
        wait_until_ready(target, _TCP, _SHORT_S)


def test_a_request_to_a_port_without_a_listener_is_reported_as_such(
    target: Target, serve_tcp: Callable[[Callable[[socket.socket], None]], None]
) -> None:
    serve_tcp(lambda connection: connection.close())  # as slirp does for a closed port
    target.listens = False
    with pytest.raises(GuestTimeout, match=r"nothing listens on port 80, or only on a loopback address\nhint"):
        wait_until_ready(target, ReadySpec(mode=ReadyMode.HTTP, port=80, text="/"), _SHORT_S)


@pytest.mark.parametrize(
    "reason", [WorkloadExited("the workload ended with exit code 3"), EngineError("the VM ended unexpectedly")]
)
def test_a_workload_that_ends_is_reported_at_once(reason: Exception, target: Target) -> None:
    target.ports[80] = _free_port()
    target.reason = reason
    threading.Timer(0.2, target.ended.set).start()
    started = monotonic()
    with pytest.raises(type(reason)) as caught:
        wait_until_ready(target, _TCP, 60)
    assert caught.value is reason
    assert monotonic() - started < 10


def test_a_workload_that_ended_before_the_first_probe_is_not_ready(target: Target) -> None:
    target.ended.set()
    with pytest.raises(WorkloadExited):
        wait_until_ready(target, ReadySpec(mode=ReadyMode.AGENT), _LONG_S)


def test_a_workload_is_ready_when_it_exits_with_the_expected_code(target: Target) -> None:
    def end() -> None:
        target.exit_status = ExitStatus(signal=15)

    threading.Timer(0.1, end).start()
    wait_until_ready(target, ReadySpec(mode=ReadyMode.EXIT, text="143"), _LONG_S)
    assert target.exit_status


@pytest.mark.parametrize(
    ("status", "answer"),
    [(None, "the workload is still running"), (ExitStatus(code=3), "the workload ended with exit code 3")],
)
def test_a_workload_that_runs_on_or_exits_otherwise_is_not_ready(
    status: ExitStatus | None, answer: str, target: Target
) -> None:
    target.exit_status = status
    with pytest.raises(GuestTimeout, match=f"exit:0: {answer}"):
        wait_until_ready(target, ReadySpec(mode=ReadyMode.EXIT, text="0"), _SHORT_S)


def test_a_log_line_is_waited_for(target: Target) -> None:
    lines = iter(["starting\n", "ready to accept", " connections\n"])

    def more() -> None:
        target.log += next(lines)

    target.on_pause = more
    wait_until_ready(target, ReadySpec(mode=ReadyMode.LOG, text="^ready to accept connections$"), _LONG_S)
    with pytest.raises(GuestTimeout, match="no such line in the workload's log"):
        wait_until_ready(Target(), ReadySpec(mode=ReadyMode.LOG, text="x"), 0)


def test_a_command_is_run_until_it_succeeds(target: Target) -> None:
    target.results = [
        ExecResult(exit_code=1, stderr_bytes=b"no"),
        GuestTimeout("it hangs"),
        ExecResult(exit_code=0),
    ]
    wait_until_ready(target, ReadySpec(mode=ReadyMode.EXEC, text="pg_isready"), _LONG_S)
    assert target.commands == ["pg_isready"] * 3


def test_the_last_output_of_a_command_is_reported(target: Target) -> None:
    target.results = [ExecResult(exit_code=2, stdout_bytes=b"no response")]
    with pytest.raises(GuestTimeout, match="exec:pg_isready: exit code 2: no response"):
        wait_until_ready(target, ReadySpec(mode=ReadyMode.EXEC, text="pg_isready"), 0)


def test_a_command_that_can_never_run_is_reported_at_once(target: Target) -> None:
    target.results = [GuestError("the image has no shell to run pg_isready")]
    with pytest.raises(GuestError, match="no shell"):
        wait_until_ready(target, ReadySpec(mode=ReadyMode.EXEC, text="pg_isready"), _LONG_S)


def test_a_health_check_runs_as_the_image_defines_it(target: Target) -> None:
    target.results = [ExecResult(exit_code=0)]
    ready = finalize_ready(None, ("CMD-SHELL", "curl -f localhost"), ((80, "tcp"),))
    wait_until_ready(target, ready, _LONG_S)
    assert target.commands == [("/bin/sh", "-c", "curl -f localhost")]


@pytest.mark.parametrize(
    ("wanted", "health", "exposed", "final"),
    [
        (None, ("CMD", "check", "-x"), [(80, "tcp")], ReadySpec(mode=ReadyMode.HEALTHCHECK, argv=("check", "-x"))),
        (
            None,
            ("NONE",),
            [(53, "udp"), (80, "tcp"), (90, "tcp")],
            ReadySpec(mode=ReadyMode.TCP, port=80, others=(90,)),
        ),
        (None, (), [(53, "udp")], ReadySpec(mode=ReadyMode.AGENT)),
        (None, (), [], ReadySpec(mode=ReadyMode.AGENT)),
        (_HTTP, ("CMD", "check"), [(80, "tcp")], _HTTP),
        (
            ReadySpec(mode=ReadyMode.HEALTHCHECK),
            ("CMD", "check"),
            [],
            ReadySpec(mode=ReadyMode.HEALTHCHECK, argv=("check",)),
        ),
    ],
)
def test_the_given_condition_takes_precedence_over_the_images(
    wanted: ReadySpec | None, health: Sequence[str], exposed: Sequence[tuple[int, str]], final: ReadySpec
) -> None:
    assert finalize_ready(wanted, health, exposed) == final


def test_a_health_check_uses_the_images_shell_and_timeout(target: Target) -> None:
    ready = finalize_ready(None, ("CMD-SHELL", "x"), (), shell=("/busybox/sh", "-ec"), check_s=7.0, interval_s=2.0)
    assert ready.argv == ("/busybox/sh", "-ec", "x")
    target.results = [ExecResult(exit_code=0)]
    wait_until_ready(target, ready, _LONG_S)
    assert target.timeouts == [7.0]


@pytest.mark.parametrize(("timeout_s", "given_s"), [(60.0, 60.0), (0.0, 0.1)])
def test_a_command_may_take_all_the_time_that_is_left(target: Target, timeout_s: float, given_s: float) -> None:
    target.results = [ExecResult(exit_code=0)]
    wait_until_ready(target, ReadySpec(mode=ReadyMode.EXEC, text="slow"), timeout_s)
    assert target.timeouts == [pytest.approx(given_s, abs=1)]


def test_a_slow_check_is_repeated_after_as_long_a_pause_and_a_quick_one_soon(target: Target) -> None:
    clock, began = [0.0], list[float]()
    target.results = [ExecResult(exit_code=1)] * 3 + [ExecResult(exit_code=0)]

    def work() -> None:
        began.append(clock[0])
        clock[0] += 2.0 if len(began) < 3 else 0.0

    def wait(timeout_s: float) -> None:
        clock[0] += timeout_s

    target.on_exec, target.on_wait = work, wait
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pytest_fcvm.ready.monotonic", lambda: clock[0])
        wait_until_ready(target, replace(_HEALTH, interval_s=1.0), _LONG_S)
        assert [round(after - before) for before, after in pairwise(began)] == [3, 3, 0]


def test_every_port_that_the_image_exposes_is_waited_for(target: Target) -> None:
    endpoint = _free_port()
    with socket.create_server(endpoint) as listener:
        target.ports = dict.fromkeys((80, 443), Endpoint(*listener.getsockname()))
        target.open_ports = {80}
        opened = threading.Timer(0.5, target.open_ports.add, (443,))
        opened.start()
        wait_until_ready(target, replace(_TCP, others=(443,)), _LONG_S)
        assert 443 in target.open_ports


def test_a_port_that_nobody_serves_is_given_up_when_the_workload_is_idle(target: Target) -> None:
    clock, used_us = [0.0], [0.0]

    def wait(timeout_s: float) -> None:
        clock[0] += timeout_s
        used_us[0] += 0.5e6 * timeout_s if clock[0] < 25 else 0  # half a CPU, and then it has started

    target.on_wait, target.cpu_us = wait, lambda: used_us[0]
    with socket.create_server(_free_port()) as listener, pytest.MonkeyPatch.context() as patch:
        target.ports = dict.fromkeys((80, 443), Endpoint(*listener.getsockname()))
        target.open_ports = {80}
        patch.setattr("pytest_fcvm.ready.monotonic", lambda: clock[0])
        wait_until_ready(target, replace(_TCP, others=(443,)), _LONG_S)
    assert 34 < clock[0] < 40


def test_ports_that_are_closed_at_the_deadline_are_named(target: Target) -> None:
    with socket.create_server(_free_port()) as listener:
        target.ports = dict.fromkeys((22, 80, 443), Endpoint(*listener.getsockname()))
        target.open_ports = {80}
        with pytest.raises(GuestTimeout, match=r"tcp:22, 80, 443: .* port 22.* port 443.*\(80 can be reached\)"):
            wait_until_ready(target, replace(_TCP, port=22, others=(80, 443)), _SHORT_S)


def test_a_server_that_closes_every_connection_is_ready_after_a_while(
    target: Target, serve_tcp: Callable[[Callable[[socket.socket], None]], None]
) -> None:
    serve_tcp(_hang_up)
    started = monotonic()
    wait_until_ready(target, _TCP, _LONG_S)
    assert monotonic() - started >= 3.0


def test_a_probe_works_with_more_descriptors_than_select_can(target: Target, stack: ExitStack) -> None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, limit[1]), limit[1]))
    stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limit)
    listener = stack.enter_context(socket.create_server(_free_port()))
    held = [os.dup(listener.fileno()) for _ in range(1100)]
    stack.callback(os.closerange, held[0], held[-1] + 1)
    assert held[-1] > 1024
    target.ports[80] = Endpoint(*listener.getsockname())
    wait_until_ready(target, _TCP, _LONG_S)


@pytest.mark.parametrize("health", [(), ("NONE",)])
def test_a_health_check_that_the_image_lacks_is_a_usage_problem(health: Sequence[str]) -> None:
    with pytest.raises(UsageProblem, match="the image has no HEALTHCHECK") as caught:
        finalize_ready(ReadySpec(mode=ReadyMode.HEALTHCHECK), health, [(80, "tcp")])
    assert caught.value.hint == "use ready=tcp:PORT, http:PORT/path or exec:COMMAND"


@pytest.fixture
def open_path(target: Target) -> Callable[[ReadySpec], ClientPath]:
    """Open the path of a clone whose base was ready on port 80. Nothing listens on the other probed port."""
    return lambda ready: ClientPath(lambda port: target.endpoint(port.guest_port), ready, 80)


def test_a_clone_that_answers_is_probed_once(
    target: Target,
    serve_http: Callable[..., list[tuple[str, str]]],
    open_path: Callable[[ReadySpec], ClientPath],
) -> None:
    asked = serve_http(200)
    open_path(_HTTP).verify(target.pause_for_exit, _LONG_S)
    host, port = target.ports[80]
    assert asked == [("/health", f"{host}:{port}")]


def test_a_clone_is_probed_until_it_is_healthy(
    target: Target,
    serve_http: Callable[..., list[tuple[str, str]]],
    open_path: Callable[[ReadySpec], ClientPath],
) -> None:
    asked = serve_http(503, 404, 302)
    open_path(_HTTP).verify(target.pause_for_exit, _LONG_S)
    assert len(asked) == 3


def test_a_clone_whose_port_opens_late_is_waited_for(
    target: Target,
    serve_http: Callable[..., list[tuple[str, str]]],
    open_path: Callable[[ReadySpec], ClientPath],
) -> None:
    target.ports[80] = _free_port()
    path = open_path(_HTTP)
    target.on_pause = lambda: None if target.commands else (target.commands.append("started"), serve_at_last())[0]

    def serve_at_last() -> None:
        serve_http(200)

    path.verify(target.pause_for_exit, _LONG_S)
    assert target.commands == ["started"]


@pytest.mark.parametrize("ready", [_TCP, ReadySpec(mode=ReadyMode.LOG, text="x"), ReadySpec(mode=ReadyMode.AGENT)])
def test_without_http_a_refusal_by_the_guest_verifies_a_clone(
    ready: ReadySpec,
    target: Target,
    serve_tcp: Callable[[Callable[[socket.socket], None]], None],
    open_path: Callable[[ReadySpec], ClientPath],
) -> None:
    serve_tcp(_reset)
    target.ports[PROBE_PORT] = target.ports.pop(80)
    open_path(ready).verify(target.pause_for_exit, _LONG_S)


@pytest.mark.parametrize(
    ("ready", "service", "last"),
    [
        *[case for case in _LAST_ANSWERS if case[0] is _HTTP and case[1] is not _hang_up],
        (_TCP, None, r"tcp:80: nothing forwards to the guest: .*Connection refused"),
        (_TCP, _keep, r"tcp:80: no answer from the guest's network: timed out"),
    ],
)
def test_the_last_answer_of_a_clone_that_does_not_answer_is_reported(
    ready: ReadySpec,
    service: Callable[[socket.socket], None] | int | None,
    last: str,
    target: Target,
    serve_http: Callable[..., list[tuple[str, str]]],
    serve_tcp: Callable[[Callable[[socket.socket], None]], None],
    open_path: Callable[[ReadySpec], ClientPath],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pytest_fcvm.ready._TRY_S", 0.2)
    target.ports[80] = _free_port()
    if isinstance(service, int):
        serve_http(service)
    elif service:
        serve_tcp(service)
    target.ports[PROBE_PORT] = target.ports[80]
    with pytest.raises(GuestTimeout) as caught:
        open_path(ready).verify(target.pause_for_exit, 0.1)
    assert re.match(f"the clone's port does not answer: {last.partition(': ')[2]}", caught.value.message)
    assert caught.value.hint == "try --fcvm-rebuild"


def test_the_reason_why_a_port_cannot_be_mapped_is_reported(target: Target) -> None:
    def fail(_port: PublishedPort) -> Endpoint:
        raise EngineError("the VM is gone")

    with pytest.raises(EngineError, match="the VM is gone"):
        ClientPath(fail, _TCP, 80).verify(target.pause_for_exit, _LONG_S)


def test_a_clone_that_ends_is_reported_at_once(target: Target, open_path: Callable[[ReadySpec], ClientPath]) -> None:
    target.ports[PROBE_PORT] = _free_port()
    target.ended.set()
    with pytest.raises(WorkloadExited):
        open_path(_TCP).verify(target.pause_for_exit, 60)
