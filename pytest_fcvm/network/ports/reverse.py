"""Reverse port forwarding: the agent listens in the guest, and each connection goes to 127.0.0.1 of this host."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from pytest_fcvm.errors import FcvmError
from pytest_fcvm.host.sockets import connect
from pytest_fcvm.network.links import ByteStream, Links, MakeThread

__all__ = ["ReversePorts"]

_THREAD = "fcvm-host-port"
_CONNECT_S = 10.0


class ReversePorts:
    """The ports of this host that one VM may use. For each, a thread waits for the guest's next connection.

    `accept` returns the guest's next connection to a port, and raises when there will be none.
    """

    def __init__(self, accept: Callable[[int], ByteStream], ports: Iterable[int], make_thread: MakeThread) -> None:
        self._accept, self._make_thread = accept, make_thread
        self._links = Links(make_thread)
        self._over = threading.Event()
        self.fault = ""  # why a connection from the guest was last refused
        try:
            for port in ports:
                make_thread(self._serve, port, name=_THREAD).start()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Reset all connections. The threads that wait end with the VM. Idempotent."""
        self._over.set()
        self._links.close()

    def _serve(self, port: int) -> None:
        while not self._over.is_set():
            try:
                guest = self._accept(port)
            except (OSError, FcvmError) as error:
                if not self._over.is_set():
                    self.fault = f"host port {port} is unavailable in the guest: {error}"
                return
            if self._over.is_set():
                guest.reset()
                guest.close()
                return
            try:
                self._make_thread(self._join, guest, port, name=_THREAD).start()
            except (RuntimeError, FcvmError) as error:
                self._refuse(guest, port, error)

    def _refuse(self, guest: ByteStream, port: int, error: Exception) -> None:
        self.fault = f"a connection from the guest to host port {port} was reset: {error}"
        guest.reset()
        guest.close()

    def _join(self, guest: ByteStream, port: int) -> None:
        try:
            server = connect(("127.0.0.1", port), timeout_s=_CONNECT_S)
        except OSError as error:
            self.fault = f"a connection from the guest to host port {port} was reset: {error.strerror or error}"
            guest.reset()
            guest.close()
            return
        server.settimeout(None)
        self._links.join(server, guest)
