"""Whether KVM works here: proven by booting the real kernel once, and remembered for this boot of the host.

No ioctl proves it. There are hosts whose /dev/kvm makes VMs and runs single instructions, and on which QEMU dies with
`failed to set MSR 0x10a`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from pytest_fcvm.engine.records import Digests, boot_id, open_record
from pytest_fcvm.host.clock import monotonic

__all__ = ["AGENT_SIGN", "SmokeTimeout", "explain_missing_device", "recall_or_prove"]

AGENT_SIGN = b"fcvm-agent:"
"""What the agent prints first on the console."""

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


def _holds(until: object) -> bool:
    return until is None or (isinstance(until, int | float) and monotonic() < until)
