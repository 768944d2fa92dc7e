"""What a test does with its clone."""

from __future__ import annotations

import signal
import socket
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from pytest_fcvm import Clone, CommandFailed, GuestError, GuestTimeout, Snapshot, UsageProblem
from pytest_fcvm.host.clock import Deadline, monotonic, wait_until
from pytest_fcvm.host.libc import real_time_ns
from tests.patience import PATIENCE


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError:
        return False
    return True


def fetch(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=20) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""


def test_the_service_answers_at_once(fcvm_clone: Clone) -> None:
    status, body = fetch(fcvm_clone.url(80))
    assert status == 200
    assert "nginx" in body


def test_what_a_test_breaks_is_whole_in_the_next_clone(fcvm_snapshot: Snapshot) -> None:
    with fcvm_snapshot.clone() as first:
        first.succeed("rm -rf /etc/nginx /usr/share/nginx /var/www")
        assert fetch(first.url(80))[0] in (403, 404)
    with fcvm_snapshot.clone() as second:
        assert fetch(second.url(80))[0] == 200
        second.succeed("test -d /etc/nginx")


def test_commands_return_output_and_exit_code(fcvm_clone: Clone) -> None:
    result = fcvm_clone.exec("echo out; echo err >&2; exit 3")
    assert (result.stdout, result.stderr, result.exit_code) == ("out\n", "err\n", 3)
    assert fcvm_clone.exec(["printf", "%s", "a b; $HOME"]).stdout == "a b; $HOME"
    assert fcvm_clone.exec("cat", stdin="häß\n").stdout == "häß\n"
    assert fcvm_clone.exec(["cat"], stdin=b"\xff\x00").stdout_bytes == b"\xff\x00"
    assert fcvm_clone.exec("kill -9 $$").exit_code == 128 + signal.SIGKILL
    missing = fcvm_clone.exec(["no-such-program"])
    assert missing.exit_code == 127
    assert "no-such-program" in missing.stderr


def test_commands_take_environment_directory_and_user(fcvm_clone: Clone) -> None:
    result = fcvm_clone.exec("echo $COLOUR; pwd; id -un", env={"COLOUR": "red"}, cwd="/var/log", user="www-data")
    assert result.stdout.split() == ["red", "/var/log", "www-data"]
    assert fcvm_clone.exec("id -u; id -g", user="33:0").stdout.split() == ["33", "0"]
    unknown = fcvm_clone.exec("true", user="nobody-here")
    assert unknown.exit_code == 126
    assert "nobody-here" in unknown.stderr


def test_a_command_that_does_not_end_is_killed(fcvm_clone: Clone) -> None:
    started = monotonic()
    with pytest.raises(GuestTimeout, match="sleep 1000"):
        fcvm_clone.exec("echo begun; sleep 1000", timeout=2)
    assert monotonic() - started < 20
    fcvm_clone.wait_until_succeeds("! pgrep -f 'sleep 1000' || ! ps aux | grep -q '[s]leep 1000'")


def test_succeed_and_fail_report_what_was_not_met(fcvm_clone: Clone) -> None:
    assert fcvm_clone.succeed("echo yes") == "yes\n"
    assert fcvm_clone.fail("echo no; false") == "no\n"
    with pytest.raises(CommandFailed, match=r"false.*exit code 1") as caught:
        fcvm_clone.succeed("echo why >&2; false")
    assert caught.value.evidence["stderr"] == "why\n"
    assert "workload log" in caught.value.evidence or "timeline" in caught.value.evidence
    with pytest.raises(CommandFailed, match="must not have"):
        fcvm_clone.fail("true")


def test_waiting_for_a_command_reports_its_last_output(fcvm_clone: Clone) -> None:
    fcvm_clone.popen("sleep 0.5; touch /tmp/flag")
    fcvm_clone.wait_until_succeeds("test -e /tmp/flag")
    with pytest.raises(GuestTimeout, match="not yet"):
        fcvm_clone.wait_until_succeeds("echo not yet; false", timeout=1)


