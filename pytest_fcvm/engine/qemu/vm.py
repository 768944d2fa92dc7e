"""A VM under QEMU: the process, its monitor, its channel to the agent."""

from __future__ import annotations

import socket
import threading
from base64 import b64decode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from pytest_fcvm.engine.abilities import RewindDiffers
from pytest_fcvm.engine.disk import Disk
from pytest_fcvm.engine.launch import Launched
from pytest_fcvm.engine.post_mortem import read_evidence
from pytest_fcvm.engine.protocol import SnapshotFiles
from pytest_fcvm.engine.qemu.memory import save_private_pages
from pytest_fcvm.engine.qemu.monitor import Command, Event, Monitor, MonitorGone
from pytest_fcvm.engine.qemu.post_mortem import explain_death
from pytest_fcvm.engine.qemu.verify import list_differences
from pytest_fcvm.engine.qemu.version import QemuVersion
from pytest_fcvm.engine.vm import VmProcess
from pytest_fcvm.errors import EngineError
from pytest_fcvm.host.files import create_private
from pytest_fcvm.host.own import os
from pytest_fcvm.host.sockets import discard_input
from pytest_fcvm.host.sparse import copy_file, creation_error
from pytest_fcvm.host.supervisor.protocol import ChildExit
from pytest_fcvm.model.net import Namespace

__all__ = ["QemuVm"]

_SAVE_TIMEOUT_S = 30.0
_REWIND_S = 5.0
_REWIND = "x-fcvm-rewind"  # without arguments: those of the checkpoint. QEMU 7.2 reads a byte per system call


