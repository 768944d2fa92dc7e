"""The fake Firecracker of the unit tests beside a real one: the same requests get the same answers."""

from __future__ import annotations

import os
import re
import shlex
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from pytest_fcvm.host.clock import Deadline, wait_until
from pytest_fcvm.kernel.sources import resolve_kernel
from pytest_fcvm.kernel.vmlinux import extract_vmlinux

FAKE, FAKE_JAILER = (Path(__file__).resolve().parents[1] / "fakes" / name for name in ("firecracker.py", "jailer.py"))
WAIT_S = 60.0

Step = tuple[str, str, Any]

KERNEL = ("PUT", "/boot-source", {"kernel_image_path": "kernel", "boot_args": "console=ttyS0 quiet reboot=k panic=-1"})
MACHINE = ("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 128})
START = ("PUT", "/actions", {"action_type": "InstanceStart"})
CREATE = ("PUT", "/snapshot/create", {"snapshot_type": "Full", "snapshot_path": "state", "mem_file_path": "memory"})
SERIAL = ("PUT", "/serial", {"serial_out_path": "console.log"})
BALLOON = {"amount_mib": 0, "deflate_on_oom": False, "stats_polling_interval_s": 3600}
DRIVE = {"drive_id": "d", "path_on_host": "drive", "is_root_device": False, "is_read_only": True}


def _load(state: str = "state", memory: str = "memory") -> Step:
    backend = {"backend_type": "File", "backend_path": memory}
    return ("PUT", "/snapshot/load", {"snapshot_path": state, "mem_backend": backend, "resume_vm": True})


def _card(name: str) -> Step:
    return ("PUT", "/network-interfaces/eth0", {"iface_id": "eth0", "host_dev_name": name})


class Program:
    """A running Firecracker, real or not."""

    def __init__(self, command: Sequence[str | Path], directory: Path, *arguments: str) -> None:
        self.directory = directory
        self._words = (directory / "words").open("wb")
        self.process = subprocess.Popen(
            [*command, "--id", "same", *(arguments or ("--api-sock", "api.sock"))],
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=self._words,
            stderr=self._words,
        )
        self._client = httpx.Client(
            transport=httpx.HTTPTransport(uds=str(directory / "api.sock")), base_url="http://localhost", timeout=WAIT_S
        )

    def wait_for_api(self) -> None:
        assert wait_until(self._listens, Deadline(WAIT_S)), self.words

    def ask(self, step: Step) -> tuple[int, object]:
        method, path, body = step
        answer = self._client.request(method, path, json=body) if body is not None else self._client.get(path)
        return answer.status_code, answer.json() if answer.content else None

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX) as client:
            return client.connect_ex(str(self.directory / "api.sock")) == 0

    @property
    def words(self) -> str:
        return (self.directory / "words").read_text()

    def close(self) -> None:
        self._client.close()
        self.process.kill()
        self.process.wait()
        self._words.close()


class Pair:
    """The real one and the fake, each in a directory with the same files."""

    def __init__(self, real: Path, directory: Path) -> None:
        said = subprocess.run([real, "--version"], capture_output=True, text=True, check=True).stdout
        self.version = re.search(r"v([\d.]+)", said)[1]  # type: ignore[index]
        self._commands = {"real": [real], "fake": [sys.executable, "-I", "-S", FAKE, self.version]}
        self.directories = {name: directory / name for name in self._commands}
        for place in self.directories.values():
            place.mkdir()
            (place / "drive").write_bytes(b"\0" * 4096)
            (place / "text").write_bytes(b"no kernel and no state of devices")
            (place / "empty").touch()
        self.programs: list[Program] = []

    def start(self, *arguments: str) -> list[Program]:
        """Start both, after the earlier ones have ended."""
        self.close()
        for place in self.directories.values():
            for name in ("api.sock", "agent.sock"):
                (place / name).unlink(missing_ok=True)
        self.programs = [
            Program(command, self.directories[name], *arguments) for name, command in self._commands.items()
        ]
        return self.programs

    def ask(self, *steps: Step) -> list[tuple[int, object]]:
        """Send requests to both, check that the answers are the same, and return them."""
        for program in self.start():
            program.wait_for_api()
        real, fake = ([program.ask(step) for step in steps] for program in self.programs)
        assert fake == real
        return real

    def close(self) -> None:
        for program in self.programs:
            program.close()


