"""The rewind commands of our own QEMU, which guest_image/vmm/build makes. The guest is echo_guest.c."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_fcvm.engine.launch import Launched, launch
from pytest_fcvm.engine.protocol import Accelerator, BootPlan, GuestFiles, SnapshotFiles, VmShape
from pytest_fcvm.engine.qemu.command import AGENT_FD, MONITOR_FD, NIC_FDS, STATE_FD, Platform, clone_command
from pytest_fcvm.engine.qemu.engine import QemuEngine
from pytest_fcvm.engine.qemu.installation import inspect
from pytest_fcvm.engine.qemu.monitor import CommandRefused, Event, Monitor
from pytest_fcvm.engine.qemu.verify import list_differences
from pytest_fcvm.host.clock import Deadline, wait_until
from pytest_fcvm.host.paths import RunDir
from pytest_fcvm.host.supervisor.supervisor import Supervisor
from pytest_fcvm.kernel.initramfs import build_initramfs
from pytest_fcvm.kernel.sources import STOCK, resolve_kernel

BUILT = Path(__file__).parents[2] / "guest_image/vmm/pytest_fcvm_qemu_x86_64/qemu-system-x86_64"
QEMU = Path(os.environ.get("FCVM_TEST_QEMU", BUILT))
ROUNDS = int(os.environ.get("FCVM_TEST_REWINDS", "30"))
ANSWER_S = 60.0
PAGE = 4096
ARGUMENTS = {"discard-input": ["agent"], "truncate": ["console"]}

pytestmark = pytest.mark.skipif(not QEMU.exists(), reason="guest_image/vmm/build was not run")


class RewindableClone:
    """A clone that waits for `cont`, with its monitor and its channel."""

    def __init__(self, launched: Launched, memory: Path) -> None:
        self.launched, self.memory = launched, memory
        self.monitor = Monitor(launched.sockets[MONITOR_FD])
        self.channel = launched.sockets[AGENT_FD]
        self.channel.settimeout(ANSWER_S)

    def load(self, *, checkpoint: bool = False) -> None:
        """Load the state. With `checkpoint`, ask for one before that."""
        wanted = [{"capability": name, "state": True} for name in ("x-ignore-shared", "events")]
        self.monitor.execute("qmp_capabilities")
        self.monitor.execute("migrate-set-capabilities", {"capabilities": wanted})
        if checkpoint:
            self.monitor.execute("x-fcvm-checkpoint", ARGUMENTS)
        self.monitor.execute("migrate-incoming", {"uri": f"fd:{STATE_FD}"})
        self.monitor.wait_for_event(is_loaded, "load the state", ANSWER_S)

    def __call__(self, line: str) -> str:
        self.channel.sendall(line.encode() + b"\n")
        return self.hear()

    def hear(self) -> str:
        text = b""
        while not text.endswith(b"\n"):
            text += self.channel.recv(4096)
        return text.decode().strip()

    def run(self) -> None:
        self.monitor.execute("cont")

    def rewind(self, **arguments: object) -> dict[str, int]:
        report = self.monitor.execute("x-fcvm-rewind", arguments)
        assert isinstance(report, dict)
        return report

    def differences(self) -> list[str]:
        """Return what differs from the snapshot: pages of RAM, devices."""
        states = self.monitor.execute("x-fcvm-state")
        assert isinstance(states, dict)
        now, then = (base64.b64decode(states[name]) for name in ("state", "checkpoint"))
        return list_differences(self.launched.child.pid, self.memory, now, then)


def is_loaded(event: Event) -> bool:
    return event.name == "MIGRATION" and event.data.get("status") == "completed"


Cloning = Callable[..., RewindableClone]


@contextmanager
def cloning(directory: Path, cpus: int) -> Iterator[Cloning]:
    """Make a snapshot of a guest that has called a function of its own making. Yield what clones it."""
    kernels = directory / "kernels"
    kernels.mkdir(mode=0o700)
    given = os.environ.get("FCVM_KERNEL")
    named = Path(given) if given and given != STOCK else given
    kernel = resolve_kernel(option=named, kernels_dir=kernels, progress=print)
    compile_guest(directory / "init")
    build_initramfs(agent=directory / "init", kernel=kernel, dest=directory / "initramfs")
    (directory / "rootfs").write_bytes(b"\0" * PAGE)
    guest = GuestFiles(kernel=kernel.bzimage, initramfs=directory / "initramfs", rootfs=directory / "rootfs")
    files = SnapshotFiles(memory=directory / "memory", state=directory / "state", rootfs=directory / "rootfs")
    shape = VmShape(mem_mib=128, cpus=cpus)
    with RunDir() as run, Supervisor.start(run.path) as supervisor:
        engine = QemuEngine(supervisor, directory / "cache", binary=QEMU, accelerator=Accelerator.TCG)
        report = engine.probe(replace(guest, rootfs=None))
        assert report.usable, report.reason
        save_base(engine, BootPlan(name="base", shape=shape, files=guest, memory=files.memory), files.state)
        version = inspect(QEMU, directory / "record").version
        platform = Platform(binary=QEMU, version=version, accelerator=Accelerator.TCG)
        clones = []

        def clone(*, checkpoint: bool = False) -> RewindableClone:
            with files.state.open("rb") as state:
                argv = [*clone_command(platform, shape, files), "-S"]
                passed = {STATE_FD: state.fileno()}
                sockets = (MONITOR_FD, AGENT_FD)
                started = launch(supervisor, "clone", argv, sockets=sockets, unconnected=NIC_FDS, files=passed)
            clones.append(RewindableClone(started, files.memory))
            clones[-1].load(checkpoint=checkpoint)
            return clones[-1]

        yield clone
        for made in clones:
            made.launched.discard()


def compile_guest(program: Path) -> None:
    compiler = [found] if (found := shutil.which("cc")) else [sys.executable, "-m", "ziglang", "cc"]
    target = [] if found else ["-target", "x86_64-linux-musl"]
    source = Path(__file__).with_name("echo_guest.c")
    subprocess.run([*compiler, *target, "-O2", "-static", "-o", program, source], check=True)


def save_base(engine: QemuEngine, plan: BootPlan, state: Path) -> None:
    vm = engine.boot(plan)
    channel = vm.channel()
    channel.settimeout(ANSWER_S)
    for line in ("net", "set from the base", "work 2", "code 1"):
        channel.sendall(line.encode() + b"\n")
        assert channel.recv(64) in (b"ok\n", b"1\n")
    vm.snapshot(state)
    channel.close()
    vm.kill()
    vm.wait(ANSWER_S)


@pytest.fixture(scope="module", params=[1, 2], ids=["one CPU", "two CPUs"])
def clone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloning]:
    with cloning(tmp_path_factory.mktemp("rewind"), request.param) as made:
        yield made


@pytest.fixture
def ready(clone: Cloning) -> RewindableClone:
    """A clone with a checkpoint, which does not run yet."""
    made = clone()
    made.monitor.execute("x-fcvm-checkpoint", ARGUMENTS)
    return made


def test_a_rewound_guest_is_as_in_its_snapshot_byte_for_byte(ready: RewindableClone) -> None:
    assert ready.differences() == []
    for number in range(ROUNDS):
        ready.run()
        assert ready("get") == "from the base"
        assert ready("call") == "1"
        assert ready(f"set {number}") == ready("work 2") == "ok"
        assert ready(f"code {number + 2}") == str(number + 2)
        report = ready.rewind()
        assert report["pages"] > 2 << 20 >> 12
        assert ready.differences() == []


def test_a_checkpoint_waits_for_a_state_that_is_still_to_be_loaded(clone: Cloning) -> None:
    made = clone(checkpoint=True)
    with pytest.raises(CommandRefused, match="there is no checkpoint"):
        made.rewind()
    made.run()
    with pytest.raises(CommandRefused, match="there is a checkpoint already"):
        made.monitor.execute("x-fcvm-checkpoint")
    for number in range(3):
        assert made(f"set {number}") == made("work 2") == "ok"
        made.rewind()
        assert made.differences() == []
        made.run()
        assert made("get") == "from the base"
        assert 100 <= int(made("nap 100")) < 30_000


def test_code_that_the_guest_rewrote_is_translated_again_and_other_code_is_kept(ready: RewindableClone) -> None:
    ready.run()
    assert ready("code 2") == "2"
    first = ready.rewind()
    assert first["blocks"] > 0
    ready.run()
    assert ready("call") == "1"
    assert ready.rewind()["tb-flushes"] == first["tb-flushes"]


def test_a_flush_of_all_translations_can_be_asked_for(ready: RewindableClone) -> None:
    ready.run()
    assert ready("call") == "1"
    before = ready.rewind(**{"flush-translations": True})["tb-flushes"]
    ready.run()
    assert ready("call") == "1"
    assert ready.rewind()["tb-flushes"] > before


def test_time_goes_back_in_a_rewind_and_passes_as_usual_after_it(ready: RewindableClone) -> None:
    ready.run()
    start = int(ready("now"))
    for _ in range(5):
        assert 1000 <= int(ready("nap 1000")) < 30_000  # a busy host lets the guest wait
        ready.rewind()
        ready.run()
    assert int(ready("now")) < start + 5000  # the naps of all lives


def test_the_console_is_empty_and_unread_commands_are_gone_after_a_rewind(ready: RewindableClone) -> None:
    ready.run()
    assert ready("say a word") == "ok"
    assert wait_until(lambda: ready.launched.console.read_text() == "a word\n", Deadline(ANSWER_S))
    ready.monitor.execute("stop")
    ready.channel.sendall(b"set by an unread command\n" * 2000)
    ready.rewind()
    assert ready.launched.console.read_text() == ""
    ready.run()
    assert ready("get") == "from the base"
    assert ready("say more") == "ok"
    assert wait_until(lambda: ready.launched.console.read_text() == "more\n", Deadline(ANSWER_S))


def test_output_that_nobody_read_does_not_block_the_channel_after_a_rewind(ready: RewindableClone) -> None:
    ready.run()
    ready.channel.sendall(b"flood\n")
    assert wait_until(lambda: "full" in ready.launched.console.read_text(), Deadline(ANSWER_S))
    ready.rewind()
    while drain(ready):
        continue
    ready.channel.settimeout(ANSWER_S)
    ready.run()
    assert ready("get") == "from the base"
    ready.rewind()
    assert ready.differences() == []


def drain(made: RewindableClone) -> bool:
    """Say whether there was more output."""
    made.channel.settimeout(0)
    try:
        return bool(made.channel.recv(1 << 20))
    except BlockingIOError:
        return False


def test_what_cannot_be_rewound_is_refused_and_goes_on(clone: Cloning) -> None:
    made = clone()
    with pytest.raises(CommandRefused, match="there is no checkpoint"):
        made.rewind()
    made.run()
    assert made("set something") == "ok"
    with pytest.raises(CommandRefused, match="the VM is not paused"):
        made.monitor.execute("x-fcvm-checkpoint")
    made.monitor.execute("stop")
    with pytest.raises(CommandRefused, match="the guest's RAM differs from its file at 0x"):
        made.monitor.execute("x-fcvm-checkpoint")
    made.run()
    assert made("get") == "something"


def test_wrong_arguments_are_refused_and_change_nothing(ready: RewindableClone) -> None:
    with pytest.raises(CommandRefused, match="there is a checkpoint already"):
        ready.monitor.execute("x-fcvm-checkpoint")
    ready.run()
    assert ready("set changed") == "ok"
    with pytest.raises(CommandRefused, match="'truncate' names no chardev-file"):
        ready.rewind(truncate=["agent"])
    with pytest.raises(CommandRefused, match="'discard-input' names no chardev-socket"):
        ready.rewind(**{"discard-input": ["nobody"]})
    with pytest.raises(CommandRefused, match="there is no checkpoint, or the VM is running"):
        ready.monitor.execute("x-fcvm-state")
    assert ready("get") == "changed"
