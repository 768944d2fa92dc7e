"""Parsers of sizes, ports, readiness conditions and paths as users write them. All raise UsageProblem with a hint."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import shlex
import signal
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pytest_fcvm.errors import UnresolvedSetting, UsageProblem
from pytest_fcvm.model.net import Proto, PublishedPort
from pytest_fcvm.model.specs import Clock, MappedPath, NetworkMode, NetworkSpec, ReadyMode, ReadySpec

__all__ = [
    "parse_bool",
    "parse_clock",
    "parse_command",
    "parse_count",
    "parse_disk_mib",
    "parse_duration",
    "parse_entrypoint",
    "parse_env",
    "parse_limit_mib",
    "parse_map",
    "parse_metadata",
    "parse_network",
    "parse_path",
    "parse_pool",
    "parse_port",
    "parse_publish",
    "parse_ready",
    "parse_regex",
    "parse_signal",
    "parse_size_mib",
]

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)
_MIB_PER = {"k": 1 / 1024, "": 1.0, "m": 1.0, "g": 1024.0, "t": 1024.0 * 1024}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)?")
_SECONDS_PER = {"ms": 0.001, "s": 1.0, None: 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_LONG_KEYS = {
    ReadyMode.HTTP: "url",
    ReadyMode.TCP: "port",
    ReadyMode.LOG: "regex",
    ReadyMode.EXEC: "cmd",
    ReadyMode.EXIT: "code",
}
_ENV_NAME = re.compile(r"[^=\0\s]+")
_SIGNAL = re.compile(r"(?P<number>[0-9]{1,2})|(?:SIG)?(?P<name>[A-Z0-9]+?)(?P<more>[+-][0-9]{1,2})?")
_REAL_TIME = {"RTMIN": 34, "RTMAX": 64}  # the numbers that images mean; the C library of the host may reserve some
_MAP = re.compile(
    r"(?P<host>.+):(?P<guest>/[^:]*)(?::(?P<options>(?:ro|rw|owner=[^,]+)(?:,(?:ro|rw|owner=[^,]+))*))?", re.DOTALL
)
_MAP_SPELLING = "HOST:/GUEST[:ro,owner=USER:GROUP]"
_COUNTED = re.compile(r"log@([1-9]\d{0,5})")
_MIN_DISK_MIB = 64
_MAX_EXIT_CODE = 255
_MAX_METADATA_BYTES = 51200  # --http-api-max-payload-size of Firecracker
_READY_HINT = "http:80/path, tcp:80, log:REGEX, exec:COMMAND, exit:0, healthcheck, agent or mode=http,url=http://127.0.0.1:80/path"


def parse_size_mib(text: str | int) -> int:
    """Read `512`, `512M` or `2G` as mebibytes (a bare number is mebibytes)."""
    match = _SIZE.fullmatch(str(text).strip())
    size = float(match[1]) * _MIB_PER[match[2].lower()] if match else 0.0
    if size < 1:
        raise UsageProblem(f"{text!r} is not a size of at least 1 MiB", hint="write 512, 512M or 2G")
    return round(size)


def parse_limit_mib(text: str | int) -> int | None:
    """Read a size as mebibytes, or `off` (no limit) as None."""
    return None if str(text).strip().lower() == "off" else parse_size_mib(text)


def parse_disk_mib(text: str | int) -> int:
    """Read the size of a scratch disk as mebibytes, at least 64 MiB."""
    size = parse_size_mib(text)
    if size < _MIN_DISK_MIB:
        raise UsageProblem(f"a disk of {text!r} is too small", hint=f"write {_MIN_DISK_MIB}M or more")
    return size


def parse_duration(text: str | float) -> float:
    """Read `30`, `500ms`, `2m` as seconds (a bare number is seconds)."""
    match = _DURATION.fullmatch(str(text).strip())
    seconds = float(match[1]) * _SECONDS_PER[match[2]] if match else 0.0
    if seconds <= 0:
        raise UsageProblem(f"{text!r} is not a duration", hint="write 30, 30s, 500ms or 2m")
    return seconds


def parse_count(text: str | int) -> int:
    """Read a whole number of at least 1."""
    if not re.fullmatch(r"[1-9]\d{0,5}", str(text).strip()):
        raise UsageProblem(f"{text!r} is not a whole number of at least 1", hint="write 1, 2, 4 …")
    return int(text)


def parse_signal(text: str) -> int:
    """Read `SIGTERM`, `TERM`, `15` or `SIGRTMIN+3`, in any case, as images write their stop signals."""
    match = _SIGNAL.fullmatch(text.strip().upper())
    number = _signal_number(match) if match else 0
    if not 0 < number <= _REAL_TIME["RTMAX"]:
        raise UsageProblem(f"{text!r} is not a signal", hint="write SIGTERM, TERM, 15 or SIGRTMIN+3")
    return number


def _signal_number(match: re.Match[str]) -> int:
    if match["number"]:
        return int(match["number"])
    name, more = match["name"], int(match["more"] or 0)
    if name in _REAL_TIME:
        number = _REAL_TIME[name] + more
        return number if _REAL_TIME["RTMIN"] <= number else 0
    known = signal.Signals.__members__.get(f"SIG{name}")
    return int(known) if known and not match["more"] else 0


def parse_pool(text: str | int) -> int | None:
    """Read how many clones to prewarm: a number, or `auto`, which is None."""
    word = str(text).strip().lower()
    if word == "auto":
        return None
    if not re.fullmatch(r"\d{1,3}", word):
        raise UsageProblem(f"{text!r} is neither auto nor a number of clones", hint="write auto, or 0 for none")
    return int(word)


def parse_bool(text: str | bool) -> bool:
    """Read 1/0, true/false, yes/no, on/off, t/f, y/n, in any case, as pytest does in its ini file."""
    word = str(text).strip().lower()
    if word in ("1", "true", "t", "yes", "y", "on"):
        return True
    if word in ("0", "false", "f", "no", "n", "off", ""):
        return False
    raise UsageProblem(f"{text!r} is neither yes nor no", hint="write true or false")


def parse_clock(text: str) -> Clock:
    """Read `host` or `snapshot`."""
    try:
        return Clock(text)
    except ValueError:
        raise UsageProblem(f"{text!r} is not a clock", hint="write host or snapshot") from None


def parse_command(text: str | Iterable[str]) -> tuple[str, ...]:
    """Split a command line into words as a shell does; take a list as it is."""
    try:
        words = tuple(shlex.split(text)) if isinstance(text, str) else tuple(str(word) for word in text)
    except ValueError as error:
        raise UsageProblem(f"command {text!r}: {error}", hint="close the quotes") from error
    if not words or any("\0" in word for word in words):
        raise UsageProblem("the command is empty or has a NUL byte", hint="name a program of the image")
    return words


def parse_entrypoint(text: str | Iterable[str]) -> tuple[str, ...]:
    """Read a command line that replaces the image's entrypoint; an empty one removes the entrypoint."""
    return parse_command(text) if text else ()


