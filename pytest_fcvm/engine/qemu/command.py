"""QEMU's command lines: for a base, for a clone, and the part of a base's that enters a snapshot's key.

Base and clone must have the same devices in the same order. Where they differ, QEMU loads the device state all the
same, without a message, and the guest hangs.
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

# Descriptor numbers in the VMM. They are fixed, so that all clones have the same command line.
MONITOR_FD, AGENT_FD, STATE_FD, CONSOLE_FD = 3, 4, 5, 6
NIC_FDS = (7, 8, 9)
DISK_FD = 10

AGENT_PORT = "fcvm.agent"

_SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
# The default is 1 GiB of translated code per VM, and a long-lived clone may fill it. A flush now and then costs less.
_TRANSLATION_CACHE_MIB = 128
_PLACEHOLDER_BYTES = 4096
# xen-save-devices-state omits the first and the last section of a migration.
_CLONE_STATE_FORMAT = ("-global", "migration.send-configuration=off", "-machine", "suppress-vmdesc=on")


@dataclass(frozen=True, kw_only=True)
class Platform:
    """The facts about this host that every command line depends on. Only TCG uses `tsc_khz`.

    `rewinds` says whether the binary has the commands of guest_image/vmm.
    """

    binary: Path
    version: QemuVersion
    accelerator: Accelerator
    tsc_khz: int = 0
    rewinds: bool = False


def base_command(
    platform: Platform,
    shape: VmShape,
    files: GuestFiles,
    memory: Path,
    *,
    disk: Path | None = None,
    console_fd: int | None = None,
) -> list[str]:
    """Return the command that boots a base. Its console is console.log in its directory, or the socket `console_fd`."""
    return [
        str(platform.binary),
        *_running(platform, shape),
        *("-object", f"memory-backend-file,id=mem,size={shape.mem_mib}M,share=on,mem-path={_quote(memory)}"),
        *_console(console_fd),
        *("-kernel", str(files.kernel), "-initrd", str(files.initramfs), "-append", boot_arguments(platform)),
        *_devices(files.rootfs, disk, _base_network(shape)),
    ]


def clone_command(platform: Platform, shape: VmShape, files: SnapshotFiles) -> list[str]:
    """Return the command for a clone that waits for its device state.

    The command names no kernel: the kernel is in the guest's memory, and reading it again would cost 9 to 16 ms.
    """
    access = "share=off,readonly=on,rom=off" if platform.version.opens_private_memory_read_only else "share=off"
    network = _TAP_NETWORK if shape.network.uses_netns else _base_network(shape)
    return [
        str(platform.binary),
        *_running(platform, shape),
        *("-object", f"memory-backend-file,id=mem,size={shape.mem_mib}M,{access},mem-path={_quote(files.memory)}"),
        *_console(None),
        *(_CLONE_STATE_FORMAT if files.of_clone else ()),
        # By default QEMU announces each NIC five times after the restore, with the base's MAC.
        *("-incoming", "defer", "-global", "migration.announce-rounds=0"),
        *_devices(files.rootfs, Path(f"/proc/self/fd/{DISK_FD}") if shape.disk_mib else None, network),
    ]


def key_arguments(platform: Platform, shape: VmShape) -> tuple[str, ...]:
    """Return a base's command line. Names replace the paths that differ from host to host."""
    files = GuestFiles(kernel=Path("kernel"), initramfs=Path("initramfs"), rootfs=Path("rootfs"))
    disk = Path(f"disk of {shape.disk_mib} MiB") if shape.disk_mib else None
    return tuple(base_command(platform, shape, files, Path("memory"), disk=disk)[1:])


def _base_network(shape: VmShape) -> str:
    """Return a base's network, which has outbound access only with `egress`."""
    if shape.egress:
        return _TAP_NETWORK if shape.network.uses_netns else "user,ipv6=off"
    return _socket_network(0)


