from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_fcvm.engine.protocol import (
    Accelerator,
    BootPlan,
    GuestFiles,
    RestorePlan,
    SnapshotFiles,
    VmExit,
    VmShape,
)
from pytest_fcvm.engine.qemu.engine import QemuEngine
from pytest_fcvm.engine.qemu.monitor import CommandRefused
from pytest_fcvm.engine.qemu.vm import QemuVm
from pytest_fcvm.engine.vm import start_or_discard
from pytest_fcvm.errors import EngineError, HostError
from pytest_fcvm.host.clock import Deadline, wait_until

SHAPE = VmShape(mem_mib=64, cpus=1)
IGNORE_SHARED = {"capability": "x-ignore-shared", "state": True}
EVENTS = {"capability": "events", "state": True}

MakeEngine = Callable[[str], QemuEngine]


@pytest.fixture
def make_engine(tmp_path: Path, spawner: Any, fake_qemu: Callable[..., Path]) -> MakeEngine:
    def make(version: str) -> QemuEngine:
        engine = QemuEngine(spawner, tmp_path / "cache", binary=fake_qemu(version=version), accelerator=Accelerator.TCG)
        assert engine.probe(GuestFiles(kernel=Path("k"), initramfs=Path("i"), rootfs=None)).usable
        return engine

    return make


@pytest.fixture
def files(tmp_path: Path) -> SnapshotFiles:
    found = SnapshotFiles(memory=tmp_path / "memory", state=tmp_path / "state", rootfs=tmp_path / "rootfs")
    found.state.write_bytes(b"device state")
    found.memory.touch()
    os.truncate(found.memory, 64 << 20)
    return found


def boot_plan(tmp_path: Path) -> BootPlan:
    guest = GuestFiles(kernel=Path("k"), initramfs=Path("i"), rootfs=Path("r"))
    return BootPlan(name="base", shape=SHAPE, files=guest, memory=tmp_path / "new-memory")


@pytest.mark.parametrize("version", ["7.2.22", "8.1.0"])
def test_an_old_qemu_gets_a_clones_state_by_descriptor(
    make_engine: MakeEngine, spawner: Any, files: SnapshotFiles, version: str
) -> None:
    start_or_discard(make_engine(version).prepare(RestorePlan(name="clone", shape=SHAPE, files=files)))
    assert wait_until(lambda: len(spawner.qmp.received) == 3, Deadline(5))
    assert spawner.qmp.received == [
        ("qmp_capabilities", {}),
        ("migrate-set-capabilities", {"capabilities": [IGNORE_SHARED]}),
        ("migrate-incoming", {"uri": "fd:5"}),
    ]
    assert spawner.passed == {5: b"device state"}


@pytest.mark.parametrize("version", ["8.2.0", "10.0.13", "11.1.3"])
def test_a_newer_qemu_opens_a_clones_state_itself(
    make_engine: MakeEngine, spawner: Any, files: SnapshotFiles, version: str
) -> None:
    start_or_discard(make_engine(version).prepare(RestorePlan(name="clone", shape=SHAPE, files=files)))
    assert wait_until(lambda: len(spawner.qmp.received) == 3, Deadline(5))
    assert spawner.qmp.received[-1] == ("migrate-incoming", {"uri": f"file:{files.state}"})
    assert spawner.passed == {}


def end_migration_with(spawner: Any, status: str, **query: object) -> None:
    """Make the fake VM answer `migrate` with the events of a migration that ends with `status`."""

    def migrate(*_: object) -> object:
        for word in ("setup", "active", status):
            spawner.qmp.event("MIGRATION", status=word)
        return {}

    spawner.answers["migrate"] = migrate
    spawner.answers["query-migrate"] = lambda *_: {"status": status, **query}


