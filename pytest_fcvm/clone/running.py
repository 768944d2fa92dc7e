"""One running VM with all that belongs to it: VMM, agent, workload log, host ports. A clone has one at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from itertools import count
from typing import Protocol

from pytest_fcvm.clone.log import WorkloadLog, tail
from pytest_fcvm.engine.post_mortem import without_expected
from pytest_fcvm.engine.protocol import Vm, VmExit
from pytest_fcvm.errors import EngineError, FcvmError, WorkloadExited
from pytest_fcvm.guest.agent import Agent, ClockSource
from pytest_fcvm.host.clock import Deadline, wait_until
from pytest_fcvm.host.files import read_regular
from pytest_fcvm.host.libc import real_time_ns
from pytest_fcvm.host.own import check_owner, getpid
from pytest_fcvm.model.guest import MORE_MEMORY, ExitStatus, memory_advice, memory_ran_out
from pytest_fcvm.model.net import Endpoint, PublishedPort
from pytest_fcvm.model.results import Timeline
from pytest_fcvm.model.specs import Clock

__all__ = ["Publisher", "RunningVm", "clock_source"]


_CALL_S = 30.0
_SETTLE_S, _QUIET_S, _ANSWER_S, _TURNS = 0.5, 0.05, 2.0, 4


def clock_source(clock: Clock) -> ClockSource | None:
    """Return what tells the time of day that a machine has when it goes on after it stood still, where it is told."""
    return real_time_ns if clock is Clock.HOST else None


class Publisher(Protocol):
    """Whoever maps guest ports to the host."""

    def publish(self, port: PublishedPort) -> Endpoint:
        """Map a port and return where to connect."""
        ...


class RunningVm:
    """A running VM. `close` gives everything back, in the reverse order in which `add_cleanup` got it.

    Its workload may end with the exit code `may_end_with`; any other end fails whoever waits for it.
    """

    publisher: Publisher  # once its ports are opened

    def __init__(
        self, vm: Vm, agent: Agent, log: WorkloadLog, timeline: Timeline, *, may_end_with: int | None = None
    ) -> None:
        self.vm, self.agent, self.log, self.timeline = vm, agent, log, timeline
        self._may_end_with = may_end_with
        self._began_ended = agent.workload_exit is not None  # so was its snapshot: that is no news
        self._owner = getpid()
        self._changed = threading.Event()
        self._ended: FcvmError | None = None
        self._closers = ExitStack()
        self._last_words: dict[str, str] | None = None
        self._notes: dict[str, Callable[[], str]] = {}
        self._closing = threading.Lock()
        self.copying = threading.Lock()  # held while it is parked
        self.closed = False
        vm.on_exit(self._vm_ended)
        agent.on_workload_exit(self._workload_ended)

    def add_cleanup(self, closers: Sequence[Callable[[], object]]) -> None:
        """Hand over what must be given back when the machine ends."""
        for closer in closers:
            self._closers.callback(closer)

    def add_evidence(self, title: str, tell: Callable[[], str]) -> None:
        """Add a section to the evidence, left out where it is empty."""
        self._notes[title] = tell

    def check_ours(self) -> None:
        """Raise UsageProblem in a process that was forked from the machine's."""
        check_owner(self._owner)

    @property
    def ended(self) -> FcvmError | None:
        """Return why this machine is of no use, if it is: the VM died, or the workload ended and was not to."""
        return self._ended

    @property
    def is_silent(self) -> bool:
        """Say whether the workload prints nothing any more."""
        return self._ended is not None or self.agent.workload_exit is not None

    def pause_for_exit(self, timeout_s: float) -> None:
        """Wait, but raise WorkloadExited or EngineError at once when the workload or the VM has ended."""
        self._changed.wait(timeout_s)
        self.raise_if_ended()

    def raise_if_ended(self) -> None:
        """Raise what `ended` returns."""
        if self._ended is not None:
            self.agent.wait_for_last_words()
            raise self.explain(self._ended)

    def explain(self, error: FcvmError) -> FcvmError:
        """Add the tails of log, console and VMM log to an error and return it."""
        error.clone = error.clone or self.vm.name
        for title, text in self.evidence().items():
            error.evidence.setdefault(title, text)
        return error

    def wake(self, clock: Clock) -> None:
        """Let a paused machine go on, at the time of day that its clock is to have."""
        self.agent.wake(self.vm.resume, clock_source(clock), timeout_s=_CALL_S)

    def why_silent(self, guest_port: int) -> str:
        """Say why a TCP port gives no answer, "" where something listens. Raise GuestError when nobody can tell."""
        self.raise_if_ended()
        return self.agent.listening(guest_port, timeout_s=_CALL_S).why_silent(guest_port)

    def inflate_balloon(self, mib: int, timeout_s: float) -> int:
        """Take so much of the guest's memory in all, as far as it gives it in time; return what is taken, in MiB."""
        self.vm.set_balloon(mib)
        wait_until(lambda: self.vm.balloon_mib() == mib, Deadline(timeout_s))
        return self.vm.balloon_mib()

    def _settle(self) -> None:
        """Wait for what the workload has just printed, because a server may answer before it writes its log.

        It takes until the guest rests, 50 ms where it does not, and 0.5 s where the workload prints all the time.
        """
        deadline, quiet, rested = Deadline(_SETTLE_S), Deadline(_QUIET_S), False
        with suppress(FcvmError):
            for turn in count(1):
                if getpid() != self._owner or self.closed or self.ended:
                    return
                seen = self.log.size_bytes
                rests = self.agent.metrics(timeout_s=_ANSWER_S).get("runnable_threads") == 0
                is_silent = self.log.size_bytes == seen
                if is_silent and rests and rested:  # asked twice: the log comes behind the first answer
                    return
                if turn >= _TURNS and (quiet.expired or deadline.expired):  # on a busy host a turn takes longer
                    return
                quiet, rested = quiet if is_silent else Deadline(_QUIET_S), rests

    def evidence(self, *, settled: bool = False) -> dict[str, str]:
        """Return what a person wants to see of a machine that failed, each part at most 100 lines and 16 KiB.

        Of a closed one it is what there was when it ended. `settled` waits for what is on its way.
        """
        if self._last_words is not None:
            return self._last_words
        if settled:
            self._settle()
        parts = {"workload log": b"", "console": b"", "VMM log": b""}
        with suppress(OSError, ValueError):
            parts["workload log"] = self.log.end()
        for title, path in (("console", self.vm.console_path), ("VMM log", self.vm.vmm_log_path)):
            with suppress(OSError):
                parts[title] = read_regular(path)
        tails = {title: tail(data) for title, data in parts.items()}
        tails["console"] = without_expected(tails["console"])
        shown = {title: text for title, text in tails.items() if text.strip()}
        notes = {title: text for title, tell in self._notes.items() if (text := tell())}
        if self.agent.oom_kills:
            notes["memory"] = memory_advice(self.agent.oom_kills)
        own = ", ".join(f"{name} {took_ms:.1f} ms" for name, took_ms in self.vm.latencies().items())
        return {**shown, **notes, "timeline": f"{self.timeline}{own and f'; the VMM: {own}'}"}

    def close(self) -> None:
        """Kill the VM and give everything back. Idempotent; all is tried, a failure is raised at the end.

        Do nothing in a forked process: the VM is its parent's.
        """
        if getpid() != self._owner:
            return
        with self._closing:
            if self.closed:
                return
            self.closed = True
        with self._closers:
            self._closers.callback(self.log.close)
            self._closers.callback(self.agent.close)
            self._closers.callback(self.agent.session.abort, EngineError(f"VM {self.vm.name} was killed"))
            self._closers.callback(self.vm.kill)
            with suppress(Exception):  # a test may have patched what it needs, and the VM must end
                self._last_words = self.evidence()

    def _vm_ended(self, how: VmExit) -> None:
        if how.killed_by_us or self.closed:
            return
        error = self.explain(self.vm.explain())
        self._end(error)
        self.agent.session.abort(error)

    def workload_exited(self, status: ExitStatus) -> WorkloadExited:
        """Return the error of whoever needs the workload that has ended."""
        cause = f": {memory_ran_out(self.agent.oom_kills)}" if self.agent.oom_kills else ""
        wanted = f", not with {self._may_end_with}" if self._may_end_with not in (None, status.exit_code) else ""
        is_meant = (status.exit_code, self._may_end_with) == (0, None)
        hint = self._end_hint(status) + (', or ready="exit:0" where it is to end' if is_meant else "")
        return WorkloadExited(f"the workload ended with {status}{wanted}{cause}", hint=hint)

    def _workload_ended(self, status: ExitStatus) -> None:
        if self._began_ended or status.exit_code == self._may_end_with:
            self.log.wake()
        else:
            self._end(self.workload_exited(status))

    def _end_hint(self, status: ExitStatus) -> str:
        if status.message.startswith("ulimit "):
            return "ask for less with ulimit=… or --fcvm-ulimit"
        if self.agent.oom_kills:
            return MORE_MEMORY
        with suppress(OSError, ValueError):
            if self.log.end().strip():
                return "read the workload log below, or try another command"
        return "it printed nothing: try another command"

    def _end(self, error: FcvmError) -> None:
        if self._ended is None:
            self._ended = error
        self._changed.set()
        self.log.wake()
