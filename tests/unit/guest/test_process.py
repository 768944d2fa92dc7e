"""A program in the guest, with an interface like `subprocess.Popen`."""

from __future__ import annotations

import io
import signal
import threading

import pytest
from fakes.agent import FakeAgent
from fakes.agent_wire import FakeStream

from pytest_fcvm.errors import GuestError, GuestTimeout, UsageProblem
from pytest_fcvm.guest.agent import Agent
from pytest_fcvm.guest.frames import FieldTag, StreamKind
from pytest_fcvm.guest.streams import CallFailed
from pytest_fcvm.host.clock import Deadline, wait_until
from pytest_fcvm.model.guest import ExitStatus, ProcessSpec


def test_a_program_gets_its_arguments_environment_directory_and_user(fake: FakeAgent, agent: Agent) -> None:
    spec = ProcessSpec(argv=("env", "ü", "\udcff"), env={"A": "1", "B": "x=y"}, cwd="/srv", user="postgres:postgres")
    with agent.exec(spec, detached=True) as process:
        assert process.communicate(timeout_s=10) == (b"A=1\nB=x=y\n", b"")
        assert process.pid == 101
    kind, fields = fake.executed[-1]
    assert kind is StreamKind.EXEC
    assert fields[FieldTag.ARG] == [b"env", b"\xc3\xbc", b"\xff"]
    assert (fields.text(FieldTag.CWD), fields.text(FieldTag.USER)) == ("/srv", "postgres:postgres")
    assert fields.number(FieldTag.FLAGS) == 1


def test_the_longest_arguments_arrive_whole(fake: FakeAgent, agent: Agent) -> None:
    argv = ("echo", "x" * 1_000_000, "end")
    assert len(agent.exec(ProcessSpec(argv=argv)).stdout.read()) == 1_000_005
    with pytest.raises(UsageProblem, match="over the limit"):
        agent.exec(ProcessSpec(argv=(*argv, "x" * 200_000)))
    with pytest.raises(UsageProblem, match="its argv is empty"):
        agent.exec(ProcessSpec(argv=()))
    assert fake.errors == []


def test_output_on_stderr_and_the_exit_code_come_back_apart(agent: Agent) -> None:
    process = agent.exec(ProcessSpec(argv=("fail", "3")))
    assert process.communicate(timeout_s=10) == (b"", b"it went wrong\n")
    assert process.poll() == process.wait(1) == ExitStatus(code=3)
    assert process.wait(1).returncode == 3


def test_a_program_that_does_not_exist_is_exit_code_127_with_the_reason(agent: Agent) -> None:
    process = agent.exec(ProcessSpec(argv=("nonesuch",)))
    assert process.communicate(timeout_s=10) == (b"", b"")
    assert str(process.wait(1)) == "exit code 127 (nonesuch: not found)"


def test_a_program_the_agent_refuses_is_an_error_that_says_why(fake: FakeAgent, agent: Agent) -> None:
    fake.refusals[StreamKind.EXEC] = (2, "no user nobody in /etc/passwd")
    with pytest.raises(CallFailed, match=r"exec id failed in the guest: no user nobody .* \(ENOENT\)") as caught:
        agent.exec(ProcessSpec(argv=("id",)))
    assert caught.value.errno == 2


def test_a_signal_reaches_the_program_and_is_not_mistaken_for_an_exit_code(agent: Agent) -> None:
    process = agent.exec(ProcessSpec(argv=("sleep",)))
    assert process.poll() is None
    process.signal(signal.SIGTERM)
    assert process.wait(10) == ExitStatus(signal=15)
    assert (process.wait(1).returncode, str(process.wait(1))) == (-15, "signal SIGTERM")
    process.signal(signal.SIGTERM)


def test_closing_a_program_ends_it_and_every_wait_for_it(fake: FakeAgent, agent: Agent) -> None:
    process = agent.exec(ProcessSpec(argv=("sleep",)))
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            process.wait(60)
        except GuestError as error:
            errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    process.close()
    thread.join(10)
    assert "exec sleep was closed by the host" in str(errors[0])
    agent.sync()
    assert fake.open_streams() == 0


def test_stdin_is_streamed_and_ends_when_it_is_closed(agent: Agent) -> None:
    process = agent.exec(ProcessSpec(argv=("cat",)))
    assert process.stdin.write(b"one\ntwo") == 7
    assert process.stdout.readline() == b"one\n"
    assert process.stdin.write(memoryview(b"\nlast")) == 5
    with process.stdin:
        pass
    assert list(process.stdout) == [b"two\n", b"last"]
    assert process.stdout.readline() == b""
    with pytest.raises(ValueError, match="closed stream"):
        process.stdin.write(b"more")


