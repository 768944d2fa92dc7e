"""What every VM is, whichever VMM runs it: a process with a console, a log, and an end that can be explained."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from pytest_fcvm.engine.disk import Disk
from pytest_fcvm.engine.launch import Launched
from pytest_fcvm.engine.protocol import PreparedVm, Vm, VmExit
from pytest_fcvm.errors import EngineError, FcvmError, HostError
from pytest_fcvm.host.supervisor.protocol import ChildExit
from pytest_fcvm.model.net import Namespace

__all__ = ["VmProcess", "discard", "start_or_discard"]

_EXIT_WAIT_S = 2.0  # from the end of a socket to the end of the process

_AnyVm = TypeVar("_AnyVm", bound=PreparedVm)


def start_or_discard(vm: _AnyVm) -> _AnyVm:
    """Start a prepared VM and return it. Discard it when the start fails."""
    try:
        vm.start()
    except BaseException:
        discard(vm)
        raise
    return vm


def discard(vm: Vm) -> None:
    """Kill a VM and close its disk."""
    vm.kill()
    if vm.disk:
        vm.disk.close()


class VmProcess:
    """The process of a VM. `explain_death(name, how, console=…, log=…)` returns the error for its end."""

    def __init__(
        self,
        name: str,
        launched: Launched,
        explain_death: Callable[..., FcvmError],
        disk: Disk | None = None,
        namespace: Namespace | None = None,
    ) -> None:
        self.name, self._launched, self._child = name, launched, launched.child
        self._explain_death, self._disk, self._namespace = explain_death, disk, namespace
        self._killed = self._superseded = False

    @property
    def pid(self) -> int:
        """Return the process id of the VMM."""
        return self._child.pid

    @property
    def console_path(self) -> Path:
        """Return the file that receives the guest's serial console."""
        return self._launched.console

    @property
    def vmm_log_path(self) -> Path:
        """Return the file that receives what the VMM prints."""
        return self._launched.log

    @property
    def disk(self) -> Disk | None:
        """Return a clone's private scratch disk, None without one. The caller closes it once the VM is killed."""
        return self._disk

    @property
    def namespace(self) -> Namespace | None:
        """Return the network namespace of the VM's plan."""
        return self._namespace

    def kill(self) -> None:
        """Kill the VMM with SIGKILL and return at once. Idempotent."""
        self._killed = True
        if not self._superseded:
            self._child.kill()

    def wait(self, timeout_s: float) -> VmExit:
        """Wait until the VMM has ended. Raise EngineError at the deadline."""
        if self._superseded:
            return VmExit(signal=signal.SIGKILL, killed_by_us=True)
        try:
            return self._exit_of(self._child.wait(timeout_s))
        except HostError as error:
            raise EngineError(error.message, hint="kill it first") from error

    def on_exit(self, callback: Callable[[VmExit], None]) -> None:
        """Call back once from a service thread when the VMM has ended, at once if it already has."""
        self._child.on_exit(lambda ended: callback(self._exit_of(ended)))

    def explain(self) -> FcvmError:
        """Return why the VM is dead, with the tails of its console and log. Wait up to 2 s for its end."""
        ended: VmExit | None = None
        with suppress(HostError):
            ended = self._exit_of(self._child.wait(_EXIT_WAIT_S))
        return self._explain_death(self.name, ended, console=self.console_path, log=self.vmm_log_path)

    def _supersede(self) -> None:
        """Give the process up to another VM."""
        self._superseded = True
        self._child.forget_callbacks()

    def _exit_of(self, ended: ChildExit) -> VmExit:
        ours = self._killed and ended.signal == signal.SIGKILL
        return VmExit(code=ended.code, signal=ended.signal, killed_by_us=ours)
