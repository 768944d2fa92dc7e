"""Admit clones as memory allows, across all pytest processes of this user on this host.

A clone is charged the number of MiB that its caller names, from its admission until the ticket is released or the
process dies. Nothing is measured per clone. A clone is admitted when both conditions hold:

- The memory that is available now (MemAvailable, and what our control groups leave) covers the charge and a reserve for
  the rest of the host. This counts the memory that other programs have taken.
- All charges together fit in the memory that was available before the first clone. This counts the memory that admitted
  clones have not touched yet.

A test that already holds a clone goes before tests without one, so that tests with several clones wait for each other
as little as possible. The deadline ends what waiting remains.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from pytest_fcvm.errors import HostError
from pytest_fcvm.host.admission.memory import HostMemory
from pytest_fcvm.host.admission.reservations import Holder, Reservations, Totals, close_reservations, open_reservations
from pytest_fcvm.host.clock import Deadline, wait_until
from pytest_fcvm.host.own import getpid

__all__ = ["Admission", "NoRoomToPrewarm", "Ticket"]

_DIRECTORY = "admission"
_CAPACITY = "capacity"
_RESERVE_MIB = 256
_NAMED = 3
_OWN_S = 10.0  # the longest wait where this process holds all clones: some may be ending
_RETRY_S = 0.001  # for a lock that is held for 0.2 ms. There is no event for memory that becomes free
_LONGEST_RETRY_S = 0.05
_LOCK_S = 0.05  # for a lock that others hold, before a prewarmed clone is given up


class NoRoomToPrewarm(HostError):
    """There is no room to prewarm a clone. The user need not act."""


@dataclass(kw_only=True)
class _Request:
    mem_mib: int
    holder: str
    first: bool
    queued: bool = False


class Ticket:
    """One clone's share of the memory, a context manager. `release` does nothing in a forked child."""

    def __init__(self, release: Callable[[], None]) -> None:
        self._release = release
        self._owner = getpid()

    def release(self) -> None:
        """Free the memory for other clones. Idempotent."""
        if getpid() == self._owner:
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Admission:
    """Admission of one process's clones. `max_clones` limits the clones of all processes; None is no limit."""

    def __init__(self, run_root: Path, max_clones: int | None = None, *, memory: HostMemory | None = None) -> None:
        self._directory = run_root / _DIRECTORY
        self._max_clones = max_clones
        self._memory = memory or HostMemory()
        self._released = threading.Event()

    def admit(
        self,
        mem_mib: int,
        *,
        holder: str,
        first: bool,
        deadline_s: float,
        on_wait: Callable[[], None] = lambda: None,
    ) -> Ticket:
        """Wait until a clone that is charged `mem_mib` may start, and return its ticket.

        holder: the test's id, for the messages of other processes. first: the test holds no clone yet. on_wait: called
        once before a wait, to release prewarmed clones.
        Raise HostError when the clone can never fit, and at the deadline, with the holders of the memory. Where this
        process holds all `max_clones` clones itself, the deadline is at most 10 s.
        """
        total = self._memory.total_mib()
        if mem_mib > total:
            raise HostError(
                f"a clone of {mem_mib} MiB does not fit in the {total} MiB of this host or its control group",
                hint="give it less memory with --fcvm-mem",
            )
        reservations = self._open_reservations()
        request = _Request(mem_mib=mem_mib, holder=holder, first=first)
        number = self._try(reservations, request)
        if not number:
            on_wait()
            alone = self._max_clones is not None and reservations.own_clones() >= self._max_clones
            number = self._wait(reservations, request, min(deadline_s, _OWN_S) if alone else deadline_s)
        return Ticket(lambda: self._release(reservations, number))

    def admit_prewarmed(self, mem_mib: int, *, holder: str) -> Ticket:
        """Return the ticket for a clone that no test has asked for yet. Such clones may use half of the room.

        Raise NoRoomToPrewarm, at once, where the clone would delay a clone that a test asks for.
        """
        reservations = self._open_reservations()
        number = wait_until(
            lambda: self._try_prewarmed(reservations, holder, mem_mib), Deadline(_LOCK_S), interval_s=_RETRY_S
        )
        if number and number > 0:
            return Ticket(lambda: self._release(reservations, number))
        raise NoRoomToPrewarm("no room to prewarm a clone", hint="--fcvm-pool 0 prewarms none")

    def close(self) -> None:
        """Close the reservations. Admit no clone afterwards; tickets may still be released. Idempotent."""
        close_reservations(self._directory, self)

    def _try_prewarmed(self, reservations: Reservations, holder: str, mem_mib: int) -> int | None:
        """Return the number of the reservation, -1 without room, None while another process holds the lock."""
        with reservations.try_lock() as locked:
            if not locked:
                return None
            return reservations.add(holder, mem_mib) if self._fits_prewarmed(reservations, mem_mib) else -1

    def _open_reservations(self) -> Reservations:
        try:
            return open_reservations(self._directory, self)
        except OSError as error:
            raise HostError(
                f"{self._directory} cannot be used: {error.strerror}",
                hint="set XDG_RUNTIME_DIR to a directory of your own",
            ) from error

    def _try(self, reservations: Reservations, request: _Request) -> int:
        """Return the number of the reservation, 0 when the clone has to wait."""
        with reservations.try_lock() as locked:
            if not locked:
                return 0
            totals = reservations.totals()
            if self._fits(reservations, totals, request):
                return reservations.add(request.holder, request.mem_mib)
            if not (request.first or request.queued):
                reservations.wait_again(1)
                request.queued = True
            return 0

    def _fits(self, reservations: Reservations, totals: Totals, request: _Request) -> bool:
        if request.first and totals.waiting_again:
            return False
        if self._max_clones is not None and totals.clones >= self._max_clones:
            return False
        available = self._memory.available_mib()
        known = reservations.read_note(_CAPACITY) if totals.clones else 0
        capacity = max(known, available)
        if capacity != known:
            reservations.write_note(_CAPACITY, capacity)
        wanted = request.mem_mib + (_RESERVE_MIB if totals.clones else 0)  # the first clone needs no reserve
        return wanted <= available and totals.mem_mib + wanted <= capacity

    def _fits_prewarmed(self, reservations: Reservations, mem_mib: int) -> bool:
        totals = reservations.totals()
        if self._max_clones is not None and 2 * (totals.clones + 1) > self._max_clones:
            return False
        return self._fits(reservations, totals, _Request(mem_mib=totals.mem_mib + 2 * mem_mib, holder="", first=True))

    def _wait(self, reservations: Reservations, request: _Request, deadline_s: float) -> int:
        try:
            number = wait_until(
                lambda: self._try(reservations, request),
                Deadline(deadline_s),
                interval_s=_RETRY_S,
                longest_interval_s=_LONGEST_RETRY_S,
                wake=self._released,
            )
        finally:
            if request.queued:
                reservations.wait_again(-1)
        if not number:
            raise self._refusal(reservations, request, deadline_s)
        return number

    def _release(self, reservations: Reservations, number: int) -> None:
        reservations.release(number)
        self._released.set()

    def _refusal(self, reservations: Reservations, request: _Request, deadline_s: float) -> HostError:
        holders = wait_until(lambda: _list_holders(reservations), Deadline(1.0), interval_s=_RETRY_S) or []
        named = ", ".join(map(str, holders[:_NAMED])) or "no clone of this user"
        more = f" and {len(holders) - _NAMED} more" if len(holders) > _NAMED else ""
        if self._max_clones is not None and reservations.own_clones() >= self._max_clones:
            return HostError(
                f"this process holds all {self._max_clones} clones of --fcvm-max-clones itself; held by {named}{more}",
                hint="raise --fcvm-max-clones, or end a clone before the next one is started",
            )
        limit = f", at most {self._max_clones} clones" if self._max_clones is not None else ""
        return HostError(
            f"no room for a clone of {request.mem_mib} MiB within {deadline_s:g} s "
            f"({self._memory.available_mib()} MiB are available{limit}); held by {named}{more}",
            hint="run fewer workers (-n), give clones less memory (--fcvm-mem) or raise --fcvm-max-clones",
            evidence={"clones on this host": "\n".join(map(str, holders))} if holders else None,
        )


def _list_holders(reservations: Reservations) -> list[Holder] | None:
    with reservations.try_lock() as locked:
        return reservations.holders() if locked else None
