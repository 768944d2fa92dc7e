"""The option table: each row is an option, an environment variable, an ini key and, for a VmSpec field, a marker field.

The command line's `--fcvm-NAME`, the environment's `FCVM_NAME`, the ini file's `fcvm_name` and the marker's `name` mean
the same and have the same parser. The nearest source wins: marker, `fcvm_spec`, command line, environment, ini, default.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from pytest_fcvm.errors import UsageProblem
from pytest_fcvm.host.own import environment, expand_home, os
from pytest_fcvm.model import parse, settings
from pytest_fcvm.model.specs import Prepare, VmSpec

__all__ = [
    "ROWS",
    "Options",
    "Origin",
    "Row",
    "RowKind",
    "build_options",
    "environment_layer",
    "named_programs",
    "proxy_variables",
    "read_layer",
    "spec_changes",
]


class RowKind(StrEnum):
    """Whether an option takes a value, takes several, or is a flag. The value is pytest's name for the ini type."""

    VALUE = "string"
    LIST = "linelist"
    FLAG = "bool"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The source of a setting: `base` is where its relative paths start, `environment` resolves bare `NAME`s of `env`."""

    base: Path
    environment: Mapping[str, str] = field(default_factory=environment)


Parser = Callable[[Any, Origin], Any]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One option under all its names. `field` is a field of VmSpec if `is_spec_field`, else a field of Options."""

    name: str
    field: str
    parser: Parser
    help: str
    default: str = ""
    metavar: str = "VALUE"
    choices: tuple[str, ...] = ()
    kind: RowKind = RowKind.VALUE
    is_spec_field: bool = False

    @property
    def flag(self) -> str:
        """Return the command-line spelling."""
        return f"--fcvm-{self.name}"

    @property
    def marker(self) -> str:
        """Return the marker's spelling; the ini file's is `fcvm_` and this."""
        return self.name.replace("-", "_")

    @property
    def variable(self) -> str:
        """Return the environment variable's name."""
        return f"FCVM_{self.marker.upper()}"

    def argument(self) -> dict[str, Any]:
        """Return the arguments of argparse's `add_argument` for this option, without its names and `dest`."""
        text = f"{self.help} [{self.default}]" if self.default else self.help
        common = {"default": None, "help": text.replace("%", "%%")}
        if self.kind is RowKind.FLAG:
            return {"action": "store_true", **common}
        if self.kind is RowKind.LIST:
            return {"action": "append", "metavar": self.metavar, **common}
        return {"choices": self.choices, **common} if self.choices else {"metavar": self.metavar, **common}


def _plain(parser: Callable[[Any], Any]) -> Parser:
    return lambda value, _origin: parser(value)


def _text(value: Any, _origin: Origin) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise UsageProblem(f"{value!r} is not a non-empty string", hint="write a non-empty string")
    return value


def _path(value: Any, origin: Origin) -> Path:
    return parse.parse_path(expand_home(value) if isinstance(value, str) else value, origin.base)


def _stock_or_path(value: Any, origin: Origin) -> Path | str:
    return value if value == _STOCK else _path(value, origin)


_PATH_IMAGE = re.compile(
    r"(?P<transport>(?:oci|oci-archive|docker-archive|dir):)?(?P<path>[^:@]+)(?P<rest>.*)", re.DOTALL
)


def _image(value: Any, origin: Origin) -> str:
    text = _text(str(value) if isinstance(value, Path) else value, origin)
    match = _PATH_IMAGE.fullmatch(text)
    if match and (match["transport"] or text.startswith(("./", "../", "~", "/"))):
        return f"{match['transport'] or ''}{_path(match['path'], origin)}{match['rest']}"
    return text


def _env(value: Any, origin: Origin) -> dict[str, str]:
    return parse.parse_env([value] if isinstance(value, str) else value, origin.environment)


def _publish(value: Any, _origin: Origin) -> tuple[Any, ...]:
    items = value if isinstance(value, (list, tuple, set)) else [value]
    return tuple(parse.parse_publish(item) for item in items)


def _ports(value: Any, _origin: Origin) -> tuple[int, ...]:
    items = value if isinstance(value, (list, tuple, set)) else [value]
    return tuple(dict.fromkeys(parse.parse_port(item) for item in items))


def _maps(value: Any, origin: Origin) -> tuple[Any, ...]:
    items = value if isinstance(value, (list, tuple)) else [value]
    expanded = (expand_home(item) if isinstance(item, str) else item for item in items)
    return tuple(parse.parse_map(item, origin.base) for item in expanded)


def _metadata(value: Any, origin: Origin) -> dict[str, Any]:
    return parse.parse_metadata(expand_home(value) if isinstance(value, str) else value, origin.base)


