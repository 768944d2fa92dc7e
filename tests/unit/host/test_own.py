"""What a test cannot patch or move."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from pytest_fcvm.host import own
from pytest_fcvm.host.paths import run_root
from pytest_fcvm.host.process import find_tool, run_tool
from pytest_fcvm.host.sockets import connect, listen, socket_pair


def _fake(*_: object, **__: object) -> object:
    raise AssertionError("a fake was called")


def test_the_environment_is_that_of_the_innermost_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHOSE", "outer")
    leave_outer = own.capture_environment()
    monkeypatch.setenv("WHOSE", "inner")
    leave_inner = own.capture_environment()
    monkeypatch.delenv("WHOSE")
    assert own.environment()["WHOSE"] == "inner"
    leave_inner()
    assert own.environment()["WHOSE"] == "outer"
    leave_outer()
    assert "WHOSE" not in own.environment()


def test_tools_and_directories_are_found_although_a_test_changed_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tool = tmp_path / "fcvm-tool"
    tool.write_text("#!/bin/sh\necho $WHOSE\n")
    tool.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("WHOSE", "ours")
    monkeypatch.setenv("HOME", str(tmp_path))
    before = run_root()
    leave = own.capture_environment()
    for name in list(os.environ):
        monkeypatch.delenv(name)
    try:
        assert find_tool("fcvm-tool") == tool
        assert run_tool([tool], timeout_s=30) == "ours\n"
        assert own.expand_home("~/x") == f"{tmp_path}/x"
        assert run_root() == before
    finally:
        leave()


def test_a_program_runs_although_a_test_replaced_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", _fake)
    monkeypatch.setattr(subprocess, "run", _fake)
    monkeypatch.setattr(shutil, "which", _fake)
    shell = find_tool("sh")
    assert shell is not None
    assert run_tool([shell, "-c", "echo here"], timeout_s=30) == "here\n"


def test_sockets_are_made_although_a_test_replaced_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", _fake)
    monkeypatch.setattr(socket, "socket", _fake)
    one, other = socket_pair()
    with one, other:
        one.sendall(b"x")
        assert other.recv(1) == b"x"
    with listen(("127.0.0.1", 0)) as listener, connect(listener.getsockname(), timeout_s=10) as client:
        server, _ = listener.accept()
        with server:
            server.sendall(b"y")
            assert client.recv(1) == b"y"
