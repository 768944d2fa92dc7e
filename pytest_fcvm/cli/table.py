"""Tables and quantities for people, JSON for machines: the one place where commands render."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

__all__ = ["render_age", "render_json", "render_size", "render_table"]

_AGES = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def render_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows in columns as wide as their widest cell, two spaces apart."""
    widths = [max(len(jail_dir) for jail_dir in column) for column in zip(head, *rows, strict=True)]
    lines = (
        "  ".join(jail_dir.ljust(width) for jail_dir, width in zip(row, widths, strict=True)) for row in (head, *rows)
    )
    return "".join(f"{line.rstrip()}\n" for line in lines)


def render_json(value: Any) -> str:
    """Return JSON with a line end."""
    return json.dumps(value, indent=1) + "\n"


def render_size(size_bytes: int) -> str:
    """Return a size in MiB, or GiB from 10 of those on."""
    return f"{size_bytes / (1 << 30):.1f} GiB" if size_bytes >= 10 << 30 else f"{size_bytes / (1 << 20):.0f} MiB"


def render_age(age_s: float) -> str:
    """Return an age in its largest whole unit."""
    for unit_s, name in _AGES:
        if age_s >= unit_s:
            return f"{int(age_s // unit_s)} {name} ago"
    return "now"
