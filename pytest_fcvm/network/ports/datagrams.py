"""A UDP port of the host whose datagrams go to a port of the guest."""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

from pytest_fcvm.errors import FcvmError, GuestTimeout, HostError
from pytest_fcvm.host.own import os
from pytest_fcvm.host.sockets import Socket
from pytest_fcvm.model.net import Endpoint, PublishedPort

__all__ = ["DatagramPort", "DatagramStream", "SocketDatagrams", "listen_error"]

_THREAD = "fcvm-relay"
_LARGEST = 65535
_IDLE_S = 60.0

_Address = tuple[Any, ...]  # as socket.recvfrom returns it


class DatagramStream(Protocol):
    """Datagrams between one client and a port of the guest. Errors are OSError or FcvmError."""

    def recv(self, timeout_s: float) -> bytes | None:
        """Return the next datagram, None after the last. Raise GuestTimeout when none came."""
        ...

    def send(self, data: bytes) -> None:
        """Send one datagram."""
        ...

    def close(self) -> None:
        """End the stream and wake a waiting `recv`."""
        ...


class DatagramPort:
    """One port. `dial` opens a stream for every client's address.

    A stream ends after `idle_s` to twice that time without a datagram either way. Raise HostError for a taken port.
    """

    def __init__(
        self,
        port: PublishedPort,
        dial: Callable[[int], DatagramStream],
        make_thread: Callable[..., threading.Thread],
        idle_s: float = _IDLE_S,
    ) -> None:
        self._guest_port, self._dial, self._make_thread, self._idle_s = port.guest_port, dial, make_thread, idle_s
        self._socket = Socket(socket.AF_INET6 if ":" in port.host_ip else socket.AF_INET, socket.SOCK_DGRAM)
        try:
            self._socket.bind((port.host_ip, port.host_port))
        except OSError as error:
            self._socket.close()
            raise listen_error(port, error) from error
        self._lock = threading.Lock()
        self._clients: dict[_Address, _Client] = {}
        self._over = False
        try:
            make_thread(self._serve, name=_THREAD).start()
        except BaseException:
            self._socket.close()
            raise

    @property
    def endpoint(self) -> Endpoint:
        """Return the address that clients send to."""
        return Endpoint(*self._socket.getsockname()[:2])

    def close(self) -> None:
        """Take no more datagrams and end all streams. Idempotent."""
        with self._lock:
            self._over = True
            clients = list(self._clients.values())
        for client in clients:
            client.guest.close()
        with suppress(OSError):  # the call fails without a connection, but wakes recvfrom
            self._socket.shutdown(socket.SHUT_RDWR)

    def _serve(self) -> None:
        with self._socket:
            while not self._over:
                data, address = self._socket.recvfrom(_LARGEST)
                if not self._over:
                    self._deliver(data, address)

    def _deliver(self, data: bytes, address: _Address) -> None:
        """Send a client's datagram on. It is lost when the guest cannot take it, as on any network."""
        with suppress(OSError, RuntimeError, FcvmError):  # RuntimeError: no thread is left
            client = self._clients.get(address) or self._welcome(address)
            client.has_sent = True
            client.guest.send(data)

    def _welcome(self, address: _Address) -> _Client:
        client = _Client(address, self._dial(self._guest_port))
        with self._lock:
            self._clients[address] = client
            if self._over:
                client.guest.close()
        try:
            self._make_thread(self._answer, client, name=_THREAD).start()
        except BaseException:
            self._forget(client)
            raise
        return client

    def _answer(self, client: _Client) -> None:
        """Send the guest's datagrams to a client, until neither has sent one for a while."""
        with suppress(OSError, FcvmError):
            while (data := self._next_answer(client)) is not None:
                self._socket.sendto(data, client.address)
        self._forget(client)

    def _forget(self, client: _Client) -> None:
        with self._lock:
            self._clients.pop(client.address, None)
        client.guest.close()

    def _next_answer(self, client: _Client) -> bytes | None:
        while True:
            client.has_sent = False
            try:
                return client.guest.recv(self._idle_s)
            except GuestTimeout:
                if not client.has_sent:
                    return None


class _Client:
    """A client's address, its stream into the guest, and whether it has sent since the last wait began."""

    def __init__(self, address: _Address, guest: DatagramStream) -> None:
        self.address, self.guest, self.has_sent = address, guest, False


def listen_error(port: PublishedPort, error: OSError) -> HostError:
    """Return the error for a host port at which nothing can listen."""
    where = f"{port.host_ip}:{port.host_port}/{port.proto}"
    return HostError(
        f"guest port {port.guest_port} cannot be published on {where}: {os.strerror(error.errno or 0)}",
        hint=f"publish another host port, or 0 for a free one (--fcvm-publish 0:{port.guest_port})",
    )


class SocketDatagrams:
    """A connected UDP socket as a DatagramStream."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket, self._over = connected, False

    def recv(self, timeout_s: float) -> bytes | None:
        """Return the next datagram, None after `close`. Raise GuestTimeout when none comes, OSError for a refusal."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        if not poll.poll(timeout_s * 1000):
            raise GuestTimeout("no datagram came")
        data = self._socket.recv(_LARGEST)
        return None if not data and self._over else data

    def send(self, data: bytes) -> None:
        """Send one datagram."""
        self._socket.send(data)

    def close(self) -> None:
        """End the stream and wake a waiting `recv`."""
        self._over = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
