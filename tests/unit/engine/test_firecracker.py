"""The Firecracker engine with a fake program, which speaks Firecracker's API and ends as Firecracker does."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_fcvm.engine.firecracker import api
from pytest_fcvm.engine.firecracker import engine as engine_module
from pytest_fcvm.engine.firecracker.api import Api
from pytest_fcvm.engine.firecracker.engine import FirecrackerEngine
from pytest_fcvm.engine.firecracker.jail import JailDir
from pytest_fcvm.engine.firecracker.metrics import read_latencies
from pytest_fcvm.engine.firecracker.requests import API_SOCKET, boot_calls
from pytest_fcvm.engine.firecracker.version import FirecrackerVersion
from pytest_fcvm.engine.firecracker.vm import FirecrackerVm
from pytest_fcvm.engine.firecracker.vm_dir import VmDir
from pytest_fcvm.engine.protocol import (
    Accelerator,
    BootPlan,
    EngineReport,
    GuestFiles,
    RestorePlan,
    SnapshotFiles,
    VmShape,
)
from pytest_fcvm.engine.vm import start_or_discard
from pytest_fcvm.errors import EngineError, FcvmError, HostError, UsageProblem
from pytest_fcvm.host import own
from pytest_fcvm.host.clock import Deadline, wait_until
from pytest_fcvm.host.paths import RunDir
from pytest_fcvm.host.supervisor.supervisor import Supervisor
from pytest_fcvm.model.specs import NetworkMode, NetworkSpec
from pytest_fcvm.network.netns.client import Namespaces

TESTS = Path(__file__).resolve().parents[2]
FAKE, FAKE_JAILER = TESTS / "fakes" / "firecracker.py", TESTS / "fakes" / "jailer.py"
SHAPE = VmShape(mem_mib=8, cpus=1, network=NetworkMode.RELAY)
ELF = b"\x7fELF and a kernel behind it"
WAIT_S = 20.0
NEWEST = FirecrackerVersion(1, 16, 1)


@pytest.fixture(autouse=True)
def _kvm_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the engine find KVM on every host: the fake program needs none."""
    monkeypatch.setattr(engine_module, "explain_missing_device", lambda: ("", ""))


@pytest.fixture
def supervisor() -> Iterator[Supervisor]:
    with RunDir() as run, Supervisor.start(run.path) as supervisor:
        yield supervisor


class Bench:
    """Engines of any version, `jailed` or not, and the files of their VMs."""

    def __init__(self, directory: Path, supervisor: Supervisor, *, jailed: bool) -> None:
        self.directory, self.supervisor, self.jailed = directory, supervisor, jailed
        self.kernel = directory / "vmlinux"
        self.kernel.write_bytes(ELF)
        for name in ("bzImage", "initramfs", "rootfs"):
            (directory / name).write_bytes(name.encode())
        self.guest = GuestFiles(
            kernel=directory / "bzImage",
            initramfs=directory / "initramfs",
            rootfs=directory / "rootfs",
            vmlinux=lambda: self.kernel,
        )

    def engine(self, version: str = "1.16.1", accelerator: Accelerator | None = None) -> FirecrackerEngine:
        for name, fake in (("firecracker", FAKE), ("jailer", FAKE_JAILER)):
            program = self.directory / name
            command = shlex.join([sys.executable, "-I", "-S", str(fake), version])
            program.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
            program.chmod(0o755)
        return FirecrackerEngine(
            self.supervisor,
            self.directory / "cache",
            binary=self.directory / "firecracker",
            accelerator=accelerator,
            jailed=self.jailed,
        )

    def probe(self, engine: FirecrackerEngine) -> EngineReport:
        return engine.probe(replace(self.guest, rootfs=None))

    def probed(self, version: str = "1.16.1") -> FirecrackerEngine:
        engine = self.engine(version)
        assert self.probe(engine).usable
        return engine

    def boot(self, engine: FirecrackerEngine, stack: ExitStack, disk: Path | None = None) -> FirecrackerVm:
        plan = BootPlan(name="base", shape=SHAPE, files=self.guest, memory=self.directory / "memory", disk=disk)
        return _ending(engine.boot(plan), stack)

    def snapshot(self, engine: FirecrackerEngine, stack: ExitStack, disk: Path | None = None) -> SnapshotFiles:
        base = self.boot(engine, stack, disk)
        files = SnapshotFiles(
            memory=self.directory / "memory",
            state=self.directory / "state",
            rootfs=self.directory / "rootfs",
            disk=disk,
        )
        base.snapshot(files.state)
        base.kill()
        return files

    def copy(self) -> SnapshotFiles:
        directory = self.directory / "copy"
        directory.mkdir()
        return SnapshotFiles(
            memory=directory / "memory",
            state=directory / "state",
            rootfs=self.directory / "rootfs",
            disk=directory / "disk",
            of_clone=True,
        )

    def restore(self, engine: FirecrackerEngine, files: SnapshotFiles, stack: ExitStack) -> FirecrackerVm:
        return _restore(engine, RestorePlan(name="clone", shape=SHAPE, files=files), stack)


