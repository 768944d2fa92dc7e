"""A smoke boot: QEMU under KVM with the real kernel, until its agent shows itself on the console."""

from __future__ import annotations

import socket
from contextlib import ExitStack

from pytest_fcvm.engine.kvm import AGENT_SIGN, SmokeTimeout
from pytest_fcvm.engine.launch import launch, make_memory_file
from pytest_fcvm.engine.post_mortem import read_tail
from pytest_fcvm.engine.protocol import Accelerator, GuestFiles, VmShape
from pytest_fcvm.engine.qemu.command import AGENT_FD, CONSOLE_FD, MONITOR_FD, NIC_FDS, Platform, base_command
from pytest_fcvm.engine.qemu.installation import Installation
from pytest_fcvm.engine.qemu.post_mortem import describe_exit
from pytest_fcvm.host.clock import Deadline
from pytest_fcvm.host.own import shutil
from pytest_fcvm.host.supervisor.protocol import Spawner

__all__ = ["boot_smoke"]

_SHAPE = VmShape(mem_mib=256, cpus=1)
_TIMEOUT_S = 10.0
_LAST_WORDS_S = 5.0


def boot_smoke(
    spawner: Spawner, installation: Installation, files: GuestFiles, *, timeout_s: float = _TIMEOUT_S
) -> str:
    """Boot a kernel under KVM. Return why that failed, "" when its agent came up.

    Raise SmokeTimeout when nothing happened in time, HostError when QEMU could not be spawned.
    """
    platform = Platform(binary=installation.binary, version=installation.version, accelerator=Accelerator.KVM)
    with ExitStack() as stack, ExitStack() as undo:
        directory = spawner.make_dir("smoke")
        undo.callback(shutil.rmtree, directory, ignore_errors=True)
        memory = directory / "memory"
        make_memory_file(memory, _SHAPE.mem_mib)
        argv = base_command(platform, _SHAPE, files, memory, console_fd=CONSOLE_FD)
        wires = MONITOR_FD, AGENT_FD, CONSOLE_FD
        launched = launch(spawner, "smoke", argv, wires=wires, loose=NIC_FDS, directory=directory)
        stack.callback(launched.discard)
        undo.pop_all()  # the directory is the VMM's now
        if _saw_sign(launched.sockets[CONSOLE_FD], timeout_s):
            return ""
        ended = launched.child.wait(_LAST_WORDS_S)
        return f"/dev/kvm cannot boot a kernel: {describe_exit(ended.code, ended.signal, read_tail(launched.log))}"


def _saw_sign(console: socket.socket, timeout_s: float) -> bool:
    """Read a console until the agent shows itself. Return False when the console ends. Raise SmokeTimeout."""
    deadline, seen = Deadline(timeout_s), bytearray()
    while AGENT_SIGN not in seen:
        console.settimeout(max(deadline.remaining() or 0, 0.001))
        try:
            data = console.recv(65536)
        except TimeoutError:
            raise SmokeTimeout(f"/dev/kvm cannot boot a kernel: no sign of the agent within {deadline}") from None
        if not data:
            return False
        seen += data
    return True
