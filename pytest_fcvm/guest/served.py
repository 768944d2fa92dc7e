"""TCP ports of the host whose connections the agent makes in the guest, served on the session's own thread.

A connection costs one descriptor here and no thread, so that there may be thousands.
"""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from pytest_fcvm.errors import FcvmError
from pytest_fcvm.guest.frames import FieldTag, StreamKind
from pytest_fcvm.guest.poller import ERROR, HANG_UP, IN, OUT
from pytest_fcvm.guest.session import Opening, Session
from pytest_fcvm.host.clock import Deadline
from pytest_fcvm.host.sockets import Socket, reset
from pytest_fcvm.model.net import NO_LISTENER

__all__ = ["ServedPort"]

_AT_ONCE = 64  # connections that are accepted per event
_NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_NOW = Deadline(0)


class ServedPort:
    """One port. It owns the listener. `report_fault(what, why)` is called for a connection that fails ("was reset").

    `close` and the end of the session reset all its connections.
    """

    def __init__(
        self, session: Session, listener: Socket, guest_port: int, report_fault: Callable[[str, str], object]
    ) -> None:
        self.guest_port, self.report_fault = guest_port, report_fault
        self.session, self.lock = session, threading.RLock()
        self._listener: Socket | None = listener
        self._clients: set[_Client] = set()
        listener.setblocking(False)  # noqa: FBT003  the socket's own signature
        try:
            session.poller.attach(listener.fileno(), IN, self)
        except BaseException:
            listener.close()
            raise

    def close(self) -> None:
        """Stop listening and reset all connections; idempotent."""
        with self.lock:
            listener, self._listener = self._listener, None
            if listener is None:
                return
            self.session.poller.detach(listener.fileno())
            with suppress(OSError):  # a forked process may hold the listener open
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
            for client in list(self._clients):
                client.reset()

    def session_ended(self) -> None:
        """Do what `close` does."""
        self.close()

    def ready(self, events: int) -> None:  # noqa: ARG002  the protocol's signature
        """Accept waiting connections, a limited number at a time."""
        with self.lock:
            for _ in range(_AT_ONCE):
                if self._listener is None or not self._take(self._listener):
                    return

    def forget(self, client: _Client) -> None:
        """Drop a connection that has ended. The lock is held."""
        self._clients.discard(client)

    def _take(self, listener: Socket) -> bool:
        """Accept one connection. Return whether another one may wait."""
        try:
            connection, _ = listener.accept()
        except OSError as error:
            if error.errno in _NO_DESCRIPTOR:
                self.report_fault("waits", str(error.strerror))
                self.session.poller.rest(listener.fileno(), IN)
                return False
            return error.errno == errno.ECONNABORTED
        try:
            client = _Client(self, connection)
        except (OSError, FcvmError) as error:
            self.report_fault("was reset", str(error))
            reset(connection)
        else:
            self._clients.add(client)
            client.ready(IN)  # send the bytes that have come along
        return True


class _Client:
    """A client's connection and its stream into the guest. Each half ends by itself; an error of one resets both.

    The client's first bytes go out together with the opening of the stream, so that the guest is woken once. Callers of
    all methods hold the port's lock, or the method takes it.
    """

    def __init__(self, port: ServedPort, connection: Socket) -> None:
        self._port, self._socket = port, connection
        self._waiting: memoryview | None = None  # bytes of the guest that the client does not take yet
        self._connected = self._client_eof = self._guest_eof = self._over = False
        self._wanted, self._rests = IN, False
        connection.setblocking(False)  # noqa: FBT003  the socket's own signature
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        opening = Opening(
            kind=StreamKind.CONNECT,
            what=f"connect to port {port.guest_port}",
            fields=[(FieldTag.PORT, port.guest_port), (FieldTag.PROTO, "tcp")],
        )
        self._stream = port.session.open(opening)
        self._stream.watch(self._on_stream)
        try:
            self._attach(IN)
        except BaseException:
            self._stream.abandon(errno.ECONNRESET)
            raise

    def ready(self, events: int) -> None:
        """Handle events of the client's socket."""
        with self._port.lock, self._resetting_on_error():
            if self._over:
                return
            if events & ERROR:
                raise ConnectionResetError
            if events & OUT:
                self._copy_to_client()
            self._copy_to_guest()
            self._settle()
            if events & HANG_UP and not (self._over or self._stream.room()):
                self._rest()

    def session_ended(self) -> None:
        """Reset the client."""
        self.reset()

    def reset(self) -> None:
        """Reset the client's connection and the guest's; idempotent."""
        with self._port.lock:
            if not self._over:
                self._stream.abandon(errno.ECONNRESET)
                self._end()
                reset(self._socket)

    def _on_stream(self) -> None:
        with self._port.lock, self._resetting_on_error():
            if self._over:
                return
            if self._connected or self._has_reply():
                self._copy_to_client()
            self._settle()  # also before the reply: the agent takes the first bytes before the socket is connected
            if self._rests and self._stream.room():
                self._rests = False
                self._attach(self._wanted)

    def _rest(self) -> None:
        """Ignore a client that has hung up, and so is always ready, until the guest takes the rest of its bytes."""
        self._rests = True
        self._port.session.poller.detach(self._socket.fileno())

    def _attach(self, events: int) -> None:
        self._port.session.poller.attach(self._socket.fileno(), events, self)

    def _has_reply(self) -> bool:
        reply = self._stream.poll_reply()
        if reply and reply[0]:
            refused = reply[0] == errno.ECONNREFUSED
            self._port.report_fault("was reset", NO_LISTENER if refused else reply[1])
            raise OSError(*reply)
        self._connected = reply is not None
        return self._connected

    def _copy_to_guest(self) -> None:
        """Copy bytes of the client, as many as the guest takes."""
        while not self._client_eof and (room := self._stream.room()):
            try:
                data = self._socket.recv(room)
            except BlockingIOError:
                return
            if data:
                self._stream.write(data, _NOW)
            else:
                self._stream.write_eof()
                self._client_eof = True

    def _copy_to_client(self) -> None:
        """Copy bytes of the guest, as many as the client takes."""
        while not self._guest_eof:
            data = self._waiting if self._waiting is not None else self._stream.read_now(0)
            self._waiting = None
            if data is None:
                return
            if not data:
                self._socket.shutdown(socket.SHUT_WR)
                self._guest_eof = True
            elif (sent := self._send(data)) < len(data):
                self._waiting = data[sent:]
                return

    def _send(self, data: memoryview) -> int:
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0

    def _settle(self) -> None:
        """Close the connection if both halves have ended, else wait for the next events."""
        if self._client_eof and self._guest_eof:
            self._end()
            self._socket.close()
            return
        reads = not self._client_eof and self._stream.room()
        wanted = (IN if reads else 0) | (OUT if self._waiting is not None else 0)
        if wanted != self._wanted:
            self._wanted = wanted
            self._port.session.poller.change(self._socket.fileno(), wanted)

    def _end(self) -> None:
        self._over = True
        self._port.session.poller.detach(self._socket.fileno())
        self._port.forget(self)

    @contextmanager
    def _resetting_on_error(self) -> Iterator[None]:
        """Reset both connections after an error of one."""
        try:
            yield
        except (OSError, FcvmError):
            self.reset()
