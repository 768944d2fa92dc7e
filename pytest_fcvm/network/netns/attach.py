"""VMs in network namespaces of their own, and connections into them."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from pytest_fcvm.engine.protocol import RestorePlan, Vm
from pytest_fcvm.errors import UsageProblem
from pytest_fcvm.model.net import Namespace
from pytest_fcvm.model.specs import NetworkSpec
from pytest_fcvm.network.links import SocketStream
from pytest_fcvm.network.ports.datagrams import SocketDatagrams
from pytest_fcvm.snapshot.inputs import Ingredients

__all__ = ["Enclose", "connect", "connect_datagrams", "enclosed_base", "no_enclosure", "prepare_enclosed"]

Enclose = Callable[[bool, NetworkSpec], Namespace]


def no_enclosure(_joined: bool, _network: NetworkSpec) -> Namespace:
    """Raise UsageProblem."""
    raise UsageProblem("this process makes no network namespaces")


@contextmanager
def enclosed_base(parts: Ingredients, enclose: Enclose) -> Iterator[Namespace | None]:
    """Yield a namespace for a base: where it is to reach outside, or its VMM opens its cards by name."""
    network, joins = parts.network, parts.engine.joins_namespaces
    if not (network.mode.is_enclosed and (network.egress or joins)):
        yield None
        return
    namespace = enclose(joins, network)
    try:
        yield namespace
    finally:
        namespace.close()


def prepare_enclosed(parts: Ingredients, plan: RestorePlan, enclose: Enclose) -> Vm:
    """Spawn a clone's VMM, in a namespace that lasts as long as it where its network wants one."""
    if not parts.network.mode.is_enclosed:
        return parts.engine.prepare(plan)
    namespace = plan.namespace or enclose(parts.engine.joins_namespaces, parts.network)
    try:
        vm = parts.engine.prepare(replace(plan, namespace=namespace))
    except BaseException:
        namespace.close()
        raise
    vm.on_exit(lambda _: namespace.close())
    return vm


def connect(namespace: Namespace, port: int) -> SocketStream:
    """Connect to a TCP port of the guest, through its card. Raise OSError."""
    return SocketStream(namespace.connect(port, socket.SOCK_STREAM))


def connect_datagrams(namespace: Namespace, port: int) -> SocketDatagrams:
    """Connect to a UDP port of the guest, through its card. Raise OSError."""
    return SocketDatagrams(namespace.connect(port, socket.SOCK_DGRAM))
