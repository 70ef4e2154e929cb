"""Masked columns: CDC_MASK. What they hold is replaced in the messages themselves, before anything of it is kept.

So whatever comes after (the tables, the change log, the changes kept for a copy) never sees a masked value, and treats
what stands in its place as any other: a column of digests is one of type text. Values are digested as Postgres prints
them, by DuckDB, a column at a time; the copy and the stream print them alike, and so have the same digests.

Source: RFC 2104 (HMAC), FIPS 180-4 (SHA-256).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import hmac
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Literal

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cdc.errors import MaskError
from cdc.pgoutput.messages import Column, Relation
from cdc.pgoutput.rows import RelationRows
from cdc.pgoutput.tuples import Tuples, gather, slice_tuples, views_of

__all__ = ["Kind", "Mask", "Masks", "chosen", "mask_rows", "masks_of", "missing", "refuse_renamed"]

Kind = Literal["hmac", "null", "hash"]
Positions = npt.NDArray[np.int64]

_TEXT_OID = 25
_BLOCK_BYTES = 64
_UPDATE, _TRUNCATE, _NEW = b"UTN"
_TAG_OFFSET = 5  # kind u8, relation u32, then the tag of the first tuple

_NULL = pa.scalar(b"n", pa.binary())
_DIGEST = pa.scalar(b"t" + (64).to_bytes(4, "big"), pa.binary())
_NOTHING = pa.scalar(b"", pa.binary())


@dataclasses.dataclass(frozen=True, slots=True)
class Mask:
    """What stands in place of a column's values.

    Attributes:
        kind: null: NULL; hash: SHA-256 as 64 hexadecimal digits; hmac: HMAC-SHA-256 likewise. NULL stays NULL.
        key: of hmac.
    """

    kind: Kind
    key: bytes = dataclasses.field(default=b"", repr=False)

    @property
    def label(self) -> str:
        """What is kept in the warehouse, to notice another mask or another key by."""
        if self.kind != "hmac":
            return self.kind
        return f"hmac:{hmac.digest(self.key, b'cdc', 'sha256').hex()[:8]}"

    def column(self, column: Column) -> Column:
        """Return how `column` is described from here on."""
        return column if self.kind == "null" else dataclasses.replace(column, type_oid=_TEXT_OID, typmod=-1)

    def apply(self, raw: pa.BinaryArray) -> pa.BinaryArray:
        """Return what stands in place of n values of Postgres' text output."""
        if self.kind == "null":
            return pa.nulls(len(raw), pa.binary())
        return _digests(raw, self.key if self.kind == "hmac" else None).cast(pa.binary())


Masks = Mapping[str, Mask]
"""Masks by ``schema.table.column``."""


def chosen(masks: Masks, tables: Sequence[str], columns: Sequence[str]) -> dict[int, Mask]:
    """Return the masks of a table's columns, by index; `tables`: the names by which the table is known."""
    if not masks:
        return {}
    names = [[f"{table}.{column}" for table in tables] for column in columns]
    found = [next((masks[name] for name in of_column if name in masks), None) for of_column in names]
    return {index: mask for index, mask in enumerate(found) if mask is not None}


def missing(masks: Masks, tables: Sequence[str], columns: Sequence[str]) -> list[str]:
    """Return the names of masked columns that the table does not have (any more): perhaps under another name."""
    there = {f"{table}.{column}" for table in tables for column in columns}
    return [name for name in masks if name not in there and any(name.startswith(f"{table}.") for table in tables)]


def masks_of(
    masks: Masks, oid: int, tables: Sequence[str], columns: Sequence[str], key: Collection[int]
) -> dict[int, Mask]:
    """Return the masks of a table's columns, by index.

    Args:
        masks: CDC_MASK.
        tables: the names by which the table is known.
        columns: names of all that the source sends.
        key: indexes of the columns that identify a row.

    Raises:
        MaskError: a masked column is gone, perhaps under another name, or is part of the key.
    """
    if gone := missing(masks, tables, columns):
        raise MaskError(
            f"masked column {gone[0]} is not there any more: it was dropped, or has another name now",
            oid,
            f"put CDC_MASK right, start the consumer again, and run `cdc resync {tables[0]}`",
        )
    found = chosen(masks, tables, columns)
    if wrong := sorted(found.keys() & set(key)):
        raise MaskError(
            f"masked column {columns[wrong[0]]} of {tables[0]} is part of its key now",
            oid,
            "take it out of CDC_MASK, or give the table another key; then `cdc resync` the table",
        )
    return found


def refuse_renamed(masks: Masks, oid: int, names: tuple[str, str], columns: Sequence[str], *, was_masked: bool) -> None:
    """Refuse a table whose masks go by a name that it has no longer.

    Args:
        masks: CDC_MASK.
        names: by which it was known, and which it has now.
        columns: names of all that the source sends.
        was_masked: what is here of it has masks.

    Raises:
        MaskError: they do.
    """
    before, now = (chosen(masks, [name], columns) for name in names)
    if names[0] != names[1] and not now and (was_masked or before or missing(masks, [names[0]], ())):
        raise MaskError(
            f"table {names[0]} is {names[1]} now, and CDC_MASK goes by its old name",
            oid,
            "put CDC_MASK right, start the consumer again, and `cdc resync` the table",
        )


