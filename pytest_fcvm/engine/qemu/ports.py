"""A clone's guest ports on the host: slirp forwards them, and says which free ports it took."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterable

from pytest_fcvm.engine.qemu.command import USER_NETDEV, forward_rule
from pytest_fcvm.engine.qemu.monitor import Monitor
from pytest_fcvm.errors import EngineError, HostError
from pytest_fcvm.host.listening import why_no_listener
from pytest_fcvm.model.net import Endpoint, Proto, PublishedPort

__all__ = ["Forwards", "explain_refused_rule", "parse_forwards"]

# One line of `info usernet` per listener: "  TCP[HOST_FORWARD]  14  127.0.0.1 35601  10.0.2.15  80  0  0".
_LISTENER = re.compile(r"^\s*(TCP|UDP)\[HOST_FORWARD\]\s+\d+\s+(\S+)\s+(\d+)\s+\S+\s+(\d+)\s", re.MULTILINE)
_RULE = re.compile(r"host forwarding rule '(tcp|udp):([^']*):(\d+)-[^']*:(\d+)'")


class Forwards:
    """The mapped ports of one clone. The ports that slirp chose are read back when somebody first asks."""

    def __init__(self, monitor: Monitor, ports: Iterable[PublishedPort]) -> None:
        self._monitor = monitor
        self._lock = threading.RLock()
        self._asked = {(port.proto, port.guest_port): port for port in ports}
        self._known = {
            key: Endpoint(_reachable(port.host_ip), port.host_port)
            for key, port in self._asked.items()
            if port.host_port
        }

    def find(self, guest_port: int, proto: Proto) -> Endpoint | None:
        """Return the mapping of a guest port if it has one."""
        key = (proto, guest_port)
        with self._lock:
            if key in self._asked and key not in self._known:
                self._read_back()
            return self._known.get(key)

    def add(self, port: PublishedPort) -> Endpoint:
        """Map one more guest port, or at one more host port. Raise HostError when that cannot be had."""
        with self._lock:
            found = self.find(port.guest_port, port.proto)
            wants_another = port.host_port and found != (_reachable(port.host_ip), port.host_port)
            return self._add(port) if found is None or wants_another else found

    def _add(self, port: PublishedPort) -> Endpoint:
        answer = self._ask(f"hostfwd_add {USER_NETDEV} {forward_rule(port)}")
        if answer.strip():
            raise _refused(port, answer)
        self._asked[port.proto, port.guest_port] = port
        if port.host_port:
            self._known[port.proto, port.guest_port] = Endpoint(_reachable(port.host_ip), port.host_port)
        endpoint = self.find(port.guest_port, port.proto)
        if endpoint is None:
            raise EngineError(f"QEMU mapped guest port {port.guest_port}/{port.proto} and does not list it")
        return endpoint

    def _read_back(self) -> None:
        listed = parse_forwards(self._ask("info usernet"))
        for key in self._asked.keys() - self._known.keys():
            if key in listed:
                self._known[key] = listed[key]

    def _ask(self, line: str) -> str:
        # There is no QMP command for slirp; the answer of the human monitor is empty on success.
        return str(self._monitor.execute("human-monitor-command", {"command-line": line}) or "")


def parse_forwards(table: str) -> dict[tuple[Proto, int], Endpoint]:
    """Read `info usernet`: guest port to where it is reached on the host."""
    return {
        (Proto(proto.lower()), int(guest_port)): Endpoint(_reachable(host_ip), int(host_port))
        for proto, host_ip, host_port, guest_port in _LISTENER.findall(table)
    }


def explain_refused_rule(log: str) -> HostError | None:
    """Return the error for a VMM whose log says that it could not listen on a host port, else None."""
    match = _RULE.search(log)
    if match is None:
        return None
    proto, host_ip, host_port, guest_port = match.groups()
    port = PublishedPort(
        guest_port=int(guest_port), host_port=int(host_port), host_ip=host_ip or "127.0.0.1", proto=Proto(proto)
    )
    return _refused(port, log)


def _refused(port: PublishedPort, words: str) -> HostError:
    kind = socket.SOCK_STREAM if port.proto is Proto.TCP else socket.SOCK_DGRAM
    reason = why_no_listener(port.host_ip, port.host_port, kind) or words.strip()
    where = f"{port.host_ip}:{port.host_port}/{port.proto}"
    return HostError(
        f"guest port {port.guest_port} cannot be published on {where}: {reason}",
        hint=f"publish another host port, or 0 for a free one (--fcvm-publish 0:{port.guest_port})",
    )


def _reachable(host_ip: str) -> str:
    return "127.0.0.1" if host_ip in ("", "*", "0.0.0.0") else host_ip  # noqa: S104 - where to connect, not where to listen
