"""Our calls agree with the OpenAPI files of Firecracker's releases (src/firecracker/swagger).

FCVM_TEST_OPENAPI names a directory with files firecracker-VERSION.openapi.yaml.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from pytest_fcvm.engine.firecracker import api
from pytest_fcvm.engine.firecracker.api import CALLS, Api, Call, NoAnswer
from pytest_fcvm.engine.firecracker.requests import boot_calls, load_calls
from pytest_fcvm.engine.firecracker.version import FirecrackerVersion, parse_version
from pytest_fcvm.engine.protocol import VmShape
from pytest_fcvm.errors import EngineError, HostError, UsageProblem
from pytest_fcvm.model.specs import NetworkMode

_DIRECTORY = os.environ.get("FCVM_TEST_OPENAPI", "")
_FILES = sorted(Path(_DIRECTORY).glob("firecracker-*.openapi.yaml")) if _DIRECTORY else []

NEW = FirecrackerVersion(1, 16, 1)


@pytest.fixture(params=_FILES or [None], ids=lambda path: path.name if path else "none")
def published(request: pytest.FixtureRequest) -> tuple[FirecrackerVersion, dict[str, Any]]:
    """A version and its OpenAPI description."""
    if request.param is None:
        pytest.skip("FCVM_TEST_OPENAPI names no directory with Firecracker's OpenAPI files")
    yaml = pytest.importorskip("yaml")
    version = parse_version(request.param.name)
    assert version is not None
    return version, yaml.safe_load(request.param.read_text())


def _plain(path: str) -> str:
    return re.sub(r"{\w+}", "{id}", path)


def _schema(description: Mapping[str, Any], call: Call) -> Mapping[str, Any]:
    """Return the schema of a call's body."""
    (path,) = [path for path in description["paths"] if _matches(path, call.path)]
    (body,) = [item for item in description["paths"][path][call.method.lower()]["parameters"] if item["in"] == "body"]
    found: Mapping[str, Any] = body["schema"]
    while "$ref" in found:
        found = description["definitions"][found["$ref"].rsplit("/", 1)[1]]
    return found


def _matches(pattern: str, path: str) -> bool:
    return re.fullmatch(re.sub(r"{\w+}", "[^/]+", pattern), path) is not None


def test_the_table_has_exactly_the_published_calls(
    published: tuple[FirecrackerVersion, dict[str, Any]],
) -> None:
    version, description = published
    theirs = {(method.upper(), _plain(path)) for path, methods in description["paths"].items() for method in methods}
    assert {(call.method, call.path) for call in CALLS if call.since <= version} == theirs


def test_the_table_has_the_first_version_of_newer_fields(
    published: tuple[FirecrackerVersion, dict[str, Any]],
) -> None:
    version, description = published
    for call in CALLS:
        if call.since <= version:
            for name, since in call.fields_since.items():
                assert (name in _schema(description, call)["properties"]) == (since <= version), f"{name} of {call}"


def test_the_calls_for_a_vm_have_all_required_fields_and_no_unpublished_ones(
    published: tuple[FirecrackerVersion, dict[str, Any]],
) -> None:
    _, description = published
    shape = VmShape(mem_mib=8, cpus=1, network=NetworkMode.ROOTLESS, balloon=True, metadata=True)
    for call, body in (*boot_calls(shape, {}), *load_calls({})):
        schema = _schema(description, call)
        assert set(body) <= set(schema.get("properties", ())), call
        assert set(schema.get("required", ())) <= set(body), call


# -- without the files


def _answering(answer: httpx.Response | Exception, seen: list[httpx.Request] | None = None) -> Api:
    def handle(request: httpx.Request) -> httpx.Response:
        if seen is not None:
            seen.append(request)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return Api(Path("/nowhere/api.sock"), NEW, transport=httpx.MockTransport(handle))


def test_a_call_is_one_request_with_its_body() -> None:
    seen: list[httpx.Request] = []
    with _answering(httpx.Response(204), seen) as client:
        assert client.send(api.DRIVE.of("rootfs"), {"drive_id": "rootfs"}) is None
    assert [(request.method, request.url.path) for request in seen] == [("PUT", "/drives/rootfs")]
    assert seen[0].read() == b'{"drive_id":"rootfs"}'


def test_an_answer_is_returned() -> None:
    with _answering(httpx.Response(200, json={"firecracker_version": "1.16.1"})) as client:
        assert client.send(api.VERSION) == {"firecracker_version": "1.16.1"}


@pytest.mark.parametrize(
    ("status", "fault", "error", "hint"),
    [
        (400, "Kvm error: Error creating KVM object: Permission denied (os error 13)", HostError, "usermod -aG kvm"),
        (
            400,
            "Open tap device failed: Couldn't open /dev/net/tun: Permission denied",
            HostError,
            "--fcvm-network relay",
        ),
        (400, "Cannot dump memory: No space left on device (os error 28)", HostError, "--fcvm-cache-dir"),
        (400, "CRC64 validation failed", EngineError, "--fcvm-rebuild"),
        (400, "The number of vCPUs must be greater than 0", EngineError, "--fcvm-cpus"),
        (400, "an unknown message", EngineError, ""),
        (503, "Too many open connections", EngineError, "close other clients"),
    ],
)
def test_a_refusal_has_an_error_class_and_a_hint(status: int, fault: str, error: type[Exception], hint: str) -> None:
    with (
        _answering(httpx.Response(status, json={"fault_message": fault})) as client,
        pytest.raises(error) as caught,
    ):
        client.send(api.ACTIONS, {"action_type": "InstanceStart"})
    assert hint in caught.value.hint  # type: ignore[attr-defined]
    assert "PUT /actions" in str(caught.value)


def test_a_refusal_without_json_is_reported_unchanged() -> None:
    with _answering(httpx.Response(500, text="oops")) as client, pytest.raises(EngineError, match="oops"):
        client.send(api.VERSION)


def test_a_call_without_an_answer_is_reported() -> None:
    with _answering(httpx.ConnectError("refused")) as client, pytest.raises(NoAnswer, match="GET /version: refused"):
        client.send(api.VERSION)


def test_a_call_after_the_end_is_reported() -> None:
    client = _answering(httpx.Response(204))
    client.close()
    with pytest.raises(NoAnswer, match="has ended before GET /version"):
        client.send(api.VERSION)


@pytest.mark.parametrize(
    ("call", "body", "what"),
    [
        (api.PMEM_UPDATE.of("p"), {"id": "p"}, "no PATCH /pmem/p"),
        (api.SNAPSHOT_LOAD, {"vsock_override": {}}, "no 'vsock_override' of PUT /snapshot/load"),
    ],
)
def test_a_call_or_field_that_a_version_lacks_is_never_sent(call: Call, body: Mapping[str, Any], what: str) -> None:
    def refuse(_: httpx.Request) -> httpx.Response:
        raise AssertionError("the call was sent")

    old = FirecrackerVersion(1, 15, 1)
    with (
        Api(Path("/nowhere"), old, transport=httpx.MockTransport(refuse)) as client,
        pytest.raises(UsageProblem, match=what) as caught,
    ):
        client.send(call, body)
    assert caught.value.hint == "it came with 1.16.0"
