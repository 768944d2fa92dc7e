"""Readiness probes: of a base's service before its snapshot, and of a clone's port on the client's path."""

from __future__ import annotations

import errno
import http.client
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

from pytest_fcvm.errors import GuestTimeout, UsageProblem
from pytest_fcvm.host.clock import Deadline, monotonic
from pytest_fcvm.host.sockets import connect
from pytest_fcvm.model.guest import ExitStatus
from pytest_fcvm.model.net import PROBE_PORT, Endpoint, PublishedPort
from pytest_fcvm.model.results import ExecResult
from pytest_fcvm.model.specs import ReadyMode, ReadySpec

__all__ = ["ClientPath", "ReadyTarget", "finalize_ready", "wait_until_ready"]

_STATUS = "HTTP status"
_TRY_S = 5.0  # the timeout of one probe
_LEAST_S = 0.1  # the least timeout of a command, at the deadline too
_HUNG_UP = "the connection was closed"
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.01, 0.25
_STABLE_S = 0.05  # a connection must last this long: a server that is starting may accept and close
_HANGS_UP_S = 3.0  # a server that closes connections for this long is ready: HAProxy without a backend does
_SERVED_S, _SERVED_BUSY_S, _SERVED_SHARE, _BUSY_SHARE = 10.0, 45.0, 0.75, 0.1
_SETTLE_S = 0.2  # `agent`: a workload that ends within this time is not ready


class ReadyTarget(Protocol):
    """What probes require of a VM."""

    def endpoint(self, guest_port: int) -> Endpoint:
        """Return the address at which the host reaches a guest port."""
        ...

    def why_silent(self, guest_port: int) -> str:
        """Ask the agent for a listener that can be reached. Return "" if there is one, else the reason."""
        ...

    def pause_for_exit(self, timeout_s: float) -> None:
        """Wait. Raise WorkloadExited or EngineError at once when the workload or the VM ends.

        Do not raise for a workload that ended as its condition allows.
        """
        ...

    @property
    def exit_status(self) -> ExitStatus | None:
        """Return the exit status of the workload, None while it runs."""
        ...

    def exec(self, cmd: str | Sequence[str], *, timeout: float) -> ExecResult:
        """Run a command in the guest."""
        ...

    def metrics(self) -> Mapping[str, float | int | str]:
        """Return the guest's metrics. `workload_cpu_us` is the CPU time of the workload."""
        ...

    def wait_for_log(self, regex: str, *, timeout: float, times: int) -> object:
        """Wait until the workload's output has matched so many times.

        Raise GuestTimeout, or WorkloadExited at once when the workload ends before.
        """
        ...


def finalize_ready(
    wanted: ReadySpec | None,
    health_test: Sequence[str],
    exposed: Sequence[tuple[int, str]],
    *,
    shell: Sequence[str] = (),
    check_s: float | None = None,
    interval_s: float | None = None,
) -> ReadySpec:
    """Return the wanted condition, else the image's health check, else TCP on its exposed ports, else `agent`.

    `health_test` is Docker's `Test` list, empty without a health check. `shell` runs its CMD-SHELL, `check_s` and
    `interval_s` are its Timeout and Interval. Raise UsageProblem if `healthcheck` is wanted and the image has none.
    """
    command = _health_command(health_test, shell)
    if wanted is None and command:
        wanted = ReadySpec(mode=ReadyMode.HEALTHCHECK)
    if wanted is not None and wanted.mode is ReadyMode.HEALTHCHECK:
        if not command:
            raise UsageProblem(
                "the image has no HEALTHCHECK", hint="use ready=tcp:PORT, http:PORT/path or exec:COMMAND"
            )
        return replace(wanted, argv=command, check_s=check_s, interval_s=interval_s)
    if wanted is not None:
        return wanted
    ports = [number for number, proto in exposed if proto == "tcp"]
    if not ports:
        return ReadySpec(mode=ReadyMode.AGENT)
    return ReadySpec(mode=ReadyMode.TCP, port=ports[0], others=tuple(ports[1:]))


def wait_until_ready(target: ReadyTarget, ready: ReadySpec, timeout_s: float) -> None:
    """Probe a base until it is ready.

    Raise WorkloadExited at once when the workload ends, GuestTimeout at the deadline with the last answer.
    """
    if ready.mode is ReadyMode.LOG:
        _wait_for_line(target, ready, timeout_s)
        return
    deadline, started = Deadline(timeout_s), monotonic()
    probe = _probe_for(target, ready, deadline)
    pause = _FIRST_PAUSE_S
    answer = probe()
    while answer and not deadline.expired:
        target.pause_for_exit(pause)
        pause = min(pause * 1.5, _LONGEST_PAUSE_S)
        answer = probe()
    if answer:
        raise _not_ready(ready, monotonic() - started, answer)


