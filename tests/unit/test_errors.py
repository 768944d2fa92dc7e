"""Every error says who must act and what to change, and survives the trip from an xdist worker."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pytest_fcvm import errors
from pytest_fcvm.errors import FcvmError, GuestTimeout, HostError
from pytest_fcvm.failures import Failures
from pytest_fcvm.host.archive import pack_path
from pytest_fcvm.host.limits import translating_emfile
from pytest_fcvm.host.unpack import unpack_as

WHO_MUST_ACT = {"UsageProblem", "HostError", "ImageError", "EngineError", "GuestError"}


def find_errors(kind: type[FcvmError]) -> Iterator[type[FcvmError]]:
    yield kind
    for sub in kind.__subclasses__():
        if sub.__module__ == errors.__name__:
            yield from find_errors(sub)


ALL_ERRORS = list(find_errors(FcvmError))


def by_name(kind: type) -> str:
    return kind.__name__


@pytest.mark.parametrize("kind", ALL_ERRORS, ids=by_name)
def test_an_error_survives_pickling_with_everything_it_carries(kind: type[FcvmError]) -> None:
    error = kind("it broke", hint="fix it", evidence={"console": "panic \x1b[31m\udcff"})
    error.__dict__["exit_code"] = 7  # what a subclass may add
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(other) is kind
        assert (other.message, other.hint, other.evidence) == (error.message, error.hint, error.evidence)
        assert other.args == ("it broke",)
        assert vars(other)["exit_code"] == 7
        assert str(other) == str(error)


@pytest.mark.parametrize("kind", ALL_ERRORS, ids=by_name)
def test_the_text_is_the_cause_and_below_it_the_hint(kind: type[FcvmError]) -> None:
    assert str(kind("it broke", hint="fix it")) == "it broke\nhint: fix it"
    assert str(kind("it broke")) == "it broke"


def test_the_classes_right_below_the_root_say_who_must_act() -> None:
    direct = {kind.__name__ for kind in FcvmError.__subclasses__() if kind.__module__ == errors.__name__}
    assert direct == WHO_MUST_ACT


def test_every_class_is_exported_and_in_the_tree_at_the_top_of_the_file() -> None:
    names = {kind.__name__ for kind in ALL_ERRORS}
    assert names == set(errors.__all__)
    assert set(re.findall(r"^\W*([A-Z]\w+)", (errors.__doc__ or "").split("\n\n")[1], re.MULTILINE)) == names


def test_the_tree_at_the_top_of_the_file_shows_the_true_parents() -> None:
    path: list[type] = [Exception]
    for line in (errors.__doc__ or "").split("\n\n")[1].splitlines():
        match = re.match(r"^([│├└─ ]*)([A-Z]\w+)", line)
        assert match is not None, line
        depth = len(match[1]) // 4 + 1  # every level is drawn four characters wide
        kind = getattr(errors, match[2])
        assert kind.__bases__[0] == path[depth - 1], line
        path[depth:] = [kind]


def test_evidence_is_added_where_the_error_has_none() -> None:
    error = HostError("it broke", evidence={"console": "first"})
    assert error.with_evidence(console="second", workload_log="ran") is error
    assert error.evidence == {"console": "first", "workload log": "ran"}


def test_a_timeout_of_the_guest_is_a_timeout_error_without_an_errno() -> None:
    with pytest.raises(TimeoutError, match=r"^too slow\n") as caught:
        raise GuestTimeout("too slow", hint="wait longer")
    assert (caught.value.errno, caught.value.args) == (None, ("too slow",))


def _time_out(*_arguments: object) -> bytes:
    raise GuestTimeout("too slow")


class _SlowSource:
    read = staticmethod(_time_out)


def _fail_in_a_section() -> None:
    with translating_emfile("the test"):
        _time_out()


def _fail_twice(directory: Path) -> None:
    failures = Failures(directory)
    with pytest.raises(GuestTimeout, match=r"^too slow$"):
        failures.once("build", _time_out)
    failures.once("build", pytest.fail)


@pytest.mark.parametrize(
    "call",
    [
        lambda _place: _fail_in_a_section(),
        lambda _place: pack_path(Path(__file__), "test", _time_out),
        lambda place: unpack_as(_SlowSource(), place / "copy"),
        _fail_twice,
    ],
    ids=["a section that translates errors", "packing", "unpacking", "a failure recorded before"],
)
def test_a_timeout_of_the_guest_is_not_taken_for_an_error_of_the_host(
    call: Callable[[Path], None], tmp_path: Path
) -> None:
    with pytest.raises(GuestTimeout, match="too slow"):
        call(tmp_path)


def test_evidence_is_the_errors_own_copy() -> None:
    given = {"console": "then"}
    error = HostError("it broke", evidence=given)
    given["console"] = "now"
    assert error.evidence == {"console": "then"}
