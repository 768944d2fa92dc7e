"""Ports and addresses as every layer speaks of them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

__all__ = ["Endpoint", "Proto", "PublishedPort"]


class Proto(StrEnum):
    """The transport of a mapped port."""

    TCP = "tcp"
    UDP = "udp"


class Endpoint(NamedTuple):
    """Where a client on the host reaches a port of the guest; unpacks into `host, port`."""

    host: str
    port: int


@dataclass(frozen=True, kw_only=True)
class PublishedPort:
    """A guest port mapped to the host; `host_port` 0 lets the host choose a free one."""

    guest_port: int
    host_port: int = 0
    host_ip: str = "127.0.0.1"
    proto: Proto = Proto.TCP
