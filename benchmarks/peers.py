#!/usr/bin/env python3
"""Compare the same tests with clones, podman containers and, for PostgreSQL, pytest-postgresql.

    benchmarks/peers.py [--tests 200] [--workers 2] [--databases 20] [--json FILE]

Each suite is a generated directory. The suites run one after the other, each in a pytest process of its own. pytest
measures set-up and teardown; a test's own time is that of its one request or query. Programs that are not installed are
skipped with a message.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import shutil
import statistics
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from podman import NotHere, Podman, start_podman
from suite import CONFTEST, SuiteFailed, SuiteRun, run_suite

_ROOT = Path(__file__).parents[1]
_BODY_S = 0.2  # other work of a database test: the pool makes the next clone in this time
_NGINX_CLONE = """
import urllib.request, pytest
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({{}}))

@pytest.mark.parametrize("number", range({count}))
def test_home(number, fcvm_clone):
    assert OPENER.open(fcvm_clone.url(80), timeout=60).status == 200
"""
_PODMAN = """
import contextlib, socket, subprocess, time, urllib.request, pytest
COMMAND, OPTIONS, IMAGE, NETWORK = {command!r}, {options!r}, {image!r}, {network!r}

def podman(*words):
    done = subprocess.run([*COMMAND, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    return done.stdout.split()[-1] if done.stdout.split() else ""

@contextlib.contextmanager
def container(port, *more):
    host = port
    publish = ["--network=host"]
    if NETWORK == "published":
        with socket.create_server(("127.0.0.1", 0)) as server:
            host = server.getsockname()[1]
        publish = [f"--publish=127.0.0.1:{{host}}:{{port}}"]
    name = podman("run", "--detach", *OPTIONS, *publish, *more, IMAGE)
    try:
        yield host
    finally:
        podman("rm", "--force", "--time=0", name)
"""
_NGINX_PODMAN = (
    _PODMAN
    + """
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({{}}))

def get(port):
    return OPENER.open(f"http://127.0.0.1:{{port}}/", timeout=60).status

@pytest.fixture
def nginx():
    with container(80) as port:
        while True:
            with contextlib.suppress(OSError):
                get(port)
                break
            time.sleep(0.002)
        yield port

@pytest.mark.parametrize("number", range({count}))
def test_home(number, nginx):
    assert get(nginx) == 200
"""
)
_ROWS = "CREATE TABLE parts AS SELECT n AS id, md5(n::text) AS name FROM generate_series(1, 10000) AS n"
_QUERY = f"""
@pytest.mark.parametrize("number", range({{count}}))
def test_rows(number, db):
    assert db.execute("SELECT count(*) FROM parts").fetchone() == (10000,)
    time.sleep({_BODY_S})
"""
_POSTGRES_CLONE = (
    f"""
import time, psycopg, pytest
from pytest_fcvm import Prepare

def connect(clone):
    host, port = clone.endpoint(5432)
    return psycopg.connect(host=host, port=port, user="postgres", password="x", autocommit=True)

def load(base):
    with connect(base) as db:
        db.execute("{_ROWS}")

def warm(clone):
    with connect(clone) as db:
        db.execute("SELECT count(*) FROM parts")

@pytest.fixture(scope="session")
def fcvm_spec(fcvm_spec):
    return fcvm_spec.merged(
        {{{{"env": {{{{"POSTGRES_PASSWORD": "x"}}}}, "prepare": Prepare(load), "mem_mib": 384, "warm": warm}}}}
    )

@pytest.fixture
def db(fcvm_clone):
    with connect(fcvm_clone) as db:
        yield db
"""
    + _QUERY
)
_POSTGRES_PODMAN = (
    _PODMAN
    + f"""
import psycopg

@pytest.fixture
def db():
    with container(5432, "--env=POSTGRES_PASSWORD=x") as port:
        while True:
            with contextlib.suppress(psycopg.OperationalError):
                db = psycopg.connect(host="127.0.0.1", port=port, user="postgres", password="x", autocommit=True)
                break
            time.sleep(0.01)
        with db:
            db.execute("{_ROWS}")
            yield db
"""
    + _QUERY
)
_POSTGRES_TEMPLATE = (
    f"""
import time, psycopg, pytest
from pytest_postgresql import factories

def load(**how):
    with psycopg.connect(**how) as db:
        db.execute("{_ROWS}")

postgresql_proc = factories.postgresql_proc(executable="{{pg_ctl}}", load=[load])
db = factories.postgresql("postgresql_proc")
"""
    + _QUERY
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A suite's medians in ms. `wall_ms` is pytest's wall time ÷ tests; `own_ms` is the test without its pause."""

    suite: str
    tests: int
    workers: int
    setup_ms: float
    own_ms: float
    teardown_ms: float
    total_ms: float
    wall_ms: float


def main() -> int:
    """Run every suite that can run here, and print a table."""
    arguments = _parse()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="fcvm-peers-") as scratch:
        directory = Path(scratch)
        directory.chmod(0o755)
        network = _compare_nginx(rows, directory, arguments.tests, arguments.workers)
        if arguments.databases:
            _compare_postgres(rows, directory, arguments.databases, network)
    print(_table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--tests", type=int, default=200, metavar="N", help="tests of nginx (default: 200)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="workers of those (default: 2)")
    parser.add_argument("--databases", type=int, default=20, metavar="N", help="tests of PostgreSQL (default: 20)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table to a file")
    return parser.parse_args()


