"""A running VM as a test holds it."""

from pytest_fcvm.clone.clone import Clone, Snapshot
from pytest_fcvm.clone.guest import Guest
from pytest_fcvm.clone.log import WorkloadLog
from pytest_fcvm.clone.running import RunningVm

__all__ = ["Clone", "Guest", "RunningVm", "Snapshot", "WorkloadLog"]