def _restore(engine: FirecrackerEngine, plan: RestorePlan, stack: ExitStack) -> FirecrackerVm:
    return _ending(start_or_discard(engine.prepare(plan)), stack)


def _ending(vm: FirecrackerVm, stack: ExitStack) -> FirecrackerVm:
    """Return the VM, and kill it at the end of the test."""
    stack.callback(lambda: (vm.kill(), vm.wait(WAIT_S)))
    return vm


@pytest.fixture(params=["free", "jailed"])
def bench(request: pytest.FixtureRequest, tmp_path: Path, supervisor: Supervisor) -> Bench:
    return _bench(tmp_path, supervisor, jailed=request.param == "jailed")


def _bench(directory: Path, supervisor: Supervisor, *, jailed: bool) -> Bench:
    if jailed and os.geteuid() != 0:
        pytest.skip("the jailer requires root")
    return Bench(directory, supervisor, jailed=jailed)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def talk(vm: FirecrackerVm, line: str) -> str:
    """Send a line to the guest and return its answer, "" when the guest ended."""
    with vm.channel() as channel:
        channel.settimeout(WAIT_S)
        channel.sendall(line.encode() + b"\n")
        return channel.recv(100).decode().strip()


# -- metrics


def test_firecrackers_own_latencies_are_read(bench: Bench, stack: ExitStack) -> None:
    engine = bench.probed()
    clone = bench.restore(engine, bench.snapshot(engine, stack), stack)
    assert clone.latencies() == {"load_snapshot": 1.25}
    clone.pause()  # by SIGSTOP: Firecracker would not answer
    assert clone.latencies() == {"load_snapshot": 1.25}
    clone.kill()
    clone.wait(WAIT_S)
    assert clone.latencies() in ({"load_snapshot": 1.25}, {})  # its directory is removed at about this time


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"latencies_us": 3}', '{"latencies_us": {"a": "b"}}'])
def test_incomplete_metrics_have_no_latencies(tmp_path: Path, text: str) -> None:
    (tmp_path / "metrics").write_text(text)
    assert read_latencies(tmp_path / "metrics") == {}


# -- network namespaces


