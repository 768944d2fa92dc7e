"""The option table: each row is an option, an environment variable, an ini key and, for machines, a marker field.

The command line's `--fcvm-NAME`, the environment's `FCVM_NAME`, the ini file's `fcvm_name` and the marker's `name` mean the
same and are read by the same parser. Nearer wins: marker, `fcvm_spec`, command line, environment, ini, default.
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
    """How often an option may be given, and whether it has a value."""

    VALUE = "string"
    LIST = "linelist"
    FLAG = "bool"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a setting was written: what relative paths start at, where bare `NAME`s of `env` are looked up."""

    base: Path
    environment: Mapping[str, str] = field(default_factory=environment)


Parser = Callable[[Any, Origin], Any]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One option under all its names. `field` is a field of VmSpec when `of_machine`, else of Options."""

    name: str
    field: str
    parser: Parser
    help: str
    default: str = ""
    metavar: str = "VALUE"
    choices: tuple[str, ...] = ()
    kind: RowKind = RowKind.VALUE
    of_machine: bool = False

    @property
    def flag(self) -> str:
        """Return the command-line spelling."""
        return f"--fcvm-{self.name}"

    @property
    def marker(self) -> str:
        """Return the marker's and, behind `fcvm_`, the ini file's spelling."""
        return self.name.replace("-", "_")

    @property
    def variable(self) -> str:
        """Return the environment variable's name."""
        return f"FCVM_{self.marker.upper()}"


def _plain(parser: Callable[[Any], Any]) -> Parser:
    return lambda value, _origin: parser(value)


def _text(value: Any, _origin: Origin) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise UsageProblem(f"{value!r} is not a text", hint="write a non-empty string")
    return value


def _path(value: Any, origin: Origin) -> Path:
    return parse.parse_path(expand_home(value) if isinstance(value, str) else value, origin.base)


def _kernel(value: Any, origin: Origin) -> Path | str:
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
    at_home = (expand_home(item) if isinstance(item, str) else item for item in items)
    return tuple(parse.parse_map(item, origin.base) for item in at_home)


def _metadata(value: Any, origin: Origin) -> dict[str, Any]:
    return parse.parse_metadata(expand_home(value) if isinstance(value, str) else value, origin.base)


def _prepare(value: Any, _origin: Origin) -> Prepare | str:
    if isinstance(value, (Prepare, str)) and value:
        return value
    if callable(value):
        return Prepare(value)
    raise UsageProblem(f"{value!r} can not prepare a machine", hint="pass Prepare(function) or a shell command")


def _warm(value: Any, _origin: Origin) -> Callable[[Any], object] | str:
    if isinstance(value, str) and value:
        return value
    if callable(value):
        command: Callable[[Any], object] = value
        return command
    raise UsageProblem(f"{value!r} can not warm a machine", hint="pass a function or a shell command")


def _one_of(*words: str) -> Parser:
    def parser(value: Any, _origin: Origin) -> str:
        if value not in words:
            raise UsageProblem(f"{value!r} is not one of {', '.join(words)}", hint=f"write one of {', '.join(words)}")
        return str(value)

    return parser


def _running(name: str, field_name: str, parser: Parser, help: str, **more: Any) -> Row:  # noqa: A002
    return Row(name=name, field=field_name, parser=parser, help=help, of_machine=True, **more)


def _run(name: str, field_name: str, parser: Parser, help: str, **more: Any) -> Row:  # noqa: A002
    return Row(name=name, field=field_name, parser=parser, help=help, **more)


_ENGINES = ("auto", "firecracker", "qemu")
_ACCELS = ("auto", "kvm", "tcg")
_PULLS = ("missing", "always", "never")
_UNAVAILABLE = ("fail", "skip")
_ARTIFACTS = ("off", "failed", "on")
_KEEP = ("off", "failed", "all")
_STOCK = "stock"  # as in kernel/sources.py
_LIST = RowKind.LIST

