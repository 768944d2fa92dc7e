"""The netns server: it makes network namespaces for the VMs of one process. A program of its own, see `requests.py`.

It runs in a bare Python, see `program.py`. Its arguments are directories of Python modules, in which it finds pyroute2.
A namespace lasts as long as this program, a VM in it, or a socket made in it. Where this program may not make network
namespaces, it makes a user namespace first and is root in there.

The first NIC connects the guest and its namespace, which has the addresses of the gateway and of DNS. Without egress
the namespace answers that no other network is reachable. The other NICs are for private networks: packet sockets
(packet(7)) carry their frames. The structures are those of netdevice(7), route(8) and linux/if_tun.h.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import struct
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING

from pytest_fcvm.network.addresses import DNS, GATEWAY, NICS
from pytest_fcvm.network.requests import CONTROL_FD, serve_request

if TYPE_CHECKING:
    from pytest_fcvm.network.netns.firewall import Bridge
    from pytest_fcvm.network.requests import Operation

__all__ = ["main"]


_BUFFER_BYTES = 4 << 20
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000  # linux/sched.h
_TUNSETIFF, _TUNSETPERSIST = 0x400454CA, 0x400454CB
_IFF_TAP, _IFF_NO_PI, _IFF_UP = 0x0002, 0x1000, 0x0001
_SIOCADDRT, _SIOCSIFFLAGS, _SIOCSIFADDR, _SIOCSIFNETMASK = 0x890B, 0x8914, 0x8916, 0x891C
_RTF_UP, _RTF_REJECT = 0x0001, 0x0200
_RTENTRY_BYTES = 120
_ETH_P_ALL = 3

_LIBC = ctypes.CDLL(None, use_errno=True)


class _Namespaces:
    """The open namespaces by number."""

    def __init__(self) -> None:
        self._home = -1  # the namespace in which this program waits for requests
        self._open: dict[int, int] = {}
        self._last = 0
        self._bridge: Bridge | None = None

    def start(self) -> tuple[None, list[int]]:
        """Get the privilege to make namespaces. Return the descriptor of the new user namespace, if there is one."""
        user = _become_root()
        self._home = _open_own("net")
        return None, [] if user is None else [user]

    def open(self, *, joined: bool, egress: bool) -> tuple[int, list[int]]:
        """Make a namespace, and return its number and descriptors: the namespace, then the NICs.

        With `joined` the VMM opens all NICs by name, and the descriptors are the packet sockets of the private ones.
        Without it, the VMM has one NIC and gets its tap.
        """
        _call("unshare", _CLONE_NEWNET)
        self._last += 1  # before anything can fail, so that the right number is closed
        opened: list[int] = []
        try:
            self._open[self._last] = net = _open_own("net")
            opened.append(os.dup(net))
            _bring_up("lo")
            tap = _make_tap(NICS[0], persistent=joined)
            opened += [] if tap is None else [tap]
            _bring_up(NICS[0], GATEWAY)
            _write("/proc/sys/net/ipv4/ip_forward", "1")
            if egress:
                _bring_up(f"{NICS[0]}:1", DNS)
            else:
                _reject_other_networks()
            for nic in NICS[1:] if joined else ():
                _make_tap(nic, persistent=True)
                _bring_up(nic)
                opened.append(_open_packet_socket(nic))
        except BaseException:
            for descriptor in opened:
                os.close(descriptor)
            self.close(self._last)
            raise
        finally:
            _enter(self._home)
        return self._last, opened

    def uplink(self, number: int) -> None:
        """Connect a namespace to the host's networks through a veth pair, which the kernel removes with it."""
        from pytest_fcvm.network.netns.firewall import Bridge

        if self._bridge is None:
            self._bridge = Bridge()
        self._bridge.join(self._open[number], self._inside(number))

    def filter(self, number: int, resolver: str, allow: Sequence[str]) -> None:
        """Load a namespace's firewall rules, as `rules_inside` takes them."""
        from pytest_fcvm.network.netns.firewall import Firewall, rules_inside

        with self._inside(number), closing(Firewall()) as firewall:
            firewall.load(rules_inside(NICS[0], resolver, allow))

    def socket(self, number: int, kind: int) -> tuple[None, list[int]]:
        """Make an unconnected socket in a namespace."""
        with self._inside(number):
            return None, [socket.socket(socket.AF_INET, kind | socket.SOCK_CLOEXEC).detach()]

    def close(self, number: int) -> None:
        """Forget a namespace. The kernel removes it when nothing uses it."""
        with suppress(KeyError):
            os.close(self._open.pop(number))

    @contextmanager
    def _inside(self, number: int) -> Iterator[None]:
        if number not in self._open:  # its VM has ended
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), "namespace")
        _enter(self._open[number])
        try:
            yield
        finally:
            _enter(self._home)


