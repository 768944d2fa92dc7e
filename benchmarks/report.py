"""The output of the benchmarks: a table for people and JSON for programs, both from the same samples."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["Measure", "Report", "load_warning", "render_json", "render_table"]

_BUSY_PER_CORE = 0.5
_HEADINGS = ("", "median", "min", "max", "n", "podman ÷ clone")


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One line of the table. `rival` is the key of podman's corresponding measure."""

    key: str
    title: str
    unit: str
    section: str
    rival: str = ""


@dataclass(kw_only=True)
class Report:
    """The results of a run: facts about the host, samples by the key of their measure, and what was skipped."""

    measures: Sequence[Measure]
    rounds: int
    host: Mapping[str, str | float] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def add(self, key: str, *values: float) -> None:
        """Add samples to a measure. Raise KeyError for a key that is not in the table."""
        if key not in {measure.key for measure in self.measures}:
            raise KeyError(key)
        self.samples.setdefault(key, []).extend(values)

    def ratio(self, measure: Measure) -> float | None:
        """Return podman's median divided by the clone's (above 1, the clone is faster), or None if one is missing."""
        rival, ours = self.samples.get(measure.rival), self.samples.get(measure.key)
        if not rival or not ours or statistics.median(ours) == 0:
            return None
        return statistics.median(rival) / statistics.median(ours)


def load_warning(load: float, cores: int) -> str:
    """Return a warning if this host is too busy for valid figures, else an empty string.

    `load` is the load average of the last minute.
    """
    if load <= _BUSY_PER_CORE * cores:
        return ""
    return f"WARNING: load average {load:.2f} on {cores} cores: other work is running, the figures are too high"


def render_table(report: Report) -> str:
    """Return a table of the measures that have samples, by section, followed by what was skipped."""
    lines: list[tuple[str, ...]] = [_HEADINGS]
    section = ""
    for measure in report.measures:
        samples = report.samples.get(measure.key)
        if not samples:
            continue
        if measure.section != section:
            section = measure.section
            lines.append((section,))
        lines.append(_cells(report, measure, samples))
    text = _align(lines)
    for name, why in report.skipped.items():
        text += f"\nskipped: {name}: {why}"
    return text


def render_json(report: Report) -> dict[str, object]:
    """Return the content of `--json` as plain values. It has only measures with samples."""
    shown = [measure for measure in report.measures if report.samples.get(measure.key)]
    ratios = {measure.key: ratio for measure in shown if (ratio := report.ratio(measure)) is not None}
    return {
        "format": 1,
        "rounds": report.rounds,
        "host": dict(report.host),
        "measures": {measure.key: _entry(measure, report.samples[measure.key]) for measure in shown},
        "podman_per_clone": {key: round(ratio, 3) for key, ratio in ratios.items()},
        "skipped": dict(report.skipped),
    }


def _entry(measure: Measure, samples: Sequence[float]) -> dict[str, object]:
    return {
        "title": f"{measure.section}: {measure.title}",
        "unit": measure.unit,
        "median": round(statistics.median(samples), 3),
        "min": round(min(samples), 3),
        "max": round(max(samples), 3),
        "samples": [round(sample, 3) for sample in samples],
    }


def _cells(report: Report, measure: Measure, samples: Sequence[float]) -> tuple[str, ...]:
    ratio = report.ratio(measure)
    figures = [_figure(value) for value in (statistics.median(samples), min(samples), max(samples))]
    title = f"  {measure.title} [{measure.unit}]"
    return (title, *figures, str(len(samples)), "" if ratio is None else f"{ratio:.2f}")


def _figure(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _align(lines: Sequence[tuple[str, ...]]) -> str:
    rows = [line for line in lines if len(line) > 1]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=False))
        ).rstrip()
        for line in lines
    )
