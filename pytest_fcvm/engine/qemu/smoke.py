"""A smoke boot: boot the real kernel in QEMU with KVM, until the agent prints its banner on the console."""

from __future__ import annotations

import socket
from contextlib import ExitStack

from pytest_fcvm.engine.kvm import AGENT_BANNER, SmokeTimeout
from pytest_fcvm.engine.launch import launch, make_memory_file
from pytest_fcvm.engine.protocol import Accelerator, GuestFiles, VmShape
from pytest_fcvm.engine.qemu.command import AGENT_FD, CONSOLE_FD, MONITOR_FD, NIC_FDS, Platform, base_command
from pytest_fcvm.engine.qemu.installation import Installation
from pytest_fcvm.engine.qemu.post_mortem import describe_exit
from pytest_fcvm.host.clock import Deadline
from pytest_fcvm.host.files import read_tail
from pytest_fcvm.host.own import shutil
from pytest_fcvm.host.supervisor.protocol import Spawner

__all__ = ["boot_smoke"]

_SHAPE = VmShape(mem_mib=256, cpus=1)
_TIMEOUT_S = 10.0
_EXIT_WAIT_S = 5.0


def boot_smoke(
    spawner: Spawner, installation: Installation, files: GuestFiles, *, timeout_s: float = _TIMEOUT_S
) -> str:
    """Boot a kernel with KVM. Return why that failed, "" when its agent came up.

    Raise SmokeTimeout at the deadline, HostError when QEMU could not be spawned.
    """
    platform = Platform(binary=installation.binary, version=installation.version, accelerator=Accelerator.KVM)
    with ExitStack() as stack, ExitStack() as undo:
        directory = spawner.make_dir("smoke")
        undo.callback(shutil.rmtree, directory, ignore_errors=True)
        memory = directory / "memory"
        make_memory_file(memory, _SHAPE.mem_mib)
        argv = base_command(platform, _SHAPE, files, memory, console_fd=CONSOLE_FD)
        sockets = MONITOR_FD, AGENT_FD, CONSOLE_FD
        launched = launch(spawner, "smoke", argv, sockets=sockets, unconnected=NIC_FDS, directory=directory)
        stack.callback(launched.discard)
        undo.pop_all()  # from here on the directory goes with the VMM
        if _saw_banner(launched.sockets[CONSOLE_FD], timeout_s):
            return ""
        ended = launched.child.wait(_EXIT_WAIT_S)
        return f"/dev/kvm cannot boot a kernel: {describe_exit(ended.code, ended.signal, read_tail(launched.log))}"


def _saw_banner(console: socket.socket, timeout_s: float) -> bool:
    """Read a console until the agent's banner, and return True; False when the console ends. Raise SmokeTimeout."""
    deadline, seen = Deadline(timeout_s), bytearray()
    while AGENT_BANNER not in seen:
        console.settimeout(max(deadline.remaining() or 0, 0.001))
        try:
            data = console.recv(65536)
        except TimeoutError:
            raise SmokeTimeout(f"/dev/kvm cannot boot a kernel: no sign of the agent within {deadline}") from None
        if not data:
            return False
        seen += data
    return True
