"""Stage 2 of decoding: the change messages of one relation version become columns.

Every message but T has a first tuple: the new one of I and of most U, the old one (K or O) of D and of a U that changed
the key or a table under REPLICA IDENTITY FULL. Such a U has a second, new tuple behind it and becomes two rows. So the
first tuples of all messages are sliced at once, then the second ones; without T and without second tuples, which is
the common case, the slices are the columns.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cdc.errors import ProtocolError
from cdc.pgoutput.messages import Column, Relation
from cdc.pgoutput.rows import RelationRows
from cdc.pgoutput.tuples import Tuples, gather, slice_tuples

__all__ = ["TableChanges", "Unfit", "decode_column", "decode_rows"]

Mask = npt.NDArray[np.bool_]
Positions = npt.NDArray[np.int64]

_INSERT, _UPDATE, _DELETE, _TRUNCATE = b"IUDT"
_KEY, _OLD, _NEW = b"KON"
_TAG_OFFSET = 5  # kind u8, relation u32, then the tag of the first tuple
_SHORTEST_BYTES = 8  # ... and the tuple's column count


@dataclasses.dataclass(frozen=True, slots=True)
class Unfit:
    """Values of one column that its type cannot hold.

    Attributes:
        column: index of the column.
        rows: int64[k], the rows in question, ascending.
        texts: k texts, exactly as Postgres printed them (bytes that are no UTF-8 as backslash escapes).
    """

    column: int
    rows: Positions
    texts: list[str]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class TableChanges:
    """m changes to one table, as columns, in stream order.

    An update that brought its old tuple is two adjacent rows: a D of the old one and an I of the new one. A D has the
    values of the replica identity, the other columns are NULL (all columns under FULL). A T has only NULLs.

    Attributes:
        op: uint8[m], ord of I, U, D or T.
        lsn, seq, xid, commit_ts: as in RelationRows, [m].
        columns: one array of length m per column of the relation, of Column.kind.arrow.
        unchanged: by column index bool[m]: the value is unchanged TOAST that the message does not hold (NULL in
            `columns`). Columns without any are absent.
        unfit: at most one per column; its values are NULL in `columns`.
    """

    relation: Relation
    op: npt.NDArray[np.uint8]
    lsn: npt.NDArray[np.uint64]
    seq: npt.NDArray[np.int64]
    xid: npt.NDArray[np.uint32]
    commit_ts: npt.NDArray[np.int64]
    columns: list[pa.Array]
    unchanged: dict[int, Mask]
    unfit: list[Unfit]


def decode_rows(rows: RelationRows) -> TableChanges:
    """Decode the messages of `rows`.

    Raises:
        ProtocolError: a message is not as the protocol and the relation say.
    """
    kind = rows.buffer[rows.start]
    split, tuples = _slice(rows, kind)
    columns: list[pa.Array] = []
    unfit: list[Unfit] = []
    for index, column in enumerate(rows.relation.columns):
        raw = gather(rows.buffer, tuples.views[index], tuples.valid[index])
        array, misfits = decode_column(index, column, raw)
        columns.append(array)
        if misfits is not None:
            unfit.append(misfits)
    unchanged = {index: mask for index, mask in enumerate(tuples.unchanged) if mask is not None}
    if split is None:
        return TableChanges(
            rows.relation, kind, rows.lsn, rows.seq, rows.xid, rows.commit_ts, columns, unchanged, unfit
        )
    times = 1 + split
    new = np.flatnonzero(split) + np.arange(1, np.count_nonzero(split) + 1)
    op, seq = np.repeat(kind, times), np.repeat(rows.seq, times)
    op[new - 1] = _DELETE
    op[new] = _INSERT
    seq[new] += 1
    lsn, xid, commit_ts = np.repeat(rows.lsn, times), np.repeat(rows.xid, times), np.repeat(rows.commit_ts, times)
    return TableChanges(rows.relation, op, lsn, seq, xid, commit_ts, columns, unchanged, unfit)


def decode_column(index: int, column: Column, raw: pa.BinaryArray) -> tuple[pa.Array, Unfit | None]:
    """Decode n values of Postgres' text output, from the stream or from COPY.

    Args:
        index: of the column, for what did not fit.
        column: its type.
        raw: the bytes of the values, as they came.

    Returns:
        An array of Column.kind.arrow and length n, and what is NULL in it because its type cannot hold it.
    """
    text, broken = _as_text(raw)
    array, misfits = column.kind.parse(text)
    if broken is None and misfits is None:
        return array, None
    return array, _unfit(index, raw, [mask for mask in (broken, misfits) if mask is not None])


def _slice(rows: RelationRows, kind: npt.NDArray[np.uint8]) -> tuple[Mask | None, Tuples]:
    """Slice the tuples of all messages; return which messages become two rows (None: none), and the rows' tuples."""
    buffer, n_columns = rows.buffer, len(rows.relation.columns)
    with_tuple = kind != _TRUNCATE
    everywhere = bool(with_tuple.all())
    start, end = rows.start, rows.end
    if not everywhere:
        start, end, kind = start[with_tuple], end[with_tuple], kind[with_tuple]
    tag = _check_tags(buffer, start, end, kind)
    first = slice_tuples(buffer, start + _TAG_OFFSET + 1, end, n_columns)
    split = (kind == _UPDATE) & (tag != _NEW)
    if not split.any():
        _demand_end(first.end, end)
        return None, first if everywhere else _scatter(first, np.flatnonzero(with_tuple), len(rows))
    _demand_end(first.end[~split], end[~split])
    second = _slice_second(rows, first, end, split)
    _resolve(rows.relation, first, second, split, tag[split] == _OLD)
    whole = np.zeros(len(rows), np.bool_)
    whole[with_tuple] = split
    position = np.arange(len(rows)) + np.cumsum(whole) - whole
    place_first, place_second = position[with_tuple], position[whole] + 1
    return whole, _scatter(first, place_first, len(rows) + len(place_second), second, place_second)


