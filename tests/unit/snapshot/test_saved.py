"""The file beside a kept clone: it is read back as it was, and only values are read."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_fcvm.errors import HostError
from pytest_fcvm.model.specs import Clock, Prepare, VmSpec
from pytest_fcvm.snapshot import SnapshotInputs
from pytest_fcvm.snapshot.saved import read_inputs, write_inputs
from pytest_fcvm.store import Entry

Make = Callable[..., SnapshotInputs]


@pytest.fixture
def entry(tmp_path: Path) -> Entry:
    """An empty entry, and the image that it needs."""
    (tmp_path / "rootfs").touch()
    directory = tmp_path / "entry"
    directory.mkdir()
    return Entry(path=directory, key="0" * 64, facts={})


def _file(entry: Entry) -> Path:
    return entry.file("inputs")


def test_inputs_are_read_back_as_they_were_without_functions(make_inputs: Make, entry: Entry) -> None:
    inputs = make_inputs(
        env={"TOKEN": "secret"}, clock=Clock.SNAPSHOT, prepare=Prepare(print), warm=lambda _clone: None, mem_mib=512
    )
    write_inputs(inputs, entry.path)
    assert _file(entry).stat().st_mode & 0o777 == 0o600
    found = read_inputs(entry, inputs.engine, inputs.report)
    assert found.spec == replace(inputs.spec, prepare=None, warm=None)
    assert found.files.rootfs == inputs.files.rootfs
    assert (found.engine, found.defaults, found.about()) == (
        inputs.engine,
        inputs.defaults,
        {**inputs.about(), "prepared": False},
    )


class _Acts:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch acted",)


class _ActsAsOurs:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[list[str]]]:
        from pytest_fcvm.host.process import run_tool

        return run_tool, (["touch", "acted"],)


class _ByAttribute:
    """Is pickled as Python before 3.11.4 pickles a member of an enumeration."""

    def __init__(self, kind: type, name: str) -> None:
        self._inputs = kind, name

    def __reduce__(self) -> tuple[Callable[..., object], tuple[type, str]]:
        return getattr, self._inputs


def test_a_member_of_an_enumeration_may_be_pickled_as_an_attribute(make_inputs: Make, entry: Entry) -> None:
    inputs = make_inputs()
    write_inputs(inputs, entry.path)
    made_by, files, kept = pickle.loads(_file(entry).read_bytes())
    kept["kernel_release"] = _ByAttribute(Clock, "SNAPSHOT")
    _file(entry).write_bytes(pickle.dumps((made_by, files, kept)))
    assert read_inputs(entry, inputs.engine, inputs.report).kernel_release is Clock.SNAPSHOT


@pytest.mark.parametrize("harmful", [_Acts(), _ActsAsOurs(), _ByAttribute(VmSpec, "merged")])
def test_what_would_act_is_refused(
    harmful: object, make_inputs: Make, entry: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    inputs = make_inputs()
    _file(entry).write_bytes(pickle.dumps(("1", (), {"spec": harmful})))
    with pytest.raises(HostError, match="does not belong there"):
        read_inputs(entry, inputs.engine, inputs.report)
    assert not (tmp_path / "acted").exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x04N.", b"no pickle"])
def test_what_cannot_be_read_is_reported(content: bytes, make_inputs: Make, entry: Entry) -> None:
    inputs = make_inputs()
    _file(entry).write_bytes(content)
    with pytest.raises(HostError, match="run the test again"):
        read_inputs(entry, inputs.engine, inputs.report)


def test_another_version_engine_or_image_is_reported(
    make_inputs: Make, entry: Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs()
    write_inputs(inputs, entry.path)
    with pytest.raises(HostError, match="engine was"):
        read_inputs(entry, inputs.engine, replace(inputs.report, engine="another"))
    with monkeypatch.context() as changed:
        changed.setattr("pytest_fcvm.snapshot.saved.version", lambda _name: "99.0")
        with pytest.raises(HostError, match="kept by pytest-fcvm"):
            read_inputs(entry, inputs.engine, inputs.report)
    inputs.rootfs.unlink()
    with pytest.raises(HostError, match="has been removed"):
        read_inputs(entry, inputs.engine, inputs.report)