def parse_env(items: Mapping[str, object] | Iterable[str], host_env: Mapping[str, str]) -> dict[str, str]:
    """Read `NAME=value` items; a bare `NAME` takes its value from `host_env`. A mapping needs values."""
    pairs = items.items() if isinstance(items, Mapping) else (_env_pair(item, host_env) for item in items)
    env = {str(name): _env_value(name, value) for name, value in pairs}
    for name, value in env.items():
        if not _ENV_NAME.fullmatch(name):
            raise UsageProblem(f"{name!r} is not an environment variable's name", hint="write NAME=value")
        if "\0" in value:
            raise UsageProblem(f"the value of {name} has a NUL byte", hint="pass binary data as a file, with map")
    return env


def _env_value(name: object, value: object) -> str:
    if not isinstance(value, (str, int, float, os.PathLike)):
        raise UsageProblem(
            f"the value of {name} is not a string: {value!r}", hint='write a string; "" for an empty one'
        )
    return str(value)


def _env_pair(item: str, host_env: Mapping[str, str]) -> tuple[str, str]:
    name, equals, value = item.partition("=")
    if equals:
        return name, value
    if name not in host_env:
        raise UnresolvedSetting(
            f"environment variable {name!r} is not set here", hint=f"export it or write {name}=value"
        )
    return name, host_env[name]


def parse_port(text: str | int) -> int:
    """Read a TCP or UDP port number."""
    number = str(text).strip()
    if not number.isascii() or not number.isdecimal() or not 0 < int(number) < 65536:
        raise UsageProblem(f"{text!r} is not a port", hint="ports are 1 to 65535")
    return int(number)


