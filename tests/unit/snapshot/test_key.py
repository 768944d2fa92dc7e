"""What makes two snapshots the same, and what does not."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes.vm import FakeEngine

from pytest_fcvm.engine.protocol import Accelerator
from pytest_fcvm.image.config import ImageConfig
from pytest_fcvm.model.net import PublishedPort
from pytest_fcvm.model.specs import MappedPath, NetworkSpec, Prepare, ReadyMode, ReadySpec
from pytest_fcvm.snapshot import SnapshotInputs, snapshot_key
from pytest_fcvm.store import Store

_Make = Callable[..., SnapshotInputs]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store, whose secret enters the keys."""
    (tmp_path / "store").mkdir()
    return Store(tmp_path / "store")


def _some_function(_base: object) -> None:
    """Prepare nothing."""


@pytest.mark.parametrize(
    "change",
    [
        {"mem_mib": 512},
        {"cpus": 2},
        {"env": {"TOKEN": "x"}},
        {"metadata": {"a": "b"}},
        {"metadata": {}},
        {"command": ("other",)},
        {"user": "root"},
        {"workdir": "/w"},
        {"entrypoint": ("/other",)},
        {"hostname": "db"},
        {"shm_mib": 64},
        {"ulimits": {"nofile": (1, 2)}},
        {"sysctls": {"net.core.somaxconn": "1"}},
        {"network": NetworkSpec(egress=True)},
        {"ready": ReadySpec(mode=ReadyMode.HTTP, port=80, text="/")},
        {"prepare": "make rows"},
        {"prepare": Prepare(_some_function)},
        {"kernel_digest": "other"},
        {"rootfs_key": "other"},
        {"image_config": ImageConfig(entrypoint=("/entry",), cmd=("serve",))},
    ],
)
def test_whatever_changes_a_clone_changes_the_key(change: dict[str, Any], make_inputs: _Make, store: Store) -> None:
    assert snapshot_key(make_inputs(**change), store) != snapshot_key(make_inputs(), store)


@pytest.mark.parametrize(
    "change", [{"publish": (PublishedPort(guest_port=80, host_port=8080),)}, {"ready_timeout_s": 5.0}]
)
def test_what_a_clone_is_given_afterwards_does_not(change: dict[str, Any], make_inputs: _Make, store: Store) -> None:
    assert snapshot_key(make_inputs(**change), store) == snapshot_key(make_inputs(), store)


def test_the_engine_its_accelerator_and_its_host_are_in_the_key(
    make_inputs: _Make, store: Store, engine: FakeEngine
) -> None:
    keys = {snapshot_key(make_inputs(), store)}
    for accelerator, identity in ((Accelerator.KVM, {"version": "1"}), (Accelerator.TCG, {"version": "2"})):
        engine.accelerator, engine.identity = accelerator, identity
        keys.add(snapshot_key(make_inputs(), store))
    assert len(keys) == 3


def test_the_order_of_an_environment_is_not_in_the_key(make_inputs: _Make, store: Store) -> None:
    one = make_inputs(env={"A": "1", "B": "2"})
    other = make_inputs(env={"B": "2", "A": "1"})
    assert snapshot_key(one, store) == snapshot_key(other, store)


def test_an_environments_values_cannot_be_guessed_from_a_key(make_inputs: _Make, store: Store, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    for fields in ({"env": {"PASSWORD": "tiger-lily"}}, {"metadata": {"password": {"is": "tiger-lily"}}}):
        inputs = make_inputs(**fields)
        assert snapshot_key(inputs, store) != snapshot_key(inputs, Store(tmp_path / "other"))


def test_a_mapped_link_is_in_the_key_as_what_it_leads_to(make_inputs: _Make, store: Store, tmp_path: Path) -> None:
    (tmp_path / "real").write_text("1")
    (tmp_path / "link").symlink_to("real")

    def key(place: Path, **more: Any) -> str:
        return snapshot_key(make_inputs(map=(MappedPath(host=place, guest="/conf", **more),)), store)

    before = key(tmp_path / "link")
    assert key(tmp_path / "real") == before
    assert key(tmp_path / "real", owner="app") != before
    (tmp_path / "real").write_text("2")
    assert key(tmp_path / "link") != before


@pytest.mark.parametrize("change", ["content", "mode", "name", "link"])
def test_mapped_files_are_in_the_key_by_their_content_and_not_by_their_place(
    change: str, make_inputs: _Make, store: Store, tmp_path: Path
) -> None:
    directory = tmp_path / "a/conf"
    directory.mkdir(parents=True)
    (directory / "file").write_text("1")
    (directory / "link").symlink_to("file")

    def key(place: Path, **more: Any) -> str:
        return snapshot_key(make_inputs(map=(MappedPath(host=place, guest="/conf", **more),)), store)

    before = key(directory)
    assert key(directory, read_only=True) != before
    (tmp_path / "b").mkdir()
    moved = directory.rename(tmp_path / "b/conf")
    os.utime(moved / "file", (1, 1))
    assert key(moved) == before
    if change == "content":
        (moved / "file").write_text("2")
    elif change == "mode":
        (moved / "file").chmod(0o755)
    elif change == "name":
        (moved / "file").rename(moved / "other")
    else:
        (moved / "link").unlink()
        (moved / "link").symlink_to("/etc/passwd")
    assert key(moved) != before


def test_a_key_is_64_hexadecimal_digits_and_the_same_in_another_process_of_the_store(
    make_inputs: _Make, store: Store
) -> None:
    key = snapshot_key(make_inputs(), store)
    assert len(bytes.fromhex(key)) == 32
    assert snapshot_key(make_inputs(), Store(store.root)) == key
    assert json.loads(json.dumps(key)) == key
