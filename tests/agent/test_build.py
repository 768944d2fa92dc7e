"""guest_image/build: the same sources give the same bytes, and stale agents are rebuilt."""

import importlib.util
import struct

import pytest

needs_zig = pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="ziglang is not installed")


@needs_zig
def test_two_builds_give_the_same_small_static_binary(builder, tmp_path):
    (first,) = builder.build_agents(["x86_64"], tmp_path / "one")
    (second,) = builder.build_agents(["x86_64"], tmp_path / "two")
    data = first.read_bytes()
    assert data == second.read_bytes()
    assert len(data) < 200_000
    assert 3 not in program_header_types(data)  # PT_INTERP: a dynamic binary has one


def program_header_types(data):
    start = struct.unpack_from("<Q", data, 32)[0]
    size, count = struct.unpack_from("<HH", data, 54)
    return {struct.unpack_from("<I", data, start + size * number)[0] for number in range(count)}


@needs_zig
def test_the_other_architecture_is_cross_built(builder, tmp_path):
    (agent,) = builder.build_agents(["aarch64"], tmp_path)
    data = agent.read_bytes()
    assert struct.unpack_from("<H", data, 18)[0] == 183  # EM_AARCH64
    assert len(data) < 200_000
    assert 3 not in program_header_types(data)


@needs_zig
def test_an_agent_of_the_same_sources_is_kept_and_another_is_replaced(builder, tmp_path):
    agent = tmp_path / "agent-x86_64"
    agent.write_bytes(b"\x7fELF something " + builder.MARK.encode() + builder.source_digest().encode())
    kept = agent.stat().st_mtime_ns
    builder.build_agents(["x86_64"], tmp_path)
    assert agent.stat().st_mtime_ns == kept
    agent.write_bytes(b"\x7fELF something " + builder.MARK.encode() + b"0" * 16)
    builder.build_agents(["x86_64"], tmp_path)
    assert builder.embedded_digest(agent) == builder.source_digest()


def test_a_compiler_that_fails_is_reported_with_its_output(builder, tmp_path):
    with pytest.raises(builder.BuildError, match="no-such-compiler"):
        builder.build_host_agent(tmp_path, "no-such-compiler")
    with pytest.raises(builder.BuildError, match="false failed"):
        builder.build_host_agent(tmp_path, "false")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("architecture", ["x86_64", "aarch64"])
def test_the_packages_agents_match_the_sources(builder, architecture):
    agent = builder.DEFAULT_DEST / f"agent-{architecture}"
    if not agent.exists():
        pytest.skip(f"{agent.name} has not been built: guest_image/build --arch {architecture}")
    assert builder.embedded_digest(agent) == builder.source_digest(), "older than its sources: run guest_image/build"