def test_vms_run_in_their_namespaces_and_open_their_nics_there(
    bench: Bench, supervisor: Supervisor, stack: ExitStack
) -> None:
    namespaces = Namespaces(supervisor)
    stack.callback(namespaces.close)
    network = NetworkSpec(mode=NetworkMode.ROOTLESS)
    try:
        first, second = (namespaces.open(network, joined=True) for _ in range(2))
    except HostError as error:
        pytest.skip(f"no network namespaces here: {error}")
    stack.callback(first.close)
    stack.callback(second.close)
    engine, shape = bench.probed(), replace(SHAPE, network=NetworkMode.ROOTLESS)
    files = SnapshotFiles(
        memory=bench.directory / "memory", state=bench.directory / "state", rootfs=bench.directory / "rootfs"
    )
    plan = BootPlan(name="base", shape=shape, files=bench.guest, memory=files.memory, namespace=first)
    base = _ending(engine.boot(plan), stack)
    assert _namespace_of(base) == os.fstat(first.net).st_ino
    with pytest.raises(HostError, match="Device or resource busy") as caught:  # the base has the NICs
        engine.boot(replace(plan, name="other"))
    assert caught.value.hint == "two VMs asked for one tap device"
    base.snapshot(files.state)
    base.kill()
    clone = _restore(engine, RestorePlan(name="clone", shape=shape, files=files, namespace=second), stack)
    assert _namespace_of(clone) == os.fstat(second.net).st_ino
    assert talk(clone, "ping 1") == "pong 1"
    assert engine.private_networks(NetworkMode.ROOTLESS) == len(second.packet_sockets) == 2
    assert engine.private_networks(NetworkMode.RELAY) == 0


def _namespace_of(vm: FirecrackerVm) -> int:
    return Path(f"/proc/{vm.pid}/ns/net").stat().st_ino


# -- probing


def test_the_engine_is_usable_where_a_kernel_boots_and_the_verdict_is_cached(bench: Bench) -> None:
    report = bench.probe(bench.engine())
    assert (report.usable, report.accelerator, report.version) == (True, Accelerator.KVM, "1.16.1")
    assert {"digest of firecracker", "version", "cpu", "microcode", "host kernel"} == set(report.identity)
    bench.kernel.write_bytes(b"no kvm")  # a second boot would fail
    assert bench.probe(bench.engine()).usable


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ("1.13.1", "lose vsock connections"),
        ("1.14.3", "lose vsock connections"),
        ("1.15.0", "monotonic time of its clones may jump"),
        ("1.16.0", "vsock may hang"),
    ],
)
def test_a_broken_version_is_refused_with_the_reason(bench: Bench, version: str, reason: str) -> None:
    report = bench.probe(bench.engine(version))
    assert not report.usable
    assert f"Firecracker {version} is not used: " in report.reason
    assert reason in report.reason
    assert "fcvm setup firecracker" in report.hint


@pytest.mark.parametrize("version", ["1.14.4", "1.15.1", "1.16.1", "1.17.0"])
def test_other_versions_are_accepted(bench: Bench, version: str) -> None:
    assert bench.probe(bench.engine(version)).version == version


def test_where_no_kernel_boots_the_report_has_firecrackers_message(bench: Bench) -> None:
    bench.kernel.write_bytes(b"no kvm")
    report = bench.probe(bench.engine())
    assert report.reason.startswith("/dev/kvm cannot boot a kernel: Firecracker refused PUT /actions: ")
    assert "Permission denied" in report.reason
    assert ("leave out --fcvm-jailer" if bench.jailed else "--fcvm-engine qemu") in report.hint


def test_a_failure_before_the_boot_is_not_cached_as_a_fault_of_kvm(bench: Bench) -> None:
    def fail() -> Path:
        raise HostError("lz4 is not installed", hint="apt-get install lz4")

    report = bench.engine().probe(replace(bench.guest, rootfs=None, vmlinux=fail))
    assert (report.reason, report.hint) == ("lz4 is not installed", "apt-get install lz4")
    assert bench.probe(bench.engine()).usable


def test_emulation_is_refused(bench: Bench) -> None:
    report = bench.probe(bench.engine(accelerator=Accelerator.TCG))
    assert (report.usable, report.reason) == (False, "Firecracker does not emulate")


def test_a_program_that_is_not_firecracker_is_reported(bench: Bench, tmp_path: Path) -> None:
    program = tmp_path / "other"
    program.write_text("#!/bin/sh\necho something else 1.2.3\n")
    program.chmod(0o755)
    report = bench.probe(FirecrackerEngine(bench.supervisor, tmp_path / "cache", binary=program))
    assert "does not say that it is Firecracker" in report.reason


def test_without_a_probe_nothing_starts(bench: Bench, stack: ExitStack) -> None:
    with pytest.raises(EngineError, match="was not probed"):
        bench.boot(bench.engine(), stack)


