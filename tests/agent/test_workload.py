"""The workload: its namespaces, state, log and end."""

import subprocess

import pytest


def test_the_workload_is_process_1_of_its_own_namespace_and_execs_join_it(guest, p):
    assert guest.start("echo $$; exec sleep 1000")[p.PID] == [1]
    script = "until ps -o args | grep -q '[s]leep 1000'; do sleep 0.05; done; ps -o pid,args; echo self $$"
    stream = guest.client.start_exec("sh", "-c", script)
    guest.client.wait(lambda: stream.exit is not None)
    assert b"    1 sleep 1000" in stream.data[0]
    assert f"self {stream.reply[1][p.PID][0]}".encode() in stream.data[0]


def test_the_workload_and_its_execs_share_a_cgroup(guest):
    guest.start("exec sleep 1000")
    seen = guest.client.run("sh", "-c", "grep ^0: /proc/1/cgroup /proc/self/cgroup; ls /sys/fs/cgroup").data[0].decode()
    assert seen.startswith("/proc/1/cgroup:0::/\n/proc/self/cgroup:0::/\n")
    assert "cgroup.procs" in seen


def test_names_and_resolver_are_the_hosts_even_over_symlinks_of_the_image(client):
    seen = client.run("sh", "-c", "hostname; cd /etc; cat hostname machine-id hosts resolv.conf").data[0].decode()
    assert seen.split("\n")[:7] == [
        "box", "box", "0123456789abcdef" * 2, "127.0.0.1\tlocalhost", "::1\tlocalhost ip6-localhost ip6-loopback",
        "10.0.2.15\tbox", "10.0.2.2 gateway",
    ]  # fmt: skip
    assert "nameserver 127." in seen


def test_a_lookup_without_a_resolver_is_refused_at_once(client):
    stream = client.run("sh", "-c", "time -p nslookup example.test; true")
    seconds = float(stream.data[1].decode().split("real")[1].split()[0])
    assert seconds < 1


def test_the_rootfs_is_writable_and_its_layer_has_the_requested_size(client, p):
    assert client.run("sh", "-c", "echo new > /lib/data && cat /usr/lib/data").data[0] == b"new\n"
    metrics = dict(text.split("=") for text in client.call(p.METRICS)[p.METRIC])
    assert int(metrics["overlay_size_bytes"]) == 256 << 20
    client.run("sh", "-c", "head -c 10000000 /dev/zero > /tmp/big")
    more = dict(text.split("=") for text in client.call(p.METRICS)[p.METRIC])
    assert 9_000_000 < int(more["overlay_used_bytes"]) - int(metrics["overlay_used_bytes"]) < 11_000_000
    assert client.run("stat", "-c", "%a %u", "/").data[0] == b"755 0\n"


def test_configure_and_start_happen_once(guest, p):
    with pytest.raises(OSError, match="already"):
        guest.configure()
    guest.start("exec sleep 1000")
    with pytest.raises(OSError, match="already"):
        guest.start("true")


def test_a_working_directory_that_is_missing_is_made_for_the_workload(guest, p):
    guest.start("exec sleep 1000", (p.CWD, "/a/b"), (p.USER, "app"))
    seen = guest.client.run("sh", "-c", "readlink /proc/1/cwd; stat -c '%a %u:%g' /a/b").data[0].decode()
    assert seen == "/a/b\n755 0:0\n"


@pytest.mark.parametrize("there", ["", "ln -s /elsewhere mtab", "echo table > mtab"])
def test_the_table_of_mounts_is_where_programs_look(make_guest, rootfs, there):
    (rootfs / "etc/mtab").unlink(missing_ok=True)
    subprocess.run(["sh", "-c", there], cwd=rootfs / "etc", check=True)
    guest = make_guest()
    guest.connect()
    guest.configure()
    assert guest.client.run("readlink", "/etc/mtab").data[0] == b"/proc/mounts\n"
    (rootfs / "etc/mtab").unlink(missing_ok=True)


