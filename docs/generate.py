#!/usr/bin/env python3
"""Write docs/reference from the code (`make docs`). tests/unit/test_docs.py fails when a page is out of date."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import os
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any, is_typeddict

import pytest_fcvm
from pytest_fcvm import cli, errors, fixtures, hookspecs, store
from pytest_fcvm.model import parse
from pytest_fcvm.options import ROWS, Row, RowKind
from pytest_fcvm.snapshot import builder, inputs

REFERENCE = Path(__file__).parent / "reference"
_NOTE = "<!-- Written by docs/generate.py (make docs). Change the code, not this page. -->"
_MARKER = f"""\
`@pytest.mark.fcvm(…)` sets options for one test, class or module. A marked test that requests no fixture of this plugin
gets `fcvm_clone`. A test that requests one gets the marker, so `-m fcvm` selects all tests with VMs.

Arguments, by name only: {", ".join(f"`{row.marker}`" for row in ROWS if row.is_spec_field)}.
See [options](options.md)."""
_FIRST = ("Clone", "Guest", "Snapshot", "Network", "Group", "VmSpec", "Prepare")  # the other classes follow by name
# Public members that only the plugin itself uses; tests/unit/test_docs.py checks that they exist.
INTERNAL = {
    "Clone": {"forks"},
    "Guest": {"close_clients", "evidence", "pause_for_exit", "printed_bytes", "why_silent"},
    "Network": {"joined", "plug", "record", "unplug"},
    "NetworkSpec": {"finalize"},
    "Prepare": {"identity"},
    "ReadySpec": {"expected_exit_code"},
    "Timeline": {"mark"},
    "VmSpec": {"clone_settings"},
}
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
    """Write all pages, and print which have changed."""
    REFERENCE.mkdir(exist_ok=True)
    for name, text in pages().items():
        path = REFERENCE / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            sys.stderr.write(f"written: {path}\n")
    return 0


def _options() -> str:
    return f"""# Options

An option has four spellings, which the same parser reads: `--fcvm-ready-timeout` on the command line,
`FCVM_READY_TIMEOUT` in the environment, `fcvm_ready_timeout` in the ini file and, for options of a VM,
`ready_timeout` in the marker `@pytest.mark.fcvm(…)` and in the factories.

The order of precedence is: marker, `fcvm_spec`, command line, environment, ini file, default. `env` is merged by
name and `publish` by port; every other option is replaced. A relative path in the ini file starts at the directory of
that file, on the command line and in the environment at the directory where pytest was started, and in a marker at the
directory of the test file. An option that may be given several times takes one value per line in the environment and in
the ini file, and a list in the marker.

## Options of a VM

{_option_table(row for row in ROWS if row.is_spec_field)}

## Options of a run

The marker does not take these.

{_option_table(row for row in ROWS if not row.is_spec_field)}

## Spellings

{_spellings()}

## Readiness

| condition | the base is ready when |
| --- | --- |
| `http:PORT/PATH` | a GET request is answered with a status below 400 |
| `tcp:PORT` | something listens on more than loopback, and a connection stays open, or is closed at once for 3 s |
| `log:REGEX` | the workload's output matches; `log@N:REGEX`: it has matched N times |
| `exec:COMMAND` | the command, run by the image's shell, exits with 0; it may take as long as `ready_timeout` |
| `healthcheck` | the image's own `HEALTHCHECK` command exits with 0 |
| `exit:CODE` | the workload has exited with this code, 0 to 255; after a signal it is 128 plus the signal's number |
| `agent` | the workload still runs after 0.2 s, or has exited with 0 |

The default is `healthcheck` if the image has one, else `tcp` on every TCP port that the image exposes, else `agent`.
The builder gives up exposed ports that nothing serves when another one has a listener, and one of these is true: no
port was opened for 10 s while the workload used less than a tenth of a CPU; or no port was opened for three quarters of
`ready_timeout`, 45 s at least.

