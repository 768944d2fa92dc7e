"""Host ports of a VM: listeners of this process, in front of what makes the connections into the guest."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from pytest_fcvm.errors import EngineError, FcvmError
from pytest_fcvm.host.sockets import Socket, listen, reset
from pytest_fcvm.model.net import NO_LISTENER, PROBE_PORT, Endpoint, Proto, PublishedPort
from pytest_fcvm.network.links import ByteStream, Links, MakeThread
from pytest_fcvm.network.ports.datagrams import DatagramPort, DatagramStream, listen_error

__all__ = ["Dialled", "Relay", "Serve", "Served"]

_THREAD = "fcvm-relay"
_PAUSE_S = 0.05  # after an accept that failed because no descriptor was left

ReportFault = Callable[[str, str], object]  # what happened to a connection, and why


class Served(Protocol):
    """A port on which something listens."""

    def close(self) -> None:
        """Stop listening and reset all connections. Idempotent."""
        ...


Serve = Callable[[Socket, int, ReportFault], Served]


class Dialled:
    """A TCP port that dials and carries each connection in threads of its own. It owns the listener."""

    def __init__(
        self, dial: Callable[[], ByteStream], make_thread: MakeThread, listener: Socket, report_fault: ReportFault
    ) -> None:
        self._dial, self._make_thread, self._report_fault = dial, make_thread, report_fault
        self._listener = listener
        self._links = Links(make_thread)
        self._over = threading.Event()
        try:
            make_thread(self._accept, name=_THREAD).start()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop listening and reset all connections. Idempotent."""
        self._over.set()
        with suppress(OSError):  # close alone does not wake the thread in accept
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._links.close()

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
        except (RuntimeError, FcvmError):  # no thread is left
            reset(client)

    def _serve(self, client: socket.socket) -> None:
        try:
            guest = self._dial()
        except (OSError, FcvmError) as error:
            refused = isinstance(error, ConnectionRefusedError)
            self._report_fault("was reset", NO_LISTENER if refused else str(error))
            reset(client)
        else:
            self._links.join(client, guest)


class Relay:
    """Ports of one VM on the host.

    `serve` connects the clients of a listener to a TCP port of the guest, `dial_datagrams` opens a stream to a UDP
    port, `make_thread` makes threads.
    """

    def __init__(self, serve: Serve, dial_datagrams: Callable[[int], DatagramStream], make_thread: MakeThread) -> None:
        self._serve, self._dial_datagrams, self._make_thread = serve, dial_datagrams, make_thread
        self._lock = threading.Lock()
        self._ports: dict[tuple[Proto, int], Endpoint] = {}
        self._opened: list[Served] = []
        self._over = False
        self.fault = ""  # why a connection was last reset before it was established

    def publish(self, port: PublishedPort) -> Endpoint:
        """Listen for a guest port and return the address. It stays the same until another one is asked for.

        Raise HostError when the host port is taken.
        """
        key = port.proto, port.guest_port
        with self._lock:
            if self._over:
                raise EngineError("the VM has ended", hint="use the ports of a base in prepare only")
            found = self._ports.get(key)
            if found is None or (port.host_port and found != (port.host_ip, port.host_port)):
                found = self._ports[key] = self._open(port)
            return found

    def close(self) -> None:
        """Stop listening and reset all connections, so that nothing waits for a client. Idempotent."""
        with self._lock:
            self._over = True
            for port in self._opened:
                port.close()
            self._opened.clear()

    def _open(self, port: PublishedPort) -> Endpoint:
        if port.proto is Proto.UDP:
            datagrams = DatagramPort(port, self._dial_datagrams, self._make_thread)
            self._opened.append(datagrams)
            return datagrams.endpoint
        try:
            listener = listen((port.host_ip, port.host_port))
        except OSError as error:
            raise listen_error(port, error) from error
        endpoint = Endpoint(*listener.getsockname()[:2])
        self._opened.append(self._serve(listener, port.guest_port, self._note_fault(port)))
        return endpoint

    def _note_fault(self, port: PublishedPort) -> ReportFault:
        def note(fate: str, reason: str) -> None:
            if port.guest_port != PROBE_PORT:
                self.fault = f"a connection to guest port {port.guest_port} {fate}: {reason}"

        return note
