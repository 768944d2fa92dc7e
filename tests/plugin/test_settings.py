"""Options as users give them: command line, environment, ini file, fixture and marker."""

from __future__ import annotations

import pytest

from pytest_fcvm.options import ROWS, RowKind

_ONE = "def test_one(fcvm_clone): pass\n"


def test_every_option_is_in_the_help_under_its_two_names(project) -> None:
    text = " ".join(project.run("--help").outlines)
    unwrapped = text.replace(" ", "")  # a line may end at a hyphen
    for row in ROWS:
        assert f" {row.flag}" in text
        kind = {RowKind.VALUE: "string", RowKind.LIST: "linelist", RowKind.FLAG: "bool"}[row.kind]
        assert f"fcvm_{row.marker} ({kind}):" in text, row.name
        assert row.kind is not RowKind.VALUE or not row.default or f"[{row.default}]".replace(" ", "") in unwrapped


def test_the_marker_is_described_with_all_its_arguments(project) -> None:
    (line,) = [line for line in project.run("--markers").outlines if line.startswith("@pytest.mark.fcvm(")]
    for row in ROWS:
        assert (f"{row.marker}=…" in line) is row.is_spec_field


def test_a_nearer_setting_takes_precedence(project) -> None:
    project.write(
        pytest_ini="[pytest]\nfcvm_image = ini\nfcvm_mem = 100\nfcvm_env =\n  A=ini\n  B=ini\n",
        test_marks_py="""
import pytest

pytestmark = pytest.mark.fcvm(image="module", env={"C": "module"})

def test_module(fcvm_clone): pass

@pytest.mark.fcvm(image="class", env={"D": "class"}, mem="300M")
class TestClass:
    def test_class(self, fcvm_clone): pass

    @pytest.mark.fcvm(image="function", env=["C=function"])
    def test_function(self, fcvm_clone): pass

    @pytest.mark.parametrize("x", [pytest.param(1, marks=pytest.mark.fcvm(image="parameter")), 2])
    def test_parameter(self, fcvm_clone, x): pass
""",
        test_plain_py=_ONE,
        spec__conftest_py="""
import pytest

@pytest.fixture(scope="session")
def fcvm_spec(fcvm_spec):
    return fcvm_spec.merged({"image": "fixture", "env": {"B": "fixture"}})
""",
        spec__test_spec_py=_ONE + 'import pytest\n@pytest.mark.fcvm(mem="700")\ndef test_two(fcvm_clone): pass\n',
    )

    def vms(*arguments: str, **environment: str) -> dict[str, tuple[str, int, dict[str, str]]]:
        seen = project.watch(*arguments, **environment)
        return {one["test"].partition("/")[2] or one["test"]: (one["image"], one["mem"], one["env"]) for one in seen}

    ini = {"A": "ini", "B": "ini"}
    assert vms("test_plain.py") == {"test_plain.py::test_one": ("ini", 100, ini)}
    environment = {"FCVM_IMAGE": "environment", "FCVM_ENV": "B=environment"}
    assert vms("test_plain.py", **environment) == {
        "test_plain.py::test_one": ("environment", 100, {"A": "ini", "B": "environment"})
    }
    command = ("--fcvm-image=command", "--fcvm-env=E=command", "--fcvm-mem=200")
    env = {"A": "ini", "B": "environment", "E": "command"}
    assert vms("test_plain.py", *command) == {"test_plain.py::test_one": ("command", 200, env)}
    assert vms("spec", *command) == {
        "test_spec.py::test_one": ("fixture", 200, {**env, "B": "fixture"}),
        "test_spec.py::test_two": ("fixture", 700, {**env, "B": "fixture"}),
    }
    outer, inner = {**env, "C": "module"}, {**env, "C": "module", "D": "class"}
    assert vms("test_marks.py", *command) == {
        "test_marks.py::test_module": ("module", 200, outer),
        "test_marks.py::TestClass::test_class": ("class", 300, inner),
        "test_marks.py::TestClass::test_function": ("function", 300, {**inner, "C": "function"}),
        "test_marks.py::TestClass::test_parameter[1]": ("parameter", 300, inner),
        "test_marks.py::TestClass::test_parameter[2]": ("class", 300, inner),
    }


def test_workers_see_what_the_controller_sees(project) -> None:
    project.write(pytest_ini="[pytest]\nfcvm_mem = 100\n", test_plain_py=_ONE)
    arguments = ("--fcvm-image=command", "--fcvm-env=TOKEN")
    alone = project.watch(*arguments, TOKEN="secret", FCVM_READY="tcp:80")
    assert alone == project.watch("-n2", *arguments)
    assert (alone[0]["env"], alone[0]["ready"]) == ({"TOKEN": "secret"}, "tcp:80")


