"""`RunningVm`: a VM with its agent, its workload log and its host ports. A clone has one at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from itertools import count

from pytest_fcvm.clone.log import WorkloadLog, tail
from pytest_fcvm.engine.abilities import as_rewindable, balloon_of, latencies_of
from pytest_fcvm.engine.post_mortem import without_expected
from pytest_fcvm.engine.protocol import Vm, VmExit
from pytest_fcvm.errors import EngineError, FcvmError, WorkloadExited
from pytest_fcvm.guest.agent import Agent, ClockSource
from pytest_fcvm.host.clock import Deadline, wait_until
from pytest_fcvm.host.files import read_regular
from pytest_fcvm.host.libc import real_time_ns
from pytest_fcvm.host.own import check_owner, getpid
from pytest_fcvm.model.guest import MORE_MEMORY, ExitStatus, memory_advice, memory_ran_out
from pytest_fcvm.model.results import Timeline
from pytest_fcvm.model.specs import Clock
from pytest_fcvm.model.text import TAIL_BYTES
from pytest_fcvm.network.ports.open import Publisher

__all__ = ["RunningVm", "clock_source"]


_CALL_S = 30.0
_SETTLE_S, _QUIET_S, _ANSWER_S, _TURNS = 0.5, 0.05, 2.0, 4


def clock_source(clock: Clock) -> ClockSource | None:
    """Return the clock that a resumed guest is set to, None where it keeps the snapshot's time of day."""
    return real_time_ns if clock is Clock.HOST else None