class _Ports:
    """The TCP ports that an image exposes. Some of them may never be served.

    They are ready when all of them listen. When only some listen, this gives the others up in two cases: for 10 s no
    port opened and the workload used less than a tenth of a CPU; or no port opened for three quarters of the timeout,
    at least 45 s. RabbitMQ's image, for example, exposes a TLS port that it does not serve by default, and its first
    port belongs to another program, which listens long before the broker.
    """

    def __init__(self, target: ReadyTarget, ports: Sequence[int], timeout_s: float) -> None:
        self._target, self._ports = target, ports
        self._busy_s = max(_SERVED_BUSY_S, _SERVED_SHARE * timeout_s)
        self._hung_up: dict[int, float] = {}
        self._closed: dict[int, str] = dict.fromkeys(ports, "")
        self._opened_at = self._idle_since = monotonic()
        self._used_us = 0.0

    def ask(self) -> str:
        """Return "" when the ports are ready, else what the probes saw."""
        before = len(self._closed)
        self._closed = {port: answer for port in self._closed if (answer := self._ask_one(port))}
        if not self._closed:
            return ""
        now = monotonic()
        if len(self._closed) < before or len(self._closed) == len(self._ports):
            self._opened_at = self._idle_since = now
        elif self._is_busy():
            self._idle_since = now
        if now - self._idle_since >= _SERVED_S or now - self._opened_at >= self._busy_s:
            return ""
        served = ", ".join(str(port) for port in self._ports if port not in self._closed)
        return "; ".join(self._closed.values()) + (f" ({served} can be reached)" if served else "")

    def _ask_one(self, port: int) -> str:
        answer = _ask_tcp(self._target, port)
        if answer != _HUNG_UP:
            self._hung_up.pop(port, None)
            return answer
        return answer if monotonic() - self._hung_up.setdefault(port, monotonic()) < _HANGS_UP_S else ""

    def _is_busy(self) -> bool:
        used_us = float(self._target.metrics().get("workload_cpu_us", 0))
        was_busy = used_us - self._used_us > _BUSY_SHARE * (monotonic() - self._idle_since) * 1e6
        if was_busy:
            self._used_us = used_us
        return was_busy


def _wait_for_line(target: ReadyTarget, ready: ReadySpec, timeout_s: float) -> None:
    try:
        target.wait_for_log(ready.text, timeout=timeout_s, times=ready.times)
    except GuestTimeout:
        raise _not_ready(ready, timeout_s, "no such line in the workload's log") from None


def _not_ready(ready: ReadySpec, waited_s: float, answer: str) -> GuestTimeout:
    return GuestTimeout(
        f"not ready after {waited_s:.0f} s: {ready}: {answer}",
        hint="give --fcvm-ready another condition, or --fcvm-ready-timeout more time",
    )


class ClientPath:
    """The path on which a test reaches a clone. `verify` probes it before the test gets the clone.

    For HTTP, the probe is the request. Otherwise it is a connection to PROBE_PORT, where nothing listens: the guest's
    kernel refuses it through the NIC and the forwarder, at no cost to the workload. The base's probes have already seen
    that the service listens. A connection to the service would show less, because a forwarder accepts it even for a
    guest that does not answer, and it would cost the guest 30 ms under emulation.

    Nothing may connect before the clone's agent has answered: the network would learn the base's MAC address, which the
    clone is about to change.
    """

    def __init__(self, publish: Callable[[PublishedPort], Endpoint], ready: ReadySpec, service_port: int) -> None:
        self._http = ready.text if ready.mode is ReadyMode.HTTP else ""
        port = PublishedPort(guest_port=service_port if self._http else PROBE_PORT)
        self._find_endpoint: Callable[[], Endpoint] = lambda: publish(port)

    def verify(self, pause_for_exit: Callable[[float], None], timeout_s: float) -> None:
        """Wait until the clone answers on the path. Call it after the clone's agent has answered.

        Raise GuestTimeout with the last answer, or what `pause_for_exit` raises when the clone has ended.
        """
        deadline, pause = Deadline(timeout_s), 0.001
        while answer := self._try():
            if deadline.expired:
                raise GuestTimeout(f"the clone's port does not answer: {answer}", hint="try --fcvm-rebuild")
            pause_for_exit(pause)
            pause = min(pause * 2, _LONGEST_PAUSE_S)

    def _try(self) -> str:
        """Return "" when the path works, else what the probe saw."""
        endpoint = self._find_endpoint()
        return _http_answer(endpoint, self._http) if self._http else _refusal(endpoint)


def _refusal(endpoint: Endpoint) -> str:
    try:
        connection = connect(endpoint, timeout_s=_TRY_S)
    except OSError as error:  # the forwarder accepts always, so the host refused
        if error.errno == errno.EMFILE:  # waiting does not fix that
            raise
        return f"nothing forwards to the guest: {error}"
    with connection:
        try:
            connection.recv(1)
        except ConnectionError:
            return ""
        except OSError as error:
            return f"no answer from the guest's network: {error}"
    return ""


