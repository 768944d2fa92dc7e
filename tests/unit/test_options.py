"""The option table: one name per option, one parser per name, and the nearest source wins."""

from __future__ import annotations

from argparse import ArgumentParser, HelpFormatter
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from pytest_fcvm.errors import UnresolvedSetting, UsageProblem
from pytest_fcvm.model.specs import Prepare, VmSpec
from pytest_fcvm.options import (
    ROWS,
    Options,
    Origin,
    Row,
    RowKind,
    build_options,
    environment_layer,
    read_layer,
    spec_changes,
)

_ROW = {row.name: row for row in ROWS}


def _layer(raw: dict[str, Any], base: Path = Path("/base"), **environment: str) -> dict[str, Any]:
    return read_layer(raw, Origin(base=base, environment=environment), lambda row: row.flag)


def test_no_two_rows_share_a_name_or_a_field() -> None:
    for spelling in ("name", "marker", "flag", "variable", "field"):
        names = [getattr(row, spelling) for row in ROWS]
        assert sorted(set(names)) == sorted(names)


def test_every_field_of_a_spec_and_of_the_run_has_a_row() -> None:
    of_groups = {"depends_on"}  # only members of a group have it
    assert {row.field for row in ROWS if row.is_spec_field} | of_groups == {item.name for item in fields(VmSpec)}
    assert {row.field for row in ROWS if not row.is_spec_field} == {item.name for item in fields(Options)} - {
        "spec",
        "given",
        "unresolved",
    }


@pytest.mark.parametrize("row", [row for row in ROWS if row.default], ids=lambda row: row.name)
def test_the_default_that_help_shows_is_the_one_that_is_used(row: Row) -> None:
    defaults = build_options([])
    used = getattr(defaults.spec if row.is_spec_field else defaults, row.field)
    if used is None:
        described = ("max-clones", "pool", "kernel", "shm-size")  # computed at run time
        assert row.parser in (_ROW["qemu"].parser, _ROW["firecracker"].parser) or row.name in described
    else:
        assert row.parser(row.default, Origin(base=Path("/"))) == used


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_argparse_accepts_a_row_and_shows_its_help_and_default(row: Row) -> None:
    parser = ArgumentParser(prog="test", formatter_class=lambda prog: HelpFormatter(prog, width=400))
    parser.add_argument(row.flag, **row.argument())
    shown = " ".join(parser.format_help().split())
    assert f"{row.help} [{row.default}]" in shown if row.default else row.help in shown
    words = [row.flag] if row.kind is RowKind.FLAG else [row.flag, *(row.choices[:1] or ["word"])]
    expected = {RowKind.FLAG: True, RowKind.LIST: ["word"], RowKind.VALUE: words[-1]}
    assert getattr(parser.parse_args(words), row.flag.removeprefix("--").replace("-", "_")) == expected[row.kind]
    assert getattr(parser.parse_args([]), row.flag.removeprefix("--").replace("-", "_")) is None


@pytest.mark.parametrize("row", [row for row in ROWS if row.choices], ids=lambda row: row.name)
def test_the_choices_of_the_command_line_are_those_of_every_other_source(row: Row) -> None:
    for word in row.choices:
        assert row.parser(word, Origin(base=Path("/"))) == word
    with pytest.raises(UsageProblem, match="'else' is not one of"):
        row.parser("else", Origin(base=Path("/")))


def test_a_later_layer_wins_and_environments_and_ports_are_merged() -> None:
    options = build_options(
        [
            _layer({"image": "ini", "mem": "1G", "env": ["A=ini", "B=ini"], "publish": ["80"], "pull": "never"}),
            _layer({"image": "environment", "env": ["B=environment"], "publish": ["1:80", "443"]}),
            _layer({"image": "nearest", "command": "a b", "rebuild": True}),
        ]
    )
    assert (options.spec.image, options.spec.mem_mib, options.spec.command) == ("nearest", 1024, ("a", "b"))
    assert options.spec.env == {"A": "ini", "B": "environment"}
    assert [(port.host_port, port.guest_port) for port in options.spec.publish] == [(1, 80), (0, 443)]
    assert (options.pull, options.rebuild, options.engine) == ("never", True, "auto")
    assert options.given == {"image", "mem_mib", "env", "publish", "pull", "command", "rebuild"}


def test_without_settings_nothing_is_given() -> None:
    assert build_options([{}, {}, {}]) == Options()
    assert not Options().given


def test_a_bare_name_takes_its_value_from_the_environment() -> None:
    assert _layer({"env": ["TOKEN", "B=1"]}, TOKEN="secret") == {"env": {"TOKEN": "secret", "B": "1"}}
    with pytest.raises(UsageProblem) as caught:
        _layer({"env": ["TOKEN"]})
    assert caught.value.message == "--fcvm-env: environment variable 'TOKEN' is not set here"
    assert caught.value.hint == "export it or write TOKEN=value"


