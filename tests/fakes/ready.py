"""A guest as readiness probes see it. Its ports are servers in the test's process."""

from __future__ import annotations

import http.server
import re
import threading
from collections.abc import Callable, Iterator, Sequence

from pytest_fcvm.errors import GuestTimeout, WorkloadExited
from pytest_fcvm.host.clock import Deadline
from pytest_fcvm.model.guest import ExitStatus, ListenState
from pytest_fcvm.model.net import Endpoint
from pytest_fcvm.model.results import ExecResult


class Target:
    """A guest whose ports are servers in this process."""

    def __init__(self) -> None:
        self.ports: dict[int, Endpoint] = {}
        self.listens = True
        self.open_ports: set[int] | None = None  # None: as `listens` says
        self.timeouts: list[float] = []
        self.log = ""
        self.commands: list[str | Sequence[str]] = []
        self.results: list[ExecResult | Exception] = []
        self.ended = threading.Event()
        self.exit_status: ExitStatus | None = None
        self.reason: Exception = WorkloadExited("the workload ended with exit code 3")
        self.on_pause: Callable[[], None] = lambda: None
        self.on_exec: Callable[[], None] = lambda: None
        self.on_wait: Callable[[float], None] | None = None  # called in place of a wait
        self.cpu_us: Callable[[], float] = lambda: 0

    def endpoint(self, guest_port: int) -> Endpoint:
        return self.ports[guest_port]

    def why_silent(self, guest_port: int) -> str:
        is_open = self.listens if self.open_ports is None else guest_port in self.open_ports
        return (ListenState.OPEN if is_open else ListenState.CLOSED).why_silent(guest_port)

    def pause_for_exit(self, timeout_s: float) -> None:
        self.on_pause()
        if self.on_wait is not None:
            self.on_wait(timeout_s)
        elif self.ended.wait(timeout_s):
            raise self.reason

    def exec(self, cmd: str | Sequence[str], *, timeout: float) -> ExecResult:
        self.commands.append(cmd)
        self.timeouts.append(timeout)
        self.on_exec()
        result = self.results.pop(0) if len(self.results) > 1 else self.results[0]
        if isinstance(result, Exception):
            raise result
        return result

    def metrics(self) -> dict[str, float | int | str]:
        return {"workload_cpu_us": self.cpu_us()}

    def wait_for_log(self, regex: str, *, timeout: float, times: int) -> object:
        deadline = Deadline(timeout)
        while len(re.findall(regex, self.log, re.MULTILINE)) < times:
            if deadline.expired:
                raise GuestTimeout("no line matched")
            self.pause_for_exit(0.01)
        return None


class Health(http.server.BaseHTTPRequestHandler):
    statuses: Iterator[int]
    asked: list[tuple[str, str]]

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers["Host"]))
        self.send_response(next(self.statuses))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Print nothing."""
