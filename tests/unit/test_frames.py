"""The channel's frames: any pieces, any bytes, and what a hostile peer may send."""

from __future__ import annotations

import struct

import pytest
from apppot.guest.protocol import frames
from hypothesis import given
from hypothesis import strategies as st

KINDS = st.sampled_from(sorted(frames.GUEST_TYPES))
FRAMES = st.tuples(KINDS, st.integers(0, frames.LIMIT - 1), st.binary(max_size=300))
Frame = tuple[int, int, bytes]


def _pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    return [data[start:end] for start, end in zip(places, places[1:], strict=False)]


@given(st.lists(FRAMES), st.lists(st.integers(0, 1 << 16)))
def test_round_trip_in_any_pieces(sent: list[Frame], cuts: list[int]) -> None:
    data = b"".join(frames.encode(*frame) for frame in sent)
    decoder = frames.Decoder(frames.GUEST_TYPES)
    got = [frame for piece in _pieces(data, cuts) for frame in decoder.feed(piece)]
    assert got == sent
    assert decoder.pending() == 0


@given(st.lists(FRAMES, min_size=1))
def test_byte_by_byte(sent: list[Frame]) -> None:
    data = b"".join(frames.encode(*frame) for frame in sent)
    decoder = frames.Decoder(frames.GUEST_TYPES)
    assert [f for n in range(len(data)) for f in decoder.feed(data[n : n + 1])] == sent


@given(st.binary(max_size=2000))
def test_any_bytes_are_frames_or_an_error(data: bytes) -> None:
    """Nothing else happens, and no more is kept than one frame may have."""
    decoder = frames.Decoder(frames.GUEST_TYPES)
    try:
        decoder.feed(data)
    except frames.FrameError:
        return
    assert decoder.pending() <= frames.HEADER.size + frames.MAX_PAYLOAD


@given(st.integers(0, 255).filter(lambda kind: kind not in frames.GUEST_TYPES))
def test_unknown_type(kind: int) -> None:
    with pytest.raises(frames.FrameError):
        frames.Decoder(frames.GUEST_TYPES).feed(struct.pack("<BBI", kind, 0, 0))


def test_unknown_stream() -> None:
    with pytest.raises(frames.FrameError):
        frames.Decoder(frames.GUEST_TYPES).feed(struct.pack("<BBI", frames.DATA, frames.LIMIT, 0))


def test_oversized() -> None:
    header = struct.pack("<BBI", frames.DATA, 2, frames.MAX_PAYLOAD + 1)
    with pytest.raises(frames.FrameError):
        frames.Decoder(frames.GUEST_TYPES).feed(header)
    with pytest.raises(frames.FrameError):
        frames.encode(frames.DATA, 2, bytes(frames.MAX_PAYLOAD + 1))


def test_golden() -> None:
    assert frames.encode(frames.DATA, frames.STDOUT, b"abc") == b"\x20\x02\x03\0\0\0abc"
    assert frames.encode(frames.SIGNAL, payload=frames.U32.pack(15)) == (
        b"\x11\x00\x04\0\0\0\x0f\0\0\0"
    )