def _check_tags(
    buffer: npt.NDArray[np.uint8], start: Positions, end: Positions, kind: npt.NDArray[np.uint8]
) -> npt.NDArray[np.uint8]:
    """Return the tags of the first tuples, checked against the kinds of the messages."""
    short = end - start < _SHORTEST_BYTES
    if short.any():
        raise ProtocolError("a change message ends before its tuple", int(start[int(short.argmax())]))
    tag = buffer[start + _TAG_OFFSET]
    new, old = tag == _NEW, (tag == _KEY) | (tag == _OLD)
    good = ((kind == _INSERT) & new) | ((kind == _UPDATE) & (new | old)) | ((kind == _DELETE) & old)
    if not good.all():
        at = int(good.argmin())
        found = f"found {chr(kind[at])} with {chr(tag[at])!r}"
        raise ProtocolError(f"expected I with N, U with N, K or O, D with K or O, {found}", int(start[at]))
    return tag


def _slice_second(rows: RelationRows, first: Tuples, end: Positions, split: Mask) -> Tuples:
    """Slice the new tuples that follow old ones."""
    start, end = first.end[split], end[split]
    good = start < end
    good &= rows.buffer[start] == _NEW
    if not good.all():
        raise ProtocolError("expected a new tuple (N) behind the old one", int(start[int(good.argmin())]))
    second = slice_tuples(rows.buffer, start + 1, end, len(rows.relation.columns))
    _demand_end(second.end, end)
    return second


def _demand_end(cursor: Positions, end: Positions) -> None:
    """Raise ProtocolError where a message has bytes after its last tuple."""
    good = cursor == end
    if not good.all():
        raise ProtocolError("expected the end of the message, found more bytes", int(cursor[int(good.argmin())]))


def _resolve(relation: Relation, first: Tuples, second: Tuples, split: Mask, is_whole: Mask) -> None:
    """Fill unchanged TOAST in new tuples from the old ones of the same messages, where those hold the column.

    An old tuple of kind O (`is_whole`, bool per new tuple) holds every column, one of kind K those of the key.
    """
    for index, column in enumerate(relation.columns):
        unchanged = second.unchanged[index]
        if unchanged is None:
            continue
        known = unchanged if column.is_key else unchanged & is_whole
        source = np.flatnonzero(split)[known]
        second.views[index][known] = first.views[index][source]
        _fill(second.valid, index, known, first.valid[index], source)
        left = unchanged & ~known
        old_unchanged = first.unchanged[index]
        if old_unchanged is not None:
            left[known] = old_unchanged[source]
        second.unchanged[index] = left if left.any() else None


def _fill(masks: list[Mask | None], index: int, known: Mask, source: Mask | None, rows: Positions) -> None:
    """Copy the validity of `rows` of the old tuples to the `known` rows of the new ones."""
    mask = masks[index]
    assert mask is not None  # an unchanged value is not valid
    mask[known] = True if source is None else source[rows]


def _scatter(
    first: Tuples, place: Positions, n: int, second: Tuples | None = None, place_second: Positions | None = None
) -> Tuples:
    """Return n tuples: those of `first` at the rows `place`, those of `second` at theirs, NULLs elsewhere."""
    parts = [(first, place)]
    if second is not None and place_second is not None:
        parts.append((second, place_second))
    out = Tuples([], [], [], np.empty(0, np.int64))
    for index in range(len(first.views)):
        views, valid, unchanged = np.zeros(n, np.complex128), np.zeros(n, np.bool_), np.zeros(n, np.bool_)
        for part, rows in parts:
            views[rows] = part.views[index]
            part_valid, part_unchanged = part.valid[index], part.unchanged[index]
            valid[rows] = True if part_valid is None else part_valid
            unchanged[rows] = False if part_unchanged is None else part_unchanged
        out.views.append(views)
        out.valid.append(None if valid.all() else valid)
        out.unchanged.append(unchanged if unchanged.any() else None)
    return out


def _as_text(raw: pa.BinaryArray) -> tuple[pa.StringArray, Mask | None]:
    """Return `raw` as text, and which values are no UTF-8 (NULL in the text; None: all are)."""
    try:
        return raw.cast(pa.string()), None
    except pa.ArrowInvalid:
        return _as_text_one_by_one(raw)


def _as_text_one_by_one(raw: pa.BinaryArray) -> tuple[pa.StringArray, Mask]:
    """Slow path, for sources whose encoding is SQL_ASCII: look at every value."""
    broken = np.fromiter((not _is_utf8(value) for value in raw.to_pylist()), np.bool_, len(raw))
    return pc.if_else(pa.array(broken), pa.scalar(None, pa.binary()), raw).cast(pa.string()), broken


def _is_utf8(value: bytes | None) -> bool:
    try:
        return value is None or value.decode() is not None
    except UnicodeDecodeError:
        return False


def _unfit(column: int, raw: pa.BinaryArray, masks: list[Mask]) -> Unfit:
    """Collect the texts of the values marked in any of `masks`."""
    rows = np.flatnonzero(np.logical_or.reduce(masks))
    values: list[bytes] = raw.take(pa.array(rows)).to_pylist()
    return Unfit(column, rows, [value.decode("utf-8", "backslashreplace") for value in values])