@pytest.fixture
def pair(firecracker: Path, tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(firecracker, tmp_path)
    yield pair
    pair.close()


@pytest.fixture(scope="session")
def vmlinux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("kernel", numbered=False)
    directory.chmod(0o700)
    kernel = resolve_kernel(option=None, kernels_dir=directory, progress=print)
    extract_vmlinux(kernel.bzimage, directory / "vmlinux")
    return directory / "vmlinux"


@pytest.fixture
def bootable(pair: Pair, vmlinux: Path) -> Pair:
    """The pair with a kernel, on a host where it boots."""
    for place in pair.directories.values():
        (place / "kernel").symlink_to(vmlinux)
    pair.ask(SERIAL, MACHINE, KERNEL, START)
    console = pair.directories["real"] / "console.log"
    wait_until(lambda: pair.programs[0].process.poll() is not None or "panic" in console.read_text(), Deadline(WAIT_S))
    if "panic" not in console.read_text():  # because the kernel has no root file system
        pytest.skip(f"KVM does not boot a kernel here: {console.read_text()[-200:]!r}")
    return pair


def test_it_reports_its_version_and_state(pair: Pair) -> None:
    assert pair.ask(("GET", "/version", None)) == [(200, {"firecracker_version": pair.version})]
    pair.ask(("GET", "/", None))


@pytest.mark.parametrize(
    "steps",
    [
        [("GET", "/nope", None)],
        [("PUT", "/version", {})],
        [("PUT", "/boot-source", {"kernel_image_path": "gone"})],
        [("PUT", "/machine-config", {"vcpu_count": 0, "mem_size_mib": 128})],
        [("PUT", "/machine-config", {"vcpu_count": 33, "mem_size_mib": 128})],
        [("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 0})],
        [("PUT", "/drives/d", {**DRIVE, "path_on_host": "gone"})],
        [("PUT", "/drives/d", DRIVE), _load()],
        [("PATCH", "/vm", {"state": "Paused"})],
        [CREATE],
        [START],
        [("PUT", "/snapshot/load", {"foo": 1})],
        [MACHINE, SERIAL, ("PUT", "/drives/d", DRIVE), ("PUT", "/entropy", {})],
        [("PUT", "/vsock", {"guest_cid": 3, "uds_path": "agent.sock"})],
        [_card("a-name-that-is-too-long")],
        [_card("lo")],
        [("PUT", "/actions", {"action_type": "FlushMetrics"})],
        [("GET", "/balloon", None), ("GET", "/balloon/statistics", None), ("PATCH", "/balloon", {"amount_mib": 3})],
        [("PUT", "/balloon", BALLOON), ("GET", "/balloon", None)],
        [MACHINE, ("PUT", "/balloon", {**BALLOON, "amount_mib": 129})],
        [("GET", "/mmds", None), ("PUT", "/mmds", {"a": {"b": "c"}}), ("GET", "/mmds", None)],
        [("PUT", "/mmds/config", {"network_interfaces": []}), ("PUT", "/mmds/config", {"network_interfaces": ["a"]})],
    ],
)
def test_before_a_start_it_answers_the_same(pair: Pair, steps: list[Step]) -> None:
    pair.ask(*steps)


@pytest.mark.skipif(os.geteuid() != 0, reason="the jailer requires root")
def test_the_fake_jailer_makes_the_same_root(firecracker: Path, jailer: Path, tmp_path: Path) -> None:
    version = re.search(r"v([\d.]+)", subprocess.check_output([jailer, "--version"], text=True))[1]  # type: ignore[index]
    program = tmp_path / "firecracker"
    command = shlex.join([sys.executable, "-I", "-S", str(FAKE), version])
    program.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    program.chmod(firecracker.stat().st_mode & 0o777)
    commands = {"real": [jailer, firecracker], "fake": [sys.executable, "-I", "-S", FAKE_JAILER, version, program]}
    found = {}
    for name, (*command, started) in commands.items():
        base = tmp_path / name
        base.mkdir()
        options = ["--id", "a-1", "--uid", "1073741900", "--gid", "1073741824", "--cgroup-version", "2"]
        more = ["--exec-file", started, "--chroot-base-dir", base, "--", "--api-sock", "api.sock"]
        root = base / "firecracker" / "a-1" / "root"
        with subprocess.Popen([*command, *options, *more], stdin=subprocess.DEVNULL) as process:
            assert wait_until((root / "api.sock").exists, Deadline(WAIT_S))
            found[name] = {path.relative_to(root): _rights(path) for path in (root, *root.rglob("*"))}
            process.kill()
    sockets = [rights.pop(Path("api.sock"))[0] for rights in found.values()]  # the fake does not change its user
    assert sockets[0] == sockets[1]
    assert found["fake"] == found["real"]


def _rights(path: Path) -> tuple[str, int, int, int]:
    status = path.stat()
    return stat.filemode(status.st_mode), status.st_uid, status.st_gid, status.st_rdev


@pytest.mark.parametrize("state", ["gone", "text", "empty"])
def test_a_failed_load_ends_both_the_same_way(pair: Pair, state: str) -> None:
    ((status, said),) = pair.ask(_load(state))
    assert status == 400, said
    real, fake = pair.programs
    assert [program.process.wait(WAIT_S) for program in (real, fake)] == [1, 1]
    for program in (real, fake):
        assert "Error: RunWithApi(BuildMicroVmError(Restore))" in program.words
        assert "Firecracker exiting with error. exit_code=1" in program.words


def test_a_taken_socket_and_wrong_arguments_end_both_the_same_way(pair: Pair) -> None:
    for place in pair.directories.values():
        (place / "taken").touch()
    for arguments, code, words in (
        (("--api-sock", "taken"), 1, 'Error: RunWithApi(FailedToBindSocket("taken"))'),
        (("--bogus", "1"), 153, 'Error: ParseArguments(UnexpectedArgument("bogus"))'),
    ):
        programs = pair.start(*arguments)
        assert [program.process.wait(WAIT_S) for program in programs] == [code, code]
        assert all(words in program.words for program in programs), [program.words for program in programs]


def test_an_invalid_kernel_is_refused_with_the_same_message(bootable: Pair) -> None:
    kernel = ("PUT", "/boot-source", {"kernel_image_path": "text"})
    bootable.ask(kernel, START)


def test_all_requests_from_boot_to_snapshot_get_the_same_answers(bootable: Pair) -> None:
    # Without panic=-1 the guest stops when its kernel panics.
    kernel = ("PUT", "/boot-source", {"kernel_image_path": "kernel", "boot_args": "console=ttyS0 quiet"})
    bootable.ask(
        SERIAL,
        MACHINE,
        kernel,
        ("PUT", "/drives/d", DRIVE),
        ("PUT", "/vsock", {"guest_cid": 3, "uds_path": "agent.sock"}),
        START,
        START,
        kernel,
        ("PATCH", "/vm", {"state": "Resumed"}),
        CREATE,
        ("PATCH", "/vm", {"state": "Foo"}),
        ("PATCH", "/vm", {"state": "Paused"}),
        ("PATCH", "/vm", {"state": "Paused"}),
        ("PUT", "/snapshot/create", {"snapshot_path": "gone/state", "mem_file_path": "memory"}),
        ("PUT", "/snapshot/create", {"snapshot_path": "state", "mem_file_path": "gone/memory"}),
        CREATE,
        ("PATCH", "/vm", {"state": "Resumed"}),
    )
    assert {place.joinpath("memory").stat().st_size for place in bootable.directories.values()} == {128 << 20}
    bootable.ask(
        SERIAL, _load(), ("PATCH", "/vm", {"state": "Paused"}), ("PATCH", "/vm", {"state": "Resumed"}), _load()
    )
    bootable.ask(_load(memory="gone"))
    bootable.ask(_load(memory="empty"))
    for place in bootable.directories.values():
        (place / "drive").unlink()
    bootable.ask(_load())
