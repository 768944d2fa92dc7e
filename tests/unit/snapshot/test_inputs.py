"""The inputs of a snapshot: an init system is known by its program, and gets `container`."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from pytest_fcvm.image.config import ImageConfig
from pytest_fcvm.snapshot import SnapshotInputs


@pytest.mark.parametrize(
    ("program", "is_init"),
    [
        ("/sbin/init", True),
        ("/usr/sbin/init", True),
        ("/lib/systemd/systemd", True),
        ("systemd", True),
        ("/usr/bin/tini", False),
        ("init", False),
        ("/srv/init", False),
    ],
)
def test_an_init_is_known_by_its_program(
    program: str, is_init: bool, make_inputs: Callable[..., SnapshotInputs]
) -> None:
    inputs = make_inputs(image_config=ImageConfig(cmd=(program,)))
    assert inputs.is_init is is_init
    assert inputs.defaults.env.get("container") == ("fcvm" if is_init else None)
    assert inputs.defaults.stop_signal == (signal.SIGRTMIN + 3 if is_init else signal.SIGTERM)


def test_an_images_own_words_go_before_ours(make_inputs: Callable[..., SnapshotInputs]) -> None:
    config = ImageConfig(cmd=("/sbin/init",), env=("container=docker",), stop_signal="SIGPWR")
    inputs = make_inputs(image_config=config)
    assert (inputs.defaults.env["container"], inputs.defaults.stop_signal) == ("docker", signal.SIGPWR)


@pytest.mark.parametrize(
    ("image_env", "env", "hostname"),
    [((), {}, "db"), (("HOSTNAME=image",), {}, "image"), (("HOSTNAME=image",), {"HOSTNAME": "mine"}, "mine")],
)
def test_the_host_name_is_in_the_environment_unless_somebody_put_another_there(
    image_env: tuple[str, ...], env: dict[str, str], hostname: str, make_inputs: Callable[..., SnapshotInputs]
) -> None:
    config = ImageConfig(cmd=("serve",), env=image_env)
    assert make_inputs(image_config=config, hostname="db", env=env).defaults.env["HOSTNAME"] == hostname


def test_what_is_known_of_a_snapshot_has_no_value_of_its_environment(
    make_inputs: Callable[..., SnapshotInputs],
) -> None:
    about = make_inputs(env={"PASSWORD": "tiger-lily"}, disk_mib=128).about()
    assert about["env"] == ["PASSWORD"]
    assert about["disk_mib"] == 128
    assert "tiger" not in str(about)
