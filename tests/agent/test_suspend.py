"""SUSPEND: the VM is copied during a session, which then resumes. The copy begins another session."""

import time

import pytest

SECRET, RESUME_TOKEN = b"s" * 16, b"w" * 16


def suspend(client, p):
    client.call(p.SUSPEND, (p.SECRET, SECRET), (p.RESUME_TOKEN, RESUME_TOKEN))


def count_up(client):
    return client.start_exec("/bin/sh", "-c", "i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done")


def test_a_suspended_session_is_silent_and_resumes_where_it_was(guest, p):
    client = guest.client
    guest.start("i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done")
    logs, counter, typed = client.open(p.LOGS), count_up(client), client.start_exec("cat")
    client.wait(lambda: logs.data[0].count(b"\n") > 3 and counter.data[0].count(b"\n") > 3)
    suspend(client, p)
    guest.channel.settimeout(0.3)
    with pytest.raises(TimeoutError):
        guest.channel.recv(1)
    guest.channel.settimeout(None)
    client.send(RESUME_TOKEN)
    client.call(p.PERSONALISE, (p.REALTIME_NS, time.time_ns()))
    before = counter.data[0].count(b"\n")
    client.wait(lambda: counter.data[0].count(b"\n") > before + 3)
    for stream in (logs, counter):
        lines = stream.data[0].split()
        assert lines == [b"%d" % number for number in range(1, len(lines) + 1)]
    client.write(typed, b"still here")
    client.end_input(typed)
    client.wait(lambda: typed.exit)
    assert typed.data[0] == b"still here"


def test_nothing_that_comes_before_the_resume_token_is_executed(guest, p):
    guest.start("exec sleep 1000")
    suspend(guest.client, p)
    stale = p.frame(p.OPEN, 500, bytes([p.POWEROFF]) + b"\0" * 4)
    guest.client.send(stale * 3 + stale[:7] + RESUME_TOKEN)
    assert guest.client.call(p.STATUS)[p.STATE][0] in ("frozen", "running")  # running without cgroups


def test_in_a_copy_commands_go_on_without_their_streams(guest, p):
    client = guest.client
    guest.start("exec sleep 1000")
    pid = count_up(client).reply[1][p.PID][0]
    reading = client.start_exec("/bin/sh", "-c", "cat; exec sleep 1000")
    suspend(client, p)
    copy = guest.connect(SECRET)
    copy.call(p.PERSONALISE, (p.REALTIME_NS, time.time_ns()))
    time.sleep(1.2)  # a process that gets SIGHUP is killed after a second
    for number in (pid, reading.reply[1][p.PID][0]):
        assert copy.run("/bin/sh", "-c", f"kill -0 {number}").code == 0
    command = copy.run("/bin/sh", "-c", f"tr '\\0' ' ' </proc/{reading.reply[1][p.PID][0]}/cmdline").data[0]
    assert command == b"sleep 1000 "  # stdin has ended


def attach(client, p, pid):
    stream = client.open(p.ATTACH, (p.PID, pid))
    client.wait(lambda: stream.reply)
    if stream.reply[0]:
        raise OSError(stream.reply[0], stream.message)
    return stream


def copied(guest, p):
    suspend(guest.client, p)
    copy = guest.connect(SECRET)
    copy.call(p.PERSONALISE, (p.REALTIME_NS, time.time_ns()))
    return copy


def test_in_a_copy_attach_returns_the_output_since_the_suspension(guest, p):
    guest.start("mkfifo /tmp/go; exec sleep 1000")
    guest.client.wait(lambda: guest.client.run("test", "-p", "/tmp/go").code == 0)
    script = "cat; echo first; read -r _ </tmp/go; echo second; echo third >&2; exit 5"
    pid = guest.client.start_exec("/bin/sh", "-c", script).reply[1][p.PID][0]
    copy = copied(guest, p)
    time.sleep(0.3)
    stream = attach(copy, p, pid)
    assert stream.reply[1][p.METRIC] == ["dropped_bytes=0"]
    copy.wait(lambda: stream.data[0] == b"first\n")
    with pytest.raises(OSError, match="no command without a stream"):
        attach(copy, p, pid)
    copy.run("/bin/sh", "-c", "echo > /tmp/go")
    copy.wait(lambda: stream.exit)
    assert (bytes(stream.data[0]), bytes(stream.data[1]), stream.code) == (b"first\nsecond\n", b"third\n", 5)