def _probe_for(target: ReadyTarget, ready: ReadySpec, deadline: Deadline) -> Callable[[], str]:
    """Return a function that returns "" when ready, else what it saw."""
    match ready.mode:
        case ReadyMode.HTTP:
            return lambda: _ask_http(target, ready.port or 80, ready.text)
        case ReadyMode.TCP:
            return _Ports(target, (ready.port or 0, *ready.others), deadline.timeout_s or 0).ask
        case ReadyMode.EXEC:
            return _Command(target, ready.text, ready, deadline).ask
        case ReadyMode.HEALTHCHECK:
            return _Command(target, ready.argv, ready, deadline).ask
        case ReadyMode.AGENT:
            return lambda: _settle(target)
        case ReadyMode.EXIT:
            return lambda: _ask_end(target, ready.expected_exit_code)
        case ReadyMode.LOG:
            raise AssertionError("a log line has no probe")


def _health_command(test: Sequence[str], shell: Sequence[str]) -> tuple[str, ...]:
    """Read Docker's `Test`: ("CMD", program, …), ("CMD-SHELL", line), ("NONE",) or nothing."""
    kind, *words = test or ("NONE",)
    if kind == "CMD-SHELL":
        return (*(shell or ("/bin/sh", "-c")), *words)
    return tuple(words) if kind == "CMD" else ()


def _settle(target: ReadyTarget) -> str:
    target.pause_for_exit(_SETTLE_S)
    return ""


def _ask_end(target: ReadyTarget, code: int | None) -> str:
    status = target.exit_status
    if status is None:
        return "the workload is still running"
    return "" if status.exit_code == code else f"the workload ended with {status}"


class _Command:
    """A command in the guest that exits with 0 when the service is ready.

    Its timeout is that of the image's HEALTHCHECK, else the time that is left. A pause follows as long as the command
    took, so that a slow guest has time for its service, but at most the interval of the HEALTHCHECK.
    """

    def __init__(self, target: ReadyTarget, command: str | Sequence[str], ready: ReadySpec, deadline: Deadline) -> None:
        self._target, self._command, self._deadline = target, command, deadline
        self._check_s, self._interval_s = ready.check_s, ready.interval_s
        self._again = 0.0

    def ask(self) -> str:
        """Return "" when the command exited with 0, else what it did."""
        while (pause := self._again - monotonic()) > 0 and not self._deadline.expired:
            self._target.pause_for_exit(min(pause, _LONGEST_PAUSE_S))
        left = self._deadline.remaining()
        limits = [limit for limit in (self._check_s, left) if limit is not None]
        timeout_s = max(min(limits, default=_TRY_S), _LEAST_S)
        started = monotonic()
        try:
            result = self._target.exec(self._command, timeout=timeout_s)
        except GuestTimeout:
            return f"{self._command!r} did not end within {timeout_s:.0f} s"
        finally:
            ended = monotonic()
            self._again = ended + min(ended - started, self._interval_s or ended - started)
        if result.exit_code == 0:
            return ""
        return f"exit code {result.exit_code}: {(result.stderr or result.stdout)[-200:]}"


def _ask_http(target: ReadyTarget, port: int, path: str) -> str:
    """Send the request. When it fails without a status, ask for a listener."""
    answer = _http_answer(target.endpoint(port), path)
    with suppress(GuestTimeout):
        if answer and not answer.startswith(_STATUS):
            return target.why_silent(port) or answer
    return answer


def _ask_tcp(target: ReadyTarget, port: int) -> str:
    """Ask for a listener, then connect. A connection alone shows nothing: the host accepts for closed ports too."""
    try:
        silent = target.why_silent(port)
    except GuestTimeout as error:
        return error.message
    return silent or _tcp_answer(target.endpoint(port), _STABLE_S)


def _tcp_answer(endpoint: Endpoint, stable_s: float) -> str:
    try:
        with connect(endpoint, timeout_s=_TRY_S) as connection:
            connection.settimeout(stable_s)
            try:
                return "" if connection.recv(1) else _HUNG_UP
            except (TimeoutError, BlockingIOError):
                return ""
    except OSError as error:
        return f"{type(error).__name__}: {error}"


def _http_answer(endpoint: Endpoint, path: str) -> str:
    connection = http.client.HTTPConnection(*endpoint, timeout=_TRY_S)
    try:
        connection.sock = connect(endpoint, timeout_s=_TRY_S)
        connection.request("GET", path, headers={"Connection": "close"})
        response = connection.getresponse()
        response.read()
    except (OSError, http.client.HTTPException) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        connection.close()
    return "" if response.status < 400 else f"{_STATUS} {response.status}"