def _prepare(value: Any, _origin: Origin) -> Prepare | str:
    if isinstance(value, (Prepare, str)) and value:
        return value
    if callable(value):
        return Prepare(value)
    raise UsageProblem(f"{value!r} is not a prepare step", hint="pass Prepare(function) or a shell command")


def _warm(value: Any, _origin: Origin) -> Callable[[Any], object] | str:
    if isinstance(value, str) and value:
        return value
    if callable(value):
        command: Callable[[Any], object] = value
        return command
    raise UsageProblem(f"{value!r} is not a warm step", hint="pass a function or a shell command")


def _one_of(*words: str) -> Parser:
    def parser(value: Any, _origin: Origin) -> str:
        if value not in words:
            raise UsageProblem(f"{value!r} is not one of {', '.join(words)}", hint=f"write one of {', '.join(words)}")
        return str(value)

    return parser


def _spec_option(name: str, field_name: str, parser: Parser, help: str, **more: Any) -> Row:  # noqa: A002
    return Row(name=name, field=field_name, parser=parser, help=help, is_spec_field=True, **more)


def _run_option(name: str, field_name: str, parser: Parser, help: str, **more: Any) -> Row:  # noqa: A002
    return Row(name=name, field=field_name, parser=parser, help=help, **more)


_ENGINES = ("auto", "firecracker", "qemu")
_ACCELS = ("auto", "kvm", "tcg")
_PULLS = ("missing", "always", "never")
_UNAVAILABLE = ("fail", "skip")
_ARTIFACTS = ("off", "failed", "on")
_KEEP = ("off", "failed", "all")
_ON_OFF = ("on", "off")
_STOCK = "stock"  # as in kernel/sources.py
_LIST = RowKind.LIST

