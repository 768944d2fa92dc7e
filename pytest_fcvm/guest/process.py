"""A program that the host runs in the guest, with an interface like `subprocess.Popen`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Self

from pytest_fcvm.errors import GuestTimeout
from pytest_fcvm.guest.bodies import exit_status
from pytest_fcvm.guest.streams import Stream
from pytest_fcvm.host.clock import Deadline
from pytest_fcvm.model.guest import ExitStatus

__all__ = ["GuestProcess", "StreamReader", "StreamWriter"]

_STDOUT, _STDERR = 0, 1
_TAIL_BYTES = 4000


class StreamReader:
    """One channel as a binary file to read. `timeout_s` limits every read (None: as long as the VM lives).

    Do not read from two threads at once. Without a reader the program in the guest stops when 64 KiB wait.
    """

    # Not an io.RawIOBase: the garbage collector would close that on any thread, with any lock held.

    def __init__(self, stream: Stream, channel: int = 0, *, timeout_s: float | None = None) -> None:
        self.timeout_s = timeout_s
        self.closed = False
        self._stream = stream
        self._channel = channel
        self._chunk = b""
        self._at = 0  # how much of the chunk was returned

    def read(self, size: int = -1) -> bytes:
        """Return `size` bytes, fewer only at the end of the stream; -1: all bytes up to the end."""
        parts: list[bytes] = []
        while size != 0 and (part := self.read1(size)):
            parts.append(part)
            if size > 0:
                size -= len(part)
        return b"".join(parts)

    def read1(self, size: int = -1) -> bytes:
        """Return up to `size` bytes as soon as there are any, b"" at the end. Raise GuestTimeout or OSError."""
        if self._at == len(self._chunk):
            self._fill()
        end = len(self._chunk) if size < 0 else min(len(self._chunk), self._at + size)
        part = self._chunk[self._at : end]
        self._at = end
        return part

    def readline(self) -> bytes:
        """Return the next line with its newline (the last may have none), b"" at the end of the stream."""
        parts: list[bytes] = []
        while True:
            end = self._chunk.find(b"\n", self._at) + 1
            parts.append(self._chunk[self._at : end or None])
            self._at = end or len(self._chunk)
            if end or not self._fill():
                return b"".join(parts)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.readline, b"")

    def take_buffered(self) -> bytes:
        """Return the bytes that were fetched and not read yet."""
        rest, self._chunk, self._at = self._chunk[self._at :], b"", 0
        return rest

    def readable(self) -> bool:
        """Say that this file is for reading, as io.TextIOWrapper asks."""
        return True

    def writable(self) -> bool:
        """Say that this file is not for writing."""
        return False

    def seekable(self) -> bool:
        """Say that this file has no position."""
        return False

    def flush(self) -> None:
        """Do nothing, as files to read do."""

    def close(self) -> None:
        """Discard output from now on, so that the program in the guest never waits for a reader."""
        self.closed = True
        self._chunk, self._at = b"", 0
        self._stream.discard(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _fill(self) -> bool:
        if self.closed:
            raise ValueError("read of a closed stream")
        self._chunk = self._stream.read(self._channel, -1, Deadline(self.timeout_s))
        self._at = 0
        return bool(self._chunk)


class StreamWriter:
    """Channel 0 to the guest as a binary file to write. `timeout_s` limits every write."""

    def __init__(self, stream: Stream, *, timeout_s: float | None = None) -> None:
        self.timeout_s = timeout_s
        self.closed = False
        self._stream = stream

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Send all of `data`, waiting for the guest to take it. Raise BrokenPipeError or GuestTimeout."""
        if self.closed:
            raise ValueError("write to a closed stream")
        self._stream.write(data, Deadline(self.timeout_s))
        return memoryview(data).nbytes

    def flush(self) -> None:
        """Do nothing: a write does not buffer."""

    def close(self) -> None:
        """Send end of file to the guest; idempotent."""
        self.closed = True
        self._stream.write_eof()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class GuestProcess:
    """A running program. `pid` is its process id in the workload's PID namespace.

    A detached program goes on after `close`, and never waits for a reader.
    """

    def __init__(self, stream: Stream, pid: int, *, lost_bytes: int = 0) -> None:
        self.pid, self._lost_bytes = pid, lost_bytes
        self.stdin = StreamWriter(stream)
        self.stdout = StreamReader(stream, _STDOUT)
        self.stderr = StreamReader(stream, _STDERR)
        self._stream = stream
        self._collected = [b"", b""]

    @property
    def lost_bytes(self) -> int:
        """Return how many bytes of its output were dropped unread."""
        return self._lost_bytes + self._stream.lost_bytes

    def signal(self, number: int) -> None:
        """Send a signal to the program's process group; harmless when it has ended."""
        self._stream.signal(number)

    def resize(self, rows: int, columns: int) -> None:
        """Give the program's terminal another size; the program gets SIGWINCH."""
        self._stream.resize(rows, columns)

    def poll(self) -> ExitStatus | None:
        """Return how the program ended, None while it runs."""
        fields = self._stream.poll_exit()
        return None if fields is None else exit_status(fields)

    def wait(self, timeout_s: float | None) -> ExitStatus:
        """Wait for the program's end, which comes after all of its output: read or close that, or use `communicate`.

        Raise GuestTimeout at the deadline, or why the session ended.
        """
        try:
            return exit_status(self._stream.wait_exit(Deadline(timeout_s)))
        except GuestTimeout as error:
            if self._stream.is_stalled():
                error.hint = "its output is not read: read stdout and stderr, close them, or use communicate"
            raise

    def communicate(self, data: bytes = b"", *, timeout_s: float | None) -> tuple[bytes, bytes]:
        """Send `data` and end of file to stdin, wait for the program's end and return stdout and stderr.

        Raise GuestTimeout with the end of the output as evidence. The program goes on, and a second call continues to
        collect.
        """
        deadline = Deadline(timeout_s)
        for channel in (_STDOUT, _STDERR):
            self._stream.collect(channel)
        try:
            with contextlib.suppress(BrokenPipeError):  # it ended without reading everything
                self._stream.write(data, deadline)
            self._stream.write_eof()
            self._stream.wait_exit(deadline)
        except GuestTimeout as error:
            stdout, stderr = (data[-_TAIL_BYTES:].decode("utf-8", "replace") for data in self._take_collected())
            error.with_evidence(stdout=stdout, stderr=stderr)
            raise
        return self._take_collected()

    def close(self) -> None:
        """End the program if it runs: its process group gets SIGHUP, and SIGKILL a second later. Idempotent.

        Its children in other process groups go on, and so do those that it left running when it ended by itself.
        A detached program goes on too.
        """
        self._stream.abandon()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take_collected(self) -> tuple[bytes, bytes]:
        for channel, reader in enumerate((self.stdout, self.stderr)):
            self._collected[channel] += reader.take_buffered() + self._stream.read_waiting(channel)
        return self._collected[_STDOUT], self._collected[_STDERR]
