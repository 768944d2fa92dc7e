"""Programs on a terminal: its name, size, input and end."""

import struct
import time

import pytest

ON_TERMINAL = 2


@pytest.fixture
def on_terminal(client, p):
    """Return a function that starts a program on a terminal of 30 rows and 100 columns."""

    def start(*argv, user=None):
        extra = [(p.FLAGS, ON_TERMINAL), (p.ROWS, 30), (p.COLUMNS, 100), (p.ENV, "TERM=dumb")]
        return client.start_exec(*argv, extra=[*extra, *([(p.USER, user)] if user else [])])

    return start


def output(client, stream):
    client.wait(lambda: stream.exit)
    return stream.data[0].decode().replace("\r\n", "\n")


def test_all_three_are_one_terminal_that_the_program_controls(client, on_terminal):
    script = "tty; test -t 0 && test -t 1 && test -t 2 && echo all; echo to stderr >&2"
    stream = on_terminal("sh", "-c", script)
    assert output(client, stream) == "/dev/pts/0\nall\nto stderr\n"
    assert (stream.code, stream.data[1], stream.eof) == (0, b"", {0})


def test_a_terminal_has_the_requested_size_and_reports_a_new_one(client, p, on_terminal):
    stream = on_terminal(
        "sh", "-c", "stty size; trap 'stty size; exit 7' WINCH; echo ready; while :; do sleep 0.1; done"
    )
    client.wait(lambda: b"ready" in stream.data[0])
    client.send(p.frame(p.RESIZE, stream.number, struct.pack("<HH", 50, 132)))
    assert output(client, stream) == "30 100\nready\n50 132\n"
    assert stream.code == 7


def test_input_is_typed_and_echoed(client, p, on_terminal):
    stream = on_terminal("sh", "-c", "read line; echo got $line")
    client.write(stream, b"hello\r")
    assert output(client, stream) == "hello\ngot hello\n"


def test_control_c_interrupts_the_program_in_the_foreground(client, p, on_terminal):
    stream = on_terminal("sh", "-c", "echo ready; sleep 1000")
    client.wait(lambda: b"ready" in stream.data[0])
    client.write(stream, b"\x03")
    client.wait(lambda: stream.exit)
    assert stream.exit[p.EXIT_SIGNAL] == [2] or stream.code == 130


def test_the_end_of_input_is_typed_as_control_d(client, on_terminal):
    stream = on_terminal("cat")
    client.write(stream, b"line\n")
    client.end_input(stream)
    assert output(client, stream) == "line\nline\n"
    assert stream.code == 0


def test_all_of_the_output_comes_before_the_end(client, on_terminal):
    stream = on_terminal("sh", "-c", "i=0; while [ $i -lt 20000 ]; do echo $i; i=$((i+1)); done")
    assert output(client, stream).split() == [str(number) for number in range(20000)]


def test_a_user_may_open_the_terminal_by_name(client, on_terminal):
    stream = on_terminal("sh", "-c", "echo hello > $(tty)", user="1000")
    assert (output(client, stream), stream.code) == ("hello\n", 0)


def test_closing_the_stream_hangs_the_terminal_up(client, p, on_terminal):
    stream = on_terminal("sh", "-c", "sleep 1234")
    client.send(p.frame(p.CLOSE, stream.number, b"\0" * 4))
    deadline = time.monotonic() + 10
    while "sleep 1234" in client.run("ps").data[0].decode():
        assert time.monotonic() < deadline


def test_a_program_on_pipes_has_no_terminal_to_resize(client, p):
    stream = client.start_exec("sh", "-c", "test -t 0 || echo none; read line")
    client.send(p.frame(p.RESIZE, stream.number, struct.pack("<HH", 50, 132)))
    client.end_input(stream)
    assert output(client, stream) == "none\n"


@pytest.mark.parametrize("payload", [b"", b"\1\0\2", b"\1\0\2\0\0"])
def test_a_malformed_resize_ends_the_session(client, p, on_terminal, payload):
    stream = on_terminal("cat")
    client.send(p.frame(p.RESIZE, stream.number, payload))
    with pytest.raises(p.SessionError, match="malformed frame of type 14"):
        client.wait(lambda: stream.exit)
