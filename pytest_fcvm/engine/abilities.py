"""What the VMs of some engines can do, and those of other engines cannot.

Each ability is a Protocol: ask a VM by `isinstance`. The functions ask, and raise what to do about a missing ability.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from pytest_fcvm.engine.protocol import PreparedVm, Vm
from pytest_fcvm.errors import EngineError

__all__ = [
    "CanRewind",
    "HasBalloon",
    "HasLatencies",
    "HasLinkState",
    "HasMetadata",
    "balloon_of",
    "latencies_of",
    "metadata_of",
    "set_link",
]


@runtime_checkable
class CanRewind(Protocol):
    """A VM that can be put back to its snapshot inside its VMM process, to run as another clone."""

    @property
    def can_rewind(self) -> bool:
        """Say whether `rewind` would put back everything that a test can have changed in this VM."""
        ...

    def halt(self) -> None:
        """Stop the guest's CPUs, without a wait until they have stopped. Raise EngineError."""
        ...

    def rewind(self, name: str) -> PreparedVm:
        """Put the VM back to its snapshot, and return it as the VM `name`, which waits for `start`.

        This object is at its end then: all its methods raise, and its callbacks are not called. Raise EngineError when
        the VMM refuses, or does not answer in time; kill the VM then.
        """
        ...


@runtime_checkable
class HasBalloon(Protocol):
    """A VM whose balloon can take memory from the guest. The VM's shape must have a balloon, else EngineError."""

    def set_balloon(self, mib: int) -> None:
        """Ask the guest to give `mib` MiB of its memory, in all, to the balloon."""
        ...

    def balloon_mib(self) -> int:
        """Return how many MiB of the guest's memory are in the balloon."""
        ...


@runtime_checkable
class HasMetadata(Protocol):
    """A VM that serves metadata to its guest. The VM's shape must have metadata, else EngineError."""

    def set_metadata(self, data: Mapping[str, Any]) -> None:
        """Serve `data` in place of the plan's metadata."""
        ...


@runtime_checkable
class HasLinkState(Protocol):
    """A VM whose NICs can lose their link."""

    def set_link(self, attachment: int, up: bool) -> None:
        """Set the link of the NIC behind one of the plan's attachments, counted from 0. The guest notices it."""
        ...


@runtime_checkable
class HasLatencies(Protocol):
    """A VM whose VMM reports how long its own work took."""

    def latencies(self) -> Mapping[str, float]:
        """Return ms by the VMM's own names. Never raise, and wait for at most 2 s."""
        ...


def balloon_of(vm: Vm) -> HasBalloon:
    """Return the VM's balloon. Raise EngineError where its engine has none."""
    if not isinstance(vm, HasBalloon):
        raise EngineError(f"VM {vm.name} has no balloon", hint="ask for one: --fcvm-balloon")
    return vm


def metadata_of(vm: Vm) -> HasMetadata:
    """Return the VM's metadata service. Raise EngineError where its engine has none."""
    if not isinstance(vm, HasMetadata):
        raise EngineError(f"VM {vm.name} serves no metadata", hint="give its spec metadata to begin with")
    return vm


def set_link(vm: Vm, attachment: int, up: bool) -> None:
    """Set the link of a NIC, as `HasLinkState.set_link` does. Raise EngineError where the engine cannot."""
    if not isinstance(vm, HasLinkState):
        raise EngineError(
            f"the NICs of VM {vm.name} cannot lose their link",
            hint='use impair("NAME", loss=1), or --fcvm-engine qemu',
        )
    vm.set_link(attachment, up)


def latencies_of(vm: Vm) -> Mapping[str, float]:
    """Return how long the VMM says that its own work took, in ms; empty where it says nothing."""
    return vm.latencies() if isinstance(vm, HasLatencies) else {}