def test_the_state_follows_the_workload(guest, p):
    assert guest.client.call(p.STATUS)[p.STATE] == ["idle"]
    guest.start("exec sleep 1000")
    assert guest.client.call(p.STATUS)[p.STATE] == ["running"]
    guest.client.call(p.STOP, (p.SIGNAL_FIELD, 9))
    guest.client.wait(lambda: guest.client.events)
    kind, event = guest.client.events[0]
    assert (kind, event[p.EXIT_SIGNAL]) == (1, [9])
    status = guest.client.call(p.STATUS)
    assert (status[p.STATE], status[p.EXIT_SIGNAL]) == (["exited"], [9])
    with pytest.raises(OSError, match="does not run"):
        guest.client.call(p.STOP, (p.SIGNAL_FIELD, 9))


def test_a_workload_that_cannot_start_ends_with_127_and_the_reason(guest, p):
    guest.client.call(p.START, (p.ARG, "/no/such/server"))
    guest.client.wait(lambda: guest.client.events)
    event = guest.client.events[0][1]
    assert event[p.EXIT_CODE] == [127]
    assert event[p.MESSAGE] == ["exec /no/such/server: No such file or directory"]


def test_stop_sends_the_requested_signal(guest, p):
    guest.start("trap 'exit 42' USR1; echo ready; while :; do sleep 0.05; done")
    logs = guest.client.open(p.LOGS)
    guest.client.wait(lambda: logs.data[0] == b"ready\n")
    guest.client.call(p.STOP, (p.SIGNAL_FIELD, 10))
    guest.client.wait(lambda: guest.client.events)
    assert guest.client.events[0][1][p.EXIT_CODE] == [42]


def test_after_the_workloads_end_execs_still_run_and_see_processes(guest, p):
    guest.start("exit 0")
    guest.client.wait(lambda: guest.client.events)
    stream = guest.client.run("ps")
    assert stream.code == 0
    assert b"ps" in stream.data[0]


def test_the_end_of_the_workload_ends_its_execs(guest, p):
    guest.start("exec sleep 1000")
    stream = guest.client.start_exec("sleep", "1000")
    guest.client.call(p.STOP, (p.SIGNAL_FIELD, 9))
    guest.client.wait(lambda: stream.exit is not None)
    assert stream.exit[p.EXIT_SIGNAL] == [9]


def test_the_log_keeps_the_order_of_both_outputs_and_ends_with_the_workload(guest, p):
    guest.start("for i in 1 2 3; do echo out $i; echo err $i >&2; done")
    logs = guest.client.open(p.LOGS)
    guest.client.wait(lambda: logs.eof)
    assert logs.data[0] == b"out 1\nerr 1\nout 2\nerr 2\nout 3\nerr 3\n"
    again = guest.client.open(p.LOGS)  # the ring still has it
    guest.client.wait(lambda: again.eof)
    assert again.data[0] == logs.data[0]


def test_an_unread_log_never_blocks_and_says_how_much_it_lost(guest, p):
    guest.start("seq 1 400000; echo end")
    guest.client.wait(lambda: guest.client.events, 30)
    logs = guest.client.open(p.LOGS)
    guest.client.wait(lambda: logs.eof)
    text = bytes(logs.data[0])
    marker, rest = text.split(b"\n", 1)
    total = sum(len(f"{number}\n") for number in range(1, 400001)) + 4
    assert marker == b"[fcvm: %d bytes of output were dropped here]" % (total - len(rest))
    assert rest.endswith(b"400000\nend\n")
    assert (1 << 20) - 10 < len(rest) <= 1 << 20
    first = int(rest.split(b"\n", 1)[0])
    assert rest == b"".join(b"%d\n" % number for number in range(first, 400001)) + b"end\n"


def test_a_log_of_50_mb_reaches_a_reader_whole(guest, p):
    logs = guest.client.open(p.LOGS)
    guest.start("seq 1 6600000")
    guest.client.wait(lambda: logs.eof, 120)
    assert len(logs.data[0]) == size_of_sequence(6600000)
    assert b"fcvm" not in logs.data[0]


