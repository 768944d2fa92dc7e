"""QUIESCE and PERSONALISE: freezing one guest and giving it another identity."""

import contextlib
import os
import subprocess
import time
from pathlib import Path

import pytest

LOCALHOST = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"


@pytest.fixture
def frozen(guest, p):
    """A quiesced guest whose workload counts. The secret for the next session is in guest.secret."""
    guest.start("i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done")
    logs = guest.client.open(p.LOGS)
    guest.client.wait(lambda: logs.data[0].count(b"\n") > 3)
    if not has_freezer(guest):
        pytest.skip("cgroups are not allowed here")
    guest.secret = p.new_secret()
    guest.client.call(p.QUIESCE, (p.SECRET, guest.secret))
    return guest


def has_freezer(guest):
    return b"0::/fcvm" in Path(f"/proc/{workload_pid(guest)}/cgroup").read_bytes()


def workload_pid(guest):
    return int(Path(f"/proc/{guest.agent_pid}/task/{guest.agent_pid}/children").read_text().split()[0])


def seen(client, script):
    return client.run("sh", "-c", script).data[0].decode()


def test_after_quiesce_the_workload_is_frozen_and_the_agent_is_silent(frozen):
    frozen.client.buffer.clear()
    before = Path(f"/proc/{workload_pid(frozen)}/stat").read_text()
    frozen.channel.settimeout(0.5)
    with pytest.raises(TimeoutError):
        frozen.channel.recv(1)
    assert Path(f"/proc/{workload_pid(frozen)}/stat").read_text() == before


def test_freeze_stops_the_workload_but_not_the_session_and_personalise_thaws_it(guest, p):
    client = guest.client
    guest.start("i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done")
    logs = client.open(p.LOGS)
    client.wait(lambda: logs.data[0].count(b"\n") > 3)
    if not has_freezer(guest):
        pytest.skip("cgroups are not allowed here")
    client.call(p.FREEZE)
    assert client.call(p.STATUS)[p.STATE] == ["frozen"]
    before = Path(f"/proc/{workload_pid(guest)}/stat").read_text()
    time.sleep(0.2)  # it would have counted ten times
    assert Path(f"/proc/{workload_pid(guest)}/stat").read_text() == before
    client.call(p.PERSONALISE, (p.REALTIME_NS, time.time_ns()))
    count = logs.data[0].count(b"\n")
    client.wait(lambda: logs.data[0].count(b"\n") > count + 2)


def test_a_guest_that_was_only_frozen_keeps_connections_to_peers_outside(guest, p):
    client = guest.client
    seen(client, "ip addr add 10.9.9.9/32 dev lo")
    with guest.listen(7000) as outside:
        client.start_exec("sh", "-c", "sleep 99 | nc 10.9.9.9 7000")
        stays = outside.accept()[0]
        with stays:
            client.call(p.PERSONALISE, (p.REALTIME_NS, time.time_ns()))
            stays.settimeout(0.3)
            with pytest.raises(TimeoutError):
                stays.recv(1)


def test_after_quiesce_all_input_is_discarded_up_to_the_secret(frozen, p):
    stale = p.frame(p.OPEN, 500, bytes([p.POWEROFF]) + b"\0" * 4)
    frozen.channel.sendall(stale * 10 + stale[:7])
    client = frozen.connect(frozen.secret)
    assert client.call(p.STATUS)[p.STATE] == ["frozen"]


def test_the_secret_of_the_session_before_quiesce_has_no_effect(frozen, p):
    old = frozen.client.next_secret + p.frame(p.HELLO, 0, b"\1\0\0\0" + b"n" * 16 + b"s" * 16)
    frozen.channel.sendall(old)
    assert frozen.connect(frozen.secret).call(p.STATUS)[p.STATE] == ["frozen"]


def test_nothing_runs_while_frozen_and_personalise_thaws(frozen, p):
    client = frozen.connect(frozen.secret)
    with pytest.raises(OSError, match="frozen"):
        client.start_exec("true")
    client.call(p.PERSONALISE, (p.ENTROPY, b"e" * 32), (p.REALTIME_NS, time.time_ns()))
    assert client.call(p.STATUS)[p.STATE] == ["running"]
    logs = client.open(p.LOGS)
    client.wait(lambda: logs.data[0])
    count = logs.data[0].count(b"\n")
    client.wait(lambda: logs.data[0].count(b"\n") > count + 2)


def test_quiesce_without_a_usable_secret_is_refused_and_nothing_is_frozen(guest, p):
    guest.start("exec sleep 1000")
    for fields in ([], [(p.SECRET, b"short")], [(p.SECRET, b"\0" * 16)]):
        with pytest.raises(OSError, match=r"SECRET|bytes"):
            guest.client.call(p.QUIESCE, *fields)
    assert guest.client.call(p.STATUS)[p.STATE] == ["running"]