A line of the log ends at `\\n`; `^` and `$` match there (`re.MULTILINE`). A match may span lines, up to 256 KiB.

A health check runs in the image's `SHELL`, with the image's timeout (default 30 s). The first check runs at once, and
the next after 10 to 250 ms. After a check that took longer, the pause is as long as the check, but not longer than the
image's interval. Start period and retries are ignored; `ready_timeout` is the only limit.
"""


def _spellings() -> str:
    lines = (f"- {parser.__name__.split('_')[1]}: {' '.join(_document(parser).split())}" for parser in _SPELLINGS)
    return "\n".join(lines)


def _option_table(rows: Iterable[Row]) -> str:
    lines = ["| option | default | meaning |", "| --- | --- | --- |"]
    return "\n".join([*lines, *(f"| `{_usage(row)}` | {_code(row.default)} | {_cell(row.help)} |" for row in rows)])


def _usage(row: Row) -> str:
    if row.kind is RowKind.FLAG:
        return row.flag
    value = "\\|".join(row.choices) or _cell(row.metavar)
    return f"{row.flag} {value}{' …' if row.kind is RowKind.LIST else ''}"


def _hooks() -> str:
    parts = ["# Hooks", "Plugins and the `conftest.py` of the root directory can implement these."]
    for name, hook in _public(hookspecs, inspect.isfunction):
        parts += [f"## `{name}`", _signature(hook), _document(hook)]
    return "\n\n".join(parts) + "\n"


def _command() -> str:
    os.environ["COLUMNS"] = "100"  # argparse wraps its help at the width of the terminal
    words = (
        "Data goes to standard output, messages go to standard error. Exit codes are 0, 1 for a failure, 2 for wrong"
    )
    words += " usage, and 130 after Ctrl-C. `fcvm shell` exits with the code of the command that it ran."
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

Every entry of the cache (`snapshots/KEY`, `images/KEY`, `kernels/KEY`) is a directory with a `manifest.json`. The
manifest is written last: a directory without one is no entry. `fcvm snapshot inspect KEY` shows it.
Schema {store.MANIFEST_SCHEMA}:

| field | meaning |
| --- | --- |
| `schema` | the number of this description; an entry with another number is built again |
| `key` | the name of the directory |
| `files` | for each file `sha256`, over its blocks that are not all zeros, and `stamp` |
| `facts` | the builder's own fields |
| `checksum` | a SHA-256 over all of the above as canonical JSON |

A stamp is device, inode, size, mtime and ctime in ns. A file is hashed again only when its stamp has changed, or by
`fcvm snapshot verify`.

## Facts of a snapshot

{_keys_of(builder.build_snapshot)}. The `secret` resumes the agent in a clone; it protects nothing else.

`about` has {_keys_of(inputs.SnapshotInputs.about)}. `env` has only the names.

In a clone that `--fcvm-keep` has saved, `of_clone` is true, and `about` also has `test` and `clone`.

## What is in a snapshot's key

The key is a SHA-256 over this, as canonical JSON: {_keys_of(inputs.snapshot_key)}.
Values of `env` and `metadata` enter as an HMAC with a secret of the cache, so that nobody can guess them from a key.
"""


