"""`--fcvm-keep` and `fcvm replay`: the clone of a failed test runs again in another process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

Fcvm = Callable[..., subprocess.CompletedProcess[str]]
FCVM = (sys.executable, "-m", "pytest_fcvm.cli")
SECRET = "not-for-everybody"


@pytest.fixture
def cache(pytester: pytest.Pytester, image: Callable[[str], str], cold_cache: Path) -> Path:
    """The cache of a run in which a test with two clones failed, and another test passed."""
    pytester.makepyfile(
        test_it="""
        def test_failed(fcvm_clone, fcvm_clone_factory):
            fcvm_clone.write_text("/srv/state", "as it was")
            fcvm_clone.write_text("/var/www/html/index.html", "as it was")
            fcvm_clone_factory(name="other").write_text("/srv/state", "other")
            assert fcvm_clone.read_text("/srv/state") == "as it should be"

        def test_passed(fcvm_clone):
            pass
        """
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n1", "--fcvm-keep=failed"]
    command += [f"--fcvm-image={image('nginx')}", f"--fcvm-cache-dir={cold_cache}", f"--fcvm-env=TOKEN={SECRET}"]
    done = subprocess.run(command, cwd=pytester.path, capture_output=True, text=True)
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert "fcvm replay test_it.py::test_failed" in done.stdout
    assert "clones kept: 2" in done.stdout
    return cold_cache


@pytest.fixture
def replay(cache: Path) -> Fcvm:
    """Return a function that runs `fcvm replay` on that cache."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [*FCVM, "replay", f"--cache-dir={cache}", *arguments]
        return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300)

    return run


def names_of(replay: Fcvm) -> tuple[str, str]:
    """Return the names of the two clones."""
    names = {kept["clone"] for kept in json.loads(replay("--json").stdout)}
    (first,) = names - {"other"}
    return first, "other"


def test_the_clone_of_a_failed_test_can_be_replayed_repeatedly(replay: Fcvm, cache: Path) -> None:
    assert [kept["test"] for kept in json.loads(replay("--json").stdout)] == ["test_it.py::test_failed"] * 2
    first, other = names_of(replay)
    script = "cat /srv/state; hostname; echo changed > /srv/state; exit 7"
    for _ in range(2):
        done = replay("test_failed", f"--clone={first}", "--", "sh", "-c", script)
        assert (done.returncode, done.stdout) == (7, "as it wasfcvm-base\n"), done.stderr
    assert replay("test_it.py::test_failed", f"--clone={other}", "--", "cat", "/srv/state").stdout == "other"


def test_a_replayed_clone_has_its_environment_which_no_manifest_contains(replay: Fcvm, cache: Path) -> None:
    assert replay("test_failed", "--clone=other", "--", "printenv", "TOKEN").stdout == f"{SECRET}\n"
    manifests = list(cache.rglob("manifest.json"))
    assert manifests
    assert not [path for path in manifests if SECRET in path.read_text()]


def test_a_replayed_clones_service_answers_at_the_printed_address(replay: Fcvm, cache: Path) -> None:
    command = [*FCVM, "replay", f"--cache-dir={cache}", "test_failed", f"--clone={names_of(replay)[0]}", "--", "cat"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert "80/tcp is 127.0.0.1:" in line
        assert httpx.get(f"http://{line.rpartition(' is ')[2].strip()}/", trust_env=False).text == "as it was"
        process.communicate("")
        assert process.returncode == 0


def test_a_missing_or_ambiguous_test_id_is_reported(replay: Fcvm) -> None:
    unclear = replay("test_failed")
    assert unclear.returncode == 2
    assert "--clone" in unclear.stderr
    unknown = replay("test_passed")
    assert unknown.returncode == 2
    assert "fcvm replay lists" in unknown.stderr


def test_a_kept_clone_is_listed_and_pruned_like_every_snapshot(replay: Fcvm, cache: Path) -> None:
    def snapshot(*arguments: str) -> str:
        command = [*FCVM, "snapshot", *arguments, f"--cache-dir={cache}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    keys = [kept["key"] for kept in json.loads(replay("--json").stdout)]
    assert snapshot("ls").count("kept of test_it.py::test_failed") == 2
    assert "valid" in snapshot("verify", keys[0])
    snapshot("rm", *keys)
    assert replay().stdout.startswith("nothing is kept")
    assert replay("test_failed").returncode == 2
