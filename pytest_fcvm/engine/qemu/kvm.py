"""Whether KVM works here: proven by booting the real kernel once, and remembered for this boot of the host.

No ioctl proves it. There are hosts whose /dev/kvm makes VMs and runs single instructions, and on which QEMU dies with
`failed to set MSR 0x10a`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from pytest_fcvm.engine.protocol import Accelerator, GuestFiles, MachineShape
from pytest_fcvm.engine.qemu.command import AGENT_FD, CONSOLE_FD, MONITOR_FD, NIC_FDS, Platform, base_command
from pytest_fcvm.engine.qemu.installation import Installation
from pytest_fcvm.engine.qemu.launch import launch, make_memory_file
from pytest_fcvm.engine.qemu.post_mortem import read_tail, tell_end
from pytest_fcvm.engine.qemu.records import Digests, boot_id, open_record
from pytest_fcvm.engine.spawner import Spawner
from pytest_fcvm.host.clock import Deadline, monotonic

__all__ = ["AGENT_SIGN", "SmokeTimeout", "boot_smoke", "explain_missing_device", "recall_or_prove"]

AGENT_SIGN = b"fcvm-agent:"
"""What the agent prints first on the console."""

_SHAPE = MachineShape(mem_mib=256, cpus=1)
_TIMEOUT_S = 10.0
_LAST_WORDS_S = 5.0
_DOUBTFUL_FOR_S = 600.0  # a deadline may have passed because the host was busy


class SmokeTimeout(Exception):
    """The smoke boot showed nothing in time; not as sure as a VMM that died."""


def explain_missing_device(device: Path = Path("/dev/kvm")) -> tuple[str, str]:
    """Return why KVM cannot even be tried and what to do, two empty strings when it can."""
    if not device.exists():
        return f"there is no {device}", "enable virtualisation in the firmware, or pass the device into this container"
    if not os.access(device, os.R_OK | os.W_OK):
        return f"{device} may not be opened by this user", "sudo usermod -aG kvm $USER, then log in again"
    return "", ""


def recall_or_prove(record_file: Path, vmm_digest: str, kernel: Path, prove: Callable[[], str]) -> str:
    """Return why KVM does not work, "" when it does.

    `prove` boots the kernel, says the same, and raises SmokeTimeout at its deadline. It runs in one process at a time,
    once per boot of the host, VMM and kernel.
    """
    with open_record(record_file) as record:
        digests = record.setdefault("digests", {})
        assert isinstance(digests, dict)
        name = f"{boot_id()} {vmm_digest} {Digests(digests).of(kernel)}"
        known = record.get("verdict")
        if isinstance(known, dict) and known.get("name") == name and _holds(known.get("until")):
            return str(known["reason"])
        until: float | None = None
        try:
            reason = prove()
        except SmokeTimeout as error:
            reason, until = str(error), monotonic() + _DOUBTFUL_FOR_S
        record["verdict"] = {"name": name, "reason": reason, "until": until}
        return reason


def boot_smoke(
    spawner: Spawner, installation: Installation, files: GuestFiles, *, timeout_s: float = _TIMEOUT_S
) -> str:
    """Boot a kernel under KVM. Return why that failed, "" when its agent came up.

    Raise SmokeTimeout when nothing happened in time, HostError when QEMU could not be spawned.
    """
    platform = Platform(binary=installation.binary, version=installation.version, accelerator=Accelerator.KVM)
    directory = spawner.make_dir("smoke")
    memory = directory / "memory"
    make_memory_file(memory, _SHAPE.mem_mib)
    argv = base_command(platform, _SHAPE, files, memory, console_fd=CONSOLE_FD)
    with ExitStack() as stack:
        wires = MONITOR_FD, AGENT_FD, CONSOLE_FD
        launched = launch(spawner, "smoke", argv, wires=wires, loose=NIC_FDS, directory=directory)
        for wire in launched.sockets.values():
            stack.enter_context(wire)
        stack.callback(launched.child.kill)
        if _saw_sign(launched.sockets[CONSOLE_FD], timeout_s):
            return ""
        ended = launched.child.wait(_LAST_WORDS_S)
        return f"/dev/kvm cannot boot a kernel: {tell_end(ended.code, ended.signal, read_tail(launched.log))}"


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


def _holds(until: object) -> bool:
    return until is None or (isinstance(until, int | float) and monotonic() < until)