class QemuVm(VmProcess):
    """One QEMU process.

    `begin` has the commands that let a clone run, and `memory` is the file of its snapshot; a base has neither. With
    `rewinds` the VMM has taken a checkpoint of all that `memory` does not hold, and nothing else of the VM changes.
    """

    def __init__(
        self,
        name: str,
        launched: Launched,
        monitor: Monitor,
        agent: socket.socket,
        *,
        version: QemuVersion,
        begin: Sequence[Command] = (),
        memory: Path | None = None,
        disk: Disk | None = None,
        namespace: Namespace | None = None,
        rewinds: bool = False,
    ) -> None:
        super().__init__(name, launched, explain_death, disk, namespace)
        self._monitor, self._agent = monitor, agent
        self._version = version
        self._memory, self._is_base = memory, not begin
        self._begin, self._rewinds = begin, rewinds
        self._paused = False
        self._lock = threading.Lock()  # guards the agent's socket against its closing
        self._child.on_exit(self._close)

    def channel(self) -> socket.socket:
        """Return the byte channel to the agent, which the caller closes.

        All calls return duplicates of one socket. The guest does not notice when a caller closes its duplicate, and the
        next caller continues where that one stopped. The agent reads later what is written before the guest runs.
        """
        with self._translating_errors(), self._lock:
            if self._agent.fileno() >= 0:
                return self._agent.dup()
        raise self.explain()

    def preconfigure(self) -> None:
        """Do nothing: QEMU has all its settings from its command line."""

    def start(self) -> None:
        """Let a prepared clone load its state and run. Do nothing in a clone that was started. Raise EngineError."""
        commands, self._begin = self._begin, ()
        if commands:
            with self._translating_errors():
                self._monitor.send_early(commands)

    def wait_until_started(self, timeout_s: float) -> None:
        """Wait until QEMU has started and accepted its first commands. Raise EngineError."""
        with self._translating_errors():
            self._monitor.wait_for_replies(timeout_s)

    def set_link(self, attachment: int, up: bool) -> None:
        """Set the link of the NIC behind one of the plan's attachments, counted from 0. The guest notices it."""
        with self._translating_errors():
            self._monitor.execute("set_link", {"name": f"net{attachment + 1}", "up": up})

    def pause(self) -> None:
        """Stop the guest's CPUs."""
        with self._translating_errors():
            self._monitor.execute("stop")
        self._paused = True

    def resume(self) -> None:
        """Let the guest's CPUs run again."""
        with self._translating_errors():
            self._monitor.execute("cont")
        self._paused = False

    def snapshot(self, state: Path) -> None:
        """Write the device state of a base to `state`, a new file with mode 0600, and stop the guest for good.

        The migration itself stops the guest. After a `stop` command the saved state would be that of a paused VM, and
        clones would not run by themselves. Raise EngineError when QEMU cannot save the state; no file is left then.
        """
        if not self._is_base:
            raise EngineError(f"VM {self.name} is a clone: its memory is not in a file that others could share")
        if self._paused:
            raise EngineError(f"VM {self.name} is paused: its clones would be too", hint="resume it first")
        try:
            with self._translating_errors(), _new_file(state) as fd:
                self._save(state, fd)
        except BaseException:
            state.unlink(missing_ok=True)
            raise

    def save(self, dest: SnapshotFiles) -> None:
        """Write memory, device state and disk of a running clone to new files. The clone runs on.

        The clone is paused meanwhile; only its changed pages are read from it. Raise EngineError or HostError; no file
        is left then.
        """
        if self._memory is None:
            raise EngineError(f"VM {self.name} is a base", hint="take a snapshot of it")
        self._rewinds = False
        with ExitStack() as undo:
            undo.callback(dest.discard)
            copy_file(self._memory, dest.memory)
            self.pause()
            try:
                save_private_pages(self.pid, self._memory, dest.memory)
                if self._disk and dest.disk:
                    self._disk.save(dest.disk)
                with self._translating_errors(), _new_file(dest.state):
                    self._monitor.execute("xen-save-devices-state", {"filename": str(dest.state), "live": False})
            finally:
                self.resume()
            undo.pop_all()

    def can_rewind(self) -> bool:
        """Say whether `rewind` would put back everything that a test can have changed in this VM."""
        return self._rewinds and not self._superseded

    def halt(self) -> None:
        """Stop the guest's CPUs, without a wait until they have stopped. Raise EngineError."""
        with self._translating_errors():
            self._monitor.send_early([("stop", {})])

    def rewind(self, name: str, *, verifies: bool = False) -> QemuVm:
        """Put the VM back to its snapshot, and return it as the VM `name`, as `CanRewind.rewind` says."""
        with self._translating_errors():
            self._monitor.execute(_REWIND, timeout_s=_REWIND_S)
            if verifies:
                self._verify_rewind()
        discard_input(self._agent)
        if self._disk:
            self._disk.restore()
        self._supersede()  # last: until then, a failure leaves this object to be killed
        return QemuVm(
            name,
            self._launched,
            self._monitor,
            self._agent,
            version=self._version,
            begin=(("cont", {}),),
            memory=self._memory,
            disk=self._disk,
            rewinds=True,
        )

    def _verify_rewind(self) -> None:
        states = self._monitor.execute("x-fcvm-state")
        assert isinstance(states, Mapping)
        assert self._memory
        now, then = (b64decode(states[name]) for name in ("state", "checkpoint"))
        if differences := list_differences(self.pid, self._memory, now, then):
            raise RewindDiffers(
                f"{self.name} was rewound, and differs from its snapshot: {', '.join(differences)}",
                hint="report this as a bug; --fcvm-rewind off does without",
            )

    def _save(self, state: Path, fd: int) -> None:
        if self._version.takes_state_by_path:
            uri = f"file:{state}"
        else:
            self._monitor.execute("getfd", {"fdname": "state"}, fds=[fd])
            uri = "fd:state"
        self._monitor.execute("migrate", {"uri": uri})
        ended = self._monitor.wait_for_event(_migration_ended, "save the device state", _SAVE_TIMEOUT_S)
        if ended.data.get("status") != "completed":
            words = self._monitor.execute("query-migrate")
            reason = words.get("error-desc") if isinstance(words, Mapping) else None
            raise EngineError(f"QEMU could not save the state of VM {self.name}: {reason or ended.data.get('status')}")

    @contextmanager
    def _translating_errors(self) -> Iterator[None]:
        """Replace MonitorGone by the reason for the VM's end. Add evidence to other errors."""
        if self._superseded:
            raise EngineError(f"{self.name} has ended", hint="ask for a new clone")
        try:
            yield
        except MonitorGone as error:
            raise self.explain() from error
        except EngineError as error:
            error.with_evidence(**read_evidence(self.console_path, self.vmm_log_path))
            raise

    def _close(self, _: ChildExit) -> None:
        self._monitor.close()
        with self._lock:
            # Shut down first: a test's forked child may hold the far end open, and another thread may be reading.
            with suppress(OSError):
                self._agent.shutdown(socket.SHUT_RDWR)
            self._agent.close()


def _migration_ended(event: Event) -> bool:
    return event.name == "MIGRATION" and event.data.get("status") in ("completed", "failed", "cancelled")


@contextmanager
def _new_file(path: Path) -> Iterator[int]:
    try:
        fd = create_private(path)
    except OSError as error:
        raise creation_error(path, error) from error
    try:
        yield fd
    finally:
        os.close(fd)