# -- a balloon, and metadata


def test_a_clone_has_the_balloon_and_the_metadata_of_its_plan(bench: Bench, stack: ExitStack) -> None:
    engine, shape = bench.probed(), replace(SHAPE, balloon=True)
    files = SnapshotFiles(
        memory=bench.directory / "memory", state=bench.directory / "state", rootfs=bench.directory / "rootfs"
    )
    base = _ending(engine.boot(BootPlan(name="base", shape=shape, files=bench.guest, memory=files.memory)), stack)
    base.snapshot(files.state)
    base.kill()
    clone = _restore(engine, RestorePlan(name="clone", shape=shape, files=files, metadata={"a": "b"}), stack)
    assert clone.balloon_mib() == 0
    clone.set_balloon(3)
    assert clone.balloon_mib() == 3
    with Api(clone.console_path.with_name(API_SOCKET), NEWEST) as client:
        assert client.send(api.MMDS_READ) == {"a": "b"}
        clone.set_metadata({"c": "d"})
        assert client.send(api.MMDS_READ) == {"c": "d"}
    assert engine.base_arguments(shape) != engine.base_arguments(SHAPE)


def test_metadata_needs_a_nic_which_the_network_relay_lacks(bench: Bench) -> None:
    engine = bench.engine()
    engine.check(replace(SHAPE, metadata=True, network=NetworkMode.ROOTLESS, balloon=True))
    with pytest.raises(UsageProblem, match=r"metadata needs a NIC, and a VM .* has none on the network relay"):
        engine.check(replace(SHAPE, metadata=True))


def test_the_guests_first_nic_serves_metadata_from_the_boot_on() -> None:
    shape = replace(SHAPE, metadata=True, network=NetworkMode.ROOTLESS)
    calls = [(str(call), body) for call, body in boot_calls(shape, {"a": "b"})]
    names = [name for name, _ in calls]
    assert names.index("PUT /network-interfaces/eth0") < names.index("PUT /mmds/config") < names.index("PUT /actions")
    assert dict(calls)["PUT /mmds/config"]["network_interfaces"] == ["eth0"]
    assert dict(calls)["PUT /mmds"] == {"a": "b"}


# -- the jailer


@pytest.fixture
def jailed(tmp_path: Path, supervisor: Supervisor) -> Bench:
    return _bench(tmp_path, supervisor, jailed=True)


def test_each_jailed_vm_has_its_own_user_which_does_not_own_the_input_files(jailed: Bench, stack: ExitStack) -> None:
    engine = jailed.probed()
    files = jailed.snapshot(engine, stack)
    first, second = (jailed.restore(engine, files, stack) for _ in range(2))
    owners = {vm.console_path.parent.stat().st_uid for vm in (first, second)}
    assert len(owners) == 2
    assert all(user >= 1 << 30 for user in owners)
    for path in (files.memory, files.state):
        found = path.stat()
        assert (found.st_uid, stat.S_IMODE(found.st_mode)) == (os.geteuid(), 0o640)
        assert found.st_gid == first.console_path.parent.stat().st_gid
    mounted = {line.split()[4] for line in Path(f"/proc/{first.pid}/mountinfo").read_text().splitlines()}
    assert {Path(path).name for path in mounted} >= {"root", "memory", "state", "rootfs", "drive1", "drive2"}
    assert str(first.console_path.parent) not in Path("/proc/self/mountinfo").read_text()


def test_the_output_of_a_jailed_base_is_moved_to_another_file_system(jailed: Bench, stack: ExitStack) -> None:
    if Path("/dev/shm").stat().st_dev == jailed.supervisor.make_dir("x").stat().st_dev:
        pytest.skip("run directories are on the file system of /dev/shm")
    engine = jailed.probed()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        memory, state = Path(directory) / "memory", Path(directory) / "state"
        base = _ending(engine.boot(BootPlan(name="base", shape=SHAPE, files=jailed.guest, memory=memory)), stack)
        base.snapshot(state)
        assert {path.name for path in Path(directory).iterdir()} == {"memory", "state"}
        assert (memory.stat().st_size, memory.stat().st_blocks) == (SHAPE.mem_mib << 20, 0)
        files = SnapshotFiles(memory=memory, state=state, rootfs=jailed.directory / "rootfs")
        assert talk(jailed.restore(engine, files, stack), "ping 1") == "pong 1"


