"""Foreign programs that end with us."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_fcvm.host.process import killed_with_us, run_tool

# Its child goes on when its parent is dead, as one does that is slow to begin.
_LATE = """
import os, sys, time
from pytest_fcvm.host.process import killed_with_us
command, parent = [*map(str, killed_with_us()), *sys.argv[1:]], os.getpid()
if os.fork():
    os._exit(0)
while os.getppid() == parent:
    time.sleep(0.001)
os.execv(command[0], command)
"""


@pytest.fixture(autouse=True)
def _needs_setpriv() -> None:
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv (util-linux) is not installed")


def test_a_program_keeps_its_arguments_and_its_exit_code() -> None:
    assert run_tool([*killed_with_us(), "echo", "a b", "$HOME"], timeout_s=20) == "a b $HOME\n"
    assert subprocess.run([*killed_with_us(), "sh", "-c", "exit 9"], check=False).returncode == 9


def test_a_program_does_not_start_after_its_parent_died(tmp_path: Path) -> None:
    sign = tmp_path / "sign"
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as ended:
        command = [sys.executable, "-c", _LATE, "/usr/bin/touch", sign]
        subprocess.run(command, pass_fds=[writer], check=True, timeout=60)
        os.close(writer)
        ended.read()  # until nobody has it any more
    assert not sign.exists()
