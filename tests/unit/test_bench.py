"""The output of `make bench`, from made-up samples: the table for people and the JSON for programs."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

_REPORT = Path(__file__).parents[2] / "benchmarks/report.py"


@pytest.fixture(scope="module")
def bench() -> dict[str, Any]:
    return runpy.run_path(str(_REPORT))


@pytest.fixture
def report(bench: dict[str, Any]) -> Any:
    measure = bench["Measure"]
    measures = (
        measure(key="ready", title="until ready", unit="ms", section="a clone", rival="run"),
        measure(key="memory", title="private memory", unit="MiB", section="a clone"),
        measure(key="run", title="run", unit="ms", section="podman"),
    )
    return bench["Report"](measures=measures, rounds=3, host={"cpu": "made up", "cores": 2})


def rows(text: str) -> list[list[str]]:
    """Return the lines of the table, each as a list of title and figures."""
    return [[cell for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]


def test_a_line_shows_median_extremes_count_and_podmans_ratio(bench: dict[str, Any], report: Any) -> None:
    report.add("ready", 30.0, 10.0, 20.0)
    report.add("run", 400.0, 500.0, 5000.0)
    table = [[cell.strip() for cell in row] for row in rows(bench["render_table"](report))]
    assert table == [
        ["median", "min", "max", "n", "podman ÷ clone"],
        ["a clone"],
        ["until ready [ms]", "20.0", "10.0", "30.0", "3", "25.00"],
        ["podman"],
        ["run [ms]", "500.0", "400.0", "5000", "3"],
    ]


def test_figures_in_a_column_are_aligned_on_the_right(bench: dict[str, Any], report: Any) -> None:
    report.add("ready", 1.0)
    report.add("memory", 12345.0)
    _, _, first, second = bench["render_table"](report).splitlines()
    assert first.index("1.0") + len("1.0") == second.index("12345") + len("12345")


def test_without_podman_there_is_no_ratio_and_the_reason_is_shown(bench: dict[str, Any], report: Any) -> None:
    report.add("ready", 10.0)
    report.skipped["podman"] = "not installed"
    text = bench["render_table"](report)
    assert text.splitlines()[-1] == "skipped: podman: not installed"
    assert rows(text)[2][-1].strip() == "1"
    assert bench["render_json"](report)["podman_per_clone"] == {}


def test_json_has_every_sample_and_the_facts_of_the_host(bench: dict[str, Any], report: Any) -> None:
    report.add("ready", 10.0, 20.0)
    report.add("run", 30.0)
    report.skipped["-n 2"] = "no xdist"
    assert json.loads(json.dumps(bench["render_json"](report))) == {
        "format": 1,
        "rounds": 3,
        "host": {"cpu": "made up", "cores": 2},
        "measures": {
            "ready": {
                "title": "a clone: until ready",
                "unit": "ms",
                "median": 15.0,
                "min": 10.0,
                "max": 20.0,
                "samples": [10.0, 20.0],
            },
            "run": {"title": "podman: run", "unit": "ms", "median": 30.0, "min": 30.0, "max": 30.0, "samples": [30.0]},
        },
        "podman_per_clone": {"ready": 2.0},
        "skipped": {"-n 2": "no xdist"},
    }


def test_a_sample_with_an_unknown_key_is_refused(report: Any) -> None:
    with pytest.raises(KeyError, match="typo"):
        report.add("typo", 1.0)


@pytest.mark.parametrize(("load", "cores", "warns"), [(1.0, 2, False), (1.01, 2, True), (1.01, 4, False)])
def test_a_load_above_half_of_the_cores_gives_a_warning(
    bench: dict[str, Any], load: float, cores: int, warns: bool
) -> None:
    assert bench["load_warning"](load, cores).startswith("WARNING") == warns