def test_links_that_a_jailed_firecracker_puts_into_its_jail_are_not_followed(jailed: Bench, stack: ExitStack) -> None:
    engine = jailed.probed()
    clone = jailed.restore(engine, jailed.snapshot(engine, stack), stack)
    secret, jail_dir = jailed.directory / "secret", clone.console_path.parent
    secret.write_text('{"latencies_us": {"secret": 1000}}')
    for name in ("console.log", "metrics.json"):
        (jail_dir / name).unlink(missing_ok=True)
        (jail_dir / name).symlink_to(secret)
    clone.pause()  # so that no metrics are flushed
    assert clone.latencies() == {}
    clone.resume()
    os.kill(clone.pid, signal.SIGKILL)
    clone.wait(WAIT_S)
    assert clone.explain().evidence["console"] == ""
    assert jail_dir.parent.stat().st_uid == os.geteuid() != jail_dir.stat().st_uid
    assert clone.vmm_log_path.parent == jail_dir.parent


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("exit 3", "failed with exit code 3"),
        ("echo Jailer v1.14.4", "is not the jailer of Firecracker 1.16.1: 'Jailer v1.14.4'"),
    ],
)
def test_a_jailer_of_another_version_is_reported(jailed: Bench, command: str, words: str) -> None:
    engine = jailed.engine()
    (jailed.directory / "jailer").write_text(f"#!/bin/sh\n{command}\n")
    report = jailed.probe(engine)
    assert not report.usable
    assert words in report.reason


