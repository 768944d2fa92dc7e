"""Frames and fields, and that Python and C have the same names and numbers."""

from __future__ import annotations

import random
import re
from enum import IntEnum
from pathlib import Path

import pytest

from pytest_fcvm.errors import UsageProblem
from pytest_fcvm.guest import frames
from pytest_fcvm.guest.frames import (
    PROTOCOL_BODY_MAX,
    PROTOCOL_PAYLOAD_MAX,
    EventKind,
    FieldTag,
    Frame,
    FrameParser,
    FrameType,
    ProtocolError,
    StreamKind,
    decode_fields,
    encode_fields,
    encode_frame,
    encode_open,
    new_secret,
)

HEADER = Path(__file__).resolve().parents[3] / "guest_image/agent/protocol.h"
GOOD = encode_frame(FrameType.DATA, 7, b"\0payload")


def enums_of_the_header() -> dict[str, dict[str, int]]:
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    return {
        name: {key: int(value) for key, value in re.findall(r"(\w+)\s*=\s*(\d+)", body)}
        for name, body in re.findall(r"enum\s*(\w*)\s*\{(.*?)\}", text, flags=re.DOTALL)
    }


@pytest.mark.parametrize(
    ("name", "prefix", "ours"),
    [
        ("frame_type", "FRAME_", FrameType),
        ("stream_kind", "KIND_", StreamKind),
        ("event_kind", "EVENT_", EventKind),
        ("field_tag", "FIELD_", FieldTag),
    ],
)
def test_every_enum_has_the_names_and_numbers_of_the_header(name: str, prefix: str, ours: type[IntEnum]) -> None:
    theirs = {key.removeprefix(prefix): value for key, value in enums_of_the_header()[name].items()}
    assert {member.name: member.value for member in ours} == theirs


def test_every_number_and_text_of_the_header_is_here_under_its_name() -> None:
    numbers = enums_of_the_header()[""]
    texts = dict(re.findall(r'#define (PROTOCOL_\w+) "(.*?)"', HEADER.read_text()))
    assert len(enums_of_the_header()) == 5, "the header has an enum that no test compares"
    assert {name: getattr(frames, name) for name in numbers} == numbers
    ours = {name: getattr(frames, name) for name in texts}
    assert {name: text.decode() if isinstance(text, bytes) else text for name, text in ours.items()} == texts


def test_frames_come_out_whole_whatever_pieces_they_arrive_in() -> None:
    sent = [Frame(FrameType.DATA, n, bytes(range(n % 256))) for n in range(50)]
    sent.append(Frame(FrameType.DATA, 1, bytes(PROTOCOL_PAYLOAD_MAX)))
    data = b"".join(encode_frame(*frame) for frame in sent)
    dice = random.Random(1)
    for longest in (1, 7, 300, 10_000, 1_000_000):
        parser, got, at = FrameParser(), list[Frame](), 0
        while at < len(data):
            step = dice.randint(1, longest)
            got += parser.feed(data[at : at + step])
            at += step
        assert got == sent
        assert parser.offset == len(data)


@pytest.mark.parametrize(
    ("bad", "offset", "what"),
    [
        ((PROTOCOL_PAYLOAD_MAX + 1).to_bytes(4, "little") + b"\x06" + bytes(4), 0, "a payload of 65537 bytes"),
        (bytes(4) + b"\x0f" + bytes(4), 4, "frame type 15"),
        (bytes(4) + b"\0" + bytes(4), 4, "frame type 0"),
        (encode_frame(FrameType.DATA, 7, b"abc")[:-1] + b"\x01", 12, "a trailer of 1"),
    ],
)
def test_malformed_input_is_refused_with_its_offset_after_the_frames_before_it(
    bad: bytes, offset: int, what: str
) -> None:
    for split in (0, 5, len(GOOD), len(GOOD) + 5):
        parser, got = FrameParser(), list[Frame]()

        def feed_all(parser: FrameParser = parser, got: list[Frame] = got, split: int = split) -> None:
            for piece in ((GOOD + bad)[:split], (GOOD + bad)[split:]):
                got.extend(parser.feed(piece))

        with pytest.raises(ProtocolError, match=f"offset {len(GOOD) + offset}: {what}") as caught:
            feed_all()
        assert got == [(FrameType.DATA, 7, b"\0payload")]
        assert caught.value.evidence["bytes around the fault"]


