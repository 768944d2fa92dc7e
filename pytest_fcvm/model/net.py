"""Ports and addresses as every layer speaks of them."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

__all__ = ["PROBE_PORT", "Attachment", "Endpoint", "Namespace", "Proto", "PublishedPort"]


PROBE_PORT = 1  # tcpmux: nothing listens there, and where something does its greeting is an answer as well


class Proto(StrEnum):
    """The transport of a mapped port."""

    TCP = "tcp"
    UDP = "udp"


class Endpoint(NamedTuple):
    """Where a client on the host reaches a port of the guest; unpacks into `host, port`."""

    host: str
    port: int

    @property
    def netloc(self) -> str:
        """Return both as a URL has them, an IPv6 address in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, kw_only=True)
class Attachment:
    """A clone's end of a private network: a datagram socket for Ethernet frames, and who the clone is on it.

    There is no `end` where the VM's card has a wire of its own.
    `addresses` (IPv4 and IPv6) have a prefix length, `hosts` are lines of /etc/hosts for all names on the network.
    """

    end: socket.socket | None
    mac: str
    addresses: tuple[str, ...]
    hosts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Namespace:
    """A network namespace of one VM. Its descriptors are its own, and are closed by `close`.

    `net` is the namespace, `user` the user namespace that has rights over it, where it takes one. Its VMM runs in it
    and opens the cards' taps by name; or it gets the first card's, `tap`. `wires` carry the frames of the other cards.
    `connect(port, kind)` returns a socket connected to a port of the guest (`kind` as socket.socket takes it).
    """

    net: int
    user: int | None
    tap: int | None
    wires: tuple[int, ...]
    connect: Callable[[int, int], socket.socket]
    close: Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class PublishedPort:
    """A guest port mapped to the host; `host_port` 0 lets the host choose a free one."""

    guest_port: int
    host_port: int = 0
    host_ip: str = "127.0.0.1"
    proto: Proto = Proto.TCP