def test_without_a_jailer_the_hint_says_how_to_install_one(jailed: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = jailed.engine()
    (jailed.directory / "jailer").unlink()
    monkeypatch.setattr("pytest_fcvm.engine.firecracker.jail.find_tool", lambda _: None)
    report = jailed.probe(engine)
    assert "there is no jailer beside" in report.reason
    assert "fcvm setup firecracker" in report.hint


def test_a_user_other_than_root_cannot_use_the_jailer(jailed: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own.os, "geteuid", lambda: 1000)
    report = jailed.probe(jailed.engine())
    assert report.reason == "the jailer requires root"
    assert report.hint == "run pytest as root, or leave out --fcvm-jailer"


def test_a_jail_that_cannot_be_made_is_reported_with_the_jailers_message(jailed: Bench, stack: ExitStack) -> None:
    engine = jailed.probed()
    (jailed.directory / "jailer").write_text(
        "#!/bin/sh\necho 'Failed to exec into Firecracker: No such file or directory (os error 2)' >&2\n"
        "echo 'Error: Exec(Os { code: 2, kind: NotFound })' >&2\nexit 1\n"
    )
    with pytest.raises(EngineError, match="VM base was not jailed: Failed to exec into Firecracker: No such") as caught:
        jailed.boot(engine, stack)
    assert "linked statically" in caught.value.hint


def test_a_jail_that_cannot_be_made_is_no_fault_of_kvm(jailed: Bench) -> None:
    engine = jailed.engine()
    script = jailed.directory / "jailer"
    works = script.read_text()
    script.write_text(
        f"{works.splitlines()[0]}\n[ $1 = --version ] && exec {works.split('exec ')[1]}"
        "echo 'Failed to create /dev/kvm via mknod inside the jail: Operation not permitted' >&2\n"
        "echo 'Error: MknodDev(Os)' >&2\nexit 1\n"
    )
    report = jailed.probe(engine)
    assert report.reason == (
        "VM smoke was not jailed: Failed to create /dev/kvm via mknod inside the jail: Operation not permitted"
    )
    assert "CAP_MKNOD" in report.hint
    script.write_text(works)
    assert jailed.probe(engine).usable


# -- running VMs


def test_a_base_answers_and_its_snapshot_is_private_and_full_of_holes(bench: Bench, stack: ExitStack) -> None:
    base = bench.boot(bench.probed(), stack)
    assert talk(base, "ping 1") == "pong 1"
    assert "Linux version" in base.console_path.read_text()
    base.snapshot(bench.directory / "state")
    for name in ("state", "memory"):
        assert stat.S_IMODE((bench.directory / name).stat().st_mode) == 0o600
    memory = (bench.directory / "memory").stat()
    assert (memory.st_size, memory.st_blocks) == (SHAPE.mem_mib << 20, 0)


def test_clones_answer_each_in_a_directory_of_its_own(bench: Bench, stack: ExitStack) -> None:
    engine = bench.probed()
    files = bench.snapshot(engine, stack)
    clones = [bench.restore(engine, files, stack) for _ in range(3)]
    assert [talk(clone, f"ping {number}") for number, clone in enumerate(clones)] == ["pong 0", "pong 1", "pong 2"]
    directories = {clone.console_path.parent for clone in clones}
    assert len(directories) == 3
    assert all(stat.S_IMODE(directory.stat().st_mode) == 0o700 for directory in directories)
    assert [clone.console_path.read_text() for clone in clones] == ["", "", ""]


def test_a_prepared_clone_runs_when_it_is_started(bench: Bench, stack: ExitStack) -> None:
    engine = bench.probed()
    files = bench.snapshot(engine, stack)
    clone = _ending(engine.prepare(RestorePlan(name="standby", shape=SHAPE, files=files)), stack)
    clone.start()
    clone.start()
    assert talk(clone, "ping 1") == "pong 1"


def test_a_prepared_clone_can_be_configured_before_its_start(bench: Bench, stack: ExitStack) -> None:
    engine = bench.probed()
    files = bench.snapshot(engine, stack)
    clone = _ending(engine.prepare(RestorePlan(name="standby", shape=SHAPE, files=files)), stack)
    assert not clone.console_path.exists()
    clone.preconfigure()
    assert clone.console_path.exists()
    clone.start()
    clone.preconfigure()
    assert talk(clone, "ping 1") == "pong 1"


@pytest.mark.parametrize("version", ["1.16.1", "1.16.2"])
def test_a_clone_answers_after_pause_and_resume(bench: Bench, stack: ExitStack, version: str) -> None:
    engine = bench.probed(version)
    clone = bench.restore(engine, bench.snapshot(engine, stack), stack)
    clone.pause()
    if version == "1.16.1":  # whose vsock hangs after a bare pause and resume
        state = lambda: Path(f"/proc/{clone.pid}/stat").read_text().rsplit(") ")[1][0]  # noqa: E731
        assert wait_until(lambda: state() == "T", Deadline(WAIT_S))
    clone.resume()
    assert talk(clone, "ping 1") == "pong 1"


def test_a_killed_clone_leaves_nothing(bench: Bench, stack: ExitStack) -> None:
    engine = bench.probed()
    clone = bench.restore(engine, bench.snapshot(engine, stack), stack)
    clone.pause()
    clone.kill()
    assert clone.wait(WAIT_S).killed_by_us
    directory = clone.console_path.parent
    assert wait_until(lambda: not directory.exists(), Deadline(WAIT_S))
    assert not Path(f"/proc/{clone.pid}").exists()


def test_each_clone_has_a_private_disk(bench: Bench, stack: ExitStack) -> None:
    disk = bench.directory / "disk"
    disk.write_bytes(b"as in the snapshot".ljust(4096, b"\0"))
    engine = bench.probed()
    clone = bench.restore(engine, bench.snapshot(engine, stack, disk), stack)
    assert clone.disk is not None
    os.pwrite(clone.disk.descriptor, b"other", 0)
    assert disk.read_bytes().startswith(b"as in the snapshot")
    drive = clone.console_path.parent / "drive1"
    if bench.jailed:
        assert drive.read_bytes().startswith(b"other")
    else:
        assert str(drive.readlink()) == "/proc/self/fd/3"
        assert Path(f"/proc/{clone.pid}/fd/3").read_bytes().startswith(b"other")


@pytest.mark.parametrize("version", ["1.16.1", "1.16.2"])
def test_a_running_clone_is_copied_and_runs_on(bench: Bench, stack: ExitStack, version: str) -> None:
    disk = bench.directory / "disk"
    disk.write_bytes(b"as in the snapshot".ljust(4096, b"\0"))
    engine = bench.probed(version)
    clone = bench.restore(engine, bench.snapshot(engine, stack, disk), stack)
    assert clone.disk is not None
    os.pwrite(clone.disk.descriptor, b"changed", 0)
    copy = bench.copy()
    clone.save(copy)
    assert talk(clone, "ping 1") == "pong 1"
    assert copy.disk is not None
    assert copy.disk.read_bytes().startswith(b"changed")
    for path in (copy.memory, copy.state, copy.disk):
        assert path.stat().st_mode & 0o777 == 0o600
    fork = _restore(engine, RestorePlan(name="fork", shape=SHAPE, files=copy), stack)
    assert talk(fork, "ping 2") == "pong 2"


@pytest.mark.parametrize("has_swap", [False, True])
def test_a_copy_starts_from_the_clones_origin_unless_pages_may_be_on_swap(
    bench: Bench, stack: ExitStack, monkeypatch: pytest.MonkeyPatch, has_swap: bool
) -> None:
    engine = bench.probed()
    files = bench.snapshot(engine, stack)
    with files.memory.open("r+b") as memory:
        memory.write(b"the base's")
    clone = bench.restore(engine, files, stack)
    monkeypatch.setattr("pytest_fcvm.engine.firecracker.vm._has_swap", lambda: has_swap)
    copy = bench.copy()
    clone.save(copy)
    assert copy.memory.read_bytes().startswith(b"\0" if has_swap else b"the base's")  # the fake changes no page
    assert copy.memory.stat().st_size == files.memory.stat().st_size
    base = bench.boot(engine, stack)
    with pytest.raises(EngineError, match="is a base"):
        base.save(copy)


def test_a_copy_without_room_leaves_no_file_and_the_clone_answers(
    bench: Bench, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = bench.probed()
    clone = bench.restore(engine, bench.snapshot(engine, stack), stack)
    copy = bench.copy()
    monkeypatch.setattr(own.os, "statvfs", lambda _: os.statvfs_result((4096, 4096, 9, 9, 9, 0, 0, 0, 0, 255)))
    with pytest.raises(HostError, match="no room in"):
        clone.save(copy)
    assert not list(copy.memory.parent.iterdir())
    assert talk(clone, "ping 1") == "pong 1"


def test_a_copy_that_cannot_be_collected_leaves_no_file(
    bench: Bench, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = bench.directory / "disk"
    disk.write_bytes(b"\0" * 4096)
    engine = bench.probed()
    clone = bench.restore(engine, bench.snapshot(engine, stack, disk), stack)

    def refuse(*_: object) -> None:
        raise HostError("no room")

    monkeypatch.setattr(JailDir if bench.jailed else VmDir, "collect", refuse)
    copy = bench.copy()
    with pytest.raises(HostError, match="no room"):
        clone.save(copy)
    assert not list(copy.memory.parent.iterdir())
    assert talk(clone, "ping 1") == "pong 1"


# -- refusals


def test_a_clone_and_a_paused_base_cannot_be_snapshotted_as_a_base(bench: Bench, stack: ExitStack) -> None:
    engine = bench.probed()
    clone = bench.restore(engine, bench.snapshot(engine, stack), stack)
    with pytest.raises(EngineError, match="is a clone"):
        clone.snapshot(bench.directory / "other")
    base = bench.boot(engine, stack)
    base.pause()
    with pytest.raises(EngineError, match="is paused"):
        base.snapshot(bench.directory / "other")


def test_a_snapshot_that_cannot_be_written_leaves_no_file_and_a_running_base(bench: Bench, stack: ExitStack) -> None:
    base = bench.boot(bench.probed(), stack)
    words = "state cannot be made" if bench.jailed else "Cannot perform open on the snapshot backing file"
    with pytest.raises(FcvmError, match=words):
        base.snapshot(bench.directory / "gone" / "state")
    assert not (bench.directory / "memory").exists()
    base.kill()


def _shorten(files: SnapshotFiles) -> None:
    os.truncate(files.memory, 4096)


def _lengthen(files: SnapshotFiles) -> None:
    os.truncate(files.memory, (SHAPE.mem_mib << 20) + 4096)


def _damage(files: SnapshotFiles) -> None:
    files.state.write_bytes(b"\0\0")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_shorten, "has 4096 bytes and not 8388608"),
        (_lengthen, "has 8392704 bytes and not 8388608"),
        (_damage, "bitcode error"),
        (lambda files: files.state.unlink(), "Failed to open snapshot file: No such|state cannot be read: No such"),
        (lambda files: files.memory.unlink(), "cannot be read: No such file or directory"),
        (lambda files: files.rootfs.unlink(), "the backing file: No such|rootfs cannot be read: No such"),
    ],
)
def test_a_damaged_snapshot_is_refused_and_the_hint_is_to_rebuild_it(
    bench: Bench, stack: ExitStack, change: Callable[[SnapshotFiles], None], words: str
) -> None:
    engine = bench.probed()
    files = bench.snapshot(engine, stack)
    change(files)
    with pytest.raises(EngineError, match=words) as caught:
        bench.restore(engine, files, stack)
    assert caught.value.hint == "build the snapshot again: --fcvm-rebuild"