ROWS: tuple[Row, ...] = (
    _running("image", "image", _image, "OCI image, rootfs tar or directory each machine starts from", metavar="IMAGE"),
    _running("mem", "mem_mib", _plain(parse.parse_size_mib), "memory of a machine", metavar="SIZE", default="256M"),
    _running("cpus", "cpus", _plain(parse.parse_count), "CPUs of a machine", metavar="N", default="1"),
    _running("disk", "disk_mib", _plain(parse.parse_disk_mib), "put what the guest writes on a disk of this size; else in memory", metavar="SIZE"),
    _running("balloon", "balloon", _plain(parse.parse_bool), "let clone.inflate_balloon take memory from machines (Firecracker)", kind=RowKind.FLAG),
    _running("env", "env", _env, "variable for the workload; NAME alone takes it from here", metavar="NAME[=VALUE]", kind=_LIST),
    _running("publish", "publish", _publish, "map a guest port", metavar="[HOSTIP:]HOSTPORT:GUESTPORT[/PROTO]", kind=_LIST),
    _running("own-address", "own_address", _plain(parse.parse_bool), "give each clone's ports a 127.x.y.z of its own, under the guest's numbers", kind=RowKind.FLAG),
    _running("host-port", "host_ports", _ports, "port of this host that programs in a clone reach as host.fcvm:PORT", metavar="PORT", kind=_LIST),
    _running("map", "map", _maps, "copy a host file or directory into the guest, in the place of what is there", metavar="HOST:GUEST[:ro,owner=USER]", kind=_LIST),
    _running("metadata", "metadata", _metadata, "JSON file with what machines read at http://169.254.169.254 (Firecracker, with a network card)", metavar="FILE"),
    _running("network", "network", _plain(parse.parse_network), "auto, user (slirp where it leads outside), relay (nothing outside), rootless or bridge (a network namespace for each); auto,egress to reach outside", metavar="MODE", default="auto"),
    _running("ready", "ready", _plain(parse.parse_ready), "when the service answers; else HEALTHCHECK, first exposed port", metavar="HOW"),
    _running("ready-timeout", "ready_timeout_s", _plain(parse.parse_duration), "how long the service may take to answer", metavar="TIME", default="120s"),
    _running("prepare", "prepare", _prepare, "command run in the ready guest before the snapshot", metavar="COMMAND"),
    _running("warm", "warm", _warm, "command run in each clone that is made ahead of its test", metavar="COMMAND"),
    _running("hook", "hook", _text, "command run in each clone before its workload goes on", metavar="COMMAND"),
    _running("clock", "clock", _plain(parse.parse_clock), "time of day in a clone: the host's, or the snapshot's", metavar="host|snapshot", default="host"),
    _running("user", "user", _text, "run the workload as this user", metavar="USER[:GROUP]"),
    _running("workdir", "workdir", _text, "working directory of the workload", metavar="PATH"),
    _running("entrypoint", "entrypoint", _plain(parse.parse_entrypoint), "program in place of the image's entrypoint and its arguments", metavar="COMMAND"),
    _running("command", "command", _plain(parse.parse_command), "arguments in place of the image's own", metavar="COMMAND"),
    _running("hostname", "hostname", _plain(settings.parse_hostname), "host name of the workload, which its clones keep", metavar="NAME", default="fcvm-base"),
    _running("shm-size", "shm_mib", _plain(parse.parse_size_mib), "size of /dev/shm", metavar="SIZE", default="what the memory allows"),
    _running("ulimit", "ulimits", _plain(settings.parse_ulimit), "limit of the workload and of commands, -1 for none", metavar="NAME=SOFT[:HARD]", kind=_LIST),
    _running("sysctl", "sysctls", _plain(settings.parse_sysctl), "setting of the guest's kernel", metavar="NAME=VALUE", kind=_LIST),
    _run("engine", "engine", _one_of(*_ENGINES), "what runs the machines", choices=_ENGINES, default="auto"),
    _run("accel", "accel", _one_of(*_ACCELS), "hardware or software CPUs", choices=_ACCELS, default="auto"),
    _run("require-kvm", "require_kvm", _plain(parse.parse_bool), "refuse emulation", kind=RowKind.FLAG),
    _run("unavailable", "unavailable", _one_of(*_UNAVAILABLE), "without a working engine, tests that want a machine", choices=_UNAVAILABLE, default="fail"),
    _run("qemu", "qemu", _path, "QEMU to use", metavar="PATH", default="qemu-system-x86_64 on PATH"),
    _run("firecracker", "firecracker", _path, "Firecracker to use", metavar="PATH", default="firecracker on PATH"),
    _run("jailer", "jailer", _plain(parse.parse_bool), "run Firecracker in its jailer: each machine as a user of its own, in a directory of its own; takes root", kind=RowKind.FLAG),
    _run("kernel", "kernel", _kernel, "guest kernel (bzImage), or a distribution's", metavar="PATH|stock", default="pytest-fcvm-kernel if installed, else stock"),
    _run("cache-dir", "cache_dir", _path, "where images and snapshots are kept", metavar="DIR", default="$XDG_CACHE_HOME/pytest-fcvm"),
    _run("cache-limit", "cache_limit_mib", _plain(parse.parse_limit_mib), "what all snapshots may take; more, and those not wanted for longest go", metavar="SIZE|off", default="20G"),
    _run("pull", "pull", _one_of(*_PULLS), "when to ask the registry", choices=_PULLS, default="missing"),
    _run("rebuild", "rebuild", _plain(parse.parse_bool), "build snapshots anew", kind=RowKind.FLAG),
    _run("pool", "pool", _plain(parse.parse_pool), "clones kept ahead of the tests per image and worker; 0 for none", metavar="N|auto", default="auto"),
    _run("max-clones", "max_clones", _plain(parse.parse_count), "machines alive at once on this host", metavar="N", default="as memory allows"),
    _run("artifacts", "artifacts", _one_of(*_ARTIFACTS), "keep logs and consoles of tests in fcvm-artifacts/", choices=_ARTIFACTS, default="off"),
    _run("keep", "keep", _one_of(*_KEEP), "save the machines of tests as they end, for fcvm replay", choices=_KEEP, default="off"),
    _run("timings", "timings", _plain(parse.parse_bool), "show where each machine's start-up time went", kind=RowKind.FLAG),
)  # fmt: skip

