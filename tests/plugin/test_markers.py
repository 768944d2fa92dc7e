"""The marker: which tests it selects, what it gives them, and how a wrong one is reported."""

from __future__ import annotations

import pytest

_WRONG = {
    "size": ('mem="lots"', "@pytest.mark.fcvm(mem=…): 'lots' is not a size of at least 1 MiB", "write 512, 512M or 2G"),
    "field": (
        'memory="1G"',
        "@pytest.mark.fcvm has no argument 'memory'",
        "arguments: image, mem, cpus, disk, balloon",
    ),
    "order": ('"nginx"', "@pytest.mark.fcvm takes named arguments only", 'write fcvm(image="nginx:latest")'),
    "path": (
        'map="gone:/x"',
        "@pytest.mark.fcvm(map=…): map 'gone:/x': {base}/gone does not exist",
        "name an existing",
    ),
    "both": (
        'image="x"',
        "fcvm_worker_clone is one clone for all tests and cannot take a marker's own image",
        "use fcvm_clone, or drop image from the marker",
    ),
}


def test_a_wrong_argument_is_a_collection_error_of_its_file_with_and_without_workers(project) -> None:
    for name, (mark, _, _) in _WRONG.items():
        fixture = "fcvm_worker_clone" if name == "both" else "request"
        test = f"@pytest.mark.fcvm({mark})\n    def test_bad(self, {fixture}): pass"
        project.write(**{f"test_{name}_py": f"import pytest\nclass TestX:\n    {test}\n"})
    project.write(test_good_py="def test_good(): pass\n")
    alone, spread = project.run("-rE"), project.run("-rE", "-n2")
    assert alone.ret == pytest.ExitCode.INTERRUPTED
    assert spread.ret == pytest.ExitCode.TESTS_FAILED  # xdist runs what it could collect
    for result in (alone, spread):
        assert "INTERNALERROR" not in result.stdout.str()
        assert "Traceback" not in result.stdout.str()
        assert sum(line.startswith("ERROR ") for line in result.outlines) == len(_WRONG)
        for name, (_, message, hint) in _WRONG.items():
            at = result.outlines.index(f"test_{name}.py::TestX::test_bad: {message.format(base=project.path)}")
            assert result.outlines[at + 1].startswith(f"hint: {hint}")
            assert f"ERROR collecting test_{name}.py" in result.outlines[at - 1]


def test_all_wrong_tests_of_a_file_are_reported_at_once(project) -> None:
    project.write(
        test_bad_py="import pytest\n"
        '@pytest.mark.fcvm(cpus=0)\ndef test_a(): pass\n@pytest.mark.parametrize("x", [1, 2])\n'
        "@pytest.mark.fcvm(user=1)\ndef test_b(x): pass\n"
    )
    project.run().stdout.fnmatch_lines(
        ["test_bad.py::test_a: *cpus=*", "test_bad.py::test_b[[]1]: *user=*", "test_bad.py::test_b[[]2]: *user=*"]
    )


_MIXED = """
import unittest
import pytest

def test_plain(): pass

def test_clone(fcvm_clone): pass

def test_factory(fcvm_clone_factory): pass

@pytest.fixture
def database(fcvm_clone): pass

def test_indirect(database): pass

@pytest.mark.fcvm
def test_marked(): pass

@pytest.mark.parametrize("x", [1, pytest.param(2, marks=pytest.mark.fcvm), 3])
def test_parameter(x): pass

class TestUnit(unittest.TestCase):
    @pytest.mark.fcvm(image="unit")
    def test_unit(self): pass

    def test_no_vm(self): pass
"""
_VM_TESTS = ["clone", "factory", "indirect", "marked", "parameter[2]", "unit"]
_OTHER_TESTS = ["plain", "parameter[1]", "parameter[3]", "no_vm"]


@pytest.mark.parametrize(("expression", "selected"), [("fcvm", _VM_TESTS), ("not fcvm", _OTHER_TESTS)])
def test_the_marker_selects_exactly_the_tests_that_use_a_clone(expression: str, selected: list[str], project) -> None:
    project.write(test_mixed_py=_MIXED)
    lines = project.run("--collect-only", "-q", "-m", expression).outlines
    assert sorted(line.rpartition("::test_")[2] for line in lines if "::" in line) == sorted(selected)


def test_a_marked_test_without_a_fixture_gets_a_clone_and_no_other_test_does(project) -> None:
    project.write(test_mixed_py=_MIXED)
    seen = [one["test"].rpartition("::test_")[2] for one in project.watch("--fcvm-image=x")]
    assert seen == ["clone", "indirect", "marked", "parameter[2]", "unit"]  # a factory asks only when it is called


def test_a_marked_test_with_a_fixture_gets_one_clone(project) -> None:
    project.write(test_a_py='import pytest\n@pytest.mark.fcvm(image="x")\ndef test_a(fcvm_snapshot): pass\n')
    assert len(project.watch()) == 1


def test_a_fixture_that_sees_no_markers_cannot_request_a_snapshot(project) -> None:
    project.write(
        test_a_py="import pytest\n"
        '@pytest.fixture(scope="module")\ndef shared(fcvm_snapshot): pass\ndef test_a(shared): pass\n'
    )
    result = project.run("--fcvm-image=x")
    result.stdout.fnmatch_lines(["*ScopeMismatch*"])
    assert result.parseoutcomes() == {"errors": 1} or result.parseoutcomes() == {"error": 1}


