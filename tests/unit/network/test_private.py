"""A private network as a test uses it, with its real switch. The ends of attachments stand for clones."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path

import pytest

from pytest_fcvm.errors import EngineError, GuestTimeout, HostError, UsageProblem
from pytest_fcvm.host.clock import Deadline, wait_until
from pytest_fcvm.host.supervisor.supervisor import Child, Supervisor
from pytest_fcvm.model.net import Attachment
from pytest_fcvm.network.private import Network

BROADCAST = b"\xff" * 6


@pytest.fixture
def network(supervisor: Supervisor, children: list[Child]) -> Iterator[Network]:
    with Network(supervisor, 5) as network:
        yield network


@pytest.fixture
def plug(network: Network) -> Iterator[Callable[..., list[Attachment]]]:
    """Plug clones in by their names and return their attachments."""
    with ExitStack() as stack:

        def plug(*names: str) -> list[Attachment]:
            attachments = [network.plug(name) for name in names]
            for attachment in attachments:
                stack.enter_context(attachment.packet_socket)
                attachment.packet_socket.settimeout(0.3)
            return attachments

        yield plug


def _reaches(source: Attachment, target: Attachment) -> bool:
    """Return whether a broadcast arrives."""
    source.packet_socket.send(BROADCAST + bytes.fromhex(source.mac.replace(":", "")) + b"\x08\x00words")
    try:
        return target.packet_socket.recv(100).endswith(b"words")
    except TimeoutError:
        return False


def test_a_name_keeps_its_addresses(network: Network, plug: Callable[..., list[Attachment]]) -> None:
    assert network.address("db") == "10.77.5.10"
    web, db = plug("web", "db")
    assert (db.addresses, web.addresses) == (
        ("10.77.5.10/24", "fd77:0:0:5::a/64"),
        ("10.77.5.11/24", "fd77:0:0:5::b/64"),
    )
    assert db.hosts == ("10.77.5.10 db", "fd77:0:0:5::a ip6-db", "10.77.5.11 web", "fd77:0:0:5::b ip6-web")
    assert len({db.mac, web.mac}) == 2
    assert network.names == ("db", "web")
    network.unplug("db")
    assert network.names == ("web",)
    (again,) = plug("db")
    assert (again.addresses, again.mac) == (db.addresses, db.mac)


def test_a_name_may_be_a_member_of_an_enum(network: Network, plug: Callable[..., list[Attachment]]) -> None:
    name = StrEnum("Name", ["DB"]).DB  # type: ignore[attr-defined]
    db, web = plug(name, "web")
    with network.partition({name}, {"web"}):
        assert not _reaches(web, db)
    assert _reaches(web, db)


def test_clones_get_the_names_of_those_that_join_later(network: Network, plug: Callable[..., list[Attachment]]) -> None:
    renamed: list[tuple[str, tuple[str, ...]]] = []

    def fail(_lines: tuple[str, ...]) -> None:
        raise GuestTimeout("it is paused")

    plug("a", "b", "c")
    network.joined("a", lambda lines: renamed.append(("a", lines)), lambda _up: None)
    network.joined("b", fail, lambda _up: None)
    network.joined("c", lambda lines: renamed.append(("c", lines)), lambda _up: None)
    assert [name for name, _ in renamed] == ["a", "a"]
    assert renamed[0][1] == renamed[1][1]
    assert [line.split()[1] for line in renamed[0][1]] == ["a", "ip6-a", "b", "ip6-b", "c", "ip6-c"]


def test_a_link_is_down_until_the_block_ends_or_the_network_is_healed(network: Network) -> None:
    done: list[tuple[str, bool]] = []
    for name in ("a", "b"):
        network.joined(name, lambda _lines: None, lambda up, name=name: done.append((name, up)))  # type: ignore[misc]
    with network.link_down("a"):
        assert done == [("a", False)]
    assert done == [("a", False), ("a", True)]
    network.link_down("b", "later")
    network.joined("later", lambda _lines: None, lambda up: done.append(("later", up)))
    assert done[2:] == [("b", False), ("later", False)]
    network.heal()
    assert sorted(done[4:]) == [("b", True), ("later", True)]


def test_a_name_cannot_be_on_a_network_twice(network: Network, plug: Callable[..., list[Attachment]]) -> None:
    plug("a")
    with pytest.raises(UsageProblem, match="'a' is on this network already"):
        network.plug("a")


def test_a_partition_lasts_as_long_as_its_block(network: Network, plug: Callable[..., list[Attachment]]) -> None:
    a, b, c = plug("a", "b", "c")
    assert _reaches(a, b)
    c.packet_socket.recv(100)
    with network.partition({"a"}, {"b", "c"}):
        assert not _reaches(a, b)
        assert not _reaches(b, a)
        assert _reaches(b, c)
    assert _reaches(a, b)


def test_heal_ends_partitions_and_impairments(network: Network, plug: Callable[..., list[Attachment]]) -> None:
    a, b = plug("a", "b")
    network.partition({"a"}, {"b"})
    network.impair("b", "a", loss=1)
    network.impair(latency=0.1)
    assert not _reaches(a, b)
    network.heal()
    assert _reaches(a, b)
    assert _reaches(b, a)


def test_a_later_impairment_takes_precedence(network: Network, plug: Callable[..., list[Attachment]]) -> None:
    a, b = plug("a", "b")
    network.impair(loss=1)
    assert not _reaches(a, b)
    network.impair("a", "b")
    assert _reaches(a, b)
    assert not _reaches(b, a)
    counters = network.counters()
    assert (counters["a", "b"].delivered, counters["a", "b"].lost, counters["b", "a"].lost) == (1, 1, 1)


def test_a_partition_can_have_many_names(network: Network) -> None:
    halves = [{f"n{side}-{number}" for number in range(100)} for side in range(2)]
    with network.partition(*halves):
        assert network.names == ()


@pytest.mark.parametrize("groups", [(), ({"a"},), ({"a"}, {"a", "b"})])
def test_an_impossible_partition_is_refused(network: Network, groups: tuple[set[str], ...]) -> None:
    with pytest.raises(UsageProblem, match="two groups or more"):
        network.partition(*groups)


@pytest.mark.parametrize("faults", [{"loss": 1.5}, {"latency": -1}, {"corrupt": 2}])
def test_an_impossible_fault_is_refused(network: Network, faults: dict[str, float]) -> None:
    with pytest.raises(UsageProblem, match=next(iter(faults))):
        network.impair(**faults)


def test_a_capture_ends_with_its_block(network: Network, plug: Callable[..., list[Attachment]], tmp_path: Path) -> None:
    a, b = plug("a", "b")
    with network.capture(tmp_path / "net.pcapng") as file:
        assert _reaches(a, b)
    size = file.stat().st_size
    assert _reaches(a, b)
    assert file.stat().st_size == size > 100
    with pytest.raises(HostError, match="No such file or directory"), network.capture(tmp_path / "gone" / "x"):
        pass


def test_the_end_of_the_switch_is_reported(network: Network, children: list[Child]) -> None:
    os.kill(children[0].pid, signal.SIGKILL)
    with pytest.raises(EngineError, match="the network's switch has ended"):
        network.counters()


def test_a_closed_network_leaves_no_process_and_no_directory(network: Network, children: list[Child]) -> None:
    pid, directory = children[0].pid, network.record().parent
    assert directory.exists()
    network.close()
    network.close()
    assert wait_until(lambda: not directory.exists() and not Path(f"/proc/{pid}").exists(), Deadline(20))
    network.unplug("nobody")
