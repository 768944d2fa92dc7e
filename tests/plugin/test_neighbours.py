"""Other plugins beside this one: their clocks, timers, random numbers and processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_fcvm.host.clock import Deadline, monotonic, wait_until

_TWO = "def test_one(fcvm_clone): pass\ndef test_two(fcvm_clone): pass\n"


@pytest.mark.parametrize("who", ["fcvm_clone", "session_fixture"])
@pytest.mark.parametrize("method", ["signal", "thread"])
def test_a_build_and_the_wait_for_one_do_not_count_towards_the_tests_timeout(
    who: str, method: str, project, registry, needs: Callable[[str], None]
) -> None:
    needs("pytest_timeout")
    project.write(
        test_a_py="import pytest\n"
        '@pytest.fixture(scope="session")\n'
        "def session_fixture(fcvm_snapshot_factory): return fcvm_snapshot_factory()\n"
        f"def test_one({who}): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:randomly", "-p", "no:asyncio", "-p", "no:cacheprovider"]
    command += ["--timeout=2", f"--timeout-method={method}", "--fcvm-image", registry.image]
    running: list[subprocess.Popen[bytes]] = []
    outputs = [project.path / "first.txt", project.path / "second.txt"]
    try:
        for output, sign in zip(
            outputs, (registry.asked.is_set, lambda: _has(outputs[1], "waiting for pid")), strict=True
        ):
            with output.open("wb") as file:
                running.append(subprocess.Popen(command, cwd=project.path, stdout=file))
            assert wait_until(sign, Deadline(60)), output.read_text()
        started = monotonic()
        wait_until(lambda: monotonic() - started > 2.5, Deadline(10))  # longer than the timeout of each
        registry.answer.set()
        assert [process.wait(60) for process in running] == [1, 1], [output.read_text() for output in outputs]
    finally:
        for process in running:
            process.kill()
            process.wait()
    for output in outputs:
        assert _has(output, "ImageError")
        assert not _has(output, "Timeout")


def _has(file: Path, text: str) -> bool:
    return text in file.read_text()


def test_the_timer_runs_again_after_a_build(project, needs: Callable[[str], None]) -> None:
    needs("pytest_timeout")
    project.write(
        test_a_py="import threading, pytest\nfrom pytest_fcvm import ImageError\n"
        "def test_one(fcvm_clone_factory):\n"
        "    with pytest.raises(ImageError):\n        fcvm_clone_factory(image='oci:gone')\n"
        "    threading.Event().wait(60)\n"
    )
    started = monotonic()
    project.run("--timeout=2").stdout.fnmatch_lines(["*Failed: Timeout (>2.0s)*"])
    assert monotonic() - started < 50


def test_without_a_timer_none_is_set(project, needs: Callable[[str], None]) -> None:
    needs("pytest_timeout")
    project.write(test_a_py=_TWO)
    assert project.run("--fcvm-image=oci:gone").parseoutcomes() == {"errors": 2}


@pytest.mark.parametrize(
    ("module", "fixture"),
    [
        ("freezegun", "with freezegun.freeze_time('2001-01-01'):"),
        ("time_machine", "with time_machine.travel('2001-01-01', tick=False):"),
    ],
)
def test_a_frozen_clock_stops_no_deadline(
    module: str, fixture: str, project, without_engine: tuple[str, ...], needs: Callable[[str], None]
) -> None:
    needs(module)
    project.write(
        conftest_py=f"import {module}\nimport pytest\n"
        f"@pytest.fixture(autouse=True)\ndef frozen():\n    {fixture}\n        yield\n",
        test_a_py="import time\ndef test_frozen():\n    assert time.gmtime().tm_year == 2001\n" + _TWO,
    )
    assert project.run(*without_engine).parseoutcomes() == {"passed": 1, "errors": 2}


def test_a_rerun_does_not_build_again(project, needs: Callable[[str], None]) -> None:
    needs("pytest_rerunfailures")
    project.write(test_a_py="def test_one(fcvm_clone): pass\n")
    result = project.run("--reruns=2", "--fcvm-image=oci:gone", "-rR")
    assert result.parseoutcomes() == {"errors": 1, "rerun": 2} or result.parseoutcomes() == {"error": 1, "rerun": 2}
    (told,) = [line for line in result.outlines if line.startswith("ImageError: ")]
    assert told.endswith("(failed before in this run)")


def test_an_asynchronous_test_is_reported_like_any_other(project, needs: Callable[[str], None]) -> None:
    needs("pytest_asyncio")
    project.write(
        pytest_ini="[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\n",
        test_a_py="async def test_one(fcvm_clone): pass\nasync def test_two(): pass\n",
    )
    result = project.pytester.runpytest_subprocess("-p", "no:randomly", "--fcvm-image=oci:gone")
    assert result.parseoutcomes() in ({"passed": 1, "errors": 1}, {"passed": 1, "error": 1})
    result.stdout.fnmatch_lines(["ImageError: *"])


def test_a_shuffled_run_is_reported_like_any_other(project, needs: Callable[[str], None]) -> None:
    needs("pytest_randomly")
    project.write(test_a_py=_TWO, test_b_py=_TWO)
    result = project.pytester.runpytest_subprocess("-p", "no:asyncio", "-p", "randomly", "--fcvm-image=oci:gone")
    assert result.parseoutcomes() == {"errors": 4}
    assert result.stdout.str().count("(failed before in this run)") >= 3


def test_unix_sockets_are_enough_to_start_processes(
    project, without_engine: tuple[str, ...], needs: Callable[[str], None]
) -> None:
    needs("pytest_socket")
    project.write(test_a_py=_TWO)
    result = project.run("--disable-socket", "--allow-unix-socket", *without_engine)
    assert result.parseoutcomes() == {"errors": 2}
    result.stdout.fnmatch_lines(["EngineUnavailable: *"])


def test_a_forked_child_ends_nothing(project, without_engine: tuple[str, ...]) -> None:
    project.write(
        test_a_py="""
