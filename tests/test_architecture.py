"""The house stands as the design says: imports point down, parts are small, only the top knows pytest.

Each check gathers all that is wrong and says it at once.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pytest

PACKAGE = "pytest_fcvm"
ROOT = Path(__file__).parents[1] / PACKAGE

# Top floor first. Parts of one floor do not import each other; a folder is one part.
FLOORS = (
    {"plugin"},
    {"fixtures", "reporting", "cli"},
    {"hookspecs"},
    {"harness"},
    {"provision", "group"},
    {"snapshot"},
    {"clone"},
    {"ready"},
    {"image", "kernel"},
    {"engine"},
    {"network"},
    {"guest"},
    {"options", "pruning", "failures", "artifacts"},
    {"store"},
    {"host"},
    {"model"},
    {"errors"},
)
FLOOR_OF = {part: number for number, parts in enumerate(FLOORS) for part in parts}
# Not a floor: the package itself, its version, and the agents' binaries.
NO_PART = {"", "_version", "agents"}

MAY_IMPORT_PYTEST = {"plugin", "fixtures", "reporting", "hookspecs"}
LONGEST_FILE = 400
LONGEST_FUNCTION = 40
MAY_SLEEP = f"{PACKAGE}.host.clock"


@dataclass(frozen=True)
class Import:
    """One imported module, or name of a module, and the line that does it."""

    target: str
    line: int


@dataclass(frozen=True)
class Module:
    """A source file of the package."""

    path: Path
    tree: ast.Module = field(repr=False, compare=False)
    text: str = field(repr=False, compare=False)

    @cached_property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"

    @cached_property
    def name(self) -> str:
        return ".".join(self.path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")

    @cached_property
    def part(self) -> str:
        return part_of(self.name)

    @cached_property
    def imports(self) -> list[Import]:
        """Every import, those inside functions and under TYPE_CHECKING too."""
        return list(find_imports(self))

    def at(self, line: int) -> str:
        return f"{self.path.relative_to(ROOT.parent)}:{line}"


def part_of(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def find_imports(module: Module) -> Iterator[Import]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_base(module, node)
            yield Import(base, node.lineno)
            yield from (Import(f"{base}.{alias.name}", node.lineno) for alias in node.names)


def resolve_base(module: Module, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parts = module.name.split(".") + (["_"] if module.is_package else [])
    return ".".join([*parts[: -node.level], *([node.module] if node.module else [])])


def load() -> list[Module]:
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        text = path.read_text()
        found.append(Module(path, ast.parse(text), text))
    return found


MODULES = load()
NAMES = {module.name for module in MODULES}


def inner_imports(module: Module) -> Iterator[Import]:
    """Yield imports of modules of this package, once each; `from a import b` is b's where b is a module."""
    seen = set()
    for found in module.imports:
        if found.target in NAMES and found.target != module.name and found.target not in seen:
            seen.add(found.target)
            yield found


