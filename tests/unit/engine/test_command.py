from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from pytest_fcvm.engine.protocol import Accelerator, GuestFiles, SnapshotFiles, VmShape
from pytest_fcvm.engine.qemu.command import Platform, base_command, clone_command, key_arguments
from pytest_fcvm.engine.qemu.version import QemuVersion

TCG = Platform(
    binary=Path("/usr/bin/qemu"), version=QemuVersion(7, 2, 22), accelerator=Accelerator.TCG, tsc_khz=2596144
)
KVM = replace(TCG, accelerator=Accelerator.KVM, tsc_khz=0)
SHAPE = VmShape(mem_mib=256, cpus=2)
FILES = GuestFiles(kernel=Path("/k/vmlinuz"), initramfs=Path("/k/initrd"), rootfs=Path("/s/root.sqfs"))
MEMORY = Path("/s/memory")
SNAPSHOT = SnapshotFiles(memory=MEMORY, state=Path("/s/state"), rootfs=Path("/s/root.sqfs"))


def options(argv: list[str]) -> dict[str, list[str]]:
    """Return what each option was given, in order."""
    found: dict[str, list[str]] = {}
    for option, value in pairwise(argv):
        if option.startswith("-"):
            found.setdefault(option, []).append(value)
    return found


def base(platform: Platform = TCG, shape: VmShape = SHAPE, files: GuestFiles = FILES) -> dict[str, list[str]]:
    return options(base_command(platform, shape, files, MEMORY))


def clone(platform: Platform = TCG, shape: VmShape = SHAPE) -> dict[str, list[str]]:
    return options(clone_command(platform, shape, SNAPSHOT))


GOLDEN_BASE = """
/usr/bin/qemu -no-user-config -nodefaults -display none -no-reboot
-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny
-machine microvm,acpi=on,memory-backend=mem -accel tcg,tb-size=128 -cpu max,la57=off -m 256M -smp 2
-chardev socket,id=monitor,fd=3 -qmp chardev:monitor
-object memory-backend-file,id=mem,size=256M,share=on,mem-path=/s/memory
-chardev file,id=console,path=console.log -serial chardev:console
-kernel /k/vmlinuz -initrd /k/initrd -append
-device virtio-serial-device -chardev socket,id=agent,fd=4 -device virtserialport,chardev=agent,name=fcvm.agent
-netdev dgram,local.type=fd,local.str=7,id=net0
-device virtio-net-device,netdev=net0,mac=52:54:00:fc:00:01,guest_announce=off
-netdev dgram,local.type=fd,local.str=8,id=net1
-device virtio-net-device,netdev=net1,mac=52:54:00:fc:00:02,guest_announce=off
-netdev dgram,local.type=fd,local.str=9,id=net2
-device virtio-net-device,netdev=net2,mac=52:54:00:fc:00:03,guest_announce=off
-blockdev node-name=rootfs,driver=file,filename=/s/root.sqfs,read-only=on
-device virtio-blk-device,drive=rootfs,serial=rootfs
-blockdev node-name=drive1,driver=null-co,size=4096,read-zeroes=on
-device virtio-blk-device,drive=drive1,serial=drive1
-blockdev node-name=drive2,driver=null-co,size=4096,read-zeroes=on
-device virtio-blk-device,drive=drive2,serial=drive2
-object rng-builtin,id=entropy -device virtio-rng-device,rng=entropy
"""


def test_a_bases_command_line_is_the_golden_one() -> None:
    argv = base_command(TCG, SHAPE, FILES, MEMORY)
    boot_arguments = argv.pop(argv.index("-append") + 1)
    assert argv == GOLDEN_BASE.split()
    assert boot_arguments.split() == [
        *("console=ttyS0", "quiet", "reboot=t", "panic=-1", "mitigations=off", "random.trust_cpu=on"),
        "tsc_early_khz=2596144",
        "tsc=reliable",
        "norandmaps",
    ]


