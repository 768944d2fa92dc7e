"""The command `fcvm`: what it prints where, and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_fcvm.cli import main
from pytest_fcvm.cli.doctor import Finding, _features, examine, render
from pytest_fcvm.errors import FcvmError, HostError, UsageProblem

_GOOD = Finding(what="skopeo", ok=True, detail="skopeo version 1.9")
_MISSING = Finding(what="mksquashfs", ok=False, detail="not installed", remedy="apt-get install squashfs-tools")
_OPTIONAL = Finding(what="KVM", ok=False, detail="no /dev/kvm", remedy="nothing has to be done", needed=False)


def _fcvm(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest_fcvm.cli", *arguments]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120)


def test_findings_are_shown_with_what_to_do_about_them() -> None:
    text = render([_GOOD, _MISSING, _OPTIONAL], as_json=False, colour=False)
    assert text.splitlines() == [
        "  ok  skopeo: skopeo version 1.9",
        "FAIL  mksquashfs: not installed",
        "      → apt-get install squashfs-tools",
        "  no  KVM: no /dev/kvm",
        "      → nothing has to be done",
        "1 of the needed checks failed",
    ]
    assert render([_GOOD, _OPTIONAL], as_json=False, colour=False).endswith("everything that is needed works\n")


def test_colours_are_for_terminals() -> None:
    assert "\033[31mFAIL\033[0m  mksquashfs" in render([_MISSING], as_json=False, colour=True)
    assert "\033" not in render([_MISSING], as_json=False, colour=False)


def test_findings_are_data_when_asked_for() -> None:
    (finding,) = json.loads(render([_MISSING], as_json=True, colour=True))
    assert finding == {
        "what": "mksquashfs",
        "ok": False,
        "detail": "not installed",
        "remedy": "apt-get install squashfs-tools",
        "needed": True,
    }


def test_the_doctor_tries_everything_also_after_a_failure_and_says_the_command(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    done = _fcvm("doctor", "--json", "--cache-dir", str(tmp_path / "cache"), PATH=str(tmp_path / "bin"))
    assert done.returncode == 1
    findings = {finding["what"].partition(" (")[0]: finding for finding in json.loads(done.stdout)}
    assert {name for name, finding in findings.items() if not finding["ok"] and finding["needed"]} >= {
        "skopeo",
        "mksquashfs",
        "engine",
    }
    assert findings["skopeo"]["remedy"] == "apt-get install skopeo"
    assert findings["mksquashfs"]["remedy"] == "apt-get install squashfs-tools"
    kernel = findings["guest kernel"]
    assert "pytest_fcvm_kernel" in kernel["detail"] if kernel["ok"] else "--fcvm-kernel" in kernel["remedy"]
    assert findings["cache directory"]["detail"].startswith(str(tmp_path / "cache"))
    assert findings["lifetimes"]["ok"]
    assert all(finding["remedy"] for finding in findings.values() if not finding["ok"])


def test_the_doctor_leaves_no_process_and_no_run_directory(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o700)
    (tmp_path / "bin").mkdir()
    short = Path(f"/tmp/fcvm-test-{os.getpid()}")
    short.symlink_to(tmp_path / "run")  # a run directory's path is short
    try:
        done = _fcvm(
            "doctor", "--cache-dir", str(tmp_path / "cache"), PATH=str(tmp_path / "bin"), XDG_RUNTIME_DIR=str(short)
        )
    finally:
        short.unlink()
    assert f"run directory: {short}/fcvm" in done.stdout
    assert [path for path in (tmp_path / "run/fcvm").iterdir() if path.is_dir()] == []


def _harness(**kernel: object) -> Any:
    return SimpleNamespace(provision=SimpleNamespace(kernel=SimpleNamespace(**kernel)))


def test_what_a_distributions_kernel_lacks_is_reported_with_the_wheel_that_has_it(tmp_path: Path) -> None:
    (tmp_path / "tun.ko").touch()
    (tmp_path / "nf_tables.ko.xz").touch()
    stock = _harness(release="6.1.0-cloud", modules_dir=tmp_path)
    with pytest.raises(FcvmError, match=r"6\.1\.0-cloud lacks iptables, .*, VXLAN, ") as caught:
        _features(stock)
    assert "pytest-fcvm-kernel-x86-64" in caught.value.hint
    ours = _harness(release="6.12", modules_dir=None)
    assert _features(ours) == "everything is built in"


def test_a_cache_that_cannot_be_used_is_reported_with_the_option(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    findings = {finding.what: finding for finding in examine(str(tmp_path / "file"))}
    assert not findings["cache directory"].ok
    assert findings["cache directory"].remedy == "name another directory with --fcvm-cache-dir"


@pytest.mark.parametrize(
    ("error", "code"),
    [(UsageProblem("bad", hint="good"), 2), (HostError("bad", hint="good"), 1), (FcvmError("bad"), 1)],
)
def test_an_error_goes_to_standard_error_with_its_hint_and_its_exit_code(
    error: FcvmError, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_cache_dir: str | None) -> list[Finding]:
        raise error

    monkeypatch.setattr("pytest_fcvm.cli.doctor.examine", fail)
    assert main(["doctor"]) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == ("fcvm: bad\nhint: good\n" if error.hint else "fcvm: bad\n")


def test_an_interrupted_command_ends_as_the_shell_expects(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_cache_dir: str | None) -> list[Finding]:
        raise KeyboardInterrupt

    monkeypatch.setattr("pytest_fcvm.cli.doctor.examine", interrupt)
    assert main(["doctor"]) == 130


def test_wrong_usage_and_help_end_as_usual() -> None:
    assert (_fcvm("dance").returncode, _fcvm().returncode) == (2, 2)
    helped = _fcvm("--help")
    assert helped.returncode == 0
    assert "doctor" in helped.stdout
    assert _fcvm("--version").stdout == f"fcvm {version('pytest-fcvm')}\n"


@pytest.mark.parametrize("words", [["doctor", "--", "x"], ["snapshot", "ls", "--", "x"]])
def test_a_command_behind_two_hyphens_is_wrong_where_none_is_run(words: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2


def test_a_command_to_replay_needs_a_test(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "--cache-dir", str(tmp_path), "--", "true"]) == 2
    assert "fcvm replay TEST -- COMMAND" in capsys.readouterr().err
