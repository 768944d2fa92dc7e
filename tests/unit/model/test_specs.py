"""VM specs: how they merge, how prepare functions are identified, which fields the marker takes."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from pytest_fcvm.errors import UsageProblem
from pytest_fcvm.model.net import Proto, PublishedPort
from pytest_fcvm.model.results import ExecResult, Timeline
from pytest_fcvm.model.specs import Prepare, ReadyMode, ReadySpec, SpecFields, VmSpec, spec_fields
from pytest_fcvm.options import ROWS


def _module(path: Path, source: str) -> ModuleType:
    path.write_text(source)
    found = importlib.util.spec_from_file_location("preparations", path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_environments_merge_by_name_and_ports_by_guest_port_and_protocol() -> None:
    outer = VmSpec(
        env={"A": "1", "B": "1"},
        publish=(PublishedPort(guest_port=80, host_port=8080), PublishedPort(guest_port=53)),
    )
    inner = outer.merged(
        {
            "env": {"B": "2"},
            "publish": (
                PublishedPort(guest_port=80, host_port=9090),
                PublishedPort(guest_port=53, proto=Proto.UDP),
            ),
        }
    )
    assert inner.env == {"A": "1", "B": "2"}
    assert inner.publish == (
        PublishedPort(guest_port=80, host_port=9090),
        PublishedPort(guest_port=53),
        PublishedPort(guest_port=53, proto=Proto.UDP),
    )
    assert outer.env == {"A": "1", "B": "1"}


def test_every_other_field_is_replaced() -> None:
    outer = VmSpec(image="a", command=("x", "y"), map=(), ready=ReadySpec(mode=ReadyMode.AGENT))
    inner = outer.merged({"image": "b", "command": ("z",), "ready": None})
    assert (inner.image, inner.command, inner.ready) == ("b", ("z",), None)


def test_an_unknown_field_is_reported_with_the_known_ones() -> None:
    with pytest.raises(UsageProblem, match="a VM spec has no field 'memory'") as caught:
        VmSpec().merged({"memory": 1})
    assert all(name in caught.value.hint for name in spec_fields())


def test_the_typed_fields_are_those_of_the_marker() -> None:
    assert set(SpecFields.__optional_keys__) == {row.marker for row in ROWS if row.is_spec_field}
    assert not SpecFields.__required_keys__


def test_a_prepare_function_has_another_identity_when_its_file_inputs_or_version_change(tmp_path: Path) -> None:
    source, rows = tmp_path / "preparations.py", tmp_path / "rows.sql"
    rows.write_text("1")
    load = _module(source, "def load(base): pass\n").load

    def identity(version: str = "") -> str:
        return Prepare(load, inputs=["rows.sql", rows], version=version).identity()

    first = identity()
    assert identity() == first
    assert identity("2") != first
    rows.write_text("2")
    changed_input = identity()
    assert changed_input != first
    source.write_text("def load(base): base.exec('x')\n")
    assert identity() not in (first, changed_input)


def test_inputs_start_at_the_directory_of_the_functions_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.sql").write_text("1")
    load = _module(tmp_path / "preparations.py", "def load(base): pass\n").load
    here = Prepare(load, inputs=["rows.sql"]).identity()
    monkeypatch.chdir("/")
    assert Prepare(load, inputs=["rows.sql"]).identity() == here


def test_two_functions_of_one_file_have_two_identities(tmp_path: Path) -> None:
    module = _module(tmp_path / "preparations.py", "def a(base): pass\ndef b(base): pass\n")
    assert Prepare(module.a).identity() != Prepare(module.b).identity()


def test_a_missing_input_is_reported_with_its_path(tmp_path: Path) -> None:
    load = _module(tmp_path / "preparations.py", "def load(base): pass\n").load
    with pytest.raises(UsageProblem) as caught:
        Prepare(load, inputs=["gone.sql"]).identity()
    assert caught.value.message == f"prepare cannot read {tmp_path}/gone.sql: No such file or directory"
    assert caught.value.hint == "name existing files in inputs"


@pytest.mark.parametrize("func", [functools.partial(print, "x"), print, ExecResult(exit_code=0).__eq__])
def test_a_function_without_a_source_file_is_refused(func: object) -> None:
    with pytest.raises(UsageProblem, match="has no source file") as caught:
        Prepare(func).identity()  # type: ignore[arg-type]
    assert caught.value.hint == "pass a function defined in a module"


def test_output_that_is_not_utf_8_survives_as_text() -> None:
    result = ExecResult(exit_code=0, stdout_bytes=b"\xff ok", stderr_bytes="ü".encode())
    assert result.stdout.encode("utf-8", "surrogateescape") == b"\xff ok"
    assert result.stderr == "ü"


def test_a_timeline_shows_the_duration_of_each_phase() -> None:
    timeline = Timeline(start=10.0)
    timeline.mark("spawn", 10.005)
    timeline.mark("agent", 10.055)
    assert str(timeline) == "spawn 5.0 ms, agent 50.0 ms"


def test_the_time_to_become_ready_is_a_clones_own_where_it_depends_on_others() -> None:
    joined = VmSpec(image="web", depends_on=("db",))
    assert joined.clone_settings != joined.merged({"ready_timeout_s": 3.0}).clone_settings
    alone = VmSpec(image="web")
    assert alone.clone_settings == alone.merged({"ready_timeout_s": 3.0}).clone_settings
