"""What every VM is, whichever VMM runs it: a process with a console, a log, and an end that can be told."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from pytest_fcvm.engine.disk import Disk
from pytest_fcvm.engine.launch import Launched
from pytest_fcvm.engine.protocol import Vm, VmExit
from pytest_fcvm.errors import EngineError, FcvmError, HostError
from pytest_fcvm.host.supervisor.protocol import ChildExit
from pytest_fcvm.model.net import Namespace

__all__ = ["VmProcess", "discard", "started"]

_LAST_WORDS_S = 2.0  # from the end of a socket to the end of the process

_AnyVm = TypeVar("_AnyVm", bound=Vm)


def started(vm: _AnyVm) -> _AnyVm:
    """Let a prepared VM come to life and return it; nothing of it is left when it does not."""
    try:
        vm.start()
    except BaseException:
        discard(vm)
        raise
    return vm


def discard(vm: Vm) -> None:
    """Kill a VM and give back its disk."""
    vm.kill()
    if vm.disk:
        vm.disk.close()


class VmProcess:
    """The process of a VM. `tell_death(name, how, console=…, log=…)` makes the error of whoever needed it."""

    def __init__(
        self,
        name: str,
        launched: Launched,
        tell_death: Callable[..., FcvmError],
        disk: Disk | None = None,
        namespace: Namespace | None = None,
    ) -> None:
        self.name, self._launched, self._child = name, launched, launched.child
        self._tell_death, self._disk, self._namespace = tell_death, disk, namespace
        self._killed = False

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
        """Return the file that receives what the VMM itself prints."""
        return self._launched.log

    @property
    def disk(self) -> Disk | None:
        """Return a clone's private scratch disk, the caller's to close once the VM is killed."""
        return self._disk

    @property
    def namespace(self) -> Namespace | None:
        """Return the namespace that its plan had."""
        return self._namespace

    def get_ready(self) -> None:
        """Return at once: a VM has nothing to take before its start but where its engine says otherwise."""

    def kill(self) -> None:
        """Kill the VMM with SIGKILL and return at once; idempotent."""
        self._killed = True
        self._child.kill()

    def wait(self, timeout_s: float) -> VmExit:
        """Wait until the VMM has ended. Raise EngineError at the deadline."""
        try:
            return self._exit_of(self._child.wait(timeout_s))
        except HostError as error:
            raise EngineError(error.message, hint="kill it first") from error

    def on_exit(self, callback: Callable[[VmExit], None]) -> None:
        """Call back once from a service thread when the VMM has ended, at once if it already has."""
        self._child.on_exit(lambda ended: callback(self._exit_of(ended)))

    def set_balloon(self, mib: int) -> None:  # noqa: ARG002  the protocol's signature
        """Raise EngineError: a VM has no balloon but where its engine says otherwise."""
        raise EngineError(f"VM {self.name} has no balloon", hint="ask for one: --fcvm-balloon")

    def balloon_mib(self) -> int:
        """Raise EngineError: a VM has no balloon but where its engine says otherwise."""
        raise EngineError(f"VM {self.name} has no balloon", hint="ask for one: --fcvm-balloon")

    def set_metadata(self, data: Mapping[str, Any]) -> None:  # noqa: ARG002  the protocol's signature
        """Raise EngineError: a VM has no metadata service but where its engine says otherwise."""
        raise EngineError(f"VM {self.name} serves no metadata", hint="give its spec metadata to begin with")

    def latencies(self) -> Mapping[str, float]:
        """Return how long the VMM says that its own work took, in ms: it says nothing."""
        return {}

    def explain(self) -> FcvmError:
        """Return why the VMM is dead, with the tails of its console and log; waits up to 2 s for its end."""
        ended: VmExit | None = None
        with suppress(HostError):
            ended = self._exit_of(self._child.wait(_LAST_WORDS_S))
        return self._tell_death(self.name, ended, console=self.console_path, log=self.vmm_log_path)

    def _exit_of(self, ended: ChildExit) -> VmExit:
        ours = self._killed and ended.signal == signal.SIGKILL
        return VmExit(code=ended.code, signal=ended.signal, killed_by_us=ours)
