"""Network namespaces for the VMs of this process, made by a program of their own when the first is asked for."""

from __future__ import annotations

import itertools
import json
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

from pytest_fcvm.engine.post_mortem import read_tail
from pytest_fcvm.errors import EngineError, HostError
from pytest_fcvm.host.own import os
from pytest_fcvm.host.sockets import Socket
from pytest_fcvm.host.supervisor.protocol import Child, Spawner, start_program
from pytest_fcvm.model.net import Namespace
from pytest_fcvm.model.specs import NetworkMode, NetworkSpec
from pytest_fcvm.network.netns import server as router
from pytest_fcvm.network.netns.egress import SLIRP_RESOLVER, find_resolver, resolve_allowed, start_slirp
from pytest_fcvm.network.netns.server import GUEST

__all__ = ["Namespaces"]

_ANSWER_S = 30.0
_CONNECT_S = 60.0
_DESCRIPTORS = 8
_HINT = "use --fcvm-network user or relay, which take no rights; `fcvm doctor` says what works"
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
    """Makes network namespaces for VMs. They are gone when this process is. Every method may be called by any thread.

    As an ordinary user it takes a user namespace, in which everything is done.
    """

    def __init__(self, spawner: Spawner) -> None:
        self._spawner = spawner
        self._lock = threading.Lock()
        self._child: Child | None = None
        self._control: socket.socket | None = None
        self._user: int | None = None
        self._owned = ExitStack()
        self._requests = itertools.count(1)
        self._log = Path()

    def open(self, network: NetworkSpec, *, joined: bool) -> Namespace:
        """Make a namespace with the cards of one VM, which it opens by name where it is to be `joined`.

        Raise HostError, with what to do, where none can be had.
        """
        owned = ExitStack()
        close = _once(owned.close)
        try:
            reply, descriptors = self._ask({"op": "open", "joined": joined, "egress": network.egress}, owned)
            user = None if self._user is None else os.dup(self._user)
            if user is not None:
                owned.callback(os.close, user)
            namespace = Namespace(
                net=descriptors[0],
                user=user,
                tap=None if joined else descriptors[1],
                wires=tuple(descriptors[1:]) if joined else (),
                connect=partial(self._connect, reply["number"]),
                close=close,
            )
            if network.egress:
                self._open_egress(reply["number"], network, namespace, owned)
        except BaseException:
            close()
            raise
        return namespace

    def close(self) -> None:
        """End the program; namespaces of VMs that still run go with them. Idempotent."""
        with self._lock:
            self._child, self._control, self._user = None, None, None
            self._owned.close()

    def _connect(self, number: int, port: int, kind: int) -> socket.socket:
        with ExitStack() as undo:
            _, (descriptor,) = self._ask({"op": "socket", "number": number, "kind": kind}, undo)
            connection = Socket(fileno=os.dup(descriptor))
            try:
                connection.settimeout(_CONNECT_S)
                connection.connect((GUEST, port))
                connection.settimeout(None)
            except BaseException:
                connection.close()
                raise
        return connection

    def _open_egress(self, number: int, network: NetworkSpec, namespace: Namespace, owned: ExitStack) -> None:
        """Let a namespace reach outside; `owned` ends what has to run for it."""
        if network.mode is NetworkMode.BRIDGE:
            if namespace.user is not None:
                raise HostError("the network bridge takes root", hint="use --fcvm-network rootless,egress")
            self._ask({"op": "uplink", "number": number}, owned)
            resolver = find_resolver()
        else:
            owned.callback(start_slirp(self._spawner, namespace).kill)
            resolver = SLIRP_RESOLVER
        allow = resolve_allowed(network.allow)
        self._ask({"op": "filter", "number": number, "resolver": resolver, "allow": allow}, owned)

    def _forget(self, number: int) -> None:
        """Let the program close a namespace. Nobody waits for it: those who hear of a VM's end call this."""
        control = self._control
        if control:
            with suppress(OSError):
                control.send(json.dumps({"op": "close", "number": number}).encode())

    def _ask(self, request: Mapping[str, Any], owned: ExitStack) -> tuple[Any, list[int]]:
        """Return the answer and its descriptors; they and what was made belong to `owned`."""
        with self._lock:
            control, number = self._control or self._start(), next(self._requests)
            try:
                control.send(json.dumps({**request, "id": number}).encode())
            except OSError:
                raise self._died() from None
            return self._hear(control, number, owned)

    def _start(self) -> socket.socket:
        with ExitStack() as owned:
            program = start_program(self._spawner, "namespaces", Path(router.__file__), *sys.path)
            owned.callback(program.close)
            self._log = program.log
            program.control.settimeout(_ANSWER_S)
            _, descriptors = self._hear(program.control, 0, owned)
            self._child, self._control, self._user = program.child, program.control, next(iter(descriptors), None)
            self._owned = owned.pop_all()
        return program.control

    def _hear(self, control: socket.socket, number: int, owned: ExitStack) -> tuple[Any, list[int]]:
        while True:
            with ExitStack() as received:
                said, descriptors, is_whole = self._receive(control, received)
                if said["id"] == number:  # else it is the answer to a call that was interrupted
                    _check(said, is_whole=is_whole)
                    owned.push(received.pop_all())
                    return said, descriptors

    def _receive(self, control: socket.socket, owned: ExitStack) -> tuple[Any, list[int], bool]:
        try:
            data, descriptors, flags, _ = socket.recv_fds(control, 65536, _DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
        except OSError:
            data, descriptors, flags = b"", [], 0
        for descriptor in descriptors:
            owned.callback(os.close, descriptor)
        if not data:
            raise self._died()
        said = json.loads(data)
        if "number" in said:
            owned.callback(self._forget, said["number"])
        return said, descriptors, not flags & socket.MSG_CTRUNC

    def _died(self) -> EngineError:
        if self._child:
            self._child.kill()  # an answer that came later would be taken for another's
        return EngineError("the program of the network namespaces has ended", evidence={"log": read_tail(self._log)})


def _check(said: Mapping[str, Any], *, is_whole: bool) -> None:
    """Raise HostError for what could not be done, or for descriptors that found no room here."""
    if not is_whole:
        raise HostError("no file descriptor is left for a network namespace", hint="raise ulimit -n")
    if said["error"]:
        cause = next((hint for what, hint in _CAUSES.items() if said["error"].startswith(what)), "")
        hint = f"{cause}; or {_HINT}" if cause else _HINT
        raise HostError(f"no network namespace can be had: {said['error']}", hint=hint)


def _once(function: Callable[[], None]) -> Callable[[], None]:
    """Return a function that does something the first time it is called, by whichever thread."""
    lock, there = threading.Lock(), [function]

    def call() -> None:
        with lock:
            todo = there.pop() if there else None
        if todo:
            todo()

    return call
