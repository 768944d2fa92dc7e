"""Ports of a VM: through the guest's NIC where it has a network namespace, else through the guest's agent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Protocol

from pytest_fcvm.guest.agent import Agent
from pytest_fcvm.host.threads import ServiceThread
from pytest_fcvm.model.net import Endpoint, Namespace, PublishedPort
from pytest_fcvm.network.addresses import HOST_ADDRESS
from pytest_fcvm.network.netns.attach import connect, connect_datagrams
from pytest_fcvm.network.ports.relay import Dialled, Relay, Serve
from pytest_fcvm.network.ports.reverse import ReversePorts

__all__ = ["Ports", "Publisher", "VmWithPorts", "open_ports", "open_reverse_ports"]

_CALL_S = 60.0


class Publisher(Protocol):
    """What maps guest ports to the host."""

    def publish(self, port: PublishedPort) -> Endpoint:
        """Map a port and return where to connect."""
        ...


class _Vm(Protocol):
    @property
    def namespace(self) -> Namespace | None:
        """Return the network namespace of the VM, if it has one."""
        ...


class VmWithPorts(Protocol):
    """What ports require of a running VM."""

    publisher: Publisher

    @property
    def vm(self) -> _Vm:
        """Return the engine's VM."""
        ...

    @property
    def agent(self) -> Agent:
        """Return the guest's agent."""
        ...

    def add_cleanup(self, closers: Sequence[Callable[[], object]], /) -> None:
        """Call these when the VM ends."""
        ...

    def add_evidence(self, title: str, text: Callable[[], str], /) -> None:
        """Add a section to the VM's evidence."""
        ...


class Ports:
    """The ports of a VM on the host.

    In a network namespace they lead to the guest's NIC. Everywhere else they go through the agent, also with QEMU's own
    network: that one queues two connections, and drops a third, which its client retries after a second.
    """

    def __init__(self, agent: Agent, namespace: Namespace | None) -> None:
        if namespace:
            self._relay = Relay(_dial_in(namespace), partial(connect_datagrams, namespace), ServiceThread)
        else:
            dial_datagrams = lambda port: agent.connect_datagrams(port, timeout_s=_CALL_S)  # noqa: E731
            self._relay = Relay(agent.serve, dial_datagrams, ServiceThread)

    def publish(self, port: PublishedPort) -> Endpoint:
        """Map a port and return where to connect. Idempotent. Raise HostError for a host port that is taken."""
        return self._relay.publish(port)

    @property
    def fault(self) -> str:
        """Return why a connection was last reset before it was established, "" if none was."""
        return self._relay.fault

    def close(self) -> None:
        """Stop listening and end the connections through the agent. Idempotent."""
        self._relay.close()


def _dial_in(namespace: Namespace) -> Serve:
    return lambda listener, port, report_fault: Dialled(
        partial(connect, namespace, port), ServiceThread, listener, report_fault
    )


def open_ports(running: VmWithPorts, published: Iterable[PublishedPort] = ()) -> Ports:
    """Give a VM its ports, map the published ones at once, and close them when the VM ends."""
    running.publisher = ports = Ports(running.agent, running.vm.namespace)
    running.add_cleanup([ports.close])
    running.add_evidence("ports", lambda: ports.fault)
    for port in published:
        ports.publish(port)
    return ports


def open_reverse_ports(running: VmWithPorts, numbers: Sequence[int]) -> None:
    """Let programs in a VM reach ports of this host, until the VM ends."""
    if numbers:
        ports = ReversePorts(lambda port: running.agent.accept(port, HOST_ADDRESS), numbers, ServiceThread)
        running.add_cleanup([ports.close])
        running.add_evidence("host ports", lambda: ports.fault)
