"""What a user sees: progress during builds, sections on failures, artifacts, the summary line. Also across xdist."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Generator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from pytest_fcvm.errors import FcvmError, HostError
from pytest_fcvm.hookspecs import HARNESS, OPTIONS, RECORDINGS, REPORTER
from pytest_fcvm.host.own import environment, os

if TYPE_CHECKING:
    from _pytest.terminal import TerminalReporter

    from pytest_fcvm.clone import Clone
    from pytest_fcvm.host.paths import RunDir

__all__ = ["Reporter", "prepare_fork"]

T = TypeVar("T")

_PACKAGE = Path(__file__).parent
_PROGRESS = "progress"
_END, _END_S = b"\0\n", 5.0  # of the progress: no worker says this
_WORKER_KEY = "fcvm_shared_dir"
_COUNTS_KEY = "fcvm_counts"
_ARTIFACTS = "fcvm-artifacts"
_COUNTED = ("built", "reused", "clones", "rewound", "replaced", "kept")
_SHARED = " (shared with other tests)"


def prepare_fork(item: pytest.Item) -> None:
    """Make the run's shared directory before pytest-forked forks: a child ends by `os._exit` and never removes one."""
    if "fcvm" in item.keywords and (getattr(item.config.option, "forked", None) or item.get_closest_marker("forked")):
        with suppress(FcvmError):  # the fixture that needs it reports it
            item.config.stash[REPORTER].shared_dir()


