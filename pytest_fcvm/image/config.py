"""What an image says about running it: the `config` of Docker's image JSON and of OCI's image configuration.

Formats: OCI image-spec config.md; Docker's image specification v1.2, which has Healthcheck (OCI has none).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from pytest_fcvm.errors import ImageError

__all__ = ["Healthcheck", "ImageConfig"]

_NS_PER_S = 1_000_000_000
_PORT = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?(?:/(tcp|udp|sctp))?", re.IGNORECASE)
_MOST_PORTS = 1000


@dataclass(frozen=True, kw_only=True)
class Healthcheck:
    """Docker's HEALTHCHECK. `test` is its list, `CMD` or `CMD-SHELL` first; what is left out is Docker's default."""

    test: tuple[str, ...]
    interval_s: float = 30.0
    timeout_s: float = 30.0
    start_period_s: float = 0.0
    retries: int = 3


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """How the image wants to be run. `env` are `NAME=value` items, `exposed_ports` ascend by number."""

    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    user: str = ""
    working_dir: str = ""
    stop_signal: str = ""
    exposed_ports: tuple[tuple[int, str], ...] = ()
    volumes: tuple[str, ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    healthcheck: Healthcheck | None = None
    architecture: str = ""

    def argv(self, command: Sequence[str] | None = None) -> tuple[str, ...]:
        """Return the workload's command line: the entrypoint, then `command` in the place of the image's own."""
        return (*self.entrypoint, *(self.cmd if command is None else command))

    def to_json(self) -> dict[str, object]:
        """Return what `from_json` reads, made of JSON's types alone."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> ImageConfig:
        """Read what `to_json` gave. Raise ValueError for anything else."""
        health = data.get("healthcheck")
        try:
            return cls(
                entrypoint=_words(data["entrypoint"]),
                cmd=_words(data["cmd"]),
                env=_words(data["env"]),
                user=_text(data["user"]),
                working_dir=_text(data["working_dir"]),
                stop_signal=_text(data["stop_signal"]),
                exposed_ports=tuple((int(str(port)), str(proto)) for port, proto in _pairs(data["exposed_ports"])),
                volumes=_words(data["volumes"]),
                labels=tuple((str(key), str(value)) for key, value in _pairs(data["labels"])),
                healthcheck=_stored_health(health) if isinstance(health, Mapping) else None,
                architecture=_text(data["architecture"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not an image's configuration: {error!r}") from error

    @classmethod
    def from_image(cls, document: Mapping[str, object]) -> ImageConfig:
        """Read an image's configuration, Docker's or OCI's. Raise ImageError for a malformed one."""
        config = document.get("config") or {}
        try:
            return cls._from_section(_mapping(config), _text(document.get("architecture")))
        except (TypeError, ValueError, OverflowError) as error:
            raise ImageError(
                f"the image's configuration is malformed: {error}", hint="build the image anew with a current tool"
            ) from error

    @classmethod
    def _from_section(cls, config: Mapping[str, object], architecture: str) -> ImageConfig:
        return cls(
            entrypoint=_words(config.get("Entrypoint")),
            cmd=_words(config.get("Cmd")),
            env=_words(config.get("Env")),
            user=_text(config.get("User")),
            working_dir=_text(config.get("WorkingDir")),
            stop_signal=_text(config.get("StopSignal")),
            exposed_ports=_ports(_mapping(config.get("ExposedPorts") or {})),
            volumes=tuple(sorted(_mapping(config.get("Volumes") or {}))),
            labels=tuple(sorted((k, _text(v)) for k, v in _mapping(config.get("Labels") or {}).items())),
            healthcheck=_health(config.get("Healthcheck")),
            architecture=architecture,
        )


def _health(section: object) -> Healthcheck | None:
    if section is None:
        return None
    fields = _mapping(section)
    test = _words(fields.get("Test"))
    if not test or test[0] == "NONE":
        return None
    default = Healthcheck(test=test)
    return Healthcheck(
        test=test,
        interval_s=_seconds(fields.get("Interval")) or default.interval_s,
        timeout_s=_seconds(fields.get("Timeout")) or default.timeout_s,
        start_period_s=_seconds(fields.get("StartPeriod")),
        retries=int(str(fields.get("Retries") or default.retries)),
    )


def _stored_health(data: Mapping[str, object]) -> Healthcheck:
    return Healthcheck(
        test=_words(data["test"]),
        interval_s=float(str(data["interval_s"])),
        timeout_s=float(str(data["timeout_s"])),
        start_period_s=float(str(data["start_period_s"])),
        retries=int(str(data["retries"])),
    )


def _seconds(nanoseconds: object) -> float:
    return int(str(nanoseconds or 0)) / _NS_PER_S


def _ports(section: Iterable[str]) -> tuple[tuple[int, str], ...]:
    """Read `80/tcp`, `80` and Docker's ranges `8000-8010/udp`."""
    found: set[tuple[int, str]] = set()
    for text in section:
        match = _PORT.fullmatch(text)
        first = int(match[1]) if match else 0
        last = int(match[2] or first) if match else 0
        if match is None or not 0 < first <= last < 65536 or last - first > _MOST_PORTS:
            raise ValueError(f"{text!r} is not an exposed port")
        found.update((port, (match[3] or "tcp").lower()) for port in range(first, last + 1))
    return tuple(sorted(found))


def _words(value: object) -> tuple[str, ...]:
    if value is None or value == "":
        return ()
    if isinstance(value, str):  # Docker's oldest images have a bare string, which it gives to the shell
        return ("/bin/sh", "-c", value)
    if not isinstance(value, list | tuple):
        raise TypeError(f"{value!r} is not a list of words")
    return tuple(_text(word) for word in value)


def _text(value: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def _mapping(value: object) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{value!r} is not an object")
    return value


def _pairs(value: object) -> Iterable[tuple[object, object]]:
    if not isinstance(value, list | tuple):
        raise TypeError(f"{value!r} is not a list of pairs")
    return ((first, second) for first, second in value)
