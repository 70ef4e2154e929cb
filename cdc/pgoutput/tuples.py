"""Tuples sliced column by column, and their values gathered into Arrow arrays.

All tuples of one relation have the same columns in the same order. So instead of walking row by row, one cursor per
row is kept in an array, and each step moves every cursor over one column: about a dozen vector operations per column,
however many rows. Rows are taken in chunks, so that the cursors and the bytes under them stay in the CPU's cache.

A value is held as an Arrow *view*: 16 bytes, of which the first four (little endian) are the length; then, up to 12
bytes, the value itself, padded with zeros; beyond that its first four bytes, the number of the data buffer (0) and the
position within it. On the wire a text value is 't', length (big endian), bytes: so the 16 bytes after the 't' are
almost the view, one unaligned read per value fetches them, and a mask by length does the rest. Arrow turns an array
of views into contiguous bytes several times faster than NumPy can.

Source: Arrow columnar format, "Variable-size Binary View Layout"; PostgreSQL manual, "TupleData".
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cdc.errors import ProtocolError

__all__ = ["PADDING_BYTES", "Tuples", "gather", "slice_tuples", "views_of"]

Bytes = npt.NDArray[np.uint8]
Positions = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Views = npt.NDArray[np.complex128]
"""complex128 stands for any 16 bytes: of the types of that size it is the one that NumPy copies fastest."""

PADDING_BYTES = 32
"""What has to follow the last message in a buffer, so that reading a whole view at the last value stays inside."""

_CHUNK_ROWS = 8192
_INLINE_BYTES = 12
_NULL, _UNCHANGED, _TEXT = b"nut"


def _view_masks() -> Views:
    """Return, by length 0..13, which bytes of a view to keep: none of the length, then the value (13: its prefix)."""
    keep = np.zeros((_INLINE_BYTES + 2, 16), np.uint8)
    for length in range(_INLINE_BYTES + 1):
        keep[length, 4 : 4 + length] = 0xFF
    keep[_INLINE_BYTES + 1, 4:8] = 0xFF
    return keep.view(np.complex128).ravel()


_VIEW_MASKS = _view_masks()


@dataclasses.dataclass(slots=True)
class Tuples:
    """n tuples of one relation, sliced.

    Attributes:
        views: per column complex128[n], the Arrow views; all zero where there is no value.
        valid: per column bool[n], which rows have a value; None: all.
        unchanged: per column bool[n], which are unchanged TOAST (not valid either); None: none.
        end: int64[n], one past the last byte of each tuple.
    """

    views: list[Views]
    valid: list[Mask | None]
    unchanged: list[Mask | None]
    end: Positions


def slice_tuples(buffer: Bytes, start: Positions, end: Positions, n_columns: int) -> Tuples:
    """Slice n tuples of `n_columns` columns each.

    Args:
        buffer: uint8, with at least 16 bytes after the largest `end`.
        start: int64[n], position of each tuple's column count.
        end: int64[n], one past the last byte of the message that each tuple is in.

    Raises:
        ProtocolError: a tuple has another number of columns, an unknown kind of value, or runs past `end`.
    """
    n = len(start)
    tuples = Tuples(
        [np.empty(n, np.complex128) for _ in range(n_columns)],
        [None] * n_columns,
        [None] * n_columns,
        np.empty(n, np.int64),
    )
    # An unaligned 16-byte read just after every byte of the buffer: at a value's kind byte, its length and value.
    after = np.ndarray((len(buffer) - 16,), np.complex128, buffer, offset=1, strides=(1,))
    for first in range(0, n, _CHUNK_ROWS):
        rows = slice(first, min(first + _CHUNK_ROWS, n))
        limit = end[rows]
        cursor = _skip_counts(buffer, start[rows], limit, n_columns)
        for column in range(n_columns):
            cursor = _slice_column(buffer, after, cursor, limit, tuples, column, rows)
        tuples.end[rows] = cursor
    return tuples


def _skip_counts(buffer: Bytes, cursor: Positions, limit: Positions, n_columns: int) -> Positions:
    """Check the column counts at `cursor`; return the positions of the first columns."""
    _demand(cursor + 2 <= limit, cursor, "the message ends before its tuple")
    count = buffer[cursor].astype(np.int64) << 8
    count |= buffer[cursor + 1]
    _demand(count == n_columns, cursor, f"expected a tuple of {n_columns} columns, found another number")
    return cursor + 2


def _slice_column(
    buffer: Bytes, after: Views, cursor: Positions, limit: Positions, tuples: Tuples, column: int, rows: slice
) -> Positions:
    """Slice one column of the chunk `rows`; return the positions of the next one."""
    _demand(cursor < limit, cursor, "the message ends within its tuple")
    kind = buffer[cursor]
    views = after[cursor]
    length = views.view(">u4")[::4].astype(np.int64)
    following = cursor + 5
    is_text = kind == _TEXT
    if is_text.all():
        _fill_views(views, cursor, length)
        following += length
    else:
        _demand(is_text | (kind == _NULL) | (kind == _UNCHANGED), cursor, "expected a value of kind n, u or t")
        length *= is_text
        _fill_views(views, cursor, length)
        following += length
        following[~is_text] -= 4
        _note(tuples.valid, column, rows, is_text, len(tuples.end), True)
        _note(tuples.unchanged, column, rows, kind == _UNCHANGED, len(tuples.end), False)
    _demand(following <= limit, cursor, "a value is longer than the rest of its message")
    tuples.views[column][rows] = views
    return following


def _note(masks: list[Mask | None], column: int, rows: slice, mask: Mask, n: int, usual: bool) -> None:
    """Write `mask` into a column's mask of n rows, which exists only once it differs from `usual` somewhere."""
    whole = masks[column]
    if whole is None:
        if not (mask != usual).any():
            return
        whole = masks[column] = np.full(n, usual, np.bool_)
    whole[rows] = mask