def test_a_slow_reader_slows_the_workload_instead_of_losing_output(guest, p):
    logs = guest.client.open(p.LOGS, grants=False)
    guest.start("head -c 20000000 /dev/zero")
    while not logs.eof:
        seen = len(logs.data[0])
        guest.client.send(p.frame(p.GRANT, logs.number, b"\0" + (p.WINDOW).to_bytes(4, "little")))
        guest.client.wait(lambda seen=seen: logs.eof or len(logs.data[0]) > seen)
        guest.client.run("true")
    assert len(logs.data[0]) == 20000000


def size_of_sequence(last):
    """Return how many bytes the numbers 1 to `last` take, a line each."""
    size, digits, start = 0, 1, 1
    while start <= last:
        end = min(last, start * 10 - 1)
        size += (end - start + 1) * (digits + 1)
        start, digits = start * 10, digits + 1
    return size


def test_a_stalled_reader_does_not_block_the_workload(guest, p):
    logs = guest.client.open(p.LOGS, grants=False)
    guest.start("seq 1 400000; echo end")
    guest.client.wait(lambda: guest.client.events, 30)
    assert len(logs.data[0]) == p.WINDOW
    logs.grants = True
    guest.client.send(p.frame(p.GRANT, logs.number, b"\0" + (1 << 21).to_bytes(4, "little")))
    guest.client.wait(lambda: logs.eof)
    assert logs.data[0].count(b"[fcvm: ") == 1
    assert logs.data[0].endswith(b"400000\nend\n")


def test_a_workload_that_freezes_itself_blocks_nothing_else(guest, p):
    guest.start("exec sleep 1000")
    if b"cgroup.freeze" not in guest.client.run("ls", "/sys/fs/cgroup").data[0]:
        pytest.skip("cgroups are not allowed here")
    guest.client.start_exec("sh", "-c", "echo 1 > /sys/fs/cgroup/cgroup.freeze")
    while guest.client.start_exec("true").reply[1][p.PID] != [0]:
        pass  # until one is frozen before it could begin
    assert guest.client.call(p.STATUS)[p.STATE] == ["running"]
    secret = p.new_secret()
    guest.client.call(p.QUIESCE, (p.SECRET, secret))
    client = guest.connect(secret)
    client.call(p.PERSONALISE)
    assert client.run("true").code == 0


def test_an_out_of_memory_kill_is_reported(guest, p):
    guest.start("exec sleep 1000")
    if b"memory.max" not in guest.client.run("ls", "/sys/fs/cgroup").data[0]:
        pytest.skip("the memory controller of this machine is not in cgroup2")
    guest.client.run("sh", "-c", "echo 20M > /sys/fs/cgroup/memory.max; tail /dev/zero")
    guest.client.wait(lambda: any(kind == 2 for kind, _ in guest.client.events))


def test_commands_do_not_keep_an_init_from_delegating_controllers(guest, p):
    """A process in the group of an init keeps it from delegating controllers to its own groups."""
    guest.start("exec sleep 1000", (p.FLAGS, 4))
    seen = guest.client.run("grep", "-h", "^0:", "/proc/1/cgroup", "/proc/self/cgroup").data[0].decode()
    assert seen == "0::/\n0::/fcvm\n"


def test_a_later_session_gets_the_report_of_an_earlier_end(guest, p):
    guest.start("exit 3")
    guest.client.wait(lambda: guest.client.events)
    later = guest.reconnect()
    later.call(p.STATUS)
    assert [(kind, fields[p.EXIT_CODE]) for kind, fields in later.events] == [(1, [3])]


def test_a_session_gets_no_report_of_an_end_while_the_workload_runs(guest, p):
    guest.start("exec sleep 1000")
    later = guest.reconnect()
    later.call(p.STATUS)
    assert later.events == []
