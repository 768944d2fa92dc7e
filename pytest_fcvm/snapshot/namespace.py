"""The network namespaces of bases and clones: which VM gets one, and when it ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from pytest_fcvm.engine.protocol import PreparedVm, RestorePlan
from pytest_fcvm.model.net import Namespace
from pytest_fcvm.network.netns.attach import OpenNamespace
from pytest_fcvm.snapshot.inputs import SnapshotInputs

__all__ = ["base_namespace", "prepare_in_namespace"]


@contextmanager
def base_namespace(inputs: SnapshotInputs, open_namespace: OpenNamespace) -> Iterator[Namespace | None]:
    """Yield a namespace for a base that has egress or whose VMM opens its NICs by name, None for others."""
    network, joins = inputs.network, inputs.engine.joins_namespaces
    if not (network.mode.uses_netns and (network.egress or joins)):
        yield None
        return
    namespace = open_namespace(joins, network)
    try:
        yield namespace
    finally:
        namespace.close()


def prepare_in_namespace(inputs: SnapshotInputs, plan: RestorePlan, open_namespace: OpenNamespace) -> PreparedVm:
    """Spawn a clone's VMM. Where its network wants a namespace, that ends with the VMM."""
    if not inputs.network.mode.uses_netns:
        return inputs.engine.prepare(plan)
    namespace = plan.namespace or open_namespace(inputs.engine.joins_namespaces, inputs.network)
    try:
        vm = inputs.engine.prepare(replace(plan, namespace=namespace))
    except BaseException:
        namespace.close()
        raise
    vm.on_exit(lambda _: namespace.close())
    return vm
