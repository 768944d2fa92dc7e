"""Every error says who must act and what to change, and survives the way from an xdist worker."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Iterator

import pytest

from pytest_fcvm import errors
from pytest_fcvm.errors import FcvmError, HostError

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
    error = kind("it broke", hint="mend it", evidence={"console": "panic \x1b[31m\udcff"})
    error.__dict__["exit_code"] = 7  # what a subclass may add
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(other) is kind
        assert (other.message, other.hint, other.evidence) == (error.message, error.hint, error.evidence)
        assert other.args == ("it broke",)
        assert other.exit_code == 7
        assert str(other) == str(error)


@pytest.mark.parametrize("kind", ALL_ERRORS, ids=by_name)
def test_the_text_is_the_cause_and_below_it_the_hint(kind: type[FcvmError]) -> None:
    assert str(kind("it broke", hint="mend it")) == "it broke\nhint: mend it"
    assert str(kind("it broke")) == "it broke"


def test_who_must_act_is_told_by_the_classes_right_under_the_root() -> None:
    direct = {kind.__name__ for kind in FcvmError.__subclasses__() if kind.__module__ == errors.__name__}
    assert direct == WHO_MUST_ACT


def test_every_class_is_exported_and_in_the_tree_on_top_of_the_file() -> None:
    names = {kind.__name__ for kind in ALL_ERRORS}
    assert names == set(errors.__all__)
    assert set(re.findall(r"^\W*([A-Z]\w+)", (errors.__doc__ or "").split("\n\n")[1], re.MULTILINE)) == names


def test_the_tree_on_top_of_the_file_shows_the_true_parents() -> None:
    path: list[type] = [Exception]
    for line in (errors.__doc__ or "").split("\n\n")[1].splitlines():
        match = re.match(r"^([│├└─ ]*)([A-Z]\w+)", line)
        assert match is not None, line
        depth = len(match[1]) // 4 + 1  # every level is drawn four characters wide
        kind = getattr(errors, match[2])
        assert kind.__bases__ == (path[depth - 1],), line
        path[depth:] = [kind]


def test_evidence_is_added_where_there_is_none_yet() -> None:
    error = HostError("it broke", evidence={"console": "first"})
    assert error.with_evidence(console="second", workload_log="ran") is error
    assert error.evidence == {"console": "first", "workload log": "ran"}


def test_evidence_is_the_errors_own_copy() -> None:
    given = {"console": "then"}
    error = HostError("it broke", evidence=given)
    given["console"] = "now"
    assert error.evidence == {"console": "then"}