def _keys_of(function: Callable[..., Any]) -> str:
    """Return the constant keys of the largest dictionary in a function."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Dict)]
    largest = max(found, key=lambda node: len(node.keys))
    return ", ".join(f"`{key.value!s}`" for key in largest.keys if isinstance(key, ast.Constant))


def _errors() -> str:
    tree = _document(errors)
    parts = ["# Errors", "All can be imported from `pytest_fcvm`.", f"```text\n{tree}\n```"]
    for name, error in _public(errors, inspect.isclass):
        parts += [f"## `{name}`", f"Base: `{error.__base__.__name__}`.", _document(error)]
    return "\n\n".join(parts) + "\n"


def _fixtures() -> str:
    parts = ["# Fixtures and their classes", "## The marker `fcvm`", _MARKER]
    for name, scope, result, text in _fixture_functions():
        parts += [f"## `{name}`", f"Scope {scope}, returns `{result}`.", text]
    for thing in _classes():
        parts += [f"## class `{thing.__name__}`", _document(thing), *_inherited(thing), *_fields(thing)]
        parts += _members(thing)
    return "\n\n".join(parts) + "\n"


def _classes() -> Iterator[type]:
    """Yield the public classes, without errors."""
    for name in (*_FIRST, *sorted(set(pytest_fcvm.__all__) - set(_FIRST))):
        thing = getattr(pytest_fcvm, name)
        if inspect.isclass(thing) and not issubclass(thing, BaseException):
            yield thing


def _protocol() -> str:
    header = (Path(__file__).parents[1] / "guest_image/agent/protocol.h").read_text(encoding="utf-8")
    return f"""# The agent's protocol

`pytest_fcvm/guest/` and the agent in the guest speak this protocol. The page shows `guest_image/agent/protocol.h`.

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


def _inherited(thing: type) -> Iterator[str]:
    for base in _public_bases(thing):
        yield f"It has all members of [`{base.__name__}`](#class-{base.__name__.lower()}) too."


def _public_bases(thing: type) -> list[type]:
    return [base for base in thing.__bases__ if base.__name__ in pytest_fcvm.__all__]


def _fields(thing: type) -> Iterator[str]:
    """Yield a table of the fields of a dataclass or named tuple that a caller may set."""
    if dataclasses.is_dataclass(thing):
        found = [(field.name, field.type, _default(field)) for field in dataclasses.fields(thing) if field.init]
    else:
        defaults = getattr(thing, "_field_defaults", {})
        names = getattr(thing, "_fields", tuple(thing.__annotations__) if is_typeddict(thing) else ())
        found = [
            (name, thing.__annotations__[name], f"`{defaults[name]}`" if name in defaults else "") for name in names
        ]
    rows = [
        f"| `{name}` | `{_cell(getattr(kind, '__forward_arg__', None) or str(kind))}` | {default} |"
        for name, kind, default in found
        if name[0] != "_"
    ]
    if rows:
        yield "\n".join(["| field | type | default |", "| --- | --- | --- |", *rows])


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return "empty"
    if field.default is dataclasses.MISSING:
        return ""
    is_spec = dataclasses.is_dataclass(field.default)
    text = str(field.default) if isinstance(field.default, Enum) or is_spec else repr(field.default)
    return f"`{_cell(text)}`"


def _members(thing: type) -> Iterator[str]:
    documented = {part for base in _public_bases(thing) for part in base.__mro__}
    own = [part for part in thing.__mro__ if part.__module__.startswith("pytest_fcvm.") and part not in documented]
    is_protocol = getattr(thing, "_is_protocol", False)
    for name, member in {name: getattr(thing, name) for part in own for name in vars(part)}.items():
        if name in INTERNAL.get(thing.__name__, ()) or (
            name.startswith("_") and not (is_protocol and name == "__call__")
        ):
            continue
        if isinstance(member, property):
            yield f"### `{thing.__name__}.{name}`\n\n{_document(member)}"
        elif inspect.isfunction(member):
            title = thing.__name__ if name == "__call__" else f"{thing.__name__}.{name}"
            yield f"### `{title}()`\n\n{_signature(member)}\n\n{_document(member)}"


def _public(module: Any, kind: Callable[[Any], bool]) -> Iterator[tuple[str, Any]]:
    """Yield the public names of a module in the order of the source."""
    for name, thing in vars(module).items():
        if name in module.__all__ and kind(thing) and name != "RunReporter":
            yield name, thing


def _signature(function: Callable[..., Any]) -> str:
    """Return the signature of a function as its source has it, on one line."""
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
    return text if " " in text or not text else f"`{_cell(text)}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
