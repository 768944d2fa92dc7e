"""Owners of supervisors to be killed, and what /proc says is left of them."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import pytest_fcvm
from pytest_fcvm.host.clock import Deadline, wait_until
from pytest_fcvm.host.supervisor.supervisor import Supervisor

OWNER = Path(__file__).parents[2] / "fakes" / "owner.py"
TOKEN = "FCVM_TEST_TOKEN"
# The promise is a second; a machine with more to do than CPUs needs its share of that longer.
PROMISE_S = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


class Owner:
    """A running `fakes/owner.py`. Everything that came out of it carries its token in the environment."""

    def __init__(self, run_root: Path, isolation: str, phase: str) -> None:
        self._token = secrets.token_hex(8)
        path = str(Path(pytest_fcvm.__file__).parents[1])
        self.process = subprocess.Popen(
            [sys.executable, str(OWNER), str(run_root), isolation, phase],
            env=os.environ | {TOKEN: self._token, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        hello = self.hear()
        self.run_dir = Path(hello["run"])
        self.guard: int = hello["guard"]

    def hear(self) -> Any:
        """Return the next thing it says."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the owner has died"
        return json.loads(line)

    def ask(self, question: str) -> Any:
        """Make it do something and return what it says."""
        assert self.process.stdin is not None
        self.process.stdin.write(question.encode() + b"\n")
        self.process.stdin.flush()
        return self.hear()

    def left(self) -> set[int]:
        """Return the processes that came out of it and live, itself included."""
        found = set()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):
                    if f"{TOKEN}={self._token}".encode() in (entry / "environ").read_bytes():
                        found.add(int(entry.name))
        return found

    def spawner(self) -> int:
        """Return the process between the guard and the children."""
        return next(pid for pid in self.left() if parent_of(pid) == self.guard)

    def wait_for_families(self) -> set[int]:
        """Wait until three families of four sleep, and return everybody: they, the owner, the guard, the spawner."""
        assert wait_until(lambda: sum(name_of(pid) == "sleep" for pid in self.left()) == 12, Deadline(5.0))
        return self.left()

    def wait_until_left(self, expected: set[int]) -> set[int]:
        """Wait no longer than is promised until only these live, and return who does."""
        wait_until(lambda: self.left() == expected, Deadline(PROMISE_S), longest_interval_s=0.02)
        return self.left()

    def wait_until_gone(self) -> bool:
        """Wait no longer than is promised until the run directory is removed, and say whether."""
        return wait_until(lambda: not self.run_dir.exists(), Deadline(PROMISE_S))

    def wait_until_ended(self, pids: set[int]) -> bool:
        """Wait no longer than is promised until none of these lives, and say whether."""
        return wait_until(lambda: not pids & self.left(), Deadline(PROMISE_S))

    def end(self) -> None:
        """End all of it, whatever the test did: first as it is meant to end, then whoever is left."""
        self.process.kill()
        self.process.wait()
        self.wait_until_left(set())
        while left := self.left():
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, 9)
        self.process.communicate()


def name_of(pid: int) -> str:
    """Return the program's name, "" when it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def parent_of(pid: int) -> int:
    """Return the parent's id, from proc_pid_stat(5), 0 when it has ended."""
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


@pytest.fixture
def run_root() -> Iterator[Path]:
    """A private directory with a short path."""
    path = Path(tempfile.mkdtemp(prefix="fcvm-test-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(params=["namespace", "subreaper"])
def isolation(request: pytest.FixtureRequest) -> str:
    """Both ways to hold a tree together; the first where this machine allows it."""
    wanted: str = request.param
    if wanted == "namespace" and not _namespaces_work():
        pytest.skip("no PID namespace can be made here (neither CAP_SYS_ADMIN nor unprivileged user namespaces)")
    return wanted


@pytest.fixture
def start_owner(run_root: Path, isolation: str) -> Iterator[Callable[[str], Owner]]:
    """Start owners in a phase; all that is left of them goes at the end."""
    owners: list[Owner] = []

    def start(phase: str) -> Owner:
        owners.append(Owner(run_root, isolation, phase))
        return owners[-1]

    yield start
    for owner in owners:
        owner.end()


@pytest.fixture
def run_dir(run_root: Path) -> Path:
    """A directory for one supervisor."""
    path = run_root / "run"
    path.mkdir()
    return path


@pytest.fixture
def supervisor(run_dir: Path, isolation: str) -> Iterator[Supervisor]:
    """A supervisor in this process."""
    with Supervisor.start(run_dir, namespaces=isolation == "namespace") as running:
        assert running.isolation == isolation
        yield running


_verdict: list[bool] = []


def _namespaces_work() -> bool:
    if not _verdict:
        with tempfile.TemporaryDirectory() as directory:
            run = Path(directory) / "run"
            run.mkdir()
            with Supervisor.start(run, namespaces=True) as trial:
                _verdict.append(trial.isolation == "namespace")
    return _verdict[0]
