"""A loopback address for one clone, at which its ports have the guest's port numbers."""

from __future__ import annotations

import socket
import warnings
from dataclasses import replace

from pytest_fcvm.host.listening import why_not_listening
from pytest_fcvm.host.own import os
from pytest_fcvm.model.net import Proto, PublishedPort

__all__ = ["at_address", "random_loopback"]


def random_loopback() -> str:
    """Return an address from 127.128.0.1 to 127.255.255.254. On Linux, all of 127.0.0.0/8 is local."""
    second, third, fourth = os.urandom(3)
    return f"127.{128 + second % 128}.{third}.{1 + fourth % 254}"


def at_address(address: str, port: PublishedPort) -> PublishedPort:
    """Return the port at the guest's port number, else at any free one, with a warning that says why."""
    kind = socket.SOCK_STREAM if port.proto is Proto.TCP else socket.SOCK_DGRAM
    reason = why_not_listening(address, port.guest_port, kind)
    if reason:
        message = f"guest port {port.guest_port}/{port.proto} has another number on {address}: {reason}"
        warnings.warn(message, stacklevel=3)
    return replace(port, host_ip=address, host_port=0 if reason else port.guest_port)