import os
from pathlib import Path
import pytest
from pytest_fcvm import EngineUnavailable

def ours():
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return {pid: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in children}

def test_fork(fcvm_clone_factory):
    with pytest.raises(EngineUnavailable):
        fcvm_clone_factory()
    before = ours()
    assert before
    pid = os.fork()
    if pid == 0:
        pytest.exit("the child's own end", returncode=3)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    assert ours().keys() == before.keys()
    assert "Z" not in ours().values()

def test_after(fcvm_clone_factory):
    with pytest.raises(EngineUnavailable, match="failed before in this run"):
        fcvm_clone_factory()
"""
    )
    assert project.run(*without_engine).ret == pytest.ExitCode.OK


def test_every_fixture_belongs_to_the_process_that_made_it(project) -> None:
    script = """
import os
from pytest_fcvm.fixtures import _closing_here
with _closing_here() as stack:
    stack.callback(lambda: print("closed by", os.getpid() == parent, flush=True))
    parent = os.getpid()
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
"""
    assert project.pytester.run(sys.executable, "-c", script).outlines == ["closed by True"]


# What pytest-forked does. Its releases so far require a pytest before 9.
_FORKED = """
import os
import pytest
from _pytest.runner import runtestprotocol

def pytest_addoption(parser):
    parser.addoption("--forked", action="store_true", dest="forked")

def pytest_configure(config):
    config.addinivalue_line("markers", "forked: run in a child")

@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    if not (item.config.option.forked or item.get_closest_marker("forked")):
        return None
    pid = os.fork()
    if pid == 0:
        for report in runtestprotocol(item, log=False):
            os.write(2, f"{report.when} {report.outcome} {report.longrepr}\\n".encode())
        os._exit(0)
    os.waitpid(pid, 0)
    item.session._setupstate.teardown_exact(nextitem)
    return True
"""


@pytest.mark.parametrize("arguments", [(), ("--forked",)])
def test_a_forked_test_leaves_no_directory(
    arguments: tuple[str, ...], project, without_engine: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = tmp_path_factory.mktemp("r")
    project.write(
        conftest_py=_FORKED,
        test_a_py="import pytest\n@pytest.mark.forked\ndef test_one(fcvm_clone): pass\n"
        "@pytest.mark.forked\ndef test_two(fcvm_clone): pass\n",
    )
    result = project.run("-s", *arguments, *without_engine, XDG_RUNTIME_DIR=str(run))
    told = [line for line in result.errlines if line.startswith("setup failed ")]
    assert len(told) == 2
    assert "EngineUnavailable" in result.stderr.str()
    assert [path.name for path in (run / "fcvm").iterdir() if path.name != "admission"] == []


def test_a_forked_test_among_others_is_reported_with_what_forks_it(project, without_engine: tuple[str, ...]) -> None:
    project.write(
        conftest_py=_FORKED,
        test_a_py="import pytest\ndef test_one(fcvm_clone): pass\n"
        "@pytest.mark.forked\ndef test_two(fcvm_clone): pass\n",
    )
    result = project.run("-s", *without_engine)
    result.stderr.fnmatch_lines(["*a forked process can neither use nor start clones*"])
    result.stderr.fnmatch_lines(["*@pytest.mark.forked*--forked*"])


def test_without_unix_sockets_the_option_to_add_is_named(
    project, without_engine: tuple[str, ...], needs: Callable[[str], None]
) -> None:
    needs("pytest_socket")
    project.write(test_a_py=_TWO)
    result = project.run("--disable-socket", *without_engine)
    assert result.parseoutcomes() == {"errors": 2}
    result.stdout.fnmatch_lines(["HostError: *pytest-socket*", "hint: add --allow-unix-socket*"])


def test_a_test_that_patches_os_and_clears_the_environment_changes_nothing(
    project, without_engine: tuple[str, ...]
) -> None:
    project.write(
        conftest_py="""
import os, socket, subprocess
from unittest import mock
import pytest

@pytest.fixture(autouse=True)
def everything_faked(tmp_path):
    fakes = ["os.getpid", "os.urandom", "os.geteuid", "shutil.which", "shutil.rmtree", "secrets.token_hex"]
    fakes += ["time.time", "time.monotonic", "time.sleep", "socket.socket", "socket.create_connection"]
    fakes += ["subprocess.Popen", "subprocess.run", "builtins.open"]
    patches = [mock.patch(name) for name in fakes]
    with mock.patch.dict(os.environ, {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}, clear=True):
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in patches:
                patch.stop()
    assert list(tmp_path.iterdir()) == []
""",
        test_a_py=_TWO,
    )
    result = project.run(*without_engine)
    assert result.parseoutcomes() == {"errors": 2}
    told = [line for line in result.outlines if line.startswith("EngineUnavailable: ")]
    assert len(told) == 2, result.outlines
    assert "failed before in this run" in told[1]
