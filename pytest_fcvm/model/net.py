"""Ports, addresses and network attachments, as all layers use them."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol

__all__ = ["NO_LISTENER", "PROBE_PORT", "Attachment", "Endpoint", "Namespace", "Proto", "PublishedPort", "Segment"]


PROBE_PORT = 1  # tcpmux: usually nothing listens there; a greeting from a listener is an answer too
NO_LISTENER = "nothing listens there on IPv4, or only on a loopback address"


class Proto(StrEnum):
    """The transport protocol of a mapped port."""

    TCP = "tcp"
    UDP = "udp"


class Endpoint(NamedTuple):
    """The address at which a client on the host reaches a guest port. Unpacks into `host, port`."""

    host: str
    port: int

    @property
    def netloc(self) -> str:
        """Return `host:port` as in a URL, with an IPv6 address in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, kw_only=True)
class Attachment:
    """The attachment of a clone to a private network.

    `packet_socket` is a datagram socket for Ethernet frames, None if the VM's NIC already has one in its namespace.
    `addresses` (IPv4 and IPv6) have a prefix length. `hosts` are lines of /etc/hosts for all names on the network.
    """

    packet_socket: socket.socket | None
    mac: str
    addresses: tuple[str, ...]
    hosts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Namespace:
    """The network namespace of one VM. `close` closes its descriptors.

    `net` is the namespace, `user` the user namespace that owns it, None if there is none. The VMM runs in the namespace
    and opens the taps of its NICs by name, or gets the tap of the first NIC as the descriptor `tap`. `packet_sockets`
    carry the frames of the other NICs. `connect(port, kind)` returns a socket connected to a guest port; `kind` is a
    socket type, such as SOCK_STREAM.
    """

    net: int
    user: int | None
    tap: int | None
    packet_sockets: tuple[int, ...]
    connect: Callable[[int, int], socket.socket]
    close: Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class PublishedPort:
    """A guest port that is mapped to `host_ip`:`host_port` on the host; `host_port` 0 means any free port."""

    guest_port: int
    host_port: int = 0
    host_ip: str = "127.0.0.1"
    proto: Proto = Proto.TCP


class Segment(Protocol):
    """A private network, as a clone joins it."""

    def plug(self, name: str, socket_fd: int | None = None, /) -> Attachment:
        """Return the attachment of a clone. `socket_fd`, where it is given, carries the frames of its NIC already."""
        ...

    def joined(
        self, name: str, rename: Callable[[tuple[str, ...]], object], set_link: Callable[[bool], object], /
    ) -> None:
        """Register a clone that is up.

        `rename` gets the lines of /etc/hosts for everybody on the network. `set_link` connects or disconnects the NIC.
        """
        ...

    def unplug(self, name: str) -> None:
        """Take a clone off the network."""
        ...
