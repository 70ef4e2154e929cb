"""A batch of XLogData frames joined into one buffer, and the messages in it: where they are, and of what kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cdc.errors import ProtocolError
from cdc.pgoutput.messages import FRAME_HEADER_BYTES, POSTGRES_EPOCH_US
from cdc.pgoutput.tuples import PADDING_BYTES

__all__ = ["Wire", "cut"]

Bytes = npt.NDArray[np.uint8]
Positions = npt.NDArray[np.int64]

_MOST_BYTES = 1 << 30
"""Most bytes of frames in one buffer: a value is used at most twice, and Arrow's positions are int32."""

_PADDING = bytes(PADDING_BYTES)
_BEGIN, _COMMIT = b"BC"
_UNKNOWN_KIND = 1 << 40


def _shortest() -> Positions:
    """Return, by kind byte, the fewest bytes of such a message (exactly so many: B, C)."""
    table = np.full(256, _UNKNOWN_KIND, np.int64)
    for kinds, length in ((b"B", 21), (b"C", 26), (b"IUD", 8), (b"T", 6), (b"RYOM", 1)):
        table[list(kinds)] = length
    return table


_SHORTEST = _shortest()


@dataclasses.dataclass(frozen=True, slots=True)
class Wire:
    """n messages: position of the kind byte and one past the last byte, int64[n]; the kind, uint8[n]."""

    buffer: Bytes
    start: Positions
    end: Positions
    kind: Bytes

    def numbers(self, at: Positions, dtype: str) -> npt.NDArray[np.uint64]:
        """Read the big-endian numbers at the positions `at`, which are known to be inside, as uint64."""
        size = np.dtype(dtype).itemsize
        everywhere = np.ndarray((len(self.buffer) - size + 1,), f"=u{size}", self.buffer, strides=(1,))
        return everywhere[at].byteswap().astype(np.uint64, copy=False)

    def message(self, index: int) -> bytes:
        """Return one message."""
        content: bytes = self.buffer[self.start[index] : self.end[index]].tobytes()
        return content

    def timestamps(self, at: Positions) -> npt.NDArray[np.int64]:
        """Read the timestamps at the positions `at`, as microseconds since 1970 UTC."""
        return self.numbers(at, "u8").view(np.int64) + POSTGRES_EPOCH_US


def cut(frames: list[bytes]) -> Iterator[Wire]:
    """Join `frames` into as few buffers as their bytes allow, and find the messages in them.

    Raises:
        ProtocolError: something is no frame, or its message is of an unknown kind or too short for its fixed fields.
    """
    # Arrow looks at each frame once for both its length and its bytes; bytes.join and a second pass take half as long
    # again. Beyond 2 GiB it returns several arrays.
    joined = pa.array([*frames, _PADDING], pa.binary())
    if isinstance(joined, pa.Array) and joined.buffers()[2].size <= _MOST_BYTES + PADDING_BYTES:
        yield _find_messages(joined)
        return
    del joined
    end = np.cumsum([len(frame) for frame in frames])
    first = done = 0
    while first < len(frames):
        last = int(np.searchsorted(end, done + _MOST_BYTES, side="right"))
        if last == first:
            raise ProtocolError(f"expected a frame of at most {_MOST_BYTES} bytes, found {len(frames[first])}", 0)
        yield _find_messages(pa.array([*frames[first:last], _PADDING], pa.binary()))
        first, done = last, int(end[last - 1])


def _find_messages(joined: pa.BinaryArray) -> Wire:
    """Find the messages in an array of frames and the padding behind them."""
    _, offsets_buffer, data = joined.buffers()
    buffer = np.frombuffer(data, np.uint8)
    offsets = np.frombuffer(offsets_buffer, np.int32, len(joined)).astype(np.int64)
    frame, end = offsets[:-1], offsets[1:]
    length = end - frame
    short = length <= FRAME_HEADER_BYTES
    if short.any():
        at = int(short.argmax())
        raise ProtocolError(f"expected a frame of 26 bytes or more, found {length[at]}", int(frame[at]))
    foreign = buffer[frame] != ord("w")
    if foreign.any():
        raise ProtocolError("expected a frame of kind w", int(frame[int(foreign.argmax())]))
    start = frame + FRAME_HEADER_BYTES
    kind = buffer[start]
    _check_lengths(start, length - FRAME_HEADER_BYTES, kind)
    return Wire(buffer, start, end, kind)


def _check_lengths(start: Positions, length: Positions, kind: Bytes) -> None:
    """Raise ProtocolError at a message of an unknown kind, or one that is too short for its fixed fields."""
    shortest = _SHORTEST[kind]
    short = length < shortest
    fixed = (kind == _BEGIN) | (kind == _COMMIT)
    short |= fixed & (length != shortest)
    if not short.any():
        return
    at = int(short.argmax())
    if shortest[at] == _UNKNOWN_KIND:
        found = f"expected a message of kind B C R Y O I U D T M, found byte {kind[at]:#04x}"
    else:
        found = f"expected {shortest[at]} bytes of {chr(kind[at])}, found {length[at]}"
    raise ProtocolError(found, int(start[at]))
