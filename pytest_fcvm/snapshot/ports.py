"""Where the ports of a machine lead: through its VMM's own network, or through the guest's agent."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

from pytest_fcvm.clone.machine import Machine, Publisher
from pytest_fcvm.host.threads import ServiceThread
from pytest_fcvm.model.net import Endpoint, PublishedPort
from pytest_fcvm.net.host_ports import HostPorts
from pytest_fcvm.net.relay import Relay
from pytest_fcvm.snapshot.addresses import HOST_ADDRESS
from pytest_fcvm.snapshot.enclosed import connect, connect_datagrams

__all__ = ["Ports", "open_host_ports", "open_ports"]

_CALL_S = 60.0


class Ports:
    """The ports of a machine on the host.

    In a network namespace they go to the guest's card. Without a network of the VMM they all go through the agent. With
    one those of UDP do, because QEMU's drops what a guest sends that may reach nothing outside, answers as well; and
    those at IPv6 addresses, at which it cannot listen.
    """

    def __init__(self, machine: Machine, network: Publisher | None) -> None:
        agent, namespace = machine.agent, machine.vm.namespace
        self._network = network
        if namespace:
            self._relay = Relay(partial(connect, namespace), partial(connect_datagrams, namespace), ServiceThread)
            return
        self._relay = Relay(
            lambda port: agent.connect(port, timeout_s=_CALL_S),
            lambda port: agent.connect_datagrams(port, timeout_s=_CALL_S),
            ServiceThread,
        )

    def publish(self, port: PublishedPort) -> Endpoint:
        """Map a port and return where to connect. Idempotent. Raise HostError for a host port that is taken."""
        if self._network is not None and port.is_slirps:
            return self._network.publish(port)
        return self._relay.publish(port)

    @property
    def fault(self) -> str:
        """Return why a connection was last reset by us, if one was; a refusal of the guest's is none."""
        return self._relay.fault

    def close(self) -> None:
        """Stop listening and end what goes through the agent; idempotent."""
        self._relay.close()


def open_ports(machine: Machine, network: Publisher | None, published: Iterable[PublishedPort] = ()) -> Ports:
    """Give a machine its ports, which it closes, and map those at once that its network has not mapped already."""
    machine.publisher = ports = Ports(machine, network)
    machine.also_close([ports.close])
    machine.also_tell("ports", lambda: ports.fault)
    for port in published:
        if network is None or not port.is_slirps:
            ports.publish(port)
    return ports


def open_host_ports(machine: Machine, numbers: Sequence[int]) -> None:
    """Let a machine's programs reach ports of this host, until it ends."""
    if numbers:
        ports = HostPorts(lambda port: machine.agent.accept(port, HOST_ADDRESS), numbers, ServiceThread)
        machine.also_close([ports.close])
        machine.also_tell("host ports", lambda: ports.fault)
