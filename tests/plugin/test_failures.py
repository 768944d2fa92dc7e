"""Runs that cannot have clones: every test that asks for one fails with the reason, and the others run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_fcvm.host.clock import Deadline, wait_until

_THREE = """
import pytest

def test_one(fcvm_clone): pass
def test_two(fcvm_clone): pass
@pytest.mark.fcvm
def test_three(): pass
def test_without(): pass
"""
_AGAIN = "(failed before in this run)"


def _errors(result: pytest.RunResult, kind: str) -> list[str]:
    """Return the output of the tests' set-ups, without the short summary."""
    return [line for line in result.outlines if line.startswith(f"{kind}: ")]


@pytest.fixture
def path_without_qemu(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PATH with every command of this host but QEMU."""
    directory = tmp_path_factory.mktemp("bin")
    for place in os.environ["PATH"].split(":"):
        for program in Path(place).glob("*"):
            if not program.name.startswith("qemu") and not (directory / program.name).exists():
                (directory / program.name).symlink_to(program)
    return str(directory)


def test_without_an_image_every_test_fails_with_how_to_name_one(project) -> None:
    project.write(test_a_py=_THREE)
    result = project.run()
    assert result.parseoutcomes() == {"passed": 1, "errors": 3}
    assert _errors(result, "UsageProblem") == ["UsageProblem: no image is set"] * 3
    hint = 'hint: give --fcvm-image IMAGE, or mark the test with fcvm(image="nginx:latest")'
    assert result.outlines.count(hint) == 3
    result.stdout.no_fnmatch_line("*Traceback*")
    result.stdout.no_fnmatch_line("*pytest_fcvm/*")


@pytest.mark.parametrize("workers", [(), ("-n4",)])
def test_a_missing_image_is_looked_for_once(workers: tuple[str, ...], project) -> None:
    project.write(test_a_py=_THREE, test_b_py=_THREE)
    result = project.run("--fcvm-image=oci:gone", *workers)
    assert result.parseoutcomes() == {"passed": 2, "errors": 6}
    told, gone = _errors(result, "ImageError"), project.path / "gone"
    assert [line.endswith(_AGAIN) for line in told].count(False) == 1, told
    assert {line.removesuffix(f" {_AGAIN}") for line in told} == {
        f"ImageError: image oci:{gone} cannot be read: {gone}/index.json: No such file or directory"
    }
    assert result.outlines.count("hint: check the path") == 6
    assert not [path for path in Path(os.environ["XDG_CACHE_HOME"]).rglob("*") if ".tmp-" in path.name]


def test_workers_that_waited_for_a_failed_build_do_not_try_it_again(project, registry) -> None:
    project.write(test_a_py=_THREE, test_b_py=_THREE)
    output = project.path / "output.txt"
    command = [sys.executable, "-m", "pytest", "-p", "no:randomly", "-p", "no:asyncio", "-p", "no:cacheprovider"]
    with output.open("wb") as file:
        run = subprocess.Popen([*command, "-n4", "--fcvm-image", registry.image], cwd=project.path, stdout=file)
    try:
        # One line for all that wait: a worker does not repeat what others have reported.
        assert wait_until(lambda: output.read_text().count("waiting for pid") == 1, Deadline(60)), output.read_text()
        registry.answer.set()
        run.wait(60)
    finally:
        run.kill()
        run.wait()
    told = [line for line in output.read_text().splitlines() if line.startswith("ImageError: ")]
    assert [line.endswith(_AGAIN) for line in told].count(False) == 1, told
    assert len(told) == 6


def test_the_next_run_tries_again(project) -> None:
    project.write(test_a_py="def test_one(fcvm_clone): pass\n")
    for _ in range(2):
        (told,) = _errors(project.run("--fcvm-image=oci:gone"), "ImageError")
        assert _AGAIN not in told


@pytest.mark.parametrize("workers", [(), ("-n2",)])
def test_without_an_engine_every_test_that_asked_fails_with_what_to_install(
    workers: tuple[str, ...], project, rootfs: Path, kernel: Path, path_without_qemu: str
) -> None:
    project.write(test_a_py=_THREE)
    result = project.run("--fcvm-image", str(rootfs), "--fcvm-kernel", str(kernel), *workers, PATH=path_without_qemu)
    assert result.parseoutcomes() == {"passed": 1, "errors": 3}
    reason = "no engine works here: firecracker: not installed; qemu: qemu-system-x86_64 is not installed"
    assert {line.removesuffix(f" {_AGAIN}") for line in _errors(result, "EngineUnavailable")} == {
        f"EngineUnavailable: {reason}"
    }
    assert sum(line.startswith("hint: apt-get install qemu-system-x86; ") for line in result.outlines) == 3
    assert f"fcvm: engine none ({reason}); snapshots built 0, reused 0; clones 0" in result.outlines


def test_tests_are_skipped_without_an_engine_only_when_that_was_asked_for(
    project, without_engine: tuple[str, ...]
) -> None:
    project.write(test_a_py=_THREE)
    result = project.run("-rs", *without_engine, "--fcvm-unavailable=skip")
    assert result.parseoutcomes() == {"passed": 1, "skipped": 3}
    result.stdout.fnmatch_lines(["SKIPPED *: no engine works here: *; qemu: /bin/false failed *"])


@pytest.mark.parametrize("option", ["--fcvm-qemu", "--fcvm-firecracker"])
def test_a_missing_program_is_reported_and_never_skipped(option: str, project, rootfs: Path, kernel: Path) -> None:
    project.write(test_a_py=_THREE)
    running = ("--fcvm-image", str(rootfs), "--fcvm-kernel", str(kernel))
    result = project.run(*running, option, "/nonexistent/vmm", "--fcvm-unavailable=skip")
    assert result.parseoutcomes() == {"passed": 1, "errors": 3}
    assert result.outlines.count(f"UsageProblem: {option}: /nonexistent/vmm is not a program") == 3
    assert "hint: name a program, or leave the option out to use the one on PATH" in result.outlines


def test_another_failure_is_never_skipped(project) -> None:
    project.write(test_a_py=_THREE)
    result = project.run("--fcvm-image=oci:gone", "--fcvm-unavailable=skip")
    assert result.parseoutcomes() == {"passed": 1, "errors": 3}


def test_a_failure_of_a_session_fixture_is_reported_the_same_way(project) -> None:
    project.write(
        test_a_py="import pytest\n"
        '@pytest.fixture(scope="session")\ndef shared(fcvm_snapshot_factory):\n    return fcvm_snapshot_factory()\n'
        "def test_a(shared): pass\ndef test_b(fcvm_worker_clone): pass\n"
    )
    result = project.run("--fcvm-image=oci:gone")
    assert len(_errors(result, "ImageError")) == 2
    result.stdout.no_fnmatch_line("*pytest_fcvm/*")


def test_a_factory_that_fails_inside_a_test_shows_only_the_users_lines(project) -> None:
    project.write(test_a_py="def test_a(fcvm_clone_factory):\n    fcvm_clone_factory(image='oci:gone')\n")
    result = project.run()
    result.stdout.fnmatch_lines([">*fcvm_clone_factory(image='oci:gone')", "E*ImageError: *", "E*hint: check the path"])
    result.stdout.no_fnmatch_line("*pytest_fcvm/*")


def test_a_guests_text_in_a_message_cannot_control_the_terminal(project) -> None:
    project.write(
        test_a_py="""
import pytest
from pytest_fcvm import CommandFailed

@pytest.fixture
def broken():
    raise CommandFailed("it said \\x1b]0;owned\\x07", evidence={"stderr": "\\x1b[2J" * 100_000})

def test_call(): raise CommandFailed("it said \\x1b]0;owned\\x07", hint="none")
def test_setup(broken): pass
"""
    )
    result = project.run("--junitxml=junit.xml")
    text = result.stdout.str()
    assert "\x1b" not in text
    assert text.count("it said \\x1b]0;owned\\x07") >= 2
    assert len(text) < 40_000
    assert "owned" in (project.path / "junit.xml").read_text()


def test_on_another_system_tests_are_collected_and_fail_with_what_they_require(project) -> None:
    project.write(
        conftest_py="""
import sys
import pytest

@pytest.fixture(autouse=True)
def elsewhere(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
""",
        test_a_py=_THREE,
    )
    result = project.run("--fcvm-image=x")
    assert result.parseoutcomes() == {"passed": 1, "errors": 3}
    assert _errors(result, "HostError") == ["HostError: VMs need Linux"] * 3
    assert result.outlines.count('hint: deselect their tests with -m "not fcvm"') == 3


@pytest.mark.parametrize("workers", [[], ["-n2"]])
def test_the_plugin_can_be_loaded_without_posix(workers: list[str], project) -> None:
    project.write(
        no_posix_py="import os, sys\nfor name in ('fcntl', 'resource', 'termios', 'pwd'): sys.modules[name] = None\n"
        "del os.mkfifo\n",
        test_a_py=_THREE,
    )
    script = (
        "import no_posix, sys, pytest\n"
        "sys.exit(pytest.main(['-q', '-m', 'not fcvm', '-p', 'no:cacheprovider', *sys.argv[1:]]))"
    )
    project.monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(project.path), os.environ.get("PYTHONPATH", "")]))
    result = project.pytester.run(sys.executable, "-c", script, *workers)
    assert result.parseoutcomes()["passed"] == 1, result.stderr.str()
    assert result.ret == pytest.ExitCode.OK


def test_the_hook_may_replace_the_spec_and_the_first_answer_counts(project) -> None:
    project.write(
        conftest_py="""
import dataclasses
import pytest

@pytest.hookimpl(trylast=True)
def pytest_fcvm_modify_spec(spec, item):
    return dataclasses.replace(spec, image="oci:by-the-conftest")
""",
        other_py="""
import dataclasses

def pytest_fcvm_modify_spec(spec, item):
    if item is not None and "special" in item.nodeid:
        return dataclasses.replace(spec, image="oci:by-the-plugin")
""",
        test_a_py="def test_plain(fcvm_clone): pass\ndef test_special(fcvm_clone): pass\n",
    )
    project.monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(project.path), os.environ.get("PYTHONPATH", "")]))
    plain, special = _errors(project.run("-p", "other"), "ImageError")
    assert "oci:by-the-conftest" in plain
    assert "oci:by-the-plugin" in special
