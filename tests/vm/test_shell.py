"""`fcvm shell`: a real terminal at both ends, and pipes where there is none."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from pytest_fcvm.host.clock import Deadline, wait_until
from tests.patience import PATIENCE

_START_S = 120 * PATIENCE


@pytest.fixture
def command(built_image: Callable[[str], str]) -> list[str]:
    """The command that opens a shell in nginx."""
    return [sys.executable, "-m", "pytest_fcvm.cli", "shell", built_image("nginx")]


class Screen:
    """The far end of a terminal: it records the output and types."""

    def __init__(self, controlling: int) -> None:
        self.descriptor, self.text = controlling, ""

    def type(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def wait_for(self, pattern: str) -> re.Match[str]:
        deadline = Deadline(_START_S)
        while not (found := re.search(pattern, self.text)):
            assert select.select([self.descriptor], [], [], deadline.remaining())[0], self.text
            try:
                self.text += os.read(self.descriptor, 65536).decode("utf-8", "replace")
            except OSError as error:  # EIO: the other end is closed
                raise AssertionError(self.text) from error
        self.text = self.text[found.end() :]
        return found


@contextmanager
def _terminal(command: list[str]) -> Iterator[tuple[subprocess.Popen[bytes], Screen, int]]:
    controlling, program = os.openpty()
    termios.tcsetwinsize(program, (31, 101))
    process = subprocess.Popen(command, stdin=program, stdout=program, stderr=subprocess.PIPE, start_new_session=True)
    try:
        yield process, Screen(controlling), program
    finally:
        process.kill()
        process.communicate()
        os.close(controlling)
        os.close(program)


def test_a_shell_on_a_terminal_takes_input_resizes_and_interrupts_and_returns_its_exit_code(command: list[str]) -> None:
    with _terminal(command) as (process, screen, program):
        before = termios.tcgetattr(program)
        screen.wait_for("[#$] $")
        screen.type("tty; stty size\r")
        screen.wait_for(r"/dev/pts/\d+\r\n31 101\r\n")
        screen.type("sleep 1000; echo interrupted=$?\r")
        screen.wait_for("sleep 1000")
        screen.wait_for("\n")
        screen.type("\x03")
        screen.wait_for(r"\^C")
        termios.tcsetwinsize(program, (40, 120))
        process.send_signal(signal.SIGWINCH)
        screen.type("stty size\r")
        screen.wait_for(r"40 120\r\n")
        screen.type("exit 9\r")
        assert process.wait(60 * PATIENCE) == 9
        assert termios.tcgetattr(program) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_the_terminal_is_restored_however_the_shell_ends(command: list[str], number: int) -> None:
    with _terminal(command) as (process, screen, program):
        before = termios.tcgetattr(program)
        screen.wait_for("[#$] $")
        screen.type("echo in the guest\r")
        screen.wait_for(r"in the guest\r\n")
        assert termios.tcgetattr(program) != before
        process.send_signal(number)
        process.wait(60 * PATIENCE)
        assert wait_until(lambda: termios.tcgetattr(program) == before, Deadline(10 * PATIENCE))


def test_a_command_on_pipes_passes_stdin_stdout_stderr_and_exit_code(command: list[str]) -> None:
    script = "read line; echo got $line; echo wrong >&2; test -t 0 || exit 5"
    done = subprocess.run(
        [*command, "--", "sh", "-c", script], input=b"hello\n", capture_output=True, timeout=_START_S, check=False
    )
    assert (done.returncode, done.stdout) == (5, b"got hello\n")
    assert done.stderr.endswith(b"wrong\n")


def test_without_an_image_the_shell_says_how_to_name_one() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest_fcvm.cli", "shell"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "fcvm: no image is named\nhint: fcvm shell IMAGE, or set FCVM_IMAGE\n"