@pytest.mark.parametrize("platform", [TCG, KVM, replace(TCG, version=QemuVersion(11, 1, 3))])
@pytest.mark.parametrize("egress", [False, True])
def test_a_clone_has_the_machine_type_and_the_devices_of_its_base_in_the_same_order(
    platform: Platform, egress: bool
) -> None:
    shape = replace(SHAPE, egress=egress)
    of_base, of_clone = base(platform, shape), clone(platform, shape)
    for option in ("-device", "-machine", "-cpu", "-accel", "-m", "-smp", "-blockdev", "-chardev", "-sandbox"):
        assert of_clone[option] == of_base[option], option


def test_a_clone_reads_no_kernel_and_waits_for_its_state() -> None:
    of_clone = clone()
    assert of_clone["-incoming"] == ["defer"]
    assert not {"-kernel", "-initrd", "-append"} & of_clone.keys()


@pytest.mark.parametrize(
    ("version", "access"),
    [
        (QemuVersion(7, 2, 22), "share=off"),
        (QemuVersion(8, 1, 5), "share=off"),
        (QemuVersion(8, 2, 0), "share=off,readonly=on,rom=off"),
        (QemuVersion(10, 0, 13), "share=off,readonly=on,rom=off"),
        (QemuVersion(11, 1, 3), "share=off,readonly=on,rom=off"),
    ],
)
def test_a_clone_maps_its_memory_privately_by_the_options_of_its_version(version: QemuVersion, access: str) -> None:
    memory, _ = clone(replace(TCG, version=version))["-object"]
    assert memory == f"memory-backend-file,id=mem,size=256M,{access},mem-path=/s/memory"


def test_kvm_uses_the_hosts_cpu_and_no_tsc_rate() -> None:
    of_base = base(KVM)
    assert (of_base["-accel"], of_base["-cpu"]) == (["kvm"], ["host"])
    assert "tsc_early_khz" not in of_base["-append"][0]


def test_a_base_has_no_network_unless_it_needs_egress() -> None:
    assert base()["-netdev"][0] == "dgram,local.type=fd,local.str=7,id=net0"
    assert base(shape=replace(SHAPE, egress=True))["-netdev"][0] == "user,ipv6=off,id=net0"


def test_a_clone_reaches_nothing_unless_it_has_egress() -> None:
    assert clone()["-netdev"][0] == "dgram,local.type=fd,local.str=7,id=net0"
    assert clone(shape=replace(SHAPE, egress=True))["-netdev"][0] == "user,ipv6=off,id=net0"


def test_a_smoke_boot_has_the_same_devices_without_a_rootfs() -> None:
    without = base(files=replace(FILES, rootfs=None))
    assert without["-device"] == base()["-device"]
    assert without["-blockdev"][0] == "node-name=rootfs,driver=null-co,size=4096,read-zeroes=on,read-only=on"


def test_a_comma_in_a_path_is_doubled() -> None:
    files = replace(FILES, rootfs=Path("/a,b/root"))
    argv = options(base_command(TCG, SHAPE, files, Path("/c,d/memory")))
    assert argv["-object"][0].endswith("mem-path=/c,,d/memory")
    assert "filename=/a,,b/root," in argv["-blockdev"][0]


def test_the_key_has_the_shape_and_the_tsc_rate_and_no_path_of_this_host() -> None:
    key = key_arguments(TCG, SHAPE)
    assert not any("/" in word and "usr" in word for word in key)
    assert key != key_arguments(TCG, replace(SHAPE, mem_mib=512))
    assert key != key_arguments(TCG, replace(SHAPE, cpus=1))
    assert key != key_arguments(TCG, replace(SHAPE, egress=True))
    assert key != key_arguments(replace(TCG, tsc_khz=1), SHAPE)
    assert key == key_arguments(replace(TCG, binary=Path("/opt/qemu")), SHAPE)
