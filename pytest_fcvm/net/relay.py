"""Host ports of a machine without a network to the host: listeners whose connections go through the agent."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress

from pytest_fcvm.errors import EngineError, FcvmError
from pytest_fcvm.model.net import Endpoint, Proto, PublishedPort
from pytest_fcvm.net.datagrams import DatagramPort, DatagramStream, listen_error
from pytest_fcvm.net.links import ByteStream, Links, MakeThread, reset

__all__ = ["Relay"]

_THREAD = "fcvm-relay"
_PAUSE_S = 0.05  # after an accept that failed for want of descriptors


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
        self._links = Links(make_thread)
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
        self._links.close()

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
            reset(client)
        else:
            self._links.join(client, guest)
