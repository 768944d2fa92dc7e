"""QEMU before 8.2 opens a clone's memory file for writing, which a read-only cache refuses."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from pytest_fcvm.engine.qemu.engine import QemuEngine


def test_a_memory_file_that_can_only_be_read_is_copied_once(tmp_path: Path) -> None:
    memory, made = tmp_path / "memory", []

    def make_dir(name: str) -> Path:
        made.append(name)
        path = tmp_path / f"{name}.{len(made)}"
        path.mkdir()
        return path

    memory.write_bytes(b"of a guest")
    engine = QemuEngine(SimpleNamespace(make_dir=make_dir), tmp_path)  # type: ignore[arg-type]
    copy = engine._copy_of(memory)
    assert copy != memory
    assert copy.read_bytes() == b"of a guest"
    assert engine._copy_of(memory) == copy
    assert made == ["memory"]