ROWS: tuple[Row, ...] = (
    _spec_option("image", "image", _image, "OCI image, rootfs tar or directory that each clone starts from", metavar="IMAGE"),
    _spec_option("mem", "mem_mib", _plain(parse.parse_size_mib), "memory of a VM", metavar="SIZE", default="256M"),
    _spec_option("cpus", "cpus", _plain(parse.parse_count), "CPUs of a VM", metavar="N", default="1"),
    _spec_option("disk", "disk_mib", _plain(parse.parse_disk_mib), "size of a scratch disk for what the guest writes; without one, memory holds it", metavar="SIZE"),
    _spec_option("balloon", "balloon", _plain(parse.parse_bool), "let clone.inflate_balloon take memory from clones (Firecracker)", kind=RowKind.FLAG),
    _spec_option("env", "env", _env, "environment variable of the workload; NAME alone takes its value from the environment of pytest", metavar="NAME[=VALUE]", kind=_LIST),
    _spec_option("publish", "publish", _publish, "map a guest port to the host", metavar="[HOSTIP:]HOSTPORT:GUESTPORT[/PROTO]", kind=_LIST),
    _spec_option("own-address", "own_address", _plain(parse.parse_bool), "give each clone its own 127.x.y.z, where ports have the guest's numbers", kind=RowKind.FLAG),
    _spec_option("host-port", "host_ports", _ports, "port of this host that programs in a clone reach as host.fcvm:PORT", metavar="PORT", kind=_LIST),
    _spec_option("map", "map", _maps, "copy a host file or directory into the guest, replacing what is there", metavar="HOST:GUEST[:ro,owner=USER]", kind=_LIST),
    _spec_option("metadata", "metadata", _metadata, "JSON file that guests read at http://169.254.169.254 (Firecracker, with a NIC)", metavar="FILE"),
    _spec_option("network", "network", _plain(parse.parse_network), "auto, user (slirp if it has egress), relay (no egress), rootless or bridge (each VM has a network namespace); auto,egress allows outbound access", metavar="MODE", default="auto"),
    _spec_option("ready", "ready", _plain(parse.parse_ready), "condition under which the service is ready; else HEALTHCHECK, then the exposed TCP ports", metavar="HOW"),
    _spec_option("ready-timeout", "ready_timeout_s", _plain(parse.parse_duration), "time limit for the service to become ready", metavar="TIME", default="120s"),
    _spec_option("prepare", "prepare", _prepare, "command to run in the ready guest before the snapshot", metavar="COMMAND"),
    _spec_option("warm", "warm", _warm, "command to run in each prewarmed clone", metavar="COMMAND"),
    _spec_option("hook", "hook", _text, "command to run in each clone before its workload resumes", metavar="COMMAND"),
    _spec_option("clock", "clock", _plain(parse.parse_clock), "time of day in a clone: the host's, or the snapshot's", metavar="host|snapshot", default="host"),
    _spec_option("user", "user", _text, "user that runs the workload", metavar="USER[:GROUP]"),
    _spec_option("workdir", "workdir", _text, "working directory of the workload", metavar="PATH"),
    _spec_option("entrypoint", "entrypoint", _plain(parse.parse_entrypoint), "program that replaces the image's entrypoint and its arguments", metavar="COMMAND"),
    _spec_option("command", "command", _plain(parse.parse_command), "arguments that replace the image's own", metavar="COMMAND"),
    _spec_option("hostname", "hostname", _plain(settings.parse_hostname), "host name of the workload; clones keep it", metavar="NAME", default="fcvm-base"),
    _spec_option("shm-size", "shm_mib", _plain(parse.parse_size_mib), "size of /dev/shm", metavar="SIZE", default="as memory allows"),
    _spec_option("ulimit", "ulimits", _plain(settings.parse_ulimit), "limit of the workload and of commands; -1 for none", metavar="NAME=SOFT[:HARD]", kind=_LIST),
    _spec_option("sysctl", "sysctls", _plain(settings.parse_sysctl), "kernel setting of the guest", metavar="NAME=VALUE", kind=_LIST),
    _run_option("engine", "engine", _one_of(*_ENGINES), "engine that runs the clones", choices=_ENGINES, default="auto"),
    _run_option("accel", "accel", _one_of(*_ACCELS), "run guests on hardware CPUs (kvm) or emulate them (tcg)", choices=_ACCELS, default="auto"),
    _run_option("require-kvm", "require_kvm", _plain(parse.parse_bool), "refuse emulation", kind=RowKind.FLAG),
    _run_option("unavailable", "unavailable", _one_of(*_UNAVAILABLE), "without a working engine, tests that need a clone", choices=_UNAVAILABLE, default="fail"),
    _run_option("qemu", "qemu", _stock_or_path, "QEMU program to use, or stock for the one on PATH", metavar="PATH|stock", default="pytest-fcvm-qemu if installed, else stock"),
    _run_option("firecracker", "firecracker", _path, "Firecracker program to use", metavar="PATH", default="firecracker on PATH"),
    _run_option("jailer", "jailer", _plain(parse.parse_bool), "run Firecracker in its jailer: each VM as its own user, in its own directory; requires root", kind=RowKind.FLAG),
    _run_option("kernel", "kernel", _stock_or_path, "guest kernel (bzImage), or stock for a distribution's", metavar="PATH|stock", default="pytest-fcvm-kernel if installed, else stock"),
    _run_option("cache-dir", "cache_dir", _path, "directory for images and snapshots", metavar="DIR", default="$XDG_CACHE_HOME/pytest-fcvm"),
    _run_option("cache-limit", "cache_limit_mib", _plain(parse.parse_limit_mib), "size limit of all snapshots; the ones last used longest ago are removed", metavar="SIZE|off", default="20G"),
    _run_option("pull", "pull", _one_of(*_PULLS), "when to ask the registry", choices=_PULLS, default="missing"),
    _run_option("rebuild", "rebuild", _plain(parse.parse_bool), "rebuild snapshots", kind=RowKind.FLAG),
    _run_option("pool", "pool", _plain(parse.parse_pool), "number of prewarmed clones per image and worker; 0 for none", metavar="N|auto", default="auto"),
    _run_option("rewind", "rewind", _one_of(*_ON_OFF), "put the VM of an ended clone back to its snapshot for the next clone, where QEMU can (pytest-fcvm-qemu)", choices=_ON_OFF, default="on"),
    _run_option("verify-rewind", "verify_rewind", _plain(parse.parse_bool), "compare memory and devices of each rewound VM with the snapshot; slow", kind=RowKind.FLAG),
    _run_option("max-clones", "max_clones", _plain(parse.parse_count), "limit of clones that run at once on this host", metavar="N", default="as memory allows"),
    _run_option("artifacts", "artifacts", _one_of(*_ARTIFACTS), "keep logs and consoles of tests in fcvm-artifacts/", choices=_ARTIFACTS, default="off"),
    _run_option("keep", "keep", _one_of(*_KEEP), "save clones when their tests end, for fcvm replay", choices=_KEEP, default="off"),
    _run_option("timings", "timings", _plain(parse.parse_bool), "show how long each phase of a clone's start took", kind=RowKind.FLAG),
)  # fmt: skip

_BY_MARKER = {row.marker: row for row in ROWS}


