"""Readiness: how it is known that a service answers, on a base before its snapshot, on the client's path of a clone."""

from __future__ import annotations

import http.client
import re
import select
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from pytest_fcvm.errors import FcvmError, GuestTimeout, UsageProblem
from pytest_fcvm.host.clock import Deadline, monotonic
from pytest_fcvm.model.net import Endpoint
from pytest_fcvm.model.results import ExecResult
from pytest_fcvm.model.specs import ReadyMode, ReadySpec

__all__ = ["PortTarget", "ReadyTarget", "finalize_ready", "prove_client_path", "wait_until_ready"]

_TRY_S = 5.0  # one answer may take this long
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.01, 0.25
_SETTLE_S = 0.2  # `agent`: a workload that dies at once is not ready


class PortTarget(Protocol):
    """What a probe of a port needs of a machine."""

    def endpoint(self, guest_port: int) -> Endpoint:
        """Return where the host reaches a guest port."""
        ...

    def listening(self, guest_port: int) -> bool:
        """Ask the agent for a listening socket that is not bound to loopback alone."""
        ...

    def pause_for_exit(self, timeout_s: float) -> None:
        """Wait, and raise WorkloadExited or EngineError at once when the workload or the VM has ended."""
        ...


class ReadyTarget(PortTarget, Protocol):
    """What every probe together needs of a machine."""

    def exec(self, cmd: str | Sequence[str], *, timeout: float) -> ExecResult:
        """Run a command in the guest."""
        ...

    def logs(self) -> str:
        """Return what the workload has printed."""
        ...


def finalize_ready(
    wanted: ReadySpec | None, health_test: Sequence[str], exposed: Sequence[tuple[int, str]]
) -> ReadySpec:
    """Return the wanted condition, else the image's health check, else TCP on its first exposed port, else `agent`.

    `health_test` is Docker's `Test` list, empty without one. Raise UsageProblem for a wanted but missing `healthcheck`.
    """
    command = _health_command(health_test)
    if wanted is None and command:
        wanted = ReadySpec(mode=ReadyMode.HEALTHCHECK)
    if wanted is not None and wanted.mode is ReadyMode.HEALTHCHECK:
        if not command:
            raise UsageProblem(
                "the image has no HEALTHCHECK", hint="use ready=tcp:PORT, http:PORT/path or exec:COMMAND"
            )
        return replace(wanted, argv=command)
    if wanted is not None:
        return wanted
    port = next((number for number, proto in exposed if proto == "tcp"), None)
    return ReadySpec(mode=ReadyMode.TCP, port=port) if port else ReadySpec(mode=ReadyMode.AGENT)


def wait_until_ready(target: ReadyTarget, ready: ReadySpec, timeout_s: float) -> None:
    """Probe a base until it is ready.

    Raise WorkloadExited at once when the workload ends, GuestTimeout at the deadline with the last answer.
    """
    probe = _probe_for(target, ready)
    deadline, started, pause = Deadline(timeout_s), monotonic(), _FIRST_PAUSE_S
    answer = probe()
    while answer and not deadline.expired:
        target.pause_for_exit(pause)
        pause = min(pause * 1.5, _LONGEST_PAUSE_S)
        answer = probe()
    if answer:
        raise GuestTimeout(
            f"not ready after {monotonic() - started:.0f} s: {ready}: {answer}",
            hint="give --fcvm-ready another condition, or --fcvm-ready-timeout more time",
        )


def prove_client_path(target: PortTarget, ready: ReadySpec, port: int | None, timeout_s: float) -> None:
    """Prove that a clone answers on the path a test will use; `port` is where a base that was ready listened.

    Raise GuestTimeout with the last answer.
    """
    if port is None:
        return
    ask = ReadySpec(mode=ReadyMode.HTTP, port=port, text=ready.text) if ready.mode is ReadyMode.HTTP else None
    deadline, pause = Deadline(timeout_s), 0.001
    while answer := _ask_http(target, ask) if ask else _ask_tcp(target, port):
        if deadline.expired:
            raise GuestTimeout(f"the clone does not answer on port {port}: {answer}", hint="try --fcvm-rebuild")
        target.pause_for_exit(pause)
        pause = min(pause * 2, _LONGEST_PAUSE_S)


def _probe_for(target: ReadyTarget, ready: ReadySpec) -> Callable[[], str]:
    """Return a function that returns "" when ready, else what it saw instead."""
    match ready.mode:
        case ReadyMode.HTTP:
            return lambda: _ask_http(target, ready)
        case ReadyMode.TCP:
            return lambda: _ask_tcp(target, ready.port or 0)
        case ReadyMode.LOG:
            pattern = re.compile(ready.text, re.MULTILINE)
            return lambda: "" if pattern.search(target.logs()) else "no such line in the workload's log"
        case ReadyMode.EXEC:
            return lambda: _ask_exec(target, ready.text)
        case ReadyMode.HEALTHCHECK:
            return lambda: _ask_exec(target, ready.argv)
        case ReadyMode.AGENT:
            return lambda: _settle(target)


def _health_command(test: Sequence[str]) -> tuple[str, ...]:
    """Read Docker's `Test`: ("CMD", program, …), ("CMD-SHELL", line), ("NONE",) or nothing."""
    kind, *words = test or ("NONE",)
    if kind == "CMD-SHELL":
        return ("/bin/sh", "-c", *words)
    return tuple(words) if kind == "CMD" else ()


def _settle(target: ReadyTarget) -> str:
    target.pause_for_exit(_SETTLE_S)
    return ""


def _ask_exec(target: ReadyTarget, command: str | Sequence[str]) -> str:
    try:
        result = target.exec(command, timeout=_TRY_S)
    except GuestTimeout:
        return f"{command!r} did not end within {_TRY_S:.0f} s"
    return "" if result.exit_code == 0 else f"exit code {result.exit_code}: {(result.stderr or result.stdout)[-200:]}"


def _ask_http(target: PortTarget, ready: ReadySpec) -> str:
    host, port = target.endpoint(ready.port or 80)
    connection = http.client.HTTPConnection(host, port, timeout=_TRY_S)
    try:
        connection.request("GET", ready.text, headers={"Host": f"{host}:{port}", "Connection": "close"})
        response = connection.getresponse()
        response.read()
    except (OSError, http.client.HTTPException) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        connection.close()
    return "" if response.status < 400 else f"HTTP status {response.status}"


def _ask_tcp(target: PortTarget, port: int) -> str:
    """Connect on the client's path, ask the agent meanwhile, then look whether the connection still stands.

    A connect alone proves nothing: slirp accepts for closed ports and stopped machines.
    """
    try:
        with socket.create_connection(target.endpoint(port), timeout=_TRY_S) as connection:
            if not target.listening(port):
                return "nothing listens there, or on a loopback address alone"
            if select.select([connection], [], [], 0)[0] and not connection.recv(1, socket.MSG_PEEK):
                return "the connection was closed"
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    except FcvmError as error:
        if isinstance(error, GuestTimeout):
            return error.message
        raise
    return ""
