"""The documentation is true: generated pages are fresh, links work, and the names and messages in it exist."""

from __future__ import annotations

import ast
import re
import runpy
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import pytest_fcvm
from pytest_fcvm.options import ROWS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md")])
_FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\[\]]*\]\(([^)\s]+)\)")
_SPACES = re.compile(r"\s+")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, language: str) -> list[str]:
    return [text for found, text in _FENCE.findall(page.read_text(encoding="utf-8")) if found == language]


def prose(page: Path) -> str:
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def anchor(heading: str) -> str:
    """Return a heading's anchor as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.fixture(autouse=True)
def _width_of_generated_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")  # as docs/generate.py sets it, and taken back


@cache
def generator() -> dict[str, Any]:
    return runpy.run_path(str(DOCS / "generate.py"))


REFERENCE = sorted(path.name for path in (DOCS / "reference").glob("*.md"))


@pytest.mark.parametrize("name", REFERENCE)
def test_a_reference_page_is_what_the_code_says_now(name: str) -> None:
    made = generator()["pages"]()[name]
    assert (DOCS / "reference" / name).read_text(encoding="utf-8") == made, "run `make docs`"


def test_no_generated_page_is_missing() -> None:
    assert sorted(generator()["pages"]()) == REFERENCE


def test_members_that_the_reference_leaves_out_exist() -> None:
    for name, members in generator()["INTERNAL"].items():
        for member in members:
            assert hasattr(getattr(pytest_fcvm, name), member), f"{name}.{member}"


@each_page
def test_every_relative_link_works(page: Path) -> None:
    for link in _LINK.findall(prose(page)):
        if ":" in link:
            continue
        path, _, fragment = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if fragment:
            headings = re.findall(r"^#+ (.*)$", prose(target), re.MULTILINE)
            assert fragment in map(anchor, headings), link


@each_page
def test_every_page_is_reached_from_the_index(page: Path) -> None:
    index = DOCS / "README.md"
    linked = {(DOCS / link.partition("#")[0]).resolve() for link in _LINK.findall(prose(index)) if ":" not in link}
    assert page == index or page in linked


@each_page
def test_every_python_example_compiles_and_uses_existing_names(page: Path) -> None:
    for text in blocks(page, "python"):
        tree = ast.parse(text)
        compile(tree, str(page), "exec")
        for node in ast.walk(tree):
            assert not list(unknown_names(node)), ast.unparse(node)


def unknown_names(node: ast.AST) -> Iterator[str]:
    """Yield the names of pytest-fcvm in a piece of an example that do not exist."""
    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pytest_fcvm"):
        yield from (name.name for name in node.names if not hasattr(pytest_fcvm, name.name))
    if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("clone", "fcvm_clone", "base"):
        yield from [] if hasattr(pytest_fcvm.Clone, node.attr) else [node.attr]
    if isinstance(node, ast.Call):
        known = known_keywords(ast.unparse(node.func))
        yield from (word.arg for word in node.keywords if known and word.arg and word.arg not in known)


def known_keywords(function: str) -> set[str]:
    spec_fields = {row.marker for row in ROWS if row.is_spec_field}
    if function in ("pytest.mark.fcvm", "fcvm_clone_factory", "fcvm_snapshot_factory"):
        return spec_fields | {"spec", "name"}
    if function == "VmSpec":
        return {item.name for item in fields(pytest_fcvm.VmSpec)}
    return {item.name for item in fields(pytest_fcvm.Prepare)} if function == "Prepare" else set()


@each_page
def test_every_named_option_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    flags = set(re.findall(r"--fcvm-[a-z]+(?:-[a-z]+)*", text))
    assert flags <= {row.flag for row in ROWS}
    settings = set(re.findall(r"^fcvm_\w+(?= =)", text, re.MULTILINE))
    assert settings <= {f"fcvm_{row.marker}" for row in ROWS}


_COMMANDS = ("doctor", "replay", "setup", "shell", "snapshot")


@each_page
def test_every_shown_command_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for target in re.findall(r"(?:`|\$ )make ([a-z-]+)", text):
        assert target in targets
    for command in re.findall(r"(?:`|\$ |run: )fcvm ([a-z-]+)", text):
        assert command in _COMMANDS
    for script in re.findall(r"python ((?:examples|docs|guest_image|benchmarks|tests)/[\w/.-]+\.py)", text):
        assert (ROOT / script).exists()


def test_the_tutorial_shows_the_example_that_runs() -> None:
    example = (ROOT / "examples/tutorial/test_first.py").read_text(encoding="utf-8")
    assert example in blocks(DOCS / "tutorial/first-suite.md", "python")


@cache
def messages() -> frozenset[str]:
    """Return every text of the package except docstrings, and of the agent, with `…` for inserted values."""
    found: set[str] = set()
    for path in (ROOT / "guest_image/agent").glob("*.c"):
        texts = re.findall(r'"((?:[^"\\\n]|\\.)*)"', path.read_text(encoding="utf-8"))
        found |= {re.sub(r"%[-.*0-9]*l*[a-z]", "…", text) for text in texts}
    for path in (ROOT / "pytest_fcvm").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                found.add("".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
                found.add(node.value)
    return frozenset(found)


TROUBLE = re.findall(r"^### `(.*)`$", (DOCS / "how-to/troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("heading", TROUBLE)
def test_the_code_has_every_message_of_the_troubleshooting_page(heading: str) -> None:
    pattern = re.compile(re.escape(heading).replace("…", ".*"), re.DOTALL)
    assert any(pattern.fullmatch(message) for message in messages()), heading


def test_towncrier_knows_the_type_of_every_changelog_fragment() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["towncrier"]
    types = {item["directory"] for item in settings["type"]}
    fragments = [path for path in (ROOT / settings["directory"]).iterdir() if path.name != ".gitignore"]
    for path in fragments:
        assert re.fullmatch(rf"(\+[\w-]+|\d+)\.({'|'.join(types)})\.md", path.name), path.name
        assert path.read_text(encoding="utf-8").strip()
    assert settings["start_string"].strip() in (ROOT / settings["filename"]).read_text(encoding="utf-8")


def test_the_map_has_the_floors_of_the_architecture_test() -> None:
    tree = ast.parse((ROOT / "tests/test_architecture.py").read_text(encoding="utf-8"))
    assigned = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
    floors: dict[int, set[str]] = {}
    text = (DOCS / "development/map.md").read_text(encoding="utf-8")
    for floor, name in re.findall(r"^\| (\d+) \| `(\w+)", text, re.MULTILINE):
        floors.setdefault(int(floor), set()).add(name)
    assert list(floors.values()) == list(ast.literal_eval(assigned["FLOORS"]))


def test_the_map_names_every_module_of_the_package() -> None:
    text = (DOCS / "development/map.md").read_text(encoding="utf-8")
    for path in (ROOT / "pytest_fcvm").iterdir():
        is_module = path.suffix == ".py" or any(path.glob("*.py"))  # an old checkout has empty directories of bytecode
        if is_module and not path.name.startswith("_"):
            assert f"`{path.name}{'/' if path.is_dir() else ''}`" in text, path.name
