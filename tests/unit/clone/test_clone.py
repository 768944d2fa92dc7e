"""What a test can do with a clone, and the errors where it cannot."""

from __future__ import annotations

import re
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fakes.agent import FakeAgent
from fakes.agent_wire import FakeStream
from fakes.vm import FakeEngine, Service

from pytest_fcvm.clone import Clone
from pytest_fcvm.errors import (
    CommandFailed,
    GuestError,
    GuestTimeout,
    UsageProblem,
)
from pytest_fcvm.guest.frames import FieldTag, StreamKind
from pytest_fcvm.model.net import PublishedPort


def _last_exec(guest: FakeAgent) -> Any:
    return [fields for kind, fields in guest.executed if kind is StreamKind.EXEC][-1]


def test_memory_is_taken_as_far_as_the_guest_gives_it(make_clone: Callable[..., Clone], engine: FakeEngine) -> None:
    clone = make_clone(balloon=True)
    assert clone.inflate_balloon("64M") == engine.vms[0].balloon == 64
    assert clone.inflate_balloon("1G", timeout=0.1) == 100  # all that it has
    assert clone.inflate_balloon(0) == 0


def test_metadata_are_replaced_while_it_runs(make_clone: Callable[..., Clone], engine: FakeEngine) -> None:
    clone = make_clone(metadata={"a": "b"})
    clone.set_metadata({"c": {"d": "e"}})
    assert engine.vms[0].metadata == {"c": {"d": "e"}}
    with pytest.raises(UsageProblem, match="cannot be served"):
        clone.set_metadata({"c": 1})


def test_what_the_spec_does_not_have_is_refused_with_what_gives_it(clone: Clone) -> None:
    for call, what in ((lambda: clone.inflate_balloon(1), "balloon"), (lambda: clone.set_metadata({}), "metadata")):
        with pytest.raises(UsageProblem, match=f"has no {what}") as caught:
            call()
        assert caught.value.hint == f"give its spec {what} to begin with"


# Reaching it


def test_a_port_is_mapped_on_first_use_and_stays(clone: Clone) -> None:
    assert clone.endpoint(80).host == "127.0.0.1"
    assert clone.endpoint(80) == clone.endpoint(80, "tcp")
    assert clone.port(80) == clone.endpoint(80).port
    assert clone.ip == "10.0.2.15"


def test_a_url_has_no_slash_of_its_own(clone: Clone) -> None:
    host, port = clone.endpoint(80)
    assert clone.url(80) == f"http://{host}:{port}"
    assert clone.url(80, "/a?b=c") == f"http://{host}:{port}/a?b=c"
    assert clone.url(80, "a", scheme="ws") == f"ws://{host}:{port}/a"


def test_published_ports_are_mapped_from_the_start(make_clone: Callable[..., Clone]) -> None:
    clone = make_clone(publish=(PublishedPort(guest_port=80, host_port=18000),))
    with socket.create_connection(("127.0.0.1", 18000), timeout=20) as client:
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 200")
    assert clone.endpoint(80) == ("127.0.0.1", 18000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((80, "sctp"), "'sctp' is neither tcp nor udp"), ((0,), "0 is not a port"), ((70000,), "70000 is not a port")],
)
def test_a_port_that_cannot_be_is_a_usage_problem(arguments: Any, message: str, clone: Clone) -> None:
    with pytest.raises(UsageProblem) as caught:
        clone.endpoint(*arguments)
    assert caught.value.message == message
    assert caught.value.hint