def test_random_bytes_are_frames_or_a_protocol_error_and_nothing_else() -> None:
    dice, refused = random.Random(2), 0
    for _ in range(2000):
        data = bytearray(GOOD * dice.randint(1, 3))
        for _ in range(dice.randint(0, 4)):
            data[dice.randrange(len(data))] = dice.randrange(256)
        parser = FrameParser()
        try:
            for frame in parser.feed(data + dice.randbytes(dice.randint(0, 40))):
                decode_fields(frame.payload)
        except ProtocolError:
            refused += 1
    assert refused > 500


def test_a_long_body_follows_its_open_in_body_frames() -> None:
    body = random.Random(3).randbytes(3 * PROTOCOL_PAYLOAD_MAX)
    first, *rest = FrameParser().feed(encode_open(9, StreamKind.EXEC, body))
    assert first.type is FrameType.OPEN
    assert first.payload[:5] == bytes([StreamKind.EXEC]) + len(body).to_bytes(4, "little")
    assert {frame.type for frame in rest} == {FrameType.BODY}
    assert first.payload[5:] + b"".join(frame.payload for frame in rest) == body
    assert {frame.stream for frame in (first, *rest)} == {9}


@pytest.mark.parametrize("length", [0, 1, PROTOCOL_PAYLOAD_MAX - 5, PROTOCOL_PAYLOAD_MAX - 4])
def test_a_body_of_any_length_arrives_whole(length: int) -> None:
    got = list(FrameParser().feed(encode_open(1, StreamKind.EXEC, bytes(length))))
    assert sum(len(frame.payload) for frame in got) == length + 5
    assert all(frame.payload for frame in got)


def test_fields_keep_order_repeats_and_bytes_that_are_not_text() -> None:
    fields = decode_fields(
        encode_fields([(FieldTag.ARG, "ls"), (FieldTag.PORT, 80), (FieldTag.ARG, "\udcff/ü"), (FieldTag.MAC, b"\0\1")])
    )
    assert fields.texts(FieldTag.ARG) == ["ls", "\udcff/ü"]
    assert fields[FieldTag.ARG][1] == b"\xff/\xc3\xbc"
    assert fields.number(FieldTag.PORT) == 80
    assert fields[FieldTag.MAC] == [b"\0\1"]
    assert (fields.text(FieldTag.CWD), fields.find_number(FieldTag.PID)) == ("", None)


def test_unknown_tags_do_not_disturb_known_ones() -> None:
    strange = b"\xff\xff\x03\0\0\0abc"
    assert decode_fields(strange + encode_fields([(FieldTag.PID, 4)])).number(FieldTag.PID) == 4


def test_fields_that_are_cut_off_are_refused() -> None:
    whole = encode_fields([(FieldTag.ARG, "abc")])
    for length in range(1, len(whole)):
        with pytest.raises(ProtocolError, match="malformed fields"):
            decode_fields(whole[:length])


@pytest.mark.parametrize("value", ["a\0b", "\ud800", -1, 1 << 64])
def test_a_value_that_no_program_can_take_is_the_callers_mistake(value: str | int) -> None:
    with pytest.raises(UsageProblem, match="ARG"):
        encode_fields([(FieldTag.ARG, value)])


def test_a_body_over_the_limit_is_the_callers_mistake() -> None:
    encode_fields([(FieldTag.ARG, "x" * (PROTOCOL_BODY_MAX - 6))])
    with pytest.raises(UsageProblem, match="over the limit") as caught:
        encode_fields([(FieldTag.ARG, "x" * (PROTOCOL_BODY_MAX - 5))])
    assert "stdin" in caught.value.hint


def test_secrets_are_distinct_and_hold_no_zero_byte() -> None:
    secrets = {new_secret() for _ in range(2000)}
    assert len(secrets) == 2000
    assert {len(secret) for secret in secrets} == {16}
    assert not any(0 in secret for secret in secrets)
