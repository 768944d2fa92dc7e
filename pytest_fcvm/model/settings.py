"""Host name, sysctls and limits of a guest, spelled as for `docker run`. Parsers raise UsageProblem."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from pytest_fcvm.errors import UsageProblem

__all__ = ["ULIMITS", "Ulimit", "parse_hostname", "parse_sysctl", "parse_ulimit"]

Ulimit = tuple[int, int]  # soft, hard; -1 is unlimited

# Docker's names and Linux's numbers (asm-generic/resource.h)
ULIMITS = {
    "cpu": 0,
    "fsize": 1,
    "data": 2,
    "stack": 3,
    "core": 4,
    "rss": 5,
    "nproc": 6,
    "nofile": 7,
    "memlock": 8,
    "as": 9,
    "locks": 10,
    "sigpending": 11,
    "msgqueue": 12,
    "nice": 13,
    "rtprio": 14,
    "rttime": 15,
}
_HOST_NAME_MAX = 64  # Linux's
_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST_NAME = re.compile(rf"{_LABEL}(\.{_LABEL})*")
_SYSCTL = re.compile(r"[A-Za-z0-9_-]+([./][A-Za-z0-9_:@*-]+)+")


def parse_hostname(text: str) -> str:
    """Read a host name, with or without a domain."""
    if not isinstance(text, str) or not _HOST_NAME.fullmatch(text) or len(text) > _HOST_NAME_MAX:
        raise UsageProblem(
            f"{text!r} is not a host name",
            hint=f"use letters, digits, hyphens and dots, {_HOST_NAME_MAX} characters at most",
        )
    return text


def parse_sysctl(items: str | Mapping[str, object] | Iterable[str]) -> dict[str, str]:
    """Read kernel settings from `NAME=VALUE` items or a mapping."""
    found = {}
    for name, value in _pairs(items):
        if not _SYSCTL.fullmatch(name) or not value or not value.isprintable():
            raise UsageProblem(f"{f'{name}={value}'!r} is not a sysctl", hint="write net.core.somaxconn=1024")
        found[name] = value
    return found


def parse_ulimit(items: str | Mapping[str, object] | Iterable[str]) -> dict[str, Ulimit]:
    """Read limits of the workload's processes from `NAME=SOFT[:HARD]` items or a mapping; -1 is unlimited."""
    found = {}
    for name, value in _pairs(items):
        if name not in ULIMITS:
            raise UsageProblem(f"unknown limit {name!r}", hint=f"limits: {', '.join(ULIMITS)}")
        soft, _, hard = value.partition(":")
        found[name] = _limit(name, soft), _limit(name, hard or soft)
        if (found[name][0] % 2**64) > (found[name][1] % 2**64):
            raise UsageProblem(f"{name}={value}: the soft limit is above the hard one", hint="write SOFT:HARD")
    return found


def _limit(name: str, text: str) -> int:
    word = text.strip().lower()
    if word in ("-1", "unlimited"):
        return -1
    if not re.fullmatch(r"[0-9]{1,18}", word):
        raise UsageProblem(f"{name}={text!r} is not a limit", hint="write a number, SOFT:HARD, or -1 for none")
    return int(word)


def _pairs(items: str | Mapping[str, object] | Iterable[str]) -> Iterable[tuple[str, str]]:
    if isinstance(items, Mapping):
        yield from ((str(name), _joined(value)) for name, value in items.items())
        return
    for item in [items] if isinstance(items, str) else items:
        name, _, value = str(item).partition("=")
        yield name.strip(), value.strip()


def _joined(value: object) -> str:
    """Return a value as text; a pair is a soft and a hard limit."""
    return ":".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
