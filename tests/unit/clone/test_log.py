"""The workload's log on the host: found across pieces, safe to show, and nobody waits in vain for it."""

from __future__ import annotations

import re
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_fcvm.clone.log import WorkloadLog, tail
from pytest_fcvm.host.clock import Deadline, monotonic

_LONG_S = 20.0


@pytest.fixture
def log(tmp_path: Path) -> Iterator[WorkloadLog]:
    """An empty log."""
    log = WorkloadLog(tmp_path / "log")
    yield log
    log.close()


def _search(log: WorkloadLog, regex: str, timeout_s: float = _LONG_S) -> re.Match[str] | None:
    return log.search(re.compile(regex), Deadline(timeout_s), lambda: False)


class _Search(threading.Thread):
    """A search on a thread of its own."""

    def __init__(self, log: WorkloadLog, regex: str) -> None:
        super().__init__(daemon=True)
        self._log, self._regex = log, regex
        self.found: re.Match[str] | None = None
        self.start()

    def run(self) -> None:
        self.found = _search(self._log, self._regex)

    def text(self) -> str:
        self.join(_LONG_S + 5)
        assert self.found is not None
        return self.found[0]


def test_the_bases_lines_come_first_and_are_searched_too(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(b"from the base\n")
    log = WorkloadLog(tmp_path / "log", before=tmp_path / "base")
    log.append(b"from the clone\n")
    assert log.content() == b"from the base\nfrom the clone\n"
    found = _search(log, "from the (.*)")
    assert found is not None
    assert found[1] == "base"
    log.close()


def test_a_line_that_comes_in_pieces_is_found_when_it_is_whole(log: WorkloadLog) -> None:
    waiting = _Search(log, r"^listening on port (\d+)$")
    for piece in (b"starting\nlisten", b"ing on po", b"rt 80", b"80\nnext"):
        log.append(piece)
    assert waiting.text() == "listening on port 8080"


@pytest.mark.parametrize("apart", [b"", b"between\n" * 5000])
@pytest.mark.parametrize("regex", [r"(?s)^ready$.*^ready$", "ready\n(?:between\n)*ready", r"ready\s(between\s)*ready$"])
def test_a_match_may_span_lines(log: WorkloadLog, regex: str, apart: bytes) -> None:
    waiting = _Search(log, regex)
    for piece in (b"starting\nrea", b"dy\n", apart, b"ready", b"\nnext\n"):
        log.append(piece)
    assert waiting.text() == f"ready\n{apart.decode()}ready"


def test_matches_are_counted_those_of_the_base_too(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(b"ready 1\nready 2 ready 3\n")
    log = WorkloadLog(tmp_path / "log", before=tmp_path / "base")
    log.append(b"ready 4\nalready 5\nready 6")
    found = [log.search(re.compile(r"\bready \d"), Deadline(0.05), lambda: False, times=times) for times in range(1, 7)]
    assert [match and match[0] for match in found] == ["ready 1", "ready 2", "ready 3", "ready 4", "ready 6", None]
    log.close()


@pytest.mark.parametrize("text", ["form\x0cfeed", "next\x85line", "line\u2028sep", "return\rhere", "\x1c\x1d\x1e\x0b"])
def test_a_newline_alone_ends_a_line(log: WorkloadLog, text: str) -> None:
    log.append(f"before\n<{text}>\nafter\n".encode())
    found = _search(log, r"^<.*>$")
    assert found is not None
    assert found[0] == f"<{text}>"


def test_half_a_line_is_not_taken_for_the_whole(log: WorkloadLog) -> None:
    looks = 0

    def complete_after_the_first_look() -> bool:
        nonlocal looks
        looks += 1
        if looks == 2:
            log.append(b"80\n")
        return False

    log.append(b"port 80")
    found = log.search(re.compile(r"port \d+"), Deadline(_LONG_S), complete_after_the_first_look)
    assert found is not None
    assert found[0] == "port 8080"


def test_a_prompt_that_never_ends_its_line_is_found_before_the_deadline(log: WorkloadLog) -> None:
    log.append(b"welcome\nPassword: ")
    started = monotonic()
    found = _search(log, "^Password: $")
    assert found is not None
    assert monotonic() - started < _LONG_S / 2


def test_an_open_line_that_did_not_match_is_looked_at_again_when_it_grows(log: WorkloadLog) -> None:
    log.append(b"not ")
    assert _search(log, "not yet", 0.5) is None
    waiting = _Search(log, "not yet")
    log.append(b"yet")
    assert waiting.text() == "not yet"


def test_a_character_cut_in_two_is_put_together(log: WorkloadLog) -> None:
    waiting = _Search(log, "grün")
    data = "grün\n".encode()
    log.append(data[:3])
    log.append(data[3:])
    assert waiting.text() == "grün"


def test_nothing_found_is_none_at_the_deadline(log: WorkloadLog) -> None:
    log.append(b"something else\n")
    assert _search(log, "never", 0.05) is None


def test_a_search_gives_up_on_request_and_sees_the_last_output(log: WorkloadLog) -> None:
    over = threading.Event()
    results: list[re.Match[str] | None] = []
    thread = threading.Thread(
        target=lambda: results.append(log.search(re.compile("never"), Deadline(None), over.is_set)), daemon=True
    )
    thread.start()
    over.set()
    log.wake()
    thread.join(_LONG_S)
    assert results == [None]
    log.append(b"last words")
    assert log.search(re.compile("last words"), Deadline(None), over.is_set) is not None


def test_a_search_ends_when_the_log_is_closed(log: WorkloadLog) -> None:
    waiting = _Search(log, "never")
    log.close()
    waiting.join(5)
    assert not waiting.is_alive()
    assert waiting.found is None
    log.append(b"too late")


def test_many_readers_and_one_writer_lose_nothing(log: WorkloadLog) -> None:
    readers = [_Search(log, f"^line {number * 500} of 2000$") for number in range(1, 5)]
    text = "".join(f"line {number} of 2000\n" for number in range(2001)).encode()
    for start in range(0, len(text), 777):
        log.append(text[start : start + 777])
    assert [reader.text() for reader in readers] == [f"line {number * 500} of 2000" for number in range(1, 5)]
    assert log.content() == text


def test_a_long_log_is_not_searched_from_its_start_again(log: WorkloadLog) -> None:
    log.append(b"x" * 99 + b"\n")
    waiting = _Search(log, "the end")
    started = monotonic()
    for _ in range(200):
        log.append((b"y" * 99 + b"\n") * 1000)  # 20 MB in all
    log.append(b"the end\n")
    assert waiting.text() == "the end"
    assert monotonic() - started < _LONG_S


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b"plain\ttext\n", "plain\ttext"),
        (b"\x1b[31mred\x1b[0m \x1b]0;title\x07", "\\x1b[31mred\\x1b[0m \\x1b]0;title\\x07"),
        (b"a\0b\x08c\x7f", "a\\x00b\\x08c\\x7f"),
        (b"\xff\xfe " + "grün".encode(), "\\xff\\xfe grün"),
        ("\u202eright to left, \u2066isolated\x9b31m".encode(), "\\x202eright to left, \\x2066isolated\\x9b31m"),
        (b"one\r\ntwo\rthree", "one\ntwo\nthree"),
        (b"", ""),
    ],
)
def test_a_tail_has_no_byte_that_drives_a_terminal(data: bytes, shown: str) -> None:
    assert tail(data) == shown


