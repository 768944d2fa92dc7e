"""CONNECT: connections as from a peer on the guest's network. The servers are sockets in that network."""

import errno
import socket
import struct

import pytest


@pytest.fixture
def listener(guest):
    with guest.listen(8080) as listening:
        listening.settimeout(20)
        yield listening


@pytest.fixture
def pair(client, p, listener):
    """A connection: the host's stream, and the guest's socket."""
    stream = client.open(p.CONNECT, (p.PORT, 8080), (p.PROTO, "tcp"))
    served, _ = listener.accept()
    served.settimeout(20)
    client.wait(lambda: stream.reply)
    assert stream.reply[0] == 0
    with served:
        yield stream, served


def receive(served, size):
    data = b""
    while len(data) < size and (more := served.recv(size - len(data))):
        data += more
    return data


def reset(served):
    served.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    served.close()


def test_data_goes_both_ways_and_the_hosts_half_close_is_kept(client, pair):
    stream, served = pair
    client.write(stream, b"hello")
    assert receive(served, 5) == b"hello"
    client.end_input(stream)
    assert served.recv(10) == b""
    served.sendall(b"the answer")
    served.close()
    client.wait(lambda: stream.eof)
    assert (stream.data[0], stream.close) == (b"the answer", None)


def test_the_guests_half_close_leaves_the_other_direction_open(client, pair):
    stream, served = pair
    served.shutdown(socket.SHUT_WR)
    client.wait(lambda: stream.eof)
    client.write(stream, b"after the end")
    client.end_input(stream)
    assert receive(served, 100) == b"after the end"


def test_a_server_sees_the_gateway_as_its_peer_and_its_own_address(pair):
    served = pair[1]
    assert served.getpeername()[0] == "10.0.2.2"
    assert served.getsockname() == ("10.0.2.15", 8080)


def test_without_an_own_gateway_connections_come_from_the_guests_address(guest, p):
    guest.client.call(p.PERSONALISE, (p.PEER_GATEWAY, 0))
    with guest.listen(8080) as listening:
        guest.client.open(p.CONNECT, (p.PORT, 8080))
        served, peer = listening.accept()
        served.close()
    assert peer[0] == "10.0.2.15"


def test_a_closed_port_is_refused(client, p):
    with pytest.raises(ConnectionRefusedError, match="connect"):
        client.call(p.CONNECT, (p.PORT, 81))


def test_a_service_on_loopback_alone_is_not_reached_unless_its_address_is_given(guest, client, p):
    with guest.listen(8080, "127.0.0.1") as listening:
        with pytest.raises(ConnectionRefusedError):
            client.call(p.CONNECT, (p.PORT, 8080))
        client.open(p.CONNECT, (p.PORT, 8080), (p.ADDRESS, "127.0.0.1"))
        listening.accept()[0].close()


def test_a_connection_over_ipv6(guest, client, p):
    with guest.listen(8080, "::1") as listening:
        stream = client.open(p.CONNECT, (p.PORT, 8080), (p.ADDRESS, "::1"))
        served, _ = listening.accept()
        client.wait(lambda: stream.reply)
        assert stream.reply[0] == 0
        served.close()


def test_a_reset_by_the_guest_is_reported_after_the_data_before_it(client, pair):
    stream, served = pair
    served.sendall(b"last words")
    reset(served)
    client.wait(lambda: stream.close is not None)
    assert (stream.close, stream.data[0]) == (errno.ECONNRESET, b"last words")


def test_a_reset_by_the_guest_is_reported_while_the_host_sends(client, pair):
    stream, served = pair
    client.write(stream, b"x" * 50000)
    reset(served)
    client.wait(lambda: stream.close is not None)
    assert stream.close in (errno.ECONNRESET, errno.EPIPE)


def test_a_close_by_the_host_is_a_reset_in_the_guest(client, p, pair):
    stream, served = pair
    client.send(p.frame(p.CLOSE, stream.number, struct.pack("<I", errno.ECONNRESET)))
    with pytest.raises(ConnectionResetError):
        served.recv(10)


def test_a_new_session_resets_the_connections_of_the_old(guest, pair):
    guest.reconnect()
    with pytest.raises(ConnectionResetError):
        pair[1].recv(10)


