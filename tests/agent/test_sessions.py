"""Sessions: the handshake, hosts that die, malformed input."""

import fcntl
import os
import socket
import struct
import termios
import time

import pytest


def test_the_agent_welcomes_a_host_with_its_build(make_guest, p, agent_binary, builder):
    client = make_guest().connect()
    version, build = struct.unpack_from("<I", client.welcome)[0], client.welcome[4:].decode()
    assert version == 1
    assert build == f"{builder.MARK}{builder.embedded_digest(agent_binary)}"


def trickle(channel, data, size=1):
    """Send piece by piece, each after the agent has read the one before."""
    for start in range(0, len(data), size):
        channel.sendall(data[start : start + size])
        while struct.unpack("i", fcntl.ioctl(channel, termios.TIOCOUTQ, b"\0" * 4))[0]:
            time.sleep(0)


@pytest.mark.parametrize("noise", range(3, 20))
def test_a_secret_in_single_bytes_amid_noise_is_found(make_guest, p, noise):
    guest = make_guest()
    guest.channel.sendall(os.urandom(5000).replace(b"f", b"."))
    trickle(guest.channel, p.BOOT_SECRET[:9] + b"x" * noise + p.BOOT_SECRET)
    hello = p.frame(p.HELLO, 0, struct.pack("<I", 1) + b"n" * 16 + b"s" * 16)
    trickle(guest.channel, hello)
    assert guest.channel.recv(16, socket.MSG_WAITALL) == b"n" * 16
    guest.connect(b"s" * 16)


def test_a_second_hello_right_behind_the_first_begins_a_session(make_guest, p):
    guest = make_guest()
    first = p.frame(p.HELLO, 0, struct.pack("<I", 1) + b"n" * 16 + b"s" * 16)
    second = p.frame(p.HELLO, 0, struct.pack("<I", 1) + b"m" * 16 + b"t" * 16)
    guest.channel.sendall(p.BOOT_SECRET + first + b"s" * 16 + second)
    guest.connect(b"t" * 16)


@pytest.mark.parametrize("secret", [b"a" * 16, b"ab" * 8, b"abcdefghijklmnoa", b"abcabcdefghijabc"])
@pytest.mark.parametrize("died", range(1, 17))
def test_a_host_that_died_within_the_secret_does_not_hide_the_next_ones(make_guest, p, secret, died):
    guest = make_guest()
    guest.connect()
    guest.channel.sendall(guest.client.next_secret + p.frame(p.HELLO, 0, b"\1\0\0\0" + b"n" * 16 + secret))
    guest.channel.sendall(secret[:died])
    guest.connect(secret)


@pytest.mark.parametrize("missing", range(1, 17))
def test_a_secret_that_begins_as_the_end_of_a_half_frame_is_found(guest, p, missing):
    request = p.frame(p.OPEN, 1000, bytes([p.EXEC]) + struct.pack("<I", 20) + b"x" * 20)
    secret = guest.client.next_secret
    trickle(guest.channel, request[:-missing], 100)
    trickle(guest.channel, secret[:missing])
    trickle(guest.channel, secret[missing:])
    hello = p.frame(p.HELLO, 0, struct.pack("<I", 1) + b"n" * 16 + b"s" * 16)
    guest.channel.sendall(hello)
    answer = b""
    while b"n" * 16 not in answer:
        answer += guest.channel.recv(4096)
    assert guest.connect(b"s" * 16).run("true").code == 0


def test_the_old_secret_has_no_effect_after_hello(guest, p):
    stale = p.BOOT_SECRET + p.frame(p.HELLO, 0, struct.pack("<I", 1) + b"n" * 16 + b"s" * 16)
    guest.client.send(stale)  # malformed as frames, and no session
    with pytest.raises(p.SessionError):
        guest.client.call(p.STATUS)
    guest.reconnect()
    assert guest.client.call(p.STATUS)[p.STATE] == ["idle"]


