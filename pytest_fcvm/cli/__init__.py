"""The command `fcvm`. The process exits here alone; commands return results, which are printed as text or JSON."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeAlias

from pytest_fcvm.errors import FcvmError, UsageProblem

if TYPE_CHECKING:
    from pytest_fcvm.cli.snapshots import Outcome

__all__ = ["main", "make_parser"]

_SHELL_ROWS = ("engine", "accel", "qemu", "firecracker", "kernel", "pull", "rebuild")
_COMMAND_HELP = "The words after -- are a command to run instead of a shell."
_REPLAY_ROWS = ("qemu", "firecracker", "kernel")
_Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 1 for a failure, 2 for wrong usage, 130 after Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    takes_command = words[:1] in (["shell"], ["replay"])
    end = words.index("--") if takes_command and "--" in words else len(words)
    options = make_parser(full=words[:1]).parse_args(words[:end])
    options.command = words[end + 1 :]
    from pytest_fcvm.host.limits import translating_emfile  # help needs none

    try:
        with translating_emfile(f"fcvm {words[0]}"):
            return int(options.run(options))
    except FcvmError as error:
        print(f"fcvm: {error}", file=sys.stderr)  # noqa: T201
        return 2 if isinstance(error, UsageProblem) else 1
    except KeyboardInterrupt:
        return 130


def make_parser(*, full: Sequence[str]) -> argparse.ArgumentParser:
    """Return the parser of the command line. The commands in `full` get their VM options."""
    parser = argparse.ArgumentParser(
        prog="fcvm", description="Fresh microVMs from OCI images for tests. pytest starts them."
    )
    parser.add_argument("--version", action="version", version=f"fcvm {version('pytest-fcvm')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_doctor(commands)
    _add_setup(commands)
    _add_shell(commands, with_options="shell" in full)
    _add_replay(commands, with_options="replay" in full)
    _add_snapshot(commands)
    return parser


def _add(
    commands: _Commands, name: str, run: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.add_argument("--cache-dir", metavar="DIR", help="the cache directory")
    parser.set_defaults(run=run)
    return parser


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_doctor(commands: _Commands) -> None:
    _add_json(_add(commands, "doctor", _doctor, "check what works here, and print how to fix what does not"))


def _add_setup(commands: _Commands) -> None:
    parser = _add(commands, "setup", _setup, "install what VMs need: programs, guest kernel, a working engine")
    parser.add_argument("--dry-run", action="store_true", help="only print what would be done")
    parser.add_argument("--sudo", action="store_true", help="install packages by sudo when not root")
    parser.add_argument("what", nargs="?", choices=("firecracker",), help="install this alone")
    parser.add_argument("--version", metavar="V", help="of Firecracker [the newest that was tested]")
    parser.add_argument("--base-url", metavar="URL", help="where its releases are [its own project]")


def _add_shell(commands: _Commands, *, with_options: bool) -> None:
    """Add the command, with its VM options only when they are needed: their table takes long to import."""
    parser = _add(commands, "shell", _shell, "start a fresh VM of an image, and open a shell in it")
    parser.add_argument("image", metavar="IMAGE", nargs="?", help="OCI image, rootfs tar or directory")
    parser.epilog = _COMMAND_HELP
    if with_options:
        _add_rows(parser, _SHELL_ROWS, of_vm=True)


def _add_replay(commands: _Commands, *, with_options: bool) -> None:
    text = "replay a clone that pytest --fcvm-keep has saved, and open a shell in it"
    parser = _add(commands, "replay", _replay, text)
    parser.add_argument("test", metavar="TEST", nargs="?", help="a test's id, or part of it [list what is kept]")
    parser.epilog = _COMMAND_HELP
    parser.add_argument("--clone", metavar="NAME", help="which clone, where a test had several")
    _add_json(parser)
    if with_options:
        _add_rows(parser, _REPLAY_ROWS, of_vm=False)


def _add_rows(parser: argparse.ArgumentParser, names: Sequence[str], *, of_vm: bool) -> None:
    from pytest_fcvm.options import ROWS

    for row in ROWS:
        if not ((row.is_spec_field and of_vm) or row.name in names) or row.name in ("image", "command"):
            continue
        parser.add_argument(f"--{row.name}", dest=f"row_{row.marker}", **row.argument())


def _add_snapshot(commands: _Commands) -> None:
    text = "manage the cache of snapshots"
    snapshot = commands.add_parser("snapshot", help=text, description=text[0].upper() + text[1:] + ".")
    verbs = snapshot.add_subparsers(required=True, metavar="COMMAND")
    ls = _add(verbs, "ls", _snapshot_ls, "list snapshots, the last used first")
    ls.add_argument("--all", action="store_true", help="list root file systems and kernels too")
    inspect = _add(verbs, "inspect", _snapshot_inspect, "show everything about an entry")
    inspect.add_argument("key", metavar="KEY", help="a key, or its beginning")
    verify = _add(verbs, "verify", _snapshot_verify, "hash entries again, and quarantine what has changed")
    verify.add_argument("keys", metavar="KEY", nargs="*", help="keys, or their beginnings [all]")
    rm = _add(verbs, "rm", _snapshot_rm, "remove entries that no run uses")
    rm.add_argument("keys", metavar="KEY", nargs="+", help="keys, or their beginnings")
    prune = _add(verbs, "prune", _snapshot_prune, "remove the snapshots that were unused for longest")
    prune.add_argument("--older-than", metavar="TIME", help="remove what was unused for this time: 12h, 7d")
    prune.add_argument("--max-size", metavar="SIZE", help="the size of all snapshots together: 5G")
    prune.add_argument("--keep", metavar="N", help="the number of snapshots to keep")
    prune.add_argument("--dry-run", action="store_true", help="only print what would be removed")
    for parser in (ls, inspect, verify, rm, prune):
        _add_json(parser)


def _doctor(options: argparse.Namespace) -> int:
    from pytest_fcvm.cli.doctor import examine, render

    findings = examine(options.cache_dir)
    sys.stdout.write(render(findings, as_json=options.json, colour=sys.stdout.isatty()))
    return 0 if all(finding.ok for finding in findings if finding.needed) else 1


def _setup(options: argparse.Namespace) -> int:
    from pytest_fcvm.cli.setup import set_up, set_up_firecracker

    if options.what:
        return set_up_firecracker(options.cache_dir, options.version, options.base_url, dry_run=options.dry_run)
    return set_up(cache_dir=options.cache_dir, dry_run=options.dry_run, sudo=options.sudo)


def _shell(options: argparse.Namespace) -> int:
    from pytest_fcvm.cli.shell import open_shell

    return open_shell(_settings(options, image=options.image), options.command)


def _replay(options: argparse.Namespace) -> int:
    from pytest_fcvm.cli.replay import find_kept, open_kept, render_kept

    if options.test is not None:
        return open_kept(_settings(options), options.test, options.clone, options.command)
    if options.command:
        raise UsageProblem("a command needs a test", hint="fcvm replay TEST -- COMMAND")
    sys.stdout.write(render_kept(find_kept(options.cache_dir), as_json=options.json))
    return 0


def _settings(options: argparse.Namespace, **more: str | None) -> dict[str, Any]:
    """Return the given options of the option table, by their marker names."""
    rows = {name.removeprefix("row_"): value for name, value in vars(options).items() if name.startswith("row_")}
    settings = {**rows, **more, "cache_dir": options.cache_dir}
    return {name: value for name, value in settings.items() if value is not None}


def _snapshot_ls(options: argparse.Namespace) -> int:
    from pytest_fcvm.cli.snapshots import find_all, render_listings

    sys.stdout.write(render_listings(find_all(options.cache_dir, everything=options.all), as_json=options.json))
    return 0


def _snapshot_inspect(options: argparse.Namespace) -> int:
    from pytest_fcvm.cli.snapshots import inspect, render_facts

    sys.stdout.write(render_facts(inspect(options.cache_dir, options.key), as_json=options.json))
    return 0


def _snapshot_verify(options: argparse.Namespace) -> int:
    from pytest_fcvm.cli.snapshots import verify

    return _tell(verify(options.cache_dir, options.keys), options)


def _snapshot_rm(options: argparse.Namespace) -> int:
    from pytest_fcvm.cli.snapshots import remove

    return _tell(remove(options.cache_dir, options.keys), options)


def _snapshot_prune(options: argparse.Namespace) -> int:
    from pytest_fcvm.cli.snapshots import prune
    from pytest_fcvm.model.parse import parse_count, parse_duration, parse_size_mib
    from pytest_fcvm.pruning import Bounds

    bounds = Bounds(
        older_than_s=parse_duration(options.older_than) if options.older_than else None,
        max_mib=parse_size_mib(options.max_size) if options.max_size else None,
        keep=0 if options.keep == "0" else parse_count(options.keep) if options.keep else None,
    )
    return _tell(prune(options.cache_dir, bounds, dry_run=options.dry_run), options)


def _tell(outcomes: Sequence[Outcome], options: argparse.Namespace) -> int:
    from pytest_fcvm.cli.snapshots import render_outcomes

    sys.stdout.write(render_outcomes(outcomes, as_json=options.json))
    return int(any(outcome.bad for outcome in outcomes))
