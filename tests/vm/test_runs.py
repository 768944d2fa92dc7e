"""Whole pytest runs: workers, other runs at the same time, shared failures, reports, and death at any moment."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pytest_fcvm.host.clock import Deadline, monotonic, wait_until
from tests.patience import PATIENCE

Run = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def own_runtime() -> Iterator[Path]:
    """Return a directory for run directories that no other process uses. Its path is short because of sockets."""
    with tempfile.TemporaryDirectory(prefix="fcvm-", dir="/tmp") as directory:
        yield Path(directory)


@pytest.fixture
def run(pytester: pytest.Pytester, image: Callable[[str], str], cold_cache: Path) -> Iterator[Run]:
    """Start a pytest of its own with a cold cache."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, name: str = "nginx", env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        command = [
            "env",
            "--default-signal",
        ]  # a background job of a shell ignores Ctrl-C, and its children inherit that
        command += [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v", f"--fcvm-image={image(name)}"]
        command += [f"--fcvm-cache-dir={cold_cache}", *arguments]
        process = subprocess.Popen(
            command,
            cwd=pytester.path,
            env={**os.environ, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdout:
            process.stdout.close()


def ends(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=600 * PATIENCE)
    return process.returncode, output


def count(output: str, what: str) -> int:
    match = re.search(rf"{what} (\d+)", output)
    assert match, output
    return int(match[1])


def test_four_workers_build_once(run: Run, pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import pytest
        @pytest.mark.parametrize("n", range(8))
        def test_it(fcvm_clone, n):
            fcvm_clone.succeed("true")
        """
    )
    code, output = ends(run("-n", "4"))
    assert code == 0, output
    assert count(output, "snapshots built") == 1
    assert count(output, "clones") == 8


def test_five_specs_on_four_workers_build_five(run: Run, pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import pytest
        @pytest.mark.parametrize("again", range(2))
        @pytest.mark.parametrize("colour", [
            pytest.param(c, marks=pytest.mark.fcvm(env={"COLOUR": c})) for c in "abcde"
        ])
        def test_it(fcvm_clone, colour, again):
            assert fcvm_clone.succeed("echo $COLOUR").strip() == colour
        """
    )
    code, output = ends(run("-n", "4"))
    assert code == 0, output
    assert count(output, "snapshots built") == 5


def test_of_two_runs_at_once_one_builds_and_the_other_says_what_it_waits_for(
    run: Run, pytester: pytest.Pytester
) -> None:
    pytester.makepyfile("def test_it(fcvm_clone): fcvm_clone.succeed('true')")
    outputs = [ends(process) for process in (run(), run())]
    assert [code for code, _ in outputs] == [0, 0], outputs
    assert sorted(count(output, "snapshots built") for _, output in outputs) == [0, 1]
    assert any("waiting for pid" in output for _, output in outputs)


def test_a_bad_image_fails_every_test_with_one_build(run: Run, pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import pytest
        @pytest.mark.fcvm(command=["sh", "-c", "echo one build >> /tmp/x; exit 9"])
        @pytest.mark.parametrize("n", range(6))
        def test_it(fcvm_clone, n):
            pass
        """
    )
    code, output = ends(run("-n", "2"))
    assert code == 1
    assert "6 errors" in output
    assert len(re.findall(r"^WorkloadExited: .*failed before in this run", output, re.MULTILINE)) == 5, output
    assert output.count("latest: booting the kernel") == 1, output


def test_a_failing_test_shows_log_console_and_timeline(run: Run, pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import urllib.request
        def test_it(fcvm_clone):
            urllib.request.urlopen(fcvm_clone.url(80, "/"))
            fcvm_clone.wait_for_log("GET /")
            assert False
        """
    )
    code, output = ends(run("--fcvm-artifacts", "failed"))
    assert code == 1
    assert re.search(r"fcvm nginx-\w+: workload log", output), output
    assert "GET / HTTP" in output
    assert re.search(r"fcvm nginx-\w+: timeline", output)
    (kept,) = (pytester.path / "fcvm-artifacts").glob("*/*workload-log.txt")
    assert "GET / HTTP" in kept.read_text()


@pytest.mark.parametrize("chosen", ["test_", "test_second"])  # the snapshot is built for another test, or for this one
def test_the_error_names_the_test_that_holds_the_only_clone(
    run: Run, pytester: pytest.Pytester, own_runtime: Path, chosen: str
) -> None:
    pytester.makepyfile(
        """
        import pytest

        @pytest.fixture(scope="session")
        def snapshot(fcvm_snapshot_factory):
            return fcvm_snapshot_factory()

        def test_first(snapshot): pass

        def test_second(snapshot, fcvm_clone_factory):
            fcvm_clone_factory(snapshot)
            fcvm_clone_factory(snapshot)
        """
    )
    own = {"XDG_RUNTIME_DIR": str(own_runtime)}
    code, output = ends(run("-k", chosen, "--fcvm-max-clones=1", "--fcvm-pool=0", env=own))
    assert code == 1
    assert re.search(r"HostError: .*held by \S+::test_second ", output), output


_HOOKS = """
from pathlib import Path

def pytest_fcvm_clone_created(clone, item):
    with Path("created").open("a") as file:
        print(clone.name, item.name, file=file)

def pytest_fcvm_clone_failed(spec, error, item):
    with Path("failed").open("a") as file:
        print(type(error).__name__, item.name, file=file)
"""


def test_the_hooks_see_every_clone_however_it_is_made(run: Run, pytester: pytest.Pytester) -> None:
    pytester.makeconftest(_HOOKS)
    pytester.makepyfile(
        """
        from pathlib import Path

        def test_all(fcvm_clone, fcvm_worker_clone, fcvm_snapshot, fcvm_clone_factory, fcvm_group):
            with fcvm_snapshot.clone() as own:
                made = [fcvm_clone, fcvm_worker_clone, own, fcvm_clone_factory(), *fcvm_clone.fork(2)]
                made += fcvm_group({"app": {"depends_on": "db"}, "db": {}}).values()
            Path("made").write_text("".join(f"{clone.name} test_all\\n" for clone in made))
        """
    )
    code, output = ends(run("--fcvm-pool=0"))
    assert code == 0, output
    made = (pytester.path / "made").read_text().splitlines()
    assert len(made) == 8
    assert sorted((pytester.path / "created").read_text().splitlines()) == sorted(made)
    assert not (pytester.path / "failed").exists()
    assert count(output, "clones") == 8


def test_the_hook_sees_a_clone_that_does_not_start(run: Run, pytester: pytest.Pytester, own_runtime: Path) -> None:
    pytester.makeconftest(_HOOKS)
    pytester.makepyfile("def test_two(fcvm_clone, fcvm_snapshot): fcvm_snapshot.clone()")
    own = {"XDG_RUNTIME_DIR": str(own_runtime)}
    code, output = ends(run("--fcvm-max-clones=1", "--fcvm-pool=0", env=own))
    assert code == 1, output
    assert (pytester.path / "failed").read_text() == "HostError test_two\n"


def test_a_second_run_starts_its_first_test_soon(run: Run, pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_it(fcvm_clone): fcvm_clone.succeed('true')")
    assert ends(run())[0] == 0
    code, output = ends(run("--durations=5", "--durations-min=0"))
    assert code == 0
    assert count(output, "reused") == 1
    assert "booting the kernel" not in output


def processes_of(*places: Path) -> list[int]:
    """Return the processes, except this one, that work in one of the directories or name it on their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
                line += str((entry / "cwd").readlink())
            except OSError:
                continue
            if any(str(place) in line for place in places):
                found.append(int(entry.name))
    return found


PHASES = {
    "pull": ": pulling ",
    "boot": "booting the kernel",
    "ready": "waiting until it is ready",
    "snapshot": "taking the snapshot",
    "test": "test_it",
}


@pytest.mark.parametrize("namespaces", [True, False], ids=["namespaces", "no-namespaces"])
@pytest.mark.parametrize("phase", list(PHASES))
def test_nothing_is_left_after_sigkill(
    run: Run, pytester: pytest.Pytester, cold_cache: Path, own_runtime: Path, phase: str, namespaces: bool
) -> None:
    pytester.makepyfile(
        """
        import sys, time
        def test_it(fcvm_clone):
            print("in the test", flush=True)
            time.sleep(600)
        """
    )
    env = {"XDG_RUNTIME_DIR": str(own_runtime)} | ({} if namespaces else {"FCVM_NO_NAMESPACES": "1"})
    process = run("-s", env=env)
    assert process.stdout is not None
    sign = "in the test" if phase == "test" else PHASES[phase]
    for line in process.stdout:
        if sign in line:
            break
    else:
        pytest.fail("the run ended before its time")
    assert processes_of(cold_cache, own_runtime)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    died = monotonic()
    gone = wait_until(lambda: not processes_of(cold_cache, own_runtime), Deadline(10 * PATIENCE))
    assert gone, processes_of(cold_cache, own_runtime)
    assert monotonic() - died < 5  # 1 s on an idle host
    pytester.makepyfile("def test_it(fcvm_clone): fcvm_clone.succeed('true')")
    code, output = ends(run(env=env))
    assert code == 0, output
    assert not list(cold_cache.glob("*/*.tmp-*"))
    assert not [entry for entry in own_runtime.rglob("*") if re.fullmatch(r"[0-9a-f]{8}", entry.name)]


def test_ctrl_c_leaves_nothing(run: Run, pytester: pytest.Pytester, cold_cache: Path, own_runtime: Path) -> None:
    pytester.makepyfile(
        """
        import time
        def test_it(fcvm_clone):
            print("in the test", flush=True)
            time.sleep(600)
        """
    )
    process = run("-s", env={"XDG_RUNTIME_DIR": str(own_runtime)})
    assert process.stdout is not None
    for line in process.stdout:
        if "in the test" in line:
            break
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(60 * PATIENCE) == 2
    assert wait_until(lambda: not processes_of(cold_cache, own_runtime), Deadline(5 * PATIENCE))
