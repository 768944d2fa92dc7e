"""The way out of network namespaces: slirp4netns for one without rights, resolvers, and what names stand for."""

from __future__ import annotations

import ipaddress
import shutil
import socket
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path

from pytest_fcvm.engine.post_mortem import read_tail
from pytest_fcvm.errors import HostError, UsageProblem
from pytest_fcvm.host.limits import translating_emfile
from pytest_fcvm.host.process import find_tool
from pytest_fcvm.host.sockets import socket_pair
from pytest_fcvm.host.supervisor.protocol import Child, Spawner
from pytest_fcvm.model.net import Namespace
from pytest_fcvm.network.netns.firewall import UPLINK

__all__ = ["SLIRP_RESOLVER", "find_resolver", "resolve_allowed", "start_slirp"]

SLIRP_RESOLVER = "10.210.0.3"
_SLIRP_NET = "10.210.0.0/24"
_READY_S = 20.0
_READY_FD, _USER_FD, _NET_FD = 3, 4, 5
_RESOLVERS = (Path("/etc/resolv.conf"), Path("/run/systemd/resolve/resolv.conf"))


def start_slirp(spawner: Spawner, namespace: Namespace) -> Child:
    """Start slirp4netns, which leads a namespace outside as an ordinary program would, and wait until it does.

    Raise HostError when it is not installed or does not start.
    """
    argv = [_find("slirp4netns", "slirp4netns"), "--configure", "--disable-host-loopback", f"--cidr={_SLIRP_NET}"]
    argv += [f"--ready-fd={_READY_FD}", "--netns-type=path", f"/proc/self/fd/{_NET_FD}", UPLINK]
    passed = {_NET_FD: namespace.net}
    if namespace.user is not None:  # its rights over the namespace come from there; its sockets are the host's
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
                said = {"slirp4netns": read_tail(log)}
                raise HostError("slirp4netns did not start", hint="see what it printed", evidence=said)
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
            f"{name} is not installed, without which the network rootless has no way out",
            hint=f"apt-get install {package}, or --fcvm-network user,egress",
        )
    return str(tool)


def find_resolver() -> str:
    """Return the IPv4 address of the host's resolver that is not on the host itself, "" where there is none."""
    for path in _RESOLVERS:
        with suppress(OSError, ValueError):
            for line in path.read_text().splitlines():
                word, _, address = line.strip().partition(" ")
                if word == "nameserver" and not ipaddress.ip_address(address.strip()).is_loopback:
                    return str(ipaddress.IPv4Address(address.strip()))
    return ""


def resolve_allowed(targets: Iterable[str]) -> list[str]:
    """Return networks and addresses as they are, and of names the addresses that they have now.

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
                hint="name a host, an address, or a network like 10.0.0.0/8",
            ) from error
        allowed += sorted({str(address[4][0]) for address in found})
    return allowed