def test_output_can_be_read_as_text(agent: Agent) -> None:
    process = agent.exec(ProcessSpec(argv=("echo", "größe\nzwei")))
    with io.TextIOWrapper(process.stdout, encoding="utf-8") as text:  # type: ignore[arg-type]
        assert text.readlines() == ["größe\n", "zwei\n"]


def test_lines_are_whole_wherever_frames_end(fake: FakeAgent, agent: Agent) -> None:
    async def dribble(stream: FakeStream) -> int:
        for piece in (b"a", b"b\nc", b"\n", b"\n\n", b"", b"d\ne"):
            await stream.write(piece)
        return 0

    fake.programs["dribble"] = dribble
    assert list(agent.exec(ProcessSpec(argv=("dribble",))).stdout) == [b"ab\n", b"c\n", b"\n", b"\n", b"d\n", b"e"]
    process = agent.exec(ProcessSpec(argv=("dribble",)))
    assert process.stdout.readline() == b"ab\n"
    assert process.communicate(timeout_s=10)[0] == b"c\n\n\nd\ne", "what was read ahead is not lost"
    assert process.stdout.read(0) == b""


def test_a_program_that_ends_without_reading_its_input_is_no_error(fake: FakeAgent, agent: Agent) -> None:
    async def leave(stream: FakeStream) -> int:
        return 4

    fake.programs["leave"] = leave
    process = agent.exec(ProcessSpec(argv=("leave",)))
    assert process.communicate(bytes(1_000_000), timeout_s=10) == (b"", b"")
    assert process.wait(1).code == 4
    writer = agent.exec(ProcessSpec(argv=("leave",)))
    writer.wait(10)
    with pytest.raises(BrokenPipeError, match="exec leave"):
        writer.stdin.write(b"x")


def test_a_timeout_shows_the_output_so_far_and_the_program_goes_on(fake: FakeAgent, agent: Agent) -> None:
    async def slow(stream: FakeStream) -> int:
        await stream.write(b"step 1\n")
        await stream.write(b"a warning\n", channel=1)
        while await stream.read():
            pass
        stream.catches_signals = True
        while not stream.signals:
            await stream.wait_for_change()
        await stream.write(b"step 2\n")
        return 0

    fake.programs["slow"] = slow
    process = agent.exec(ProcessSpec(argv=("slow",)))
    assert process.stdout.readline() == b"step 1\n"
    assert process.stderr.readline() == b"a warning\n"
    process = agent.exec(ProcessSpec(argv=("slow",)))
    with pytest.raises(GuestTimeout, match=r"exec slow did not end within 0\.3 s") as caught:
        process.communicate(timeout_s=0.3)
    assert (caught.value.evidence["stdout"], caught.value.evidence["stderr"]) == ("step 1\n", "a warning\n")
    process.signal(signal.SIGUSR1)
    assert process.communicate(timeout_s=10) == (b"step 1\nstep 2\n", b"a warning\n")


def test_closed_output_no_longer_stops_the_program(agent: Agent) -> None:
    process = agent.exec(ProcessSpec(argv=("flood", "1000000")))
    with process.stdout:
        assert len(process.stdout.read(10)) == 10
    assert process.wait(10).code == 0
    with pytest.raises(ValueError, match="closed stream"):
        process.stdout.read()


def test_unread_output_is_bounded_and_the_hint_says_what_to_do(agent: Agent) -> None:
    process = agent.exec(ProcessSpec(argv=("flood", "1000000")))

    def hint() -> str:
        with pytest.raises(GuestTimeout, match="did not end") as caught:
            process.wait(0.1)
        return caught.value.hint

    assert wait_until(lambda: "its output is not read" in hint(), Deadline(20))
    assert len(process.stdout.read1()) == 65536


def test_a_detached_program_never_waits_for_a_reader_and_its_last_output_is_kept(fake: FakeAgent, agent: Agent) -> None:
    process = agent.exec(ProcessSpec(argv=("flood", "1000000")), detached=True)
    assert process.wait(20) == ExitStatus(code=0)
    last = process.stdout.read()
    assert (len(last), process.lost_bytes) == (65536, 1000000 - 65536)
    assert fake.errors == []


def test_a_detached_program_is_read_as_it_prints(agent: Agent) -> None:
    process = agent.exec(ProcessSpec(argv=("cat",)), detached=True)
    process.stdout.timeout_s = 20
    for line in (b"one\n", b"two\n"):
        process.stdin.write(line)
        assert process.stdout.readline() == line
    assert process.communicate(b"x" * 200_000, timeout_s=20) == (b"x" * 200_000, b"")
    assert process.lost_bytes == 0
