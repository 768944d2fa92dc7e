"""Public images as they are configured, under the default options: each answers from two clones of one snapshot.

Those that take a minute in all run in `make test`, all of them in `make test-images`.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pytest_fcvm import Clone, SnapshotFactory
from tests.patience import PATIENCE
from tests.vm.services import LAYERS, RECIPES, build

ALL = "FCVM_TEST_ALL_IMAGES"  # set by `make test-images`
_ROOT = Path(__file__).parents[2]
_TOOLS = ("qemu-system-x86_64", "skopeo", "mksquashfs", "mmdebstrap", "busybox")
_TIMEOUT_S = 60 * PATIENCE


def _talk(clone: Clone, port: int, request: bytes, wanted: bytes) -> bytes:
    """Send a request to a guest port and return what comes, at least until the wanted bytes have."""
    data = b""
    with socket.create_connection(clone.endpoint(port), timeout=_TIMEOUT_S) as connection:
        connection.sendall(request)
        while wanted not in data:
            chunk = connection.recv(65536)
            assert chunk, f"the connection ended after {data!r}"
            data += chunk
    return data


def _http(port: int, text: str, path: str = "/") -> Callable[[Clone], object]:
    def ask(clone: Clone) -> None:
        answer = clone.http(port).get(path)
        assert answer.status_code == 200
        assert text in answer.text

    return ask


def _postgres(clone: Clone) -> None:
    body = struct.pack("!i", 196608) + b"user\0postgres\0\0"  # protocol 3.0
    assert _talk(clone, 5432, struct.pack("!i", len(body) + 4) + body, b"R")[:1] == b"R"  # an authentication request
    assert clone.succeed(["psql", "-U", "postgres", "-Atc", "select 6 * 7"]) == "42\n"


def _mariadb(clone: Clone) -> None:
    assert b"mysql_native_password" in _talk(clone, 3306, b"", b"mysql_native_password")
    assert clone.succeed(["mariadb", "-u", "root", "-psecret", "-Ne", "select 6 * 7"]) == "42\n"


def _rabbitmq(clone: Clone) -> None:
    assert b"RabbitMQ" in _talk(clone, 5672, b"AMQP\0\0\x09\x01", b"RabbitMQ")  # Connection.Start
    assert "pong" in clone.succeed(
        ["rabbitmqctl", "eval", "pong."], timeout=_TIMEOUT_S
    )  # it finds the node by its name


def _mongo(clone: Clone) -> None:
    command = b"\x10hello\0" + struct.pack("<i", 1) + b"\x02$db\0" + struct.pack("<i", 6) + b"admin\0"
    document = struct.pack("<i", len(command) + 5) + command + b"\0"
    body = struct.pack("<iB", 0, 0) + document  # OP_MSG with one section of kind 0
    message = struct.pack("<iiii", len(body) + 16, 1, 0, 2013) + body
    _talk(clone, 27017, message, b"maxWireVersion")


def _kafka(clone: Clone) -> None:
    request = struct.pack("!hhih", 18, 0, 7, -1)  # ApiVersions, version 0, correlation 7, no client id
    answer = _talk(clone, 9092, struct.pack("!i", len(request)) + request, struct.pack("!ih", 7, 0))
    assert answer[4:10] == struct.pack("!ih", 7, 0)


def _mosquitto(clone: Clone) -> None:
    connect = b"\0\x04MQTT\x04\x02\0\x3c\0\x00"
    assert _talk(clone, 1883, bytes([0x10, len(connect)]) + connect, b"\x20\x02\0\0") == b"\x20\x02\0\0"  # CONNACK


def _chromium(clone: Clone) -> None:
    assert "Chrome" in json.loads(clone.http(9222).get("/json/version", headers={"Host": "localhost"}).text)["Browser"]


def _systemd(clone: Clone) -> None:
    _http(80, "nginx")(clone)
    assert clone.succeed(["systemctl", "is-system-running", "--wait"], timeout=_TIMEOUT_S).strip() == "running"


@dataclass(frozen=True)
class Service:
    """How a test talks to an image, and the options that the image requires: passwords, memory for a large heap."""

    ask: Callable[[Clone], object]
    options: dict[str, Any] = field(default_factory=dict)
    short: bool = False  # part of `make test`, which spends a minute on these


SERVICES = {
    "nginx": Service(_http(80, "nginx")),
    "postgres": Service(_postgres, {"env": {"POSTGRES_PASSWORD": "secret"}}),
    "mariadb": Service(_mariadb, {"env": {"MARIADB_ROOT_PASSWORD": "secret"}, "mem": "512M"}),
    "redis": Service(lambda clone: _talk(clone, 6379, b"PING\r\n", b"+PONG\r\n")),
    "rabbitmq": Service(_rabbitmq, {"mem": "512M"}),
    "mongo": Service(_mongo, {"mem": "512M"}),
    "elasticsearch": Service(_http(9200, "You Know, for Search"), {"mem": "512M"}),
    "kafka": Service(_kafka, {"mem": "2G"}),
    "mosquitto": Service(_mosquitto, short=True),
    "haproxy": Service(_http(80, "balanced"), {"ready": "tcp:80"}, short=True),
    "chromium": Service(_chromium, {"mem": "1G"}),
    "systemd": Service(_systemd),
    "distroless": Service(_http(8080, "static"), short=True),
    "nix": Service(_http(8080, "nix"), short=True),
    "kaniko": Service(_http(8080, "kaniko"), short=True),
}


def test_every_image_has_a_test() -> None:
    assert set(SERVICES) == {*RECIPES, *LAYERS}


@pytest.mark.parametrize("name", [name for name in SERVICES if SERVICES[name].short or os.environ.get(ALL)])
def test_an_image_answers_from_its_clones(name: str, fcvm_snapshot_factory: SnapshotFactory) -> None:
    if missing := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        pytest.skip(f"requires {', '.join(missing)}: run `make test-images`, which installs them")
    directory = _ROOT / ".demo"
    directory.mkdir(exist_ok=True)
    service = SERVICES[name]
    snapshot = fcvm_snapshot_factory(image=build(name, directory), **service.options)
    for _ in range(2):
        with snapshot.clone() as clone:
            service.ask(clone)
