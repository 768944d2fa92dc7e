"""Bulk data: credit in both directions, fairness, bounded memory, and an idle agent."""

import hashlib
import os
import time
from pathlib import Path

import pytest


def agent_status(guest):
    """The fields of /proc/PID/status."""
    lines = Path(f"/proc/{guest.agent_pid}/status").read_text().splitlines()
    return dict(line.split(":", 1) for line in lines)


def resident_kib(guest):
    return int(agent_status(guest)["VmRSS"].split()[0])


def test_200_mb_of_output_arrive_whole_and_agent_memory_stays_bounded(guest, p):
    client = guest.client
    client.run("true")
    before = resident_kib(guest)
    stream = client.start_exec("sh", "-c", "yes 0123456789abcdef | head -c 200000000")
    received = 0
    while stream.exit is None:
        client.wait(lambda: stream.exit is not None or len(stream.data[0]) > 1 << 20, 60)
        received += len(stream.data[0])
        stream.data[0].clear()
    assert received == 200_000_000
    assert resident_kib(guest) - before < 4096


def test_50_mb_of_input_arrive_whole(client):
    data = os.urandom(1 << 20) * 50
    stream = client.run("sha256sum", stdin=data, timeout=60)
    assert stream.data[0].decode().split()[0] == hashlib.sha256(data).hexdigest()


def test_output_stops_at_the_credit_and_goes_on_when_more_is_granted(client, p):
    stream = client.start_exec("sh", "-c", "head -c 300000 /dev/zero", grants=False)
    client.wait(lambda: len(stream.data[0]) == p.WINDOW)
    assert client.run("true").code == 0  # after a round trip nothing more has come
    assert (len(stream.data[0]), stream.exit) == (p.WINDOW, None)
    client.send(p.frame(p.GRANT, stream.number, b"\0" + (1000).to_bytes(4, "little")))
    client.wait(lambda: len(stream.data[0]) == p.WINDOW + 1000)
    client.send(p.frame(p.GRANT, stream.number, b"\0" + (300000).to_bytes(4, "little")))
    client.wait(lambda: stream.exit is not None)
    assert len(stream.data[0]) == 300000


def test_each_output_has_its_own_credit(client, p):
    stream = client.start_exec("sh", "-c", "head -c 100000 /dev/zero; head -c 1000 /dev/zero >&2", grants=False)
    client.wait(lambda: len(stream.data[0]) == p.WINDOW)
    client.send(p.frame(p.GRANT, stream.number, b"\0" + (100000).to_bytes(4, "little")))
    client.wait(lambda: stream.exit is not None)
    assert (len(stream.data[0]), len(stream.data[1])) == (100000, 1000)


def test_a_stalled_reader_and_a_stalled_writer_delay_none_of_100_streams(client, p):
    stalled = client.start_exec("sh", "-c", "yes", grants=False)
    full = client.start_exec("sleep", "1000")
    client.send(p.frame(p.DATA, full.number, b"\0" + b"x" * 60000))
    client.send(p.frame(p.DATA, full.number, b"\0" + b"x" * 30000))
    streams = [client.start_exec("sh", "-c", "head -c 100000 /dev/zero | cat; cat") for _ in range(100)]
    for stream in streams:
        client.write(stream, b"end")
        client.end_input(stream)
    client.wait(lambda: all(stream.exit is not None for stream in streams), 60)
    assert {len(stream.data[0]) for stream in streams} == {100003}
    assert (len(stalled.data[0]), stalled.exit, full.exit) == (p.WINDOW, None, None)


def test_streams_with_much_to_send_take_turns(guest, p):
    guest.start("head -c 1000000 /dev/zero; exec sleep 1000")
    logs = [guest.client.open(p.LOGS, grants=False) for _ in range(10)]  # of the ring: all always have data
    guest.client.wait(lambda: all(len(stream.data[0]) == p.WINDOW for stream in logs))
    for stream in logs:
        guest.client.send(p.frame(p.GRANT, stream.number, b"\0" + (1 << 20).to_bytes(4, "little")))
    guest.client.wait(lambda: any(len(stream.data[0]) > 900000 for stream in logs))
    assert min(len(stream.data[0]) for stream in logs) > 500000


def test_a_reply_passes_bulk_output(client, p):
    for _ in range(5):
        client.start_exec("yes")
    waits = []
    for _ in range(20):
        before = sum(len(stream.data[0]) for stream in client.streams.values())
        client.call(p.STATUS)
        waits.append(sum(len(stream.data[0]) for stream in client.streams.values()) - before)
    assert sorted(waits)[10] < 2_000_000  # only the bytes that were on their way


def test_a_host_that_does_not_read_stops_only_its_own_requests(guest, p):
    client = guest.client
    guest.channel.settimeout(0)
    numbers = range(1000, 101000)
    request = b"".join(p.frame(p.OPEN, number, bytes([p.STATUS]) + b"\0" * 4) for number in numbers)
    sent = 0
    deadline = time.monotonic() + 2
    while sent < len(request) and time.monotonic() < deadline:
        try:
            sent += guest.channel.send(request[sent : sent + 65536])
        except BlockingIOError:
            time.sleep(0.01)
    guest.channel.settimeout(None)
    assert sent < len(request)  # it stopped reading
    client.streams.update({number: p.Stream(number) for number in numbers})
    client.send(request[sent:])
    client.wait(lambda: client.streams[numbers[-1]].reply)
    assert all(client.streams[number].reply[0] == 0 for number in numbers)


def test_a_new_host_gets_through_while_replies_for_the_old_one_fill_the_channel(guest, p):
    guest.channel.settimeout(0)
    number = 1000
    try:
        while True:
            request = p.frame(p.OPEN, number, bytes([p.METRICS]) + b"\0" * 4)
            if guest.channel.send(request) < len(request):
                break
            number += 1
    except BlockingIOError:
        pass
    guest.channel.settimeout(None)
    assert guest.reconnect().call(p.STATUS)[p.STATE] == ["idle"]


@pytest.mark.parametrize("with_streams", [False, True], ids=["alone", "with streams open"])
def test_an_idle_agent_never_wakes_up(guest, p, with_streams):
    if with_streams:
        guest.start("exec sleep 1000")
        guest.client.start_exec("sleep", "1000")
        guest.client.open(p.LOGS)
        guest.client.start_exec("yes", grants=False)
    guest.client.call(p.STATUS)
    guest.client.run("sleep", "0.2")

    def switches():
        while not (status := agent_status(guest))["State"].strip().startswith("S"):
            pass  # it is still finishing earlier work
        return int(status["voluntary_ctxt_switches"])

    before = switches()
    time.sleep(1)  # nothing may happen in this time
    assert switches() == before