class Reporter:
    """Prints everything that this process prints. A worker's progress goes to the controller through a FIFO."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._run: RunDir | None = None
        self._counts: list[Mapping[str, Any]] = []
        worker_input: Mapping[str, Any] = getattr(config, "workerinput", {})
        self._shared_dir: str | None = worker_input.get(_WORKER_KEY)
        self._is_worker = bool(worker_input)
        self._own: list[Clone] = []  # started since the test began
        self._shared: dict[Clone, int] = {}  # running before, and the bytes each had printed then
        self._shown = self._saved = self._in_call = False
        self._errors: list[str] = []

    # -- progress

    def shared_dir(self) -> Path:
        """Return the directory that all workers of this run share. It is made when it is first needed."""
        if self._shared_dir is None:
            from pytest_fcvm.host.paths import RunDir  # it needs a POSIX system

            self._run = RunDir().__enter__()
            self._config.add_cleanup(self._leave_run_dir)
            self._shared_dir = str(self._run.path)
        return Path(self._shared_dir)

    @property
    def owns_shared_dir(self) -> bool:
        """Say whether the shared directory belongs to this process alone and is removed with it."""
        return self._run is not None and not self._config.pluginmanager.hasplugin("dsession")

    def _leave_run_dir(self) -> None:
        if self._run is not None:
            self._run.__exit__(None, None, None)
            self._run = None

    def announce(self, text: str) -> None:
        """Show a line of progress: here, or on the controller's terminal."""
        if not self._is_worker:
            self._print(f"fcvm: {text}")
            return
        with suppress(OSError):  # the controller may not listen (quiet run) or be gone
            pipe = os.open(self.shared_dir() / _PROGRESS, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                os.write(pipe, f"{environment().get('PYTEST_XDIST_WORKER', '')}: {text}\n".encode())
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
        """Send a worker the run's shared directory, and start to read its progress.

        Without such a directory only the tests that need a VM fail.
        """
        if not hasattr(os, "mkfifo"):
            return
        first = self._shared_dir is None
        try:
            node.workerinput[_WORKER_KEY] = str(self.shared_dir())
        except HostError:
            return
        if first:
            with suppress(OSError, RuntimeError, FcvmError):  # no room, descriptor or thread: progress is not shown
                self._start_listening(self.shared_dir() / _PROGRESS)

    def _start_listening(self, path: Path) -> None:
        from pytest_fcvm.host.threads import ServiceThread

        os.mkfifo(path, 0o600)
        pipe = os.open(path, os.O_RDWR | os.O_CLOEXEC)  # for writing too: else it ends between two workers
        thread = ServiceThread(self._listen, pipe, name="fcvm-progress")
        try:
            thread.start()
        finally:
            if thread.ident is None:
                os.close(pipe)

        def end() -> None:
            with suppress(OSError):
                os.write(pipe, _END)
            thread.join(_END_S)

        self._config.add_cleanup(end)

    def _listen(self, pipe: int) -> None:
        with os.fdopen(pipe, "r", encoding="utf-8", errors="replace") as lines:
            shown: set[str] = set()
            for line in iter(lines.readline, _END.decode()):
                text = line.partition(": ")[2]
                if text in shown:  # another worker does the same, or waits for it
                    continue
                shown.add(text)
                self._print(f"fcvm {line.rstrip()}")

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Take a worker's counts."""
        counts = getattr(node, "workeroutput", {}).get(_COUNTS_KEY)
        if counts:
            self._counts.append(counts)

    def pytest_sessionfinish(self) -> None:
        """Send a worker's counts to the controller, before its VMs end."""
        harness = self._config.stash.get(HARNESS, None)
        if harness is None and not self._errors:
            return
        counts: dict[str, Any] = {**dict.fromkeys(_COUNTED, 0), "engine": "", "notes": [], "timings": []}
        if harness is not None:
            counts = harness.summary()
        counts["notes"] = [*counts["notes"], *dict.fromkeys(self._errors)]
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
        """Print the engine, the counts and the notes."""
        if not self._counts or self._config.get_verbosity() < -1:  # as pytest's own last line
            return
        total = {name: sum(int(part[name]) for part in self._counts) for name in _COUNTED}
        engines = sorted({part["engine"] for part in self._counts if part["engine"]}) or ["not probed"]
        terminalreporter.write_line(
            f"fcvm: engine {'; '.join(engines)}; snapshots built {total['built']}, reused {total['reused']}; "
            f"clones {total['clones']}"
            + (f" ({total['rewound']} in rewound VMs)" if total["rewound"] else "")
            + (f" ({total['replaced']} more died before a test took them)" if total["replaced"] else "")
        )
        if total["kept"]:
            terminalreporter.write_line(f"fcvm: clones kept: {total['kept']}; fcvm replay lists them")
        for note in sorted({note for part in self._counts for note in part["notes"]}):
            terminalreporter.write_line(f"fcvm: {note}", yellow=True)
        for line in (line for part in self._counts for line in part["timings"]):
            terminalreporter.write_line(f"fcvm: {line}")

    # -- failures

    def add_clone(self, clone: Clone) -> None:
        """Register a clone of this process."""
        self._own.append(clone)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        """Begin a test, or a rerun of it: the clones that run now are shared with earlier tests."""
        living = [clone for clone in (*self._shared, *self._own) if not clone.closed]
        self._shared = {clone: clone.printed_bytes for clone in living}
        self._own, self._shown, self._saved = [], False, False

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self) -> Generator[None, object, object]:
        """Note that the test runs: reports that come now are those of subtests."""
        self._in_call = True
        try:
            return (yield)
        finally:
            self._in_call = False

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Add the output of a failed test's clones, before teardown ends them. This never changes an outcome."""
        error = call.excinfo.value if call.excinfo else None
        if isinstance(error, FcvmError) and call.excinfo:
            info = call.excinfo
            call.excinfo = self._attempt("the traceback was not cut", lambda: _for_people(info, error)) or info
        report = yield
        if isinstance(error, FcvmError) and report.when == "setup" and report.failed:
            report.longrepr = f"{type(error).__name__}: {error}"
        before = len(self._errors)
        self._attempt("no evidence was gathered", lambda: self._add_evidence(item, report, error))
        if report.failed:
            report.sections += [("fcvm: not kept", line) for line in dict.fromkeys(self._errors[before:])]
        return report

    def _add_evidence(self, item: pytest.Item, report: pytest.TestReport, error: BaseException | None) -> None:
        clones = self._clones_of(item)
        evidence: dict[str, Mapping[str, str]] = {}
        options = self._config.stash[OPTIONS]
        if report.failed or options.artifacts == "all":
            for clone in clones:
                evidence[clone.name] = self._attempt(f"{clone.name} has no evidence", clone.evidence) or {}
        if report.failed:
            shown = {} if self._shown and report.when == "teardown" else evidence
            report.sections += _sections_of_error(error, evidence)
            report.sections += self._sections(clones, shown)
            self._shown = True
        if not (report.failed or (report.when == "call" and not self._in_call)):
            return
        if options.artifacts == "all" or (options.artifacts == "failed" and report.failed):
            from pytest_fcvm.artifacts import directory_of, write_artifacts  # a run without them must not pay for it

            root = self._config.rootpath / _ARTIFACTS
            recordings = item.stash.get(RECORDINGS, [])
            self._attempt(
                f"nothing was kept in {root}",
                lambda: write_artifacts(root / directory_of(item.nodeid), evidence, recordings),
            )
        if not self._saved and (options.keep == "all" or (options.keep == "failed" and report.failed)):
            self._saved = True
            living = [(number, clone) for number, clone in enumerate(clones) if not clone.closed]
            report.sections += [self._keep(item, clone, number) for number, clone in living]

    def _clones_of(self, item: pytest.Item) -> list[Clone]:
        """Return the clones started since the test began, then the shared ones that it used or that printed since."""
        asked = [id(value) for value in getattr(item, "funcargs", {}).values()]
        shared = list(self._shared.items())
        touched = [clone for clone, printed in shared if id(clone) in asked or clone.printed_bytes != printed]
        return [*self._own, *touched]

    def _sections(self, clones: list[Clone], evidence: Mapping[str, Mapping[str, str]]) -> list[tuple[str, str]]:
        """Return the evidence of clones as sections. The title of a shared clone's says so."""
        return [
            (
                f"fcvm {_printable(clone.name)}: {title}{_SHARED if clone in self._shared else ''}",
                _printable(text),
            )
            for clone in clones
            for title, text in evidence.get(clone.name, {}).items()
        ]

    def _keep(self, item: pytest.Item, clone: Clone, number: int) -> tuple[str, str]:
        """Save a clone of a test, and return a section that says how to replay it."""
        before = len(self._errors)
        self._attempt(
            f"{clone.name} was not kept", lambda: self._config.stash[HARNESS].keep(clone, item.nodeid, number)
        )
        title = f"fcvm {clone.name}: kept"
        if len(self._errors) > before:
            return title, f"not kept: {self._errors.pop()}"
        return title, f"fcvm replay {shlex.quote(item.nodeid)}    opens a shell in it, as it was"

    def _attempt(self, what: str, do: Callable[[], T]) -> T | None:
        """Call `do` and return its result. Report what it raises as a line, so that the test's outcome stands.

        A test may have patched anything that `do` calls, even with a function that calls `pytest.fail` or exits.
        """
        try:
            return do()
        except (KeyboardInterrupt, pytest.exit.Exception):
            raise
        except BaseException as error:  # noqa: BLE001
            self._errors.append(_printable(f"{what}: {_reason(error)}"))
            return None


def _reason(error: BaseException) -> str:
    if isinstance(error, FcvmError):
        return error.message
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    try:
        said = str(error)
    except Exception:  # noqa: BLE001  of a class that we do not know
        said = ""
    return f"{type(error).__name__}: {said}".rstrip(": ").partition("\n")[0]


def _for_people(info: pytest.ExceptionInfo[BaseException], error: FcvmError) -> pytest.ExceptionInfo[BaseException]:
    """Return the error with the frames of tests and fixtures alone, without bytes that control a terminal.

    The traceback itself is rebuilt, because pytest filters it once more before it shows it.
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


def _sections_of_error(error: BaseException | None, evidence: Mapping[str, Mapping[str, str]]) -> list[tuple[str, str]]:
    """Return the evidence of an error without the sections that its clone has too."""
    if not isinstance(error, FcvmError):
        return []
    again = evidence.get(getattr(error, "clone", ""), {})
    return [
        (f"fcvm: {title}", _printable(text))
        for title, text in error.evidence.items()
        if text.strip() and title not in again
    ]


def _printable(text: str) -> str:
    from pytest_fcvm.model.text import printable_tail  # a run without failures must not pay for it

    return printable_tail(text)