def test_variables_are_read_by_their_table_name_and_lists_one_item_a_line() -> None:
    environment = {
        "FCVM_IMAGE": "nginx", "FCVM_READY_TIMEOUT": "5s", "FCVM_ENV": "A=1 2\nB=3", "FCVM_REBUILD": "yes",
        "FCVM_MEM": "", "FCVM_FUZZ_SECONDS": "600", "IMAGE": "other",
    }  # fmt: skip
    options = build_options([_layer(environment_layer(environment))])
    assert (options.spec.image, options.spec.ready_timeout_s, options.rebuild) == ("nginx", 5.0, True)
    assert options.spec.env == {"A": "1 2", "B": "3"}
    assert options.given == {"image", "ready_timeout_s", "env", "rebuild"}


@pytest.mark.parametrize(
    ("image", "read"),
    [
        ("nginx:latest", "nginx:latest"),
        ("localhost:5000/a/b@sha256:1", "localhost:5000/a/b@sha256:1"),
        ("oci:images/nginx:latest", "oci:/base/images/nginx:latest"),
        ("docker-archive:../x.tar:nginx:1", "docker-archive:/x.tar:nginx:1"),
        ("./rootfs.tar", "/base/rootfs.tar"),
        ("/abs/rootfs", "/abs/rootfs"),
        ("docker-daemon:nginx:latest", "docker-daemon:nginx:latest"),
        (Path("/abs/rootfs"), "/abs/rootfs"),
    ],
)
def test_the_path_of_an_image_starts_at_the_base_of_its_setting(image: str | Path, read: str) -> None:
    assert _layer({"image": image}) == {"image": read}


def test_paths_start_at_the_base_of_their_own_setting(tmp_path: Path) -> None:
    (tmp_path / "ini").mkdir()
    (tmp_path / "ini/conf").touch()
    options = build_options(
        [
            _layer({"map": ["conf:/conf"], "cache_dir": "cache"}, tmp_path / "ini"),
            _layer({"kernel": "../vmlinuz"}, tmp_path / "shell"),
        ]
    )
    assert options.spec.map[0].host == tmp_path / "ini/conf"
    assert options.cache_dir == tmp_path / "ini/cache"
    assert options.kernel == tmp_path / "vmlinuz"


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        ({"memory": "1G"}, "here has no argument 'memory'", "arguments: image, mem, cpus"),
        ({"needs": "db"}, "here has no argument 'needs'", "depends_on, in fcvm_group, names others; arguments: "),
        ({"engine": "qemu"}, "here has no argument 'engine'", "arguments: image, mem, cpus"),
        ({"mem_mib": 512}, "here has no argument 'mem_mib'", "arguments: image, mem, cpus"),
        ({"mem": "lots"}, "here(mem=…): 'lots' is not a size of at least 1 MiB", "write 512, 512M or 2G"),
        ({"ready": 80}, "here(ready=…): 80 has the wrong type", "condition under which the service"),
        ({"env": 5}, "here(env=…): 5 has the wrong type", "environment variable of the workload"),
        ({"map": ["x:/x"]}, "here(map=…): map 'x:/x': /base/x does not exist", "name an existing file or directory"),
        ({"map": "~no-such-user:/x"}, "here(map=…): '~no-such-user': Could not", "write the path in full"),
        ({"image": ""}, "here(image=…): '' is not a non-empty string", "write a non-empty string"),
        ({"prepare": 1}, "here(prepare=…): 1 is not a prepare step", "pass Prepare(function) or a shell command"),
    ],
)
def test_a_wrong_argument_is_reported_in_the_spelling_of_its_source(
    arguments: dict[str, Any], message: str, hint: str
) -> None:
    with pytest.raises(UsageProblem) as caught:
        spec_changes(arguments, Origin(base=Path("/base")), "here")
    assert caught.value.message.startswith(message)
    assert caught.value.hint.startswith(hint)


def test_a_bare_function_is_wrapped_in_prepare() -> None:
    def load(base: object) -> None:
        """Prepare nothing."""

    assert spec_changes({"prepare": load}, Origin(base=Path("/")), "here") == {"prepare": Prepare(load)}
    assert spec_changes({"prepare": "make x"}, Origin(base=Path("/")), "here") == {"prepare": "make x"}


def test_the_lists_and_flags_are_these() -> None:
    assert {row.name for row in ROWS if row.kind is RowKind.LIST} == {
        "env",
        "publish",
        "host-port",
        "map",
        "ulimit",
        "sysctl",
    }
    assert {row.name for row in ROWS if row.kind is RowKind.FLAG} == {
        "balloon",
        "own-address",
        "jailer",
        "require-kvm",
        "rebuild",
        "timings",
        "verify-rewind",
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [("env", "NOT_SET"), ("map", "gone:/srv"), ("metadata", "gone.json"), ("cache_dir", "~nobody-there/x")],
)
def test_a_setting_that_does_not_resolve_is_reported_when_it_is_used_unless_a_nearer_one_replaces_it(
    name: str, value: str
) -> None:
    origin = Origin(base=Path("/base"), environment={})
    far = read_layer({name: value}, origin, lambda row: f"fcvm_{row.marker}", defer=UnresolvedSetting)
    with pytest.raises(UsageProblem, match=f"fcvm_{name}: "):
        build_options([far]).check_resolved()
    if name == "cache_dir":
        build_options([far, {"cache_dir": Path("/near")}]).check_resolved()
    with pytest.raises(UsageProblem):
        read_layer({"cpus": "none"}, origin, lambda row: row.flag, defer=UnresolvedSetting)
