"""Processes: their start, environment and end."""

import signal

import pytest


@pytest.mark.parametrize("code", [0, 1, 3, 255])
def test_exit_codes_come_back(client, code):
    assert client.run("sh", "-c", f"exit {code}").code == code


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_a_program_that_a_signal_ends_has_exit_signal(client, p, number):
    stream = client.run("sh", "-c", f"kill -{number} $$")
    assert stream.exit[p.EXIT_SIGNAL] == [number]
    assert p.EXIT_CODE not in stream.exit


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["no-such-program"], 127, "exec no-such-program: No such file or directory"),
        (["/bin/no-such-program"], 127, "exec /bin/no-such-program: No such file or directory"),
        (["/etc/passwd"], 126, "exec /etc/passwd: Permission denied"),
        (["/etc"], 126, "exec /etc: Permission denied"),
    ],
)
def test_a_program_that_cannot_start_says_why(client, argv, code, message):
    stream = client.run(*argv)
    assert (stream.code, stream.message) == (code, message)


def test_a_script_whose_interpreter_is_missing_says_so(client):
    client.run("sh", "-c", "printf '#!/no/such/sh\\n' > /tmp/script; chmod +x /tmp/script")
    stream = client.run("/tmp/script")
    assert stream.code == 127
    assert "interpreter" in stream.message


def test_a_file_without_a_format_is_not_given_to_a_shell(client):
    client.run("sh", "-c", "echo exit 5 > /tmp/script; chmod +x /tmp/script")
    assert client.run("/tmp/script").code == 126


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        (None, "0 0 0 /root"),
        ("root", "0 0 0 /root"),
        ("app", "1000 1001 1001 2000 /home/app"),
        ("app:staff", "1000 50 50 /home/app"),
        ("app:77", "1000 77 77 /home/app"),
        ("1000", "1000 1001 1001 2000 /home/app"),
        ("1000:50", "1000 50 50 /home/app"),
        (":staff", "0 50 50 /root"),
        ("4000", "4000 0 0 /"),
        ("4000:5000", "4000 5000 5000 /"),
    ],
)
def test_users_are_looked_up_in_the_images_own_files(client, p, user, expected):
    extra = [(p.USER, user)] if user else []
    stream = client.run("sh", "-c", "echo $(id -u) $(id -g) $(id -G) $HOME", extra=extra)
    assert stream.data[0].decode().strip() == expected


@pytest.mark.parametrize("user", ["ghost", "app:ghosts", ":ghosts", "-1", "99999999999"])
def test_an_unknown_user_or_group_cannot_start_anything(client, p, user):
    stream = client.run("true", extra=[(p.USER, user)])
    assert stream.code == 126
    assert "not in the image's /etc/" in stream.message


def test_the_environment_is_the_requested_one_with_path_and_home_added(client, p):
    stream = client.run("env", extra=[(p.ENV, "A=1"), (p.ENV, "B=x y=z")])
    assert sorted(stream.data[0].decode().split("\n")[:-1]) == [
        "A=1", "B=x y=z", "HOME=/root", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    ]  # fmt: skip
    stream = client.run("env", extra=[(p.ENV, "PATH=/bin"), (p.ENV, "HOME=/tmp")])
    assert sorted(stream.data[0].decode().split()) == ["HOME=/tmp", "PATH=/bin"]


def test_programs_are_searched_in_the_path_that_was_given(client, p):
    assert client.run("true", extra=[(p.ENV, "PATH=/nowhere")]).code == 127
    assert client.run("true", extra=[(p.ENV, "PATH=/nowhere:/bin")]).code == 0


@pytest.mark.parametrize("user", ["root", "app"])
def test_a_command_does_not_create_its_working_directory(client, p, user):
    stream = client.run("pwd", extra=[(p.CWD, "/a/b"), (p.USER, user)])
    assert (stream.code, stream.message) == (126, "chdir /a/b: No such file or directory")
    assert client.run("ls", "-d", "/a").code != 0


def test_a_user_who_is_not_root_can_open_dev_stdout(client, p):
    stream = client.run("sh", "-c", "echo through > /dev/stdout; echo err > /dev/stderr", extra=[(p.USER, "app")])
    assert (stream.code, stream.data[0], stream.data[1]) == (0, b"through\n", b"err\n")


def test_a_program_starts_with_no_signal_blocked_or_ignored_and_no_descriptor_of_the_agent(client):
    status = client.run("grep", "^Sig[BI]", "/proc/self/status").data[0].decode().split()
    own_of_the_c_library = 0x180000000  # signals 32 and 33: they cannot be set, and stay as inherited
    assert int(status[1], 16) == 0
    assert int(status[3], 16) & ~own_of_the_c_library == 0
    assert client.run("sh", "-c", "ls /proc/$$/fd; true").data[0].split() == [b"0", b"1", b"2"]


def test_stdin_ends_when_the_host_ends_it(client):
    stream = client.run("sh", "-c", "cat; echo done", stdin=b"some text\n")
    assert stream.data[0] == b"some text\ndone\n"


def test_unread_stdin_does_not_block_the_host(client, p):
    stream = client.start_exec("sh", "-c", "exec <&-; sleep 1")
    client.write(stream, b"x" * 1_000_000)
    client.wait(lambda: stream.exit is not None)
    assert stream.code == 0


def test_a_signal_reaches_the_whole_process_group(client, p):
    stream = client.start_exec("sh", "-c", "sleep 100 & sleep 100 & echo ready; wait")
    client.wait(lambda: stream.data[0] == b"ready\n")
    client.send(p.frame(p.SIGNAL, stream.number, b"\x0f"))
    client.wait(lambda: stream.exit is not None)
    assert stream.exit[p.EXIT_SIGNAL] == [15]
    client.run("sh", "-c", "while ps | grep 'sleep 10[0]'; do sleep 0.02; done")


