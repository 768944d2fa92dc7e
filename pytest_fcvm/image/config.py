"""The run settings of an image: the `config` of Docker's image JSON and of OCI's image configuration.

Formats: OCI image-spec config.md; Docker's image specification v1.2, which has Healthcheck (OCI has none).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields

from pytest_fcvm.errors import ImageError

__all__ = ["Healthcheck", "ImageConfig"]

_NS_PER_S = 1_000_000_000
_PORT = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?(?:/(tcp|udp|sctp))?", re.IGNORECASE)
_MAX_PORTS = 1000


@dataclass(frozen=True, kw_only=True)
class Healthcheck:
    """Docker's HEALTHCHECK. `test` begins with `CMD` or `CMD-SHELL`. The defaults are Docker's."""

    test: tuple[str, ...]
    interval_s: float = 30.0
    timeout_s: float = 30.0
    start_period_s: float = 0.0
    retries: int = 3


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """The run settings of an image. `env` has `NAME=value` items; `exposed_ports` are sorted by number.

    `shell` is the command that runs shell forms, empty for /bin/sh -c.
    """

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
    shell: tuple[str, ...] = ()
    architecture: str = ""

    def argv(self, command: Sequence[str] | None = None, entrypoint: Sequence[str] | None = None) -> tuple[str, ...]:
        """Return the workload's command line: the entrypoint, then `command` or else the image's own arguments.

        As in `docker run`, another entrypoint does not get the image's arguments.
        """
        own = () if entrypoint else self.cmd
        return (*(self.entrypoint if entrypoint is None else entrypoint), *(own if command is None else command))

    def to_json(self) -> dict[str, object]:
        """Return the input of `from_json`, made only of JSON's types."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> ImageConfig:
        """Read the output of `to_json`. Raise ValueError for anything else."""
        try:
            if data.keys() != {each.name for each in fields(cls)}:
                raise ValueError("the names of its fields differ")
            return cls(
                entrypoint=_words(data, "entrypoint"),
                cmd=_words(data, "cmd"),
                env=_words(data, "env"),
                user=_text(data, "user"),
                working_dir=_text(data, "working_dir"),
                stop_signal=_text(data, "stop_signal"),
                exposed_ports=tuple((int(str(port)), str(proto)) for port, proto in _pairs(data, "exposed_ports")),
                volumes=_words(data, "volumes"),
                labels=tuple((str(key), str(value)) for key, value in _pairs(data, "labels")),
                healthcheck=_stored_health(data) if data["healthcheck"] else None,
                shell=_words(data, "shell"),
                architecture=_text(data, "architecture"),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not an image's configuration: {error}") from error

    @classmethod
    def from_image(cls, document: Mapping[str, object]) -> ImageConfig:
        """Read Docker's or OCI's configuration of an image. Raise ImageError that names a malformed field."""
        try:
            config = _mapping(document, "config")
            return cls(
                entrypoint=_command(config, "Entrypoint"),
                cmd=_command(config, "Cmd"),
                env=_words(config, "Env"),
                user=_text(config, "User"),
                working_dir=_text(config, "WorkingDir"),
                stop_signal=_text(config, "StopSignal"),
                exposed_ports=_ports(_mapping(config, "ExposedPorts")),
                volumes=tuple(sorted(_mapping(config, "Volumes"))),
                labels=_labels(_mapping(config, "Labels")),
                healthcheck=_health(_mapping(config, "Healthcheck")),
                shell=_words(config, "Shell"),
                architecture=_text(document, "architecture"),
            )
        except (TypeError, ValueError, OverflowError) as error:
            raise ImageError(
                f"the image's configuration is malformed: {error}", hint="rebuild the image with a current tool"
            ) from error


def _health(section: Mapping[str, object]) -> Healthcheck | None:
    test = _command(section, "Test")
    if not test or test[0] == "NONE":
        return None
    default = Healthcheck(test=test)
    return Healthcheck(
        test=test,
        interval_s=_number(section, "Interval") / _NS_PER_S or default.interval_s,
        timeout_s=_number(section, "Timeout") / _NS_PER_S or default.timeout_s,
        start_period_s=_number(section, "StartPeriod") / _NS_PER_S,
        retries=int(_number(section, "Retries")) or default.retries,
    )


def _stored_health(data: Mapping[str, object]) -> Healthcheck:
    section = _mapping(data, "healthcheck")
    return Healthcheck(
        test=_words(section, "test"),
        interval_s=_number(section, "interval_s"),
        timeout_s=_number(section, "timeout_s"),
        start_period_s=_number(section, "start_period_s"),
        retries=int(_number(section, "retries")),
    )


def _ports(section: Iterable[str]) -> tuple[tuple[int, str], ...]:
    """Read `80/tcp`, `80` and Docker's ranges `8000-8010/udp`.

    EXPOSE is only a hint: skip what is not a port, and a range too wide to map, such as a TURN server's
    `49152-65535/udp`.
    """
    found: set[tuple[int, str]] = set()
    for text in section:
        match = _PORT.fullmatch(text)
        first = int(match[1]) if match else 0
        last = int(match[2] or first) if match else 0
        if match and 0 < first <= last < 65536 and last - first <= _MAX_PORTS:
            found.update((port, (match[3] or "tcp").lower()) for port in range(first, last + 1))
    return tuple(sorted(found))


def _labels(section: Mapping[str, object]) -> tuple[tuple[str, str], ...]:
    return tuple((name, _text(section, name)) for name in sorted(section))


# The readers name the field but never show its value: an environment may have passwords.


def _command(section: Mapping[str, object], name: str) -> tuple[str, ...]:
    """Read a command line. Docker's oldest images have a string, which the shell runs."""
    value = section.get(name)
    if isinstance(value, str):
        return ("/bin/sh", "-c", _text(section, name)) if value else ()
    return _words(section, name)


def _words(section: Mapping[str, object], name: str) -> tuple[str, ...]:
    value = section.get(name) or []
    if not isinstance(value, list | tuple):
        raise TypeError(f"{name} is not a list of words")
    return tuple(_checked(word, name) for word in value)


def _text(section: Mapping[str, object], name: str) -> str:
    return _checked(section.get(name) or "", name)


def _checked(value: object, name: str) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise TypeError(f"{name} is not text")
    return value


def _number(section: Mapping[str, object], name: str) -> float:
    value = section.get(name) or 0
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} is not a number")
    return value


def _mapping(section: Mapping[str, object], name: str) -> Mapping[str, object]:
    value = section.get(name) or {}
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} is not an object")
    return value


def _pairs(section: Mapping[str, object], name: str) -> Iterable[tuple[object, object]]:
    value = section.get(name)
    if not isinstance(value, list | tuple):
        raise TypeError(f"{name} is not a list of pairs")
    return ((first, second) for first, second in value)
