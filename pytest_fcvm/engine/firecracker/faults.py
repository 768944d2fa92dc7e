"""Turn Firecracker's refusals into our errors, with a hint for the user.

The patterns match the messages of Firecracker 1.14 to 1.16. Any other message becomes an EngineError without a hint.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pytest_fcvm.errors import EngineError, FcvmError, HostError

__all__ = ["explain_fault"]

_REBUILD = "build the snapshot again: --fcvm-rebuild"


@dataclass(frozen=True)
class _Known:
    pattern: re.Pattern[str]
    error: type[FcvmError]
    hint: str


def _known(pattern: str, error: type[FcvmError], hint: str) -> _Known:
    return _Known(re.compile(pattern), error, hint)


# The most specific first.
_FAULTS = (
    _known(r"Error creating KVM object: Permission denied", HostError, "sudo usermod -aG kvm $USER, then log in again"),
    _known(
        r"Error creating KVM object: No such file",
        HostError,
        "enable virtualisation in the firmware, or pass /dev/kvm into this container",
    ),
    _known(r"Error creating KVM object", HostError, "see `fcvm doctor`; --fcvm-engine qemu needs no KVM"),
    _known(r"Couldn't open /dev/net/tun", HostError, "load the tun module, or use --fcvm-network relay"),
    _known(r"creating ifreq structure: Operation not permitted", HostError, "use --fcvm-network relay"),
    _known(r"creating ifreq structure: Device or resource busy", HostError, "two VMs asked for one tap device"),
    _known(r"No space left on device", HostError, "free space on the disk of --fcvm-cache-dir"),
    _known(r"Cannot allocate memory|MmapRegion", HostError, "free memory, or ask for less: --fcvm-mem"),
    _known(r"Address already in use", HostError, "another VMM uses this directory"),
    _known(
        r"CRC64 validation failed|bitcode error|File too short|Invalid data version|Magic value", EngineError, _REBUILD
    ),
    _known(r"Failed to load guest memory|Failed to restore guest memory|snapshot file", EngineError, _REBUILD),
    _known(r"Error manipulating the backing file", EngineError, _REBUILD),
    _known(
        r"kernel file cannot be opened|Invalid Elf magic|Unable to read elf header",
        HostError,
        "give another kernel: --fcvm-kernel",
    ),
    _known(r"[Nn]o balloon", EngineError, "ask for one: --fcvm-balloon"),
    _known(r"number of vCPUs", EngineError, "Firecracker takes 1 to 32 CPUs: --fcvm-cpus"),
    _known(r"memory size \(MiB\)", EngineError, "give a size of at least 1M: --fcvm-mem"),
)


def explain_fault(call: str, status: int, message: str) -> FcvmError:
    """Return the error for a call that Firecracker refused with an HTTP status and a fault message."""
    words = re.sub(r"\s*\\?\n", " ", message).strip()
    if status == 503:  # the API accepts ten connections
        return EngineError(f"Firecracker has too many connections: {call}", hint="close other clients of its API")
    for known in _FAULTS:
        if known.pattern.search(words):
            return known.error(f"Firecracker refused {call}: {words}", hint=known.hint)
    return EngineError(f"Firecracker refused {call}: {words}")