@dataclass(frozen=True, kw_only=True)
class Options:
    """All settings from outside the tests, read once per process. `given` has the fields that a source has set."""

    spec: VmSpec = field(default_factory=VmSpec)
    engine: str = "auto"
    accel: str = "auto"
    require_kvm: bool = False
    unavailable: str = "fail"
    qemu: Path | str | None = None
    firecracker: Path | None = None
    jailer: bool = False
    kernel: Path | str | None = None
    cache_dir: Path | None = None
    cache_limit_mib: int | None = 20 << 10
    pull: str = "missing"
    rebuild: bool = False
    pool: int | None = None
    rewind: str = "on"
    verify_rewind: bool = False
    max_clones: int | None = None
    artifacts: str = "off"
    keep: str = "off"
    timings: bool = False
    given: frozenset[str] = frozenset()
    unresolved: Mapping[str, UsageProblem] = field(default_factory=dict)

    def check_resolved(self) -> None:
        """Raise UsageProblem for a setting that names what does not exist. Only runs that start a clone check this."""
        for problem in self.unresolved.values():
            raise UsageProblem(problem.message, hint=problem.hint)


def read_layer(
    raw: Mapping[str, Any], origin: Origin, spelling: Callable[[Row], str], *, defer: type[UsageProblem] | None = None
) -> dict[str, Any]:
    """Parse one source's settings, keyed by marker name, into values keyed by field.

    Raise UsageProblem that names the setting in the source's own spelling. A problem of the class `defer` is not raised
    but stored as the value, for `Options.check_resolved` to raise.
    """
    layer = {}
    for name, value in raw.items():
        row = _BY_MARKER[name]
        try:
            layer[row.field] = row.parser(value, origin)
        except UsageProblem as error:
            problem = type(error)(f"{spelling(row)}: {error.message}", hint=error.hint)
            if defer is None or not isinstance(error, defer):
                raise problem from error
            layer[row.field] = problem
        except (TypeError, ValueError, AttributeError) as error:
            problem = UsageProblem(f"{spelling(row)}: {value!r} has the wrong type", hint=row.help)
            if defer is not UsageProblem:
                raise problem from error
            layer[row.field] = problem
    return layer


def environment_layer(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the values of `FCVM_*` variables by marker name, unparsed. Lists have one item a line."""
    found: dict[str, Any] = {}
    for row in ROWS:
        value = environment.get(row.variable, "")
        if value:
            found[row.marker] = value.splitlines() if row.kind is RowKind.LIST else value
    return found


def build_options(layers: Sequence[Mapping[str, Any]]) -> Options:
    """Merge parsed layers into the defaults. The last layer wins."""
    spec, run = VmSpec(), {}
    spec_names = {row.field for row in ROWS if row.is_spec_field}
    unresolved: dict[str, UsageProblem] = {}
    for raw in layers:
        layer = {name: value for name, value in raw.items() if not isinstance(value, UsageProblem)}
        for name in layer.keys() - {"env"}:  # the nearest layer wins; `env` is merged from all layers
            unresolved.pop(name, None)
        unresolved.update({name: value for name, value in raw.items() if isinstance(value, UsageProblem)})
        spec = spec.merged({name: value for name, value in layer.items() if name in spec_names})
        run.update({name: value for name, value in layer.items() if name not in spec_names})
    given = frozenset(name for layer in layers for name in layer)
    return Options(spec=spec, given=given, unresolved=unresolved, **run)


def spec_changes(arguments: Mapping[str, Any], origin: Origin, spelling: str) -> dict[str, Any]:
    """Parse marker or factory arguments into changes of a VmSpec. Raise UsageProblem naming a wrong argument."""
    allowed = [row.marker for row in ROWS if row.is_spec_field]
    for name in arguments:
        if name not in allowed:
            also = "depends_on, in fcvm_group, names others; " if name == "needs" else ""
            raise UsageProblem(f"{spelling} has no argument {name!r}", hint=f"{also}arguments: {', '.join(allowed)}")
    return read_layer(arguments, origin, lambda row: f"{spelling}({row.marker}=…)")


def proxy_variables() -> dict[str, str]:
    """Return the proxy variables (`https_proxy` and the like, in either case) with which the session began."""
    names = [f"{scheme}_proxy" for scheme in ("http", "https", "ftp", "all", "no")]
    variables = environment()
    return {name: variables[name] for word in names for name in (word, word.upper()) if name in variables}


def named_programs(**options: Path | str | None) -> dict[str, Path]:
    """Return the VMMs that options name by a path. Raise UsageProblem for a path that is not a program."""
    paths = {name: value for name, value in options.items() if isinstance(value, Path)}
    for name, path in paths.items():
        if not (path.is_file() and os.access(path, os.X_OK)):
            raise UsageProblem(
                f"--fcvm-{name}: {path} is not a program",
                hint="name a program, or leave the option out to use the one on PATH",
            )
    return paths