def test_a_stream_is_over_when_both_sides_have_ended(client, p, pair):
    stream, served = pair
    client.end_input(stream)
    served.close()
    client.wait(lambda: stream.eof)
    client.send(p.frame(p.DATA, stream.number, b"\0ignored"))  # malformed on an open stream
    assert client.call(p.STATUS)[p.STATE] == ["idle"]


def test_data_sent_before_the_reply_is_not_lost(client, p, listener):
    stream = client.open(p.CONNECT, (p.PORT, 8080), (p.PROTO, "tcp"))
    client.write(stream, b"early")
    client.end_input(stream)
    served, _ = listener.accept()
    with served:
        assert receive(served, 100) == b"early"


def test_a_guest_that_does_not_read_stops_the_hosts_credit_and_nothing_is_lost(client, p, pair):
    stream, served = pair
    data = bytes(range(256)) * 40000
    sent = 0
    while stream.credit:
        portion = data[sent : sent + min(stream.credit, 60000)]
        stream.credit -= len(portion)
        sent += len(portion)
        client.send(p.frame(p.DATA, stream.number, b"\0" + portion))
        client.call(p.STATUS)  # consumed bytes have been granted by now
    assert sent < len(data)
    received = bytearray()
    while len(received) < sent:
        received += served.recv(1 << 20)
    assert received == data[:sent]


def test_bulk_goes_both_ways_at_once(client, pair):
    stream, served = pair
    data = bytes(range(256)) * 20000
    served.settimeout(0)
    echo = bytearray()
    sent = received = 0
    while len(stream.data[0]) < len(data):
        if stream.credit and sent < len(data):
            portion = data[sent : sent + min(stream.credit, 60000)]
            client.write(stream, portion)
            sent += len(portion)
        try:
            echo += served.recv(1 << 20)
            received += served.send(echo[received:])
        except BlockingIOError:
            pass
        client.call(2 + 1)  # STATUS: reads what has arrived
    assert stream.data[0] == data


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([("PORT", 0)], "1 to 65535"),
        ([("PORT", 65536)], "1 to 65535"),
        ([], "1 to 65535"),
        ([("PORT", 80), ("PROTO", "sctp")], "sctp"),
        ([("PORT", 80), ("ADDRESS", "somewhere")], "not an IP address"),
        ([("PORT", 80), ("ADDRESS", "10.0.2.15/33")], "not an IP address"),
    ],
)
def test_bad_targets_are_refused(client, p, fields, message):
    with pytest.raises(OSError, match=message):
        client.call(p.CONNECT, *((getattr(p, name), value) for name, value in fields))


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("0.0.0.0", 1),
        ("10.0.2.15", 1),
        ("127.0.0.1", 2),
        ("127.1.2.3", 2),
        ("::1", 2),
        ("::", 1),
        ("::ffff:127.0.0.1", 2),
    ],
)
def test_listening_reports_where(guest, client, p, address, expected):
    def listening(proto):
        return client.call(p.LISTENING, (p.PORT, 8080), (p.PROTO, proto))[p.LISTENING_FIELD]

    assert listening("tcp") == [0]
    with guest.listen(8080, address):
        assert listening("tcp") == [expected]
        assert listening("udp") == [0]


def test_a_listener_over_ipv6_alone_is_reported(guest, client, p):
    with guest.listen(8080, "::", only_ipv6=True):
        assert client.call(p.LISTENING, (p.PORT, 8080), (p.PROTO, "tcp"))[p.LISTENING_FIELD] == [3]
        with guest.listen(8080):
            assert client.call(p.LISTENING, (p.PORT, 8080), (p.PROTO, "tcp"))[p.LISTENING_FIELD] == [1]


def test_5000_connections_at_once(client, p, listener):
    streams = [client.open(p.CONNECT, (p.PORT, 8080)) for _ in range(5000)]
    served = [listener.accept()[0] for _ in range(5000)]
    client.wait(lambda: all(stream.reply for stream in streams), 120)
    assert {stream.reply[0] for stream in streams} == {0}
    for number, peer in enumerate(served):
        peer.sendall(b"%d" % number)
        peer.close()
    client.wait(lambda: all(stream.eof for stream in streams), 120)
    assert sorted(int(stream.data[0]) for stream in streams) == list(range(5000))