def boot_arguments(platform: Platform) -> str:
    """Return the kernel's command line.

    `quiet` saves output on the slow serial port, and still shows panics and OOM kills. A panic reboots at once by a
    triple fault, and `-no-reboot` then ends the VMM. Under TCG the command line has the TSC's rate. Without the rate,
    one boot in ten hangs while the kernel calibrates the TSC against the PIT.
    """
    words = ["console=ttyS0", "quiet", "reboot=t", "panic=-1", "mitigations=off", "random.trust_cpu=on"]
    if platform.accelerator is Accelerator.TCG:
        # "reliable" disables the watchdog: on a busy host it takes a late tick for a bad TSC, and keeps to jiffies.
        words += [f"tsc_early_khz={platform.tsc_khz}", "tsc=reliable"]
        # TCG finds translated code by its address. With randomised addresses, a program is translated at each start.
        words.append("norandmaps")
    return " ".join(words)


def _running(platform: Platform, shape: VmShape) -> Iterator[str]:
    tcg = platform.accelerator is Accelerator.TCG
    yield from ("-no-user-config", "-nodefaults", "-display", "none", "-no-reboot", "-sandbox", _SANDBOX)
    yield from ("-machine", "microvm,acpi=on,memory-backend=mem")
    yield from ("-accel", f"tcg,tb-size={_TRANSLATION_CACHE_MIB}" if tcg else "kvm")
    # Five levels of page tables make emulation slower, and a guest that runs KVM itself cannot nest them.
    yield from ("-cpu", "max,la57=off" if tcg else "host")
    yield from ("-m", f"{shape.mem_mib}M", "-smp", str(shape.cpus))
    yield from ("-chardev", f"socket,id=monitor,fd={MONITOR_FD}", "-qmp", "chardev:monitor")


def _console(fd: int | None) -> Iterator[str]:
    back_end = "file,id=console,path=console.log" if fd is None else f"socket,id=console,fd={fd}"
    yield from ("-chardev", back_end, "-serial", "chardev:console")


def _devices(rootfs: Path | None, disk: Path | None, first_network: str) -> Iterator[str]:
    """Yield the fixed set of devices. There is no hotplug, so a base has every device that a clone may use."""
    yield from ("-device", "virtio-serial-device", "-chardev", f"socket,id=agent,fd={AGENT_FD}")
    yield from ("-device", f"virtserialport,chardev=agent,name={AGENT_PORT}")
    for index, mac in enumerate(BASE_MACS):
        network = first_network if index == 0 else _socket_network(index)
        yield from ("-netdev", f"{network},id=net{index}")
        # The agent announces the guest after a restore, once and with the clone's own address.
        yield from ("-device", f"virtio-net-device,netdev=net{index},mac={mac},guest_announce=off")
    yield from _drive("rootfs", f"driver=file,filename={_quote(rootfs)}" if rootfs else _NOTHING)
    # What the guest flushes stays in the host's page cache. It survives the VMM, and need not survive the host.
    yield from _drive("drive1", f"driver=file,filename={_quote(disk)},cache.no-flush=on" if disk else _NOTHING)
    yield from _drive("drive2", _NOTHING)
    yield from ("-object", "rng-builtin,id=entropy", "-device", "virtio-rng-device,rng=entropy")


def _socket_network(index: int) -> str:
    """Return a network of Ethernet frames on a datagram socket, which has no peer unless a clone is given one.

    A base has no other network: slirp's state would be part of its device state, and every clone would need slirp.
    """
    return f"dgram,local.type=fd,local.str={NIC_FDS[index]}"


_TAP_NETWORK = f"tap,fd={NIC_FDS[0]},vhost=off"
_NOTHING = f"driver=null-co,size={_PLACEHOLDER_BYTES},read-zeroes=on"


def _drive(name: str, source: str) -> Iterator[str]:
    access = ",read-only=on" if name == "rootfs" else ""
    yield from ("-blockdev", f"node-name={name},{source}{access}")
    yield from ("-device", f"virtio-blk-device,drive={name},serial={name}")


def _quote(path: Path) -> str:
    """Return a path as a value in a list of options, where a comma is doubled."""
    return str(path).replace(",", ",,")