def test_a_running_command_streams_and_takes_signals(fcvm_clone: Clone) -> None:
    with fcvm_clone.popen(
        ["sh", "-c", "trap 'echo got it; exit 5' USR1; echo ready; while :; do sleep 0.1; done"]
    ) as process:
        assert process.stdout.readline() == b"ready\n"
        process.signal(signal.SIGUSR1)
        assert process.stdout.readline() == b"got it\n"
        assert process.wait(30 * PATIENCE).code == 5


def test_files_are_copied_in_and_out(fcvm_clone: Clone, tmp_path: Path) -> None:
    directory = tmp_path / "tree"
    (directory / "sub").mkdir(parents=True)
    (directory / "sub" / "tool").write_text("#!/bin/sh\necho hello\n")
    (directory / "sub" / "tool").chmod(0o755)
    (directory / "link").symlink_to("sub/tool")
    (directory / ("long-" * 40)).write_text("long name")
    fcvm_clone.copy_in(directory, "/opt/copied")
    assert fcvm_clone.succeed("/opt/copied/link") == "hello\n"
    assert fcvm_clone.succeed("stat -c %U:%G /opt/copied/sub/tool") == "root:root\n"
    fcvm_clone.copy_in(directory / "sub" / "tool", "/usr/local/bin/")
    assert fcvm_clone.succeed(["tool"]) == "hello\n"
    fcvm_clone.copy_out("/opt/copied", tmp_path / "back")
    assert (tmp_path / "back" / "sub" / "tool").read_text() == "#!/bin/sh\necho hello\n"
    assert (tmp_path / "back" / "link").is_symlink()
    assert (tmp_path / "back" / ("long-" * 40)).read_text() == "long name"
    fcvm_clone.write_text("/etc/greeting", "grüß\n")
    assert fcvm_clone.read_text("/etc/greeting") == "grüß\n"
    with pytest.raises(GuestError, match="no-such-file"):
        fcvm_clone.read_text("/etc/no-such-file")
    with pytest.raises(UsageProblem, match="does not exist"):
        fcvm_clone.copy_in(tmp_path / "nothing", "/opt/")


def test_the_workloads_output_is_in_the_log(fcvm_clone: Clone) -> None:
    fetch(fcvm_clone.url(80, "/some-page?q=1"))
    match = fcvm_clone.wait_for_log(r"GET (/some-page\S*) .* (\d+)")
    assert match[1] == "/some-page?q=1"
    assert "some-page" in fcvm_clone.logs()
    with pytest.raises(GuestTimeout, match="never printed"):
        fcvm_clone.wait_for_log("never printed", timeout=0.5)


def test_ports_are_mapped_on_loopback_and_do_not_change(fcvm_clone: Clone) -> None:
    host, port = fcvm_clone.endpoint(80)
    assert host == "127.0.0.1"
    assert fcvm_clone.port(80) == port
    assert fcvm_clone.url(80) == f"http://127.0.0.1:{port}"
    fcvm_clone.write_text("/etc/nginx/conf.d/more.conf", "server { listen 8081; return 200 'more'; }")
    fcvm_clone.succeed("nginx -s reload")
    fcvm_clone.wait_until_succeeds("grep -qi :1F91 /proc/net/tcp")
    assert fetch(fcvm_clone.url(8081))[1] == "more"
    assert fcvm_clone.http(80).get("/").status_code == 200


def test_a_paused_clone_stands_still_until_it_is_resumed(fcvm_clone: Clone) -> None:
    fcvm_clone.pause()
    with pytest.raises(GuestError, match="paused"):
        fcvm_clone.exec("true")
    fcvm_clone.resume()
    assert fetch(fcvm_clone.url(80))[0] == 200