_BY_MARKER = {row.marker: row for row in ROWS}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Everything said outside of tests, read once per process. `given` names the rows that somebody set."""

    spec: VmSpec = field(default_factory=VmSpec)
    engine: str = "auto"
    accel: str = "auto"
    require_kvm: bool = False
    unavailable: str = "fail"
    qemu: Path | None = None
    firecracker: Path | None = None
    jailer: bool = False
    kernel: Path | str | None = None
    cache_dir: Path | None = None
    cache_limit_mib: int | None = 20 << 10
    pull: str = "missing"
    rebuild: bool = False
    pool: int | None = None
    max_clones: int | None = None
    artifacts: str = "off"
    keep: str = "off"
    timings: bool = False
    given: frozenset[str] = frozenset()
    unresolved: Mapping[str, UsageProblem] = field(default_factory=dict)

    def check_resolved(self) -> None:
        """Raise UsageProblem where a setting names what is not here. The first clone asks; a run without one need not."""
        for problem in self.unresolved.values():
            raise UsageProblem(problem.message, hint=problem.hint)


def read_layer(
    raw: Mapping[str, Any], origin: Origin, spelling: Callable[[Row], str], *, defer: type[UsageProblem] | None = None
) -> dict[str, Any]:
    """Parse one source's settings, keyed by marker name, into values keyed by field.

    Raise UsageProblem that names the setting in the source's own spelling; one of the kind `defer` is put in the
    value's place, for `Options.check_resolved` to raise.
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
            problem = UsageProblem(f"{spelling(row)}: {value!r} is of the wrong kind", hint=row.help)
            if defer is not UsageProblem:
                raise problem from error
            layer[row.field] = problem
    return layer


def environment_layer(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings made by `FCVM_*` variables, unparsed; lists are split at line ends."""
    found: dict[str, Any] = {}
    for row in ROWS:
        value = environment.get(row.variable, "")
        if value:
            found[row.marker] = value.splitlines() if row.kind is RowKind.LIST else value
    return found


def build_options(layers: Sequence[Mapping[str, Any]]) -> Options:
    """Lay parsed layers over the defaults, the last one on top."""
    spec, run = VmSpec(), {}
    machine_fields = {row.field for row in ROWS if row.of_machine}
    unresolved: dict[str, UsageProblem] = {}
    for raw in layers:
        layer = {name: value for name, value in raw.items() if not isinstance(value, UsageProblem)}
        for name in layer.keys() - {"env"}:  # the nearest layer wins; variables of all layers are taken together
            unresolved.pop(name, None)
        unresolved.update({name: value for name, value in raw.items() if isinstance(value, UsageProblem)})
        spec = spec.merged({name: value for name, value in layer.items() if name in machine_fields})
        run.update({name: value for name, value in layer.items() if name not in machine_fields})
    given = frozenset(name for layer in layers for name in layer)
    return Options(spec=spec, given=given, unresolved=unresolved, **run)


def spec_changes(arguments: Mapping[str, Any], origin: Origin, spelling: str) -> dict[str, Any]:
    """Parse marker or factory arguments into changes of a VmSpec. Raise UsageProblem naming a wrong argument."""
    allowed = [row.marker for row in ROWS if row.of_machine]
    for name in arguments:
        if name not in allowed:
            raise UsageProblem(f"{spelling} has no argument {name!r}", hint=f"arguments: {', '.join(allowed)}")
    return read_layer(arguments, origin, lambda row: f"{spelling}({row.marker}=…)")


def proxy_variables() -> dict[str, str]:
    """Return the variables that tell programs of a proxy, in either case, as the session began with them."""
    names = [f"{scheme}_proxy" for scheme in ("http", "https", "ftp", "all", "no")]
    ours = environment()
    return {name: ours[name] for word in names for name in (word, word.upper()) if name in ours}


def named_programs(**options: Path | None) -> dict[str, Path]:
    """Return the VMMs that options name. Raise UsageProblem for what is no program."""
    for name, path in options.items():
        if path is not None and not (path.is_file() and os.access(path, os.X_OK)):
            raise UsageProblem(
                f"--fcvm-{name}: {path} is not a program", hint="name one, or leave it out for the one on PATH"
            )
    return {name: path for name, path in options.items() if path is not None}
