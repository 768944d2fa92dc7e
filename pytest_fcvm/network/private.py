"""A private network in a test: clones on it reach each other by name, and the test makes it fail."""

from __future__ import annotations

import itertools
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from pytest_fcvm.errors import EngineError, FcvmError, HostError, UsageProblem
from pytest_fcvm.host.own import getpid
from pytest_fcvm.host.sockets import socket_pair
from pytest_fcvm.host.supervisor.protocol import Spawner
from pytest_fcvm.model.net import Attachment
from pytest_fcvm.network.addresses import private_address, private_address6, private_mac
from pytest_fcvm.network.helper import Helper
from pytest_fcvm.network.switch import Counters, Link

__all__ = ["Network"]

_MEMBERS = 200  # addresses .10 to .209
_FIRST_HOST = 10
_SHARES = ("loss", "duplicate", "corrupt", "reorder")
_BUFFER_BYTES = 4 << 20  # with a smaller buffer a sender waits for the switch

Hosts = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Member:
    """A clone that is up. `rename` gives it the lines of /etc/hosts, `set_link` connects or disconnects its NIC."""

    rename: Callable[[Hosts], object]
    set_link: Callable[[bool], object]


class Network:
    """A private Ethernet segment. Its switch is a helper program that ends with it.

    A name keeps the addresses that it gets when it is first used. Every method may be called from any thread.
    The same `seed` makes the same faults happen. All methods raise EngineError when the switch has died.
    """

    def __init__(self, spawner: Spawner, number: int, *, seed: int = 0) -> None:
        self._number = number
        self._indexes: dict[str, int] = {}
        self._plugged: set[str] = set()
        self._members: dict[str, _Member] = {}
        self._down: set[str] = set()
        self._cuts: list[tuple[frozenset[str], ...]] = []
        self._impairments: list[tuple[str | None, str | None, Link]] = []
        self._lock = threading.RLock()
        self._owner = getpid()
        title = "the network's switch"
        self._switch = Helper(
            spawner,
            "switch",
            str(seed),
            name=f"network{number}",
            title=title,
            refusal=lambda error: HostError(f"{title}: {error}", hint="name a file that can be written"),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the clones that are on the network now."""
        return tuple(sorted(self._plugged))

    def address(self, name: str) -> str:
        """Return the IPv4 address of a name, whether or not its clone is on the network."""
        return private_address(self._number, _FIRST_HOST + self._index(name))

    def address6(self, name: str) -> str:
        """Return the IPv6 address of a name, in guests also `ip6-NAME`, whether or not its clone is on the network."""
        return private_address6(self._number, _FIRST_HOST + self._index(name))

    # -- faults

    def partition(self, *groups: Iterable[str]) -> _Fault:
        """Drop all frames between groups of names, from now on. Use it as a context manager, or `heal` later."""
        sets = tuple(frozenset(group) for group in groups)
        if len(sets) < 2 or any(one & other for one in sets for other in sets if one is not other):
            raise UsageProblem(
                "a partition has two groups or more, and no name is in two", hint='partition({"a"}, {"b", "c"})'
            )
        with self._lock:
            self._cuts.append(sets)
            self._send_rules()
        return _Fault(self._owner, lambda: self._join_groups(sets))

    def impair(
        self,
        source: str | None = None,
        target: str | None = None,
        *,
        latency: float = 0.0,
        jitter: float = 0.0,
        loss: float = 0.0,
        duplicate: float = 0.0,
        corrupt: float = 0.0,
        reorder: float = 0.0,
        bandwidth: float = 0.0,
    ) -> None:
        """Make the link from one name to another worse, from now on; None is every name. A later call takes precedence.

        `latency` and `jitter` (plus or minus) are in seconds, `bandwidth` is in bytes per second (0: no limit). The
        others are shares from 0 to 1. A reordered frame comes 20 ms late. `loss=1` drops everything in one direction.
        """
        link = Link(
            latency=latency,
            jitter=jitter,
            loss=loss,
            duplicate=duplicate,
            corrupt=corrupt,
            reorder=reorder,
            bandwidth=bandwidth,
        )
        for name, value in asdict(link).items():
            if value < 0 or (name in _SHARES and value > 1):
                raise UsageProblem(
                    f"{name}={value} is out of range", hint="give times and bandwidths from 0, shares from 0 to 1"
                )
        with self._lock:
            self._impairments.append((source, target, link))
            self._send_rules()

    def link_down(self, *names: str) -> _Fault:
        """Disconnect the NICs of these names, which the guests notice. Use it as a context manager, or `heal` later.

        Raise EngineError when a clone is paused or dead.
        """
        self._set_links(names, up=False)
        return _Fault(self._owner, lambda: self._set_links(names, up=True))

    def heal(self) -> None:
        """End all partitions and impairments, and connect all NICs."""
        with self._lock:
            self._cuts.clear()
            self._impairments.clear()
            self._send_rules()
        self._set_links(tuple(self._down), up=True)

    # -- traffic

    def counters(self) -> Mapping[tuple[str, str], Counters]:
        """Return the frame counters of every link, by source and target."""
        links = self._switch.ask("counters")
        return {(source, target): Counters(**counted) for source, target, counted in links}

    @contextmanager
    def capture(self, path: str | Path) -> Iterator[Path]:
        """Write every frame that a clone sends to a pcapng file. Raise HostError for a file that cannot be written."""
        file = Path(path).absolute()
        self._switch.ask("capture", path=str(file))
        try:
            yield file
        finally:
            if getpid() == self._owner:
                self._switch.ask("end capture", path=str(file))

    def record(self) -> Path:
        """Write every frame to a file in the network's directory until the network ends, and return the path."""
        directory = self._switch.directory
        file = directory / f"{directory.name}.pcapng"
        self._switch.ask("capture", path=str(file))
        return file

    def close(self) -> None:
        """End the network, which disconnects its clones. Idempotent."""
        self._switch.close()

    # -- clones

    def plug(self, name: str, packet_socket: int | None = None) -> Attachment:
        """Return an attachment for a clone. Give the packet socket of its NIC, if it has one.

        Raise UsageProblem for a name that is on the network already.
        """
        with self._lock:
            if name in self._plugged:
                raise UsageProblem(f"{name!r} is on this network already", hint="give every clone a name of its own")
            index = self._index(name)
            end = None
            if packet_socket is None:
                end = self._attach_pair(name)
            else:
                self._attach(name, packet_socket)
            self._plugged.add(name)
            mac = private_mac(self._number, index)
            addresses = f"{self.address(name)}/24", f"{self.address6(name)}/64"
            return Attachment(packet_socket=end, mac=mac, addresses=addresses, hosts=self._hosts())

    def joined(self, name: str, rename: Callable[[Hosts], object], set_link: Callable[[bool], object]) -> None:
        """Register a clone that is up, and give the others its name.

        `rename` gives the clone the lines of its /etc/hosts, `set_link` connects or disconnects its NIC.
        """
        with self._lock:
            self._members[name] = _Member(rename=rename, set_link=set_link)
            others = [member for other, member in self._members.items() if other != name]
            hosts, is_down = self._hosts(), name in self._down
        if is_down:
            set_link(False)
        for other in others:
            with suppress(FcvmError):  # it is ending, or paused: it keeps the names that it has
                other.rename(hosts)

    def unplug(self, name: str) -> None:
        """Take a clone off the network. Its name keeps its address."""
        with self._lock, suppress(EngineError):
            self._members.pop(name, None)
            self._plugged.discard(name)
            self._switch.ask("detach", name=name)

    def _attach(self, name: str, port: int) -> None:
        self._switch.ask("attach", port, name=name)

    def _attach_pair(self, name: str) -> socket.socket:
        end, port = socket_pair(socket.SOCK_DGRAM)
        try:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
            self._attach(name, port.fileno())
        except BaseException:
            end.close()
            raise
        finally:
            port.close()
        return end

    def _index(self, name: str) -> int:
        with self._lock:
            if name not in self._indexes:
                if len(self._indexes) >= _MEMBERS:
                    raise UsageProblem(f"a network has {_MEMBERS} names at most", hint="make another network")
                self._indexes[name] = len(self._indexes)
            return self._indexes[name]

    def _hosts(self) -> Hosts:
        # A name has one address: with two, Redis for one tries only IPv6, even where the server has no IPv6.
        lines = ((f"{self.address(name)} {name}", f"{self.address6(name)} ip6-{name}") for name in self._indexes)
        return tuple(itertools.chain.from_iterable(lines))

    def _set_links(self, names: tuple[str, ...], *, up: bool) -> None:
        with self._lock:
            for name in names:
                (self._down.discard if up else self._down.add)(name)
            members = [self._members[name] for name in names if name in self._members]
        for member in members:
            member.set_link(up)

    def _send_rules(self) -> None:
        """Send the switch its rules: partitions first, then impairments, the latest first."""
        cuts = [
            (sorted(one), sorted(other), asdict(Link(cut=True)))
            for groups in self._cuts
            for one, other in itertools.permutations(groups, 2)
        ]
        worse = [
            ([source] if source else None, [target] if target else None, asdict(link))
            for source, target, link in reversed(self._impairments)
        ]
        self._switch.ask("rules", rules=[*cuts, *worse])

    def _join_groups(self, groups: tuple[frozenset[str], ...]) -> None:
        with self._lock:
            if groups in self._cuts:
                self._cuts.remove(groups)
                self._send_rules()


class _Fault:
    """A fault that lasts until its `with` block ends, or until `Network.heal`. A forked process does not end it."""

    def __init__(self, owner: int, end: Callable[[], None]) -> None:
        self._owner, self._end = owner, end

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        if getpid() == self._owner:
            self._end()