def _fill_views(views: Views, cursor: Positions, length: Positions) -> None:
    """Turn the 16 bytes read at each value's length into its view, in place; `cursor` is at the kind bytes."""
    words = views.view(np.uint32).reshape(-1, 4)
    longest = int(length.max(initial=0))
    if longest > _INLINE_BYTES and int(length.min()) > _INLINE_BYTES:
        words[:, 2] = 0
        words[:, 3] = cursor
        words[:, 3] += 5
    else:
        pairs = views.view(np.uint64)
        pairs &= _VIEW_MASKS.take(length, mode="clip").view(np.uint64)
        if longest > _INLINE_BYTES:
            words[:, 3] |= ((cursor + 5) * (length > _INLINE_BYTES)).astype(np.uint32)
    words[:, 0] = length


def _demand(good: Mask, cursor: Positions, message: str) -> None:
    """Raise ProtocolError at the first cursor that is not good."""
    if not good.all():
        raise ProtocolError(message, int(cursor[int(good.argmin())]))


def views_of(buffer: Bytes, start: Positions, length: Positions) -> Views:
    """Return the views of n slices of `buffer`; `start` has to be 4 or more, and 16 bytes have to follow the last."""
    at_length = np.ndarray((len(buffer) - 15,), np.complex128, buffer, strides=(1,))
    views = at_length[start - 4]
    _fill_views(views, start - 5, length)
    return views


def gather(buffer: Bytes, views: Views, valid: Mask | None) -> pa.BinaryArray:
    """Copy n values out of `buffer` into an Arrow binary array.

    Args:
        buffer: uint8, shorter than 2**31 bytes: a view's position is an int32.
        views: complex128[n].
        valid: bool[n], which are not NULL; None: all.
    """
    validity = None if valid is None else pa.py_buffer(np.packbits(valid, bitorder="little"))
    viewed = pa.Array.from_buffers(
        pa.binary_view(), len(views), [validity, pa.py_buffer(views.view(np.uint8)), pa.py_buffer(buffer)]
    )
    return viewed.cast(pa.binary())
