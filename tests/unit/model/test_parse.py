"""Every valid spelling, and the message and hint for an invalid one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from pytest_fcvm.errors import UsageProblem
from pytest_fcvm.model import parse
from pytest_fcvm.model.net import Proto, PublishedPort
from pytest_fcvm.model.specs import MappedPath, NetworkMode, NetworkSpec, ReadyMode, ReadySpec

_PUBLISH_HINT = "write [HOSTIP:]HOSTPORT:GUESTPORT[/PROTO]"
_NETWORK_HINT = (
    "auto, user, relay, rootless, bridge; rootless,egress allows outbound access, rootless,allow=10.0.0.0/8 only to a "
    "network, an address or a name; ,proxy passes pytest's proxy variables to the guest"
)
_READY_HINT = "http:80/path, tcp:80, log:REGEX, exec:COMMAND, exit:0, healthcheck, agent or mode=http,url=http://127.0.0.1:80/path"


def _env(items: Mapping[str, object] | list[str]) -> dict[str, str]:
    return parse.parse_env(items, {"HERE": "from the host"})


@pytest.mark.parametrize(
    ("text", "mib"),
    [
        ("512", 512), (512, 512), ("512M", 512), ("512m", 512), ("512MiB", 512), ("512MB", 512), ("2G", 2048),
        ("1.5g", 1536), (" 2 G ", 2048), ("2048K", 2), ("1T", 1 << 20),
    ],
)  # fmt: skip
def test_a_size_is_mebibytes_unless_it_says_otherwise(text: str | int, mib: int) -> None:
    assert parse.parse_size_mib(text) == mib


@pytest.mark.parametrize(
    ("text", "seconds"), [("30", 30), (30, 30), (0.5, 0.5), ("500ms", 0.5), ("30s", 30), ("2m", 120), ("1.5 h", 5400)]
)
def test_a_duration_is_seconds_unless_it_says_otherwise(text: str | float, seconds: float) -> None:
    assert parse.parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", True), ("TRUE", True), ("yes", True), ("on", True), (True, True), ("0", False), ("Off", False), ("", False)],
)
def test_yes_and_no_have_the_usual_spellings(text: str | bool, value: bool) -> None:
    assert parse.parse_bool(text) is value


def test_metadata_are_strings_in_objects_or_in_a_json_file(tmp_path: Path) -> None:
    data = {"latest": {"meta-data": {"instance-id": "i-1"}, "user-data": "#!/bin/sh"}}
    (tmp_path / "file.json").write_text(json.dumps(data))
    assert parse.parse_metadata(data, tmp_path) == parse.parse_metadata("file.json", tmp_path) == data


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": 1}, "metadata has a value that cannot be served"),
        ({"a": {"b": ["c"]}}, "metadata has a value that cannot be served"),
        ({1: "a"}, "metadata has a value that cannot be served"),
        ({"a": "x" * 51200}, "metadata of 51209 bytes is too large"),
        ("gone.json", "No such file or directory"),
        ("list.json", "metadata has a value that cannot be served"),
        ("broken.json", "Expecting value"),
    ],
)
def test_metadata_that_cannot_be_served_are_refused(value: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "broken.json").write_text("]")
    with pytest.raises(UsageProblem) as caught:
        parse.parse_metadata(value, tmp_path)
    assert message in caught.value.message
    assert caught.value.hint


def test_a_command_line_is_split_as_a_shell_does_and_a_list_is_not_changed() -> None:
    assert parse.parse_command("nginx -g 'daemon off;'") == ("nginx", "-g", "daemon off;")
    assert parse.parse_command(["a b", Path("/c")]) == ("a b", "/c")  # type: ignore[list-item]


def test_an_environment_is_pairs_or_names_or_a_mapping() -> None:
    assert _env(["A=1", "B=x=y", "C=", "HERE"]) == {"A": "1", "B": "x=y", "C": "", "HERE": "from the host"}
    assert _env({"PORT": 80, "HERE": "own"}) == {"PORT": "80", "HERE": "own"}


@pytest.mark.parametrize(
    ("text", "host_ip", "host_port", "guest_port", "proto"),
    [
        ("80", "127.0.0.1", 0, 80, "tcp"),
        (80, "127.0.0.1", 0, 80, "tcp"),
        ("53/udp", "127.0.0.1", 0, 53, "udp"),
        ("8080:80", "127.0.0.1", 8080, 80, "tcp"),
        ("0:80", "127.0.0.1", 0, 80, "tcp"),
        ("0.0.0.0:8080:80/udp", "0.0.0.0", 8080, 80, "udp"),
        ("127.0.0.5::80", "127.0.0.5", 0, 80, "tcp"),
        ("[::1]:8080:80", "::1", 8080, 80, "tcp"),
        ("[0:0::1]::53/udp", "::1", 0, 53, "udp"),
    ],
)
def test_a_port_is_published_on_loopback_unless_an_address_is_given(
    text: str | int, host_ip: str, host_port: int, guest_port: int, proto: str
) -> None:
    wanted = PublishedPort(guest_port=guest_port, host_port=host_port, host_ip=host_ip, proto=Proto(proto))
    assert parse.parse_publish(text) == wanted
    assert parse.parse_publish(wanted) is wanted


def test_a_mapped_path_starts_at_the_base_of_its_setting_and_may_be_read_only(tmp_path: Path) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "with:colon").touch()
    assert parse.parse_map("conf:/etc/conf", tmp_path) == MappedPath(host=tmp_path / "conf", guest="/etc/conf")
    assert parse.parse_map("./x/../conf:/c:ro", tmp_path) == MappedPath(
        host=tmp_path / "conf", guest="/c", read_only=True
    )
    assert parse.parse_map("with:colon:/c", tmp_path).host == tmp_path / "with:colon"
    assert str(parse.parse_map("conf:/c:ro", tmp_path)) == f"{tmp_path}/conf:/c:ro"


@pytest.mark.parametrize(
    ("options", "read_only", "owner"),
    [("", False, None), (":rw", False, None), (":owner=app:staff", False, "app:staff"), (":ro,owner=5", True, "5")],
)
def test_a_mapped_path_has_options(options: str, read_only: bool, owner: str | None, tmp_path: Path) -> None:
    mapped = parse.parse_map(f"{tmp_path}:/c{options}", tmp_path)
    assert mapped == MappedPath(host=tmp_path, guest="/c", read_only=read_only, owner=owner)
    assert parse.parse_map(str(mapped), tmp_path) == mapped


@pytest.mark.parametrize("guest", ["/", "//"])
def test_a_mapped_path_cannot_replace_the_guests_root(guest: str, tmp_path: Path) -> None:
    with pytest.raises(UsageProblem, match="cannot replace the guest's root directory"):
        parse.parse_map(f"{tmp_path}:{guest}", tmp_path)


def test_a_tilde_is_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse.parse_path("~/kernel", Path("/elsewhere")) == tmp_path / "kernel"
    assert parse.parse_path("/abs", tmp_path) == Path("/abs")


def test_egress_is_written_after_the_mode() -> None:
    assert parse.parse_network("user") == NetworkSpec(mode=NetworkMode.USER, egress=False)
    assert parse.parse_network("user,egress") == NetworkSpec(mode=NetworkMode.USER, egress=True)
    assert parse.parse_network("auto,egress") == NetworkSpec(mode=NetworkMode.AUTO, egress=True)
    assert str(parse.parse_network("user,egress")) == "user,egress"


def test_egress_can_be_restricted_and_proxy_variables_passed() -> None:
    text = "rootless,egress,allow=10.0.0.0/8,allow=example.org,proxy"
    network = parse.parse_network("rootless,proxy,allow=10.0.0.0/8,allow=example.org")
    assert network == NetworkSpec(
        mode=NetworkMode.ROOTLESS, egress=True, allow=("10.0.0.0/8", "example.org"), proxy=True
    )
    assert str(network) == text
    assert parse.parse_network(text) == network


@pytest.mark.parametrize("target", ["", "10.0.0.1/8", "300.1.1.1", "a b", "x;drop", "-", "::1"])
def test_only_an_ipv4_network_an_address_or_a_name_can_be_allowed(target: str) -> None:
    with pytest.raises(UsageProblem, match="unknown network"):
        parse.parse_network(f"rootless,allow={target}")


@pytest.mark.parametrize(
    ("short", "long", "ready"),
    [
        ("http:80", "mode=http,url=http://127.0.0.1:80", ReadySpec(mode=ReadyMode.HTTP, port=80, text="/")),
        ("http:80", "mode=http,url=http://127.0.0.1", ReadySpec(mode=ReadyMode.HTTP, port=80, text="/")),
        (
            "http:8080/a/b?c=d,e",
            "mode=http,url=http://localhost:8080/a/b?c=d,e",
            ReadySpec(mode=ReadyMode.HTTP, port=8080, text="/a/b?c=d,e"),
        ),
        ("tcp:5432", "mode=tcp,port=5432", ReadySpec(mode=ReadyMode.TCP, port=5432)),
        ("log:ready, (a|b)=1", "mode=log,regex=ready, (a|b)=1", ReadySpec(mode=ReadyMode.LOG, text="ready, (a|b)=1")),
        ("exec:test -e /a,b", "mode=exec,cmd=test -e /a,b", ReadySpec(mode=ReadyMode.EXEC, text="test -e /a,b")),
        ("healthcheck", "mode=healthcheck", ReadySpec(mode=ReadyMode.HEALTHCHECK)),
        ("agent", "mode=agent", ReadySpec(mode=ReadyMode.AGENT)),
        ("exit:0", "mode=exit,code=0", ReadySpec(mode=ReadyMode.EXIT, text="0")),
        ("exit:255", "mode=exit,code=255", ReadySpec(mode=ReadyMode.EXIT, text="255")),
    ],
)
def test_readiness_has_a_short_and_a_long_spelling(short: str, long: str, ready: ReadySpec) -> None:
    assert parse.parse_ready(short) == ready
    assert parse.parse_ready(long) == ready
    assert parse.parse_ready(ready) is ready


_BAD: list[tuple[Callable[[Any], object], Any, str, str]] = [
    (parse.parse_size_mib, "much", "'much' is not a size of at least 1 MiB", "write 512, 512M or 2G"),
    (parse.parse_size_mib, "-1", "'-1' is not a size of at least 1 MiB", "write 512, 512M or 2G"),
    (parse.parse_size_mib, "512K", "'512K' is not a size of at least 1 MiB", "write 512, 512M or 2G"),
    (parse.parse_duration, "0", "'0' is not a duration", "write 30, 30s, 500ms or 2m"),
    (parse.parse_duration, "soon", "'soon' is not a duration", "write 30, 30s, 500ms or 2m"),
    (parse.parse_count, "0", "'0' is not a whole number of at least 1", "write 1, 2, 4 …"),
    (parse.parse_count, 1.5, "1.5 is not a whole number of at least 1", "write 1, 2, 4 …"),
    (parse.parse_bool, "perhaps", "'perhaps' is neither yes nor no", "write true or false"),
    (parse.parse_command, "", "the command is empty or has a NUL byte", "name a program of the image"),
    (parse.parse_command, "echo '", "command \"echo '\": No closing quotation", "close the quotes"),
    (_env, ["=x"], "'' is not an environment variable's name", "write NAME=value"),
    (_env, {"A B": "x"}, "'A B' is not an environment variable's name", "write NAME=value"),
    (_env, ["A=\0"], "the value of A has a NUL byte", "pass binary data as a file, with map"),
    (_env, ["GONE"], "environment variable 'GONE' is not set here", "export it or write GONE=value"),
    (parse.parse_port, "65536", "'65536' is not a port", "ports are 1 to 65535"),
    (parse.parse_port, "٣", "'٣' is not a port", "ports are 1 to 65535"),
    (parse.parse_publish, "0", "publish '0': '0' is not a port", _PUBLISH_HINT),
    (parse.parse_publish, "x:80", "publish 'x:80': 'x' is not a port", _PUBLISH_HINT),
    (parse.parse_publish, "::1:80:80", "publish '::1:80:80': Expected 4 octets in '::1'", _PUBLISH_HINT),
    (parse.parse_publish, "80/x", "publish '80/x': 'x' is neither tcp nor udp", "[HOSTIP:]HOSTPORT:GUESTPORT/udp"),
    (parse.parse_network, "bridges", "unknown network 'bridges'", _NETWORK_HINT),
    (parse.parse_network, "user,all", "unknown network 'user,all'", _NETWORK_HINT),
    (parse.parse_network, "relay,egress", "the network mode relay has no egress", "use user,egress, or auto,egress"),
    (parse.parse_ready, "soon", "ready 'soon': unknown mode 'soon'", _READY_HINT),
    (parse.parse_ready, "http", "ready 'http': '' is not a port", _READY_HINT),
    (parse.parse_ready, "http:80/a b", "ready 'http:80/a b': the path '/a b' must be percent-encoded", _READY_HINT),
    (parse.parse_ready, "tcp:80/x", "ready 'tcp:80/x': tcp takes only a port", _READY_HINT),
    (parse.parse_ready, "log:", "ready 'log:': log needs an argument", _READY_HINT),
    (parse.parse_ready, "log:(", "ready 'log:(': missing ), unterminated subpattern at position 0", _READY_HINT),
    (parse.parse_ready, "exit:256", "ready 'exit:256': '256' is not an exit code from 0 to 255", _READY_HINT),
    (parse.parse_ready, "exit:", "ready 'exit:': '' is not an exit code from 0 to 255", _READY_HINT),
    (parse.parse_ready, "mode=exit", "ready 'mode=exit': exit needs code=", _READY_HINT),
    (parse.parse_ready, "agent:x", "ready 'agent:x': agent takes no argument", _READY_HINT),
    (parse.parse_ready, "mode=soon", "ready 'mode=soon': unknown mode 'soon'", _READY_HINT),
    (parse.parse_ready, "mode=http", "ready 'mode=http': http needs url=", _READY_HINT),
    (parse.parse_ready, "mode=tcp", "ready 'mode=tcp': tcp needs port=", _READY_HINT),
    (parse.parse_ready, "mode=log,regex=", "ready 'mode=log,regex=': log needs an argument", _READY_HINT),
    (parse.parse_ready, "mode=exec,url=x", "ready 'mode=exec,url=x': exec does not take 'url'", _READY_HINT),
    (
        parse.parse_ready, "mode=http,url=https://h/",
        "ready 'mode=http,url=https://h/': 'https://h/' is not an http:// URL", _READY_HINT,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("parser", "text", "message", "hint"), _BAD)
def test_a_wrong_spelling_is_reported_with_the_cause_and_a_hint(
    parser: Callable[[Any], object], text: object, message: str, hint: str
) -> None:
    with pytest.raises(UsageProblem) as caught:
        parser(text)
    assert (caught.value.message, caught.value.hint) == (message, hint)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("conf", "map 'conf': the guest path must be absolute"),
        ("conf:etc", "map 'conf:etc': the guest path must be absolute"),
        ("gone:/etc", "map 'gone:/etc': {base}/gone does not exist"),
        ("~no-such-user/x:/etc", "'~no-such-user/x': Could not determine home directory."),
        (":/etc", "map ':/etc': the guest path must be absolute"),
    ],
)
def test_a_wrong_mapping_is_reported_with_the_cause_and_a_hint(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageProblem) as caught:
        parse.parse_map(text, tmp_path)
    assert caught.value.message == message.format(base=tmp_path)
    assert caught.value.hint


def test_an_empty_path_is_refused_instead_of_meaning_the_base(tmp_path: Path) -> None:
    with pytest.raises(UsageProblem, match="the path is empty"):
        parse.parse_path("", tmp_path)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("SIGTERM", 15),
        ("TERM", 15),
        ("sigterm", 15),
        (" Term ", 15),
        ("15", 15),
        ("SIGRTMIN+3", 37),
        ("RTMIN+3", 37),
        ("rtmin", 34),
        ("SIGRTMAX-1", 63),
        ("RTMAX-30", 34),
        ("QUIT", 3),
        ("SIGUSR1", 10),
        ("IOT", 6),
        ("37", 37),
        ("64", 64),
    ],
)
def test_signals_are_read_as_images_name_them(text: str, number: int) -> None:
    assert parse.parse_signal(text) == number


@pytest.mark.parametrize(
    "text",
    [
        "",
        "SIG",
        "SIGNOTHING",
        "SIGTERM+",
        "TERM+3",
        "RTMIN-1",
        "RTMIN+31",
        "RTMAX+1",
        "0",
        "65",
        "-1",
        "111",
        "SIGSIGTERM",
    ],
)
def test_an_invalid_signal_is_reported(text: str) -> None:
    with pytest.raises(UsageProblem, match="is not a signal"):
        parse.parse_signal(text)


@pytest.mark.parametrize(("text", "mib"), [("64M", 64), ("2G", 2048), (100, 100)])
def test_a_disk_is_a_size(text: str | int, mib: int) -> None:
    assert parse.parse_disk_mib(text) == mib


def test_a_disk_too_small_for_a_file_system_is_reported() -> None:
    with pytest.raises(UsageProblem, match="too small"):
        parse.parse_disk_mib("63M")


@pytest.mark.parametrize(("text", "wanted"), [("auto", None), ("0", 0), ("3", 3), (2, 2)])
def test_a_pool_is_a_number_or_auto(text: str | int, wanted: int | None) -> None:
    assert parse.parse_pool(text) == wanted


@pytest.mark.parametrize("text", ["", "-1", "many", "1.5"])
def test_an_invalid_pool_is_reported(text: str) -> None:
    with pytest.raises(UsageProblem, match="neither auto nor a number"):
        parse.parse_pool(text)
