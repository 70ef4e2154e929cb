"""What a batch does to one table, worked out in arrays: which key comes first and last, and where a value comes from.

Pure: NumPy and Arrow only. A *code* is an integer that stands for a key; rows of the same key have the same code.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cdc.pgoutput.changes import TableChanges, Unfit

__all__ = [
    "DELETE",
    "INSERT",
    "TRUNCATE",
    "UPDATE",
    "Collapsed",
    "Sources",
    "collapse",
    "halves",
    "key_codes",
    "part",
    "segments",
    "trace",
]

INSERT, UPDATE, DELETE, TRUNCATE = (ord(letter) for letter in "IUDT")

Rows = npt.NDArray[np.int64]


def segments(changes: TableChanges) -> Iterator[TableChanges]:
    """Cut `changes` in front of each TRUNCATE: in what is returned it can only be the first row."""
    cuts = np.flatnonzero(changes.op == TRUNCATE)
    if not len(cuts):
        yield changes
        return
    edges = [0, *cuts.tolist(), len(changes.op)]
    for low, high in itertools.pairwise(edges):
        if high > low:
            yield part(changes, low, high)


def halves(changes: TableChanges) -> Iterator[TableChanges]:
    """Cut `changes`, of two rows or more, about in the middle; the D and the I of one update stay together."""
    middle = len(changes.op) // 2
    while 0 < middle < len(changes.op) and changes.op[middle] == INSERT and changes.op[middle - 1] == DELETE:
        middle += 1
    for low, high in ((0, middle), (middle, len(changes.op))):
        if high > low:
            yield part(changes, low, high)


def part(changes: TableChanges, low: int, high: int) -> TableChanges:
    """Return the rows from `low` to below `high`."""
    unchanged = {i: mask[low:high] for i, mask in changes.unchanged.items() if mask[low:high].any()}
    unfit = []
    for found in changes.unfit:
        inside = np.flatnonzero((found.rows >= low) & (found.rows < high))
        if len(inside):
            unfit.append(Unfit(found.column, found.rows[inside] - low, [found.texts[i] for i in inside]))
    return dataclasses.replace(
        changes,
        op=changes.op[low:high],
        lsn=changes.lsn[low:high],
        seq=changes.seq[low:high],
        xid=changes.xid[low:high],
        commit_ts=changes.commit_ts[low:high],
        columns=[column.slice(low, high - low) for column in changes.columns],
        unchanged=unchanged,
        unfit=unfit,
    )


def key_codes(columns: Sequence[pa.Array]) -> Rows:
    """Return a code for each row of the key `columns` (each of length n), int64[n]."""
    codes = np.zeros(len(columns[0]), np.int64)
    for column in columns:
        encoded = _plain(column).dictionary_encode(null_encoding="encode")
        codes = codes * (len(encoded.dictionary) + 1) + encoded.indices.to_numpy(zero_copy_only=False)
        _, codes = np.unique(codes, return_inverse=True)  # small again, so that the next factor cannot overflow
    return codes


def _plain(column: pa.Array) -> pa.Array:
    """Return `column` with values that are equal just where its own are, in a type that Arrow can encode."""
    if pa.types.is_floating(column.type):
        return pc.add(column, 0.0)  # Postgres holds -0 and 0 to be one key
    if pa.types.is_struct(column.type):
        return pa.array(key_codes(column.flatten()))
    if pa.types.is_list(column.type):
        elements = key_codes([column.flatten()]) if len(column.flatten()) else np.zeros(0, np.int64)
        ends = np.cumsum(pc.fill_null(pc.list_value_length(column), 0).to_numpy())
        bounds = pa.py_buffer(np.append(0, ends).astype(np.int32) * elements.itemsize)
        return pa.Array.from_buffers(pa.binary(), len(column), [None, bounds, pa.py_buffer(elements)])
    return column


@dataclasses.dataclass(frozen=True, slots=True)
class Collapsed:
    """One entry per key of a batch; all int64[k], row numbers.

    Attributes:
        first: its first change.
        last: its last change.
        valued: its last change that has values (I or U), -1 if there is none.
    """

    first: Rows
    last: Rows
    valued: Rows


def collapse(codes: Rows, op: npt.NDArray[np.uint8]) -> Collapsed:
    """Return what is left of a batch, key by key, in the order of the last changes."""
    order = np.argsort(codes, kind="stable")
    starts = np.flatnonzero(np.diff(codes[order], prepend=-1))
    ends = np.append(starts[1:], len(order)) - 1
    has_values = np.where((op == INSERT) | (op == UPDATE), np.arange(len(op)), -1)[order]
    valued = np.maximum.reduceat(has_values, starts) if len(starts) else starts
    first, last = order[starts], order[ends]
    by_last = np.argsort(last)
    return Collapsed(first[by_last], last[by_last], valued[by_last])


@dataclasses.dataclass(frozen=True, slots=True)
class Sources:
    """Where the values of unchanged TOAST come from; one entry per such row.

    Attributes:
        rows: int64[k], the rows whose value is unchanged.
        donors: int64[k], the earlier row of the batch that has the value; -1: only the warehouse has it.
        keyed: int64[k], where the donor is -1: the row of the batch whose key columns name the warehouse's row.
    """

    rows: Rows
    donors: Rows
    keyed: Rows


def trace(codes: Rows, op: npt.NDArray[np.uint8], unchanged: npt.NDArray[np.bool_]) -> Sources:
    """Follow each unchanged value back through the batch, across changes of the key.

    An update that changes the key is a D of the old key and, next to it, an I of the new: the value of the I is the
    one that the old key had before the D. All pointers are followed at once, each time over twice the distance.

    Args:
        codes: int64[n], see `key_codes`.
        op: uint8[n].
        unchanged: bool[n], the rows whose value of the column in question is unchanged.
    """
    n = len(codes)
    here = np.arange(n)
    order = np.argsort(codes, kind="stable")
    previous = np.full(n, -1)  # the row before, of the same key
    follows = np.flatnonzero(np.diff(codes[order], prepend=-1) == 0)
    previous[order[follows]] = order[follows - 1]
    # An I with unchanged values is the second half of a key change: go on from the D in front of it.
    asks = np.where(op == INSERT, here - 1, here)
    source = np.where(unchanged, previous[asks], here)
    root = np.where(unchanged, asks, here)  # whose key to look up if nothing came before
    while True:
        steps = (source >= 0) & unchanged[source]
        if not steps.any():
            break
        root = np.where(steps, root[source], root)
        source = np.where(steps, source[source], source)
    rows = np.flatnonzero(unchanged)
    return Sources(rows, source[rows], root[rows])
