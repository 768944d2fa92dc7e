"""Limits and sysctls as container engines set them, and users from unusual passwd and group files."""

import os
import subprocess
import sys

import pytest

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root raises a limit, or takes a user's groups")


def limits(client, *options, **more):
    script = "; ".join(f"ulimit {option}" for option in options)
    return client.run("sh", "-c", script, **more).data[0].decode().split()


def may_raise_limits():
    """Return whether this process has CAP_SYS_RESOURCE, as the agent has in a guest."""
    script = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (1048576, 1048576))"
    return subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 0


@needs_root
@pytest.mark.skipif(not may_raise_limits(), reason="limits may not be raised here")
@pytest.mark.parametrize("user", ["root", "app"])
def test_the_limits_of_files_processes_and_locked_memory_are_docker_s(client, p, user):
    seen = limits(client, "-Sn", "-Hn", "-u", "-l", extra=[(p.USER, user)])
    assert seen == ["65536", "1048576", "unlimited", "unlimited"]
    assert limits(client, "-Hc", extra=[(p.USER, user)]) == ["unlimited"]


def test_requested_limits_apply_to_the_workload_and_to_commands(make_guest, p):
    guest = make_guest()
    guest.connect()
    client = guest.configure((p.ULIMIT, "7:100:200"), (p.ULIMIT, "4:0:0"))
    guest.start("ulimit -Sn > /tmp/limit; ulimit -Hn >> /tmp/limit; exec sleep 1000")
    assert limits(client, "-Sn", "-Hn", "-c") == ["100", "200", "0"]
    client.run("sh", "-c", "until test -s /tmp/limit; do sleep 0.02; done")
    assert client.run("cat", "/tmp/limit").data[0] == b"100\n200\n"


def test_a_limit_that_cannot_be_set_starts_nothing(make_guest, p):
    guest = make_guest()
    guest.connect()
    client = guest.configure((p.ULIMIT, "7:-1:-1"))
    stream = client.run("true")
    assert stream.code == 126
    assert "ulimit nofile=-1: Operation not permitted" in stream.message


@pytest.mark.parametrize("text", ["nofile:1:2", "7:1", "99:1:1", ""])
def test_an_invalid_limit_is_refused(make_guest, p, text):
    guest = make_guest()
    guest.connect()
    with pytest.raises(OSError, match="is not a limit"):
        guest.configure((p.ULIMIT, text))


def test_every_user_may_use_low_ports_and_ping(client):
    seen = client.run("sh", "-c", "cd /proc/sys/net/ipv4; cat ip_unprivileged_port_start ping_group_range")
    start, *groups = seen.data[0].decode().split()
    assert start == "0"
    if os.geteuid() == 0:
        assert groups == ["0", "2147483647"]


@pytest.mark.parametrize("name", ["net.ipv4.ip_default_ttl", "net/ipv4/ip_default_ttl"])
def test_a_requested_sysctl_is_set(make_guest, p, name):
    guest = make_guest()
    guest.connect()
    client = guest.configure((p.SYSCTL, f"{name}=33"), (p.SYSCTL, "net.ipv4.ip_unprivileged_port_start=81"))
    script = "cd /proc/sys/net/ipv4; cat ip_default_ttl ip_unprivileged_port_start"
    assert client.run("sh", "-c", script).data[0] == b"33\n81\n"


def test_a_dot_in_the_name_of_a_nic_is_a_slash_in_a_sysctl(make_guest, p):
    guest = make_guest()
    guest.connect()
    with pytest.raises(OSError, match=r"no sysctl net\.ipv4\.conf\.eth0/1\.forwarding"):
        guest.configure((p.SYSCTL, "net.ipv4.conf.eth0/1.forwarding=1"))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("net.ipv4.nonesuch=1", "kernel has no sysctl net.ipv4.nonesuch"),
        ("net.ipv4.ip_default_ttl=many", "sysctl net.ipv4.ip_default_ttl=many: Invalid argument"),
        ("net.ipv4.ip_default_ttl", "Invalid argument"),
        ("../../etc/x=1", "kernel has no sysctl"),
    ],
)
def test_a_sysctl_that_cannot_be_set_is_reported(make_guest, p, setting, message):
    guest = make_guest()
    guest.connect()
    with pytest.raises(OSError, match=message):
        guest.configure((p.SYSCTL, setting))


def test_shared_memory_has_the_requested_size(make_guest, p):
    guest = make_guest()
    guest.connect()
    client = guest.configure((p.SHM_MIB, 48))
    assert client.run("sh", "-c", "df -m /dev/shm | tail -1 | awk '{print $2}'").data[0] == b"48\n"
    assert client.run("stat", "-c", "%a", "/dev/shm").data[0] == b"1777\n"


# The expected values are those of runc's parser.
ODD = {
    "short:x:1234": ("short", "1234 0 0 /"),
    "name": ("name", "0 0 0 /"),
    "blank:x::::/home/blank:": ("blank", "0 0 0 /home/blank"),
    "text:x:many:few::/t:": ("text", "0 0 0 /t"),
    "  tail:x:5:6::/tail:/bin/sh \r": ("tail", "5 6 6 /tail"),
    "two:x:7:8::/first:\ntwo:x:9:9::/second:": ("two", "7 8 8 /first"),
    "1000:x:77:77::/number:": ("1000", "1000 1001 1001 2000 /home/app"),
    f"long:x:21:22:{'x' * 70000}:/long:/bin/sh": ("long", "21 22 22 /long"),
    "+::::::": ("4321", "4321 0 0 /"),
    "+@group:::::::": ("root", "0 0 0 /root"),
    "# a comment: with: colons:\n\nafter:x:31:32::/after:": ("after", "31 32 32 /after"),
}


@needs_root
@pytest.mark.parametrize("line", ODD, ids=[user for user, _ in ODD.values()])
def test_odd_lines_of_etc_passwd_are_read_as_by_runc(client, p, line):
    user, expected = ODD[line]
    client.run("sh", "-c", "cat >> /etc/passwd", stdin=f"{line}\n".encode())
    stream = client.run("sh", "-c", "echo $(id -u) $(id -g) $(id -G) $HOME", extra=[(p.USER, user)])
    assert stream.data[0].decode().strip() == expected


@needs_root
def test_root_has_the_groups_and_the_home_of_its_own_entry(client):
    script = "sed -i 's|^root.*|root:x:0:0::/srv/root:/bin/sh|' /etc/passwd; echo 'disk:x:6:bin,root' >> /etc/group"
    client.run("sh", "-c", script)
    assert client.run("sh", "-c", "echo $(id -G) $HOME").data[0] == b"0 6 /srv/root\n"


@needs_root
def test_the_last_member_of_a_very_large_group_belongs_to_it(client, p):
    members = ",".join(f"user{number}" for number in range(20000))
    client.run("sh", "-c", "cat >> /etc/group", stdin=f"all:x:5000:{members},app\n".encode())
    assert client.run("id", "-G", extra=[(p.USER, "app")]).data[0].split() == [b"1001", b"2000", b"5000"]


def test_without_the_files_numbers_still_work(client, p):
    client.run("rm", "/etc/passwd", "/etc/group")
    for user, expected in ((None, "0 0 /"), ("1234", "1234 0 /"), ("12:34", "12 34 /")):
        extra = [(p.USER, user)] if user else []
        seen = client.run("sh", "-c", "echo $(id -u) $(id -g) $HOME", extra=extra)
        assert seen.data[0].decode().strip() == expected
