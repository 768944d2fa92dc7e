"""`fcvm shell`: a fresh VM of an image, and a shell in it."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import termios
import tty
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from types import FrameType
from typing import Any

from pytest_fcvm.clone import Clone
from pytest_fcvm.errors import UsageProblem
from pytest_fcvm.guest.process import GuestProcess, StreamReader
from pytest_fcvm.harness import Harness
from pytest_fcvm.host.paths import RunDir, working_dir
from pytest_fcvm.host.threads import ServiceThread
from pytest_fcvm.options import Options, Origin, build_options, environment_layer, read_layer

__all__ = ["open_shell", "read_settings", "restored_terminal", "run_in", "say", "shell_harness"]

_SHELL = ("/bin/sh", "-c", "command -v bash >/dev/null 2>&1 && exec bash -l; exec sh -l")
_PIECE = 1 << 16
_END_S = 10.0
# Restores the terminal when the pipe closes without a byte: this process was killed. The watcher has its own session,
# so that it gets no signal of ours and may set a terminal from the background.
_WATCHER = """
import ast, os, sys, termios
if not os.read(int(sys.argv[1]), 1):
    termios.tcsetattr(0, termios.TCSAFLUSH, ast.literal_eval(sys.argv[2]))
"""


def open_shell(settings: Mapping[str, Any], command: Sequence[str]) -> int:
    """Start a VM and run a command in it, or its shell. `settings` have the names of the marker's fields.

    Return the command's exit code, or 128 plus the signal's number. On a terminal the command gets one of the same
    size; else it gets this process's stdin, stdout and stderr. Raise FcvmError when the VM does not start.
    """
    options = read_settings(settings)
    if options.spec.image is None:
        raise UsageProblem("no image is named", hint="fcvm shell IMAGE, or set FCVM_IMAGE")
    with shell_harness(options) as harness, harness.snapshot(options.spec, "fcvm shell").clone() as clone:
        return run_in(clone, command)


@contextmanager
def shell_harness(options: Options) -> Iterator[Harness]:
    """Yield a harness for a command, and close it, also after SIGTERM and SIGHUP."""
    with ExitStack() as stack:
        for number in (signal.SIGTERM, signal.SIGHUP):
            stack.callback(signal.signal, number, signal.signal(number, _leave))
        shared = stack.enter_context(RunDir())  # the next start removes what a killed process leaves
        harness = Harness(options, shared_dir=shared.path, owns_shared=True, announce=say)
        stack.callback(harness.close)
        yield harness


def run_in(clone: Clone, command: Sequence[str]) -> int:
    """Run a command in a clone, or its shell, on this process's terminal if it has one. Return the exit code."""
    if os.isatty(0) and os.isatty(1):
        return _converse(clone, command or _SHELL)
    return _pipe(clone, command or _SHELL)


@contextmanager
def restored_terminal(descriptor: int) -> Iterator[None]:
    """Set a terminal to raw mode, and restore it, also when this process is killed."""
    before = termios.tcgetattr(descriptor)
    ours, theirs = os.pipe()
    try:
        command = [sys.executable, "-I", "-S", "-c", _WATCHER, str(ours), repr(before)]
        watcher = subprocess.Popen(command, stdin=descriptor, pass_fds=[ours], start_new_session=True)
        try:
            tty.setraw(descriptor, termios.TCSADRAIN)  # what was typed before is for the guest
            yield
        finally:
            termios.tcsetattr(descriptor, termios.TCSAFLUSH, before)
            os.write(theirs, b".")
            watcher.wait()
    finally:
        os.close(ours)
        os.close(theirs)


def read_settings(settings: Mapping[str, Any]) -> Options:
    """Return the options from the environment and from settings, which take precedence."""
    environment = dict(os.environ)
    origin = Origin(base=working_dir(), environment=environment)
    options = build_options(
        [
            read_layer(environment_layer(environment), origin, lambda row: row.variable),
            read_layer(settings, origin, lambda row: f"--{row.name}"),
        ]
    )
    return replace(options, pool=0)


def _leave(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def say(text: str) -> None:
    """Print a line to standard error."""
    sys.stderr.write(f"fcvm: {text}\n")


def _converse(clone: Clone, command: Sequence[str]) -> int:
    size = os.get_terminal_size(0)
    term = os.environ.get("TERM", "dumb")
    with clone.popen(command, tty=(size.lines, size.columns), env={"TERM": term}) as process, restored_terminal(0):

        def resize(*_: object) -> None:
            now = os.get_terminal_size(0)
            process.resize(now.lines, now.columns)

        before = signal.signal(signal.SIGWINCH, resize)
        try:
            with _typed_into(process):
                _copy(process.stdout, 1)
        finally:
            signal.signal(signal.SIGWINCH, before)
        return _exit_code(process)


def _pipe(clone: Clone, command: Sequence[str]) -> int:
    with clone.popen(command) as process:
        errors = ServiceThread(_copy, process.stderr, 2, name="fcvm-shell-errors")
        errors.start()
        with _typed_into(process):
            _copy(process.stdout, 1)
        errors.join()
        return _exit_code(process)


def _exit_code(process: GuestProcess) -> int:
    status = process.wait(_END_S)
    return status.code if status.code is not None else 128 + (status.signal or 0)


@contextmanager
def _typed_into(process: GuestProcess) -> Iterator[None]:
    """Forward stdin in a thread that ends with the block."""
    stop, stopping = os.pipe()
    thread = ServiceThread(_copy_in, process, stop, name="fcvm-shell-input")
    try:
        thread.start()
        yield
    finally:
        os.close(stopping)
        if thread.ident is not None:
            thread.join()
        os.close(stop)


def _copy_in(process: GuestProcess, stop: int) -> None:
    with suppress(OSError):  # the command has ended, and reads no more
        poll = select.poll()
        for descriptor in (0, stop):
            poll.register(descriptor, select.POLLIN)
        while stop not in [descriptor for descriptor, _ in poll.poll()]:
            data = os.read(0, _PIECE)
            if not data:
                process.stdin.close()
                return
            process.stdin.write(data)


def _copy(source: StreamReader, descriptor: int) -> None:
    while data := source.read1():
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