def parse_publish(text: str | int | PublishedPort) -> PublishedPort:
    """Read `GUESTPORT` or `[HOSTIP:]HOSTPORT:GUESTPORT`, with or without `/tcp` or `/udp`; host port 0 is any free one.

    Write an IPv6 address in brackets: `[::1]:8080:80`.
    """
    if isinstance(text, PublishedPort):
        return text
    rest, _, proto = str(text).strip().partition("/")
    if proto not in ("", "tcp", "udp"):
        raise UsageProblem(
            f"publish {text!r}: {proto!r} is neither tcp nor udp", hint="[HOSTIP:]HOSTPORT:GUESTPORT/udp"
        )
    host, _, guest = rest.rpartition(":")
    host_ip, _, host_port = host.rpartition(":")
    try:
        return PublishedPort(
            guest_port=parse_port(guest),
            host_port=0 if host_port in ("", "0") else parse_port(host_port),
            host_ip=_parse_host_ip(host_ip) if host_ip else "127.0.0.1",
            proto=Proto(proto or "tcp"),
        )
    except (UsageProblem, ValueError) as error:
        cause = error.message if isinstance(error, UsageProblem) else str(error)
        raise UsageProblem(f"publish {text!r}: {cause}", hint="write [HOSTIP:]HOSTPORT:GUESTPORT[/PROTO]") from error


def _parse_host_ip(text: str) -> str:
    if text.startswith("[") and text.endswith("]"):
        return str(ipaddress.IPv6Address(text[1:-1]))
    return str(ipaddress.IPv4Address(text))


def parse_path(text: str | Path, base: Path) -> Path:
    """Read a path on the host. `~` is a home directory; a relative path starts at `base`."""
    if not str(text):
        raise UsageProblem("the path is empty", hint="name a file or directory")
    try:
        return Path(os.path.normpath(base / Path(text).expanduser()))
    except RuntimeError as error:  # pathlib's error for ~nobody
        raise UnresolvedSetting(f"{str(text)!r}: {error}", hint="write the path in full") from error


def parse_map(text: str | MappedPath, base: Path) -> MappedPath:
    """Read `HOST:GUEST[:OPTION,…]` with the options `ro` and `owner=USER[:GROUP]`. A relative path starts at `base`."""
    if isinstance(text, MappedPath):
        return text
    match = _MAP.fullmatch(text)
    if not match:
        raise UsageProblem(f"map {text!r}: the guest path must be absolute", hint=f"write {_MAP_SPELLING}")
    if not match["guest"].strip("/"):
        raise UsageProblem(f"map {text!r}: cannot replace the guest's root directory", hint="name a directory below /")
    path = parse_path(match["host"], base)
    if not path.exists():
        raise UnresolvedSetting(f"map {text!r}: {path} does not exist", hint="name an existing file or directory")
    options = (match["options"] or "").split(",")
    owners = [option.removeprefix("owner=") for option in options if option.startswith("owner=")]
    return MappedPath(host=path, guest=match["guest"], read_only="ro" in options, owner=owners[-1] if owners else None)


def parse_metadata(value: Mapping[str, Any] | str | Path, base: Path) -> dict[str, Any]:
    """Read metadata: a mapping of strings to strings or to such mappings, or the path of a JSON file with one."""
    if not isinstance(value, Mapping):
        path = parse_path(value, base)
        try:
            value = json.loads(path.read_bytes())
        except OSError as error:
            raise UnresolvedSetting(
                f"metadata {str(path)!r}: {error}", hint="name a file with a JSON object"
            ) from error
        except ValueError as error:
            raise UsageProblem(f"metadata {str(path)!r}: {error}", hint="name a file with a JSON object") from error
    if not (isinstance(value, Mapping) and _is_served(value)):
        raise UsageProblem(
            "metadata has a value that cannot be served", hint="use strings, and objects of strings and objects"
        )
    if (size := len(json.dumps(value))) > _MAX_METADATA_BYTES:
        raise UsageProblem(f"metadata of {size} bytes is too large", hint=f"use at most {_MAX_METADATA_BYTES} bytes")
    return dict(value)


def _is_served(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and _is_served(part) for name, part in value.items())
    return isinstance(value, str)


def parse_network(text: str | NetworkSpec) -> NetworkSpec:
    """Read `MODE[,egress][,allow=TARGET]...[,proxy]`. TARGET is an IPv4 network, an IPv4 address or a name."""
    if isinstance(text, NetworkSpec):
        return text
    mode, *words = text.split(",")
    allow = tuple(word.removeprefix("allow=") for word in words if word.startswith("allow="))
    flags = {word for word in words if not word.startswith("allow=")}
    if mode not in list(NetworkMode) or not flags <= {"egress", "proxy"} or not all(map(_is_target, allow)):
        raise UsageProblem(
            f"unknown network {text!r}",
            hint=f"{', '.join(NetworkMode)}; rootless,egress allows outbound access, rootless,allow=10.0.0.0/8 only to "
            "a network, an address or a name; ,proxy passes pytest's proxy variables to the guest",
        )
    egress = "egress" in flags or bool(allow)
    if egress and mode == NetworkMode.RELAY:
        raise UsageProblem("the network mode relay has no egress", hint="use user,egress, or auto,egress")
    return NetworkSpec(mode=NetworkMode(mode), egress=egress, allow=allow, proxy="proxy" in flags)