def functions(module: Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def complain(faults: list[str]) -> None:
    if faults:
        pytest.fail("\n".join([f"{len(faults)} found:", *faults]), pytrace=False)


def test_the_package_is_there_to_be_judged() -> None:
    assert {"errors", "host", "engine", "model"} <= {module.part for module in MODULES}
    assert sum(len(list(inner_imports(module))) for module in MODULES) > 50


def test_every_part_has_a_floor() -> None:
    known = FLOOR_OF.keys() | NO_PART
    complain(sorted({f"{module.part}: on no floor of the design" for module in MODULES if module.part not in known}))


def test_imports_point_down() -> None:
    faults = []
    for module in MODULES:
        for found in inner_imports(module):
            here, there = FLOOR_OF.get(module.part), FLOOR_OF.get(part_of(found.target))
            if here is None or there is None or module.part == part_of(found.target):
                continue
            if there <= here:
                how = "up to" if there < here else "sideways to"
                faults.append(f"{module.at(found.line)} imports {how} {found.target}")
    complain(faults)


def test_no_module_imports_itself_through_others() -> None:
    graph = {
        # A package's __init__ runs before its modules; that they need it is no circle.
        module.name: sorted(
            found.target for found in inner_imports(module) if not module.name.startswith(f"{found.target}.")
        )
        for module in MODULES
    }
    complain([" -> ".join(circle) for circle in find_circles(graph)])


def find_circles(graph: dict[str, list[str]]) -> list[list[str]]:
    open_path: list[str] = []
    done: set[str] = set()
    circles = []

    def visit(name: str) -> None:
        if name in open_path:
            circles.append([*open_path[open_path.index(name) :], name])
        elif name not in done:
            open_path.append(name)
            for target in graph[name]:
                visit(target)
            done.add(open_path.pop())

    for name in graph:
        visit(name)
    return circles


def test_files_are_at_most_400_lines() -> None:
    lengths = {module: module.text.count("\n") for module in MODULES}
    complain([f"{module.at(1)} {lines} lines" for module, lines in lengths.items() if lines > LONGEST_FILE])


def test_functions_are_at_most_40_lines() -> None:
    """A function that is one literal, or returns one, is a table and may be longer."""
    faults = []
    for module in MODULES:
        for node in functions(module):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > LONGEST_FUNCTION and not is_table(node):
                faults.append(f"{module.at(node.lineno)} {node.name}: {lines} lines")
    complain(faults)


def is_table(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    body = [part for part in node.body if not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))]
    literal = ast.Dict | ast.List | ast.Tuple | ast.Set
    return len(body) == 1 and isinstance(body[0], ast.Return) and isinstance(body[0].value, literal)


def test_only_what_a_person_touches_imports_pytest() -> None:
    complain(
        [
            f"{module.at(found.line)} imports {found.target}"
            for module in MODULES
            if module.part not in MAY_IMPORT_PYTEST
            for found in module.imports
            if found.target.split(".")[0] in {"pytest", "_pytest", "pluggy", "xdist"}
        ]
    )


def test_nothing_sleeps_outside_the_waiting_helper() -> None:
    faults = []
    for module in MODULES:
        if module.name == MAY_SLEEP:
            continue
        faults += [f"{module.at(found.line)} imports sleep" for found in module.imports if found.target == "time.sleep"]
        faults += [
            f"{module.at(node.lineno)} sleeps"
            for node in ast.walk(module.tree)
            if isinstance(node, ast.Attribute) and node.attr == "sleep" and getattr(node.value, "id", "") == "time"
        ]
    complain(faults)


def test_every_public_function_has_a_docstring() -> None:
    complain(
        [
            f"{module.at(node.lineno)} {name} has no docstring"
            for module in MODULES
            for name, node in public_functions(module.tree, "")
            if ast.get_docstring(node) is None
        ]
    )


def public_functions(
    body: ast.Module | ast.ClassDef, prefix: str
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]]:
    """Yield public functions, classes and their public methods; not overloads, setters and functions in functions."""
    for node in body.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        if isinstance(node, ast.ClassDef):
            yield prefix + node.name, node
            yield from public_functions(node, f"{prefix}{node.name}.")
        elif not any(decorator_name(decorator) in {"overload", "setter"} for decorator in node.decorator_list):
            yield prefix + node.name, node


def decorator_name(decorator: ast.expr) -> str:
    return str(getattr(decorator, "attr", getattr(decorator, "id", "")))


def test_nobody_asks_for_our_pid_by_a_name_that_tests_replace() -> None:
    programs = {
        f"{PACKAGE}.host.supervisor.guard",
        f"{PACKAGE}.host.supervisor.spawner",
    }  # of processes where no test runs
    assert not [
        module.at(node.lineno)
        for module in load()
        if module.name not in programs
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.getpid", "time.clock_gettime")
    ]
