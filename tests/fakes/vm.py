"""An engine and VMs without a VMM. A real channel connects each VM to a fake agent."""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fakes.agent import FakeAgent
from fakes.agent_wire import FakeStream

from pytest_fcvm.engine.protocol import (
    Accelerator,
    BootPlan,
    EngineReport,
    GuestFiles,
    RestorePlan,
    VmExit,
    VmShape,
)
from pytest_fcvm.errors import EngineError, FcvmError
from pytest_fcvm.guest.frames import StreamKind
from pytest_fcvm.model.specs import NetworkMode


class FakeVm:
    """A VM whose process only ends by its own methods. `agent.ports` has the guest's ports."""

    def __init__(self, name: str, directory: Path, agent: FakeAgent, plan: BootPlan | RestorePlan) -> None:
        self.name, self.pid, self.plan, self.agent = name, -1, plan, agent
        directory.mkdir(parents=True)
        self.console_path, self.vmm_log_path = directory / "console", directory / "vmm.log"
        self.console_path.write_bytes(b"[    0.000000] Linux version 6.1\n")
        self.calls: list[str] = []
        self.disk = self.namespace = None
        self.balloon, self.metadata = 0, plan.metadata
        self.exit: VmExit | None = None
        self._ended = threading.Event()
        self._callbacks: list[Callable[[VmExit], None]] = []

    def channel(self) -> socket.socket:
        host, guest = socket.socketpair()
        if self.exit is None:
            self.agent.attach(guest)
        else:
            guest.close()
        return host

    def preconfigure(self) -> None:
        self.calls.append("preconfigure")

    def start(self) -> None:
        self.calls.append("start")

    def set_link(self, attachment: int, up: bool) -> None:
        self.calls.append(f"link {attachment} {'up' if up else 'down'}")

    def pause(self) -> None:
        self.calls.append("pause")

    def resume(self) -> None:
        self.calls.append("resume")

    def snapshot(self, state: Path) -> None:
        self.calls.append("snapshot")
        assert isinstance(self.plan, BootPlan)
        self.plan.memory.write_bytes(b"memory")
        state.write_bytes(b"state")

    def kill(self) -> None:
        self._end(VmExit(signal=9, killed_by_us=True))

    def die(self, signal: int) -> None:
        """End the VMM by a signal that is not ours."""
        self._end(VmExit(signal=signal))

    def wait(self, timeout_s: float) -> VmExit:
        if not self._ended.wait(timeout_s):
            raise EngineError(f"{self.name} did not end")
        assert self.exit is not None
        return self.exit

    def set_balloon(self, mib: int) -> None:
        self.balloon = min(mib, 100)

    def balloon_mib(self) -> int:
        return self.balloon

    def set_metadata(self, data: Mapping[str, Any]) -> None:
        self.metadata = data

    def latencies(self) -> Mapping[str, float]:
        return {}

    def explain(self) -> FcvmError:
        if self.exit and self.exit.killed_by_us:
            return EngineError(f"VM {self.name} was killed")
        return EngineError(f"VM {self.name} ended: signal {self.exit.signal if self.exit else None}")

    def on_exit(self, callback: Callable[[VmExit], None]) -> None:
        if self.exit is None:
            self._callbacks.append(callback)
        else:
            callback(self.exit)

    def _end(self, how: VmExit) -> None:
        if self.exit is not None:
            return
        self.exit = how
        if not self.agent.loop.is_closed():  # its test is over
            self.agent.hang_up()
        self._ended.set()
        for callback in self._callbacks:
            threading.Thread(target=callback, args=(how,)).start()