def ran(client):
    return client.run("sh", "-c", "cat /tmp/ran 2>/dev/null").data[0].decode().split()


@pytest.mark.parametrize("chunked", [False, True], ids=["at once", "secret byte by byte"])
def test_a_host_that_dies_at_any_byte_of_a_request_leaves_nothing_behind(guest, p, chunked):
    argv = [(p.ARG, part) for part in ("sh", "-c", "echo $0 >> /tmp/ran")]
    for cut in range(1, 1000):
        body = p.fields([*argv, (p.ARG, str(cut))])
        stream = next(guest.client.numbers)
        request = p.frame(p.OPEN, stream, bytes([p.EXEC]) + struct.pack("<I", len(body)) + body)
        if cut >= len(request):
            break
        guest.client.send(request[:cut])
        if chunked:
            for byte in guest.client.next_secret[:-1]:  # then the whole secret once more
                guest.channel.send(bytes([byte]))
        guest.reconnect()
    assert cut > 60
    assert ran(guest.client) == []


def test_a_half_frame_is_not_completed_by_the_next_hosts_bytes(guest, p):
    body = p.fields([(p.ARG, "touch"), (p.ARG, "/tmp/" + "x" * 40)])
    request = p.frame(p.OPEN, 1000, bytes([p.EXEC]) + struct.pack("<I", len(body)) + body)
    guest.client.send(request[:-30])  # the next secret completes the length, but not the trailer
    client = guest.reconnect()
    assert client.run("ls", "/tmp").data[0] == b""


def test_a_complete_request_runs_once(guest, p):
    body = p.fields([(p.ARG, part) for part in ("sh", "-c", "echo once >> /tmp/ran")])
    request = p.frame(p.OPEN, 1, bytes([p.EXEC]) + struct.pack("<I", len(body)) + body)
    guest.client.send(request)
    guest.reconnect()
    for _ in range(3):  # by now it has run or got SIGHUP: a session's programs end within a second
        guest.client.run("sleep", "0.5")
    assert ran(guest.client) in ([], ["once"])


def opened(p, kind, announced, here=b""):
    return p.frame(p.OPEN, 5, bytes([kind]) + struct.pack("<I", announced) + here)


# What comes before the malformed frame, and the frame.
JUNK = {
    "an unknown type": lambda p: (b"", p.frame(77, 1)),
    "an unknown type on stream 0": lambda p: (b"", p.frame(77, 0)),
    "a length above the limit": lambda p: (b"", struct.pack("<IBI", 65537, p.DATA, 1)),
    "no zero at the end": lambda p: (b"", p.frame(p.CLOSE, 1, b"\0" * 4)[:-1] + b"\1"),
    "a second HELLO": lambda p: (b"", p.frame(p.HELLO, 0, b"\0" * 36)),
    "a stream never opened": lambda p: (b"", p.frame(p.CLOSE, 99, b"\0" * 4)),
    "OPEN of stream 0": lambda p: (b"", p.frame(p.OPEN, 0, b"\1" + b"\0" * 4)),
    "a short OPEN": lambda p: (b"", p.frame(p.OPEN, 5, b"\1\0")),
    "a body above the limit": lambda p: (b"", opened(p, p.EXEC, 1114113)),
    "more body than announced": lambda p: (b"", opened(p, p.EXEC, 2, b"abc")),
    "a body that is no fields": lambda p: (b"", opened(p, p.STATUS, 3, b"abc")),
    "a field beyond its body": lambda p: (b"", opened(p, p.STATUS, 6, struct.pack("<HI", 1, 1))),
    "BODY beyond what was announced": lambda p: (opened(p, p.EXEC, 9), p.frame(p.BODY, 5, b"x" * 10)),
    "BODY for a stream that has its body": lambda p: (opened(p, p.LOGS, 0), p.frame(p.BODY, 5, b"x")),
    "DATA before the body is whole": lambda p: (opened(p, p.EXEC, 9), p.frame(p.DATA, 5, b"\0x")),
    "DATA for a log": lambda p: (opened(p, p.LOGS, 0), p.frame(p.DATA, 5, b"\0x")),
    "DATA without a channel": lambda p: (opened(p, p.LOGS, 0), p.frame(p.DATA, 5, b"")),
    "EOF for a log": lambda p: (opened(p, p.LOGS, 0), p.frame(p.EOF, 5, b"\0")),
    "a short WINDOW": lambda p: (opened(p, p.LOGS, 0), p.frame(p.GRANT, 5, b"\0\0\0")),
    "a WINDOW for channel 2": lambda p: (opened(p, p.LOGS, 0), p.frame(p.GRANT, 5, b"\2\0\0\0\1")),
    "a signal for a log": lambda p: (opened(p, p.LOGS, 0), p.frame(p.SIGNAL, 5, b"\x09")),
}