def test_a_tail_is_a_hundred_lines() -> None:
    lines = tail(b"".join(b"%d\n" % number for number in range(1000))).splitlines()
    assert (len(lines), lines[0], lines[-1]) == (100, "900", "999")


@pytest.mark.parametrize("data", [b"x" * 100_000, b"\0" * 100_000, ("ü" * 50_000).encode()])
def test_a_tail_is_sixteen_kib_however_it_is_escaped(data: bytes) -> None:
    assert 8_000 <= len(tail(data)) <= 16_384


def test_a_line_is_found_across_the_pieces_that_a_long_log_is_read_in(log: WorkloadLog, tmp_path: Path) -> None:
    line = b"x" * 99 + b"\n"
    log.append(line * 10_485 + b"here is what is looked for\n" + line * 10_000 + b"the last")
    assert _search(log, "^here is what is looked for$") is not None
    assert _search(log, "^the last$", 0.5) is not None
    assert _search(log, "^nowhere$", 0.5) is None
    log.save(tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == log.content()
    assert log.content().endswith(log.end())
    assert len(log.end()) == 16 * 1024


def test_a_line_without_end_is_searched_in_pieces(log: WorkloadLog) -> None:
    log.append(b"y" * (3 << 20) + b" at last")
    assert _search(log, "at last$") is not None


def test_of_a_long_log_little_is_in_memory_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes((b"z" * 63 + b"\n") * (1 << 18))
    log = WorkloadLog(tmp_path / "log", before=tmp_path / "base")
    for _ in range(16):
        log.append((b"z" * 63 + b"\n") * (1 << 14))
    tracemalloc.start()
    assert _search(log, "^a$", 0.1) is None
    assert log.end().endswith(b"z\n")
    log.save(tmp_path / "copy")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    log.close()
    assert peak < 8 << 20
