"""Clones are let in as memory allows, over real processes; a dead one holds nothing."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from pytest_fcvm.errors import HostError
from pytest_fcvm.host.admission.admission import Admission, NoRoomToPrewarm
from pytest_fcvm.host.admission.memory import HostMemory
from pytest_fcvm.host.clock import Deadline, monotonic, wait_until

# admit MIB NAME FIRST DEADLINE_S | release | fork | hammer TIMES -> one JSON line each
OTHER = """
import json, os, sys, time
from pathlib import Path
from pytest_fcvm.errors import HostError
from pytest_fcvm.host.admission.admission import Admission, NoRoomToPrewarm
from pytest_fcvm.host.admission.reservations import open_reservations
from pytest_fcvm.host.admission.memory import HostMemory

admission = Admission(
    Path(sys.argv[1]), int(sys.argv[2]) if sys.argv[2] != "-" else None, memory=HostMemory(Path(sys.argv[3]))
)
tickets = []
for line in sys.stdin:
    question, *rest = line.split()
    answer = {}
    if question == "admit":
        try:
            tickets.append(
                admission.admit(int(rest[0]), holder=rest[1], first=rest[2] == "first", deadline_s=float(rest[3]))
            )
        except HostError as error:
            answer = {"error": str(error)}
    elif question == "release":
        tickets.pop().release()
    elif question == "fork":
        answer["pid"] = os.fork()
        if answer["pid"] == 0:
            tickets.pop().release()
            time.sleep(600)
    elif question == "hammer":
        ledger = open_reservations(Path(sys.argv[1]) / "admission", None)
        answer["most"] = 0
        for _ in range(int(rest[0])):
            with admission.admit(1, holder="x", first=True, deadline_s=60):
                counted = None
                while counted is None:
                    with ledger.try_lock() as locked:
                        counted = ledger.totals().clones if locked else None
                answer["most"] = max(answer["most"], counted)
    print(json.dumps(answer), flush=True)
