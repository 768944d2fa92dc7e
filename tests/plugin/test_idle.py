"""The cost of a run that uses no clone: nothing is printed, and nothing heavy imported."""

from __future__ import annotations

import json
import os
import sys
import tempfile

import pytest

_WATCH = """
import json, sys, threading

def pytest_sessionfinish(session):
    with open(f"modules-{getattr(session.config, 'workerinput', {}).get('workerid', 'main')}.json", "w") as file:
        json.dump([sorted(sys.modules), [thread.name for thread in threading.enumerate()]], file)
"""
# Each of these is a decision: every run of pytest in an environment with the plugin pays for it.
_OURS = {
    "pytest_fcvm",
    "pytest_fcvm.errors",
    "pytest_fcvm.fixtures",
    "pytest_fcvm.fixtures.marks",
    "pytest_fcvm.hookspecs",
    "pytest_fcvm.host",
    "pytest_fcvm.host.own",
    "pytest_fcvm.model",
    "pytest_fcvm.model.net",
    "pytest_fcvm.model.parse",
    "pytest_fcvm.model.settings",
    "pytest_fcvm.model.specs",
    "pytest_fcvm.options",
    "pytest_fcvm.plugin",
    "pytest_fcvm.reporting",
}
_SHARED_WITH_WORKERS = {
    "pytest_fcvm.host.clock",
    "pytest_fcvm.host.paths",
    "pytest_fcvm.host.threads",
}  # for the directory of the run
_HEAVY = {"httpx", "pyroute2", "filelock", "http.client", "ssl", "multiprocessing", "tarfile", "asyncio"}


def _modules(project, name: str = "main") -> tuple[set[str], list[str]]:
    modules, threads = json.loads((project.path / f"modules-{name}.json").read_text())
    return set(modules), threads


def _only_ours(modules: set[str]) -> set[str]:
    return {name for name in modules if name.partition(".")[0] == "pytest_fcvm"}


def _lines_of_ours(project, *arguments: str) -> list[str]:
    """Run pytest and return the plugin's output, without paths and pytest's own list of plugins."""
    lines = project.run(*arguments).outlines
    for path in (sys.executable, sys.prefix, os.path.realpath(sys.prefix), str(project.path), tempfile.gettempdir()):
        lines = [line.replace(path, "") for line in lines]
    return [line for line in lines if "fcvm" in line and not line.startswith("plugins: ")]


@pytest.fixture
def idle(project):
    """A project that uses no clone."""
    project.write(conftest_py=_WATCH, test_a_py="def test_one(): pass\ndef test_two(): pass\n")
    return project


def _run_alone(idle, *arguments: str) -> pytest.RunResult:
    """Run pytest with only this plugin, so that imports of others do not count."""
    idle.monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    return idle.pytester.runpytest_subprocess("-p", "pytest_fcvm.plugin", "-p", "no:cacheprovider", *arguments)


def test_nothing_heavy_is_imported_and_no_thread_runs(idle) -> None:
    assert _run_alone(idle).parseoutcomes() == {"passed": 2}
    modules, threads = _modules(idle)
    assert _only_ours(modules) == _OURS
    assert modules & _HEAVY == set()
    assert threads == ["MainThread"]


def test_a_run_that_only_names_an_image_imports_no_more(idle) -> None:
    assert _run_alone(idle, "--fcvm-image=nginx", "--fcvm-mem=1G").parseoutcomes() == {"passed": 2}
    assert _only_ours(_modules(idle)[0]) == _OURS


def test_workers_import_no_more_and_their_controller_the_shared_directory(idle) -> None:
    assert _run_alone(idle, "-p", "xdist", "-n2").parseoutcomes() == {"passed": 2}
    assert _only_ours(_modules(idle)[0]) == _OURS | _SHARED_WITH_WORKERS
    for worker in ("gw0", "gw1"):
        assert _only_ours(_modules(idle, worker)[0]) == _OURS


@pytest.mark.parametrize("arguments", [(), ("-v",), ("-q",), ("-n2",)])
def test_a_run_without_an_fcvm_option_prints_nothing_of_fcvm(arguments: tuple[str, ...], idle) -> None:
    assert _lines_of_ours(idle, *arguments) == []


def test_with_an_option_the_header_shows_the_image_and_there_is_no_summary(idle) -> None:
    lines = _lines_of_ours(idle, "--fcvm-image=nginx")
    assert lines == ["fcvm: image nginx, engine auto (probed when the first test asks)"]
    lines = _lines_of_ours(idle, "--fcvm-engine=qemu")
    assert lines == ["fcvm: image not set, engine qemu (probed when the first test asks)"]


def test_modules_of_the_plugin_are_not_rewritten_by_pytest(project) -> None:
    project.write(
        test_a_py="def test_one():\n"
        "    from pytest_fcvm import harness\n"
        '    assert type(harness.__loader__).__name__ == "SourceFileLoader"\n'
    )
    assert project.run().parseoutcomes() == {"passed": 1}


def test_the_plugin_can_be_disabled(idle) -> None:
    result = idle.run("-p", "no:fcvm")
    assert result.parseoutcomes() == {"passed": 2}
    assert _only_ours(_modules(idle)[0]) == set()


def test_the_commands_help_imports_little(project) -> None:
    script = (
        "import sys\nfrom pytest_fcvm.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "print('MODULES', *sys.modules)"
    )
    lines = project.pytester.run(sys.executable, "-c", script).outlines
    modules = set(lines[-1].split()[1:])
    assert lines[0].startswith("usage: fcvm")
    assert _only_ours(modules) == {"pytest_fcvm", "pytest_fcvm.cli", "pytest_fcvm.errors"}
    assert modules & (_HEAVY | {"pytest", "subprocess"}) == set()


def test_importing_the_package_imports_none_of_its_parts(project) -> None:
    script = "import sys, pytest_fcvm; print(*[name for name in sys.modules if name.startswith('pytest_fcvm')])"
    assert project.pytester.run(sys.executable, "-c", script).outlines == ["pytest_fcvm"]