def test_factories_take_a_markers_arguments_and_report_wrong_ones(project) -> None:
    project.write(
        test_a_py="""
import pytest
from pytest_fcvm import VmSpec, UsageProblem

@pytest.mark.fcvm(image="marker", env={"A": "1"})
def test_clone(fcvm_clone_factory):
    for arguments in ({"memory": 1}, {"mem": "lots"}):
        with pytest.raises(UsageProblem, match="the factory"):
            fcvm_clone_factory(**arguments)
    fcvm_clone_factory(mem="1G", env=["B=2"])

def test_own_spec(fcvm_clone_factory):
    fcvm_clone_factory(VmSpec(image="own"), mem=512)

def test_snapshot(fcvm_snapshot_factory):
    fcvm_snapshot_factory(image="snapshot")
"""
    )
    seen = [(one["image"], one["mem"], one["env"]) for one in project.watch("--fcvm-image=x")]
    assert seen == [("marker", 1024, {"A": "1", "B": "2"}), ("own", 512, {}), ("snapshot", 256, {})]


def test_a_network_mode_is_no_private_network_and_the_error_says_where_it_belongs(project) -> None:
    project.write(test_a_py='def test_a(fcvm_clone_factory):\n    fcvm_clone_factory(network="rootless")\n')
    result = project.run("--fcvm-image=x")
    result.stdout.fnmatch_lines(
        ["*'rootless' is not a private network, as fcvm_network returns one", "*@pytest.mark.fcvm(network='rootless')*"]
    )


_LATE = """
import pytest

@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if "web" in item.name:
            item.add_marker(pytest.mark.fcvm(image="late"))
        if "typo" in item.name:
            item.add_marker(pytest.mark.fcvm(imgae="late"))
"""


def test_a_marker_that_a_hook_adds_counts_like_any_other(project) -> None:
    project.write(conftest_py=_LATE, test_a_py="def test_web(): pass\ndef test_web_clone(fcvm_clone): pass\n")
    seen = [(one["test"], one["image"]) for one in project.watch()]
    assert seen == [("test_a.py::test_web", "late"), ("test_a.py::test_web_clone", "late")]


@pytest.mark.parametrize("more", [(), ("-n2",)])
def test_a_wrong_marker_that_a_hook_adds_is_reported(more: tuple[str, ...], project) -> None:
    project.write(conftest_py=_LATE, test_a_py="def test_typo(): pass\n")
    result = project.run(*more)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*test_a.py::test_typo: @pytest.mark.fcvm has no argument 'imgae'"])


def test_a_group_counts_as_clones_and_takes_the_marker(project) -> None:
    project.write(
        test_a_py="import pytest\ndef test_plain(): pass\n"
        'def test_group(fcvm_group): fcvm_group({"a": {"image": "x"}})\n'
        '@pytest.mark.fcvm(mem="128M")\ndef test_marked(fcvm_group): fcvm_group({"a": {"image": "x"}})\n'
    )
    seen = [(one["test"], one["image"], one["mem"]) for one in project.watch("-m", "fcvm")]
    assert seen == [("test_a.py::test_group", "x", 256), ("test_a.py::test_marked", "x", 128)]


_OVERRIDE = """
import pytest

@pytest.fixture(scope="session")
def fcvm_spec(fcvm_spec):
    return fcvm_spec.merged({"image": "%s"})
"""


def test_a_snapshot_factory_takes_the_spec_of_the_test_that_calls_it(project) -> None:
    test = "def test_%s(fcvm_snapshot_factory): fcvm_snapshot_factory()\n"
    project.write(a__conftest_py=_OVERRIDE % "one", b__conftest_py=_OVERRIDE % "two")
    project.write(a__test_a_py=test % "a", b__test_b_py=test % "b")
    assert [one["image"] for one in project.watch()] == ["one", "two"]


def test_a_worker_clone_of_another_directorys_spec_is_an_error(project) -> None:
    test = "def test_%s(fcvm_worker_clone): pass\n"
    project.write(a__conftest_py=_OVERRIDE % "one", b__conftest_py=_OVERRIDE % "two")
    project.write(a__test_a_py=test % "a", a__test_a2_py=test % "a2", b__test_b_py=test % "b")
    project.write(
        conftest_py="from pytest_fcvm import fixtures\n"
        "class Clone:\n    def close(self): pass\n"
        "fixtures._find_snapshot = lambda *_: None\nfixtures._start_clone = lambda *_: Clone()\n"
    )
    result = project.run()
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*b/test_b.py::test_b: fcvm_worker_clone is one clone*(image one, here two)*"])


@pytest.mark.parametrize("value", ["None", "['a']", "b'a'", "{}"])
def test_a_variable_that_is_no_text_is_reported(value: str, project) -> None:
    project.write(test_a_py=f"import pytest\n@pytest.mark.fcvm(env={{'A': {value}}})\ndef test_a(): pass\n")
    result = project.run("--collect-only")
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines(["test_a.py::test_a: @pytest.mark.fcvm(env=…): the value of A is *"])


def test_a_worker_clone_of_another_directory_is_an_error_before_other_clones_and_in_a_request_of_the_test(
    project,
) -> None:
    project.write(
        conftest_py="""
import pytest
from pytest_fcvm import VmSpec
from pytest_fcvm.hookspecs import WORKER_SPEC

@pytest.fixture(scope="session")
def fcvm_worker_clone(pytestconfig):
    pytestconfig.stash[WORKER_SPEC] = VmSpec(image="oci:first")
""",
        test_a_py="def test_one(request): request.getfixturevalue('fcvm_worker_clone')\n"
        "def test_two(fcvm_worker_clone, fcvm_clone): pass\ndef test_three(): pass\n",
    )
    result = project.run("--fcvm-image=oci:second")
    assert result.parseoutcomes() == {"failed": 1, "passed": 1, "errors": 1}
    assert result.stdout.str().count("fcvm_worker_clone is one clone for all tests") >= 2
    assert "ImageError" not in result.stdout.str()
