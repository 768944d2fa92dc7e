"""Host ports of a machine without a network to the host: listeners whose connections go through the agent."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from pytest_fcvm.errors import EngineError, FcvmError
from pytest_fcvm.host.sockets import listen
from pytest_fcvm.model.net import Endpoint, Proto, PublishedPort
from pytest_fcvm.net.datagrams import DatagramPort, DatagramStream, listen_error
from pytest_fcvm.net.links import ByteStream, Links, MakeThread, reset

__all__ = ["Relay"]

_THREAD = "fcvm-relay"
_PAUSE_S = 0.05  # after an accept that failed for want of descriptors


class _StreamPort:
    """A TCP port: every connection is handed to `serve` on a thread of its own. Raise HostError when it is taken."""

    def __init__(self, port: PublishedPort, serve: Callable[[socket.socket], None], make_thread: MakeThread) -> None:
        try:
            self._listener = listen((port.host_ip, port.host_port))
        except OSError as error:
            raise listen_error(port, error) from error
        self._serve, self._make_thread = serve, make_thread
        self._over = threading.Event()
        try:
            make_thread(self._accept, name=_THREAD).start()
        except BaseException:
            self.close()
            raise

    @property
    def endpoint(self) -> Endpoint:
        """Return where clients connect to."""
        return Endpoint(*self._listener.getsockname()[:2])

    def close(self) -> None:
        """Stop listening; idempotent."""
        self._over.set()
        with suppress(OSError):  # shutdown wakes the thread in accept; close alone does not
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while not self._over.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                self._over.wait(_PAUSE_S)
            else:
                self._welcome(client)

    def _welcome(self, client: socket.socket) -> None:
        try:
            self._make_thread(self._serve, client, name=_THREAD).start()
        except (RuntimeError, FcvmError):  # no thread is left for it
            reset(client)


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
        self._ports: dict[tuple[Proto, int], _StreamPort | DatagramPort] = {}
        self._opened: list[_StreamPort | DatagramPort] = []
        self._links = Links(make_thread)
        self._over = False
        self.fault = ""  # why a connection was last reset before it stood, where it was not refused by the guest

    def publish(self, port: PublishedPort) -> Endpoint:
        """Listen for a guest port and return the address, the same one again unless another is named.

        Raise HostError when the host port is taken.
        """
        key = port.proto, port.guest_port
        with self._lock:
            if self._over:
                raise EngineError("the machine is gone", hint="use the ports of a base in prepare only")
            found = self._ports.get(key)
            if found is None or (port.host_port and found.endpoint != (port.host_ip, port.host_port)):
                found = self._ports[key] = self._open(port)
                self._opened.append(found)
            return found.endpoint

    def close(self) -> None:
        """Stop listening and reset all connections, so that no thread waits for a client that stays; idempotent."""
        with self._lock:
            self._over = True
            for port in self._opened:
                port.close()
            self._opened.clear()
        self._links.close()

    def _open(self, port: PublishedPort) -> _StreamPort | DatagramPort:
        if port.proto is Proto.UDP:
            return DatagramPort(port, self._dial_datagrams, self._make_thread)
        return _StreamPort(port, partial(self._serve, port.guest_port), self._make_thread)

    def _serve(self, guest_port: int, client: socket.socket) -> None:
        try:
            guest = self._dial(guest_port)
        except (OSError, FcvmError) as error:
            if not isinstance(error, ConnectionRefusedError):
                self.fault = f"a connection to guest port {guest_port} was reset: {error}"
            reset(client)
        else:
            self._links.join(client, guest)
