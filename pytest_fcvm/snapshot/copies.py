"""The warm path: a running clone is parked, copied and let go on; the copy is a snapshot like any other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pytest_fcvm.clone.running import RunningVm, clock_source
from pytest_fcvm.guest.frames import new_secret
from pytest_fcvm.host.clock import monotonic
from pytest_fcvm.host.libc import real_time_ns
from pytest_fcvm.model.specs import ReadyMode, ReadySpec
from pytest_fcvm.snapshot.builder import BASE_LOG, snapshot_files
from pytest_fcvm.snapshot.inputs import SnapshotInputs

__all__ = ["as_copied", "copy_running"]

_CALL_S = 60.0


def as_copied(parts: SnapshotInputs) -> SnapshotInputs:
    """Return what a copy is made of: in the state it was in, not proven by a condition that may hold no more.

    Its ports are any free ones of the host: those that were wanted are the origin's.
    """
    publish = tuple(replace(port, host_port=0) for port in parts.spec.publish)
    return replace(parts, spec=replace(parts.spec, publish=publish), ready=ReadySpec(mode=ReadyMode.AGENT))


def copy_running(
    running: RunningVm, parts: SnapshotInputs, origin: Mapping[str, Any], directory: Path
) -> dict[str, Any]:
    """Fill a snapshot's directory with what a machine is now, and return its facts.

    `origin` are the facts of the snapshot that the machine is of. Its workload stands still meanwhile, and what is
    asked of its agent waits; nothing of it ends. Raise EngineError, HostError or GuestError.
    """
    started, secret = monotonic(), new_secret()
    with running.copying:
        running.agent.suspend(secret, timeout_s=_CALL_S)
        try:
            running.log.save(directory / BASE_LOG)
            running.vm.save(snapshot_files(directory, parts))
        finally:
            channel = running.vm.channel()
            running.agent.resume_session(channel, clock_source(parts.spec.clock), timeout_s=_CALL_S)
    return {
        "secret": secret.hex(),
        "client_port": origin["client_port"],
        "of_clone": True,
        "timings": {"total_ms": round((monotonic() - started) * 1000, 1)},
        "about": {**parts.about(), "created_s": real_time_ns() // 10**9},
    }
