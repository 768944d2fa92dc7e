"""A VM under Firecracker: the process, its API, its vsock."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from pytest_fcvm.engine.disk import Disk
from pytest_fcvm.engine.firecracker import api, vsock
from pytest_fcvm.engine.firecracker.api import Api, NoAnswer
from pytest_fcvm.engine.firecracker.metrics import METRICS_FILE, read_latencies
from pytest_fcvm.engine.firecracker.requests import AGENT_PORT, AGENT_SOCKET, API_SOCKET, CONSOLE, Request
from pytest_fcvm.engine.firecracker.version import FirecrackerVersion
from pytest_fcvm.engine.firecracker.vm_dir import VmDir
from pytest_fcvm.engine.launch import Launched
from pytest_fcvm.engine.post_mortem import read_evidence
from pytest_fcvm.engine.protocol import SnapshotFiles
from pytest_fcvm.engine.vm import VmProcess
from pytest_fcvm.errors import EngineError, FcvmError, HostError
from pytest_fcvm.host.clock import Deadline, wait_until
from pytest_fcvm.host.own import os
from pytest_fcvm.host.process import find_tool, run_tool
from pytest_fcvm.host.sockets import Socket
from pytest_fcvm.host.sparse import copy_file
from pytest_fcvm.host.supervisor.protocol import ChildExit
from pytest_fcvm.model.net import Namespace

__all__ = ["FirecrackerVm"]

_START_S = 20.0
_FIRST_TRY_S, _LONGEST_TRY_S = 0.0005, 0.005
_ANSWER_S = 120.0  # a nested host may stand still for a minute
_EXIT_WAIT_S = 2.0  # from a broken connection to the end of the process
_FLUSH_S = 2.0
_DIG_S = 60.0
_WRITE_S = 600.0  # for all of a guest's memory, on a slow disk


class FirecrackerVm(VmProcess):
    """One Firecracker process. `calls` configure it and start the guest.

    A base's memory is saved to `memory`. A clone's memory began as a copy of `origin`, and has `mem_mib` MiB.
    """

    def __init__(
        self,
        name: str,
        vm_dir: VmDir,
        launched: Launched,
        version: FirecrackerVersion,
        calls: Iterable[Request],
        *,
        mem_mib: int = 0,
        memory: Path | None = None,
        origin: Path | None = None,
        disk: Disk | None = None,
        namespace: Namespace | None = None,
    ) -> None:
        super().__init__(name, launched, vm_dir.explain_death, disk, namespace)
        self._vm_dir, self._origin = vm_dir, origin
        self._version, self._memory, self._calls, self._mem_mib = version, memory, list(calls), mem_mib
        self._api = Api(vm_dir.root / API_SOCKET, version)
        self._stopped = self._listens = False
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._child.on_exit(self._close)

    @property
    def console_path(self) -> Path:
        """Return the file that receives the guest's serial console."""
        return self._vm_dir.root / CONSOLE

    def channel(self) -> socket.socket:
        """Return a new connection to the agent, which the caller closes. Wait until the guest listens."""
        path = self._vm_dir.root / AGENT_SOCKET
        with self._translating_errors():
            return vsock.connect(path, AGENT_PORT, Deadline(_ANSWER_S), self._check_alive)

    def preconfigure(self) -> None:
        """Make all API calls but the last, which starts the guest. Raise EngineError or HostError."""
        self._call(left=1)

    def start(self) -> None:
        """Make the remaining API calls, and return when the guest runs. Raise EngineError or HostError."""
        self._call(left=0)

    def pause(self) -> None:
        """Stop the guest's CPUs."""
        if self._version.vsock_hangs_after_resume:
            self._child.send_signal(signal.SIGSTOP)
        else:
            self._set_state("Paused")
        self._stopped = True

    def resume(self) -> None:
        """Let the guest's CPUs run again."""
        self._check_alive()
        if self._version.vsock_hangs_after_resume:
            self._child.send_signal(signal.SIGCONT)
        else:
            self._set_state("Resumed")
        self._stopped = False

    def set_balloon(self, mib: int) -> None:
        """Ask the guest to give `mib` MiB of its memory, in all, to the balloon. Raise EngineError without one."""
        with self._translating_errors():
            self._api.send(api.BALLOON_RESIZE, {"amount_mib": mib})

    def balloon_mib(self) -> int:
        """Return how many MiB of the guest's memory are in the balloon. Raise EngineError without a balloon."""
        with self._translating_errors():
            return int(self._api.send(api.BALLOON_STATISTICS)["actual_mib"])

    def set_metadata(self, data: Mapping[str, Any]) -> None:
        """Serve `data` in place of the plan's metadata. Raise EngineError without a metadata service."""
        with self._translating_errors():
            self._api.send(api.MMDS, data)

    def latencies(self) -> Mapping[str, float]:
        """Return how long Firecracker's own work took, in ms by its names."""
        if not (self._stopped or self._over.is_set()):
            with suppress(FcvmError):
                self._api.send(api.ACTIONS, {"action_type": "FlushMetrics"}, timeout_s=_FLUSH_S)
        return read_latencies(self._vm_dir.root / METRICS_FILE)

    def snapshot(self, state: Path) -> None:
        """Stop a base and write its device state and its memory, with holes for untouched pages.

        Raise EngineError or HostError when Firecracker cannot write them; no file is left then.
        """
        if self._memory is None:
            raise EngineError(f"VM {self.name} is a clone: its memory is not in a file that others could share")
        if self._stopped:
            raise EngineError(f"VM {self.name} is paused", hint="resume it first")
        with self._writing(state, self._memory):
            self._set_state("Paused")
            self._write("Full", state, self._memory)

    def save(self, dest: SnapshotFiles) -> None:
        """Write memory, device state and disk of a running clone to new files. The clone runs on.

        Firecracker writes the pages that are in memory over a copy of the origin. Where pages may be on swap, it writes
        all pages, because it would omit those. It resets the connections of its vsock, the agent's too. Check for room
        first: vsock of 1.16.0 and 1.16.1 hangs after a resume without a snapshot. Raise EngineError or HostError; no
        file is left then.
        """
        if self._origin is None:
            raise EngineError(f"VM {self.name} is a base", hint="take a snapshot of it")
        memory = self._vm_dir.output_path(dest.memory)
        _check_room(memory.parent, self._mem_mib)
        with ExitStack() as undo:
            undo.callback(dest.discard)
            with self._writing(dest.state, dest.memory):
                copy_file(self._origin, memory)
                self._vm_dir.grant(memory)
                self._set_state("Paused")
                try:
                    self._write("Full" if _has_swap() else "Diff", dest.state, dest.memory)
                    if self._disk and dest.disk:
                        self._disk.save(dest.disk)
                finally:
                    self._set_state("Resumed")
            undo.pop_all()

    def _call(self, *, left: int) -> None:
        """Make the remaining API calls, except the last `left` of them."""
        with self._lock, self._translating_errors():
            while len(self._calls) > left:
                if not self._listens:
                    self._wait_for_api()
                    self._listens = True
                self._api.send(*self._calls[0])
                del self._calls[0]

    def _write(self, kind: str, state: Path, memory: Path) -> None:
        body = {
            "snapshot_type": kind,
            "snapshot_path": self._vm_dir.output_name(state),
            "mem_file_path": self._vm_dir.output_name(memory),
        }
        with self._translating_errors():
            self._api.send(api.SNAPSHOT_CREATE, body, timeout_s=_WRITE_S)

    @contextmanager
    def _writing(self, state: Path, memory: Path) -> Iterator[None]:
        """Collect the files that Firecracker writes in the block. Remove them when the block fails."""
        try:
            yield
            _dig_holes(self._vm_dir.output_path(memory))
            for path in (state, memory):
                self._vm_dir.collect(path)
        except BaseException:
            for path in (state, memory):
                self._vm_dir.discard(path)
            raise

    def _set_state(self, state: str) -> None:
        with self._translating_errors():
            self._api.send(api.VM, {"state": state})

    def _wait_for_api(self) -> None:
        """Wait until Firecracker listens. Poll: it binds first and listens later, which causes no file event."""
        path = self._vm_dir.root / API_SOCKET

        def listens() -> bool:
            self._check_alive()
            return _accepts(path)

        if not wait_until(listens, Deadline(_START_S), interval_s=_FIRST_TRY_S, longest_interval_s=_LONGEST_TRY_S):
            raise EngineError(f"Firecracker did not open its API within {_START_S:g} s")

    def _check_alive(self) -> None:
        if self._over.is_set():
            raise self.explain()

    @contextmanager
    def _translating_errors(self) -> Iterator[None]:
        """Replace NoAnswer by the reason for the VM's end. Add evidence to other errors."""
        try:
            yield
        except NoAnswer as error:
            if self._over.wait(_EXIT_WAIT_S):
                raise self.explain() from error
            raise error.with_evidence(**self._evidence()) from None
        except FcvmError as error:
            error.with_evidence(**self._evidence())
            raise

    def _evidence(self) -> dict[str, str]:
        return read_evidence(self.console_path, self.vmm_log_path)

    def _close(self, _: ChildExit) -> None:
        self._over.set()
        self._api.close()


def _check_room(directory: Path, mem_mib: int) -> None:
    try:
        found = os.statvfs(directory)
    except OSError as error:
        raise HostError(f"{directory} cannot be written to: {error.strerror}", hint="use --fcvm-cache-dir") from error
    if found.f_bavail * found.f_frsize < mem_mib << 20:
        raise HostError(
            f"no room in {directory} for {mem_mib} MiB of memory",
            hint="free disk space, or name another directory with --fcvm-cache-dir",
        )


def _has_swap() -> bool:
    """Say whether memory may be on swap: /proc/swaps (proc_swaps(5)) has a heading, and a line for each swap area."""
    return len(Path("/proc/swaps").read_text().splitlines()) > 1


def _accepts(path: Path) -> bool:
    with Socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, suppress(OSError):
        probe.connect(str(path))
        return True
    return False


def _dig_holes(memory: Path) -> None:
    """Turn the zero pages that Firecracker writes into holes. Do nothing without fallocate."""
    tool = find_tool("fallocate")
    if tool:
        with suppress(HostError):  # a file system without holes
            run_tool([tool, "--dig-holes", memory], timeout_s=_DIG_S)
