"""Evidence of failed tests, by fake clones: it may be lost, which the report says, and never changes an outcome."""

from __future__ import annotations

import pytest

_FAKES = """
import pytest
from pytest_fcvm.hookspecs import REPORTER

class Fake:
    def __init__(self, name, raises=None):
        self.name, self.raises, self.closed, self.printed_bytes = name, raises, False, 0

    def evidence(self):
        if self.raises:
            raise self.raises
        return {"workload log": f"printed by {self.name}\\udc80"}

@pytest.fixture
def meet(pytestconfig):
    def make(name, raises=None):
        fake = Fake(name, raises)
        pytestconfig.stash[REPORTER].add_clone(fake)
        return fake
    return make

@pytest.fixture(scope="module")
def shared(pytestconfig):
    fake = Fake("common")
    pytestconfig.stash[REPORTER].add_clone(fake)
    return fake
"""
_TWO = """
def test_fails(meet):
    meet("one")
    assert 0
def test_after(): pass
"""


@pytest.mark.parametrize("workers", [(), ("-n2",)])
def test_a_file_in_the_way_of_artifacts_costs_only_the_artifacts(workers: tuple[str, ...], project) -> None:
    project.write(conftest_py=_FAKES, test_a_py=_TWO)
    (project.path / "fcvm-artifacts").write_text("")
    result = project.run("--fcvm-artifacts=failed", *workers)
    assert result.parseoutcomes() == {"failed": 1, "passed": 1}
    note = f"nothing was kept in {project.path / 'fcvm-artifacts'}: Not a directory"
    assert result.outlines.count(note) == 1
    assert result.outlines.count(f"fcvm: {note}") == 1


@pytest.mark.parametrize(
    "raises", ["OSError(5, 'gone')", "SystemExit(3)", "pytest.fail.Exception('no')", "pytest.skip.Exception('no')"]
)
def test_evidence_that_raises_is_lost_and_other_evidence_is_not(raises: str, project) -> None:
    test = f"def test_fails(meet):\n    meet('bad', {raises})\n    meet('good')\n    assert 0\n"
    project.write(conftest_py=_FAKES, test_a_py=f"import pytest\n{test}")
    result = project.run("--fcvm-artifacts=failed")
    assert result.parseoutcomes() == {"failed": 1}
    result.stdout.fnmatch_lines(["*fcvm good: workload log*", "printed by good?xdc80", "*bad has no evidence: *"])


@pytest.mark.parametrize(
    "patched", ["os.open", "os.mkdir", "os.getpid", "time.time", "shutil.copy", "pathlib.Path.mkdir"]
)
def test_a_test_that_patches_modules_loses_at_most_its_evidence(patched: str, project) -> None:
    project.write(
        conftest_py=_FAKES,
        test_a_py=f"""
import pytest
def test_fails(meet, monkeypatch):
    meet("one")
    monkeypatch.setattr("{patched}", lambda *a, **k: pytest.fail("patched"))
    assert 0, "its own reason"
def test_after(): pass
""",
    )
    result = project.run("--fcvm-artifacts=failed", "--fcvm-keep=failed", "--tb=line", "--show-capture=no")
    assert "INTERNALERROR" not in result.stdout.str() + result.stderr.str()
    assert result.parseoutcomes() == {"failed": 1, "passed": 1}
    result.stdout.fnmatch_lines(["*its own reason*"])


def test_every_test_has_a_directory_of_its_own_whatever_its_id(project) -> None:
    ids = ["a/b", "a b", "A b", "x" * 230 + "1", "x" * 230 + "2", "測" * 120]
    project.write(
        conftest_py=_FAKES,
        test_a_py=f"""
import pytest
@pytest.mark.parametrize("x", {ids!r})
def test_fails(meet, x):
    meet("one")
    assert 0
""",
    )
    result = project.run("--fcvm-artifacts=failed", "--tb=no")
    assert result.parseoutcomes() == {"failed": len(ids)}
    names = [path.name for path in (project.path / "fcvm-artifacts").iterdir()]
    assert len({name.lower() for name in names}) == len(ids)
    assert max(len(name.encode()) for name in names) <= 255
    assert all((project.path / "fcvm-artifacts" / name / "one.workload-log.txt").exists() for name in names)


def test_a_shared_clone_is_in_the_report_of_every_test_that_uses_it(project) -> None:
    project.write(
        conftest_py=_FAKES,
        test_a_py="""
def test_makes(shared): pass
def test_uses(shared): assert 0
def test_other(meet):
    meet("own")
    assert 0
""",
    )
    output = project.run().stdout.str()
    assert output.count("fcvm common: workload log (shared with other tests)") == 1
    assert output.count("fcvm own: workload log") == 1


def test_a_fixture_that_fails_after_its_test_has_the_evidence(project) -> None:
    project.write(
        conftest_py=_FAKES,
        test_a_py="""
import pytest
@pytest.fixture
def fragile(meet):
    yield meet("late")
    assert 0
def test_passes(fragile): pass
""",
    )
    result = project.run("--fcvm-artifacts=failed")
    assert result.parseoutcomes() == {"passed": 1, "errors": 1}
    result.stdout.fnmatch_lines(["*fcvm late: workload log*"])
    assert list((project.path / "fcvm-artifacts").glob("*/late.*"))
