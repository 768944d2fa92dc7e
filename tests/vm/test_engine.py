"""The QEMU engine with a real QEMU and a real kernel. The guest is one C file instead of the agent."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from pytest_fcvm.engine.protocol import (
    Accelerator,
    BootPlan,
    EngineReport,
    GuestFiles,
    RestorePlan,
    SnapshotFiles,
    VmExit,
    VmShape,
)
from pytest_fcvm.engine.qemu.engine import QemuEngine
from pytest_fcvm.engine.qemu.vm import QemuVm
from pytest_fcvm.engine.vm import start_or_discard
from pytest_fcvm.errors import EngineError, HostError
from pytest_fcvm.host.clock import Deadline, wait_until
from pytest_fcvm.host.paths import RunDir
from pytest_fcvm.host.supervisor.supervisor import Supervisor
from pytest_fcvm.kernel.initramfs import build_initramfs
from pytest_fcvm.kernel.sources import STOCK, resolve_kernel

SHAPE = VmShape(mem_mib=128, cpus=1)
# Another QEMU than the one on PATH, to run these tests with other versions.
QEMU = Path(os.environ["FCVM_TEST_QEMU"]) if "FCVM_TEST_QEMU" in os.environ else None
BOOT_S = 60.0
LIFE_S = 20.0
ROOTFS_WORDS = b"first line of the rootfs\n"


@dataclass(frozen=True)
class Bench:
    """A probed engine, and the files that its VMs use."""

    engine: QemuEngine
    report: EngineReport
    guest: GuestFiles
    supervisor: Supervisor
    directory: Path


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    directory = tmp_path_factory.mktemp("engine")
    kernels = tmp_path_factory.getbasetemp().parent / "fcvm-kernels"
    kernels.mkdir(mode=0o700, exist_ok=True)
    given = os.environ.get("FCVM_KERNEL")
    named = Path(given) if given and given != STOCK else given
    kernel = resolve_kernel(option=named, kernels_dir=kernels, progress=print)
    build_initramfs(agent=compile_guest(directory / "init"), kernel=kernel, dest=directory / "initramfs")
    (directory / "rootfs").write_bytes(ROOTFS_WORDS.ljust(4096, b"\0"))
    guest = GuestFiles(kernel=kernel.bzimage, initramfs=directory / "initramfs", rootfs=directory / "rootfs")
    with RunDir() as run, Supervisor.start(run.path) as supervisor:
        engine = QemuEngine(supervisor, directory / "cache", binary=QEMU)
        report = engine.probe(replace(guest, rootfs=None))
        assert report.usable, report.reason
        yield Bench(engine, report, guest, supervisor, directory)


def compile_guest(program: Path) -> Path:
    compiler = [found] if (found := shutil.which("cc")) else [sys.executable, "-m", "ziglang", "cc"]
    source = Path(__file__).with_name("echo_guest.c")
    target = [] if found else ["-target", "x86_64-linux-musl"]
    subprocess.run([*compiler, *target, "-O2", "-static", "-o", program, source], check=True)
    return program


class Talk:
    """A conversation with the guest, line by line."""

    def __init__(self, vm: QemuVm) -> None:
        self.socket = vm.channel()
        self.socket.settimeout(BOOT_S)

    def __call__(self, line: str) -> str:
        self.send(line)
        return self.hear()

    def send(self, line: str) -> None:
        self.socket.sendall(line.encode() + b"\n")

    def hear(self) -> str:
        text = b""
        while not text.endswith(b"\n"):
            data = self.socket.recv(4096)
            assert data, "the channel ended"
            text += data
        return text.decode().strip()


RunningBase = tuple[QemuVm, Talk, SnapshotFiles]


@contextmanager
def living(vm: QemuVm) -> Iterator[Talk]:
    talk = Talk(vm)
    try:
        yield talk
    finally:
        talk.socket.close()
        vm.kill()
        vm.wait(LIFE_S)


@contextmanager
def base(bench: Bench, name: str = "base", shape: VmShape = SHAPE) -> Iterator[RunningBase]:
    files = SnapshotFiles(
        memory=bench.directory / f"{name}.memory",
        state=bench.directory / f"{name}.state",
        rootfs=bench.directory / "rootfs",
    )
    vm = bench.engine.boot(BootPlan(name=name, shape=shape, files=bench.guest, memory=files.memory))
    with living(vm) as talk:
        yield vm, talk, files


@pytest.fixture(scope="module")
def running_base(bench: Bench) -> Iterator[RunningBase]:
    """A base for tests that do not change it."""
    with base(bench, "running") as running:
        yield running


@pytest.fixture(scope="module")
def snapshot(bench: Bench) -> SnapshotFiles:
    """A snapshot of a guest with a network and a value."""
    with base(bench) as (vm, talk, files):
        assert talk("net") == talk("set from the base") == "ok"
        vm.snapshot(files.state)
    return files


@pytest.fixture(scope="module")
def open_snapshot(bench: Bench) -> SnapshotFiles:
    """The same with egress."""
    with base(bench, "egress", replace(SHAPE, egress=True)) as (vm, talk, files):
        assert talk("net") == "ok"
        vm.snapshot(files.state)
    return files


def restore(bench: Bench, files: SnapshotFiles, name: str = "clone") -> QemuVm:
    return start_or_discard(bench.engine.prepare(RestorePlan(name=name, shape=SHAPE, files=files)))


# -- probing


class UnusedSpawner:
    """A spawner for a probe that must not use it."""

    def __getattr__(self, name: str) -> Callable[..., object]:
        raise AssertionError(f"{name} was called")


def test_a_second_probe_uses_the_cached_verdict_and_starts_nothing(bench: Bench) -> None:
    again = QemuEngine(UnusedSpawner(), bench.directory / "cache", binary=QEMU)  # type: ignore[arg-type]
    assert again.probe(replace(bench.guest, rootfs=None)) == bench.report
    assert again.base_arguments(SHAPE) == bench.engine.base_arguments(SHAPE)


def test_kvm_is_used_only_if_a_kernel_has_booted_with_it(bench: Bench) -> None:
    if bench.report.accelerator is Accelerator.KVM:
        assert bench.report.reason == ""
        assert "microcode" in bench.report.identity
    else:
        assert "kvm" in bench.report.reason
        assert "tsc kHz" in bench.report.identity


def test_a_probe_leaves_no_process_and_no_memory_behind(bench: Bench) -> None:
    gone = wait_until(lambda: not any(bench.supervisor.run_dir.glob("smoke*")), Deadline(LIFE_S))
    assert gone, list(bench.supervisor.run_dir.iterdir())


def test_emulation_can_be_asked_for(bench: Bench) -> None:
    engine = QemuEngine(bench.supervisor, bench.directory / "cache", binary=QEMU, accelerator=Accelerator.TCG)
    assert engine.probe(bench.guest).accelerator is Accelerator.TCG


# -- a base


def test_a_base_boots_and_answers_and_has_its_devices(running_base: RunningBase) -> None:
    vm, talk, files = running_base
    assert talk("ping 1") == "pong 1"
    assert talk("file /dev/vda") == ROOTFS_WORDS.decode().strip()
    serials = [talk(f"file /sys/block/{name}/serial") for name in ("vda", "vdb", "vdc")]
    assert serials == ["rootfs", "drive1", "drive2"]
    assert talk("file /sys/block/vda/ro") == "1"
    assert [talk(f"file /sys/class/net/eth{n}/address")[-2:] for n in range(3)] == ["01", "02", "03"]
    assert "fcvm-agent: ready" in vm.console_path.read_text()
    assert vm.vmm_log_path.read_text() == ""
    assert files.memory.stat().st_mode & 0o777 == 0o600
    assert files.memory.stat().st_size == SHAPE.mem_mib << 20


def test_a_missing_kernel_is_reported_with_qemus_message_and_leaves_nothing(bench: Bench) -> None:
    guest = replace(bench.guest, kernel=bench.directory / "no-kernel")
    memory = bench.directory / "unbooted.memory"
    with pytest.raises(EngineError, match=r"QEMU exited with 1: .*no-kernel"):
        bench.engine.boot(BootPlan(name="unbooted", shape=SHAPE, files=guest, memory=memory))
    assert not memory.exists()


def test_an_existing_memory_file_is_not_touched(bench: Bench) -> None:
    memory = bench.directory / "taken.memory"
    memory.write_text("somebody's")
    with pytest.raises(HostError, match="cannot be made: File exists"):
        bench.engine.boot(BootPlan(name="taken", shape=SHAPE, files=bench.guest, memory=memory))
    assert memory.read_text() == "somebody's"


def test_a_snapshot_is_a_small_private_file_and_ends_the_base(bench: Bench) -> None:
    with base(bench, "saved") as (vm, talk, files):
        assert talk("ping 1") == "pong 1"
        vm.snapshot(files.state)
        assert files.state.stat().st_mode & 0o777 == 0o600
        assert 10_000 < files.state.stat().st_size < 300_000
        vm.kill()
        assert vm.wait(LIFE_S) == VmExit(signal=signal.SIGKILL, killed_by_us=True)


def test_a_snapshot_that_cannot_be_written_leaves_the_base_running(bench: Bench, running_base: RunningBase) -> None:
    vm, talk, _ = running_base
    with pytest.raises(HostError, match="cannot be made"):
        vm.snapshot(bench.directory / "no directory" / "state")
    assert talk("ping 1") == "pong 1"


def test_a_paused_base_is_not_snapshotted_because_its_clones_would_be_paused_too(running_base: RunningBase) -> None:
    vm, talk, files = running_base
    vm.pause()
    with pytest.raises(EngineError, match="is paused"):
        vm.snapshot(files.state)
    vm.resume()
    assert talk("ping 1") == "pong 1"
    assert not files.state.exists()


# -- clones


def test_every_clone_starts_from_the_snapshot_and_changes_only_itself(bench: Bench, snapshot: SnapshotFiles) -> None:
    before = hashlib.sha256(snapshot.memory.read_bytes()).digest()
    for n in range(5):
        with living(restore(bench, snapshot)) as talk:
            assert talk("get") == "from the base"
            assert talk(f"set {n}") == "ok"
            assert talk("get") == str(n)
    assert hashlib.sha256(snapshot.memory.read_bytes()).digest() == before


def test_clones_side_by_side_do_not_see_each_other(bench: Bench, snapshot: SnapshotFiles) -> None:
    vms = [restore(bench, snapshot, f"side{n}") for n in range(4)]
    talks = [Talk(vm) for vm in vms]
    for n, talk in enumerate(talks):
        assert talk(f"set {n}") == "ok"
    assert [talk("get") for talk in talks] == ["0", "1", "2", "3"]
    for vm, talk in zip(vms, talks, strict=True):
        talk.socket.close()
        vm.kill()
    assert all(vm.wait(LIFE_S).killed_by_us for vm in vms)


def test_a_restored_clone_runs_and_writes_to_its_console(bench: Bench, snapshot: SnapshotFiles) -> None:
    vm = restore(bench, snapshot)
    with living(vm) as talk:
        assert talk("say a word to the console") == "ok"
        assert vm.console_path.read_text() == "a word to the console\n"


def test_a_closed_channel_can_be_opened_again(bench: Bench, snapshot: SnapshotFiles) -> None:
    vm = restore(bench, snapshot)
    with living(vm) as first:
        assert first("set kept") == "ok"
        first.socket.close()
        again = Talk(vm)
        with again.socket:
            assert again("get") == "kept"


def test_a_paused_clone_is_silent_until_it_is_resumed(bench: Bench, snapshot: SnapshotFiles) -> None:
    vm = restore(bench, snapshot)
    with living(vm) as talk:
        assert talk("ping 0") == "pong 0"
        vm.pause()
        talk.send("ping 1")
        talk.socket.settimeout(0.5)
        with pytest.raises(TimeoutError):
            talk.hear()
        talk.socket.settimeout(LIFE_S)
        vm.resume()
        assert talk.hear() == "pong 1"


def test_a_clone_cannot_be_snapshotted_like_a_base(bench: Bench, snapshot: SnapshotFiles, tmp_path: Path) -> None:
    vm = restore(bench, snapshot)
    with living(vm), pytest.raises(EngineError, match="is a clone"):
        vm.snapshot(tmp_path / "state")


def test_a_killed_clone_leaves_no_process_no_file_and_no_descriptor(bench: Bench, snapshot: SnapshotFiles) -> None:
    with living(restore(bench, snapshot)):
        pass  # makes what is made once and kept
    before = len(list(Path("/proc/self/fd").iterdir()))
    vm = restore(bench, snapshot)
    pid, directory = vm.pid, vm.console_path.parent
    with living(vm) as talk:
        assert talk("ping 1") == "pong 1"
        assert directory.is_dir()
    assert not Path(f"/proc/{pid}").exists()
    descriptors = lambda: len(list(Path("/proc/self/fd").iterdir()))  # noqa: E731  closed by a callback of the end
    assert wait_until(lambda: descriptors() <= before, Deadline(LIFE_S)), descriptors()
    with living(restore(bench, snapshot)) as talk:  # the guard removed the directory before it answered this spawn
        assert talk("ping 1") == "pong 1"
    assert not directory.exists()


# -- egress


def test_a_clone_reaches_the_host_only_with_egress(
    bench: Bench, snapshot: SnapshotFiles, open_snapshot: SnapshotFiles
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def greet() -> None:
            with server.accept()[0] as peer:
                peer.sendall(b"from the host")

        accepted = threading.Thread(target=greet, daemon=True)
        accepted.start()
        with living(restore(bench, snapshot)) as talk:
            assert talk(f"dial 10.0.2.2 {port}").startswith("error")
        plan = RestorePlan(name="egress", shape=replace(SHAPE, egress=True), files=open_snapshot)
        with living(start_or_discard(bench.engine.prepare(plan))) as talk:
            assert talk(f"dial 10.0.2.2 {port}") == "from the host"
        accepted.join(LIFE_S)


# -- the end


def test_a_killed_vm_ends_every_call_at_once_and_calls_back(bench: Bench, snapshot: SnapshotFiles) -> None:
    vm, ends = restore(bench, snapshot), []
    called = threading.Event()
    vm.on_exit(lambda end: (ends.append(end), called.set()))
    with living(vm) as talk:
        assert talk("ping 1") == "pong 1"
        os.kill(vm.pid, signal.SIGKILL)
        assert called.wait(LIFE_S)
        assert talk.socket.recv(1) == b""
        for call in (vm.pause, vm.resume, vm.channel):
            with pytest.raises(EngineError, match="somebody killed QEMU"):
                call()
        assert ends == [VmExit(signal=signal.SIGKILL)]
        vm.on_exit(ends.append)
        assert ends == [VmExit(signal=signal.SIGKILL)] * 2


def test_a_panic_is_reported_with_the_console(bench: Bench, snapshot: SnapshotFiles) -> None:
    vm = restore(bench, snapshot)
    with living(vm) as talk:
        talk.send("panic")
        assert vm.wait(LIFE_S) == VmExit(code=0)
        with pytest.raises(EngineError, match="the guest's kernel panicked: sysrq triggered crash") as caught:
            vm.pause()
        assert "Kernel panic" in caught.value.evidence["console"]


def test_a_power_off_is_distinguished_from_a_panic(bench: Bench, snapshot: SnapshotFiles) -> None:
    vm = restore(bench, snapshot)
    with living(vm) as talk:
        talk.send("poweroff")
        assert vm.wait(LIFE_S) == VmExit(code=0)
        with pytest.raises(EngineError, match="the guest shut down or reset itself"):
            vm.pause()


def test_waiting_for_the_end_of_a_running_vm_has_a_deadline(bench: Bench, snapshot: SnapshotFiles) -> None:
    vm = restore(bench, snapshot)
    with living(vm), pytest.raises(EngineError, match=r"did not end within 0\.05 s"):
        vm.wait(0.05)


def test_a_truncated_state_is_refused_with_qemus_message_and_a_hint(
    bench: Bench, snapshot: SnapshotFiles, tmp_path: Path
) -> None:
    cut = tmp_path / "state"
    cut.write_bytes(snapshot.state.read_bytes()[:20_000])
    vm = restore(bench, replace(snapshot, state=cut), "cut")
    with living(vm):
        vm.wait(LIFE_S)
        error = vm.explain()
    assert re.search(r"QEMU exited with 1: .*load of migration failed", error.message)
    assert "--fcvm-rebuild" in error.hint


@pytest.mark.parametrize("change", [-4096, 4096])
def test_a_memory_file_of_the_wrong_size_is_refused_before_anything_starts(
    bench: Bench, snapshot: SnapshotFiles, tmp_path: Path, change: int
) -> None:
    memory = tmp_path / "memory"
    with memory.open("wb") as file:
        file.truncate((SHAPE.mem_mib << 20) + change)
    with pytest.raises(EngineError, match="bytes and not") as caught:
        restore(bench, replace(snapshot, memory=memory))
    assert "--fcvm-rebuild" in caught.value.hint
    assert memory.stat().st_size == (SHAPE.mem_mib << 20) + change


def test_missing_snapshot_files_are_named(bench: Bench, snapshot: SnapshotFiles, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="gone cannot be read"):
        restore(bench, replace(snapshot, memory=tmp_path / "gone"))


def test_an_engine_that_was_not_probed_refuses_to_start_vms(bench: Bench, snapshot: SnapshotFiles) -> None:
    engine = QemuEngine(bench.supervisor, bench.directory / "cache")
    with pytest.raises(EngineError, match="was not probed"):
        engine.prepare(RestorePlan(name="early", shape=SHAPE, files=snapshot))
