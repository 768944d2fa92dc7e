"""QEMU's command lines: of a base, of a clone, and what of a base's enters a snapshot's key.

Base and clone must have the same devices in the same order: QEMU takes the device state of one for the other without a
word where they differ, and the guest then hangs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pytest_fcvm.engine.launch import BASE_MACS
from pytest_fcvm.engine.protocol import Accelerator, GuestFiles, SnapshotFiles, VmShape
from pytest_fcvm.engine.qemu.version import QemuVersion

__all__ = [
    "AGENT_FD",
    "CONSOLE_FD",
    "DISK_FD",
    "MONITOR_FD",
    "NIC_FDS",
    "STATE_FD",
    "Platform",
    "base_command",
    "clone_command",
    "key_arguments",
]

# Descriptors in the VMM. Fixed, so that command lines are the same from clone to clone.
MONITOR_FD, AGENT_FD, STATE_FD, CONSOLE_FD = 3, 4, 5, 6
NIC_FDS = (7, 8, 9)
DISK_FD = 10

AGENT_PORT = "fcvm.agent"

_SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
# The default is 1 GiB of translated code per VM, which a long-lived clone may fill; a flush now and then is cheaper.
_TRANSLATION_CACHE_MIB = 128
_PLACEHOLDER_BYTES = 4096
# What xen-save-devices-state writes lacks the sections that a migration begins and ends with.
_FORMAT_OF_CLONES = ("-global", "migration.send-configuration=off", "-machine", "suppress-vmdesc=on")


@dataclass(frozen=True, kw_only=True)
class Platform:
    """What of this host every command line depends on. `tsc_khz` matters under TCG alone."""

    binary: Path
    version: QemuVersion
    accelerator: Accelerator
    tsc_khz: int = 0


def base_command(
    platform: Platform,
    shape: VmShape,
    files: GuestFiles,
    memory: Path,
    *,
    disk: Path | None = None,
    console_fd: int | None = None,
) -> list[str]:
    """Return the command that boots a base. Its console is the file console.log in its directory, or a socket."""
    return [
        str(platform.binary),
        *_running(platform, shape),
        *("-object", f"memory-backend-file,id=mem,size={shape.mem_mib}M,share=on,mem-path={_quote(memory)}"),
        *_console(console_fd),
        *("-kernel", str(files.kernel), "-initrd", str(files.initramfs), "-append", boot_arguments(platform)),
        *_devices(files.rootfs, disk, _base_network(shape)),
    ]


def clone_command(platform: Platform, shape: VmShape, files: SnapshotFiles) -> list[str]:
    """Return the command of a clone that waits for its device state.

    It names no kernel: that is in the memory already, and reading it again would cost 9 to 16 ms.
    """
    access = "share=off,readonly=on,rom=off" if platform.version.opens_private_memory_read_only else "share=off"
    network = _TAP_NETWORK if shape.network.uses_netns else _base_network(shape)
    return [
        str(platform.binary),
        *_running(platform, shape),
        *("-object", f"memory-backend-file,id=mem,size={shape.mem_mib}M,{access},mem-path={_quote(files.memory)}"),
        *_console(None),
        *(_FORMAT_OF_CLONES if files.of_clone else ()),
        # QEMU would announce each card five times after the restore, by the base's MAC.
        *("-incoming", "defer", "-global", "migration.announce-rounds=0"),
        *_devices(files.rootfs, Path(f"/proc/self/fd/{DISK_FD}") if shape.disk_mib else None, network),
    ]


def key_arguments(platform: Platform, shape: VmShape) -> tuple[str, ...]:
    """Return a base's command line with names in place of the paths that differ from host to host."""
    files = GuestFiles(kernel=Path("kernel"), initramfs=Path("initramfs"), rootfs=Path("rootfs"))
    disk = Path(f"disk of {shape.disk_mib} MiB") if shape.disk_mib else None
    return tuple(base_command(platform, shape, files, Path("memory"), disk=disk)[1:])


def _base_network(shape: VmShape) -> str:
    """Return a base's network: one that leads outside only where that is asked for."""
    if shape.egress:
        return _TAP_NETWORK if shape.network.uses_netns else "user,ipv6=off"
    return _socket_network(0)


