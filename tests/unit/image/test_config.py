"""The run settings of images."""

from __future__ import annotations

import json

import pytest

from pytest_fcvm.errors import ImageError
from pytest_fcvm.image.config import Healthcheck, ImageConfig

DOCKER = {
    "architecture": "amd64",
    "os": "linux",
    "config": {
        "User": "postgres:postgres",
        "ExposedPorts": {"5432/tcp": {}, "53/UDP": {}, "80": {}, "8000-8002/tcp": {}},
        "Env": ["PATH=/usr/bin", "EMPTY=", "EQUALS=a=b"],
        "Entrypoint": ["docker-entrypoint.sh"],
        "Cmd": ["postgres", "-D", "/data"],
        "Volumes": {"/var/lib/b": {}, "/a": {}},
        "WorkingDir": "/srv/app",
        "Labels": {"b": "2", "a": "1"},
        "StopSignal": "SIGINT",
        "Healthcheck": {
            "Test": ["CMD", "pg_isready"],
            "Interval": 1_500_000_000,
            "Timeout": 2_000_000_000,
            "StartPeriod": 3_000_000_000,
            "Retries": 9,
        },
    },
}
READ = ImageConfig(
    entrypoint=("docker-entrypoint.sh",),
    cmd=("postgres", "-D", "/data"),
    env=("PATH=/usr/bin", "EMPTY=", "EQUALS=a=b"),
    user="postgres:postgres",
    working_dir="/srv/app",
    stop_signal="SIGINT",
    exposed_ports=((53, "udp"), (80, "tcp"), (5432, "tcp"), (8000, "tcp"), (8001, "tcp"), (8002, "tcp")),
    volumes=("/a", "/var/lib/b"),
    labels=(("a", "1"), ("b", "2")),
    healthcheck=Healthcheck(test=("CMD", "pg_isready"), interval_s=1.5, timeout_s=2.0, start_period_s=3.0, retries=9),
    architecture="amd64",
)


def test_all_fields_of_a_docker_configuration_are_read():
    assert ImageConfig.from_image(DOCKER) == READ


def test_a_configuration_survives_json():
    assert ImageConfig.from_json(json.loads(json.dumps(READ.to_json()))) == READ
    assert ImageConfig.from_json(json.loads(json.dumps(ImageConfig().to_json()))) == ImageConfig()


@pytest.mark.parametrize("document", [{}, {"config": None}, {"config": {}}, {"config": {"Env": None, "Cmd": None}}])
def test_a_configuration_may_be_empty(document):
    assert ImageConfig.from_image(document) == ImageConfig()


@pytest.mark.parametrize(
    ("config", "command", "argv"),
    [
        ({"Entrypoint": ["e"], "Cmd": ["c", "d"]}, None, ("e", "c", "d")),
        ({"Entrypoint": ["e"], "Cmd": ["c", "d"]}, ("x",), ("e", "x")),
        ({"Entrypoint": ["e"], "Cmd": ["c", "d"]}, (), ("e",)),
        ({"Cmd": ["c"]}, None, ("c",)),
        ({"Cmd": ["c"]}, ("x", "y"), ("x", "y")),
        ({"Entrypoint": ["e"]}, None, ("e",)),
        ({"Entrypoint": "run it"}, None, ("/bin/sh", "-c", "run it")),
        ({}, None, ()),
    ],
)
def test_a_command_replaces_cmd_and_keeps_the_entrypoint(config, command, argv):
    assert ImageConfig.from_image({"config": config}).argv(command) == argv


@pytest.mark.parametrize(
    ("entrypoint", "command", "argv"),
    [
        (("sleep", "9"), None, ("sleep", "9")),
        (("sleep",), ("9",), ("sleep", "9")),
        ((), None, ("-c", "/etc/service.conf")),
        ((), ("sh",), ("sh",)),
    ],
)
def test_another_entrypoint_also_removes_the_images_arguments(entrypoint, command, argv):
    config = ImageConfig(entrypoint=("/bin/false",), cmd=("-c", "/etc/service.conf"))
    assert config.argv(command, entrypoint) == argv


@pytest.mark.parametrize("section", [None, {}, {"Test": None}, {"Test": []}, {"Test": ["NONE"]}])
def test_no_healthcheck_is_none(section):
    assert ImageConfig.from_image({"config": {"Healthcheck": section}}).healthcheck is None


def test_a_healthcheck_has_dockers_defaults():
    found = ImageConfig.from_image({"config": {"Healthcheck": {"Test": ["CMD-SHELL", "x"], "Interval": 0}}}).healthcheck
    assert found == Healthcheck(test=("CMD-SHELL", "x"), interval_s=30.0, timeout_s=30.0, start_period_s=0.0, retries=3)


@pytest.mark.parametrize(
    "config",
    [
        {"Env": "A=1\x00"},
        {"Env": {"A": "1"}},
        {"Env": [1]},
        {"Cmd": 5},
        {"User": ["root"]},
        {"WorkingDir": 7},
        {"ExposedPorts": ["80"]},
        {"Labels": {"a": 1}},
        {"Healthcheck": ["CMD"]},
        {"Healthcheck": {"Test": ["CMD", "x"], "Interval": "soon"}},
        {"Cmd": ["a\x00b"]},
        "text",
    ],
)
def test_a_malformed_configuration_is_an_image_error(config):
    with pytest.raises(ImageError, match="malformed") as caught:
        ImageConfig.from_image({"config": config})
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("port", ["0/tcp", "65536/tcp", "http/tcp", "90-80/tcp", "49152-65535/udp", "80/quic", ""])
def test_what_is_not_a_port_to_map_is_skipped(port):
    found = ImageConfig.from_image({"config": {"ExposedPorts": {port: {}, "8080/TCP": {}}}})
    assert found.exposed_ports == ((8080, "tcp"),)


def test_an_error_does_not_show_values_of_the_environment():
    with pytest.raises(ImageError) as caught:
        ImageConfig.from_image({"config": {"Env": {"PASSWORD": "open-sesame"}}})
    assert "open-sesame" not in str(caught.value)


@pytest.mark.parametrize(
    "change", [{"cmd": 1}, {"exposed_ports": [1]}, {"labels": {"a": "b"}}, {"env": None, "user": 5}]
)
def test_anything_but_the_output_of_to_json_is_a_value_error(change):
    with pytest.raises(ValueError, match="not "):
        ImageConfig.from_json({**READ.to_json(), **change})
