"""Egress of network namespaces: slirp4netns without privileges, the host's resolver, and the addresses of `allow`."""

from __future__ import annotations

import ipaddress
import shutil
import socket
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path

from pytest_fcvm.errors import HostError, UsageProblem
from pytest_fcvm.host.files import read_tail
from pytest_fcvm.host.limits import translating_emfile
from pytest_fcvm.host.process import find_tool
from pytest_fcvm.host.sockets import socket_pair
from pytest_fcvm.host.supervisor.protocol import Child, Spawner
from pytest_fcvm.model.net import Namespace
from pytest_fcvm.network.addresses import SLIRP_NET
from pytest_fcvm.network.netns.firewall import UPLINK

__all__ = ["find_resolver", "resolve_allowed", "start_slirp"]

_READY_S = 20.0
_READY_FD, _USER_FD, _NET_FD = 3, 4, 5
_RESOLVERS = (Path("/etc/resolv.conf"), Path("/run/systemd/resolve/resolv.conf"))


def start_slirp(spawner: Spawner, namespace: Namespace) -> Child:
    """Start slirp4netns, which gives a namespace egress without privileges, and wait until it is ready.

    Raise HostError when it is not installed or does not start.
    """
    argv = [_find("slirp4netns", "slirp4netns"), "--configure", "--disable-host-loopback", f"--cidr={SLIRP_NET}"]
    argv += [f"--ready-fd={_READY_FD}", "--netns-type=path", f"/proc/self/fd/{_NET_FD}", UPLINK]
    passed = {_NET_FD: namespace.net}
    if namespace.user is not None:  # it gets its privileges there; its sockets stay in the host's network
        enter = [_find("nsenter", "util-linux"), "--preserve-credentials", f"--user=/proc/self/fd/{_USER_FD}", "--"]
        argv, passed[_USER_FD] = [*enter, *argv], namespace.user
    with translating_emfile("slirp4netns"), ExitStack() as undo:
        directory = spawner.make_dir("slirp")
        undo.callback(shutil.rmtree, directory, ignore_errors=True)
        log = directory / "slirp.log"
        ready, theirs = socket_pair()
        with ready:
            with theirs:
                child = spawner.spawn(
                    argv,
                    name=directory.name,
                    fds={**passed, _READY_FD: theirs.fileno()},
                    stdout=log,
                    cwd=directory,
                    env=None,
                    owned_dir=directory,
                )
            undo.callback(child.kill)
            if not _is_ready(ready):
                evidence = {"slirp4netns": read_tail(log)}
                raise HostError("slirp4netns did not start", hint="see what it printed", evidence=evidence)
        undo.pop_all()
    return child


def _is_ready(pipe: socket.socket) -> bool:
    pipe.settimeout(_READY_S)
    with suppress(OSError):
        return bool(pipe.recv(1))
    return False


def _find(name: str, package: str) -> str:
    tool = find_tool(name)
    if tool is None:
        raise HostError(
            f"{name} is not installed: the network rootless has no egress without it",
            hint=f"apt-get install {package}, or --fcvm-network user,egress",
        )
    return str(tool)


def find_resolver() -> str:
    """Return the IPv4 address of the host's first resolver that is not a loopback address, "" if it has none."""
    for path in _RESOLVERS:
        with suppress(OSError, ValueError):
            for line in path.read_text().splitlines():
                word, _, address = line.strip().partition(" ")
                if word == "nameserver" and not ipaddress.ip_address(address.strip()).is_loopback:
                    return str(ipaddress.IPv4Address(address.strip()))
    return ""


def resolve_allowed(targets: Iterable[str]) -> list[str]:
    """Return networks and addresses as they are, and names as the IPv4 addresses that they have now.

    Raise UsageProblem for a name that has none.
    """
    allowed: list[str] = []
    for target in targets:
        with suppress(ValueError):
            allowed.append(str(ipaddress.IPv4Network(target)))
            continue
        try:
            found = socket.getaddrinfo(target, None, socket.AF_INET, socket.SOCK_STREAM)
        except OSError as error:
            raise UsageProblem(
                f"allow={target}: the name has no IPv4 address here ({error.strerror})",
                hint="give a host name, an address, or a network like 10.0.0.0/8",
            ) from error
        allowed += sorted({str(address[4][0]) for address in found})
    return allowed