def test_the_http_client_ignores_proxies_and_ends_with_the_clone(
    clone: Clone, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    client = clone.http(80)
    assert client.get("/path").text == "hello"
    assert service.requests[0].startswith(b"GET /path HTTP/1.1")
    clone.close()
    assert client.is_closed


def test_the_http_client_says_that_nothing_listens_and_keeps_the_error_of_httpx(
    clone: Clone, guest: FakeAgent, service: Service
) -> None:
    service.answer = None  # resets connections, as slirp does for a closed port
    guest.listening[80] = 0
    reason = "nothing listens on port 80, or only on a loopback address"
    with pytest.raises(httpx.NetworkError, match=f"^{reason}: .*reset by peer"):
        clone.http(80).get("/")
    guest.listening[80] = 1
    with pytest.raises(httpx.NetworkError, match=r"^.{0,20}Connection reset by peer"):
        clone.http(80).get("/")


# Commands


def test_a_list_is_run_as_it_is_with_what_the_image_and_the_spec_say(clone: Clone, guest: FakeAgent) -> None:
    result = clone.exec(["echo", "a b", "*"])
    assert (result.exit_code, result.stdout, result.stderr) == (0, "a b *\n", "")
    assert result.duration_s > 0
    fields = _last_exec(guest)
    assert fields.texts(FieldTag.ENV) == ["PATH=/bin", "LEVEL=image"]
    assert (fields.text(FieldTag.CWD), fields.text(FieldTag.USER)) == ("/srv", "www")


def test_a_call_may_have_its_own_environment_directory_and_user(clone: Clone, guest: FakeAgent) -> None:
    clone.exec(["env"], env={"LEVEL": "call"}, cwd="/tmp", user="")
    fields = _last_exec(guest)
    assert fields.texts(FieldTag.ENV) == ["PATH=/bin", "LEVEL=call"]
    assert (fields.text(FieldTag.CWD), fields.texts(FieldTag.USER)) == ("/tmp", [])


def test_a_string_goes_to_the_shell(clone: Clone, guest: FakeAgent) -> None:
    async def shell(stream: FakeStream) -> int:
        await stream.write(repr(stream.argv).encode())
        return 0

    guest.programs["/bin/sh"] = shell
    assert clone.succeed("a | b") == repr(["/bin/sh", "-c", "a | b"])


def test_input_goes_in_and_bytes_come_back_as_they_are(clone: Clone) -> None:
    data = bytes(range(256)) * 4096
    assert clone.exec(["cat"], stdin=data).stdout_bytes == data
    assert clone.exec(["cat"], stdin="grün").stdout == "grün"
    assert clone.exec(["cat"], stdin=b"\xff").stdout == "\udcff"


def test_a_missing_program_is_127_with_the_reason(clone: Clone) -> None:
    result = clone.exec(["no-such"])
    assert (result.exit_code, result.stderr) == (127, "fcvm: no-such: not found\n")


def test_an_image_without_a_shell_says_so(clone: Clone, guest: FakeAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    _refuse(guest, monkeypatch, "exec /bin/sh: No such file or directory")
    with pytest.raises(GuestError, match="the image has no shell to run ls: exec /bin/sh: No such file") as caught:
        clone.exec("ls")
    assert caught.value.hint == "pass a list of words"


def test_another_reason_is_not_taken_for_a_missing_shell(
    clone: Clone, guest: FakeAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    _refuse(guest, monkeypatch, "user 'x' is not in the image's /etc/passwd")
    result = clone.exec("ls", user="x")
    assert (result.exit_code, result.stderr) == (127, "fcvm: user 'x' is not in the image's /etc/passwd\n")


def _refuse(guest: FakeAgent, monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    """Let every program end with 127 and a message, as the agent says that it could not be started."""

    async def serve(stream: FakeStream) -> None:
        guest.reply(stream, [(FieldTag.PID, 1)])
        guest._exit(stream, [(FieldTag.EXIT_CODE, 127), (FieldTag.MESSAGE, message)])

    monkeypatch.setattr(guest, "_serve_exec", serve)


def test_a_killed_command_is_128_and_its_signal(clone: Clone, guest: FakeAgent) -> None:
    async def die(_stream: FakeStream) -> int:
        return -signal.SIGTERM

    guest.programs["die"] = die
    assert clone.exec(["die"]).exit_code == 128 + signal.SIGTERM
    with clone.popen(["sleep"]) as process:
        process.signal(signal.SIGKILL)
        assert process.wait(10).signal == signal.SIGKILL


def test_a_command_in_which_memory_ran_out_says_so_whatever_its_exit_code(clone: Clone, guest: FakeAgent) -> None:
    async def pipe(_stream: FakeStream) -> int:
        guest.oom_kills += 1
        return 0

    guest.programs["pipe"] = pipe
    result = clone.exec(["pipe"])
    assert result.stderr.startswith("fcvm: the guest's memory ran out and its kernel killed a process: ")
    assert "mem=" in result.stderr
    assert clone.exec(["echo"]).stderr == ""
    with pytest.raises(CommandFailed, match="the guest's memory ran out"):
        clone.fail(["pipe"])


def test_succeed_and_fail_demand_what_they_say(clone: Clone) -> None:
    assert clone.succeed(["echo", "x"]) == "x\n"
    assert clone.fail(["fail", "2"]) == ""
    with pytest.raises(CommandFailed) as caught:
        clone.succeed(["fail", "2"])
    assert caught.value.message == "fail 2 failed (exit code 2): it went wrong"
    assert caught.value.evidence["stderr"] == "it went wrong\n"
    assert "console" in caught.value.evidence
    with pytest.raises(CommandFailed, match=r"echo 'a b' succeeded, and must not have \(exit code 0\): a b"):
        clone.fail(["echo", "a b"])
    with pytest.raises(CommandFailed, match="exit code 5"):
        clone.exec(["fail", "5"], check=True)


def test_a_command_is_tried_until_it_succeeds(clone: Clone, guest: FakeAgent) -> None:
    tries = []

    async def flaky(stream: FakeStream) -> int:
        tries.append(1)
        await stream.write(b"there")
        return 0 if len(tries) == 3 else 1

    guest.programs["flaky"] = flaky
    assert clone.wait_until_succeeds(["flaky"], timeout=20) == "there"
    assert len(tries) == 3


def test_a_command_that_never_succeeds_is_reported_with_its_last_output(clone: Clone) -> None:
    with pytest.raises(GuestTimeout) as caught:
        clone.wait_until_succeeds(["fail", "1"], timeout=0.1)
    assert caught.value.message == "fail 1 did not succeed within 0.1 s: it went wrong\n"
    assert "timeline" in caught.value.evidence


def test_a_command_that_does_not_end_is_given_up_at_its_deadline(clone: Clone, guest: FakeAgent) -> None:
    with pytest.raises(GuestTimeout, match=r"exec sleep did not end within 0.1 s"):
        clone.exec(["sleep"], timeout=0.1)
    clone.exec(["echo"])
    assert guest.open_streams() == 1  # the log's


@pytest.mark.parametrize("command", [[], [1, 2], [b"ls"]])
def test_what_is_no_command_is_a_usage_problem(command: Any, clone: Clone) -> None:
    with pytest.raises(UsageProblem, match="is not a command"):
        clone.exec(command)


# Files


def test_files_and_directories_are_copied_both_ways(clone: Clone, root: Path, tmp_path: Path) -> None:
    (root / "etc").mkdir()
    source = tmp_path / "conf"
    source.mkdir()
    (source / "a").write_text("1")
    clone.copy_in(source, "/etc/app")
    clone.copy_in(source / "a", "/etc/")
    assert ((root / "etc/app/a").read_text(), (root / "etc/a").read_text()) == ("1", "1")
    clone.copy_out("/etc/app", tmp_path / "back")
    clone.copy_out("/etc/a", tmp_path)
    assert ((tmp_path / "back/a").read_text(), (tmp_path / "a").read_text()) == ("1", "1")


def test_a_file_goes_into_a_directory_and_a_directory_merges(clone: Clone, root: Path, tmp_path: Path) -> None:
    (root / "etc/app").mkdir(parents=True)
    (root / "etc/app/old").write_text("old")
    (tmp_path / "app").mkdir()
    (tmp_path / "app/new").write_text("new")
    clone.copy_in(tmp_path / "app/new", "/etc")
    clone.copy_in(tmp_path / "app", "/etc/app")
    assert {path.name for path in (root / "etc").iterdir()} == {"app", "new"}
    assert {path.name for path in (root / "etc/app").iterdir()} == {"old", "new"}
    clone.copy_out("/etc/new", f"{tmp_path}/made/")
    assert (tmp_path / "made/new").read_text() == "new"


@pytest.mark.parametrize(("owner", "sent"), [("0:0", ""), (None, ""), ("app", "app"), ("5:staff", "5:staff")])
def test_the_agent_gets_the_owner_of_copied_files(
    owner: str | None, sent: str, clone: Clone, root: Path, guest: FakeAgent, tmp_path: Path
) -> None:
    (tmp_path / "f").write_text("")
    clone.copy_in(tmp_path / "f", "/", owner=owner)
    assert guest.executed[-1][1].text(FieldTag.USER) == sent


def test_the_current_directory_is_copied_by_its_name(
    clone: Clone, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here/f").write_text("1")
    monkeypatch.chdir(tmp_path / "here")
    clone.copy_in(".", "/")
    assert (root / "here/f").read_text() == "1"


def test_text_is_written_and_read(clone: Clone, root: Path) -> None:
    clone.write_text("/motd", "grün", mode=0o640)
    assert clone.read_text("/motd") == "grün"
    assert clone.read_bytes("/motd") == "grün".encode()
    assert (root / "motd").stat().st_mode & 0o777 == 0o640
    with pytest.raises(GuestError, match="No such file"):
        clone.read_text("/gone")
    with pytest.raises(GuestError, match="not a regular file"):
        clone.read_text("/")
    with pytest.raises(GuestError, match=r"put a file in the place of .*: Is a directory"):
        clone.write_text("/", "text")


# Watching it


def test_the_log_is_what_the_base_and_then_the_clone_printed(clone: Clone, guest: FakeAgent) -> None:
    guest.log(b"printed by the clone\n")
    found = clone.wait_for_log(r"by the (clone)", timeout=20)
    assert found[1] == "clone"
    assert clone.logs() == "printed by the base\nprinted by the clone\n"
    assert clone.wait_for_log("by the base", timeout=0)[0] == "by the base"


def test_a_missing_line_is_reported_at_the_deadline(clone: Clone) -> None:
    with pytest.raises(GuestTimeout, match=r"no line matched 'never' within 0.1 s") as caught:
        clone.wait_for_log("never", timeout=0.1)
    assert caught.value.evidence["workload log"] == "printed by the base"
    with pytest.raises(UsageProblem, match="is not a regular expression"):
        clone.wait_for_log("(")


def test_the_console_and_the_guests_figures_can_be_read(clone: Clone) -> None:
    assert "Linux version" in clone.console()
    assert clone.metrics() == {"uptime_ms": 1234, "load": 0.25, "kernel": "6.12.1"}


def test_a_regular_expression_of_the_log_matches_lines(clone: Clone) -> None:
    assert isinstance(clone.wait_for_log("^printed", timeout=0), re.Match)


def test_a_detached_command_is_started_as_such(clone: Clone, guest: FakeAgent) -> None:
    with clone.popen(["sleep"], detach=True):
        pass
    assert guest.executed[-1][1].number(FieldTag.FLAGS) == 1
