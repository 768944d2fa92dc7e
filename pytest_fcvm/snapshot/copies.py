"""The warm path: a running clone is suspended, copied and resumed. The copy is a snapshot like any other."""

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


def as_copied(inputs: SnapshotInputs) -> SnapshotInputs:
    """Return the inputs of a copy. Its readiness condition is the agent's answer: the original one may hold no longer.

    Its ports are any free ports of the host: the published ones belong to the origin.
    """
    publish = tuple(replace(port, host_port=0) for port in inputs.spec.publish)
    return replace(inputs, spec=replace(inputs.spec, publish=publish), ready=ReadySpec(mode=ReadyMode.AGENT))


def copy_running(
    running: RunningVm, inputs: SnapshotInputs, origin: Mapping[str, Any], directory: Path
) -> dict[str, Any]:
    """Fill a snapshot's directory with a VM as it is now, and return the snapshot's facts.

    `origin` are the facts of the VM's own snapshot. The workload is frozen and calls to its agent wait until the copy
    is there. Raise EngineError, HostError or GuestError.
    """
    started, secret = monotonic(), new_secret()
    with running.copying:
        running.agent.suspend(secret, timeout_s=_CALL_S)
        try:
            running.log.save(directory / BASE_LOG)
            running.vm.save(snapshot_files(directory, inputs))
        finally:
            channel = running.vm.channel()
            running.agent.resume_session(channel, clock_source(inputs.spec.clock), timeout_s=_CALL_S)
    return {
        "secret": secret.hex(),
        "client_port": origin["client_port"],
        "of_clone": True,
        "timings": {"total_ms": round((monotonic() - started) * 1000, 1)},
        "about": {**inputs.about(), "created_s": real_time_ns() // 10**9},
    }