def test_a_killed_clone_is_reported_as_such(fcvm_snapshot: Snapshot) -> None:
    clone = fcvm_snapshot.clone()
    port = clone.port(80)
    clone.kill()
    clone.kill()
    with pytest.raises(GuestError, match="closed"):
        clone.exec("true")
    assert wait_until(lambda: not listens(port), Deadline(10 * PATIENCE))


def test_a_reset_clone_keeps_its_ports_and_loses_its_state(fcvm_worker_clone: Clone) -> None:
    before = fcvm_worker_clone.port(80)
    fcvm_worker_clone.write_text("/tmp/mark", "x")
    fcvm_worker_clone.reset()
    assert fcvm_worker_clone.port(80) == before
    assert fetch(f"http://127.0.0.1:{before}/")[0] == 200
    fcvm_worker_clone.fail("test -e /tmp/mark")


def test_no_two_clones_have_the_same_identity(fcvm_snapshot: Snapshot) -> None:
    ask = (
        "head -c 16 /dev/urandom | od -An -tx1; cat /etc/machine-id /proc/sys/kernel/random/boot_id "
        "/sys/class/net/eth0/address"
    )
    seen: list[set[str]] = []
    for _ in range(3):
        with fcvm_snapshot.clone() as clone:
            answer = clone.succeed(ask).splitlines()
            assert len(answer) == 4
            seen.append(set(answer))
    assert not seen[0] & seen[1]
    assert not seen[0] & seen[2]
    assert not seen[1] & seen[2]


def test_the_time_of_day_is_the_hosts(fcvm_clone: Clone) -> None:
    before = real_time_ns()
    guest = int(fcvm_clone.succeed("date +%s%N"))
    assert before - 10**8 <= guest <= real_time_ns() + 10**8


def test_the_guest_has_no_egress_and_is_refused_at_once(fcvm_clone: Clone) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        started = monotonic()
        assert fcvm_clone.exec(["bash", "-c", f"exec 3<>/dev/tcp/10.0.2.2/{port}"], timeout=30).exit_code != 0
        assert fcvm_clone.exec(["getent", "hosts", "example.com"], timeout=30).exit_code != 0
        assert monotonic() - started < 15
        server.settimeout(0.2)
        with pytest.raises(TimeoutError):
            server.accept()


def test_metrics_have_units_in_their_names(fcvm_clone: Clone) -> None:
    metrics = fcvm_clone.metrics()
    assert metrics
    assert any(name.endswith(("_kib", "_bytes", "_mib")) for name in metrics)


def test_metrics_distinguish_a_busy_guest_from_an_idle_one(fcvm_clone: Clone) -> None:
    runnable = lambda: fcvm_clone.metrics()["runnable_threads"]  # noqa: E731
    assert wait_until(lambda: runnable() == 0, Deadline(30 * PATIENCE))
    with fcvm_clone.popen("while :; do :; done"):
        assert wait_until(lambda: runnable() >= 1, Deadline(30 * PATIENCE))


def test_evidence_has_a_line_that_was_still_in_transit(fcvm_clone: Clone) -> None:
    fcvm_clone.http(80).get("/just-now")
    assert "/just-now" in fcvm_clone.evidence()["workload log"]


@pytest.mark.fcvm(
    command=["sh", "-c", "echo my colour is $COLOUR in $(pwd); sleep 1000"], ready="log:my colour", mem="200M", cpus=2
)
@pytest.mark.fcvm(env={"COLOUR": "blue"}, publish=["0:8080"], workdir="/var", user="www-data")
def test_a_marker_changes_the_clone(fcvm_clone: Clone) -> None:
    fcvm_clone.wait_for_log("^my colour is blue in /var$")
    assert fcvm_clone.succeed("id -un; nproc; echo $COLOUR").split() == ["www-data", "2", "blue"]
    assert fcvm_clone.succeed("pwd") == "/var\n"
    assert int(fcvm_clone.succeed("awk '/MemTotal/ {print $2}' /proc/meminfo")) < 200 * 1024
