"""A private network's switch: Ethernet frames from port to port, with faults on the path. A helper program.

It runs in a bare Python, see `program.py` and `requests.py`. A port is a datagram socket that comes with the request
`attach`, one frame a datagram. A port never waits for another: the switch drops and counts a frame for which a port has
no room.

Captures are pcapng (draft-ietf-opsawg-pcapng), one interface for each port, with the port's name.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import random
import select
import socket
import struct
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO

from pytest_fcvm.network.requests import CONTROL_FD, serve_request

if TYPE_CHECKING:
    from pytest_fcvm.network.requests import Operation

__all__ = ["Counters", "Link", "Rule", "Switch", "main"]

_FRAME_BYTES = 65536
_BATCH = 64  # frames of one port before the next port's turn
_QUEUED = 10_000  # delayed frames in all; more are dropped
_QUEUE_S = 1.0  # the longest delay by a bandwidth
_REORDERED_S = 0.02  # the delay of a reordered frame
_BUFFER_BYTES = 4 << 20
_ETHERNET_HEADER = 14
_GROUP_BIT = 1  # of the first byte of a MAC: broadcast and multicast


@dataclass(frozen=True, kw_only=True)
class Link:
    """What happens to frames from one port to another. Times in seconds, shares from 0 to 1, bandwidth in bytes/s."""

    cut: bool = False
    latency: float = 0.0
    jitter: float = 0.0
    loss: float = 0.0
    duplicate: float = 0.0
    corrupt: float = 0.0
    reorder: float = 0.0
    bandwidth: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Rule:
    """The link from one set of names to another, None for all. The first rule that applies counts."""

    sources: frozenset[str] | None
    targets: frozenset[str] | None
    link: Link

    def applies(self, source: str, target: str) -> bool:
        """Say whether the rule applies to this direction."""
        return (self.sources is None or source in self.sources) and (self.targets is None or target in self.targets)


@dataclass(kw_only=True)
class Counters:
    """Frames of one link: taken, delivered, and those with a fault, by fault."""

    taken: int = 0
    delivered: int = 0
    cut: int = 0
    lost: int = 0
    full: int = 0
    duplicated: int = 0
    corrupted: int = 0
    reordered: int = 0


@dataclass(kw_only=True)
class _Port:
    name: str
    socket: socket.socket
    macs: set[bytes] = field(default_factory=set)
    paths: dict[str, _Path] = field(default_factory=dict)  # to the ports that a frame was sent to


@dataclass(kw_only=True)
class _Path:
    """From one port to another: the link by the rules, and its counters."""

    target: _Port
    link: Link
    counters: Counters
    free_at: float = 0.0  # when the bandwidth allows the next frame


class Switch:
    """Ports, the links between them, and delayed frames. The same `seed` makes the same choices."""

    def __init__(self, seed: int) -> None:
        self._rules: list[Rule] = []
        self.counters: dict[tuple[str, str], Counters] = {}
        self._ports: dict[str, _Port] = {}
        self._by_mac: dict[bytes, _Port] = {}
        self._random = random.Random(seed)  # noqa: S311  no secret: the same seed makes the same faults
        self._delayed: list[tuple[float, int, _Port, bytes, Counters]] = []
        self._numbers = itertools.count()
        self._captures: dict[str, _Capture] = {}

    def attach(self, name: str, port: socket.socket) -> None:
        """Add a port. It replaces an earlier one of this name."""
        self.detach(name)
        port.settimeout(0)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            port.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
        self._ports[name] = _Port(name=name, socket=port)

    def detach(self, name: str) -> None:
        """Remove a port, if it is there."""
        port = self._ports.pop(name, None)
        if port is not None:
            for mac in port.macs:
                self._by_mac.pop(mac, None)
            for other in self._ports.values():
                other.paths.pop(name, None)
            port.socket.close()

    def apply(self, rules: list[Rule]) -> None:
        """Replace the rules."""
        self._rules = rules
        for port in self._ports.values():
            port.paths.clear()

    def capture(self, path: str) -> None:
        """Start to write every frame that a port sends to a file."""
        self.end_capture(path)
        self._captures[path] = _Capture(path)

    def end_capture(self, path: str) -> None:
        """Close the file of a capture, if there is one."""
        if path in self._captures:
            self._captures.pop(path).close()

    def wait_s(self) -> float:
        """Return the time until the next delayed frame is due."""
        return max(0.0, self._delayed[0][0] - time.monotonic()) if self._delayed else 3600.0

    def deliver_due(self) -> None:
        """Deliver the delayed frames that are due."""
        now = time.monotonic()
        while self._delayed and self._delayed[0][0] <= now:
            _, _, target, frame, counters = heapq.heappop(self._delayed)
            self._deliver(target, frame, counters)

    def take(self, name: str) -> None:
        """Take a batch of frames from a port."""
        port = self._ports.get(name)
        for _ in range(_BATCH if port else 0):
            assert port is not None
            try:
                frame = port.socket.recv(_FRAME_BYTES)
            except OSError:
                return
            if len(frame) >= _ETHERNET_HEADER:
                self._route(port, frame)

    def descriptors(self) -> dict[int, str]:
        """Return the ports by descriptor."""
        return {port.socket.fileno(): name for name, port in self._ports.items()}

    def _route(self, source: _Port, frame: bytes) -> None:
        target_mac, source_mac = frame[:6], frame[6:12]
        if not source_mac[0] & _GROUP_BIT:
            self._by_mac[source_mac] = source
            source.macs.add(source_mac)
        for capture in self._captures.values():
            capture.write(source.name, frame)
        known = None if target_mac[0] & _GROUP_BIT else self._by_mac.get(target_mac)
        for target in [known] if known else list(self._ports.values()):
            if target is not source:
                self._cross(source, target, frame)

    def _cross(self, source: _Port, target: _Port, frame: bytes) -> None:
        path = source.paths.get(target.name) or self._find_path(source, target)
        link, counters = path.link, path.counters
        counters.taken += 1
        if link is _CLEAR:
            self._deliver(target, frame, counters)
            return
        if link.cut:
            counters.cut += 1
            return
        if self._happens(link.loss):
            counters.lost += 1
            return
        if self._happens(link.corrupt):
            counters.corrupted += 1
            frame = self._corrupted(frame)
        copies = 2 if self._happens(link.duplicate) else 1
        counters.duplicated += copies - 1
        for _ in range(copies):
            self._send(path, frame)

    def _find_path(self, source: _Port, target: _Port) -> _Path:
        names = source.name, target.name
        link = next((rule.link for rule in self._rules if rule.applies(*names)), _CLEAR)
        path = _Path(target=target, link=link, counters=self.counters.setdefault(names, Counters()))
        source.paths[target.name] = path
        return path

    def _send(self, path: _Path, frame: bytes) -> None:
        link, counters, now = path.link, path.counters, time.monotonic()
        due = now + link.latency + (link.jitter * self._random.uniform(-1, 1) if link.jitter else 0.0)
        if self._happens(link.reorder):
            counters.reordered += 1
            due += _REORDERED_S
        if link.bandwidth:
            free_at = max(now, path.free_at) + len(frame) / link.bandwidth
            if free_at - now > _QUEUE_S:
                counters.full += 1
                return
            path.free_at = free_at
            due += free_at - now
        if due <= now:
            self._deliver(path.target, frame, counters)
        elif len(self._delayed) >= _QUEUED:
            counters.full += 1
        else:
            heapq.heappush(self._delayed, (due, next(self._numbers), path.target, frame, counters))

    def _deliver(self, target: _Port, frame: bytes, counters: Counters) -> None:
        try:
            target.socket.send(frame)
        except OSError:  # full, or gone
            counters.full += 1
        else:
            counters.delivered += 1

    def _happens(self, share: float) -> bool:
        return share > 0 and self._random.random() < share

    def _corrupted(self, frame: bytes) -> bytes:
        """Flip a bit after the Ethernet header."""
        place = self._random.randrange(_ETHERNET_HEADER, len(frame)) if len(frame) > _ETHERNET_HEADER else 0
        return frame[:place] + bytes([frame[place] ^ 1 << self._random.randrange(8)]) + frame[place + 1 :]


_CLEAR = Link()


class _Capture:
    """A pcapng file."""

    _SECTION, _INTERFACE, _PACKET = 0x0A0D0D0A, 1, 6
    _ETHERNET, _NAME = 1, 2

    def __init__(self, path: str) -> None:
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115, PTH123  closed by `close`
        self._interfaces: dict[str, int] = {}
        self._block(self._SECTION, struct.pack("<IHHq", 0x1A2B3C4D, 1, 0, -1))

    def write(self, port: str, frame: bytes) -> None:
        """Write a frame that a port has sent."""
        if port not in self._interfaces:
            self._interfaces[port] = len(self._interfaces)
            name = port.encode()
            option = struct.pack("<HH", self._NAME, len(name)) + _padded(name) + bytes(4)
            self._block(self._INTERFACE, struct.pack("<HHI", self._ETHERNET, 0, 0) + option)
        microseconds = time.time_ns() // 1000
        head = struct.pack(
            "<IIIII", self._interfaces[port], microseconds >> 32, microseconds & 0xFFFFFFFF, len(frame), len(frame)
        )
        self._block(self._PACKET, head + _padded(frame))
        self._file.flush()

    def close(self) -> None:
        """End the file."""
        self._file.close()

    def _block(self, kind: int, body: bytes) -> None:
        length = len(body) + 12
        self._file.write(struct.pack("<II", kind, length) + body + struct.pack("<I", length))


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _operations(switch: Switch) -> dict[str, Operation]:
    return {
        "attach": lambda port, *, name: switch.attach(name, socket.socket(fileno=port)),
        "detach": switch.detach,
        "rules": lambda rules: switch.apply([_rule(*rule) for rule in rules]),
        "counters": lambda: ([[*names, asdict(counters)] for names, counters in switch.counters.items()], ()),
        "capture": switch.capture,
        "end capture": switch.end_capture,
    }


def _rule(sources: list[str] | None, targets: list[str] | None, link: dict[str, Any]) -> Rule:
    return Rule(
        sources=None if sources is None else frozenset(sources),
        targets=None if targets is None else frozenset(targets),
        link=Link(**link),
    )


def main(seed: str) -> None:
    """Switch frames until the control socket ends."""
    switch, control = Switch(int(seed)), socket.socket(fileno=CONTROL_FD)
    operations = _operations(switch)
    poll = select.epoll()
    poll.register(control, select.EPOLLIN)
    known: dict[int, str] = {}
    while True:
        # epoll counts in milliseconds, select in microseconds: a frame must be neither early nor late.
        select.select([poll], [], [], switch.wait_s())
        for descriptor, _ in poll.poll(0):
            if descriptor != CONTROL_FD:
                switch.take(known.get(descriptor, ""))
            elif not serve_request(control, operations):
                return
            else:
                for gone in known.keys() - switch.descriptors().keys():
                    with contextlib.suppress(OSError):  # closing it took it out
                        poll.unregister(gone)
                for new in switch.descriptors():
                    with contextlib.suppress(FileExistsError):
                        poll.register(new, select.EPOLLIN)
                known = switch.descriptors()
        switch.deliver_due()