def _is_target(text: str) -> bool:
    with suppress(ValueError):
        return bool(ipaddress.IPv4Network(text))
    return re.fullmatch(r"(?=.*[a-z])[a-z0-9-]+(\.[a-z0-9-]+)*", text.lower()) is not None


def parse_regex(text: str) -> re.Pattern[str]:
    """Read a regular expression in Python's syntax."""
    try:
        return re.compile(text)
    except re.error as error:
        raise UsageProblem(f"{text!r} is not a regular expression: {error}", hint="use re.escape") from error


def parse_ready(text: str | ReadySpec) -> ReadySpec:
    """Read the short form (`http:80/path`) or the long form (`mode=http,url=http://127.0.0.1:80/path`)."""
    if isinstance(text, ReadySpec):
        return text
    try:
        return _long_ready(text) if text.startswith("mode=") else _short_ready(text)
    except (UsageProblem, ValueError, re.error) as error:
        cause = error.message if isinstance(error, UsageProblem) else str(error)
        raise UsageProblem(f"ready {text!r}: {cause}", hint=_READY_HINT) from error


def _short_ready(text: str) -> ReadySpec:
    word, _, rest = text.partition(":")
    if counted := _COUNTED.fullmatch(word):
        return replace(_checked_ready(ReadyMode.LOG, rest), times=int(counted[1]))
    mode = _ready_mode(word)
    if mode.needs_port:
        port, slash, path = rest.partition("/")
        return ReadySpec(mode=mode, port=parse_port(port), text=_http_path(mode, slash + path))
    return _checked_ready(mode, rest)


def _long_ready(text: str) -> ReadySpec:
    word, _, rest = text.removeprefix("mode=").partition(",")
    mode, (key, _, value) = _ready_mode(word), rest.partition("=")
    wanted = _LONG_KEYS.get(mode, "")
    if key != wanted:
        raise UsageProblem(f"{mode} does not take {key!r}" if key else f"{mode} needs {wanted}=")
    if mode is ReadyMode.HTTP:
        url = urlsplit(value)
        if url.scheme != "http":
            raise UsageProblem(f"{value!r} is not an http:// URL")
        query = f"?{url.query}" if url.query else ""
        return ReadySpec(mode=mode, port=url.port or 80, text=_http_path(mode, url.path + query))
    if mode is ReadyMode.TCP:
        return ReadySpec(mode=mode, port=parse_port(value))
    return _checked_ready(mode, value)


def _ready_mode(word: str) -> ReadyMode:
    if word not in list(ReadyMode):
        raise UsageProblem(f"unknown mode {word!r}")
    return ReadyMode(word)


def _http_path(mode: ReadyMode, path: str) -> str:
    if mode is ReadyMode.TCP and path:
        raise UsageProblem("tcp takes only a port")
    if not path.isascii() or not path.isprintable() or " " in path:
        raise UsageProblem(f"the path {path!r} must be percent-encoded")
    path = path if path.startswith("/") else f"/{path}"
    return path if mode is ReadyMode.HTTP else ""


def _checked_ready(mode: ReadyMode, text: str) -> ReadySpec:
    if mode in (ReadyMode.LOG, ReadyMode.EXEC) and not text:
        raise UsageProblem(f"{mode} needs an argument")
    if mode in (ReadyMode.HEALTHCHECK, ReadyMode.AGENT) and text:
        raise UsageProblem(f"{mode} takes no argument")
    if mode is ReadyMode.LOG:
        re.compile(text)
    if mode is ReadyMode.EXIT:
        text = _exit_code(text)
    return ReadySpec(mode=mode, text=text)


def _exit_code(text: str) -> str:
    if not re.fullmatch(r"\d{1,3}", text, re.ASCII) or int(text) > _MAX_EXIT_CODE:
        raise UsageProblem(f"{text!r} is not an exit code from 0 to {_MAX_EXIT_CODE}")
    return str(int(text))