@pytest.mark.parametrize("name", JUNK)
def test_malformed_input_ends_the_session_and_names_its_offset(guest, p, name):
    client = guest.client
    client.streams[5] = p.Stream(5)
    before, bad = JUNK[name](p)
    offset = client.sent + len(before)
    client.send(before + bad)
    with pytest.raises(p.SessionError) as error:
        client.wait(lambda: False, timeout=5)
    assert error.value.args[0] == offset
    assert guest.reconnect().call(p.STATUS)[p.STATE] == ["idle"]


def test_data_beyond_credit_ends_the_session(guest, p):
    client = guest.client
    stream = client.start_exec("sleep", "100")
    payload = b"\0" + b"x" * 60000
    client.send(3 * p.frame(p.DATA, stream.number, payload))  # the first goes into the pipe, half of the second fits
    with pytest.raises(p.SessionError, match="beyond its credit"):
        client.wait(lambda: False, timeout=5)
    assert guest.reconnect().run("true").code == 0


def test_frames_for_a_stream_that_has_ended_are_ignored(client, p):
    stream = client.run("true")
    for kind, payload in [(p.DATA, b"\0x"), (p.EOF, b"\0"), (p.CLOSE, b"\0" * 4), (p.SIGNAL, b"\x09"), (p.BODY, b"x")]:
        client.send(p.frame(kind, stream.number, payload))
    assert client.run("true").code == 0


def test_a_stream_id_cannot_be_used_again(client, p):
    stream = client.run("true")
    client.send(p.frame(p.OPEN, stream.number, bytes([p.STATUS]) + b"\0" * 4))
    with pytest.raises(p.SessionError, match="reuses"):
        client.wait(lambda: False, timeout=5)


def test_unknown_fields_are_ignored_and_unknown_requests_refused(client, p):
    assert client.call(p.STATUS, (999, "what"))[p.STATE] == ["idle"]
    with pytest.raises(OSError, match="no such request"):
        client.call(31)


def test_a_body_of_a_mebibyte_arrives_whole(client, p):
    arguments = [(p.ENV, f"V{number}={'x' * 120000}") for number in range(8)]  # one argument may have 128 KiB
    stream = client.run("sh", "-c", "echo ${#V0} ${#V7}", extra=arguments)
    assert stream.data[0] == b"120000 120000\n"


def test_no_more_than_16384_streams_are_open_and_the_next_is_refused(client, p):
    streams = [client.open(p.LOGS) for _ in range(16384)]
    client.wait(lambda: all(stream.reply for stream in streams), timeout=120)
    with pytest.raises(OSError, match="16384"):
        client.call(p.LOGS)
    client.send(p.frame(p.CLOSE, streams[7].number, b"\0" * 4))
    assert client.call(p.STATUS)[p.STATE] == ["idle"]


def test_unfinished_requests_cannot_take_all_memory(client, p):
    for number in range(2, 20):
        client.streams[number] = stream = p.Stream(number)
        client.send(p.frame(p.OPEN, number, bytes([p.EXEC]) + struct.pack("<I", 1114112)))
    client.wait(lambda: stream.reply)
    assert stream.reply[0] == 11  # EAGAIN
