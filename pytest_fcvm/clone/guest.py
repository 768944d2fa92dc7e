"""`Guest`: the verbs that a base and a clone have in common: commands, files, logs and ports of a running VM."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from pytest_fcvm.clone.commands import Command, ExecDefaults, command_failed, exec_result, spell
from pytest_fcvm.clone.files import FileVerbs
from pytest_fcvm.clone.running import RunningVm
from pytest_fcvm.errors import GuestError, GuestTimeout, UsageProblem, WorkloadExited
from pytest_fcvm.guest.process import GuestProcess
from pytest_fcvm.host.clock import Deadline, monotonic
from pytest_fcvm.host.files import read_regular
from pytest_fcvm.host.limits import translating_emfile
from pytest_fcvm.model.guest import ExitStatus
from pytest_fcvm.model.net import Endpoint, Proto, PublishedPort
from pytest_fcvm.model.parse import parse_port, parse_regex
from pytest_fcvm.model.results import ExecResult, Timeline
from pytest_fcvm.model.specs import VmSpec
from pytest_fcvm.network.addresses import GUEST_ADDRESS
from pytest_fcvm.network.ports.own_address import at_address, random_loopback

if TYPE_CHECKING:
    import httpx

__all__ = ["Guest"]

_TERM = "xterm-256color"
_CALL_S = 30.0  # a short call to the agent, and emulated guests are slow under load


class Guest(FileVerbs):
    """A running VM: a base while its snapshot is prepared, or a clone.

    Every method may be called from any thread; every wait has a deadline. All methods raise EngineError when the VM has
    died, and GuestTimeout at a deadline.
    """

    def __init__(self, *, name: str, spec: VmSpec, engine: str, defaults: ExecDefaults, running: RunningVm) -> None:
        self.name, self.spec, self.engine = name, spec, engine
        self._defaults, self.running = defaults, running
        self._clients: list[httpx.Client] = []
        self._paused = False
        self._own_ip = random_loopback() if spec.own_address else ""
        self._mapped = {(port.proto, port.guest_port): port for port in spec.publish}

    def __repr__(self) -> str:
        state = "closed" if self.running.closed else "paused" if self._paused else "running"
        return f"<{type(self).__name__} {self.name} of {self.spec.image} on {self.engine}, {state}>"

    # -- reaching it

    @property
    def ip(self) -> str:
        """Return the guest's own address, as it sees itself."""
        return GUEST_ADDRESS

    @property
    def timeline(self) -> Timeline:
        """Return where the start-up time of this clone went."""
        return self.running.timeline

    @property
    def closed(self) -> bool:
        """Say whether it has been given back."""
        return self.running.closed

    def endpoint(self, guest_port: int, proto: str = "tcp") -> Endpoint:
        """Return the host address of a guest port; it is mapped on first use and stays for the clone's life."""
        if proto not in list(Proto):
            raise UsageProblem(f"{proto!r} is neither tcp nor udp", hint='endpoint(53, "udp")')
        wanted, guest_port = Proto(proto), parse_port(guest_port)
        port = self._mapped.get((wanted, guest_port)) or PublishedPort(guest_port=guest_port, proto=wanted)
        if self._own_ip and not port.host_port:
            port = at_address(self._own_ip, port)
        endpoint = self._live().publisher.publish(port)
        self._mapped[wanted, guest_port] = replace(port, host_port=endpoint.port)
        return endpoint

    def port(self, guest_port: int, proto: str = "tcp") -> int:
        """Return the host port of a guest port."""
        return self.endpoint(guest_port, proto).port

    def url(self, guest_port: int, path: str = "", scheme: str = "http") -> str:
        """Return a URL of the guest port; without a path it has no trailing slash."""
        path = f"/{path}" if path and not path.startswith("/") else path
        return f"{scheme}://{self.endpoint(guest_port).netloc}{path}"

    @translating_emfile("an HTTP client")
    def http(self, guest_port: int = 80) -> httpx.Client:
        """Return an HTTP client for the guest port, closed with the clone. It ignores proxy settings."""
        from pytest_fcvm.clone.http import make_client  # httpx takes 0.1 s, and most tests have clients of their own

        self._clients.append(make_client(self.url(guest_port), lambda: self.why_silent(guest_port)))
        return self._clients[-1]

    # -- commands

    def exec(
        self,
        cmd: Command,
        *,
        stdin: bytes | str | None = None,
        timeout: float = 60,
        check: bool = False,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
    ) -> ExecResult:
        """Run a command to its end: a list is argv, a string goes to the image's shell.

        Raise GuestTimeout after `timeout` seconds (the command is killed), CommandFailed when `check` and it failed.
        """
        started = monotonic()
        data = stdin.encode() if isinstance(stdin, str) else stdin
        with self.popen(cmd, env=env, cwd=cwd, user=user) as process:
            stdout, stderr = process.communicate(data or b"", timeout_s=timeout)
            status = process.wait(_CALL_S)
        result = exec_result(cmd, stdout, stderr, status, monotonic() - started)
        if check and result.exit_code:
            raise self.running.explain(command_failed(cmd, result, "failed"))
        return result

    def popen(
        self,
        cmd: Command,
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        tty: tuple[int, int] | None = None,
        detach: bool = False,
    ) -> GuestProcess:
        """Start a command and return it with its streams; leaving its `with` block ends it and its process group.

        With `detach` it goes on, and `attach` finds it by its `pid`; it never waits for a reader, who gets the last
        64 KiB of each output.
        `tty` gives it a terminal of so many rows and columns: it then has one stream of output, `stdout`, and what is
        written to `stdin` is typed.
        """
        env = {**({"TERM": _TERM} if tty else {}), **(env or {})}
        return self._live().agent.exec(self._defaults.process(cmd, env, cwd, user), terminal=tty, detached=detach)

    def attach(self, pid: int) -> GuestProcess:
        """Return what `popen` has started detached, or in the clone that this one was copied of; once each.

        It runs or has ended. Its input is at its end, and of what it printed since, the last 64 KiB of each output are
        there.
        """
        return self._live().agent.attach(pid)

    def succeed(self, cmd: Command, *, timeout: float = 60) -> str:
        """Run a command that must exit with 0 and return its standard output. Raise CommandFailed."""
        return self.exec(cmd, timeout=timeout, check=True).stdout

    def fail(self, cmd: Command, *, timeout: float = 60) -> str:
        """Run a command that must not exit with 0 and return its standard output. Raise CommandFailed."""
        result = self.exec(cmd, timeout=timeout)
        if result.exit_code == 0:
            raise self.running.explain(command_failed(cmd, result, "succeeded, and must not have"))
        return result.stdout

    def wait_until_succeeds(self, cmd: Command, *, timeout: float = 60) -> str:
        """Run a command until it exits with 0 and return its standard output.

        Raise GuestTimeout with the last try's output, WorkloadExited at once when the workload ends.
        """
        deadline, pause = Deadline(timeout), 0.01
        while True:
            result = self.exec(cmd, timeout=max(1.0, deadline.remaining() or 0))
            if result.exit_code == 0:
                return result.stdout
            if deadline.expired:
                said = (result.stderr or result.stdout)[-400:]
                raise self.running.explain(GuestTimeout(f"{spell(cmd)} did not succeed within {timeout:g} s: {said}"))
            self._live().pause_for_exit(pause)
            pause = min(pause * 1.5, 0.25)

    # -- watching it

    def logs(self) -> str:
        """Return what the workload has printed, what it printed before the snapshot first."""
        return self._live().log.content().decode("utf-8", "replace")

    def wait_for_log(self, regex: str, *, timeout: float = 60, times: int = 1) -> re.Match[str]:
        """Wait until the workload's output has matched so many times (re.MULTILINE), and return the last match.

        Raise GuestTimeout, or WorkloadExited at once when the workload ends without it.
        """
        running, pattern = self._live(), parse_regex(regex)
        match = running.log.search(pattern, Deadline(timeout), lambda: running.is_silent, times=times)
        if match is None and running.is_silent:
            running.agent.wait_for_final_output()
            match = running.log.search(pattern, Deadline(0), lambda: True, times=times)
        if match is None:
            running.raise_if_ended()
            self._live()
            wanted = f"{regex!r}{f' {times} times' * (times > 1)}"
            if (status := running.agent.workload_exit) is not None:
                ended = running.workload_exited(status)
                raise running.explain(WorkloadExited(f"no line matched {wanted}, and {ended.message}", hint=ended.hint))
            raise self.running.explain(GuestTimeout(f"no line matched {wanted} within {timeout:g} s"))
        return match

    def console(self) -> str:
        """Return the serial console of the guest's kernel."""
        return read_regular(self._live().vm.console_path).decode("utf-8", "replace")

    def metrics(self) -> dict[str, float | int | str]:
        """Return the guest's own figures; each name ends in its unit."""
        return self._live().agent.metrics(timeout_s=_CALL_S)

    @property
    def printed_bytes(self) -> int:
        """Return how much the workload has printed here; a reset begins anew."""
        return self.running.log.size_bytes

    def evidence(self) -> dict[str, str]:
        """Return titled tails of log, console and VMM log, and the timeline, for a report."""
        return self.running.evidence(settled=not self._paused)

    @property
    def exit_status(self) -> ExitStatus | None:
        """Return how the workload ended, None while it runs."""
        return self._live().agent.workload_exit

    def wait(self, timeout: float = 60) -> ExitStatus:
        """Wait until the workload has ended, return how, and have all that it printed in `logs`.

        Raise GuestTimeout when it does not end in time.
        """
        running = self._live()
        try:
            status = running.agent.wait_until_workload_exit(timeout)
        except GuestTimeout as error:
            raise running.explain(error) from None
        running.agent.wait_for_final_output()
        return status

    def close_clients(self) -> None:
        """Close the HTTP clients that were given out."""
        while self._clients:
            self._clients.pop().close()

    # -- what readiness probes need beyond the above

    def why_silent(self, guest_port: int) -> str:
        """Say why a TCP port gives no answer, "" where something listens that can be reached from outside."""
        return self._live().why_silent(guest_port)

    def pause_for_exit(self, timeout_s: float) -> None:
        """Wait, but raise WorkloadExited or EngineError at once when the workload or the VM has ended."""
        self._live().pause_for_exit(timeout_s)

    def _live(self) -> RunningVm:
        self.running.check_process()
        if self.running.closed:
            raise GuestError(f"{self.name} is closed", hint="ask for a new clone")
        if self._paused:
            raise GuestError(f"{self.name} is paused", hint="call resume() first")
        return self.running
