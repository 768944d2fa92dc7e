"""The API calls that boot a base, and those that load a clone.

File names are relative to the VM's own directory (`vm_dir.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pytest_fcvm.engine.firecracker import api
from pytest_fcvm.engine.firecracker.api import Call
from pytest_fcvm.engine.launch import BASE_MACS
from pytest_fcvm.engine.protocol import VmShape
from pytest_fcvm.errors import HostError
from pytest_fcvm.host.process import find_tool
from pytest_fcvm.model.net import Namespace
from pytest_fcvm.network.addresses import METADATA_ADDRESS, NICS

__all__ = [
    "AGENT_PORT",
    "AGENT_SOCKET",
    "API_SOCKET",
    "CONSOLE",
    "DISK_FD",
    "DRIVES",
    "INITRAMFS",
    "KERNEL",
    "MEMORY",
    "MOUNTS_FD",
    "NET_FD",
    "SCRATCH",
    "STATE",
    "USER_FD",
    "Request",
    "boot_calls",
    "drive_inputs",
    "enter_command",
    "key_arguments",
    "load_calls",
]

API_SOCKET, AGENT_SOCKET, CONSOLE = "api.sock", "agent.sock", "console.log"
KERNEL, INITRAMFS, MEMORY, STATE = "kernel", "initramfs", "memory", "state"
DRIVES = ("rootfs", "drive1", "drive2")
SCRATCH = DRIVES[1]
AGENT_PORT = 1024  # PROTOCOL_VSOCK_PORT of the agent
DISK_FD = 3  # a clone's disk has no name
USER_FD, NET_FD, MOUNTS_FD = 4, 5, 6  # the namespaces to start Firecracker in
_NOTHING = Path("/dev/null")  # behind an unused drive
_BALLOON_STATISTICS_S = 3600  # statistics need an interval; the size of the balloon is current all the same
_GUEST_CID = 3  # the same in all clones: each clone has its own socket

Request = tuple[Call, Mapping[str, Any]]

# `quiet` saves 99 % of the exits for the serial port, and still shows panics and OOM kills. A panic resets the guest at
# once through the keyboard controller, which ends Firecracker. The kernel does not probe that controller for devices.
_BOOT_ARGUMENTS = (
    "console=ttyS0 quiet reboot=k panic=-1 mitigations=off random.trust_cpu=on 8250.nr_uarts=1 "
    "i8042.noaux i8042.nokbd i8042.nomux i8042.nopnp"
)


def boot_calls(shape: VmShape, metadata: Mapping[str, Any] | None = None) -> Iterator[Request]:
    """Yield the calls that configure a base and start it."""
    yield api.SERIAL, {"serial_out_path": CONSOLE}
    yield (
        api.MACHINE_CONFIG,
        {"vcpu_count": shape.cpus, "mem_size_mib": shape.mem_mib, "smt": False, "track_dirty_pages": False},
    )
    yield (
        api.BOOT_SOURCE,
        {"kernel_image_path": KERNEL, "initrd_path": INITRAMFS, "boot_args": _BOOT_ARGUMENTS},
    )
    for name in DRIVES:  # in this order they are vda, vdb and vdc
        yield (
            api.DRIVE.of(name),
            {"drive_id": name, "path_on_host": name, "is_root_device": False, "is_read_only": name == "rootfs"},
        )
    if shape.network.uses_netns:
        for name, mac in zip(NICS, BASE_MACS, strict=True):
            yield api.NETWORK_INTERFACE.of(name), {"iface_id": name, "host_dev_name": name, "guest_mac": mac}
    if shape.metadata:  # V1 answers requests with and without a token
        yield api.MMDS_CONFIG, {"version": "V1", "network_interfaces": [NICS[0]], "ipv4_address": METADATA_ADDRESS}
        yield from _metadata_calls(metadata)
    if shape.balloon:
        yield (
            api.BALLOON,
            {"amount_mib": 0, "deflate_on_oom": False, "stats_polling_interval_s": _BALLOON_STATISTICS_S},
        )
    yield api.VSOCK, {"guest_cid": _GUEST_CID, "uds_path": AGENT_SOCKET}
    yield api.ENTROPY, {}
    yield api.ACTIONS, {"action_type": "InstanceStart"}


def load_calls(metadata: Mapping[str, Any] | None = None) -> Iterator[Request]:
    """Yield the calls that load a clone and resume it."""
    yield api.SERIAL, {"serial_out_path": CONSOLE}
    yield from _metadata_calls(metadata)
    yield (
        api.SNAPSHOT_LOAD,
        {
            "snapshot_path": STATE,
            "mem_backend": {"backend_type": "File", "backend_path": MEMORY},
            "resume_vm": True,
        },
    )


def _metadata_calls(metadata: Mapping[str, Any] | None) -> Iterator[Request]:
    if metadata is not None:
        yield api.MMDS, metadata


def drive_inputs(rootfs: Path | None, scratch: Path | None) -> dict[str, Path]:
    """Return the file behind each drive."""
    return dict(zip(DRIVES, (rootfs or _NOTHING, scratch or _NOTHING, _NOTHING), strict=True))


def enter_command(namespace: Namespace | None, *, mounts: bool) -> list[str]:
    """Return the beginning of a command that enters the namespaces at USER_FD, NET_FD and MOUNTS_FD.

    Raise HostError without nsenter.
    """
    flags = [f"--net=/proc/self/fd/{NET_FD}"] if namespace else []
    if namespace and namespace.user is not None:
        flags.append(f"--user=/proc/self/fd/{USER_FD}")
    if mounts:
        flags.append(f"--mount=/proc/self/fd/{MOUNTS_FD}")
    if not flags:
        return []
    tool = find_tool("nsenter")
    if tool is None:
        raise HostError("nsenter is not installed", hint="apt-get install util-linux, or use --fcvm-network relay")
    return [str(tool), "--preserve-credentials", *flags, "--"]


def key_arguments(shape: VmShape) -> tuple[str, ...]:
    """Return a base's calls, one string each."""
    return tuple(f"{call} {json.dumps(body, sort_keys=True)}" for call, body in boot_calls(shape))
