"""A live machine as a test holds it."""

from pytest_fcvm.clone.clone import Clone
from pytest_fcvm.clone.log import WorkloadLog
from pytest_fcvm.clone.machine import Machine

__all__ = ["Clone", "Machine", "WorkloadLog"]
