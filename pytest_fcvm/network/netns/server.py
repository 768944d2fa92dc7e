"""Network namespaces for VMs, each with the other ends of one VM's cards. A program of its own, one per process.

It is run by path, with the paths of Python's modules as arguments, which it has no other use for than a way out. It
ends with its control socket (descriptor 3, of sequenced packets); a namespace lasts as long as it, or a VM, or a socket
that was made in it. It is root in a user namespace of its own where it may not make network namespaces without. A
request is a JSON object with `op`; its reply, which `close` alone has not, is one with `error` ("" when it worked), and
descriptors. The first packet is its own: whether there is a user namespace, with that namespace's descriptor.

The first card is a network of the guest and this namespace, which has the gateway's address and routes; without a way
out it answers that nothing can be reached. The others are private networks, whose frames come and go through packet
sockets (packet(7)). The structures are those of netdevice(7), rtnetlink's forerunner route(8) and linux/if_tun.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import socket
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_fcvm.network.netns.firewall import Bridge

__all__ = ["CONTROL_FD", "GUEST", "NICS", "main"]

CONTROL_FD = 3
NICS = ("eth0", "eth1", "eth2")
GATEWAY, GUEST, DNS = "10.0.2.2", "10.0.2.15", "10.0.2.3"

_REQUEST_BYTES = 65536
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
    """The namespaces that are open, by number. `home` is where this program is meanwhile."""

    def __init__(self) -> None:
        self.home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._open: dict[int, int] = {}
        self._last = 0
        self._bridge: Bridge | None = None

    def open(self, *, joined: bool, egress: bool) -> tuple[dict[str, Any], list[int]]:
        """Make one. With `joined` its VMM opens all cards by name, else it gets the first by descriptor."""
        _call("unshare", _CLONE_NEWNET)
        self._last += 1  # before anything fails: what is closed then is this one
        sent: list[int] = []
        try:
            net = self._open[self._last] = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            _bring_up("lo")
            first = _make_tap(NICS[0], persistent=joined)
            sent = [net] if first is None else [net, first]
            _bring_up(NICS[0], GATEWAY)
            _write("/proc/sys/net/ipv4/ip_forward", "1")
            if egress:
                _bring_up(f"{NICS[0]}:1", DNS)
            else:
                _refuse_outside()
            if joined:
                for card in NICS[1:]:
                    _make_tap(card, persistent=True)
                    _bring_up(card)
                    sent.append(_open_wire(card))
        except BaseException:
            for descriptor in sent[1:]:
                os.close(descriptor)
            self.close(self._last)
            raise
        finally:
            self._enter(self.home)
        return {"number": self._last}, sent

    def uplink(self, number: int) -> None:
        """Lead a namespace to the host's other networks, through a pair of cards that goes with it."""
        from pytest_fcvm.network.netns.firewall import Bridge

        if self._bridge is None:
            self._bridge = Bridge()
        self._bridge.join(self._open[number], self.inside(number))

    def socket(self, number: int, *, kind: int) -> int:
        """Make a socket, which is not connected, in a namespace."""
        with self.inside(number):
            return socket.socket(socket.AF_INET, kind | socket.SOCK_CLOEXEC).detach()

    def close(self, number: int) -> None:
        """Forget a namespace; it goes when nobody is in it."""
        with suppress(KeyError):
            os.close(self._open.pop(number))

    @contextmanager
    def inside(self, number: int) -> Iterator[None]:
        """Be in a namespace."""
        if number not in self._open:  # its VM has ended meanwhile
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), "namespace")
        self._enter(self._open[number])
        try:
            yield
        finally:
            self._enter(self.home)

    @staticmethod
    def _enter(namespace: int) -> None:
        _call("setns", namespace, _CLONE_NEWNET)


def _call(name: str, *arguments: int) -> None:
    if getattr(_LIBC, name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)


