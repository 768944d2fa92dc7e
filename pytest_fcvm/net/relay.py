"""Host ports of a machine without a network to the host: listeners whose connections go through the agent."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from pytest_fcvm.errors import EngineError, FcvmError, HostError
from pytest_fcvm.model.net import Endpoint, Proto, PublishedPort

__all__ = ["ByteStream", "Relay"]

_CHUNK = 64 * 1024
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class ByteStream(Protocol):
    """A connection into the guest. `recv` returns b"" at the peer's half-close; a reset is a ConnectionError."""

    def recv(self, size: int) -> bytes:
        """Return the next bytes."""
        ...

    def sendall(self, data: bytes) -> None:
        """Send all bytes, waiting as long as the guest does not read."""
        ...

    def shutdown_write(self) -> None:
        """Half-close: say that no more bytes will come."""
        ...

    def close(self) -> None:
        """End the connection."""
        ...


class Relay:
    """TCP ports of one machine on 127.0.0.1. `dial` opens a connection to a guest port."""

    def __init__(self, dial: Callable[[int], ByteStream]) -> None:
        self._dial = dial
        self._lock = threading.Lock()
        self._listeners: dict[int, socket.socket] = {}

    def publish(self, port: PublishedPort) -> Endpoint:
        """Listen for a guest port and return the address. Idempotent. Raise HostError when the host port is taken."""
        if port.proto is not Proto.TCP:
            raise EngineError("a machine that is being prepared has TCP ports only", hint="use TCP in prepare")
        with self._lock:
            if port.guest_port not in self._listeners:
                self._listeners[port.guest_port] = self._listen(port)
            return Endpoint(*self._listeners[port.guest_port].getsockname())

    def close(self) -> None:
        """Stop listening. Connections end with the machine."""
        with self._lock:
            for listener in self._listeners.values():
                with suppress(OSError):  # shutdown wakes the thread in accept; close alone does not
                    listener.shutdown(socket.SHUT_RDWR)
                listener.close()
            self._listeners.clear()

    def _listen(self, port: PublishedPort) -> socket.socket:
        try:
            listener = socket.create_server((port.host_ip, port.host_port), backlog=128)
        except OSError as error:
            raise HostError(
                f"{port.host_ip}:{port.host_port} cannot be listened on: {error.strerror}",
                hint="publish another host port, or 0 for any free one",
            ) from error
        threading.Thread(target=self._accept, args=(listener, port.guest_port), daemon=True, name="fcvm-relay").start()
        return listener

    def _accept(self, listener: socket.socket, guest_port: int) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client, guest_port), daemon=True, name="fcvm-relay").start()

    def _serve(self, client: socket.socket, guest_port: int) -> None:
        try:
            guest = self._dial(guest_port)
        except (OSError, FcvmError):
            _reset(client)
            return
        upward = threading.Thread(target=_pump_up, args=(client, guest), daemon=True, name="fcvm-relay")
        upward.start()
        sound = _pump_down(guest, client)
        if sound:
            upward.join()
        _reset(client) if not sound else client.close()
        guest.close()


def _pump_up(client: socket.socket, guest: ByteStream) -> None:
    with suppress(OSError, FcvmError):
        while data := client.recv(_CHUNK):
            guest.sendall(data)
        guest.shutdown_write()
        return
    guest.close()


def _pump_down(guest: ByteStream, client: socket.socket) -> bool:
    with suppress(OSError, FcvmError):
        while data := guest.recv(_CHUNK):
            client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        return True
    return False


def _reset(client: socket.socket) -> None:
    with suppress(OSError):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    with suppress(OSError):
        client.shutdown(socket.SHUT_RD)  # wakes a thread that still reads
    client.close()