"""


class Other:
    """Another pytest process with an admission of its own."""

    def __init__(self, run_root: Path, max_clones: int | None, root: Path) -> None:
        limit = "-" if max_clones is None else str(max_clones)
        self.process = subprocess.Popen(
            [sys.executable, "-c", OTHER, str(run_root), limit, str(root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def tell(self, question: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(question + "\n")
        self.process.stdin.flush()

    def hear(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def ask(self, question: str) -> Any:
        self.tell(question)
        return self.hear()


@pytest.fixture
def running(tmp_path: Path) -> Callable[[int], Path]:
    """A machine of 4 GiB with as much available as the test says, when it says it."""

    def available(mib: int) -> Path:
        (tmp_path / "proc").mkdir(exist_ok=True)
        new = tmp_path / "proc" / "meminfo.new"
        new.write_text(f"MemTotal:  4194304 kB\nMemAvailable: {mib * 1024} kB\n")
        new.rename(tmp_path / "proc" / "meminfo")
        return tmp_path

    available(4096)
    return available


@pytest.fixture
def start_other(run_root: Path, tmp_path: Path) -> Iterator[Callable[..., Other]]:
    with ExitStack() as stack:

        def start(max_clones: int | None = None) -> Other:
            other = Other(run_root, max_clones, tmp_path)
            stack.callback(other.process.communicate)
            stack.callback(other.process.kill)
            return other

        yield start


def test_clones_are_admitted_while_memory_lasts_across_all_processes(
    run_root: Path, running: Callable[[int], Path], start_other: Callable[..., Other]
) -> None:
    here, there = Admission(run_root, memory=HostMemory(running(2000))), start_other()
    with here.admit(800, holder="here", first=True, deadline_s=1):
        assert there.ask("admit 800 there first 1") == {}
        # 1600 of 2000 are promised, though the clones have not touched their memory yet.
        with pytest.raises(HostError, match="no room for a clone of 300 MiB"):
            here.admit(300, holder="more", first=False, deadline_s=0.05)
        with here.admit(100, holder="small", first=False, deadline_s=1):
            pass
    with here.admit(800, holder="here again", first=True, deadline_s=1):
        pass


def test_memory_that_other_programs_have_taken_is_not_granted(run_root: Path, running: Callable[[int], Path]) -> None:
    admission = Admission(run_root, memory=HostMemory(running(2000)))
    with admission.admit(100, holder="first", first=True, deadline_s=1):
        running(500)
        with pytest.raises(HostError, match=r"no room .* \(500 MiB are available\)"):
            admission.admit(300, holder="second", first=False, deadline_s=0.05)
        with admission.admit(200, holder="third", first=False, deadline_s=1):
            pass


def test_a_lone_clone_needs_no_reserve(run_root: Path, running: Callable[[int], Path]) -> None:
    admission = Admission(run_root, memory=HostMemory(running(300)))
    with admission.admit(300, holder="alone", first=True, deadline_s=0.05):
        pass


def test_a_clone_larger_than_the_host_is_refused_at_once(run_root: Path, running: Callable[[int], Path]) -> None:
    admission = Admission(run_root, memory=HostMemory(running(4000)))
    with pytest.raises(HostError, match=r"a clone of 5000 MiB does not fit in the 4096 MiB") as caught:
        admission.admit(5000, holder="huge", first=True, deadline_s=600)
    assert "--fcvm-mem" in caught.value.hint


def test_the_deadline_names_the_holders_with_test_and_pid(
    run_root: Path, running: Callable[[int], Path], start_other: Callable[..., Other]
) -> None:
    other = start_other()
    for number in range(5):
        other.ask(f"admit 10 test_x.py::test_{number} first 1")
    admission = Admission(run_root, max_clones=5, memory=HostMemory(running(4000)))
    began = monotonic()
    with pytest.raises(HostError) as caught:
        admission.admit(10, holder="mine", first=True, deadline_s=0.2)
    assert monotonic() - began >= 0.2
    assert f"held by test_x.py::test_0 (pid {other.process.pid}, 10 MiB)" in caught.value.message
    assert "at most 5 clones" in caught.value.message
    assert "and 2 more" in caught.value.message
    assert "--fcvm-max-clones" in caught.value.hint
    assert len(caught.value.evidence["clones on this host"].splitlines()) == 5


def test_a_waiting_clone_is_admitted_when_another_process_releases(
    run_root: Path, running: Callable[[int], Path], start_other: Callable[..., Other]
) -> None:
    other = start_other(1)
    with Admission(run_root, 1, memory=HostMemory(running(4000))).admit(10, holder="x", first=True, deadline_s=1):
        other.tell("admit 10 there first 20")
        assert other.process.poll() is None
    assert other.hear() == {}


def test_a_waiting_thread_is_admitted_when_another_thread_releases(
    run_root: Path, running: Callable[[int], Path]
) -> None:
    admission = Admission(run_root, 1, memory=HostMemory(running(4000)))
    ticket = admission.admit(10, holder="a", first=True, deadline_s=1)
    got: list[object] = []
    waiter = threading.Thread(target=lambda: got.append(admission.admit(10, holder="b", first=False, deadline_s=20)))
    waiter.start()
    ticket.release()
    waiter.join(5)
    assert len(got) == 1


def test_the_reservations_of_a_killed_process_end_at_once(
    run_root: Path, running: Callable[[int], Path], start_other: Callable[..., Other]
) -> None:
    other = start_other(2)
    other.ask("admit 10 a first 1")
    other.ask("admit 10 b again 1")
    admission = Admission(run_root, 2, memory=HostMemory(running(4000)))
    with pytest.raises(HostError):
        admission.admit(10, holder="mine", first=True, deadline_s=0.02)
    other.process.kill()
    other.process.wait()
    with admission.admit(10, holder="mine", first=True, deadline_s=0.0):
        files = [entry.name for entry in (run_root / "admission").iterdir() if "-" in entry.name]
        assert [int(name.split("-")[0]) for name in files] == [os.getpid()]


def test_a_forked_child_neither_holds_nor_releases_its_parents_reservations(
    run_root: Path, running: Callable[[int], Path], start_other: Callable[..., Other]
) -> None:
    other = start_other(1)
    other.ask("admit 10 a first 1")
    child = other.ask("fork")["pid"]
    admission = Admission(run_root, 1, memory=HostMemory(running(4000)))
    try:
        with pytest.raises(HostError):
            admission.admit(10, holder="mine", first=True, deadline_s=0.05)
        other.process.kill()
        other.process.wait()
        with admission.admit(10, holder="mine", first=True, deadline_s=1):
            os.kill(child, 0)
    finally:
        os.kill(child, 9)


def test_a_test_that_holds_a_clone_goes_before_the_first_clones_of_others(
    run_root: Path, running: Callable[[int], Path], start_other: Callable[..., Other]
) -> None:
    root = running(4000)
    holder, newcomer = start_other(2), start_other(2)
    admission = Admission(run_root, 2, memory=HostMemory(root))
    mine = admission.admit(10, holder="mine", first=True, deadline_s=1)
    assert holder.ask("admit 10 one first 1") == {}
    newcomer.tell("admit 10 new first 20")
    holder.tell("admit 10 two again 20")
    assert wait_until(lambda: _has_waiting_request(run_root, holder), Deadline(5.0))
    mine.release()
    assert holder.hear() == {}, "the one that already holds a clone gets its second"
    holder.ask("release")
    assert newcomer.hear() == {}


def test_a_release_is_idempotent(run_root: Path, running: Callable[[int], Path]) -> None:
    admission = Admission(run_root, 1, memory=HostMemory(running(4000)))
    first = admission.admit(10, holder="a", first=True, deadline_s=1)
    first.release()
    second = admission.admit(10, holder="b", first=True, deadline_s=1)
    first.release()
    with pytest.raises(HostError, match=r"held by b \(pid"):
        admission.admit(10, holder="c", first=False, deadline_s=0.02)
    second.release()


def test_two_admissions_of_one_process_count_each_others_clones(run_root: Path, running: Callable[[int], Path]) -> None:
    memory = HostMemory(running(4000))
    one, two = Admission(run_root, 1, memory=memory), Admission(run_root, 1, memory=memory)
    with one.admit(10, holder="a", first=True, deadline_s=1), pytest.raises(HostError):
        two.admit(10, holder="b", first=True, deadline_s=0.02)


def test_concurrent_processes_never_exceed_the_limit(
    run_root: Path, running: Callable[[int], Path], start_other: Callable[..., Other]
) -> None:
    running(4000)
    others = [start_other(2) for _ in range(5)]
    for other in others:
        other.tell("hammer 100")
    assert {other.hear()["most"] for other in others} <= {1, 2}


def _has_waiting_request(run_root: Path, other: Other) -> bool:
    files = [file for file in (run_root / "admission").iterdir() if file.name.startswith(f"{other.process.pid}-")]
    return any(int(file.read_bytes().split()[2]) == 1 for file in files)


def test_prewarmed_clones_use_half_of_the_room_and_never_wait(run_root: Path, running: Callable[[int], Path]) -> None:
    admission = Admission(run_root, memory=HostMemory(running(2000)))
    admission.admit_prewarmed(400, holder="prewarmed")
    admission.admit_prewarmed(400, holder="prewarmed")
    started = monotonic()
    with pytest.raises(NoRoomToPrewarm, match="no room to prewarm"):
        admission.admit_prewarmed(400, holder="prewarmed")
    assert monotonic() - started < 1
    admission.admit(900, holder="a test", first=True, deadline_s=1)


def test_prewarmed_clones_use_half_of_the_limit(run_root: Path, running: Callable[[int], Path]) -> None:
    admission = Admission(run_root, 4, memory=HostMemory(running(4000)))
    tickets = [admission.admit_prewarmed(10, holder="prewarmed") for _ in range(2)]
    with pytest.raises(NoRoomToPrewarm):
        admission.admit_prewarmed(10, holder="prewarmed")
    admission.admit(10, holder="a test", first=True, deadline_s=1)
    for ticket in tickets:
        ticket.release()
    admission.admit_prewarmed(10, holder="prewarmed")


def test_a_lock_that_another_process_holds_for_a_moment_refuses_no_prewarmed_clone(
    run_root: Path, running: Callable[[int], Path]
) -> None:
    admission = Admission(run_root, memory=HostMemory(running(2000)))
    admission.admit_prewarmed(10, holder="prewarmed").release()
    with (run_root / "admission/lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(NoRoomToPrewarm):
            admission.admit_prewarmed(10, holder="prewarmed")
        threading.Timer(0.01, fcntl.flock, (lock, fcntl.LOCK_UN)).start()
        admission.admit_prewarmed(10, holder="prewarmed").release()


def test_before_a_wait_prewarmed_clones_are_released(run_root: Path, running: Callable[[int], Path]) -> None:
    admission = Admission(run_root, 2, memory=HostMemory(running(4000)))
    prewarmed = admission.admit_prewarmed(10, holder="prewarmed")
    admission.admit(10, holder="a test", first=True, deadline_s=1)
    admission.admit(10, holder="another", first=True, deadline_s=5, on_wait=prewarmed.release)


def test_where_one_process_holds_all_clones_the_wait_lasts_seconds(
    running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pytest_fcvm.host.admission.admission._OWN_S", 0.2)
    monkeypatch.setattr(os, "getpid", lambda: 4242)  # as a test may; the ticket is released all the same
    admission = Admission(tmp_path, max_clones=1, memory=HostMemory(running(4000)))
    with admission.admit(10, holder="test_a.py::test_two", first=True, deadline_s=1):
        begun = monotonic()
        with pytest.raises(HostError, match=r"this process holds all 1 .* itself; held by test_a.py::test_two \(pid"):
            admission.admit(10, holder="test_a.py::test_two", first=False, deadline_s=60)
        assert monotonic() - begun < 10
    admission.admit(10, holder="test_b.py::test_b", first=True, deadline_s=1).release()