def _become_root() -> int | None:
    """Return the descriptor of a new user namespace, None where network namespaces can be had without one."""
    try:
        home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        _call("unshare", _CLONE_NEWNET)
        _call("setns", home, _CLONE_NEWNET)
    except PermissionError:
        user, group = os.geteuid(), os.getegid()
        _call("unshare", _CLONE_NEWUSER | _CLONE_NEWNET)  # there is no way back to a network of others
        for file, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            _write(f"/proc/self/{file}", text)
        return os.open("/proc/self/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(home)
    return None


def _make_tap(name: str, *, persistent: bool) -> int | None:
    """Make a tap device. Return its descriptor, None when it is to be opened by name."""
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
    """Let a card take frames, and give it an address with a prefix of 24 bits."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        if address:
            fcntl.ioctl(control, _SIOCSIFADDR, struct.pack("16s16s8x", name.encode(), _sockaddr(address)))
            fcntl.ioctl(control, _SIOCSIFNETMASK, struct.pack("16s16s8x", name.encode(), _sockaddr("255.255.255.0")))
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH22x", name.encode(), _IFF_UP))


def _refuse_outside() -> None:
    """Answer that what is outside cannot be reached, rather than nothing: who tries does not wait."""
    anywhere = _sockaddr("0.0.0.0")  # noqa: S104 - a route's target
    entry = struct.pack("8x16s16s16sH", anywhere, anywhere, anywhere, _RTF_UP | _RTF_REJECT)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, _SIOCADDRT, entry.ljust(_RTENTRY_BYTES, b"\0"))


def _sockaddr(address: str) -> bytes:
    return struct.pack("=HH4s8x", socket.AF_INET, 0, socket.inet_aton(address))


def _open_wire(card: str) -> int:
    """Return a socket that carries the frames of a card."""
    wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
    wire.bind((card, _ETH_P_ALL))
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        wire.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
    return wire.detach()


def _write(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def _apply(namespaces: _Namespaces, request: dict[str, Any]) -> tuple[dict[str, Any], list[int], list[int]]:
    """Do what is asked. Return the reply, the descriptors that go with it, and which of them are closed then."""
    match request["op"]:
        case "open":
            reply, sent = namespaces.open(joined=request["joined"], egress=request["egress"])
            return reply, sent, sent[1:]
        case "filter":
            from pytest_fcvm.network.netns import firewall

            with namespaces.inside(request["number"]), contextlib.closing(firewall.Firewall()) as rules:
                rules.load(firewall.rules_inside(NICS[0], DNS, request["resolver"], request["allow"]))
            return {}, [], []
        case "uplink":
            namespaces.uplink(request["number"])
            return {}, [], []
        case "socket":
            made = namespaces.socket(request["number"], kind=request["kind"])
            return {}, [made], [made]
        case unknown:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), unknown)


def _answer(
    control: socket.socket, number: int, apply: Callable[[], tuple[dict[str, Any], Sequence[int], Sequence[int]]]
) -> None:
    sent: Sequence[int] = ()
    closed: Sequence[int] = ()
    try:
        said, sent, closed = apply()
        reply = {"error": "", **said}
    except OSError as error:
        reply = {"error": f"{error.filename or 'a system call'}: {error.strerror}"}
    socket.send_fds(control, [json.dumps({**reply, "id": number}).encode()], sent)
    for descriptor in closed:
        os.close(descriptor)


def main() -> None:
    """Serve until the control socket ends."""
    control = socket.socket(fileno=CONTROL_FD)
    namespaces: list[_Namespaces] = []

    def begin() -> tuple[dict[str, Any], list[int], list[int]]:
        user = _become_root()
        namespaces.append(_Namespaces())
        found = [] if user is None else [user]
        return {"user": bool(found)}, found, found

    _answer(control, 0, begin)
    while namespaces:
        data = control.recv(_REQUEST_BYTES)
        if not data:
            return
        request = json.loads(data)
        if request["op"] == "close":  # nobody waits for it
            namespaces[0].close(request["number"])
        else:
            _answer(control, request["id"], partial(_apply, namespaces[0], request))


if __name__ == "__main__":
    sys.path[:] = sys.argv[1:]
    main()
