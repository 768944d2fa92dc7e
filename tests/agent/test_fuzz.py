"""Mutated sessions against the sanitised agent: it answers the next host, whatever the host before sent.

FCVM_FUZZ_SECONDS sets how long (`make fuzz`), FCVM_FUZZ_SEED repeats a run.
"""

import io
import os
import random
import struct
import tarfile
import time

SECONDS = float(os.environ.get("FCVM_FUZZ_SECONDS", "10"))
SEED = int(os.environ.get("FCVM_FUZZ_SEED", "1"))
INTERESTING = [0, 1, 4, 5, 6, 16, 255, 256, 65535, 65536, 65537, 1114112, 1114113, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]


def tar_bytes():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, kind in (("d", tarfile.DIRTYPE), ("d/" + "x" * 120, tarfile.REGTYPE), ("link", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size = kind, "d", 700 if kind == tarfile.REGTYPE else 0
            member.mtime = 1.5
            tar.addfile(member, io.BytesIO(b"y" * 700))
    return file.getvalue()


def corpus(p):
    """Sessions as lists of valid frames."""

    def opened(number, kind, *items):
        body = p.fields(items)
        return p.frame(p.OPEN, number, bytes([kind]) + struct.pack("<I", len(body)) + body)

    def data(number, content):
        return p.frame(p.DATA, number, b"\0" + content)

    identity = [(p.HOSTNAME, "other"), (p.MACHINE_ID, "b" * 32), (p.ADDRESS, "10.0.2.16/24"), (p.GATEWAY, "10.0.2.3")]
    identity += [(p.MAC, b"\2\0\0\0\0\7"), (p.ENTROPY, b"e" * 32), (p.HOSTS, "1.2.3.4 x"), (p.PEER_GATEWAY, 1)]
    grant = p.frame(p.GRANT, 1, b"\0" + struct.pack("<I", 4096))
    body = p.fields([(p.ARG, "echo"), (p.ARG, "x" * 3000)])
    pieces = [body[start : start + 1000] for start in range(0, len(body), 1000)]
    return [
        [opened(1, p.EXEC, (p.ARG, "cat")), data(1, b"hello"), grant, p.frame(p.EOF, 1, b"\0")],
        [opened(1, p.EXEC, (p.ARG, "yes"), (p.ENV, "A=b"), (p.CWD, "/tmp"), (p.USER, "app:staff")), grant, grant],
        [opened(1, p.EXEC, (p.ARG, "true")), p.frame(p.SIGNAL, 1, b"\x0f"), p.frame(p.CLOSE, 1, b"\0" * 4)],
        [opened(1, p.CONNECT, (p.PORT, 8080), (p.PROTO, "tcp")), data(1, b"GET /"), p.frame(p.EOF, 1, b"\0")],
        [
            opened(1, p.ACCEPT, (p.PORT, 9000), (p.ADDRESS, "127.77.0.1")),
            data(1, b"early"),
            p.frame(p.CLOSE, 1, b"\0" * 4),
        ],
        [opened(1, p.CONNECT, (p.PORT, 81)), opened(2, p.CONNECT, (p.PORT, 8080), (p.ADDRESS, "::1"))],
        [opened(1, p.LOGS), grant, opened(2, p.LOGS), opened(3, p.STATUS), opened(9, p.METRICS)],
        [opened(1, p.TAR_IN, (p.PATH, "/tmp/in"), (p.USER, "app")), data(1, tar_bytes()), p.frame(p.EOF, 1, b"\0")],
        [opened(1, p.TAR_OUT, (p.PATH, "/etc")), grant, opened(2, p.TAR_OUT, (p.PATH, "/lib/data"))],
        [opened(1, p.PERSONALISE, *identity), opened(2, p.LISTENING, (p.PORT, 8080), (p.PROTO, "udp")), opened(3, 10)],
        [opened(1, p.PERSONALISE, (p.ARG, "true"), (p.DNS, "1.1.1.1"), (p.BOOT_ID, "x-y"), (p.PEER_GATEWAY, 0))],
        [p.frame(p.OPEN, 1, bytes([p.EXEC]) + struct.pack("<I", len(body))), *(p.frame(p.BODY, 1, x) for x in pieces)],
    ]


def mutate_bytes(rng, data):
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(data))
        kind = rng.randrange(6)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.randrange(256)
        elif kind == 2:
            del data[at : at + rng.randrange(1, 20)]
        elif kind == 3:
            data[at:at] = rng.randbytes(rng.randrange(1, 20))
        elif kind == 4:
            data[at : at + 4] = struct.pack("<I", rng.choice(INTERESTING))
        else:
            data[at:at] = data[at : at + rng.randrange(1, 40)]
        if not data:
            break
    return bytes(data)


def mutate_frame(rng, p, frame):
    """Change the payload of a frame and keep the frame valid, so that the change gets past the first checks."""
    kind, number = frame[4], struct.unpack_from("<I", frame, 5)[0]
    payload = mutate_bytes(rng, frame[9:-1] or b"\0")
    if kind == p.OPEN and payload and payload[0] == p.POWEROFF:
        payload = b"\1" + payload[1:]
    return p.frame(rng.choice((kind, kind, kind, rng.randrange(14))), number, payload[:65536])


def mutate(rng, p, sessions):
    frames = list(rng.choice(sessions))
    if rng.random() < 0.3:
        frames += rng.choice(sessions)
    for _ in range(rng.choice((0, 1, 1, 2))):
        at = rng.randrange(len(frames))
        frames[at] = mutate_frame(rng, p, frames[at])
    if rng.random() < 0.3:
        rng.shuffle(frames)
    data = b"".join(frames)
    return mutate_bytes(rng, data) if rng.random() < 0.4 else data


def test_no_input_harms_the_agent(make_guest, p, tmp_path):
    rng = random.Random(SEED)
    sessions = corpus(p)
    guest = make_guest()
    guest.connect()
    guest.configure()
    guest.start("while :; do echo working; sleep 0.1; done")
    deadline = time.monotonic() + SECONDS
    rounds = 0
    with guest.listen(8080):
        while time.monotonic() < deadline:
            data = mutate(rng, p, sessions)
            (tmp_path / "last-input").write_bytes(data)
            guest.client.send(data)
            assert guest.process.poll() is None, guest.log.read_text()
            guest.reconnect()
            rounds += 1
            if rounds % 100 == 0:
                assert guest.client.run("echo", "still here").data[0] == b"still here\n"
    assert rounds > 20 * SECONDS, f"only {rounds} mutated sessions with seed {SEED}: what was tried says little"
