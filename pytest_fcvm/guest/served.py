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
from pytest_fcvm.host.sockets import Socket
from pytest_fcvm.network.links import reset
from pytest_fcvm.network.ports.relay import NOBODY

__all__ = ["ServedPort"]

_AT_ONCE = 64  # connections taken before anything else has its turn
_NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_NOW = Deadline(0)


class ServedPort:
    """One port. It takes the listener over; `tell_fault` hears what became of a connection ("was reset"), and why.

    It ends with `close` or with the session: all its connections are reset then.
    """

    def __init__(
        self, session: Session, listener: Socket, guest_port: int, tell_fault: Callable[[str, str], object]
    ) -> None:
        self.guest_port, self.tell_fault = guest_port, tell_fault
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
            with suppress(OSError):  # a forked process may hold it open, and nothing may listen any more
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
            for client in list(self._clients):
                client.reset()

    def session_ended(self) -> None:
        """Do what `close` does."""
        self.close()

    def ready(self, events: int) -> None:  # noqa: ARG002  the protocol's signature
        """Take the connections that wait, some at a time."""
        with self.lock:
            for _ in range(_AT_ONCE):
                if self._listener is None or not self._take(self._listener):
                    return

    def forget(self, client: _Client) -> None:
        """Drop a connection that has ended. The lock is held."""
        self._clients.discard(client)

    def _take(self, listener: Socket) -> bool:
        """Take one connection; say whether there may be another."""
        try:
            connection, _ = listener.accept()
        except OSError as error:
            if error.errno in _NO_DESCRIPTOR:
                self.tell_fault("waits", str(error.strerror))
                self.session.poller.rest(listener.fileno(), IN)
                return False
            return error.errno == errno.ECONNABORTED
        try:
            client = _Client(self, connection)
        except (OSError, FcvmError) as error:
            self.tell_fault("was reset", str(error))
            reset(connection)
        else:
            self._clients.add(client)
            client.ready(IN)  # what has come is sent along
        return True


class _Client:
    """A client's connection and its stream into the guest. Each half ends by itself; a break of one resets both.

    What the client says goes along with the opening of the stream: the guest is then woken once, not twice. All methods
    are called with the port's lock held, or take it.
    """

    def __init__(self, port: ServedPort, connection: Socket) -> None:
        self._port, self._socket = port, connection
        self._waiting: memoryview | None = None  # what the guest said and the client does not take yet
        self._stands = self._said_all = self._heard_all = self._over = False
        self._wanted, self._rests = IN, False
        connection.setblocking(False)  # noqa: FBT003  the socket's own signature
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        opening = Opening(
            kind=StreamKind.CONNECT,
            what=f"connect to port {port.guest_port}",
            fields=[(FieldTag.PORT, port.guest_port), (FieldTag.PROTO, "tcp")],
        )
        self._stream = port.session.open(opening)
        self._stream.watch(self._something_came)
        try:
            self._attach(IN)
        except BaseException:
            self._stream.abandon(errno.ECONNRESET)
            raise

    def ready(self, events: int) -> None:
        """Act on events of the client's socket."""
        with self._port.lock, self._breaks():
            if self._over:
                return
            if events & ERROR:
                raise ConnectionResetError
            if events & OUT:
                self._bring_down()
            self._bring_up()
            self._settle()
            if events & HANG_UP and not (self._over or self._stream.room()):
                self._rest()

    def session_ended(self) -> None:
        """Reset the client."""
        self.reset()

    def reset(self) -> None:
        """End both ends by a reset; idempotent."""
        with self._port.lock:
            if not self._over:
                self._stream.abandon(errno.ECONNRESET)
                self._end()
                reset(self._socket)

    def _something_came(self) -> None:
        with self._port.lock, self._breaks():
            if self._over:
                return
            if self._stands or self._has_reply():
                self._bring_down()
            self._settle()  # without a reply too: the guest takes what was said before its peer speaks
            if self._rests and self._stream.room():
                self._rests = False
                self._attach(self._wanted)

    def _rest(self) -> None:
        """Leave a client alone that has hung up until the guest takes the rest of what it said: it is always ready."""
        self._rests = True
        self._port.session.poller.detach(self._socket.fileno())

    def _attach(self, events: int) -> None:
        self._port.session.poller.attach(self._socket.fileno(), events, self)

    def _has_reply(self) -> bool:
        reply = self._stream.poll_reply()
        if reply and reply[0]:
            refused = reply[0] == errno.ECONNREFUSED
            self._port.tell_fault("was reset", NOBODY if refused else reply[1])
            raise OSError(*reply)
        self._stands = reply is not None
        return self._stands

    def _bring_up(self) -> None:
        """Pass on what the client says, as far as the guest takes it."""
        while not self._said_all and (room := self._stream.room()):
            try:
                data = self._socket.recv(room)
            except BlockingIOError:
                return
            if data:
                self._stream.write(data, _NOW)
            else:
                self._stream.write_eof()
                self._said_all = True

    def _bring_down(self) -> None:
        """Pass on what the guest has said, as far as the client takes it."""
        while not self._heard_all:
            data = self._waiting if self._waiting is not None else self._stream.read_now(0)
            self._waiting = None
            if data is None:
                return
            if not data:
                self._socket.shutdown(socket.SHUT_WR)
                self._heard_all = True
            elif (sent := self._send(data)) < len(data):
                self._waiting = data[sent:]
                return

    def _send(self, data: memoryview) -> int:
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0

    def _settle(self) -> None:
        """End what is over, and wait for what is next."""
        if self._said_all and self._heard_all:
            self._end()
            self._socket.close()
            return
        reads = not self._said_all and self._stream.room()
        wanted = (IN if reads else 0) | (OUT if self._waiting is not None else 0)
        if wanted != self._wanted:
            self._wanted = wanted
            self._port.session.poller.change(self._socket.fileno(), wanted)

    def _end(self) -> None:
        self._over = True
        self._port.session.poller.detach(self._socket.fileno())
        self._port.forget(self)

    @contextmanager
    def _breaks(self) -> Iterator[None]:
        """Reset both ends where one breaks."""
        try:
            yield
        except (OSError, FcvmError):
            self.reset()
