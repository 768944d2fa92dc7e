"""VMs in network namespaces of their own, and connections into them."""

from __future__ import annotations

import socket
from collections.abc import Callable

from pytest_fcvm.errors import UsageProblem
from pytest_fcvm.model.net import Namespace
from pytest_fcvm.model.specs import NetworkSpec
from pytest_fcvm.network.links import SocketStream
from pytest_fcvm.network.ports.datagrams import SocketDatagrams

__all__ = ["OpenNamespace", "base_namespace", "connect", "connect_datagrams", "no_namespaces", "prepare_in_namespace"]

OpenNamespace = Callable[[bool, NetworkSpec], Namespace]


def no_namespaces(_joined: bool, _network: NetworkSpec) -> Namespace:
    """Raise UsageProblem."""
    raise UsageProblem("this process makes no network namespaces")


def connect(namespace: Namespace, port: int) -> SocketStream:
    """Connect to a TCP port of the guest, through its card. Raise OSError."""
    return SocketStream(namespace.connect(port, socket.SOCK_STREAM))


def connect_datagrams(namespace: Namespace, port: int) -> SocketDatagrams:
    """Connect to a UDP port of the guest, through its card. Raise OSError."""
    return SocketDatagrams(namespace.connect(port, socket.SOCK_DGRAM))
