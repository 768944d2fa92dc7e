"""Connections to a guest in a network namespace."""

from __future__ import annotations

import socket
from collections.abc import Callable

from pytest_fcvm.errors import UsageProblem
from pytest_fcvm.model.net import Namespace
from pytest_fcvm.model.specs import NetworkSpec
from pytest_fcvm.network.links import SocketStream
from pytest_fcvm.network.ports.datagrams import SocketDatagrams

__all__ = ["OpenNamespace", "connect", "connect_datagrams", "no_namespaces"]

OpenNamespace = Callable[[bool, NetworkSpec], Namespace]


def no_namespaces(_joined: bool, _network: NetworkSpec) -> Namespace:
    """Raise UsageProblem: the `OpenNamespace` of a process that makes none."""
    raise UsageProblem("this process makes no network namespaces")


def connect(namespace: Namespace, port: int) -> SocketStream:
    """Connect to a TCP port of the guest, through its NIC. Raise OSError."""
    return SocketStream(namespace.connect(port, socket.SOCK_STREAM))


def connect_datagrams(namespace: Namespace, port: int) -> SocketDatagrams:
    """Connect to a UDP port of the guest, through its NIC. Raise OSError."""
    return SocketDatagrams(namespace.connect(port, socket.SOCK_DGRAM))
