"""Find out whether KVM works: boot the real kernel once, and cache the verdict until the host reboots.

An ioctl is not enough. There are hosts whose /dev/kvm makes VMs and runs single instructions, and on which QEMU dies
with `failed to set MSR 0x10a`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pytest_fcvm.engine.cpu import read_cpu
from pytest_fcvm.host.clock import monotonic
from pytest_fcvm.host.own import os
from pytest_fcvm.host.records import Digests, boot_id, open_record

__all__ = ["AGENT_BANNER", "SmokeTimeout", "cached_or_probe", "explain_missing_device"]

AGENT_BANNER = b"fcvm-agent:"
"""The agent's first output on the console."""

_MODULES = {"vmx": "kvm_intel", "svm": "kvm_amd"}  # by the CPU's flag
_TIMEOUT_CACHED_S = 600.0  # the host may have been busy


class SmokeTimeout(Exception):
    """The smoke boot timed out. This verdict is less certain than the death of a VMM."""


def explain_missing_device(root: Path = Path("/")) -> tuple[str, str]:
    """Return why KVM cannot be tried, and a hint; two empty strings when it can. `root` replaces / in tests."""
    device = root / "dev/kvm"
    if not device.exists():
        return _explain_absence(root)
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except PermissionError:
        return "/dev/kvm may not be opened by this user", "sudo usermod -aG kvm $USER, then log in again"
    except OSError as error:
        return f"/dev/kvm cannot be opened: {error.strerror}", "sudo modprobe kvm-intel, or kvm-amd"
    return "", ""


def _explain_absence(root: Path) -> tuple[str, str]:
    """Return why there is no device, and a hint: it is hidden, its module is not loaded, or the CPU lacks KVM."""
    flags = read_cpu(root / "proc/cpuinfo").flags
    module = next((name for flag, name in _MODULES.items() if flag in flags), "")
    if module and (root / "sys/module" / module).exists():
        return "there is no /dev/kvm in this container", "start it with --device /dev/kvm"
    if module:
        return "there is no /dev/kvm: its module is not loaded", f"sudo modprobe {module.replace('_', '-')}"
    if "hypervisor" in flags:
        hint = (
            "allow nesting on the host of this virtual machine: kvm_intel or kvm_amd with nested=1, and its CPU "
            "passed through"
        )
        return "there is no /dev/kvm: this virtual machine may not run virtual machines", hint
    return "there is no /dev/kvm: the CPU does not offer it", "enable virtualisation (VT-x, SVM) in the firmware"


def cached_or_probe(record_file: Path, vmm_digest: str, kernel: Path, verify: Callable[[], str]) -> str:
    """Return why KVM does not work, "" when it does.

    `verify` boots the kernel and returns the same, or raises SmokeTimeout at its deadline. It runs in one process at a
    time, and once for each boot of the host, VMM and kernel.
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
            reason = verify()
        except SmokeTimeout as error:
            reason, until = str(error), monotonic() + _TIMEOUT_CACHED_S
        record["verdict"] = {"name": name, "reason": reason, "until": until}
        return reason


def _holds(until: object) -> bool:
    return until is None or (isinstance(until, int | float) and monotonic() < until)
