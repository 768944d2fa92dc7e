"""pytest's hooks, and nothing else. What a VM needs is imported when the first one is asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from pytest_fcvm import fixtures, hookspecs, reporting
from pytest_fcvm.errors import UnresolvedSetting, UsageProblem
from pytest_fcvm.fixtures import marks
from pytest_fcvm.hookspecs import HARNESS, OPTIONS, REPORTER, RUNNING, TIMER
from pytest_fcvm.host import own
from pytest_fcvm.options import ROWS, Options, Origin, Row, RowKind, build_options, environment_layer, read_layer

__all__: list[str] = []


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    """Register our own hooks."""
    pluginmanager.add_hookspecs(hookspecs)


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Add every row of the option table, to the command line and to the ini file."""
    _skip_assertion_rewriting(pluginmanager)
    group = parser.getgroup("fcvm", "fresh microVMs from OCI images (pytest-fcvm)")
    for row in ROWS:
        group.addoption(row.flag, dest=f"fcvm_{row.marker}", **row.argument())
        parser.addini(_ini_key(row), row.help, type=row.kind.value, default=None)


def _skip_assertion_rewriting(pluginmanager: pytest.PytestPluginManager) -> None:
    """Keep pytest from rewriting the assertions of this package: no test sees them.

    pytest compiles every module of a plugin's distribution anew, in each process of a run, where it cannot write the
    result beside it: with PYTHONDONTWRITEBYTECODE, as images of Python set it, or for a user who does not own the
    environment. That costs half a second before the first test with a VM. pytest has no public way to ask for this;
    where the private one changes, the run only takes longer.
    """
    names = getattr(getattr(pluginmanager, "rewrite_hook", None), "_must_rewrite", None)
    if isinstance(names, set):
        names.discard(__package__)


def pytest_configure(config: pytest.Config) -> None:
    """Read all settings once; a wrong one ends the run before it starts."""
    arguments = ", ".join(f"{row.marker}=…" for row in ROWS if row.is_spec_field)
    config.addinivalue_line("markers", f"fcvm({arguments}): run the test against a fresh microVM with these settings")
    config.add_cleanup(own.capture_environment())
    try:
        config.stash[OPTIONS] = _read_options(config)
    except UsageProblem as problem:
        raise pytest.UsageError(str(problem)) from None
    config.pluginmanager.register(fixtures, "fcvm-fixtures")
    reporter = reporting.Reporter(config)
    config.stash[REPORTER] = reporter
    config.pluginmanager.register(reporter, "fcvm-reporting")


def _read_options(config: pytest.Config) -> Options:
    ini_base = config.inipath.parent if config.inipath else config.rootpath
    invoked = Path(config.invocation_params.dir)
    environment = dict(os.environ)
    asks_for_help = _asks_for_help(config)

    def read(
        raw: dict[str, Any], base: Path, spelling: Callable[[Row], str], later: type[UsageProblem] | None
    ) -> dict[str, Any]:
        defer = UsageProblem if asks_for_help else later
        return read_layer(raw, Origin(base=base, environment=environment), spelling, defer=defer)

    return build_options(
        [
            read(_ini_layer(config), ini_base, _ini_key, UnresolvedSetting),
            read(environment_layer(environment), invoked, lambda row: row.variable, UnresolvedSetting),
            read(_command_line_layer(config), invoked, lambda row: row.flag, None),  # typed for this run
        ]
    )


def _asks_for_help(config: pytest.Config) -> bool:
    """Say whether pytest only prints about itself: no setting may prevent that."""
    words = ("help", "version", "markers", "showfixtures", "show_fixtures_per_test", "cacheshow")
    return any(config.getoption(word, None) for word in words)


def _ini_key(row: Row) -> str:
    return f"fcvm_{row.marker}"


def _ini_layer(config: pytest.Config) -> dict[str, Any]:
    values = {}
    for row in ROWS:
        try:
            values[row.marker] = config.getini(_ini_key(row))
        except (TypeError, ValueError, pytest.UsageError) as error:  # UsageError since pytest 9.2
            if row.kind is RowKind.FLAG and str(error).endswith("''"):
                continue  # an empty value is no setting in any other place either
            if not _asks_for_help(config):
                raise _not_of_its_type(row, error) from error
    return {name: value for name, value in values.items() if value not in (None, "", [])}


def _not_of_its_type(row: Row, error: Exception) -> UsageProblem:
    """Say which key pytest itself refused: a wrong truth value, or a typed value of `[tool.pytest]` for a string."""
    key = _ini_key(row)
    forms = {RowKind.VALUE: f'{key} = "…"', RowKind.LIST: f'{key} = ["…"]', RowKind.FLAG: f"{key} = true, or false"}
    return UsageProblem(f"{key}: {error}", hint=f"write {forms[row.kind]}")


def _command_line_layer(config: pytest.Config) -> dict[str, Any]:
    values = {row.marker: config.getoption(f"fcvm_{row.marker}") for row in ROWS}
    return {name: value for name, value in values.items() if value is not None}


def pytest_itemcollected(item: pytest.Item) -> None:
    """Add a clone to tests that carry the marker, and the marker to tests that use a VM fixture."""
    marks.complete_item(item)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Turn a wrong marker argument into a collection error of its file, the same with and without xdist."""
    report = yield
    marks.check_collected(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Generator[None]:
    """Add a clone to tests that another hook has marked."""
    yield
    for item in items:
        marks.complete_item(item)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Remember the test that runs, for fixtures that outlive it."""
    item.config.stash[RUNNING] = item
    if harness := item.config.stash.get(HARNESS, None):
        harness.who = item.nodeid
    reporting.prepare_fork(item)
    try:
        return (yield)
    finally:
        item.config.stash[RUNNING] = None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None]:
    """Fail a test with a wrong late marker, or whose `fcvm_spec` is not that of `fcvm_worker_clone`."""
    marks.check_late(item)
    yield
    fixtures.check_worker_clone(item)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """Check `fcvm_worker_clone` again: the test may have used `getfixturevalue`."""
    yield
    fixtures.check_worker_clone(item)


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: object) -> None:
    """Remember pytest-timeout's running timer, so that a build can suspend it, whatever fixture asked for it."""
    item.config.stash[TIMER] = (item, settings)


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_timeout_cancel_timer(item: pytest.Item) -> None:
    """Forget the timer that has been stopped."""
    item.config.stash[TIMER] = None
