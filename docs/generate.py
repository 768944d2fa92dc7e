#!/usr/bin/env python3
"""Write docs/reference from the code (`make docs`). tests/unit/test_docs.py fails when a page is out of date."""

from __future__ import annotations

import argparse
import ast
import inspect
import os
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from pytest_fcvm import Clone, Network, Prepare, Snapshot, cli, errors, fixtures, hookspecs, store
from pytest_fcvm.model import parse
from pytest_fcvm.options import ROWS, Row, RowKind
from pytest_fcvm.snapshot import builder as build
from pytest_fcvm.snapshot import inputs as ingredients

REFERENCE = Path(__file__).parent / "reference"
_NOTE = "<!-- Written by docs/generate.py (make docs). Change the code, not this page. -->"
_MARKER = f"""\
`@pytest.mark.fcvm(…)` changes the machine of one test, class or module. A test with the marker that names no fixture of
machines gets `fcvm_clone`; a test that names one gets the marker, so `-m fcvm` selects all tests with machines.

Arguments, by name only: {", ".join(f"`{row.marker}`" for row in ROWS if row.of_machine)}. See [options](options.md)."""
_SPELLINGS: tuple[Callable[..., Any], ...] = (
    parse.parse_size_mib,
    parse.parse_disk_mib,
    parse.parse_duration,
    parse.parse_pool,
    parse.parse_ready,
    parse.parse_publish,
    parse.parse_env,
    parse.parse_map,
    parse.parse_network,
    parse.parse_command,
    parse.parse_bool,
)


def pages() -> dict[str, str]:
    """Return the text of every generated page by file name."""
    made = {"options.md": _options(), "hooks.md": _hooks(), "errors.md": _errors(), "fixtures.md": _fixtures()}
    made |= {"protocol.md": _protocol(), "command.md": _command(), "manifest.md": _manifest()}
    return {name: f"{_NOTE}\n{text}" for name, text in made.items()}


def main() -> int:
    """Write all pages, and say which have changed."""
    REFERENCE.mkdir(exist_ok=True)
    for name, text in pages().items():
        path = REFERENCE / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            sys.stderr.write(f"written: {path}\n")
    return 0


def _options() -> str:
    return f"""# Options

An option has four spellings that mean the same and are read by the same parser: `--fcvm-ready-timeout` on the command
line, `FCVM_READY_TIMEOUT` in the environment, `fcvm_ready_timeout` in the ini file and, for options of machines,
`ready_timeout` in the marker `@pytest.mark.fcvm(…)` and in the factories.

Nearer wins: marker, `fcvm_spec`, command line, environment, ini file, default. `env` and `publish` are merged by name
and port; every other option is replaced. Relative paths start at the directory of the ini file, at the directory where pytest
was started, or at the directory of the test file, wherever they were written. Options that may be given several times take
one value a line in the environment and in the ini file, and a list in the marker.

## Options of machines

{_option_table(row for row in ROWS if row.of_machine)}

## Options of a run

These are not taken by the marker.

{_option_table(row for row in ROWS if not row.of_machine)}

## Spellings

{_spellings()}

## Readiness

| condition | the base is ready when |
| --- | --- |
| `http:PORT/PATH` | a GET request is answered with a status below 400 |
| `tcp:PORT` | something listens, not on loopback alone, and a connection stands, or is closed at once for 3 s |
| `log:REGEX` | what the workload has printed matches; `log@N:REGEX`: it has matched N times |
| `exec:COMMAND` | the command ends with 0, run by the image's shell; it may take as long as `ready_timeout` |
| `healthcheck` | the image's own `HEALTHCHECK` command ends with 0 |
| `exit:CODE` | the workload has ended with this exit code, 0 to 255; 128 and the signal's number for a signal |
| `agent` | the workload has not ended within 0.2 s, or has ended with 0 |

Without one: `healthcheck` where the image has it, else `tcp` on every TCP port that it exposes, else `agent`. A port
that is exposed and never served is given up when another one listens, and for 10 s no more opened and the workload used
less than a tenth of a CPU, or for three quarters of `ready_timeout` (45 s at
least) no more opened.

A line of the log ends at `\\n`, where `^` and `$` are (`re.MULTILINE`). A match may span lines, 256 KiB at most.

A health check has the image's `SHELL` and timeout (30 s without one). It is made at once and again after 10 to 250 ms.
One that takes longer is made again after as long a pause, but not later than the image's interval. Start period and
retries end nothing: `ready_timeout` does.
"""


def _spellings() -> str:
    lines = (f"- {parser.__name__.split('_')[1]}: {' '.join(_document(parser).split())}" for parser in _SPELLINGS)
    return "\n".join(lines)


def _option_table(rows: Iterable[Row]) -> str:
    lines = ["| option | default | what it is |", "| --- | --- | --- |"]
    return "\n".join([*lines, *(f"| `{_usage(row)}` | {_code(row.default)} | {_jail_dir(row.help)} |" for row in rows)])


def _usage(row: Row) -> str:
    if row.kind is RowKind.FLAG:
        return row.flag
    value = "\\|".join(row.choices) or _jail_dir(row.metavar)
    return f"{row.flag} {value}{' …' if row.kind is RowKind.LIST else ''}"


def _hooks() -> str:
    parts = ["# Hooks", "Plugins and the `conftest.py` of the root directory may implement these."]
    for name, hook in _public(hookspecs, inspect.isfunction):
        parts += [f"## `{name}`", _signature(hook), _document(hook)]
    return "\n\n".join(parts) + "\n"


