"""Cuts the stream of frames into batches of whole transactions.

State: the frames received and not handed on yet. Only the receiver's thread touches it. No socket and no server here:
frames come from a callable, batches go to another.

A batch is cut at a Commit: the last one within its limits of rows and bytes, the first one past its age, and that of a
transaction that asks for it (`FENCE_PREFIX`). A transaction that alone is past the limit of rows or bytes goes out in
pieces, once whatever was whole before it has: pieces with ``complete=False``, the last of which ends with its Commit.

The kind of a message is read and nothing else, except for ``M``: one call of `Assembly.take` per socket read, one turn
of its loop per message.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from cdc.errors import ProtocolError
from cdc.pgoutput.messages import FRAME_HEADER_BYTES, WireBatch

__all__ = ["FENCE_PREFIX", "Assembly", "Limits"]

FENCE_PREFIX = b"cdc"
"""A transactional message with this prefix ends its batch at its transaction's Commit."""

_BEGIN, _COMMIT, _MESSAGE = b"BCM"
_NO_CHANGES = b"BCMOR"
_KIND = FRAME_HEADER_BYTES
_PREFIX = _KIND + 1 + 1 + 8
_KEEPALIVE_BYTES = 18


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """How large and how old a batch may become.

    Attributes:
        rows: change messages.
        bytes: of frames, headers included.
        age_s: seconds since its first frame came.
    """

    rows: int
    bytes: int
    age_s: float


class Assembly:
    """The batch in hand.

    Attributes:
        open: whether a transaction has begun and not ended.
        ended: whether the server has ended the stream.
    """

    def __init__(
        self, limits: Limits, put: Callable[[WireBatch], None], keepalive: Callable[[memoryview], None]
    ) -> None:
        """Create an empty one.

        Args:
            limits: where to cut.
            put: takes each batch; may block.
            keepalive: takes each keepalive message, in its place in the stream.
        """
        self._limits = limits
        self._put = put
        self._keepalive = keepalive
        self.open = False
        self.ended = False
        self._frames: list[bytes] = []
        self._size = 0
        self._rows_left = limits.rows
        # The first `_whole` frames are whole transactions and messages outside of any.
        self._whole = 0
        self._whole_size = 0
        self._whole_rows_left = 0
        self._fence = False
        self._born = 0.0

    @property
    def empty(self) -> bool:
        """Whether everything received has been handed on, and no transaction is open."""
        return not self._frames and not self.open

    @property
    def last_frame(self) -> bytes | None:
        """The newest frame that has not been handed on."""
        return self._frames[-1] if self._frames else None

    def age_left(self, now: float) -> float | None:
        """Return the seconds until `cut` is due; None: nothing could be cut."""
        return max(0.0, self._born + self._limits.age_s - now) if self._whole else None

    def take(self, get: Callable[[int], tuple[int, memoryview]]) -> int:
        """Take messages from `get` (PQgetCopyData) until it has no whole one left; return how many it had.

        Raises:
            ProtocolError: a frame is too short to be one.
        """
        taken = 0
        while True:
            # All that the inner loop touches is local; whatever is called outside of it sees `self` brought up to date.
            frames = self._frames
            append = frames.append
            size = self._size
            rows_left = self._rows_left
            max_bytes = self._limits.bytes
            taken -= len(frames)
            while True:
                n, view = get(1)
                if n < 26:
                    kind = 0
                    break
                frame = view.tobytes()
                append(frame)
                size += n
                rows_left -= 1
                kind = frame[25]
                # B, C, M, O and R, of which no change message is one.
                if kind < 68 or 77 <= kind <= 82 or size > max_bytes or rows_left < 0:
                    break
            self._size = size
            self._rows_left = rows_left
            taken += len(frames)
            if kind:
                self._special(kind, frame)
            elif n > 0:
                taken += 1
                self._short(n, view)
            else:
                self.ended = n < 0
                return taken

    def cut(self) -> None:
        """Hand on what is whole, if anything is."""
        if not self._whole:
            return
        batch, rest = self._frames[: self._whole], self._frames[self._whole :]
        full = self.open or self._whole_size >= self._limits.bytes or self._whole_rows_left <= 0
        self._begin(rest, self._size - self._whole_size, self._whole_rows_left - self._rows_left)
        self._put(WireBatch(batch, complete=True, full=full))

    def _special(self, kind: int, frame: bytes) -> None:
        """Follow a Begin, Commit or Message, or a frame that reaches a limit."""
        if kind in _NO_CHANGES:
            self._rows_left += 1
        if kind == _COMMIT:
            self.open = False
            self._mark()
            full = self._size >= self._limits.bytes or self._rows_left <= 0
            if full or self._fence or time.monotonic() - self._born >= self._limits.age_s:
                self.cut()
            return
        if kind == _BEGIN:
            self.open = True
        elif kind == _MESSAGE:
            self._message(frame)
        if len(self._frames) == 1:
            self._born = time.monotonic()
        if self._is_over:
            self._overflow()

    @property
    def _is_over(self) -> bool:
        """Whether what is in hand is past a limit."""
        return self._size > self._limits.bytes or self._rows_left < 0

    def _message(self, frame: bytes) -> None:
        if self.open:
            end = _PREFIX + len(FENCE_PREFIX)
            self._fence |= frame[_PREFIX : end + 1] == FENCE_PREFIX + b"\0"
        elif self._whole == len(self._frames) - 1:
            # Outside of any transaction: whole by itself.
            self._mark()

    def _mark(self) -> None:
        """Note that all frames in hand are whole."""
        self._whole = len(self._frames)
        self._whole_size = self._size
        self._whole_rows_left = self._rows_left

    def _overflow(self) -> None:
        """Make room within a transaction: hand on what is whole before it, and a piece of it if that is not enough."""
        self.cut()
        if self.open and self._is_over:
            piece = self._frames
            self._begin([], 0, 0)
            # The end of a transaction in pieces is not kept waiting for more.
            self._fence = True
            self._put(WireBatch(piece, complete=False))

    def _begin(self, frames: list[bytes], size: int, rows: int) -> None:
        """Start the next batch with `frames` of `size` bytes and `rows` changes: the transaction that goes on."""
        self._frames = frames
        self._size = size
        self._rows_left = self._limits.rows - rows
        self._whole = 0
        # A fence in what was whole has led to this cut: one that is left belongs to the open transaction.
        self._fence = self._fence and self.open
        self._born = time.monotonic()

    def _short(self, n: int, view: memoryview) -> None:
        if n != _KEEPALIVE_BYTES or view[0] != ord("k"):
            raise ProtocolError(f"a frame of {n} bytes is neither a keepalive nor a message", 0)
        self._keepalive(view)