@pytest.mark.parametrize(
    ("version", "commands"),
    [("7.2.22", [("getfd", {"fdname": "state"}), ("migrate", {"uri": "fd:state"})]), ("11.1.3", [])],
)
def test_a_base_is_saved_by_the_commands_that_its_version_has(
    make_engine: MakeEngine, spawner: Any, tmp_path: Path, version: str, commands: list[object]
) -> None:
    end_migration_with(spawner, "completed")
    vm = make_engine(version).boot(boot_plan(tmp_path))
    vm.snapshot(tmp_path / "saved")
    first, capabilities, *others = spawner.qmp.received
    assert first == ("qmp_capabilities", {})
    assert capabilities == ("migrate-set-capabilities", {"capabilities": [IGNORE_SHARED, EVENTS]})
    assert others == (commands or [("migrate", {"uri": f"file:{tmp_path / 'saved'}"})])
    assert (tmp_path / "saved").stat().st_mode & 0o777 == 0o600
    for fd in spawner.qmp.fds:
        os.close(fd)


def test_a_state_that_qemu_cannot_save_is_reported_with_its_message_and_leaves_no_file(
    make_engine: MakeEngine, spawner: Any, tmp_path: Path
) -> None:
    end_migration_with(spawner, "failed", **{"error-desc": "Unable to write to file: No space left on device"})
    vm = make_engine("10.0.13").boot(boot_plan(tmp_path))
    with pytest.raises(EngineError, match=r"could not save the state of VM base: .*No space left on device"):
        vm.snapshot(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_refused_migration_carries_console_and_log(make_engine: MakeEngine, spawner: Any, tmp_path: Path) -> None:
    def refuse(*_: object) -> object:
        raise LookupError("fd: migration to a file is not supported")

    spawner.answers["migrate"] = refuse
    vm = make_engine("10.0.13").boot(boot_plan(tmp_path))
    vm.console_path.write_text("output of the guest")
    vm.vmm_log_path.write_text("output of QEMU")
    with pytest.raises(CommandRefused, match="migration to a file is not supported") as caught:
        vm.snapshot(tmp_path / "saved")
    assert caught.value.evidence == {"console": "output of the guest", "VMM log": "output of QEMU"}
    assert not (tmp_path / "saved").exists()


def test_a_base_whose_capabilities_are_refused_is_killed_and_leaves_no_memory(
    make_engine: MakeEngine, spawner: Any, tmp_path: Path
) -> None:
    def refuse(*_: object) -> object:
        raise LookupError("no x-ignore-shared")

    spawner.answers["migrate-set-capabilities"] = refuse
    with pytest.raises(CommandRefused, match="no x-ignore-shared"):
        make_engine("10.0.13").boot(boot_plan(tmp_path))
    assert spawner.child.end.signal == 9
    assert not (tmp_path / "new-memory").exists()


def test_a_spawn_that_fails_leaves_no_descriptor_and_no_memory(
    make_engine: MakeEngine, spawner: Any, tmp_path: Path
) -> None:
    engine = make_engine("7.2.22")
    spawner.refusal = HostError("no descriptors left")
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(HostError, match="no descriptors left"):
        engine.boot(boot_plan(tmp_path))
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert not (tmp_path / "new-memory").exists()


def test_a_vm_that_died_by_itself_was_not_killed_by_us(
    make_engine: MakeEngine, spawner: Any, files: SnapshotFiles
) -> None:
    vm = make_engine("7.2.22").prepare(RestorePlan(name="clone", shape=SHAPE, files=files))
    spawner.child.finish(SimpleNamespace(code=1, signal=None))
    vm.kill()
    assert vm.wait(1) == VmExit(code=1)


@pytest.fixture
def rewinding(tmp_path: Path, spawner: Any, fake_qemu: Callable[..., Path]) -> QemuEngine:
    """An engine with the QEMU of guest_image/vmm."""
    program = fake_qemu(package="fcvm")
    engine = QemuEngine(spawner, tmp_path / "cache", binary=program, accelerator=Accelerator.TCG)
    assert engine.probe(GuestFiles(kernel=Path("k"), initramfs=Path("i"), rootfs=None)).usable
    return engine


def test_a_vm_is_put_back_in_its_process_and_goes_on_as_another(
    rewinding: QemuEngine, spawner: Any, files: SnapshotFiles
) -> None:
    vm = start_or_discard(rewinding.prepare(RestorePlan(name="first", shape=SHAPE, files=files)))
    assert vm.can_rewind()
    ends: list[str] = []
    vm.on_exit(lambda _: ends.append("first"))
    vm.halt()
    channel = vm.channel()
    second = vm.rewind("second")
    assert [name for name, _ in spawner.qmp.received[2:]] == [
        "x-fcvm-checkpoint", "migrate-incoming", "stop", "x-fcvm-rewind"
    ]  # fmt: skip
    assert spawner.qmp.received[2][1] == {"discard-input": ["agent"], "truncate": ["console"]}
    second.on_exit(lambda _: ends.append("second"))
    second.start()
    assert wait_until(lambda: spawner.qmp.received[-1] == ("cont", {}), Deadline(5))
    for verb in (vm.pause, vm.resume, vm.halt, vm.channel, lambda: vm.rewind("third")):
        with pytest.raises(EngineError, match="first has ended"):
            verb()
    vm.kill()
    assert vm.wait(0) == VmExit(signal=9, killed_by_us=True)
    assert not vm.can_rewind()
    assert spawner.child.end is None
    channel.close()
    second.kill()
    assert ends == ["second"]


def test_what_the_guest_said_in_its_former_life_is_not_heard(
    rewinding: QemuEngine, spawner: Any, files: SnapshotFiles
) -> None:
    vm = start_or_discard(rewinding.prepare(RestorePlan(name="first", shape=SHAPE, files=files)))
    spawner.agent.sendall(b"of the former life" * 10_000)
    with vm.rewind("second").channel() as channel:
        spawner.agent.sendall(b"now")
        channel.settimeout(5)
        assert channel.recv(100) == b"now"


def test_a_rewind_that_qemu_refuses_is_an_error(rewinding: QemuEngine, spawner: Any, files: SnapshotFiles) -> None:
    def refuse(*_: object) -> object:
        raise LookupError("there is no checkpoint")

    spawner.answers["x-fcvm-rewind"] = refuse
    vm = start_or_discard(rewinding.prepare(RestorePlan(name="first", shape=SHAPE, files=files)))
    with pytest.raises(EngineError, match="no checkpoint"):
        vm.rewind("second")
    vm.kill()
    assert spawner.child.end is not None


def test_a_vm_whose_tests_can_change_more_than_its_guest_is_not_rewound(
    rewinding: QemuEngine, files: SnapshotFiles
) -> None:
    vm = rewinding.prepare(RestorePlan(name="egress", shape=VmShape(mem_mib=64, cpus=1, egress=True), files=files))
    assert not vm.can_rewind()


def test_a_stock_qemu_rewinds_nothing(make_engine: MakeEngine, files: SnapshotFiles) -> None:
    assert not make_engine("7.2.22").prepare(RestorePlan(name="stock", shape=SHAPE, files=files)).can_rewind()


@pytest.fixture
def with_disk(rewinding: QemuEngine, files: SnapshotFiles, tmp_path: Path) -> QemuVm:
    """A clone whose scratch disk has been written to."""
    image = tmp_path / "disk"
    image.write_bytes(b"content" * 1000)
    plan = RestorePlan(name="first", shape=replace(SHAPE, disk_mib=1), files=replace(files, disk=image))
    vm = start_or_discard(rewinding.prepare(plan))
    assert vm.disk
    os.pwrite(vm.disk.descriptor, b"changed", 0)
    return vm


def test_a_rewind_puts_the_disk_back(with_disk: QemuVm) -> None:
    second = with_disk.rewind("second")
    assert second.disk
    assert os.pread(second.disk.descriptor, 7, 0) == b"content"


def test_a_rewind_whose_disk_cannot_be_put_back_leaves_a_vm_to_kill(
    with_disk: QemuVm, spawner: Any, tmp_path: Path
) -> None:
    (tmp_path / "disk").unlink()
    with pytest.raises(HostError, match="disk"):
        with_disk.rewind("second")
    with_disk.kill()
    assert spawner.child.end is not None
