"""The switch of a private network: where frames go, and what faults do to them. Ports are pairs of sockets."""

from __future__ import annotations

import itertools
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from pytest_fcvm.network import program
from pytest_fcvm.network.requests import CONTROL_FD, Answer, receive_answer, send_request
from pytest_fcvm.network.switch import Link, Rule, Switch

BROADCAST = b"\xff" * 6
WAIT_S = 20.0


def mac(name: str) -> bytes:
    return b"\x02\0\0\0\0" + name.encode()


def frame(source: str, target: str, words: bytes = b"words") -> bytes:
    return (BROADCAST if target == "*" else mac(target)) + mac(source) + b"\x08\x00" + words


class Bench:
    """A switch in this process, driven by the test, and the far ends of its ports."""

    def __init__(self, seed: int = 0) -> None:
        self.switch = Switch(seed)
        self._stack = ExitStack()
        self.ends: dict[str, socket.socket] = {}

    def add(self, *names: str) -> None:
        for name in names:
            end, port = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
            end.settimeout(0)
            self.ends[name] = self._stack.enter_context(end)
            self.switch.attach(name, port)

    def send(self, source: str, target: str, words: bytes = b"words") -> None:
        self.ends[source].send(frame(source, target, words))
        self.switch.take(source)

    def got(self, name: str) -> list[bytes]:
        """Return the payloads of all frames that have come to a port."""
        words = []
        while True:
            try:
                words.append(self.ends[name].recv(65536)[14:])
            except BlockingIOError:
                return words

    def rule(self, link: Link, sources: set[str] | None = None, targets: set[str] | None = None) -> None:
        freeze = lambda names: None if names is None else frozenset(names)  # noqa: E731
        self.switch.apply([Rule(sources=freeze(sources), targets=freeze(targets), link=link)])

    def close(self) -> None:
        for name in list(self.ends):
            self.switch.detach(name)
        for capture in list(self.switch._captures):
            self.switch.end_capture(capture)
        self._stack.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    bench.add("a", "b", "c")
    yield bench
    bench.close()


def test_a_frame_goes_to_all_ports_until_its_targets_port_is_known(bench: Bench) -> None:
    bench.send("a", "b", b"one")
    assert (bench.got("a"), bench.got("b"), bench.got("c")) == ([], [b"one"], [b"one"])
    bench.send("b", "a", b"two")
    bench.send("a", "b", b"three")
    assert (bench.got("a"), bench.got("b"), bench.got("c")) == ([b"two"], [b"three"], [])


def test_a_broadcast_reaches_all_other_ports(bench: Bench) -> None:
    bench.send("a", "*")
    assert (bench.got("a"), bench.got("b"), bench.got("c")) == ([], [b"words"], [b"words"])


def test_a_mac_that_moves_to_another_port_is_found_there(bench: Bench) -> None:
    bench.send("b", "*")
    bench.ends["c"].send(frame("b", "*"))
    bench.switch.take("c")
    for name in "abc":
        bench.got(name)
    bench.send("a", "b", b"found")
    assert (bench.got("b"), bench.got("c")) == ([], [b"found"])


def test_a_detached_port_is_forgotten(bench: Bench) -> None:
    bench.send("b", "*")
    bench.got("a")
    bench.switch.detach("b")
    bench.send("a", "b")
    assert bench.got("c")[-1] == b"words"
    bench.add("b")
    bench.send("a", "*", b"again")
    assert bench.got("b") == [b"again"]


def test_a_datagram_that_is_no_frame_is_ignored(bench: Bench) -> None:
    bench.ends["a"].send(b"short")
    bench.switch.take("a")
    assert bench.got("b") == []
    assert bench.switch.counters == {}


def test_a_cut_affects_one_direction_and_is_counted(bench: Bench) -> None:
    bench.rule(Link(cut=True), {"a"}, {"b"})
    bench.send("a", "*")
    bench.send("b", "*")
    assert (bench.got("b"), bench.got("a"), len(bench.got("c"))) == ([], [b"words"], 2)
    assert (bench.switch.counters["a", "b"].cut, bench.switch.counters["b", "a"].cut) == (1, 0)