def _open_own(kind: str) -> int:
    return os.open(f"/proc/self/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)


def _enter(namespace: int) -> None:
    _call("setns", namespace, _CLONE_NEWNET)


def _call(name: str, *arguments: int) -> None:
    if getattr(_LIBC, name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)


def _become_root() -> int | None:
    """Make a user namespace and return its descriptor; None where network namespaces do not require one."""
    home = _open_own("net")
    try:
        _call("unshare", _CLONE_NEWNET)
        _enter(home)
    except PermissionError:
        user, group = os.geteuid(), os.getegid()
        _call("unshare", _CLONE_NEWUSER | _CLONE_NEWNET)  # it cannot re-enter the old network namespace
        for file, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            _write(f"/proc/self/{file}", text)
        return _open_own("user")
    finally:
        os.close(home)
    return None


def _make_tap(name: str, *, persistent: bool) -> int | None:
    """Make a tap device. Return its descriptor, None for a persistent one, which the VMM opens by name."""
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI))
        with suppress(FileNotFoundError):  # a kernel without IPv6
            _write(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6", "1")
        if not persistent:
            tap, kept = -1, tap
            return kept
        fcntl.ioctl(tap, _TUNSETPERSIST, 1)
        return None
    finally:
        if tap >= 0:
            os.close(tap)


def _bring_up(name: str, address: str | None = None) -> None:
    """Set a NIC up, and give it an address with a prefix of 24 bits."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        if address:
            fcntl.ioctl(control, _SIOCSIFADDR, struct.pack("16s16s8x", name.encode(), _sockaddr(address)))
            fcntl.ioctl(control, _SIOCSIFNETMASK, struct.pack("16s16s8x", name.encode(), _sockaddr("255.255.255.0")))
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH22x", name.encode(), _IFF_UP))


def _reject_other_networks() -> None:
    """Let the kernel answer at once that other networks are unreachable, so that nobody waits for an answer."""
    anywhere = _sockaddr("0.0.0.0")  # noqa: S104 - a route's target
    entry = struct.pack("8x16s16s16sH", anywhere, anywhere, anywhere, _RTF_UP | _RTF_REJECT)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, _SIOCADDRT, entry.ljust(_RTENTRY_BYTES, b"\0"))


def _sockaddr(address: str) -> bytes:
    return struct.pack("=HH4s8x", socket.AF_INET, 0, socket.inet_aton(address))


def _open_packet_socket(nic: str) -> int:
    """Return a socket that carries the frames of a NIC."""
    packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
    packets.bind((nic, _ETH_P_ALL))
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        packets.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
    return packets.detach()


def _write(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def main(*paths: str) -> None:
    """Serve until the control socket ends."""
    sys.path += paths
    namespaces = _Namespaces()
    operations: dict[str, Operation] = {
        "start": namespaces.start,
        "open": namespaces.open,
        "uplink": namespaces.uplink,
        "filter": namespaces.filter,
        "socket": namespaces.socket,
        "close": namespaces.close,
    }
    with socket.socket(fileno=CONTROL_FD) as control:
        while serve_request(control, operations):
            pass
