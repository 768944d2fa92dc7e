"""Runtimes that use more of a kernel than a web server: an interpreter, and a JVM with its threads."""

from __future__ import annotations

import urllib.request
from collections.abc import Callable

import pytest

from pytest_fcvm import CloneFactory


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=60) as answer:
        return str(answer.read().decode())


@pytest.mark.parametrize(
    ("name", "path", "words"), [("python", "/", "Directory listing for /"), ("java", "/", "java 17.")], ids=str
)
def test_a_runtime_serves_from_each_of_its_clones(
    name: str, path: str, words: str, image: Callable[[str], str], fcvm_clone_factory: CloneFactory
) -> None:
    for _ in range(2):
        clone = fcvm_clone_factory(image=image(name), mem="384M", ready=f"http:8000{path}", ready_timeout="300s")
        assert words in _get(clone.url(8000, path))
