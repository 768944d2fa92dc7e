"""The command `fcvm`. Only here a process exits; commands return results that are printed as text or JSON."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version

from pytest_fcvm.errors import FcvmError, UsageProblem

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 1 for a failure, 2 for wrong usage, 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except FcvmError as error:
        print(f"fcvm: {error}", file=sys.stderr)  # noqa: T201
        return 2 if isinstance(error, UsageProblem) else 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fcvm", description="Fresh microVMs from OCI images for tests. The machines themselves come by pytest."
    )
    parser.add_argument("--version", action="version", version=f"fcvm {version('pytest-fcvm')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    doctor = commands.add_parser("doctor", help="say what works here, and the exact command for what does not")
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    doctor.add_argument("--cache-dir", metavar="DIR", help="the cache to look at")
    doctor.set_defaults(run=_doctor)
    return parser


def _doctor(options: argparse.Namespace) -> int:
    from pytest_fcvm.cli.doctor import examine, render

    findings = examine(options.cache_dir)
    sys.stdout.write(render(findings, as_json=options.json, colour=sys.stdout.isatty()))
    return 0 if all(finding.ok for finding in findings if finding.needed) else 1
