"""Network namespaces for VMs: made by a program of their own, led outside where that is asked for."""

from pytest_fcvm.namespaces.maker import Namespaces

__all__ = ["Namespaces"]