def test_the_names_change_everywhere(frozen, p):
    client = frozen.connect(frozen.secret)
    client.call(
        p.PERSONALISE,
        (p.MACHINE_ID, "f" * 32),
        (p.BOOT_ID, "11111111-2222-3333-4444-555555555555"),
        (p.HOSTS, "10.0.2.3 other"),
        (p.HOSTS, "10.0.2.4 another"),
        (p.DNS, "10.0.2.3"),
    )
    hosts = f"{LOCALHOST}10.0.2.15\tbox\n10.0.2.3 other\n10.0.2.4 another\n"
    script = "hostname; cd /etc; cat hostname machine-id hosts resolv.conf /proc/sys/kernel/random/boot_id"
    assert seen(client, script) == (
        f"box\nbox\n{'f' * 32}\n{hosts}nameserver 10.0.2.3\n11111111-2222-3333-4444-555555555555\n"
    )


def test_the_host_name_stays_with_any_identity(client, p):
    client.call(p.PERSONALISE, (p.HOSTNAME, "other"), (p.ENTROPY, b"e" * 32))
    assert seen(client, "hostname; cat /etc/hostname; grep -c other /etc/hosts") == "box\nbox\n0\n"


def test_a_host_name_with_a_domain_resolves_in_short_too(make_guest, p):
    guest = make_guest()
    guest.connect()
    guest.configure((p.HOSTNAME, "db-1.example.test"))
    assert seen(guest.client, "hostname; cat /etc/hosts") == (
        f"db-1.example.test\n{LOCALHOST}10.0.2.15\tdb-1.example.test db-1\n10.0.2.2 gateway\n"
    )


@pytest.mark.parametrize(
    "change",
    [
        "echo '127.0.0.1 minio' >> hosts",
        "printf '127.0.0.1 minio' >> hosts",
        "sed -i '1i 127.0.0.1 minio' hosts",
        "{ echo 127.0.0.1 minio; cat hosts; } > new; mv new hosts",
        "{ echo 127.0.0.1 minio; cat hosts; } > /tmp/hosts; rm hosts; ln -s /tmp/hosts hosts",
        "seq -f '10.1.0.%g many' 9000 >> hosts; echo '127.0.0.1 minio' >> hosts",
    ],
)
def test_lines_of_the_workload_stay_in_etc_hosts(client, p, change):
    seen(client, f"cd /etc; {change}")
    client.call(p.PERSONALISE, (p.HOSTS, "10.0.2.15 clone"), (p.HOSTS, "10.0.2.3 other"))
    lines = seen(client, "cat /etc/hosts").splitlines()
    assert lines.count("127.0.0.1 minio") == 1
    assert lines[-2:] == ["10.0.2.15 clone", "10.0.2.3 other"]
    assert lines.count("10.0.2.15\tbox") == 1
    assert "10.0.2.2 gateway" not in lines
    client.call(p.JOIN, (p.HOSTS, "10.0.2.15 clone"), (p.HOSTS, "10.0.2.4 another"))
    again = seen(client, "cat /etc/hosts").splitlines()
    assert again == [*lines[:-1], "10.0.2.4 another"]


def test_lines_that_the_workload_removed_from_etc_hosts_stay_removed(client, p):
    seen(client, "cd /etc; sed -i '/::1/d; /gateway/d' hosts")
    client.call(p.PERSONALISE, (p.HOSTS, "10.0.2.2 gateway"), (p.HOSTS, "10.0.2.3 other"))
    assert seen(client, "cat /etc/hosts") == "127.0.0.1\tlocalhost\n10.0.2.15\tbox\n10.0.2.3 other\n"


def test_without_an_etc_hosts_there_is_a_new_one(client, p):
    seen(client, "rm /etc/hosts")
    client.call(p.PERSONALISE, (p.HOSTS, "10.0.2.3 other"))
    assert seen(client, "cat /etc/hosts") == f"{LOCALHOST}10.0.2.15\tbox\n10.0.2.3 other\n"


def test_names_are_written_to_files_that_the_workload_has_replaced(client, p):
    seen(client, "cd /etc; cp hosts new; mv new hosts; rm hostname; rm machine-id; ln -s /tmp/elsewhere machine-id")
    client.call(p.PERSONALISE, (p.HOSTS, "10.0.2.15 clone"), (p.MACHINE_ID, "a" * 32))
    assert seen(client, "cd /etc; grep clone hosts; ls hostname; cat machine-id; ls /tmp") == (
        f"10.0.2.15 clone\n{'a' * 32}\n"
    )