def test_the_first_rule_that_applies_counts(bench: Bench) -> None:
    clear = Rule(sources=frozenset("a"), targets=None, link=Link())
    cut = Rule(sources=None, targets=None, link=Link(cut=True))
    bench.switch.apply([clear, cut])
    bench.send("a", "*")
    bench.send("c", "*")
    assert (bench.got("b"), bench.got("a")) == ([b"words"], [])


@pytest.mark.parametrize(("name", "counter"), [("loss", "lost"), ("duplicate", "duplicated"), ("corrupt", "corrupted")])
def test_faults_hit_a_share_of_frames_and_the_same_ones_with_the_same_seed(name: str, counter: str) -> None:
    seen = []
    for seed in (1, 1, 2):
        bench = Bench(seed)
        bench.add("a", "b")
        bench.rule(Link(**{name: 0.3}))
        got = []
        for number in range(1000):
            bench.send("a", "b", b"%04d" % number)
            got += bench.got("b")
        hit = getattr(bench.switch.counters["a", "b"], counter)
        assert 240 < hit < 360  # binomial: four standard deviations to either side
        whole = [b"%04d" % number for number in range(1000)]
        if name == "loss":
            assert len(got) == 1000 - hit
        elif name == "duplicate":
            assert len(got) == 1000 + hit
        else:
            assert sum(one != other for one, other in zip(got, whole, strict=True)) == hit
        seen.append(got)
        bench.close()
    assert seen[0] == seen[1] != seen[2]


def test_latency_delays_frames_and_keeps_their_order(bench: Bench) -> None:
    bench.rule(Link(latency=0.05))
    began = time.monotonic()
    for number in range(10):
        bench.send("a", "b", b"%d" % number)
    assert bench.got("b") == []
    assert 0 < bench.switch.wait_s() <= 0.05
    while bench.switch.wait_s() < 3600:
        time.sleep(bench.switch.wait_s())
        bench.switch.deliver_due()
    assert time.monotonic() - began >= 0.05
    assert bench.got("b") == [b"%d" % number for number in range(10)]


def test_a_reordered_frame_comes_after_later_ones(bench: Bench) -> None:
    bench.rule(Link(latency=0.01, reorder=0.3))
    for number in range(1000):
        bench.send("a", "b", b"%04d" % number)
    while bench.switch.wait_s() < 3600:
        time.sleep(bench.switch.wait_s())
        bench.switch.deliver_due()
    got = bench.got("b")
    late = bench.switch.counters["a", "b"].reordered
    assert 240 < late < 360
    assert sorted(got) == [b"%04d" % number for number in range(1000)]
    assert got != sorted(got)


def test_jitter_spreads_delays_to_either_side(bench: Bench) -> None:
    bench.rule(Link(latency=1.0, jitter=0.5))
    now = time.monotonic()
    for _ in range(500):
        bench.send("a", "b")
    delays = [due - now for due, *_ in bench.switch._delayed]
    assert 0.5 <= min(delays) < 0.56
    assert 1.44 < max(delays) <= 1.6
    assert 0.9 < statistics.mean(delays) < 1.1


def test_a_bandwidth_delays_frames_and_drops_those_that_would_wait_too_long(bench: Bench) -> None:
    bench.rule(Link(bandwidth=10_000))
    now = time.monotonic()
    for _ in range(30):
        bench.send("a", "b", b"x" * 986)  # a frame of 1000 bytes takes 100 ms
    due = sorted(due - now for due, *_ in bench.switch._delayed if _[1].name == "b")
    assert len(due) == bench.switch.counters["a", "b"].taken - bench.switch.counters["a", "b"].full == 10
    assert [round(each, 1) for each in due] == [round(0.1 * (number + 1), 1) for number in range(10)]


def test_a_port_that_does_not_read_delays_no_other_port(bench: Bench) -> None:
    bench.send("b", "*")
    for _ in range(20_000):
        bench.send("a", "b", b"x" * 1000)
    counted = bench.switch.counters["a", "b"]
    assert counted.full > 0
    assert counted.delivered == len(bench.got("b"))
    bench.send("a", "c", b"through")
    assert bench.got("c")[-1] == b"through"


