"""Transfers in one direction: tar streams into and out of the guest, and the workload's log."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from pytest_fcvm.errors import GuestError, GuestTimeout
from pytest_fcvm.guest.bodies import exit_status
from pytest_fcvm.guest.process import StreamReader
from pytest_fcvm.guest.streams import Stream
from pytest_fcvm.host.clock import Deadline

__all__ = ["LogStream", "TarSink", "TarSource"]


class TarSink:
    """Takes a tar stream that the agent unpacks: `tarfile.open(fileobj=sink, mode="w|")`, then `close`."""

    def __init__(self, stream: Stream, timeout_s: float | None) -> None:
        self._stream = stream
        self._deadline = Deadline(timeout_s)

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Send `data`. Raise GuestError with the reason if the agent failed, GuestTimeout at the deadline."""
        try:
            self._stream.write(data, self._deadline)
        except GuestTimeout:  # an OSError too
            raise
        except OSError as error:
            _check_exit(self._stream, self._deadline)
            raise GuestError(f"{self._stream.what} ended before all was sent") from error
        return memoryview(data).nbytes

    def close(self) -> None:
        """End the stream and wait until everything is unpacked. Raise GuestError with the agent's reason."""
        self._stream.write_eof()
        _check_exit(self._stream, self._deadline)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._stream.abandon()


class TarSource:
    """Brings a tar stream that the agent packs: `tarfile.open(fileobj=source, mode="r|")`."""

    def __init__(self, stream: Stream, timeout_s: float | None) -> None:
        self._stream = stream
        self._deadline = Deadline(timeout_s)
        self._reader = StreamReader(stream)

    def read(self, size: int = -1) -> bytes:
        """Return `size` bytes, fewer only at the end. Raise GuestError there if the agent could not send everything."""
        self._reader.timeout_s = self._deadline.remaining()
        data = self._reader.read(size)
        if size and len(data) < max(size, 1):
            _check_exit(self._stream, self._deadline)
        return data

    def close(self) -> None:
        """End the transfer, also before its end; idempotent."""
        self._stream.abandon()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class LogStream:
    """The transfer of the workload's output to a sink."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def wait_until_end(self, timeout_s: float | None) -> None:
        """Wait until the workload has ended and the sink has all its output. Raise GuestError if the sink failed."""
        self._stream.wait_end(Deadline(timeout_s))

    def close(self) -> None:
        """Stop following. The agent keeps later output in its ring."""
        self._stream.abandon()


def _check_exit(stream: Stream, deadline: Deadline) -> None:
    status = exit_status(stream.wait_exit(deadline))
    if status.returncode:
        raise GuestError(f"{stream.what} failed in the guest: {status}")