def mask_rows(rows: RelationRows, masks: Mapping[int, Mask]) -> RelationRows:
    """Return `rows` with the columns `masks` (by index) replaced, in messages and relation.

    Raises:
        ProtocolError: a message is not as the protocol and the relation say.
    """
    if not masks:
        return rows
    columns = [masks[i].column(c) if i in masks else c for i, c in enumerate(rows.relation.columns)]
    relation: Relation = dataclasses.replace(rows.relation, columns=tuple(columns))
    pieces: list[pa.BinaryArray] = []
    at = rows.start
    for part in _parts(rows):
        for index in sorted(masks):
            start, end = part.bounds(rows, index)
            pieces += [_slices(rows, at, start), part.masked(rows, index, masks[index])]
            at = end
    pieces.append(_slices(rows, at, rows.end))
    messages = pc.binary_join_element_wise(*pieces, _NOTHING)
    return RelationRows.of_messages(relation, messages, rows.lsn, rows.seq, rows.xid, rows.commit_ts)


@dataclasses.dataclass(frozen=True, slots=True)
class _Part:
    """The first tuples of the messages, or the second ones.

    Attributes:
        rows: int64[k], the messages that have one.
        first: int64[k], position of each tuple's first column.
    """

    rows: Positions
    first: Positions
    tuples: Tuples

    def bounds(self, rows: RelationRows, index: int) -> tuple[Positions, Positions]:
        """Return where a column's value begins (with its kind byte) and ends; at the message's end without a tuple."""
        start, end = rows.end.copy(), rows.end.copy()
        start[self.rows] = self.first + sum(self._width(i) for i in range(index))
        end[self.rows] = start[self.rows] + self._width(index)
        return start, end

    def _width(self, index: int) -> Positions:
        length: Positions = self.tuples.views[index].view(np.uint32)[::4].astype(np.int64) + 5
        valid = self.tuples.valid[index]
        return length if valid is None else np.where(valid, length, 1)

    def masked(self, rows: RelationRows, index: int, mask: Mask) -> pa.BinaryArray:
        """Return what a column's values become, kind byte and length included; empty where there is no tuple."""
        there = np.zeros(len(rows), np.bool_)
        there[self.rows] = True
        if mask.kind == "null":
            return pc.if_else(pa.array(there), _NULL, _NOTHING)
        values = mask.apply(gather(rows.buffer, self.tuples.views[index], self.tuples.valid[index]))
        start, _ = self.bounds(rows, index)
        kinds = _slices(rows, start[self.rows], start[self.rows] + 1)  # n and u stay as they are
        masked = pc.if_else(pc.is_valid(values), pc.binary_join_element_wise(_DIGEST, values, _NOTHING), kinds)
        place = np.cumsum(there) - 1
        return pc.fill_null(masked.take(pa.array(place, mask=~there)), _NOTHING)


def _parts(rows: RelationRows) -> Iterator[_Part]:
    kind, n_columns = rows.buffer[rows.start], len(rows.relation.columns)
    which = np.flatnonzero(kind != _TRUNCATE)
    start = rows.start[which] + _TAG_OFFSET + 1
    first = slice_tuples(rows.buffer, start, rows.end[which], n_columns)
    yield _Part(which, start + 2, first)
    double = (kind[which] == _UPDATE) & (rows.buffer[rows.start[which] + _TAG_OFFSET] != _NEW)
    if double.any():
        which, start = which[double], first.end[double] + 1
        yield _Part(which, start + 2, slice_tuples(rows.buffer, start, rows.end[which], n_columns))


def _slices(rows: RelationRows, start: Positions, end: Positions) -> pa.BinaryArray:
    return gather(rows.buffer, views_of(rows.buffer, start, end - start), None)


def _digests(raw: pa.BinaryArray, key: bytes | None) -> pa.StringArray:
    table = pa.table({"value": raw})
    query, parameters = "SELECT sha256(value) FROM source", []
    if key is not None:
        key = (hashlib.sha256(key).digest() if len(key) > _BLOCK_BYTES else key).ljust(_BLOCK_BYTES, b"\0")
        inner, outer = (bytes(byte ^ pad for byte in key) for pad in (0x36, 0x5C))
        query, parameters = "SELECT sha256($1 || unhex(sha256($2 || value))) FROM source", [outer, inner]
    with _engine().cursor() as connection:
        connection.register("source", table)
        found: pa.Array = connection.sql(query, params=parameters).to_arrow_table().column(0).combine_chunks()
    return found if isinstance(found, pa.Array) else pa.concat_arrays(found.chunks)


@functools.cache
def _engine() -> duckdb.DuckDBPyConnection:
    """DuckDB without a database: Arrow has no digests."""
    return duckdb.connect(config={"threads": 1})