def test_in_a_copy_attach_returns_how_a_command_ended(guest, p):
    guest.start("exec sleep 1000")
    pid = guest.client.start_exec("/bin/sh", "-c", "cat; echo done; exit 9").reply[1][p.PID][0]
    copy = copied(guest, p)
    copy.wait(lambda: copy.run("/bin/sh", "-c", f"kill -0 {pid}").code)
    stream = attach(copy, p, pid)
    copy.wait(lambda: stream.exit)
    assert (bytes(stream.data[0]), stream.code) == (b"done\n", 9)


def test_the_end_of_much_output_is_kept_and_the_rest_counted(guest, p):
    guest.start("exec sleep 1000")
    size = 300_000
    script = f"cat; head -c {size} /dev/zero | tr '\\0' x; echo end; exec sleep 1000"
    pid = guest.client.start_exec("/bin/sh", "-c", script).reply[1][p.PID][0]
    copy = copied(guest, p)
    time.sleep(1)
    stream = attach(copy, p, pid)
    copy.wait(lambda: stream.data[0].endswith(b"end\n"))
    assert len(stream.data[0]) == 65536
    assert stream.reply[1][p.METRIC] == [f"dropped_bytes={size + 4 - 65536}"]


def test_a_copy_keeps_only_a_few_ended_commands(guest, p):
    guest.start("exec sleep 1000")
    pids = [guest.client.start_exec("cat").reply[1][p.PID][0] for _ in range(20)]
    copy = copied(guest, p)
    still_there = f"for pid in {' '.join(map(str, pids))}; do kill -0 $pid 2>/dev/null && exit 1; done; exit 0"
    copy.wait(lambda: copy.run("/bin/sh", "-c", still_there).code == 0)
    found = 0
    for pid in pids:
        try:
            attach(copy, p, pid)
        except OSError:
            continue
        found += 1
    assert 0 < found <= 16


def test_an_attached_command_ends_with_its_stream(guest, p):
    guest.start("exec sleep 1000")
    pid = count_up(guest.client).reply[1][p.PID][0]
    copy = copied(guest, p)
    stream = attach(copy, p, pid)
    copy.wait(lambda: stream.data[0])
    copy.send(p.frame(p.CLOSE, stream.number, b"\0" * 4))
    copy.wait(lambda: copy.run("/bin/sh", "-c", f"kill -0 {pid}").code)


def test_in_a_copy_the_resume_token_has_no_effect(guest, p):
    suspend(guest.client, p)
    copy = guest.connect(SECRET)
    copy.send(RESUME_TOKEN)
    with pytest.raises(p.SessionError):
        copy.call(p.STATUS)


def test_log_output_that_a_host_was_sent_is_not_sent_again_if_requested(guest, p):
    client = guest.client
    guest.start("mkfifo /tmp/go; echo before; read -r _ </tmp/go; echo after; exec sleep 1000")
    first = client.open(p.LOGS)
    client.wait(lambda: first.data[0] == b"before\n")
    suspend(client, p)
    copy = guest.connect(SECRET)
    copy.call(p.PERSONALISE, (p.REALTIME_NS, time.time_ns()))
    again, fresh = copy.open(p.LOGS), copy.open(p.LOGS, (p.FLAGS, 8))
    copy.run("/bin/sh", "-c", "echo >/tmp/go")
    copy.wait(lambda: again.data[0] == b"before\nafter\n" and fresh.data[0])
    assert fresh.data[0] == b"after\n"


@pytest.mark.parametrize(
    "fields", [{"SECRET": SECRET}, {"RESUME_TOKEN": RESUME_TOKEN}, {"SECRET": SECRET, "RESUME_TOKEN": b"\0" * 16}]
)
def test_suspend_without_two_usable_secrets_is_refused_and_nothing_is_frozen(guest, p, fields):
    guest.start("exec sleep 1000")
    with pytest.raises(OSError, match="RESUME_TOKEN"):
        guest.client.call(p.SUSPEND, *((getattr(p, name), value) for name, value in fields.items()))
    assert guest.client.call(p.STATUS)[p.STATE] == ["running"]
