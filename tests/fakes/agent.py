"""A guest agent in Python that keeps the rules of `guest_image/agent/protocol.h`, for tests of the host's side.

It looks for its secret at every byte, obeys credit, ends the session of a host that does not, and sends control frames
before data. `attach` gives it the channel of the next host, which begins with the bytes that the last one did not take.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import errno
import io
import shutil
import signal
import socket
import struct
import tarfile
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Self

from fakes.agent_wire import PIECE, Body, FakeStream, Wire

from pytest_fcvm.guest.frames import (
    PROTOCOL_BOOT_SECRET,
    EventKind,
    FieldTag,
    FrameType,
    StreamKind,
    encode_fields,
    encode_frame,
)

_RING_BYTES = 64 * 1024

Program = Callable[[FakeStream], Awaitable[int]]


class FakeAgent(Wire):
    """The agent, on its own thread. Set public attributes before the host asks; read them at any time."""

    def __init__(self, sock: socket.socket | None = None, *, secret: bytes = PROTOCOL_BOOT_SECRET) -> None:
        super().__init__(secret, asyncio.new_event_loop())
        self.refusals: dict[StreamKind, tuple[int, str]] = {}  # kinds that fail, with errno and message
        self.silent: set[StreamKind] = set()  # kinds that are never answered
        self.replies: dict[StreamKind, Body] = {}
        self.programs: dict[str, Program] = dict(PROGRAMS)
        self.ports: dict[int, tuple[str, int]] = {}  # targets of CONNECT
        self.listening: dict[int, int] = {}
        self.metrics: dict[str, str] = {"uptime_ms": "1234", "load": "0.25", "kernel": "6.12.1"}
        self.root = Path("/nonexistent")  # the directory of tar streams
        self.state, self.oom_kills = "idle", 0
        self.exit_fields: Body = []
        self.stale_on_attach = b""
        self._ring, self._log_end = bytearray(), asyncio.Event()
        self._thread = threading.Thread(target=self.loop.run_forever, name="fake-agent", daemon=True)
        self._thread.start()
        if sock is not None:
            self.attach(sock)

    # Called by tests

    def attach(self, sock: socket.socket) -> None:
        """Take the next host's channel."""
        self.run(self.take_channel, sock, self.stale_on_attach)

    def log(self, data: bytes) -> None:
        """Make the workload print."""
        self.run(self._log, data)

    def exit_workload(self, *, code: int | None = None, number: int | None = None) -> None:
        """Make the workload end."""
        self.run(self._exit_workload, code, number)

    def say_oom(self, kills: int) -> None:
        """Report an out-of-memory kill in the workload."""
        self.oom_kills = kills
        self.run(self.event, EventKind.OOM, [(FieldTag.OOM_KILLS, kills)])

    def send_raw(self, data: bytes) -> None:
        """Put raw bytes into the channel."""
        self.run(self.put_control, data)

    def hang_up(self) -> None:
        """Close the channel, as when a VM dies."""
        self.run(self.drop_channel)

    def open_streams(self) -> int:
        """Return how many streams are open."""
        return self.run(lambda: len(self.streams))

    def run(self, func: Callable[..., Any], *args: Any) -> Any:
        """Run a function on the agent's thread and return its value."""
        done: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def call() -> None:
            try:
                done.set_result(func(*args))
            except BaseException as error:  # noqa: BLE001  the caller gets it
                done.set_exception(error)

        self.loop.call_soon_threadsafe(call)
        return done.result(30)

    def close(self) -> None:
        """End the agent and its thread; idempotent."""
        if self.loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self.finish(), self.loop).result(30)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Verbs and streams

    def after_welcome(self) -> None:
        if self.exit_fields:
            self.event(EventKind.WORKLOAD_EXIT, [*self.exit_fields, (FieldTag.OOM_KILLS, self.oom_kills)])

    async def serve(self, stream: FakeStream) -> None:
        kind = stream.kind
        if kind in self.silent:
            return None
        if kind in self.refusals:
            return self.reply(stream, error=self.refusals[kind])
        if kind.is_verb:
            return self._serve_verb(stream)
        return await getattr(self, f"_serve_{kind.name.lower()}")(stream)

    def _serve_verb(self, stream: FakeStream) -> None:
        kind, fields = stream.kind, stream.fields
        body = self.replies.get(kind, [])
        if kind is StreamKind.START:
            self.state, body = "running", [(FieldTag.PID, 1)]
        elif kind is StreamKind.PERSONALISE:
            self.state = "running"
        elif kind is StreamKind.FREEZE:
            self.state = "frozen"
        elif kind is StreamKind.STATUS:
            body = [(FieldTag.STATE, self.state), *self.exit_fields, (FieldTag.OOM_KILLS, self.oom_kills)]
        elif kind is StreamKind.METRICS:
            body = [(FieldTag.METRIC, f"{name}={value}") for name, value in self.metrics.items()]
        elif kind is StreamKind.LISTENING:
            body = [(FieldTag.LISTENING, self.listening.get(fields.number(FieldTag.PORT), 0))]
        self.reply(stream, body)
        if kind is StreamKind.STOP:
            self._exit_workload(None, fields.number(FieldTag.SIGNAL))
        elif kind is StreamKind.QUIESCE:
            self.state = "frozen"
            self.wait_for_secret(fields[FieldTag.SECRET][0])
        elif kind is StreamKind.POWEROFF:
            self.drop_channel()

    async def _serve_exec(self, stream: FakeStream) -> None:
        program, oom_kills = self.programs.get(stream.argv[0]), self.oom_kills
        self.reply(stream, [(FieldTag.PID, 100 + stream.id)])
        if program is None:
            body: Body = [(FieldTag.EXIT_CODE, 127), (FieldTag.MESSAGE, f"{stream.argv[0]}: not found")]
            return self._exit(stream, body)
        try:
            code = await program(stream)
        except asyncio.CancelledError:
            if not stream.signals:
                raise
            code = -stream.signals[-1]
        tag = FieldTag.EXIT_CODE if code >= 0 else FieldTag.EXIT_SIGNAL
        killed = [(FieldTag.OOM_KILLS, self.oom_kills - oom_kills)] if self.oom_kills > oom_kills else []
        return self._exit(stream, [(tag, abs(code)), *killed])

    def _exit(self, stream: FakeStream, body: Body) -> None:
        if self.streams.pop(stream.id, None) is stream:
            self.put_data(encode_frame(FrameType.EXIT, stream.id, encode_fields(body)))

    async def _serve_connect(self, stream: FakeStream) -> None:
        target = self.ports.get(stream.fields.number(FieldTag.PORT))
        try:
            if target is None:
                raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
            reader, writer = await asyncio.open_connection(*target)
        except OSError as error:
            return self.reply(stream, error=(error.errno or errno.EIO, f"connect: {error.strerror}"))
        self.reply(stream)
        upward = self.spawn(_pump_up(stream, writer))
        # Before both sides have ended, an end is a reset.
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        try:
            while data := await reader.read(PIECE):
                await stream.write(data)
            stream.write_eof()
            await upward
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))
        except ConnectionError as error:
            self.put_data(encode_frame(FrameType.CLOSE, stream.id, struct.pack("<I", error.errno or errno.ECONNRESET)))
        finally:
            upward.cancel()
            writer.close()
            self.streams.pop(stream.id, None)

    async def _serve_logs(self, stream: FakeStream) -> None:
        self.reply(stream)
        while self._ring or not self.exit_fields:
            data = bytes(self._ring)
            self._ring.clear()
            await stream.write(data)
            if not self._ring and not self.exit_fields:
                self._log_end.clear()
                await self._log_end.wait()
        stream.write_eof()

    async def _serve_tar_in(self, stream: FakeStream) -> None:
        target = self.root / stream.fields.text(FieldTag.PATH).lstrip("/")
        flags = stream.fields.number(FieldTag.FLAGS)
        if not flags and not target.is_dir():
            return self.reply(stream, error=(errno.ENOENT, f"open {target}: No such file or directory"))
        self.reply(stream)
        data = b""
        while piece := await stream.read():
            data += piece
        try:
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                if flags:
                    target = _place(tar.getmembers(), target, hides=bool(flags & 32))
                tar.extractall(target, filter="data")
            return self._exit(stream, [(FieldTag.EXIT_CODE, 0)])
        except (tarfile.TarError, OSError) as error:
            return self._exit(stream, [(FieldTag.EXIT_CODE, 1), (FieldTag.MESSAGE, str(error))])

    async def _serve_tar_out(self, stream: FakeStream) -> None:
        source = self.root / stream.fields.text(FieldTag.PATH).lstrip("/")
        if not source.exists():
            return self.reply(stream, error=(errno.ENOENT, f"open {source}: No such file or directory"))
        self.reply(stream)
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as tar:
            tar.add(source, arcname="." if source.is_dir() else source.name)
        await stream.write(packed.getvalue())
        return self._exit(stream, [(FieldTag.EXIT_CODE, 0)])

    def _log(self, data: bytes) -> None:
        self._ring += data
        del self._ring[:-_RING_BYTES]
        self._log_end.set()

    def _exit_workload(self, code: int | None, number: int | None) -> None:
        tag, value = (
            (FieldTag.EXIT_CODE, code) if code is not None else (FieldTag.EXIT_SIGNAL, number or signal.SIGTERM)
        )
        self.state, self.exit_fields = "exited", [(tag, int(value))]
        self.event(EventKind.WORKLOAD_EXIT, [*self.exit_fields, (FieldTag.OOM_KILLS, self.oom_kills)])
        self._log_end.set()


