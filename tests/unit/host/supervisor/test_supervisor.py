"""Spawning, hearing of ends, and leaving no descriptor, thread or directory behind."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import FrameType

import pytest

import pytest_fcvm
from pytest_fcvm.errors import HostError, UsageProblem
from pytest_fcvm.host.clock import Deadline, monotonic, wait_until
from pytest_fcvm.host.supervisor.supervisor import _BOOTSTRAP, Child, ChildExit, Supervisor

LOG = Path("log")


def spawn_python(supervisor: Supervisor, code: str, **more: object) -> Child:
    return supervisor.spawn([sys.executable, "-I", "-S", "-c", code], name="python", stdout=LOG, **more)  # type: ignore[arg-type]


def service_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "fcvm-exits"]


def spawner_of(supervisor: Supervisor) -> int:
    return next(pid for pid, fields in _processes() if int(fields[1]) == supervisor.guard_pid)


@pytest.mark.parametrize(
    ("script", "expected"),
    [("exit 0", ChildExit(code=0)), ("exit 7", ChildExit(code=7)), ("kill -TERM $$", ChildExit(signal=15))],
)
def test_the_end_of_a_child_is_reported_as_code_or_signal(
    supervisor: Supervisor, script: str, expected: ChildExit
) -> None:
    child = supervisor.spawn(["sh", "-c", script], name="sh", stdout=LOG)
    assert child.wait(5) == expected
    assert child.exited == expected


def test_a_running_child_has_the_id_that_ps_shows_and_a_pidfd_for_its_end(supervisor: Supervisor) -> None:
    child = supervisor.spawn(["sleep", "600"], name="sleep", stdout=LOG)
    # The kernel lets the spawner go on a moment before the new program has its name.
    assert wait_until(lambda: Path(f"/proc/{child.pid}/comm").read_text() == "sleep\n", Deadline(1.0))
    watch = select.poll()
    watch.register(child.pidfd, select.POLLIN)
    assert watch.poll(0) == []
    child.kill()
    assert child.wait(5) == ChildExit(signal=9)
    assert not Path(f"/proc/{child.pid}").exists()


def test_wait_ends_at_its_deadline_with_the_name_and_the_pid(supervisor: Supervisor) -> None:
    child = supervisor.spawn(["sleep", "600"], name="clone-1", stdout=LOG)
    with pytest.raises(HostError, match=rf"clone-1 \(pid {child.pid}\) did not end within 0.01 s"):
        child.wait(0.01)


def test_stdout_and_stderr_are_appended_to_one_private_file_in_the_owned_directory(supervisor: Supervisor) -> None:
    home = supervisor.make_dir("clone")
    (home / "log").write_text("before\n")
    supervisor.spawn(["sh", "-c", "echo out; echo err >&2; pwd"], name="sh", stdout=LOG, owned_dir=home).wait(5)
    assert (home / "log").read_text() == f"before\nout\nerr\n{home}\n"
    supervisor.spawn(["true"], name="sh", stdout=Path("new"), owned_dir=home).wait(5)
    assert (home / "new").stat().st_mode & 0o777 == 0o600


def test_a_child_starts_in_the_given_directory_and_environment(supervisor: Supervisor, tmp_path: Path) -> None:
    env = {"ONLY": "this", "BYTES": "\udcff"}
    child = supervisor.spawn(["/usr/bin/env"], name="env", stdout=tmp_path / "env", cwd=tmp_path, env=env)
    child.wait(5)
    assert sorted((tmp_path / "env").read_bytes().splitlines()) == [b"BYTES=\xff", b"ONLY=this"]
    supervisor.spawn(["/bin/pwd"], name="pwd", stdout=LOG, cwd=tmp_path).wait(5)
    assert (tmp_path / "log").read_text() == f"{tmp_path}\n"


def test_a_patched_environment_does_not_reach_children(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LD_DEBUG", "all")
    supervisor.spawn(["/usr/bin/env"], name="env", stdout=tmp_path / "env").wait(5)
    assert "LD_DEBUG" not in (tmp_path / "env").read_text()


def test_descriptors_have_their_numbers_even_where_the_numbers_overlap(supervisor: Supervisor, tmp_path: Path) -> None:
    pipes = [os.pipe() for _ in range(12)]
    # The spawner receives them under numbers in this same range, and they are turned round.
    targets = dict(zip(range(14, 2, -1), (write for _, write in pipes), strict=True))
    code = "import os; [os.write(number, b'%d' % number) for number in range(3, 15)]"
    assert spawn_python(supervisor, code, fds=targets).wait(5) == ChildExit(code=0)
    for target, (read, write) in zip(targets, pipes, strict=True):
        os.close(write)
        assert os.read(read, 10) == b"%d" % target
        os.close(read)


def test_a_child_gets_no_other_descriptor(supervisor: Supervisor, run_dir: Path) -> None:
    read, write = os.pipe()
    os.set_inheritable(read, True)  # noqa: FBT003 - it takes no keyword
    code = "import os; print([int(n) for n in os.listdir('/proc/self/fd') if os.path.exists('/proc/self/fd/' + n)])"
    spawn_python(supervisor, code, fds={5: write}).wait(5)
    os.close(read)
    os.close(write)
    assert (run_dir / "log").read_text() == "[0, 1, 2, 5]\n"


def test_the_supervisor_holds_no_descriptor_that_pytest_left_inheritable(run_dir: Path, isolation: str) -> None:
    read, write = os.pipe()
    os.set_inheritable(write, True)  # noqa: FBT003 - it takes no keyword
    with Supervisor.start(run_dir, namespaces=isolation == "namespace") as supervisor:
        assert supervisor.isolation == isolation
        os.close(write)
        os.set_blocking(read, False)
        assert os.read(read, 1) == b"", "somebody still holds the other end"
    os.close(read)


def test_stdin_is_empty_unless_given(supervisor: Supervisor, run_dir: Path) -> None:
    supervisor.spawn(["readlink", "/proc/self/fd/0"], name="readlink", stdout=LOG).wait(5)
    assert (run_dir / "log").read_text() == "/dev/null\n"
    read, write = os.pipe()
    os.write(write, b"hello")
    os.close(write)
    supervisor.spawn(["cat"], name="cat", stdout=Path("cat"), fds={0: read}).wait(5)
    os.close(read)
    assert (run_dir / "cat").read_text() == "hello"


def test_a_child_starts_with_no_signal_blocked_ignored_or_caught(run_dir: Path, isolation: str) -> None:
    ignored = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2, signal.SIGCHLD})
    try:
        with Supervisor.start(run_dir, namespaces=isolation == "namespace") as supervisor:
            supervisor.spawn(["cat", "/proc/self/status"], name="cat", stdout=LOG).wait(5)
            status = dict(line.split(":") for line in (run_dir / "log").read_text().splitlines())
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        signal.signal(signal.SIGUSR1, ignored)
    glibc = 0b11 << 31  # 32 and 33 are the C library's own, out of reach for everybody
    assert [int(status[name], 16) & ~glibc for name in ("SigBlk", "SigIgn", "SigCgt")] == [0, 0, 0]


def test_a_child_leads_its_own_session_and_has_the_given_niceness(supervisor: Supervisor) -> None:
    child = supervisor.spawn(["sleep", "600"], name="sleep", stdout=LOG, nice=5)
    assert os.getsid(child.pid) == os.getpgid(child.pid) == child.pid
    assert os.getpriority(os.PRIO_PROCESS, child.pid) == os.getpriority(os.PRIO_PROCESS, 0) + 5


def test_the_other_processes_of_a_childs_group_end_with_it(supervisor: Supervisor, run_dir: Path) -> None:
    child = supervisor.spawn(["sh", "-c", "sleep 600 & echo started"], name="sh", stdout=LOG)
    session = child.pid
    child.wait(5)
    assert (run_dir / "log").read_text() == "started\n"
    assert wait_until(lambda: not _members_of_session(session), Deadline(1.0))


def test_a_child_can_be_stopped_and_continued(supervisor: Supervisor) -> None:
    child = supervisor.spawn(["sleep", "600"], name="sleep", stdout=LOG)
    child.send_signal(signal.SIGSTOP)
    assert wait_until(lambda: _state(child.pid) == "T", Deadline(2.0))
    child.send_signal(signal.SIGCONT)
    assert wait_until(lambda: _state(child.pid) == "S", Deadline(2.0))
    assert child.exited is None


def test_an_owned_directory_stays_until_kill(supervisor: Supervisor) -> None:
    home = supervisor.make_dir("clone")
    child = supervisor.spawn(["sh", "-c", "echo dying"], name="sh", stdout=LOG, owned_dir=home)
    child.wait(5)
    supervisor.spawn(["true"], name="true", stdout=LOG).wait(5)  # the spawner has been round once more
    assert (home / "log").read_text() == "dying\n"
    child.kill()
    assert wait_until(lambda: not home.exists(), Deadline(2.0))


def test_kill_ends_a_running_child_and_removes_its_directory(supervisor: Supervisor, tmp_path: Path) -> None:
    home = supervisor.make_dir("clone")
    (home / "deep" / "er").mkdir(parents=True)
    (home / "deep" / "out").symlink_to(tmp_path)
    (tmp_path / "kept").touch()
    child = supervisor.spawn(["sleep", "600"], name="sleep", stdout=LOG, owned_dir=home)
    child.kill()
    child.kill()
    assert child.wait(5) == ChildExit(signal=9)
    assert wait_until(lambda: not home.exists(), Deadline(2.0))
    assert (tmp_path / "kept").exists(), "removal followed a symlink"


def test_a_program_that_cannot_start_is_a_host_error_that_names_it_and_leaves_nothing(
    supervisor: Supervisor, run_dir: Path
) -> None:
    home = supervisor.make_dir("clone")
    with pytest.raises(HostError, match=r"clone-1 cannot be started: No such file or directory \(/no/such/vmm\)"):
        supervisor.spawn(["/no/such/vmm"], name="clone-1", stdout=LOG, owned_dir=home)
    with pytest.raises(HostError, match=r"Permission denied \(/etc/passwd\)"):
        supervisor.spawn(["/etc/passwd"], name="clone-2", stdout=LOG)
    with pytest.raises(HostError, match=r"No such file or directory \(/no/such/place\)"):
        supervisor.spawn(["true"], name="clone-3", stdout=LOG, cwd=Path("/no/such/place"))
    with pytest.raises(HostError, match="no-such-program is not installed"):
        supervisor.spawn(["no-such-program"], name="clone-4", stdout=LOG)
    with pytest.raises(HostError, match="Invalid argument"):
        supervisor.spawn(["true", "zero\0byte"], name="clone-5", stdout=LOG)
    assert wait_until(lambda: not home.exists(), Deadline(2.0))
    assert wait_until(lambda: not service_threads(), Deadline(2.0))
    assert supervisor.spawn(["true"], name="true", stdout=LOG).wait(5) == ChildExit(code=0)


def test_arguments_beyond_a_packet_are_a_host_error_and_the_next_spawn_works(supervisor: Supervisor) -> None:
    with pytest.raises(HostError, match="Message too long"):
        supervisor.spawn(["true", "x" * (16 << 20)], name="clone-1", stdout=LOG)
    assert supervisor.spawn(["true", "x" * 100_000], name="true", stdout=LOG).wait(5) == ChildExit(code=0)
    assert wait_until(lambda: not service_threads(), Deadline(2.0))


def test_callbacks_are_called_once_each_even_when_one_fails(
    supervisor: Supervisor, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_how: ChildExit) -> None:
        raise ValueError("a bad callback")

    seen: list[object] = []
    child = supervisor.spawn(["sleep", "600"], name="sleep", stdout=LOG)
    child.on_exit(lambda _how: seen.append(threading.current_thread().name))
    child.on_exit(fail)
    child.on_exit(seen.append)
    child.kill()
    child.wait(5)
    assert wait_until(lambda: len(seen) == 2, Deadline(2.0))
    child.on_exit(seen.append)
    assert seen == ["fcvm-exits", ChildExit(signal=9), ChildExit(signal=9)]
    assert "a callback for the end of sleep failed" in caplog.text


def test_without_a_child_there_is_no_thread_of_ours(supervisor: Supervisor) -> None:
    assert service_threads() == []
    first = supervisor.spawn(["sleep", "600"], name="sleep", stdout=LOG)
    second = supervisor.spawn(["sleep", "600"], name="sleep", stdout=LOG)
    assert len(service_threads()) == 1
    first.kill()
    first.wait(5)
    assert len(service_threads()) == 1
    second.kill()
    assert wait_until(lambda: not service_threads(), Deadline(2.0))
    assert supervisor.spawn(["true"], name="true", stdout=LOG).wait(5) == ChildExit(code=0)


def test_two_hundred_spawns_leave_no_descriptor_in_either_process(supervisor: Supervisor) -> None:
    read, write = os.pipe()

    def cycle() -> None:
        child = supervisor.spawn(["true"], name="true", stdout=LOG, fds={3: read, 4: write})
        child.wait(5)
        child.kill()

    spawner = spawner_of(supervisor)
    cycle()
    before = _open_files("self"), _open_files(str(spawner))
    for _ in range(200):
        cycle()
    assert wait_until(lambda: (_open_files("self"), _open_files(str(spawner))) == before, Deadline(2.0))
    os.close(read)
    os.close(write)


def test_many_threads_spawn_at_once_and_each_gets_its_own_child(supervisor: Supervisor) -> None:
    def run(number: int) -> int | None:
        return supervisor.spawn(["sh", "-c", f"exit {number}"], name="sh", stdout=LOG).wait(20).code

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(run, range(100))) == list(range(100))


def test_an_interrupted_spawn_leaves_no_process_and_the_next_one_works(supervisor: Supervisor) -> None:
    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    spawner = spawner_of(supervisor)
    before = _open_files("self")
    old = signal.signal(signal.SIGALRM, interrupt)
    os.kill(spawner, signal.SIGSTOP)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            supervisor.spawn(["sleep", "600"], name="sleep", stdout=LOG)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
        os.kill(spawner, signal.SIGCONT)
    assert supervisor.spawn(["true"], name="true", stdout=LOG).wait(5) == ChildExit(code=0)
    assert wait_until(lambda: not service_threads(), Deadline(2.0)), "the interrupted child lives on"
    assert _open_files("self") == before


def test_directories_are_private_and_short_and_have_unique_names(supervisor: Supervisor, run_dir: Path) -> None:
    first = supervisor.make_dir("tests/vm/test_x.py::test_with_a_very_long_name[param]")
    second = supervisor.make_dir("tests/vm/test_x.py::test_with_a_very_long_name[param]")
    assert first != second
    assert first.parent == second.parent == run_dir
    assert first.stat().st_mode & 0o777 == 0o700
    assert len(first.name) <= 26
    assert supervisor.make_dir("..").parent == run_dir


def test_close_ends_all_children_removes_the_run_directory_and_refuses_more(
    supervisor: Supervisor, run_dir: Path
) -> None:
    before = {supervisor.guard_pid, spawner_of(supervisor)}
    child = supervisor.spawn(["sleep", "600"], name="sleep", stdout=LOG)
    supervisor.close()
    assert child.exited == ChildExit(signal=9)
    assert not run_dir.exists()
    assert not any(Path(f"/proc/{pid}").exists() for pid in before | {child.pid})
    assert service_threads() == []
    with pytest.raises(UsageProblem, match="the supervisor is closed"):
        supervisor.spawn(["true"], name="true", stdout=LOG)
    child.kill()
    supervisor.close()


def test_close_does_not_wait_for_a_spawner_that_hangs(supervisor: Supervisor, run_dir: Path) -> None:
    child = supervisor.spawn(["sleep", "600"], name="sleep", stdout=LOG)
    os.kill(spawner_of(supervisor), signal.SIGSTOP)
    began = monotonic()
    supervisor.close()
    assert monotonic() - began < 5
    assert not run_dir.exists()
    assert child.exited == ChildExit(signal=9)


def test_a_dead_guard_is_a_host_error(supervisor: Supervisor) -> None:
    child = supervisor.spawn(["sleep", "600"], name="sleep", stdout=LOG)
    os.kill(supervisor.guard_pid, signal.SIGKILL)
    assert child.wait(5) == ChildExit(signal=9)
    with pytest.raises(HostError, match="the supervisor has died and all VMs of this process with it"):
        supervisor.spawn(["true"], name="true", stdout=LOG)


def test_the_error_has_the_guards_output(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytest_fcvm.host.supervisor.supervisor._BOOTSTRAP", "import {directories!r}")
    with Supervisor.start(run_dir) as supervisor, pytest.raises(HostError) as caught:
        supervisor.spawn(["true"], name="true", stdout=LOG)
    assert "SyntaxError" in caught.value.evidence["supervisor log"]


def test_the_guard_imports_no_slow_module() -> None:
    package = Path(pytest_fcvm.__file__).parent
    directories = [str(package), str(package / "host"), str(package / "host/supervisor")]
    code = _BOOTSTRAP.format(directories=directories).replace("main()", "print(*sys.modules)")
    loaded = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True).stdout
    slow = {"socket", "signal", "enum", "re", "json", "typing", "collections", "pathlib", "subprocess", "contextlib"}
    assert slow & set(loaded.split()) == set()
    assert "pytest_fcvm.host.supervisor.spawner" in loaded.split()


def test_a_missing_run_directory_is_a_host_error(run_root: Path) -> None:
    with pytest.raises(HostError, match="the supervisor cannot be started: No such file or directory"):
        Supervisor.start(run_root / "gone")


def test_the_environment_variable_turns_namespaces_off(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FCVM_NO_NAMESPACES", "1")
    with Supervisor.start(run_dir) as supervisor:
        assert supervisor.isolation == "subreaper"


def _members_of_session(session: int) -> list[int]:
    return [pid for pid, fields in _processes() if int(fields[3]) == session and fields[0] != "Z"]


def _processes() -> Iterator[tuple[int, list[str]]]:
    """Yield every process with its fields from the third on: proc_pid_stat(5)."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                yield int(entry.name), (entry / "stat").read_text().rpartition(")")[2].split()


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _open_files(process: str) -> int:
    return len(list(Path(f"/proc/{process}/fd").iterdir()))
