"""CONNECT with PROTO udp. The services are sockets in the guest's network."""

import struct

import pytest


def packed(*datagrams):
    return b"".join(struct.pack("<H", len(data)) + data for data in datagrams)


@pytest.fixture
def service(guest):
    with guest.bind_datagrams(5353) as service:
        service.settimeout(20)
        yield service


@pytest.fixture
def stream(client, p, service):
    stream = client.open(p.CONNECT, (p.PORT, 5353), (p.PROTO, "udp"))
    client.wait(lambda: stream.reply)
    assert stream.reply[0] == 0
    return stream


@pytest.mark.parametrize("size", [0, 1, 1472, 65507])
def test_a_datagram_goes_whole_both_ways(client, stream, service, size):
    data = bytes(number & 0xFF for number in range(size))
    client.write(stream, packed(data))
    received, peer = service.recvfrom(65535)
    assert received == data
    service.sendto(data, peer)
    client.wait(lambda: len(stream.data[0]) == 2 + size)
    assert stream.data[0] == packed(data)


def test_datagrams_stay_separate_however_their_bytes_arrive(client, stream, service):
    for byte in packed(b"one", b"", b"three"):
        client.write(stream, bytes([byte]))
    client.write(stream, packed(b"four", b"five"))
    assert [service.recv(100) for _ in range(5)] == [b"one", b"", b"three", b"four", b"five"]


def test_only_datagrams_without_a_listener_are_lost(client, p, guest):
    stream = client.open(p.CONNECT, (p.PORT, 5354), (p.PROTO, "udp"))
    client.wait(lambda: stream.reply)
    client.write(stream, packed(b"too early"))
    with guest.bind_datagrams(5354) as service:
        service.settimeout(20)
        client.write(stream, packed(b"in time"))
        assert service.recv(100) == b"in time"
        assert stream.close is None


def test_the_hosts_end_is_answered_by_an_end(client, stream, service):
    client.end_input(stream)
    client.wait(lambda: stream.eof)
    assert stream.close is None


def test_the_service_sees_the_gateway_as_its_peer(client, stream, service):
    client.write(stream, packed(b"who am I"))
    assert service.recvfrom(100)[1][0] == "10.0.2.2"


def test_ten_thousand_datagrams_come_in_order(client, stream, service):
    client.write(stream, packed(b"start"))
    _, peer = service.recvfrom(100)
    for number in range(100):
        for step in range(100):
            service.sendto(b"%d" % (number * 100 + step), peer)
        wanted = packed(*(b"%d" % each for each in range((number + 1) * 100)))
        client.wait(lambda wanted=wanted: len(stream.data[0]) == len(wanted))
    assert stream.data[0] == wanted