def _place(members: list[tarfile.TarInfo], place: Path, *, hides: bool) -> Path:
    """Rename the archive's root to its place, and return the directory above that place."""
    place, root = place.resolve(), members[0]
    if place.is_dir() and not root.isdir():
        if hides:
            raise IsADirectoryError(errno.EISDIR, f"put a file in the place of {place}: Is a directory")
        return place
    if place.is_dir() and hides:
        shutil.rmtree(place)
    name = root.name
    for member in members:
        member.name = place.name + member.name.removeprefix(name)
    place.parent.mkdir(parents=True, exist_ok=True)
    return place.parent


async def _pump_up(stream: FakeStream, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await stream.read():
            writer.write(data)
            await writer.drain()
        writer.write_eof()


async def _cat(stream: FakeStream) -> int:
    while data := await stream.read():
        await stream.write(data)
    return 0


async def _echo(stream: FakeStream) -> int:
    await stream.write(" ".join(stream.argv[1:]).encode("utf-8", "surrogateescape") + b"\n")
    return 0


async def _env(stream: FakeStream) -> int:
    await stream.write("\n".join(stream.fields.texts(FieldTag.ENV)).encode() + b"\n")
    return 0


async def _flood(stream: FakeStream) -> int:
    """Print `argv[1]` bytes of a counter that shows any loss."""
    left, block = int(stream.argv[1]), b"".join(struct.pack("<Q", n) for n in range(PIECE // 8))
    while left > 0:
        await stream.write(block[:left])
        left -= len(block)
    return 0


async def _sink(stream: FakeStream) -> int:
    """Count stdin and print the sum."""
    total = 0
    while data := await stream.read():
        total += len(data)
    await stream.write(str(total).encode())
    return 0


async def _fail(stream: FakeStream) -> int:
    await stream.write(b"it went wrong\n", channel=1)
    return int(stream.argv[1])


async def _sleep(stream: FakeStream) -> int:
    await asyncio.Event().wait()
    return 0


PROGRAMS: dict[str, Program] = {
    "cat": _cat,
    "echo": _echo,
    "env": _env,
    "fail": _fail,
    "flood": _flood,
    "sink": _sink,
    "sleep": _sleep,
}
