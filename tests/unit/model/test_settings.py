"""Host names, kernel settings and limits, spelled as for `docker run`."""

from __future__ import annotations

import resource

import pytest

from pytest_fcvm.errors import UsageProblem
from pytest_fcvm.model import parse, settings


@pytest.mark.parametrize("name", ["db", "DB-1", "db-1.example.test", "my_worker", "a" * 63, "7"])
def test_a_host_name_is_not_changed(name: str) -> None:
    assert settings.parse_hostname(name) == name


@pytest.mark.parametrize(
    "name", ["", "a b", "-a", "a-", "a..b", ".a", "a.", "a/b", "ü", "a\n", "a" * 64, "a" * 33 + "." + "b" * 33, 7, None]
)
def test_an_invalid_host_name_is_reported(name: object) -> None:
    with pytest.raises(UsageProblem, match="is not a host name") as caught:
        settings.parse_hostname(name)  # type: ignore[arg-type]
    assert caught.value.hint


@pytest.mark.parametrize(
    ("items", "found"),
    [
        ("net.core.somaxconn=1024", {"net.core.somaxconn": "1024"}),
        (["vm.overcommit_memory=1", "net.ipv4.ip_local_port_range=1024 65000"],
         {"vm.overcommit_memory": "1", "net.ipv4.ip_local_port_range": "1024 65000"}),
        ({"vm.swappiness": 0}, {"vm.swappiness": "0"}),
        ("net/ipv4/conf/eth0/rp_filter=0", {"net/ipv4/conf/eth0/rp_filter": "0"}),
        ("kernel.core_pattern=|/bin/dump %p=%e", {"kernel.core_pattern": "|/bin/dump %p=%e"}),
    ],
)  # fmt: skip
def test_kernel_settings_are_pairs_or_a_mapping(items: object, found: dict[str, str]) -> None:
    assert settings.parse_sysctl(items) == found  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "item", ["net.core.somaxconn", "net.core.somaxconn=", "somaxconn=1", "a..b=1", "../x=1", "a.b=1\n2", ""]
)
def test_an_invalid_kernel_setting_is_reported(item: str) -> None:
    with pytest.raises(UsageProblem, match="is not a sysctl"):
        settings.parse_sysctl([item])


@pytest.mark.parametrize(
    ("items", "found"),
    [
        ("nofile=1024", {"nofile": (1024, 1024)}),
        (["nofile=1024:4096", "core=0"], {"nofile": (1024, 4096), "core": (0, 0)}),
        ("memlock=-1", {"memlock": (-1, -1)}),
        ("memlock=65536:unlimited", {"memlock": (65536, -1)}),
        (
            {"nproc": 100, "nofile": (10, 20), "stack": "-1"},
            {"nproc": (100, 100), "nofile": (10, 20), "stack": (-1, -1)},
        ),
    ],
)
def test_limits_are_written_as_for_docker(items: object, found: dict[str, settings.Ulimit]) -> None:
    assert settings.parse_ulimit(items) == found  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("files=1", "unknown limit 'files'"),
        ("nofile", "nofile='' is not a limit"),
        ("nofile=many", "nofile='many' is not a limit"),
        ("nofile=1:2:3", "nofile='2:3' is not a limit"),
        ("nofile=-2", "nofile='-2' is not a limit"),
        ("nofile=4096:1024", "nofile=4096:1024: the soft limit is above the hard one"),
        ("nofile=-1:1024", "nofile=-1:1024: the soft limit is above the hard one"),
    ],
)
def test_an_invalid_limit_is_reported(item: str, message: str) -> None:
    with pytest.raises(UsageProblem) as caught:
        settings.parse_ulimit([item])
    assert caught.value.message == message
    assert caught.value.hint


def test_limits_have_linuxs_numbers() -> None:
    known = {name: getattr(resource, f"RLIMIT_{name.upper()}", None) for name in settings.ULIMITS}
    assert {name: number for name, number in known.items() if number is not None}.items() <= settings.ULIMITS.items()


@pytest.mark.parametrize(
    ("text", "words"), [("sleep 1000", ("sleep", "1000")), (["a b"], ("a b",)), ("", ()), ([], ()), ((), ())]
)
def test_an_entrypoint_is_a_command_or_nothing(text: str, words: tuple[str, ...]) -> None:
    assert parse.parse_entrypoint(text) == words