def _compare_nginx(rows: list[Row], directory: Path, count: int, workers: int) -> str:
    """Return the network by which podman's containers are reached, "" without podman."""
    layout = _image("nginx")
    options = [f"--fcvm-image=oci:{layout}:latest", "--fcvm-ready=http:80/"]
    _run(rows, directory / "nginx-clone", "nginx, clones", _NGINX_CLONE.format(count=count), options, count, workers)
    with ExitStack() as stack:
        podman = _enter_podman(stack, layout, directory / "podman-nginx")
        if podman:
            text = _NGINX_PODMAN.format(count=count, **_facts(podman))
            _run(rows, directory / "nginx-podman", "nginx, podman", text, [], count, workers)
        return podman.network if podman else ""


def _compare_postgres(rows: list[Row], directory: Path, count: int, network: str) -> None:
    layout = _image("postgres")
    options = [f"--fcvm-image=oci:{layout}:latest"]
    _run(rows, directory / "pg-clone", "PostgreSQL, clones", _POSTGRES_CLONE.format(count=count), options, count, 0)
    with ExitStack() as stack:
        podman = _enter_podman(stack, layout, directory / "podman-pg", network) if network else None
        if podman:
            text = _POSTGRES_PODMAN.format(count=count, **_facts(podman))
            _run(rows, directory / "pg-podman", "PostgreSQL, podman", text, [], count, 0)
    server = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))), None)
    if server is None or find_spec("pytest_postgresql") is None:
        _say("without pytest-postgresql: it or a PostgreSQL server is not installed")
        return
    text = _POSTGRES_TEMPLATE.format(count=count, pg_ctl=server)
    # A PostgreSQL server does not run as root.
    prefix = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
    _run(rows, directory / "pg-template", "PostgreSQL, pytest-postgresql", text, ["-p", "no:fcvm"], count, 0, prefix)


def _image(name: str) -> Path:
    layout: Path = runpy.run_path(str(_ROOT / "tests/images/library.py"))["build_image"](name, _ROOT / ".demo")
    return layout.resolve()


def _enter_podman(stack: ExitStack, layout: Path, directory: Path, network: str = "") -> Podman | None:
    try:
        return stack.enter_context(start_podman(layout, directory, network))
    except NotHere as why:
        _say(f"without podman: {why}")
        return None


def _facts(podman: Podman) -> dict[str, object]:
    return {
        "command": list(podman.command),
        "options": list(podman.options),
        "image": podman.image,
        "network": podman.network,
    }


def _run(
    rows: list[Row],
    directory: Path,
    suite: str,
    text: str,
    options: list[str],
    count: int,
    workers: int,
    prefix: list[str] | None = None,
) -> None:
    _say(f"{suite}: {count} tests")
    directory.mkdir()
    directory.chmod(0o777)
    (directory / "pytest.ini").write_text("[pytest]\n")
    (directory / "conftest.py").write_text(CONFTEST)
    (directory / "test_it.py").write_text(text)
    try:
        run = run_suite(directory, [*options, "-p", "no:randomly", "-p", "no:asyncio"], count, workers, prefix or [])
    except SuiteFailed as why:
        _say(f"without {suite}: {why}")
        return
    rows.append(_row(suite, run, count, workers))
    shutil.rmtree(directory, ignore_errors=True)


def _row(suite: str, run: SuiteRun, count: int, workers: int) -> Row:
    pause_ms = _BODY_S * 1e3 if suite.startswith("PostgreSQL") else 0.0
    own = [
        all_ms - up - down - pause_ms
        for all_ms, up, down in zip(run.test_ms, run.setup_ms, run.teardown_ms, strict=True)
    ]
    return Row(
        suite=suite,
        tests=count,
        workers=workers,
        setup_ms=statistics.median(run.setup_ms),
        own_ms=statistics.median(own),
        teardown_ms=statistics.median(run.teardown_ms),
        total_ms=statistics.median(all_ms - pause_ms for all_ms in run.test_ms),
        wall_ms=run.wall_ms,
    )


def _table(rows: list[Row]) -> str:
    lines = [
        f"{'suite':32}{'tests':>7}{'-n':>4}{'set-up':>9}{'own':>9}{'teardown':>10}{'all':>9}{'wall ÷ n':>10}  [ms]"
    ]
    lines += [
        f"{row.suite:32}{row.tests:>7}{row.workers:>4}{row.setup_ms:>9.1f}{row.own_ms:>9.1f}{row.teardown_ms:>10.1f}"
        f"{row.total_ms:>9.1f}{row.wall_ms:>10.1f}"
        for row in rows
    ]
    return "\n".join(lines)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
