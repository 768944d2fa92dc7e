"""Fakes that speak the real protocols: QEMU's monitor on a socket pair, and a program with QEMU's command line."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import stat
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from pytest_fcvm.errors import HostError

_GREETING = {
    "QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}, "capabilities": ["oob"]}
}

Answer = Callable[[str, Mapping[str, object]], object]


class FakeQmp:
    """The VMM's end of a QMP connection, as 7.2 behaves: greets, reads JSON without separators, answers in order."""

    def __init__(self, client: socket.socket, end: socket.socket) -> None:
        self.client, self._socket = client, end
        self.answers: dict[str, Answer] = {}
        self.received: list[tuple[str, Mapping[str, object]]] = []
        self.fds: list[int] = []
        self._thread = threading.Thread(target=self._serve)

    def start(self) -> None:
        self._thread.start()

    def say(self, message: object) -> None:
        self._socket.sendall(json.dumps(message).encode() + b"\r\n")

    def say_raw(self, data: bytes) -> None:
        self._socket.sendall(data)

    def event(self, name: str, **data: object) -> None:
        self.say({"timestamp": {"seconds": 1, "microseconds": 2}, "event": name, **({"data": data} if data else {})})

    def hang_up(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.hang_up_quietly()
        if self._thread.is_alive():
            self._thread.join(5)
        self._socket.close()
        self.client.close()

    def hang_up_quietly(self) -> None:
        with suppress(OSError):
            self.hang_up()

    def _serve(self) -> None:
        decoder, text = json.JSONDecoder(), ""
        with suppress(OSError):  # our end was closed
            self.say(_GREETING)
            while data := self._receive():
                text += data.decode()
                while text:
                    try:
                        message, end = decoder.raw_decode(text)
                    except ValueError:
                        break  # half a command: the rest is on its way
                    text = text[end:]
                    self._answer(message["execute"], message.get("arguments", {}))

    def _receive(self) -> bytes:
        data, fds, _, _ = socket.recv_fds(self._socket, 4096, 4)
        self.fds += fds
        return data

    def _answer(self, command: str, arguments: Mapping[str, object]) -> None:
        self.received.append((command, arguments))
        try:
            answer = self.answers.get(command, lambda *_: {})(command, arguments)
        except LookupError as error:
            self.say({"error": {"class": "GenericError", "desc": str(error.args[0])}})
        else:
            if answer is not None:
                self.say({"return": answer})


@pytest.fixture
def qmp() -> Iterator[FakeQmp]:
    """A fake QEMU monitor that is serving; `client` is our end."""
    fake = FakeQmp(*socket.socketpair())
    fake.start()
    yield fake
    fake.close()


@dataclass(frozen=True, kw_only=True)
class Ended:
    code: int | None = None
    signal: int | None = None


class FakeChild:
    """A process that only ends by `finish` and `kill`."""

    pid = 4711

    def __init__(self) -> None:
        self.end: Ended | None = None
        self.owned_dir: Path | None = None
        self._callbacks: list[Callable[[Ended], None]] = []
        self._over = threading.Event()

    def finish(self, end: Ended) -> None:
        if self.end is None:
            self.end = end
            self._over.set()
            for callback in self._callbacks:
                callback(end)

    def kill(self) -> None:
        self.finish(Ended(signal=9))
        if self.owned_dir is not None:
            shutil.rmtree(self.owned_dir, ignore_errors=True)

    def wait(self, timeout_s: float) -> Ended:
        if not self._over.wait(timeout_s) or self.end is None:
            raise HostError("it did not end")
        return self.end

    def on_exit(self, callback: Callable[[Ended], None]) -> None:
        if self.end is not None:
            callback(self.end)
        else:
            self._callbacks.append(callback)

    def forget_callbacks(self) -> None:
        self._callbacks.clear()


class FakeSpawner:
    """Starts a fake monitor in place of QEMU, on the descriptor of QEMU's monitor. Keeps what `spawn` got."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.argv: Sequence[str] = ()
        self.passed: dict[int, bytes] = {}  # by descriptor number in the VMM: the content of the file
        self.child = FakeChild()
        self.answers: dict[str, Answer] = {}
        self.refusal: HostError | None = None
        self.qmp: FakeQmp | None = None
        self.agent: socket.socket | None = None  # the VMM's end of the channel to the agent
        self.console: bytes | None = b""  # what the guest prints before it ends; None: it prints nothing and runs on
        self.log = ""

    def make_dir(self, name: str) -> Path:
        path = self.directory / name
        path.mkdir(mode=0o700)
        return path

    def spawn(
        self, argv: Sequence[str], *, fds: Mapping[int, int], stdout: Path, owned_dir: Path, **_: object
    ) -> FakeChild:
        if self.refusal is not None:
            raise self.refusal
        self.argv, self.child.owned_dir = argv, owned_dir
        for target, fd in fds.items():
            if stat.S_ISREG(os.fstat(fd).st_mode):
                self.passed[target] = os.read(fd, 1000)
        end = socket.socket(fileno=os.dup(fds[3]))
        self.qmp = FakeQmp(end, end)
        self.qmp.answers = self.answers
        self.child.on_exit(lambda _: self.qmp and self.qmp.hang_up_quietly())
        self.qmp.start()
        if 4 in fds:
            self.agent = socket.socket(fileno=os.dup(fds[4]))
            self.child.on_exit(lambda _: self.agent and self.agent.close())
        stdout.write_text(self.log)
        if 6 in fds and self.console is not None:
            with socket.socket(fileno=os.dup(fds[6])) as console:
                console.sendall(self.console)
            self.child.finish(Ended(signal=6))
        elif 6 in fds:
            self._held = socket.socket(fileno=os.dup(fds[6]))
            self.child.on_exit(lambda _: self._held.close())
        return self.child

    def close(self) -> None:
        self.child.kill()
        if self.qmp is not None:
            self.qmp.close()
        if self.agent is not None:
            self.agent.close()


@pytest.fixture
def spawner(tmp_path: Path) -> Iterator[FakeSpawner]:
    """A spawner of fake VMs."""
    fake = FakeSpawner(tmp_path)
    yield fake
    fake.close()


@pytest.fixture
def fake_qemu(tmp_path: Path) -> Callable[..., Path]:
    """Make programs that answer the probe's questions to QEMU, and log how often they were run."""

    def make(
        version: str = "7.2.22",
        package: str = "Debian 1:7.2+dfsg-7",
        vms: str = "microvm q35",
        accelerators: str = "tcg kvm",
        firmware: Path | None = None,
    ) -> Path:
        directory = firmware or tmp_path / "firmware"
        directory.mkdir(exist_ok=True)
        (directory / "bios-microvm.bin").write_bytes(b"firmware")
        program = tmp_path / "qemu-system-x86_64"
        program.write_text(
            f"""#!/bin/sh
            echo "$*" >> {shlex.quote(str(tmp_path / "asked"))}
            case "$1" in
              --version) echo "QEMU emulator version {version} ({package})" ;;
              -machine) echo "Supported machines are:"; printf '%s  a machine\\n' {vms} ;;
              -accel) echo "Accelerators supported in QEMU binary:"; printf '%s\\n' {accelerators} ;;
              -L) echo {shlex.quote(str(directory))} ;;
            esac
            """
        )
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        return program

    return make
