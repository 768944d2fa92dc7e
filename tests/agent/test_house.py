"""The agent's sources are short, and no file calls back, directly or not, into a file that calls it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[2] / "guest_image/agent"
LONGEST_FILE = 400

Graph = dict[str, dict[str, set[str]]]  # using file -> defining file -> names


def code_of(path: Path) -> str:
    """Return a source without comments, texts and preprocessor lines."""
    text = re.sub(r"/\*.*?\*/", " ", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    text = re.sub(r'"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])+\'', '""', text)
    return re.sub(r"^#.*(?:\\\n.*)*$", "", text, flags=re.MULTILINE)


def definitions(code: str) -> Iterator[str]:
    """Yield the functions and variables that a source defines for others: outside of blocks, and not static."""
    while (shorter := re.sub(r"\{[^{}]*\}", "@", code)) != code:
        code = shorter
    for statement in re.split(r";|(?<=\))\s*@", code):
        words = statement.replace("@", " ").strip()
        if match := re.match(r"(?!static\b|struct \w+$|enum\b|typedef\b)[\w\s*]*?\b(\w+)\s*(?:\(|\[|=|$)", words):
            yield match[1]


def calls_between(sources: dict[str, str]) -> Graph:
    """Return which names each source uses that another one defines."""
    home = {name: file for file, code in sources.items() for name in definitions(code)}
    graph: Graph = defaultdict(lambda: defaultdict(set))
    for file, code in sources.items():
        for word in set(re.findall(r"\w+", code)):
            if home.get(word, file) != file:
                graph[file][home[word]].add(word)
    return graph


def circles(graph: Graph) -> list[str]:
    """Describe each edge that lies on a circle."""

    def reach(start: str) -> set[str]:
        found, ahead = set[str](), [start]
        while ahead:
            new = set(graph.get(ahead.pop(), {})) - found
            found |= new
            ahead += new
        return found

    reached = {file: reach(file) for file in graph}
    return [
        f"{file} -> {other}: {', '.join(sorted(names))}"
        for file, uses in sorted(graph.items())
        for other, names in sorted(uses.items())
        if file in reached.get(other, ())
    ]


def read_sources() -> dict[str, str]:
    return {path.name: code_of(path) for path in SOURCES.glob("*.c")}


def test_every_source_of_the_agent_is_short() -> None:
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES.glob("*.[ch]")}
    assert len(lengths) > 50
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE} == {}


def test_the_definition_of_every_declared_function_is_found() -> None:
    """The graph of calls lacks functions without one."""
    homes = {name for code in read_sources().values() for name in definitions(code)}
    declared = {
        name
        for path in SOURCES.glob("*.h")
        for line in re.split(r"[;}]", code_of(path))
        if not re.match(r"\s*(?:static|struct \w+\s*\{|enum)", line)
        for name in re.findall(r"^\s*(?:noreturn |const )?[\w ]+?[ *](\w+)\((?!\*)", line)
    }
    assert len(declared) > 150
    assert declared - homes == set()


def test_calls_between_sources_of_the_agent_form_no_circle() -> None:
    assert circles(calls_between(read_sources())) == []


def test_a_circle_is_found_through_a_third_file() -> None:
    sources = {
        "top.c": "int top(void) { if (1) { return middle(); } return 0; }",
        "middle.c": "static int top_of_all; int middle(void) { return bottom_state + top_of_all; }",
        "bottom.c": "int bottom_state = 1; void bottom(void) { }",
    }
    assert circles(calls_between(sources)) == []
    sources["bottom.c"] += " void call_back(void) { top(); }"
    assert circles(calls_between(sources)) == [
        "bottom.c -> top.c: top",
        "middle.c -> bottom.c: bottom_state",
        "top.c -> middle.c: middle",
    ]