def _command() -> str:
    os.environ["COLUMNS"] = "100"  # argparse wraps its help at the width of the terminal
    words = (
        "Data goes to standard output, talk to standard error. Exit codes: 0, 1 for a failure, 2 for wrong usage, 130"
    )
    words += " after Ctrl-C; of `fcvm shell`, that of the command it ran."
    parts = ["# The command `fcvm`", words]
    for parser in _parsers(cli.make_parser(full=("shell", "replay"))):
        parts += [f"## `{parser.prog}`", f"```text\n{parser.format_help().rstrip()}\n```"]
    return "\n\n".join(parts) + "\n"


def _parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _parsers(inner)


def _manifest() -> str:
    return f"""# The manifest of a cache entry

Every entry of the cache (`snapshots/KEY`, `images/KEY`, `kernels/KEY`) is a directory with a `manifest.json`, written
last: what has no manifest is not there. `fcvm snapshot inspect KEY` shows it. Schema {store.MANIFEST_SCHEMA}:

| field | what it is |
| --- | --- |
| `schema` | the number of this description; another one makes the entry one of another version, which is built anew |
| `key` | the name of the directory |
| `files` | for each file `sha256`, over its blocks that are not all zeros, and `stamp` |
| `facts` | what the builder wanted to remember |
| `seal` | a SHA-256 over all of the above as canonical JSON |

A stamp is device, inode, size, mtime and ctime in ns. Contents are hashed again only when it has changed, or by
`fcvm snapshot verify`.

## Facts of a snapshot

{_keys_of(build.build_snapshot)}. The `secret` is the word by which its clones are woken; it protects nothing else.

`about` has {_keys_of(ingredients.SnapshotInputs.about)}. Of the environment it has the names alone.

Of a machine that `--fcvm-keep` has saved, `of_clone` is true, and `about` has `test` and `clone` too.

## What is in a snapshot's key

A SHA-256 as canonical JSON over {_keys_of(ingredients.snapshot_key)}. Values of the environment enter as an HMAC with a
secret of the cache, so that nobody can guess them from a key.
"""


def _keys_of(function: Callable[..., Any]) -> str:
    """Return the keys of the dictionary that a function makes of constants, the largest one."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Dict)]
    largest = max(found, key=lambda node: len(node.keys))
    return ", ".join(f"`{key.value}`" for key in largest.keys if isinstance(key, ast.Constant))


def _errors() -> str:
    tree = _document(errors)
    parts = ["# Errors", "All can be imported from `pytest_fcvm`.", f"```text\n{tree}\n```"]
    for name, error in _public(errors, inspect.isclass):
        parts += [f"## `{name}`", f"Base: `{error.__base__.__name__}`.", _document(error)]
    return "\n\n".join(parts) + "\n"


def _fixtures() -> str:
    parts = [
        "# Fixtures and what they give",
        "## The marker `fcvm`",
        _MARKER,
    ]
    for name, scope, result, text in _fixture_functions():
        parts += [f"## `{name}`", f"Scope {scope}, gives `{result}`.", text]
    for thing in (Clone, Snapshot, Network, Prepare):
        parts += [f"## class `{thing.__name__}`", _document(thing), *_members(thing)]
    return "\n\n".join(parts) + "\n"


def _protocol() -> str:
    header = (Path(__file__).parents[1] / "guest_image/agent/protocol.h").read_text(encoding="utf-8")
    return f"""# The wire protocol

Between `pytest_fcvm/guest/` and the agent in the guest. This is `guest_image/agent/protocol.h`.

```c
{header.strip()}
```
"""


def _fixture_functions() -> Iterator[tuple[str, str, str, str]]:
    """Yield name, scope, type and docstring; from the source, because pytest wraps fixtures differently by version."""
    for node in ast.parse(inspect.getsource(fixtures)).body:
        if not isinstance(node, ast.FunctionDef) or node.returns is None:
            continue
        for decorator in map(ast.unparse, node.decorator_list):
            if decorator.startswith("pytest.fixture"):
                scope = "session" if "session" in decorator else "function"
                result = ast.unparse(node.returns).removeprefix("Generator[").removesuffix("]")
                yield node.name, scope, result, inspect.cleandoc(ast.get_docstring(node) or "")


def _members(thing: type) -> Iterator[str]:
    own = (part for part in thing.__mro__ if part.__module__.startswith("pytest_fcvm."))
    for name, member in (pair for part in own for pair in vars(part).items()):
        if name.startswith("_"):
            continue
        if isinstance(member, property):
            yield f"### `{thing.__name__}.{name}`\n\n{_document(member)}"
        elif inspect.isfunction(member):
            yield f"### `{thing.__name__}.{name}()`\n\n{_signature(member)}\n\n{_document(member)}"


def _public(module: Any, kind: Callable[[Any], bool]) -> Iterator[tuple[str, Any]]:
    """Yield a module's public things of its own in the order of the source."""
    for name, thing in vars(module).items():
        if name in module.__all__ and kind(thing) and name != "RunReporter":
            yield name, thing


def _signature(function: Callable[..., Any]) -> str:
    """Return the head of a function as its source has it, on one line."""
    source = inspect.getsource(function)
    head = " ".join(source[source.index("def ") + 4 : source.index('"""')].split()).removesuffix(":")
    for long, short in (("( ", "("), (", )", ")"), ("(self, ", "("), ("(self)", "()")):
        head = head.replace(long, short, 1)
    return f"```text\n{head}\n```"


def _document(thing: object) -> str:
    text = inspect.getdoc(thing)
    if not text:
        raise SystemExit(f"{thing!r} has no docstring")
    return text


def _code(text: str) -> str:
    return text if " " in text or not text else f"`{_jail_dir(text)}`"


def _jail_dir(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