@pytest.mark.parametrize("noise", ["sleep 1000", "while :; do echo noise; sleep 0.01; done", "yes"])
def test_a_grandchild_that_holds_the_pipe_does_not_delay_the_exit(client, noise):
    stream = client.run("sh", "-c", f"echo said; ({noise}) & exit 4", timeout=5)
    assert stream.code == 4
    assert b"said" in stream.data[0]


def test_output_written_right_before_the_end_is_complete(client):
    for _ in range(20):
        stream = client.run("sh", "-c", "head -c 60000 /dev/zero; head -c 50000 /dev/zero >&2")
        assert (len(stream.data[0]), len(stream.data[1])) == (60000, 50000)


POLITE = "trap 'sleep 0.2; touch /tmp/polite; exit' HUP; echo 1; while :; do sleep 0.1; done"


def test_closing_a_stream_sends_sighup_to_its_process_group_and_sigkill_after_a_second(client, p):
    # A program that ends by itself after SIGHUP was not killed; one that does not end was killed later.
    polite = client.start_exec("sh", "-c", POLITE)
    deaf = client.start_exec("sh", "-c", "trap '' HUP; echo 1; while :; do sleep 0.1; done")
    client.wait(lambda: polite.data[0] and deaf.data[0])
    for stream in (polite, deaf):
        client.send(p.frame(p.CLOSE, stream.number, b"\0" * 4))
    client.run("sh", "-c", "while [ ! -e /tmp/polite ]; do sleep 0.05; done")
    client.run("sh", "-c", "while ps | grep 'tra[p]'; do sleep 0.05; done")


def test_a_lost_session_ends_its_programs_but_not_detached_ones_or_the_workload(guest, p):
    guest.start("exec sleep 11111")
    client = guest.client
    client.start_exec("sleep", "22222")
    detached = client.start_exec("sh", "-c", "while :; do echo noise; sleep 0.01; done", extra=[(p.FLAGS, 1)])
    client.wait(lambda: detached.data[0])
    client = guest.reconnect()
    processes = client.run("sh", "-c", "sleep 1.5; ps").data[0]
    assert b"sleep 11111" in processes
    assert b"sleep 22222" not in processes
    assert b"echo noise" in processes


def test_programs_that_write_without_end_cannot_keep_the_agent_from_ending_them(guest, p):
    streams = [guest.client.start_exec("yes") for _ in range(4)]
    detached = guest.client.start_exec("sh", "-c", "yes detached", extra=[(p.FLAGS, 1)])
    guest.client.wait(lambda: all(stream.data[0] for stream in (*streams, detached)))
    client = guest.reconnect()
    client.run("sh", "-c", "while ps | grep 'ye[s]$'; do sleep 0.05; done")
    assert client.run("sh", "-c", "ps | grep -c 'yes detache[d]'").data[0] != b"0\n"


def test_orphans_are_reaped(client):
    client.run("sh", "-c", "for i in 1 2 3 4 5; do (sleep 0.1 &) ; done")
    seen = client.run("sh", "-c", "sleep 0.5; ps -o stat,comm | grep -c ^Z").data[0]
    assert seen == b"0\n"


def test_exec_without_a_program_is_refused(client, p):
    with pytest.raises(OSError, match="no ARG"):
        client.call(p.EXEC)


def test_nothing_runs_before_configure(make_guest, p):
    client = make_guest().connect()
    for kind in (p.EXEC, p.START):
        with pytest.raises(OSError, match="not configured"):
            client.call(kind, (p.ARG, "true"))


def test_500_programs_at_once(client):
    streams = [client.start_exec("sh", "-c", f"read line; echo {number} $line") for number in range(500)]
    for stream in streams:
        client.write(stream, b"go\n")
        client.end_input(stream)
    client.wait(lambda: all(stream.exit is not None for stream in streams), 60)
    assert [bytes(stream.data[0]) for stream in streams] == [b"%d go\n" % number for number in range(500)]
    assert {stream.code for stream in streams} == {0}


def wait_for_file(client, path):
    client.run("sh", "-c", f"while [ ! -e {path} ]; do sleep 0.05; done")


@pytest.mark.parametrize("redirect", ["", ">&2"])
def test_processes_that_a_command_leaves_running_may_print_without_end(client, redirect):
    loop = f"for i in 1 2 3 4 5 6; do sleep 0.1; seq 1 20000 {redirect} || exit; done; touch /tmp/talked"
    stream = client.run("sh", "-c", f"({loop}) & echo started")
    assert (stream.data[0], stream.code) == (b"started\n", 0)
    wait_for_file(client, "/tmp/talked")


def test_a_detached_program_goes_on_when_its_stream_is_closed(client, p):
    script = "echo here; sleep 0.3; seq 1 20000; touch /tmp/talked; exit 5"
    stream = client.start_exec("sh", "-c", script, extra=[(p.FLAGS, 1)])
    client.wait(lambda: stream.data[0])
    client.send(p.frame(p.CLOSE, stream.number, b"\0" * 4))
    wait_for_file(client, "/tmp/talked")
    again = client.open(p.ATTACH, (p.PID, stream.reply[1][p.PID][0]))
    client.wait(lambda: again.exit is not None)
    assert (again.code, again.data[0][-6:]) == (5, b"20000\n")


def test_the_end_of_a_program_leaves_other_process_groups_running(client, p):
    script = "setsid sh -c 'echo ready; sleep 1.5; echo late && touch /tmp/late' & sleep 100"
    stream = client.start_exec("sh", "-c", script)
    client.wait(lambda: stream.data[0])
    client.send(p.frame(p.CLOSE, stream.number, b"\0" * 4))
    wait_for_file(client, "/tmp/late")