def test_relative_paths_start_where_they_were_written(project) -> None:
    for name in ("ini", "shell", "tests"):
        project.write(**{f"{name}__file_txt": name})
    project.write(
        pytest_ini="[pytest]\nfcvm_map = ini/file.txt:/ini\nfcvm_image = ./ini\n",
        tests__test_map_py=_ONE
        + 'import pytest\n@pytest.mark.fcvm(image="oci:x", map=["file.txt:/mark"])\ndef test_two(fcvm_clone): pass\n',
    )
    project.monkeypatch.chdir(project.path / "shell")
    where = str(project.path / "tests")
    base = project.path
    assert [(one["image"], one["map"]) for one in project.watch(where)] == [
        (f"{base}/ini", [f"{base}/ini/file.txt:/ini"]),
        (f"oci:{base}/tests/x", [f"{base}/tests/file.txt:/mark"]),
    ]
    (one, _) = project.watch(where, "--fcvm-map=file.txt:/shell", "--fcvm-image=oci-archive:../a.tar")
    assert (one["image"], one["map"]) == (f"oci-archive:{base}/a.tar", [f"{base}/shell/file.txt:/shell"])


@pytest.mark.parametrize(
    ("ini", "arguments", "environment", "message", "hint"),
    [
        ("fcvm_mem = lots", [], {}, "fcvm_mem: 'lots' is not a size of at least 1 MiB", "write 512, 512M or 2G"),
        ("", ["--fcvm-ready=soon"], {}, "--fcvm-ready: ready 'soon': unknown mode 'soon'", "http:80/path"),
        ("", [], {"FCVM_PULL": "often"}, "FCVM_PULL: 'often' is not one of missing, always, never", "write one of"),
        ("", ["--fcvm-env=GONE"], {}, "--fcvm-env: environment variable 'GONE' is not set here", "export it or"),
        ("", ["--fcvm-kernel="], {}, "--fcvm-kernel: the path is empty", "name a file or directory"),
    ],
)
def test_a_wrong_setting_ends_the_run_before_it_starts(
    ini: str, arguments: list[str], environment: dict[str, str], message: str, hint: str, project
) -> None:
    project.write(pytest_ini=f"[pytest]\n{ini}\n", test_plain_py="def test_one(): pass\n")
    for workers in ([], ["-n2"]):
        result = project.run(*workers, *arguments, **environment)
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        assert result.errlines[0] == f"ERROR: {message}"
        assert result.errlines[1].startswith(f"hint: {hint}")
        assert "Traceback" not in result.stderr.str()


def test_a_choice_is_checked_by_the_command_line_itself(project) -> None:
    result = project.run("--fcvm-engine=bochs")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--fcvm-engine: invalid choice: 'bochs'*"])


@pytest.mark.parametrize("line", ["fcvm_timings = maybe", "fcvm_cpus = none"])
def test_a_wrong_ini_setting_is_named_and_does_not_prevent_help(project, line: str) -> None:
    project.write(pytest_ini=f"[pytest]\n{line}\n", test_a_py="def test_a(): pass\n")
    told = project.run("-q")
    assert told.ret == 4
    assert line.partition(" ")[0] in "\n".join([*told.outlines, *told.errlines])
    for words in (["--help"], ["--version"], ["--markers"], ["--fixtures"]):
        assert project.run(*words).ret == 0, words


def test_an_empty_boolean_is_no_setting_anywhere(project) -> None:
    project.write(pytest_ini="[pytest]\nfcvm_timings =\n", test_a_py="def test_a(): pass\n")
    for words, environment in (([], {}), ([], {"FCVM_TIMINGS": ""}), (["-o", "fcvm_rebuild="], {}), (["-n2"], {})):
        assert project.run("-q", *words, **environment).ret == 0, (words, environment)


@pytest.mark.parametrize("line", ["fcvm_env = NOT_SET_HERE", "fcvm_map = gone:/srv", "fcvm_cache_dir = ~no-user/x"])
def test_a_setting_that_names_something_missing_ends_no_run_without_clones(project, line: str) -> None:
    project.write(pytest_ini=f"[pytest]\n{line}\n", test_a_py="def test_a(): pass\n" + _ONE)
    for words in (["--help"], ["--co", "-q"], ["-q", "-m", "not fcvm"]):
        assert project.run(*words).ret == 0, words
