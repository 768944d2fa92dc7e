"""What the VMs of some engines can do, and those of other engines cannot.

Each ability is a Protocol. The functions ask a VM for one, and raise what to do about a missing ability.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Protocol, cast, runtime_checkable

from pytest_fcvm.engine.protocol import PreparedVm, Vm
from pytest_fcvm.errors import EngineError

__all__ = [
    "CanRewind",
    "HasBalloon",
    "HasLatencies",
    "HasLinkState",
    "HasMetadata",
    "RewindDiffers",
    "as_rewindable",
    "balloon_of",
    "latencies_of",
    "metadata_of",
    "set_link",
]


class RewindDiffers(EngineError):
    """A rewound VM is not as its snapshot. The message names what differs."""


@runtime_checkable
class CanRewind(Protocol):
    """A VM that can be put back to its snapshot inside its VMM process, to run as another clone."""

    def can_rewind(self) -> bool:
        """Say whether `rewind` would put back everything that a test can have changed in this VM."""
        ...

    def halt(self) -> None:
        """Stop the guest's CPUs, without a wait until they have stopped. Raise EngineError."""
        ...

    def rewind(self, name: str, *, verifies: bool = False) -> PreparedVm:
        """Put the VM back to its snapshot, and return it as the VM `name`, which waits for `start`.

        This object is at its end then: all its methods raise, and its callbacks are not called. Raise EngineError when
        the VMM refuses, or does not answer in time; kill the VM then. With `verifies`, compare the guest's memory and
        devices with the snapshot, and raise RewindDiffers.
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


@cache
def _has(kind: type, ability: type) -> bool:
    """Say whether VMs of a class have an ability. Without the cache this takes 0.1 ms, several times for each clone."""
    return issubclass(kind, ability)


def as_rewindable(vm: Vm) -> CanRewind | None:
    """Return a VM that can be rewound as it is now, None for any other."""
    if not _has(type(vm), CanRewind):
        return None
    rewindable = cast(CanRewind, vm)
    return rewindable if rewindable.can_rewind() else None


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
    return cast(HasLatencies, vm).latencies() if _has(type(vm), HasLatencies) else {}