def test_on_a_full_layer_a_clone_goes_without_a_file_that_the_workload_has_removed(client, p):
    seen(
        client,
        "rm /etc/hosts /etc/machine-id; dd if=/dev/zero of=/fill bs=65536; dd if=/dev/zero of=/fill2 bs=64; true",
    )
    client.call(p.PERSONALISE, (p.HOSTS, "10.0.2.15 clone"), (p.MACHINE_ID, "a" * 32))
    assert "machine-id" not in seen(client, "ls /etc")
    seen(client, "rm /fill /fill2")
    client.call(p.PERSONALISE, (p.HOSTS, "10.0.2.16 again"), (p.MACHINE_ID, "b" * 32))
    assert seen(client, "cd /etc; cat machine-id; grep again hosts") == f"{'b' * 32}\n10.0.2.16 again\n"


def test_the_machine_id_of_dbus_changes_only_if_it_is_a_regular_file(make_guest, p, rootfs):
    directory = rootfs / "var/lib/dbus"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "machine-id").write_text("0" * 32 + "\n")
    guest = make_guest()
    guest.connect()
    client = guest.configure()
    (directory / "machine-id").unlink()
    client.call(p.PERSONALISE, (p.MACHINE_ID, "a" * 32))
    assert seen(client, "cat /var/lib/dbus/machine-id") == "a" * 32 + "\n"


def test_the_address_changes_and_the_gateways_is_released(client, p):
    assert "10.0.2.2/32" in seen(client, "ip addr show lo")
    client.call(p.PERSONALISE, (p.ADDRESS, "10.0.2.77/24"), (p.PEER_GATEWAY, 0), (p.MAC, b"\x02\0\0\0\0\x09"))
    addresses = seen(client, "ip addr")
    assert "10.0.2.77/24" in addresses
    assert "10.0.2.15" not in addresses
    assert "10.0.2.2/" not in addresses
    assert "10.0.2.77\tbox" in seen(client, "cat /etc/hosts")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([("MACHINE_ID", "short")], "machine id"),
        ([("HOSTS", "x" * 65536)], "HOSTS lines"),
        ([("MAC", b"12345")], "bytes"),
        ([("ENTROPY", b"12345")], "bytes"),
        ([("ADDRESS", "300.1.1.1/24")], "not an IP address"),
        ([("BOOT_ID", "x" * 100)], "boot id"),
        ([("HOSTNAME", b"a\0b")], "zero byte"),
        ([("ARG", "/no/such/hook")], "hook could not start"),
        ([("ARG", "sh"), ("ARG", "-c"), ("ARG", "echo so it is; exit 3")], "hook ended with 3: so it is"),
        ([("ARG", "sh"), ("ARG", "-c"), ("ARG", "kill -9 $$")], "signal 9"),
    ],
)
def test_a_field_that_cannot_be_set_leaves_the_workload_frozen(frozen, p, fields, message):
    client = frozen.connect(frozen.secret)
    with pytest.raises(OSError, match=message):
        client.call(p.PERSONALISE, *((getattr(p, name), value) for name, value in fields))
    assert client.call(p.STATUS)[p.STATE] == ["frozen"]


def test_the_hook_runs_before_the_thaw_as_the_new_guest(frozen, p):
    client = frozen.connect(frozen.secret)
    hook = [(p.ARG, part) for part in ("sh", "-c", "hostname > /tmp/hook; echo $X >> /tmp/hook")]
    client.call(p.PERSONALISE, (p.ENV, "X=y"), *hook)
    assert seen(client, "cat /tmp/hook") == "box\ny\n"


def test_a_hook_that_hangs_is_killed_after_ten_seconds(guest, p):
    began = time.monotonic()
    with pytest.raises(OSError, match="took more than 10 s: working"):
        guest.client.call(p.PERSONALISE, *((p.ARG, part) for part in ("sh", "-c", "echo working; sleep 1000")))
    assert 9 < time.monotonic() - began < 18
    assert "sleep 1000" not in seen(guest.client, "ps")


