"""Network namespaces for the VMs of this process. The netns server, a helper program, makes them."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

from pytest_fcvm.errors import HostError
from pytest_fcvm.host.own import os
from pytest_fcvm.host.sockets import Socket
from pytest_fcvm.host.supervisor.protocol import Spawner
from pytest_fcvm.model.net import Namespace
from pytest_fcvm.model.specs import NetworkMode, NetworkSpec
from pytest_fcvm.network.addresses import GUEST_ADDRESS, SLIRP_RESOLVER
from pytest_fcvm.network.helper import Helper
from pytest_fcvm.network.netns.egress import find_resolver, resolve_allowed, start_slirp

__all__ = ["Namespaces", "refusal"]

_CONNECT_S = 60.0
_HINT = "use --fcvm-network user or relay, which require no privileges; `fcvm doctor` says what works"
_USER_NAMESPACES = (
    "sysctl kernel.apparmor_restrict_unprivileged_userns=0 (Ubuntu) or kernel.unprivileged_userns_clone=1 (Debian), or "
    "be root"
)
_CAUSES = {
    "/dev/net/tun: Permission denied": "sudo chmod 666 /dev/net/tun, as udev does",
    "/dev/net/tun": "modprobe tun, or give the container --device /dev/net/tun",
    "unshare": _USER_NAMESPACES,
    "/proc/self/setgroups": _USER_NAMESPACES,
    "nftables": "apt-get install nftables",
    "ip_forward": "sysctl net.ipv4.ip_forward=1",
}


class Namespaces:
    """Make network namespaces for VMs. The first one starts the netns server, which ends with this process.

    Every method may be called from any thread. Without root, the namespaces belong to a user namespace.
    """

    def __init__(self, spawner: Spawner) -> None:
        self._spawner = spawner
        self._lock = threading.Lock()
        self._server: Helper | None = None
        self._user: int | None = None
        self._owned = ExitStack()

    def open(self, network: NetworkSpec, *, joined: bool) -> Namespace:
        """Make a namespace with the NICs of one VM. With `joined` the VMM runs in it and opens its NICs by name.

        Raise HostError, with what to do, where none can be made.
        """
        server = self._started()
        owned = ExitStack()
        close = _once(owned.close)
        try:
            number, descriptors = server.ask_for(owned, "open", joined=joined, egress=network.egress)
            user = None if self._user is None else os.dup(self._user)
            if user is not None:
                owned.callback(os.close, user)
            namespace = Namespace(
                net=descriptors[0],
                user=user,
                tap=None if joined else descriptors[1],
                packet_sockets=tuple(descriptors[1:]) if joined else (),
                connect=partial(_connect, server, number),
                close=close,
            )
            if network.egress:
                self._open_egress(server, number, network, namespace, owned)
        except BaseException:
            close()
            raise
        return namespace

    def close(self) -> None:
        """End the netns server. A namespace lasts until its VM ends. Idempotent."""
        with self._lock:
            self._server, self._user = None, None
            self._owned.close()

    def _started(self) -> Helper:
        with self._lock:
            self._server = self._server or self._start()
            return self._server

    def _start(self) -> Helper:
        with ExitStack() as owned:
            server = Helper(
                self._spawner,
                "netns.server",
                *sys.path,
                name="netns",
                title="the netns server",
                refusal=refusal,
                undo=lambda number: server.send("close", number=number),
            )
            owned.callback(server.close)
            _, descriptors = server.ask_for(owned, "start")
            self._user = next(iter(descriptors), None)
            self._owned = owned.pop_all()
        return server

    def _open_egress(
        self, server: Helper, number: int, network: NetworkSpec, namespace: Namespace, owned: ExitStack
    ) -> None:
        """Give a namespace egress. `owned` ends what has to run for it."""
        if network.mode is NetworkMode.BRIDGE:
            if namespace.user is not None:
                raise HostError("the network bridge requires root", hint="use --fcvm-network rootless,egress")
            server.ask("uplink", number=number)
            resolver = find_resolver()
        else:
            owned.callback(start_slirp(self._spawner, namespace).kill)
            resolver = SLIRP_RESOLVER
        server.ask("filter", number=number, resolver=resolver, allow=resolve_allowed(network.allow))


def _connect(server: Helper, number: int, port: int, kind: int) -> socket.socket:
    with ExitStack() as owned:
        _, (descriptor,) = server.ask_for(owned, "socket", number=number, kind=kind)
        connection = Socket(fileno=os.dup(descriptor))
        try:
            connection.settimeout(_CONNECT_S)
            connection.connect((GUEST_ADDRESS, port))
            connection.settimeout(None)
        except BaseException:
            connection.close()
            raise
    return connection


def refusal(error: str) -> HostError:
    """Return the error for a request that the netns server could not do, with what to do."""
    cause = next((hint for what, hint in _CAUSES.items() if error.startswith(what)), "")
    hint = f"{cause}; or {_HINT}" if cause else _HINT
    return HostError(f"no network namespace is available: {error}", hint=hint)


def _once(function: Callable[[], None]) -> Callable[[], None]:
    """Return a function that calls another at its first call, in whichever thread."""
    lock, there = threading.Lock(), [function]

    def call() -> None:
        with lock:
            todo = there.pop() if there else None
        if todo:
            todo()

    return call
