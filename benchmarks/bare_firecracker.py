#!/usr/bin/env python3
"""Compare a clone on Firecracker with the least possible work. Print the medians of interleaved rounds.

The bare way spawns the same Firecracker, loads and resumes the same snapshot, connects to the agent and says hello. It
has no supervisor, no identity, no readiness and no ports. Firecracker must work on the host:

    benchmarks/bare_firecracker.py --image oci:LAYOUT:latest --rounds 20
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from pytest_fcvm.engine.firecracker.installation import find_firecracker
from pytest_fcvm.guest.frames import encode_hello, new_secret
from pytest_fcvm.harness import Harness
from pytest_fcvm.host.clock import monotonic
from pytest_fcvm.host.paths import cache_root
from pytest_fcvm.model.specs import VmSpec
from pytest_fcvm.options import Options
from pytest_fcvm.snapshot import OpenSnapshot
from pytest_fcvm.snapshot.builder import snapshot_files
from pytest_fcvm.snapshot.cloner import Cloner

_PAUSE_S = 0.2  # a test's body, in which the next VMM starts up


def main() -> int:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", required=True)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as shared:
        harness = Harness(Options(engine="firecracker", pool=0), shared_dir=Path(shared), announce=_say)
        try:
            snapshot = harness.snapshot(VmSpec(image=options.image), "benchmark")
            return _compare(snapshot, options.rounds)
        finally:
            harness.close()


def _compare(snapshot: OpenSnapshot, rounds: int) -> int:
    entry, inputs = snapshot._entry, snapshot._inputs
    firecracker = find_firecracker(None, cache_root(None))
    if firecracker is None:
        _say("Firecracker is not installed")
        return 1
    files = snapshot_files(entry.path, inputs)
    alone = Cloner(entry, inputs)
    alone.close()  # no standby: every clone starts its own VMM
    secret = bytes.fromhex(entry.facts["secret"])
    ways: dict[str, Callable[[], float]] = {
        "bare: spawn, load, hello": lambda: _bare(firecracker, files.state, files.memory, files.rootfs, secret),
        "clone, without a standby": lambda: _timed(lambda: alone.bring_up("alone", (), nullcontext()).close),
        "clone, as a test gets it": lambda: _timed(lambda: snapshot.clone().close),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            time.sleep(_PAUSE_S)
            taken = way()
            if number:  # not the first round, which warms caches
                times[name].append(taken)
    base = statistics.median(times["bare: spawn, load, hello"])
    for name, taken_ms in times.items():
        middle = statistics.median(taken_ms)
        sys.stdout.write(f"{name:32} {middle:8.1f} ms  min {min(taken_ms):7.1f}  ÷ bare {middle / base:5.2f}\n")
    return 0


def _timed(start: Callable[[], Callable[[], object]]) -> float:
    begun = monotonic()
    close = start()
    taken_ms = (monotonic() - begun) * 1000
    close()
    return taken_ms


def _bare(firecracker: Path, state: Path, memory: Path, rootfs: Path | None, secret: bytes) -> float:
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        for name, target in (("rootfs", rootfs or "/dev/null"), ("drive1", "/dev/null"), ("drive2", "/dev/null")):
            (place / name).symlink_to(target)
        begun = monotonic()
        vmm = subprocess.Popen(
            [firecracker, "--api-sock", "api.sock", "--level", "Warning"],
            cwd=place,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        try:
            api = _connect(place / "api.sock")
            _put(api, "/serial", {"serial_out_path": "console.log"})
            backend = {"backend_type": "File", "backend_path": str(memory)}
            _put(api, "/snapshot/load", {"snapshot_path": str(state), "mem_backend": backend, "resume_vm": True})
            _hello(_connect(place / "agent.sock"), secret)
            return (monotonic() - begun) * 1000
        finally:
            vmm.kill()
            vmm.wait()


def _connect(path: Path) -> socket.socket:
    while True:
        client = socket.socket(socket.AF_UNIX)
        try:
            client.connect(str(path))
        except OSError:
            client.close()
            time.sleep(0.0005)
        else:
            return client


def _put(api: socket.socket, path: str, body: object) -> None:
    data = json.dumps(body).encode()
    api.sendall(b"PUT %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (path.encode(), len(data)) + data)
    answer = api.recv(4096)
    if b" 204 " not in answer:
        raise RuntimeError(answer.decode())


def _hello(channel: socket.socket, secret: bytes) -> None:
    nonce = new_secret()
    channel.sendall(b"CONNECT 1024\n")
    received = b""
    while not received.endswith(b"\n"):
        received += channel.recv(1)
    channel.sendall(secret + encode_hello(nonce, new_secret()))
    received = b""
    while nonce not in received:
        data = channel.recv(4096)
        if not data:
            raise RuntimeError("the agent closed the channel")
        received += data


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    sys.exit(main())
