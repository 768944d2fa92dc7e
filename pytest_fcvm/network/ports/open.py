"""Where the ports of a machine lead: to the guest's card in a network namespace, or through the guest's agent."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

from pytest_fcvm.clone.running import RunningVm
from pytest_fcvm.host.threads import ServiceThread
from pytest_fcvm.model.net import Endpoint, Namespace, PublishedPort
from pytest_fcvm.network.addresses import HOST_ADDRESS
from pytest_fcvm.network.netns.attach import connect, connect_datagrams
from pytest_fcvm.network.ports.relay import Dialled, Relay, Serve
from pytest_fcvm.network.ports.reverse import ReversePorts

__all__ = ["Ports", "open_ports", "open_reverse_ports"]

_CALL_S = 60.0


class Ports:
    """The ports of a machine on the host.

    In a network namespace they go to the guest's card. Everywhere else they go through the agent, QEMU's own network
    too: that one keeps two connections waiting, and lets the next client try again after a second.
    """

    def __init__(self, running: RunningVm) -> None:
        agent, namespace = running.agent, running.vm.namespace
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
        """Return why a connection was last reset before it stood, if one was."""
        return self._relay.fault

    def close(self) -> None:
        """Stop listening and end what goes through the agent; idempotent."""
        self._relay.close()


def _dial_in(namespace: Namespace) -> Serve:
    return lambda listener, port, tell_fault: Dialled(
        partial(connect, namespace, port), ServiceThread, listener, tell_fault
    )


def open_ports(running: RunningVm, published: Iterable[PublishedPort] = ()) -> Ports:
    """Give a machine its ports, which it closes, and map those at once that are published."""
    running.publisher = ports = Ports(running)
    running.add_cleanup([ports.close])
    running.add_evidence("ports", lambda: ports.fault)
    for port in published:
        ports.publish(port)
    return ports


def open_reverse_ports(running: RunningVm, numbers: Sequence[int]) -> None:
    """Let a machine's programs reach ports of this host, until it ends."""
    if numbers:
        ports = ReversePorts(lambda port: running.agent.accept(port, HOST_ADDRESS), numbers, ServiceThread)
        running.add_cleanup([ports.close])
        running.add_evidence("host ports", lambda: ports.fault)