def test_captures_are_independent(bench: Bench, tmp_path: Path) -> None:
    for name in ("whole", "part"):
        bench.switch.capture(str(tmp_path / name))
    bench.send("a", "b", b"one")
    bench.switch.end_capture(str(tmp_path / "part"))
    bench.send("a", "b", b"two")
    bench.switch.end_capture(str(tmp_path / "whole"))
    part, whole = ((tmp_path / name).read_bytes() for name in ("part", "whole"))
    assert (b"one" in part, b"two" in part) == (True, False)
    assert (b"one" in whole, b"two" in whole) == (True, True)


def test_a_capture_is_pcapng_with_every_frame_sent(bench: Bench, tmp_path: Path) -> None:
    bench.switch.capture(str(tmp_path / "net.pcapng"))
    bench.rule(Link(cut=True))
    bench.send("a", "*", b"one")
    bench.send("b", "a", b"three")
    bench.switch.end_capture(str(tmp_path / "net.pcapng"))
    bench.send("a", "b", b"after the capture")
    blocks = list(_blocks((tmp_path / "net.pcapng").read_bytes()))
    assert [kind for kind, _ in blocks] == [0x0A0D0D0A, 1, 6, 1, 6]
    packets = [body for kind, body in blocks if kind == 6]
    lengths = [struct.unpack_from("<I", body, 12)[0] for body in packets]
    assert [body[20 : 20 + length] for body, length in zip(packets, lengths, strict=True)] == [
        frame("a", "*", b"one"),
        frame("b", "a", b"three"),
    ]
    micro_s = [(high << 32 | low) for high, low in (struct.unpack_from("<II", body, 4) for body in packets)]
    assert all(abs(each / 1e6 - time.time()) < WAIT_S for each in micro_s)


def _blocks(data: bytes) -> Iterator[tuple[int, bytes]]:
    while data:
        kind, length = struct.unpack_from("<II", data)
        assert data[length - 4 : length] == struct.pack("<I", length)
        assert length % 4 == 0
        yield kind, data[8 : length - 4]
        data = data[length:]


# -- the helper program


@pytest.fixture
def ask() -> Iterator[Callable[..., Answer]]:
    """Run the switch as a program and return a function that asks it."""
    control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    control.settimeout(WAIT_S)
    run = f"sys.argv = [{program.__file__!r}, 'switch', '7']; runpy.run_path(sys.argv[0], run_name='__main__')"
    bootstrap = f"import os, runpy, sys; os.dup2({theirs.fileno()}, {CONTROL_FD}); {run}"
    process = subprocess.Popen([sys.executable, "-I", "-S", "-c", bootstrap], pass_fds=[theirs.fileno()])
    theirs.close()
    numbers = itertools.count(1)

    def ask(operation: str, *descriptors: int, **arguments: object) -> Answer:
        number = next(numbers)
        send_request(control, number, operation, arguments, descriptors)
        answer = receive_answer(control)
        assert answer.number == number
        return answer

    yield ask
    control.close()
    assert process.wait(WAIT_S) == 0  # it ends with its control socket


def test_the_program_joins_ports_and_counts(ask: Callable[..., Answer], tmp_path: Path) -> None:
    ends = {}
    with ExitStack() as stack:
        for name in "ab":
            ends[name], port = (
                stack.enter_context(end) for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
            )
            ends[name].settimeout(WAIT_S)
            assert ask("attach", port.fileno(), name=name).error == ""
        ends["a"].send(frame("a", "b"))
        assert ends["b"].recv(100) == frame("a", "b")
        assert ask("rules", rules=[(None, ["a"], {"cut": True})]).error == ""
        ends["b"].send(frame("b", "a"))
        ends["a"].send(frame("a", "b", b"second"))
        assert ends["b"].recv(100) == frame("a", "b", b"second")
        counted = {(source, target): counters for source, target, counters in ask("counters").value}
        assert (counted["a", "b"]["delivered"], counted["b", "a"]["cut"]) == (2, 1)
        assert ask("detach", name="a").error == ""
        gone = str(tmp_path / "gone" / "x")
        assert ask("capture", path=gone).error == f"{gone}: No such file or directory"
        assert ask("dance").error == "dance: there is no such request"
