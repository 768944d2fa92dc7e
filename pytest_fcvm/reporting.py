"""What a person sees: progress during builds, sections on failures, artifacts, the summary line. Also across xdist."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Generator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import pytest

from pytest_fcvm.errors import FcvmError, HostError
from pytest_fcvm.hookspecs import CLONES, HARNESS, OPTIONS, RECORDINGS

if TYPE_CHECKING:
    from _pytest.terminal import TerminalReporter

    from pytest_fcvm.clone import Clone
    from pytest_fcvm.host.paths import RunDir

__all__ = ["Reporter"]

_PACKAGE = Path(__file__).parent
_PROGRESS = "progress"
_WORKER_KEY = "fcvm_shared_dir"
_COUNTS_KEY = "fcvm_counts"
_ARTIFACTS = "fcvm-artifacts"
_COUNTED = ("built", "reused", "clones", "replaced", "kept")
_LONGEST = 16 * 1024  # of a report's section


class Reporter:
    """The one place of a process that talks. A worker's progress goes through a FIFO to the controller."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._run: RunDir | None = None
        self._counts: list[Mapping[str, Any]] = []
        worker_input: Mapping[str, Any] = getattr(config, "workerinput", {})
        self._shared: str | None = worker_input.get(_WORKER_KEY)
        self._is_worker = bool(worker_input)

    # -- progress

    def shared_dir(self) -> Path:
        """Return the folder that all workers of this run share; made when first asked for."""
        if self._shared is None:
            from pytest_fcvm.host.paths import RunDir  # it needs a POSIX system

            self._run = RunDir().__enter__()
            self._config.add_cleanup(self._leave_run_dir)
            self._shared = str(self._run.path)
        return Path(self._shared)

    def _leave_run_dir(self) -> None:
        if self._run is not None:
            self._run.__exit__(None, None, None)
            self._run = None

    def announce(self, text: str) -> None:
        """Show a line of progress, wherever this process's terminal is."""
        if not self._is_worker:
            self._print(f"fcvm: {text}")
            return
        with suppress(OSError):  # the controller may not listen (quiet run) or be gone
            pipe = os.open(self.shared_dir() / _PROGRESS, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                os.write(pipe, f"{os.environ.get('PYTEST_XDIST_WORKER', '')}: {text}\n".encode())
            finally:
                os.close(pipe)

    def _print(self, line: str) -> None:
        terminal: Any = self._config.pluginmanager.get_plugin("terminalreporter")
        capture: Any = self._config.pluginmanager.get_plugin("capturemanager")
        if terminal is None or self._config.get_verbosity() < 0:
            return
        if capture is None:
            terminal.write_line(line)
            return
        with capture.global_and_fixture_disabled():
            terminal.write_line(line)
            terminal.flush()

    # -- xdist

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Tell a worker which folder the run shares, and start to listen to its progress.

        Where there can be no such folder, the tests that ask for a machine are told, and no other.
        """
        if not hasattr(os, "mkfifo"):
            return
        first = self._shared is None
        try:
            node.workerinput[_WORKER_KEY] = str(self.shared_dir())
        except HostError:
            return
        if first:
            os.mkfifo(self.shared_dir() / _PROGRESS, 0o600)
            from pytest_fcvm.host.threads import ServiceThread

            ServiceThread(self._listen, name="fcvm-progress").start()

    def _listen(self) -> None:
        # Opened for writing as well, so that it has no end between workers; the thread ends with the process.
        pipe = os.open(self.shared_dir() / _PROGRESS, os.O_RDWR | os.O_CLOEXEC)
        with os.fdopen(pipe, "r", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                self._print(f"fcvm {line.rstrip()}")

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Take a worker's counts."""
        counts = getattr(node, "workeroutput", {}).get(_COUNTS_KEY)
        if counts:
            self._counts.append(counts)

    def pytest_sessionfinish(self) -> None:
        """Hand a worker's counts to the controller, before its machines are given back."""
        harness = self._config.stash.get(HARNESS, None)
        if harness is None:
            return
        counts = harness.summary()
        output: dict[str, Any] | None = getattr(self._config, "workeroutput", None)
        if output is None:
            self._counts.append(counts)
        else:
            output[_COUNTS_KEY] = counts

    # -- what is printed at the ends

    def pytest_report_header(self) -> str | None:
        """Show the engine's cached verdict, only when an fcvm option is set."""
        options = self._config.stash[OPTIONS]
        if not options.given:
            return None
        return (
            f"fcvm: image {options.spec.image or 'not set'}, engine {options.engine} (probed when the first test asks)"
        )

    def pytest_terminal_summary(self, terminalreporter: TerminalReporter) -> None:
        """Say which engine ran, what was built, and what a person should know."""
        if not self._counts:
            return
        total = {name: sum(int(part[name]) for part in self._counts) for name in _COUNTED}
        engines = sorted({part["engine"] for part in self._counts if part["engine"]}) or ["not probed"]
        terminalreporter.write_line(
            f"fcvm: engine {'; '.join(engines)}; snapshots built {total['built']}, reused {total['reused']}; "
            f"clones {total['clones']}"
            + (f" ({total['replaced']} more died before a test took them)" if total["replaced"] else "")
        )
        if total["kept"]:
            terminalreporter.write_line(f"fcvm: machines kept: {total['kept']}; fcvm replay lists them")
        for note in sorted({note for part in self._counts for note in part["notes"]}):
            terminalreporter.write_line(f"fcvm: {note}", yellow=True)
        for line in (line for part in self._counts for line in part["timings"]):
            terminalreporter.write_line(f"fcvm: {line}")

    # -- failures

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Add what the machines of a failed test printed, before teardown ends them."""
        error = call.excinfo.value if call.excinfo else None
        if isinstance(error, FcvmError) and call.excinfo:
            call.excinfo = _for_people(call.excinfo, error)
        report = yield
        if isinstance(error, FcvmError) and report.when == "setup" and report.failed:
            report.longrepr = f"{type(error).__name__}: {error}"
        if report.failed:
            report.sections += _sections_of_error(error)
        if report.when == "call" or (report.when == "setup" and report.failed):
            clones = item.stash.get(CLONES, [])
            if report.failed:
                report.sections += [section for clone in clones for section in _sections_of_clone(clone)]
            self._keep_artifacts(item, clones, failed=report.failed)
            report.sections += self._keep_machines(item, clones, failed=report.failed)
        return report

    def _keep_artifacts(self, item: pytest.Item, clones: list[Clone], *, failed: bool) -> None:
        wish = self._config.stash[OPTIONS].artifacts
        if wish == "off" or (wish == "failed" and not failed):
            return
        folder = self._config.rootpath / _ARTIFACTS / re.sub(r"[^\w.-]+", "-", item.nodeid).strip("-")[-150:]
        for clone in clones:
            for title, text in clone.evidence().items():
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{clone.name}.{title.replace(' ', '-')}.txt").write_text(text + "\n", encoding="utf-8")
        for recording in item.stash.get(RECORDINGS, []):
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(recording, folder)

    def _keep_machines(self, item: pytest.Item, clones: list[Clone], *, failed: bool) -> list[tuple[str, str]]:
        """Save the machines of a test as the options wish, and return how to get at them."""
        wish = self._config.stash[OPTIONS].keep
        if wish == "off" or (wish == "failed" and not failed):
            return []
        return [self._keep_machine(item, clone, number) for number, clone in enumerate(clones) if not clone.closed]

    def _keep_machine(self, item: pytest.Item, clone: Clone, number: int) -> tuple[str, str]:
        title = f"fcvm {clone.name}: kept"
        try:
            self._config.stash[HARNESS].keep(clone, item.nodeid, number)
        except FcvmError as error:
            return title, f"not kept: {_printable(error.message)}"
        return title, f"fcvm replay {shlex.quote(item.nodeid)}    opens a shell in it, as it was"


def _for_people(info: pytest.ExceptionInfo[BaseException], error: FcvmError) -> pytest.ExceptionInfo[BaseException]:
    """Return the error with the frames of tests and fixtures alone, and with nothing in it that drives a terminal.

    The traceback itself is made anew: pytest cuts what it shows from that, whatever was filtered before.
    """
    error.message = _printable(error.message)
    error.__cause__, error.__suppress_context__ = None, True
    kept, frame = [], error.__traceback__
    while frame is not None:
        if _PACKAGE not in Path(frame.tb_frame.f_code.co_filename).parents:
            kept.append(frame)
        frame = frame.tb_next
    trace: TracebackType | None = None
    for frame in reversed(kept):
        trace = TracebackType(trace, frame.tb_frame, frame.tb_lasti, frame.tb_lineno)
    return pytest.ExceptionInfo.from_exception(error.with_traceback(trace)) if trace else info


def _sections_of_error(error: BaseException | None) -> list[tuple[str, str]]:
    if not isinstance(error, FcvmError):
        return []
    return [(f"fcvm: {title}", _printable(text)) for title, text in error.evidence.items() if text.strip()]


def _sections_of_clone(clone: Clone) -> list[tuple[str, str]]:
    return [(f"fcvm {clone.name}: {title}", text) for title, text in clone.evidence().items()]


def _printable(text: str) -> str:
    """Escape what a guest could use to drive a terminal or break a JUnit file."""
    lines = text.splitlines()[-100:]
    escaped = ("".join(c if c.isprintable() or c == "\t" else f"\\x{ord(c):02x}" for c in line) for line in lines)
    return "\n".join(escaped)[-_LONGEST:]
