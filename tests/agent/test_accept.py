"""ACCEPT: connections that the guest makes, each given to a stream. The clients are sockets in the guest's network."""

import errno
import struct

import pytest

ADDRESS = "127.77.0.1"


@pytest.fixture
def accept(client, p):
    """Return a function that opens an ACCEPT."""
    return lambda port=9000: client.open(p.ACCEPT, (p.PORT, port), (p.ADDRESS, ADDRESS))


@pytest.fixture
def ready(client, p):
    """Return a function that waits until the agent has handled all earlier input."""
    return lambda: client.call(p.STATUS)


def receive(sock, size):
    data = b""
    while len(data) < size and (more := sock.recv(size - len(data))):
        data += more
    return data


def test_the_agent_listens_only_while_an_accept_is_open(guest, accept, ready):
    with pytest.raises(ConnectionRefusedError):
        guest.dial(9000, ADDRESS)
    accept()
    ready()
    guest.dial(9000, ADDRESS).close()
    with pytest.raises(ConnectionRefusedError):
        guest.dial(9000, "127.0.0.1")


def test_the_reply_comes_with_the_connection_and_data_goes_both_ways(guest, client, accept, ready):
    stream = accept()
    ready()
    assert stream.reply is None
    with guest.dial(9000, ADDRESS) as sock:
        sock.settimeout(20)
        client.wait(lambda: stream.reply)
        assert stream.reply[0] == 0
        sock.sendall(b"question")
        client.wait(lambda: stream.data[0] == b"question")
        client.write(stream, b"answer")
        client.end_input(stream)
        assert receive(sock, 100) == b"answer"
    client.wait(lambda: stream.eof)


def test_connections_go_to_the_oldest_accept_and_wait_for_the_next_one(guest, client, accept, ready):
    first, second = accept(), accept()
    ready()
    one, two, three = (guest.dial(9000, ADDRESS) for _ in range(3))
    with one, two, three:
        for name, sock in ((b"1", one), (b"2", two), (b"3", three)):
            sock.sendall(name)
        client.wait(lambda: first.data[0] and second.data[0])
        third = accept()
        client.wait(lambda: third.data[0])
        assert [stream.data[0] for stream in (first, second, third)] == [b"1", b"2", b"3"]


def test_ports_are_separate(guest, client, accept, ready):
    one, other = accept(9000), accept(9001)
    ready()
    with guest.dial(9001, ADDRESS):
        client.wait(lambda: other.reply)
        assert one.reply is None


def test_after_the_last_accept_is_closed_the_guest_is_refused(guest, client, p, accept, ready):
    stream = accept()
    client.send(p.frame(p.CLOSE, stream.number, struct.pack("<I", 0)))
    ready()
    with pytest.raises(ConnectionRefusedError):
        guest.dial(9000, ADDRESS)
    accept()
    ready()
    guest.dial(9000, ADDRESS).close()


def test_a_new_session_begins_without_listeners(guest, accept, ready):
    accept()
    ready()
    guest.reconnect()
    with pytest.raises(ConnectionRefusedError):
        guest.dial(9000, ADDRESS)


def test_a_close_by_the_host_is_a_reset_in_the_guest(guest, client, p, accept, ready):
    stream = accept()
    ready()
    with guest.dial(9000, ADDRESS) as sock:
        sock.settimeout(20)
        client.wait(lambda: stream.reply)
        client.send(p.frame(p.CLOSE, stream.number, struct.pack("<I", errno.ECONNRESET)))
        with pytest.raises(ConnectionResetError):
            sock.recv(1)


def test_a_port_in_use_is_reported(guest, client, p):
    with guest.listen(9000, ADDRESS), pytest.raises(OSError, match="listen") as caught:
        client.call(p.ACCEPT, (p.PORT, 9000), (p.ADDRESS, ADDRESS))
    assert caught.value.errno == errno.EADDRINUSE


def test_data_before_the_connection_is_malformed(client, p, accept):
    stream = accept()
    client.send(p.frame(p.DATA, stream.number, b"\0early"))
    with pytest.raises(p.SessionError):
        client.call(p.STATUS)
