"""`Clone`: a fresh VM of a snapshot, with its life cycle. Its other verbs are those of `Guest`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, Self

from pytest_fcvm.clone.commands import ExecDefaults
from pytest_fcvm.clone.files import COPY_S
from pytest_fcvm.clone.guest import Guest
from pytest_fcvm.clone.running import RunningVm
from pytest_fcvm.engine.abilities import metadata_of
from pytest_fcvm.engine.disk import freed_error
from pytest_fcvm.errors import GuestError, UsageProblem
from pytest_fcvm.model.guest import ExitStatus
from pytest_fcvm.model.net import PublishedPort, Segment
from pytest_fcvm.model.parse import parse_metadata, parse_size_mib
from pytest_fcvm.model.specs import VmSpec

__all__ = ["Clone", "Snapshot", "StartVm", "TakeSnapshot"]

StartVm = Callable[[tuple[PublishedPort, ...]], RunningVm]
TakeSnapshot = Callable[[RunningVm, str], "Snapshot"]

_CALL_S = 30.0


class Clone(Guest):
    """A VM of one's own, restored from a snapshot. `close` it, or use it as a context manager."""

    def __init__(
        self,
        *,
        name: str,
        spec: VmSpec,
        engine: str,
        defaults: ExecDefaults,
        start: StartVm,
        take_snapshot: TakeSnapshot,
    ) -> None:
        """Start the VM: `start` maps the published ports. `take_snapshot` copies the VM while it runs."""
        super().__init__(name=name, spec=spec, engine=engine, defaults=defaults, running=start(spec.publish))
        self._start, self._take_snapshot = start, take_snapshot
        self._copies = ExitStack()  # snapshots and forks of this clone, which end with it
        self._forks: list[Clone] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: object = None, *_: object) -> None:
        if error:
            self.evidence()  # which waits for what the workload has just printed
        self.close()

    def pause(self) -> None:
        """Stop the guest's CPUs. Calls into the guest are refused until `resume`."""
        self._live().vm.pause()
        self._paused = True

    def resume(self) -> None:
        """Let the guest run on. Its time of day is then the host's, or the snapshot's where the spec says so."""
        self.running.check_process()
        self.running.resume(self.spec.clock)
        self._paused = False

    def inflate_balloon(self, size: str | int, timeout: float = 30) -> int:
        """Take `size` of the guest's free memory in all ("64M"; 0 returns everything); return the MiB that were taken.

        The guest has `timeout` seconds for it. Raise UsageProblem for a spec without a `balloon`.
        """
        self._check_has("balloon", self.spec.balloon)
        return self._live().inflate_balloon(parse_size_mib(size) if size else 0, timeout)

    def set_metadata(self, data: Mapping[str, Any]) -> None:
        """Replace what the guest reads at http://169.254.169.254. Raise UsageProblem for a spec without `metadata`."""
        self._check_has("metadata", self.spec.metadata is not None)
        metadata_of(self._live().vm).set_metadata(parse_metadata(data, Path()))

    def stop(self, timeout: float = 30) -> ExitStatus:
        """Send the workload the stop signal of its image, and return how the workload ended. The guest runs on.

        Raise GuestTimeout when the workload has not ended after `timeout` seconds.
        """
        (agent := self._live().agent).stop(self._defaults.stop_signal, timeout_s=_CALL_S)
        return agent.wait_until_workload_exit(timeout)

    def kill(self) -> None:
        """Cut the power. The disk of a clone that has one stays until `close`, for `disk_image`.

        What the guest had synced is on the disk. What it had not synced may be lost.
        """
        self.close_clients()
        self.running.discard()

    def snapshot(self, name: str = "") -> Snapshot:
        """Return a snapshot of the clone as it is now, with processes and memory. The clone runs on.

        The workload is frozen for some hundredths of a second. Clones of the snapshot find their connections to the
        outside reset; commands that `popen` started run on there without their streams. The snapshot ends with this
        clone, or by its `close`.
        """
        return self._copies.enter_context(self._take_snapshot(self._live(), name))

    def fork(self, count: int = 1) -> list[Clone]:
        """Return clones of this clone as it is now. It runs on; they end with it at the latest."""
        with ExitStack() as owned:
            copied = owned.enter_context(self.snapshot())
            made = [owned.enter_context(copied.clone()) for _ in range(count)]
            self._copies.push(owned.pop_all())
        self._forks += made
        return made

    @property
    def forks(self) -> tuple[Clone, ...]:
        """Return the clones that `fork` has returned."""
        return tuple(self._forks)

    def disk_image(self, dest: str | Path) -> None:
        """Save the disk as a sparse file, after a sync where the clone runs.

        The file is an ext4 file system: `upper` has what the guest wrote over its image, `volumes` what is in the
        image's volumes. Raise GuestError for a clone without a disk.
        """
        disk = self.running.vm.disk
        if disk is None:
            raise GuestError(f"{self.name} has no disk", hint="give it one: disk=SIZE, --fcvm-disk SIZE")
        if self.running.kept:
            raise freed_error()
        if not self.running.closed:
            self._live().agent.sync(timeout_s=COPY_S)
        disk.save(Path(dest))

    def reset(self) -> None:
        """Replace the VM by a fresh one of the same snapshot, behind the same host ports."""
        self.running.close()
        self.running.wait_until_gone(_CALL_S)
        self._paused = False
        self.running = self._start(tuple(self._mapped.values()))

    def close(self) -> None:
        """End the clone with its snapshots and forks. Nothing of it is left. Idempotent."""
        with ExitStack() as last:
            last.callback(self._free_disk)
            last.callback(self.running.close)
            last.callback(self.close_clients)
            self._copies.close()

    def _free_disk(self) -> None:
        if self.running.vm.disk and not self.running.kept:
            self.running.vm.disk.close()

    def _check_has(self, what: str, has: bool) -> None:
        if not has:
            raise UsageProblem(f"{self.name} has no {what}", hint=f"give its spec {what} to begin with")


class Snapshot(Protocol):
    """A ready, frozen VM, from which clones are made."""

    key: str
    spec: VmSpec
    facts: Mapping[str, Any]

    @property
    def engine(self) -> str:
        """Return the name of the engine that runs its clones."""
        ...

    def clone(
        self,
        *,
        name: str | None = None,
        publish: tuple[PublishedPort, ...] | None = None,
        networks: Sequence[Segment] = (),
    ) -> Clone:
        """Start a clone and return it when its service answers. Use it as a context manager, or close it.

        Only what the snapshot does not depend on can be chosen: the name, the published ports and the private networks.
        A clone that chooses none may come from the pool. Raise HostError without room for one more clone, EngineError
        or GuestError when it does not start, UsageProblem for more networks than the engine has NICs for.
        """
        ...

    def logs(self) -> str:
        """Return what the workload printed before the snapshot was taken."""
        ...

    def close(self) -> None:
        """Release what is kept ready for the next clone; running clones run on. Idempotent.

        A snapshot of a running clone is deleted: it makes no further clones.
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...