@pytest.fixture
def link(make_guest):
    """A guest whose NIC has a neighbour, and a function that runs `ip` in the guest's network."""
    guest = make_guest()
    guest.connect()

    def ip(words):
        enter = ["nsenter", "--target", str(guest.agent_pid), "--net"]
        enter += [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
        done = subprocess.run([*enter, "ip", *words.split()], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"ip {words}: {done.stderr}")

    ip("link add eth0 type veth peer name far")
    guest.configure()
    return guest, ip


@contextlib.contextmanager
def neighbour(guest, ip, card, address):
    """Put the far end of a link into another network namespace, and yield its process."""
    enter = ["nsenter", "--target", str(guest.agent_pid), "--net"]
    enter += [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
    script = (
        f"echo ready; read -r _; ip addr add {address}/24 dev {card}; ip link set {card} up; echo up; exec sleep 99"
    )
    command = [*enter, "unshare", "--net", "sh", "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            ip(f"link set {card} netns {process.pid}")
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == "up\n"
            yield process
        finally:
            process.kill()


def test_connections_that_leave_by_a_nic_are_reset(link, p):
    guest, ip = link
    with neighbour(guest, ip, "far", "10.0.2.99") as far, guest.listen(7000, of=far.pid) as outside:
        guest.client.start_exec("sh", "-c", "sleep 99 | nc 10.0.2.99 7000")
        gone = outside.accept()[0]
        with gone:
            reply = guest.client.call(p.PERSONALISE, (p.ENTROPY, b"e" * 32))
            if reply[p.MESSAGE]:
                pytest.skip(reply[p.MESSAGE][0])
            gone.settimeout(5)
            with pytest.raises((ConnectionResetError, ConnectionAbortedError)):
                gone.recv(1)


@pytest.mark.parametrize("address", ["127.0.0.1", "10.0.2.15", "10.0.2.2", "10.9.9.9", "10.8.8.1", "fd00::9"])
def test_connections_between_programs_of_the_guest_stay_over_whichever_address(link, p, address):
    guest, ip = link
    ip("addr add 10.9.9.9/32 dev lo")
    ip("addr add fd00::9/128 dev lo")
    ip("link add bridge type bridge")
    ip("addr add 10.8.8.1/24 dev bridge")
    ip("link set bridge up")
    with guest.listen(7000, "::" if ":" in address else "0.0.0.0") as inside:
        guest.client.start_exec("sh", "-c", f"sleep 99 | nc {address} 7000")
        check_stays(guest, p, inside)


def test_connections_into_a_network_namespace_of_the_guest_stay(link, p):
    guest, ip = link
    ip("link add near type veth peer name inner")
    ip("addr add 10.200.0.1/24 dev near")
    ip("link set near up")
    with neighbour(guest, ip, "inner", "10.200.0.2") as container, guest.listen(7000, of=container.pid) as inside:
        guest.client.start_exec("sh", "-c", "sleep 99 | nc 10.200.0.2 7000")
        check_stays(guest, p, inside)


def check_stays(guest, p, listener):
    stays = listener.accept()[0]
    with stays:
        guest.client.call(p.PERSONALISE, (p.ENTROPY, b"e" * 32))
        stays.settimeout(0.3)
        with pytest.raises(TimeoutError):
            stays.recv(1)


def test_connections_to_peers_outside_are_reset_once_before_the_snapshot(link, p):
    guest, ip = link
    guest.start("sleep 99 | nc 10.0.2.99 7000")
    with neighbour(guest, ip, "far", "10.0.2.99") as far, guest.listen(7000, of=far.pid) as outside:
        seen(guest.client, "sleep 99 | nc 10.0.2.99 7000 & :")
        gone = outside.accept()[0]
        with gone:
            guest.client.call(p.QUIESCE, (p.SECRET, p.new_secret()))
            gone.settimeout(5)
            with pytest.raises((ConnectionResetError, ConnectionAbortedError)):
                gone.recv(1)


def test_a_workload_that_stays_frozen_waits_for_the_time(frozen, p):
    client = frozen.connect(frozen.secret)
    client.call(p.PERSONALISE, (p.ENTROPY, b"e" * 32), (p.FLAGS, 16))
    assert client.call(p.STATUS)[p.STATE] == ["frozen"]
    client.call(p.PERSONALISE, (p.REALTIME_NS, time.time_ns()))
    assert client.call(p.STATUS)[p.STATE] == ["running"]


def test_a_private_network_that_is_joined_has_an_address_and_names(guest, p):
    client = guest.client
    if client.run("sh", "-c", "ip link add eth1 type dummy").exit[p.EXIT_CODE] != [0]:
        pytest.skip("this machine's kernel has no dummy devices")
    fields = [(p.INTERFACE, "eth1"), (p.MAC, b"\x02\xfc\0\0\0\x01"), (p.ADDRESS, "10.77.1.10/24")]
    client.call(p.JOIN, *fields)
    link = seen(client, "ip addr show eth1")
    assert "02:fc:00:00:00:01" in link
    assert "10.77.1.10/24" in link
    assert "UP" in link


def test_the_names_of_others_can_change_at_any_time(guest, p):
    client = guest.client
    client.call(p.JOIN, (p.HOSTS, "10.77.1.10 db"), (p.HOSTS, "10.77.1.11 web"))
    assert seen(client, "cat /etc/hosts").splitlines()[-2:] == ["10.77.1.10 db", "10.77.1.11 web"]
    assert "box" in seen(client, "cat /etc/hosts")


def test_an_interface_that_is_not_there_cannot_join(guest, p):
    with pytest.raises(OSError, match="there is no interface eth7"):
        guest.client.call(p.JOIN, (p.INTERFACE, "eth7"))
