r"""Postgres' arrays as lists: the output of array_out, all arrays of a column at once.

``{1,NULL,"NULL","a\"b"}``: an element is quoted if it has to be, an unquoted NULL is NULL, and a backslash takes the
byte behind it literally. Bytes are looked at, not characters: no byte of a character of several bytes is ASCII.

Lists have one dimension, and begin with 1. Arrays of more dimensions (``{{1},{2}}``) or other bounds (``[0:1]={1,2}``)
do not fit, and neither do those with an element that does not fit.

Source: array_out in arrayfuncs.c; PostgreSQL manual, "Arrays".
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cdc.pgoutput.types.column import ColumnType, Mask, bools

__all__ = ["ListType"]

Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]

_BLOCK_BYTES = 1 << 22  # splitting takes some 20 times the memory of the text

_QUOTE, _BACKSLASH = b'"\\'
_NULL = np.frombuffer(b"NULL", np.uint8)
_ELEMENT = "(x)"  # x.months would be looked for in a table or a column named x first
_EMPTY = pa.scalar("{}")  # made once, see `temporal`


@dataclasses.dataclass(frozen=True, slots=True)
class ListType:
    """A `ColumnType` of lists.

    Attributes:
        element: how an element is held.
        delimiter: what stands between elements: a semicolon for those of type box, a comma for all others.
    """

    element: ColumnType
    delimiter: str = ","

    @property
    def arrow(self) -> pa.DataType:
        """See `ColumnType`."""
        return pa.list_(self.element.arrow)

    @property
    def duckdb(self) -> str:
        """See `ColumnType`."""
        return self.element.duckdb + "[]"

    def parse(self, text: pa.StringArray) -> tuple[pa.Array, Mask | None]:
        """See `ColumnType`."""
        blocks = [self._parse_block(text[low:high]) for low, high in itertools.pairwise(_cuts(text))]
        misfits = np.concatenate([misfits for _, misfits in blocks])
        return pa.concat_arrays([lists for lists, _ in blocks]), misfits if misfits.any() else None

    def _parse_block(self, text: pa.StringArray) -> tuple[pa.ListArray, Mask]:
        fits = _looks_like_a_list(text)
        bounds, elements, closed = _split(pc.if_else(pa.array(fits), text, _EMPTY), ord(self.delimiter))
        values, unfit = self.element.parse(elements)
        fits &= closed
        if unfit is not None:
            unfit_before = _running_total(unfit)[bounds]
            fits &= unfit_before[1:] == unfit_before[:-1]
        if fits.all():
            return self._lists(bounds, values, None), ~fits
        n_elements = np.diff(bounds)
        values = values.filter(pa.array(np.repeat(fits, n_elements)))
        lists = self._lists(_running_total(np.where(fits, n_elements, 0)), values, pa.array(~fits))
        return lists, ~fits & bools(pc.is_valid(text))

    def _lists(self, bounds: Integers, values: pa.Array, is_null: pa.BooleanArray | None) -> pa.ListArray:
        offsets = pa.array(bounds.astype(np.int32))
        return pa.ListArray.from_arrays(offsets, values, type=self.arrow, mask=is_null)

    def load(self, value: str) -> str:
        """See `ColumnType`."""
        return _transform(value, self.element.load(_ELEMENT))

    def unload(self, value: str) -> str:
        """See `ColumnType`."""
        return _transform(value, self.element.unload(_ELEMENT))

    def exact(self, value: str) -> str:
        """See `ColumnType`."""
        return value if self.element.exact(value) == value else f"CAST({value} AS VARCHAR)"


def _transform(value: str, element: str) -> str:
    """Return SQL for a list of `element`, which is SQL for what becomes of an element."""
    return value if element == _ELEMENT else f"list_transform({value}, lambda x: {element})"


def _cuts(text: pa.StringArray) -> list[int]:
    """Return 0, len(text), and between them where a block of values ends."""
    ends = np.cumsum(pc.fill_null(pc.binary_length(text), 0), dtype=np.int64)
    size = int(ends[-1]) if len(ends) else 0
    return [0, *np.searchsorted(ends, np.arange(_BLOCK_BYTES, size, _BLOCK_BYTES)).tolist(), len(text)]


def _looks_like_a_list(text: pa.StringArray) -> Mask:
    """Return bool[n]: what is in braces, but not in two pairs of them; NULL is not."""
    in_braces = pc.and_(pc.starts_with(text, "{"), pc.ends_with(text, "}"))
    return bools(pc.fill_null(pc.and_not(in_braces, pc.starts_with(text, "{{")), False))


def _split(text: pa.StringArray, delimiter: int) -> tuple[Integers, pa.StringArray, Mask]:
    """Split n arrays, each of which is in braces, into their m elements.

    Returns:
        int64[n + 1], the bounds of the arrays among the elements; the elements' text without quotes and escapes; and
        bool[n]: in which arrays each quote that opens is closed.
    """
    offsets, data = _bytes(text)
    separators, dropped, closed = _marks(data, offsets, delimiter)
    filled = np.diff(offsets) > len("{}")
    n_elements = np.diff(np.searchsorted(separators, offsets)) + filled
    bounds = _running_total(n_elements)

    # an element begins behind a brace or a separator, and ends at one
    is_first = np.zeros(bounds[-1], np.bool_)
    is_first[bounds[:-1][filled]] = True
    begin, end = np.empty((2, len(is_first)), np.int64)
    begin[is_first], begin[~is_first] = offsets[:-1][filled] + 1, separators + 1
    is_last = np.append(is_first[1:], True)[: len(is_first)]
    end[is_last], end[~is_last] = offsets[1:][filled] - 1, separators
    is_null = _are_null(data, begin, end)

    kept = np.ones(len(data), np.bool_)
    for positions in (offsets[:-1], offsets[1:] - 1, separators, dropped):
        kept[positions] = False
    kept[begin[is_null, np.newaxis] + np.arange(len(_NULL))] = False
    length = end - begin
    if len(dropped):
        length -= np.diff(np.searchsorted(dropped, end), prepend=0)
    length[is_null] = 0
    buffers = [
        pc.invert(pa.array(is_null)).buffers()[1] if is_null.any() else None,
        pa.py_buffer(_running_total(length).astype(np.int32)),
        pa.py_buffer(data[kept]),
    ]
    return bounds, pa.StringArray.from_buffers(len(length), buffers[1], buffers[2], buffers[0]), closed


def _marks(data: Bytes, offsets: Integers, delimiter: int) -> tuple[Integers, Integers, Mask]:
    """Find the separators of elements; the quotes and escapes to drop; and bool[n]: which arrays close their quotes."""
    special = (data == _QUOTE) | (data == _BACKSLASH)
    if not special.any():
        return np.flatnonzero(data == delimiter), np.zeros(0, np.int64), np.ones(len(offsets) - 1, np.bool_)
    at = np.flatnonzero(special | (data == delimiter))
    kind = data[at]
    escapes = _escapes(at, kind == _BACKSLASH)
    literal = np.zeros(len(at), np.bool_)
    literal[1:] = escapes[:-1] & (np.diff(at) == 1)
    quotes = (kind == _QUOTE) & ~literal
    quotes_before = _running_total(quotes)
    array_bounds = np.searchsorted(at, offsets)
    before_array = quotes_before[array_bounds]
    closed = np.diff(before_array) % 2 == 0
    inside = quotes_before[:-1] - np.repeat(before_array[:-1], np.diff(array_bounds)) & 1 == 1
    separators = (kind == delimiter) & ~literal & ~inside
    return at[separators], at[quotes | escapes], closed


def _escapes(at: Integers, backslash: Mask) -> Mask:
    """Return which marks are backslashes that escape: every other one of a run of them, from the first on."""
    (index,) = np.nonzero(backslash)
    count = np.arange(len(index))
    begins = np.diff(at[index], prepend=-2) != 1
    first = np.maximum.accumulate(np.where(begins, count, 0))
    escapes = np.zeros(len(at), np.bool_)
    escapes[index] = (count - first) % 2 == 0
    return escapes


def _are_null(data: Bytes, begin: Integers, end: Integers) -> Mask:
    """Return bool[m]: which elements are an unquoted NULL."""
    is_null: Mask = (end - begin == len(_NULL)) & (data[begin] == _NULL[0])
    (index,) = np.nonzero(is_null)
    is_null[index] = (data[begin[index, np.newaxis] + np.arange(len(_NULL))] == _NULL).all(axis=1)
    return is_null


def _running_total(counts: npt.NDArray[Any]) -> Integers:
    """Return int64[n + 1]: 0, and the totals of the first 1 to n counts."""
    totals = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=totals[1:])
    return totals


def _bytes(text: pa.StringArray) -> tuple[Integers, Bytes]:
    """Return int64[n + 1], the bounds of the values in the bytes that are returned with them."""
    if not len(text):
        return np.zeros(1, np.int64), np.zeros(0, np.uint8)
    _, offsets_buffer, data_buffer = text.buffers()
    offsets = np.frombuffer(offsets_buffer, np.int32, len(text) + 1, text.offset * 4).astype(np.int64)
    data = np.frombuffer(data_buffer, np.uint8, offsets[-1])[offsets[0] :]
    return offsets - offsets[0], data
