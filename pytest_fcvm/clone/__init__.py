"""A live machine as a test holds it."""

from pytest_fcvm.clone.clone import Clone
from pytest_fcvm.clone.log import WorkloadLog
from pytest_fcvm.clone.running import RunningVm

__all__ = ["Clone", "RunningVm", "WorkloadLog"]
