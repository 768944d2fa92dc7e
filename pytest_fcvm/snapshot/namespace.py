"""The network namespaces of bases and clones: who gets one, and how long it lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from pytest_fcvm.engine.protocol import RestorePlan, Vm
from pytest_fcvm.model.net import Namespace
from pytest_fcvm.network.netns.attach import OpenNamespace
from pytest_fcvm.snapshot.inputs import SnapshotInputs

__all__ = ["base_namespace", "prepare_in_namespace"]


@contextmanager
def base_namespace(parts: SnapshotInputs, open_namespace: OpenNamespace) -> Iterator[Namespace | None]:
    """Yield a namespace for a base: where it is to reach outside, or its VMM opens its cards by name."""
    network, joins = parts.network, parts.engine.joins_namespaces
    if not (network.mode.uses_netns and (network.egress or joins)):
        yield None
        return
    namespace = open_namespace(joins, network)
    try:
        yield namespace
    finally:
        namespace.close()


def prepare_in_namespace(parts: SnapshotInputs, plan: RestorePlan, open_namespace: OpenNamespace) -> Vm:
    """Spawn a clone's VMM, in a namespace that lasts as long as it where its network wants one."""
    if not parts.network.mode.uses_netns:
        return parts.engine.prepare(plan)
    namespace = plan.namespace or open_namespace(parts.engine.joins_namespaces, parts.network)
    try:
        vm = parts.engine.prepare(replace(plan, namespace=namespace))
    except BaseException:
        namespace.close()
        raise
    vm.on_exit(lambda _: namespace.close())
    return vm