@pytest.mark.parametrize(("size", "words"), [(100, "Invalid Elf magic number"), (6, "Unable to read elf header")])
def test_for_a_file_that_is_no_kernel_the_hint_names_the_option(
    bench: Bench, stack: ExitStack, size: int, words: str
) -> None:
    engine = bench.probed()
    bench.kernel.write_bytes(b"?" * size)
    with pytest.raises(HostError, match=words) as caught:
        bench.boot(engine, stack)
    assert "--fcvm-kernel" in caught.value.hint


# -- ends


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("panic", "kernel panic"),
        ("reboot", "shut down or reset itself"),
        ("exit 149", "SIGBUS"),
        ("exit 1", "Firecracker exited with 1"),
    ],
)
def test_each_way_to_end_has_its_message(bench: Bench, stack: ExitStack, words: str, message: str) -> None:
    base = bench.boot(bench.probed(), stack)
    ends: list[object] = []
    base.on_exit(ends.append)
    with pytest.raises((ConnectionError, AssertionError)):
        assert talk(base, words)
    assert wait_until(lambda: ends, Deadline(WAIT_S))
    error = base.explain()
    assert isinstance(error, FcvmError)
    assert message in error.message
    with pytest.raises(type(error)):
        base.channel()


def test_a_vmm_that_somebody_kills_ends_a_waiting_call_at_once(bench: Bench, stack: ExitStack) -> None:
    base = bench.boot(bench.probed(), stack)
    os.kill(base.pid, signal.SIGKILL)
    base.wait(WAIT_S)
    with pytest.raises(EngineError, match="SIGKILL"):
        base.channel()


def test_a_dead_vm_cannot_be_paused(bench: Bench, stack: ExitStack) -> None:
    engine = bench.probed("1.16.2")
    clone = bench.restore(engine, bench.snapshot(engine, stack), stack)
    os.kill(clone.pid, signal.SIGKILL)
    clone.wait(WAIT_S)
    with pytest.raises(EngineError, match="SIGKILL"):
        clone.pause()


def test_the_channel_is_a_stream_socket_of_the_callers(bench: Bench, stack: ExitStack) -> None:
    base = bench.boot(bench.probed(), stack)
    with base.channel() as first, base.channel() as second:
        assert first.family == second.family == socket.AF_UNIX
        for channel in (second, first):
            channel.sendall(b"ping 1\n")
            assert channel.recv(100) == b"pong 1\n"