def boot_arguments(platform: Platform) -> str:
    """Return the kernel's command line.

    `quiet` spares the emulated serial port and keeps panics and OOM kills; a panic reboots at once, by triple fault,
    which `-no-reboot` turns into the end of the VMM. Under TCG one boot in ten hangs while the kernel calibrates its
    TSC against the PIT, unless it is told the rate.
    """
    words = ["console=ttyS0", "quiet", "reboot=t", "panic=-1", "mitigations=off", "random.trust_cpu=on"]
    if platform.accelerator is Accelerator.TCG:
        # Reliable: on a busy host the watchdog takes a late tick for a bad TSC and falls back to jiffies, for ever.
        words += [f"tsc_early_khz={platform.tsc_khz}", "tsc=reliable"]
        # What is translated is found again by its address: a program that is started again, at other addresses, is not.
        words.append("norandmaps")
    return " ".join(words)


def _running(platform: Platform, shape: VmShape) -> Iterator[str]:
    tcg = platform.accelerator is Accelerator.TCG
    yield from ("-no-user-config", "-nodefaults", "-display", "none", "-no-reboot", "-sandbox", _SANDBOX)
    yield from ("-machine", "microvm,acpi=on,memory-backend=mem")
    yield from ("-accel", f"tcg,tb-size={_TRANSLATION_CACHE_MIB}" if tcg else "kvm")
    # Five levels of page tables make emulation slower, and a guest that is itself a host of KVM cannot nest them.
    yield from ("-cpu", "max,la57=off" if tcg else "host")
    yield from ("-m", f"{shape.mem_mib}M", "-smp", str(shape.cpus))
    yield from ("-chardev", f"socket,id=monitor,fd={MONITOR_FD}", "-qmp", "chardev:monitor")


def _console(fd: int | None) -> Iterator[str]:
    back_end = "file,id=console,path=console.log" if fd is None else f"socket,id=console,fd={fd}"
    yield from ("-chardev", back_end, "-serial", "chardev:console")


def _devices(rootfs: Path | None, disk: Path | None, first_network: str) -> Iterator[str]:
    """Yield the fixed set: there is no hotplug, so a base has every device that a clone may want to attach to."""
    yield from ("-device", "virtio-serial-device", "-chardev", f"socket,id=agent,fd={AGENT_FD}")
    yield from ("-device", f"virtserialport,chardev=agent,name={AGENT_PORT}")
    for index, mac in enumerate(BASE_MACS):
        network = first_network if index == 0 else _socket_network(index)
        yield from ("-netdev", f"{network},id=net{index}")
        # Announcing itself after a restore is the agent's to do, once and with the clone's own address.
        yield from ("-device", f"virtio-net-device,netdev=net{index},mac={mac},guest_announce=off")
    yield from _drive("rootfs", f"driver=file,filename={_quote(rootfs)}" if rootfs else _NOTHING)
    # What the guest writes through is in the host's page cache, and outlives the VMM; nothing of it outlives the host.
    yield from _drive("drive1", f"driver=file,filename={_quote(disk)},cache.no-flush=on" if disk else _NOTHING)
    yield from _drive("drive2", _NOTHING)
    yield from ("-object", "rng-builtin,id=entropy", "-device", "virtio-rng-device,rng=entropy")


def _socket_network(index: int) -> str:
    """Return a network of Ethernet frames on a datagram socket; one that is not connected is a attachment to nowhere.

    A base has no other: slirp's own state would enter its device state, and no clone could then do without slirp.
    """
    return f"dgram,local.type=fd,local.str={NIC_FDS[index]}"


_TAP_NETWORK = f"tap,fd={NIC_FDS[0]},vhost=off"
_NOTHING = f"driver=null-co,size={_PLACEHOLDER_BYTES},read-zeroes=on"


def _drive(name: str, source: str) -> Iterator[str]:
    access = ",read-only=on" if name == "rootfs" else ""
    yield from ("-blockdev", f"node-name={name},{source}{access}")
    yield from ("-device", f"virtio-blk-device,drive={name},serial={name}")


def _quote(path: Path) -> str:
    """Return a path as a value in a list of options, where a comma is written twice."""
    return str(path).replace(",", ",,")
