"""The VMs of ended clones. The next clone of the same snapshot rewinds one of them in place of a new process.

A rewound VM costs a fiftieth of a new one under emulation: its VMM runs already, and has translated the guest's code.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, suppress

from pytest_fcvm.engine.abilities import RewindDiffers, as_rewindable
from pytest_fcvm.engine.protocol import PreparedVm, Vm
from pytest_fcvm.engine.vm import discard, start_or_discard
from pytest_fcvm.errors import FcvmError
from pytest_fcvm.host.admission.admission import NoRoomToPrewarm

__all__ = ["IdleVms"]

_MOST = 4


class IdleVms:
    """The idle VMs of one snapshot, halted. `admit` returns a context that holds the room of one, or raises HostError.

    With `verifies`, each rewind is verified. `rewound` counts the rewinds, `failed` those that did not succeed.
    """

    def __init__(self, admit: Callable[[], AbstractContextManager[object]], *, verifies: bool = False) -> None:
        self._admit, self._verifies = admit, verifies
        self._lock = threading.Lock()
        self._idle: list[tuple[Vm, ExitStack]] = []
        self._closed = False
        self.rewound = self.failed = 0

    @property
    def count(self) -> int:
        """Return how many VMs are idle."""
        return len(self._idle)

    def keep(self, vm: Vm) -> bool:
        """Keep a halted VM and return True, or return False: the caller kills it."""
        if self._closed:
            return False
        with ExitStack() as room, suppress(NoRoomToPrewarm):
            room.enter_context(self._admit())
            with self._lock:
                if not self._closed and len(self._idle) < _MOST:
                    self._idle.append((vm, room.pop_all()))
                    return True
        return False

    def take(self) -> Vm | None:
        """Return an idle VM, which gives its room back, or None."""
        with self._lock:
            if not self._idle:
                return None
            vm, room = self._idle.pop()
        room.close()
        return vm

    def rewind(self, vm: Vm, name: str) -> PreparedVm | None:
        """Put a VM back to its snapshot and let it run as `name`. Return None where that fails. The caller kills `vm`.

        Raise RewindDiffers where rewinds are verified.
        """
        try:
            if rewindable := as_rewindable(vm):
                fresh = start_or_discard(rewindable.rewind(name, verifies=self._verifies))
                self.rewound += 1
                return fresh
        except RewindDiffers:
            raise
        except FcvmError:
            pass
        self.failed += 1
        return None

    def release(self) -> None:
        """Kill all idle VMs."""
        while vm := self.take():
            discard(vm)

    def close(self) -> None:
        """Kill all idle VMs, and keep no further one. Idempotent."""
        with self._lock:
            self._closed = True
        self.release()
