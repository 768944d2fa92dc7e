"""Text of a guest, made fit for a report."""

from __future__ import annotations

__all__ = ["TAIL_BYTES", "printable_tail"]

TAIL_BYTES = 16 * 1024
_TAIL_LINES = 100


def printable_tail(text: str) -> str:
    """Return the last lines, at most 100 and 16 Ki characters, with control characters escaped.

    A guest could use them to control a terminal or to break a JUnit file.
    """
    lines = text.splitlines()[-_TAIL_LINES:]
    escaped = ("".join(c if c.isprintable() or c == "\t" else f"\\x{ord(c):02x}" for c in line) for line in lines)
    return "\n".join(escaped)[-TAIL_BYTES:]  # an escaped character takes four
