"""Host ports of a machine without a network to the host: listeners whose connections go through the agent."""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from pytest_fcvm.errors import EngineError, FcvmError
from pytest_fcvm.model.net import Endpoint, Proto, PublishedPort
from pytest_fcvm.net.datagrams import DatagramPort, DatagramStream, listen_error

__all__ = ["ByteStream", "Relay"]

MakeThread = Callable[..., threading.Thread]

_THREAD = "fcvm-relay"
_CHUNK = 64 * 1024
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
_PAUSE_S = 0.05  # after an accept that failed for want of descriptors


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

    def reset(self) -> None:
        """End the connection so that the guest sees a reset; wake whoever waits in another method. Idempotent."""
        ...

    def close(self) -> None:
        """End the connection."""
        ...


class Relay:
    """Ports of one machine on the host.

    `dial` opens a connection to a TCP port of the guest, `dial_datagrams` a stream to a UDP port, `make_thread` makes
    threads.
    """

    def __init__(
        self,
        dial: Callable[[int], ByteStream],
        dial_datagrams: Callable[[int], DatagramStream],
        make_thread: MakeThread,
    ) -> None:
        self._dial, self._dial_datagrams, self._make_thread = dial, dial_datagrams, make_thread
        self._lock = threading.Lock()
        self._listeners: dict[int, socket.socket] = {}
        self._datagram_ports: dict[int, DatagramPort] = {}
        self._links: set[_Link] = set()
        self._over = threading.Event()
        self.fault = ""  # why a connection was last reset before it stood, where it was not refused by the guest

    def publish(self, port: PublishedPort) -> Endpoint:
        """Listen for a guest port and return the address. Idempotent. Raise HostError when the host port is taken."""
        with self._lock:
            if self._over.is_set():
                raise EngineError("the machine is gone", hint="use the ports of a base in prepare only")
            if port.proto is Proto.UDP:
                if port.guest_port not in self._datagram_ports:
                    self._datagram_ports[port.guest_port] = DatagramPort(port, self._dial_datagrams, self._make_thread)
                return self._datagram_ports[port.guest_port].endpoint
            if port.guest_port not in self._listeners:
                self._listeners[port.guest_port] = self._listen(port)
            return Endpoint(*self._listeners[port.guest_port].getsockname()[:2])

    def close(self) -> None:
        """Stop listening and reset all connections, so that no thread waits for a client that stays; idempotent."""
        with self._lock:
            self._over.set()
            for listener in self._listeners.values():
                with suppress(OSError):  # shutdown wakes the thread in accept; close alone does not
                    listener.shutdown(socket.SHUT_RDWR)
                listener.close()
            self._listeners.clear()
            for port in self._datagram_ports.values():
                port.close()
            self._datagram_ports.clear()
            for link in self._links:
                link.reset()

    def _listen(self, port: PublishedPort) -> socket.socket:
        family = socket.AF_INET6 if ":" in port.host_ip else socket.AF_INET
        try:
            listener = socket.create_server((port.host_ip, port.host_port), family=family, backlog=128)
        except OSError as error:
            raise listen_error(port, error) from error
        self._make_thread(self._accept, listener, port.guest_port, name=_THREAD).start()
        return listener

    def _accept(self, listener: socket.socket, guest_port: int) -> None:
        while not self._over.is_set():
            try:
                client, _ = listener.accept()
            except OSError:
                self._over.wait(_PAUSE_S)
            else:
                self._make_thread(self._serve, client, guest_port, name=_THREAD).start()

    def _serve(self, client: socket.socket, guest_port: int) -> None:
        try:
            guest = self._dial(guest_port)
        except (OSError, FcvmError) as error:
            if not isinstance(error, ConnectionRefusedError):
                self.fault = f"a connection to guest port {guest_port} was reset: {error}"
            _reset(client)
            return
        link = _Link(client, guest, self._make_thread)
        with self._lock:
            self._links.add(link)
            if self._over.is_set():
                link.reset()
        link.copy()
        with self._lock:
            self._links.discard(link)
        link.close()


class _Link:
    """A client's connection and the guest's end of it. Each half ends by itself; a break of one end resets both."""

    def __init__(self, client: socket.socket, guest: ByteStream, make_thread: MakeThread) -> None:
        self._client, self._guest, self._make_thread = client, guest, make_thread
        self._broken = threading.Event()
        self._wake_out, self._wake_in = os.pipe2(os.O_CLOEXEC)  # a shutdown would wake as well, but send a FIN

    def copy(self) -> None:
        """Copy both ways until both have ended."""
        upward = self._make_thread(self._pump_up, name=_THREAD)
        upward.start()
        self._pump_down()
        upward.join()

    def close(self) -> None:
        """Give both ends back, after `copy`, when nobody calls `reset` any more."""
        if self._broken.is_set():
            _reset(self._client)
        self._client.close()
        self._guest.close()
        os.close(self._wake_out)
        os.close(self._wake_in)

    def reset(self) -> None:
        """End both ends by a reset and wake both directions."""
        if not self._broken.is_set():
            self._broken.set()
            os.write(self._wake_in, b"\0")
        self._guest.reset()

    def _pump_up(self) -> None:
        try:
            while data := self._receive():
                self._guest.sendall(data)
            self._check_whole()
            self._guest.shutdown_write()
        except (OSError, FcvmError):
            self.reset()

    def _pump_down(self) -> None:
        try:
            while data := self._guest.recv(_CHUNK):
                self._send(data)
            self._check_whole()
            self._client.shutdown(socket.SHUT_WR)
        except (OSError, FcvmError):
            self.reset()

    def _check_whole(self) -> None:
        if self._broken.is_set():  # what ended was no half-close
            raise ConnectionAbortedError

    def _receive(self) -> bytes:
        self._wait(select.POLLIN)
        return self._client.recv(_CHUNK)

    def _send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            self._wait(select.POLLOUT)
            with suppress(BlockingIOError):  # room for a byte is not room for all
                view = view[self._client.send(view, socket.MSG_DONTWAIT) :]

    def _wait(self, event: int) -> None:
        poll = select.poll()
        poll.register(self._client, event)
        poll.register(self._wake_out, select.POLLIN)
        if any(descriptor == self._wake_out for descriptor, _ in poll.poll()):
            raise ConnectionAbortedError


def _reset(client: socket.socket) -> None:
    with suppress(OSError):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    client.close()
