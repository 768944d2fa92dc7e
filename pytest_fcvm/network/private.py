"""A private network in a test: clones on it reach each other by name, and the test decides how well."""

from __future__ import annotations

import itertools
import json
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pytest_fcvm.engine.post_mortem import read_tail
from pytest_fcvm.errors import EngineError, FcvmError, HostError, UsageProblem
from pytest_fcvm.host.own import check_owner, getpid
from pytest_fcvm.host.sockets import socket_pair
from pytest_fcvm.host.supervisor.protocol import Spawner, start_program
from pytest_fcvm.model.net import Attachment
from pytest_fcvm.network import switch
from pytest_fcvm.network.switch import Counters, Link

__all__ = ["Network"]

_ANSWER_S = 30.0
_MEMBERS = 200  # addresses .10 to .209
_FIRST_HOST = 10
_SHARES = ("loss", "duplicate", "corrupt", "reorder")
_BUFFER_BYTES = 4 << 20  # a sender whose buffer is small waits for the switch

Hosts = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Member:
    """A clone that is up: what tells it who else is there, and what plugs its attachment in and out."""

    tell: Callable[[Hosts], object]
    set_link: Callable[[bool], object]


class Network:
    """An Ethernet segment of its own, with a switch that runs in a process of its own and ends with it.

    Names have addresses that stay, from the first time they are asked for. Every method may be called from any thread.
    `seed` makes the same faults happen again. All methods raise EngineError when the switch has died.
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
        self._requests = itertools.count(1)
        self.owner = getpid()
        program = start_program(spawner, f"network{number}", Path(switch.__file__), str(seed))
        self._child, self._control, self._log = program.child, program.control, program.log
        self._control.settimeout(_ANSWER_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def names(self) -> tuple[str, ...]:
        """Return who is on it now."""
        return tuple(sorted(self._plugged))

    def address(self, name: str) -> str:
        """Return the IPv4 address of a name, whether its clone is there or not."""
        return f"10.77.{self._number % 256}.{_FIRST_HOST + self._index(name)}"

    def address6(self, name: str) -> str:
        """Return the IPv6 address of a name, in the guests `ip6-NAME`, whether its clone is there or not."""
        return f"fd77:0:0:{self._number % 65536:x}::{_FIRST_HOST + self._index(name):x}"

    # -- faults

    def partition(self, *groups: Iterable[str]) -> _Partition:
        """Let nothing pass between groups of names, at once. Use it as a context manager, or `heal` later."""
        sets = tuple(frozenset(group) for group in groups)
        if len(sets) < 2 or any(one & other for one in sets for other in sets if one is not other):
            raise UsageProblem("a partition has two groups or more, none in two", hint='partition({"a"}, {"b", "c"})')
        with self._lock:
            self._cuts.append(sets)
            self._send_rules()
        return _Partition(self, sets)

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
        """Make the way from one name to another worse, from now on; None is every name. A later call goes before.

        `latency` and `jitter` (to either side) are in seconds, `bandwidth` in bytes per second, 0 without a limit, the
        others shares from 0 to 1; what is reordered comes 20 ms later than the rest. `loss=1` in one direction is a
        black hole.
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
                raise UsageProblem(f"{name}={value}", hint="times and bandwidths from 0 on, shares from 0 to 1")
        with self._lock:
            self._impairments.append((source, target, link))
            self._send_rules()

    def link_down(self, *names: str) -> _LinkDown:
        """Pull the attachments of these names out: their network cards say so. A context manager, or `heal` later.

        Raise EngineError when a clone is paused or dead.
        """
        self._set_links(names, up=False)
        return _LinkDown(self, names)

    def heal(self) -> None:
        """End all partitions and impairments, and plug all attachments in."""
        with self._lock:
            self._cuts.clear()
            self._impairments.clear()
            self._send_rules()
        self._set_links(tuple(self._down), up=True)

    # -- what went over it

    def counters(self) -> Mapping[tuple[str, str], Counters]:
        """Return the frames of every link, by source and target."""
        said = self._ask({"op": "counters"})["counters"]
        return {(source, target): Counters(**counted) for source, target, counted in said}

    @contextmanager
    def capture(self, path: str | Path) -> Iterator[Path]:
        """Write every frame that a clone sends into a pcapng file. Raise HostError where there can be none."""
        file = Path(path).absolute()
        self._ask({"op": "capture", "path": str(file)})
        try:
            yield file
        finally:
            if getpid() == self.owner:
                self._ask({"op": "end capture", "path": str(file)})

    def record(self) -> Path:
        """Write every frame into a file of the network's own, from now to its end, and return the path."""
        directory = self._log.parent
        file = directory / f"{directory.name}.pcapng"
        self._ask({"op": "capture", "path": str(file)})
        return file

    def close(self) -> None:
        """End the network; its clones are alone then. Idempotent."""
        self._child.kill()
        self._control.close()

    # -- clones

    def plug(self, name: str, wire: int | None = None) -> Attachment:
        """Return a attachment for a clone; the descriptor `wire` carries the frames of its card already, where it is one.

        Raise UsageProblem for a name that is on the network already.
        """
        with self._lock:
            if name in self._plugged:
                raise UsageProblem(f"{name!r} is on this network already", hint="give every clone a name of its own")
            index = self._index(name)
            end = None if wire is not None else self._attach_pair(name)
            if wire is not None:
                self._ask({"op": "attach", "port": name}, wire)
            self._plugged.add(name)
            mac = f"02:fc:{self._number >> 8 & 255:02x}:{self._number & 255:02x}:00:{index:02x}"
            addresses = f"{self.address(name)}/24", f"{self.address6(name)}/64"
            return Attachment(end=end, mac=mac, addresses=addresses, hosts=self._hosts())

    def joined(self, name: str, tell: Callable[[Hosts], object], set_link: Callable[[bool], object]) -> None:
        """Take note of a clone that is up, and tell the others of it.

        `tell` gives it the lines of its /etc/hosts, `set_link` plugs its attachment in or out.
        """
        with self._lock:
            self._members[name] = _Member(tell=tell, set_link=set_link)
            others = [member for other, member in self._members.items() if other != name]
            hosts, is_down = self._hosts(), name in self._down
        if is_down:
            set_link(False)
        for other in others:
            with suppress(FcvmError):  # it is on its way out, or paused: its names stay as they were
                other.tell(hosts)

    def unplug(self, name: str) -> None:
        """Take a clone off the network. Its name keeps its address."""
        with self._lock, suppress(EngineError):
            self._members.pop(name, None)
            self._plugged.discard(name)
            self._ask({"op": "detach", "port": name})

    def _attach_pair(self, name: str) -> socket.socket:
        end, port = socket_pair(socket.SOCK_DGRAM)
        try:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
            self._ask({"op": "attach", "port": name}, port.fileno())
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
        # A name has one address: Redis, for one, tries the IPv6 address first and no other, of a server without IPv6.
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
        """Tell the switch what to do with frames: partitions go before impairments, later ones before earlier ones."""
        cuts = [
            (sorted(one), sorted(other), asdict(Link(cut=True)))
            for groups in self._cuts
            for one, other in itertools.permutations(groups, 2)
        ]
        worse = [
            ([source] if source else None, [target] if target else None, asdict(link))
            for source, target, link in reversed(self._impairments)
        ]
        self._ask({"op": "rules", "rules": [*cuts, *worse]})

    def _ask(self, request: Mapping[str, Any], *descriptors: int) -> Any:
        check_owner(self.owner)
        with self._lock:
            number = next(self._requests)
            try:
                socket.send_fds(self._control, [json.dumps({**request, "id": number}).encode()], descriptors)
                said = self._hear()
                while said and said["id"] != number:  # the answer to a call that was interrupted
                    said = self._hear()
            except OSError:
                said = None
        if said is None:
            raise EngineError("the network's switch has ended", evidence={"switch": read_tail(self._log)})
        if said["error"]:
            raise HostError(f"the network's switch: {said['error']}", hint="name a file that can be written")
        return said

    def _hear(self) -> Any:
        data = self._control.recv(1 << 20)
        return json.loads(data) if data else None

    def _mend(self, groups: tuple[frozenset[str], ...]) -> None:
        with self._lock:
            if groups in self._cuts:
                self._cuts.remove(groups)
                self._send_rules()


class _LinkDown:
    """Cables that are out until the end of a `with` block, or until `Network.heal`."""

    def __init__(self, network: Network, names: tuple[str, ...]) -> None:
        self._network, self._names = network, names

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        if getpid() == self._network.owner:
            self._network._set_links(self._names, up=True)


class _Partition:
    """A partition that lasts until the end of its `with` block, or until `Network.heal`."""

    def __init__(self, network: Network, groups: tuple[frozenset[str], ...]) -> None:
        self._network, self._groups = network, groups

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        if getpid() == self._network.owner:
            self._network._mend(self._groups)