class RewindableVm(FakeVm):
    """A VM that goes back to its snapshot by `make`, which makes the VM of its next life, in the same process."""

    def __init__(self, *arguments: Any, make: Callable[[RestorePlan], FakeVm], **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._make_next = make
        self.is_changed = False  # in a way that no rewind puts back
        self.refusal: EngineError | None = None

    def can_rewind(self) -> bool:
        return not self.is_changed

    def halt(self) -> None:
        if self.exit:
            raise self.explain()
        self.calls.append("halt")

    def rewind(self, name: str, *, verifies: bool = False) -> FakeVm:  # noqa: ARG002  the protocol's signature
        if self.refusal:
            raise self.refusal
        self.calls.append("rewind")
        assert isinstance(self.plan, RestorePlan)
        fresh = self._make_next(replace(self.plan, name=name))
        self._callbacks.clear()
        self._end(VmExit(signal=9, killed_by_us=True))
        return fresh


class FakeEngine:
    """Makes fake VMs. `agents` makes the agent of the next VM; `vms` has all VMs that were made.

    With `rewinds`, its clones are rewindable.
    """

    def __init__(self, directory: Path, agents: Callable[[], FakeAgent]) -> None:
        self.name, self._directory, self._agents = "fake", directory, agents
        self.networks: tuple[NetworkMode, ...] = (NetworkMode.USER, NetworkMode.RELAY)
        self.rewinds = False
        self.joins_namespaces, self.unused_nics, self.vmm_mib = False, 2, 40
        self.vms: list[FakeVm] = []
        self.accelerator, self.identity = Accelerator.TCG, {"version": "1"}
        self.prepare_guest: Callable[[FakeAgent], None] = lambda _agent: None
        self.change_vm: Callable[[FakeVm], None] = lambda _vm: None
        self._numbers = itertools.count()

    def check(self, shape: VmShape) -> None:
        pass

    def private_networks(self, mode: NetworkMode) -> int:  # noqa: ARG002
        return self.unused_nics

    def probe(self, smoke: GuestFiles) -> EngineReport:  # noqa: ARG002
        return self.report

    @property
    def report(self) -> EngineReport:
        return EngineReport(engine=self.name, usable=True, accelerator=self.accelerator, identity=self.identity)

    def boot(self, plan: BootPlan) -> FakeVm:
        return self._make(plan)

    def prepare(self, plan: RestorePlan) -> FakeVm:
        vm = self._make(plan)
        bases = [vm for vm in self.vms if isinstance(vm.plan, BootPlan)]
        if bases:  # the guest continues where the base was saved
            vm.agent.run(vm.agent.wait_for_secret, bases[-1].agent.run(lambda: bases[-1].agent.secret))
        return vm

    def base_arguments(self, shape: VmShape) -> tuple[str, ...]:
        return ("-m", str(shape.mem_mib), "-smp", str(shape.cpus))

    def _make(self, plan: BootPlan | RestorePlan) -> FakeVm:
        agent = self._agents()
        self.prepare_guest(agent)
        directory = self._directory / str(next(self._numbers))
        if self.rewinds and isinstance(plan, RestorePlan):
            vm: FakeVm = RewindableVm(plan.name, directory, agent, plan, make=self.prepare)
        else:
            vm = FakeVm(plan.name, directory, agent, plan)
        self.vms.append(vm)
        self.change_vm(vm)
        return vm


def _hello(_request: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello"


class Service:
    """A TCP server on the host in place of a guest's port. `answer` makes the response; None resets connections."""

    def __init__(self, answer: Callable[[bytes], bytes] | None = _hello) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()
        self.answer = answer
        self.requests: list[bytes] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            if self.answer is None:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return
            while data := connection.recv(1 << 16):
                self.requests.append(data)
                connection.sendall(self.answer(data))


def at_verb(agent: FakeAgent, kind: StreamKind, deed: Callable[[], object]) -> None:
    """Call `deed` on the agent's thread for each request of a kind, before the agent answers it."""
    serve = agent._serve_verb

    def do_and_serve(stream: FakeStream) -> None:
        if stream.kind is kind:
            deed()
        serve(stream)

    agent._serve_verb = do_and_serve  # type: ignore[method-assign]