class RunningVm:
    """A running VM. `close` ends it and runs its cleanups, the last one first.

    Its workload may end with the exit code `expected_exit_code`. Any other end of it fails the calls that wait for it.
    `keep` may take the VM at its end, halted, to rewind it; it returns whether it does. Else the VM is killed.
    """

    publisher: Publisher  # once its ports are opened

    def __init__(
        self,
        vm: Vm,
        agent: Agent,
        log: WorkloadLog,
        timeline: Timeline,
        *,
        expected_exit_code: int | None = None,
        keep: Callable[[Vm], bool] | None = None,
    ) -> None:
        self.vm, self.agent, self.log, self.timeline = vm, agent, log, timeline
        self._expected_exit_code = expected_exit_code
        self._began_ended = agent.workload_exit is not None  # in its snapshot already: not reported again
        self._owner = getpid()
        self._changed = threading.Event()
        self._ended: FcvmError | None = None
        self._closers = ExitStack()
        self._keep, self._halted, self.kept = keep, False, False
        self._closers.callback(self._leave)  # after everything else has ended
        self._final_output: tuple[dict[str, bytes], str] | None = None  # formatted only for a test that fails
        self._notes: dict[str, Callable[[], str]] = {}
        self._closing = threading.Lock()
        self.copying = threading.Lock()  # held while the session is suspended
        self.closed = False
        self.is_frozen = False  # its workload waits, frozen, since before its first instruction
        vm.on_exit(self._vm_ended)
        agent.on_workload_exit(self._workload_ended)

    def add_cleanup(self, closers: Sequence[Callable[[], object]]) -> None:
        """Add functions to call when the VM ends."""
        for closer in closers:
            self._closers.callback(closer)

    def add_evidence(self, title: str, describe: Callable[[], str]) -> None:
        """Add a section to the evidence. An empty one is left out."""
        self._notes[title] = describe

    def check_process(self) -> None:
        """Raise UsageProblem in a process that was forked from the one that owns the VM."""
        check_owner(self._owner)

    @property
    def ended(self) -> FcvmError | None:
        """Return why this VM is unusable, if it is: the VM died, or the workload ended unexpectedly."""
        return self._ended

    @property
    def is_silent(self) -> bool:
        """Say whether the workload has printed its last line."""
        return self._ended is not None or self.agent.workload_exit is not None

    def pause_for_exit(self, timeout_s: float) -> None:
        """Wait, but raise WorkloadExited or EngineError at once when the workload or the VM has ended."""
        self._changed.wait(timeout_s)
        self.raise_if_ended()

    def raise_if_ended(self) -> None:
        """Raise what `ended` returns."""
        if self._ended is not None:
            self.agent.wait_for_final_output()
            raise self.explain(self._ended)

    def explain(self, error: FcvmError) -> FcvmError:
        """Add the tails of log, console and VMM log to an error and return it."""
        error.clone = error.clone or self.vm.name
        for title, text in self.evidence().items():
            error.evidence.setdefault(title, text)
        return error

    def resume(self, clock: Clock) -> None:
        """Resume a paused VM, set its clock and thaw its workload."""
        self.agent.resume(self.vm.resume, clock_source(clock), timeout_s=_CALL_S)
        self.is_frozen = False

    def why_silent(self, guest_port: int) -> str:
        """Return why a TCP port gives no answer, "" where something listens. Raise GuestError without an answer."""
        self.raise_if_ended()
        return self.agent.listening(guest_port, timeout_s=_CALL_S).why_silent(guest_port)

    def inflate_balloon(self, mib: int, timeout_s: float) -> int:
        """Take `mib` of the guest's memory in all, as far as it gives it in time; return the MiB that were taken."""
        balloon = balloon_of(self.vm)
        balloon.set_balloon(mib)
        wait_until(lambda: balloon.balloon_mib() == mib, Deadline(timeout_s))
        return balloon.balloon_mib()

    def _settle(self) -> None:
        """Wait for output that is on its way: a server may answer before it writes its log.

        Wait until the guest rests, 50 ms where it does not rest, and 0.5 s where the workload prints all the time.
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
        """Return titled sections for the report of a failure, each at most 100 lines and 16 KiB.

        A closed VM has those of its end. `settled` waits for output that is on its way.
        """
        if settled and self._final_output is None:
            self._settle()
        output, own = self._final_output or self._read_output()
        tails = {title: tail(data) for title, data in output.items()}
        tails["console"] = without_expected(tails["console"])
        shown = {title: text for title, text in tails.items() if text.strip()}
        notes = {title: text for title, describe in self._notes.items() if (text := describe())}
        if self.agent.oom_kills:
            notes["memory"] = memory_advice(self.agent.oom_kills)
        return {**shown, **notes, "timeline": f"{self.timeline}{own and f'; the VMM: {own}'}"}

    def _read_output(self) -> tuple[dict[str, bytes], str]:
        """Return the end of what the workload, the guest's kernel and the VMM have printed, and the VMM's latencies."""
        parts = {"workload log": b"", "console": b"", "VMM log": b""}
        with suppress(OSError, ValueError):
            parts["workload log"] = self.log.end()
        for title, path in (("console", self.vm.console_path), ("VMM log", self.vm.vmm_log_path)):
            with suppress(OSError):
                parts[title] = read_regular(path)[-TAIL_BYTES:]
        own = ", ".join(f"{name} {took_ms:.1f} ms" for name, took_ms in latencies_of(self.vm).items())
        return parts, own

    def close(self) -> None:
        """End the VM and run the cleanups. Idempotent. All of them are tried; a failure is raised at the end.

        Do nothing in a forked process: its parent owns the VM.
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
            self._closers.callback(self._halt)
            with suppress(Exception):  # a test may have patched what it needs, and the VM must end
                self._final_output = self._read_output()

    def discard(self) -> None:
        """Do what `close` does, and kill the VM in any case."""
        self._keep = None
        self.close()

    def _halt(self) -> None:
        """Stop a VM that may be kept, and kill any other."""
        try:
            if self._keep and (vm := as_rewindable(self.vm)):
                with suppress(Exception):  # then it is killed
                    vm.halt()
                    self._halted = True
        finally:
            if not self._halted:
                self.vm.kill()

    def _leave(self) -> None:
        """Give a halted VM to whoever keeps it, or kill it."""
        if not self._halted:
            return
        try:
            with suppress(Exception):  # as above
                self.kept = self._keep is not None and self._keep(self.vm)
        finally:
            if not self.kept:
                self.vm.kill()

    def wait_until_gone(self, timeout_s: float) -> None:
        """Wait until a closed VM has no process that holds its host ports. Raise EngineError at the deadline."""
        if not self.kept:
            self.vm.wait(timeout_s)

    def _vm_ended(self, how: VmExit) -> None:
        if how.killed_by_us or self.closed:
            return
        error = self.explain(self.vm.explain())
        self._end(error)
        self.agent.session.abort(error)

    def workload_exited(self, status: ExitStatus) -> WorkloadExited:
        """Return the error for a call that needs the workload, which has ended."""
        cause = f": {memory_ran_out(self.agent.oom_kills)}" if self.agent.oom_kills else ""
        expected = self._expected_exit_code
        wanted = f", not with {expected}" if expected not in (None, status.exit_code) else ""
        is_meant = (status.exit_code, expected) == (0, None)
        hint = self._end_hint(status) + (', or ready="exit:0" where it is to end' if is_meant else "")
        return WorkloadExited(f"the workload ended with {status}{wanted}{cause}", hint=hint)

    def _workload_ended(self, status: ExitStatus) -> None:
        if self._began_ended or status.exit_code == self._expected_exit_code:
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
