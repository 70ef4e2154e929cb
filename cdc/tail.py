"""Changes for eyes: what a batch holds, one by one, as lines of text or of JSON.

Decoding is columnar as everywhere; from there on each row is looked at by itself. That is for people who read along,
and for small scripts, not for the hot path: nothing is mirrored through here.

No connection and no output here: `changes_of` takes what the decoder returns, `as_text` and `as_json` return lines.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import fnmatch
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from cdc.lsn import format_lsn
from cdc.pgoutput.decoder import RelationRows, TableChanges, decode_rows
from cdc.pgoutput.messages import Relation
from cdc.pgoutput.types import TEXT

__all__ = ["UNCHANGED", "Change", "Exact", "as_json", "as_text", "boundary", "changes_of", "wanted"]

MOST_CHARACTERS = 200
"""A longer value is cut in `as_text`."""

_OPERATIONS = {ord("I"): "insert", ord("U"): "update", ord("D"): "delete", ord("T"): "truncate"}
_DAY_MICROSECONDS = 86_400_000_000
_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)

Row = Mapping[str, Any]


class Exact(str):
    """The text of a value that its type cannot hold, as Postgres printed it."""

    __slots__ = ()


class _Unchanged:
    """The type of `UNCHANGED`."""

    def __repr__(self) -> str:
        return "(unchanged)"


UNCHANGED = _Unchanged()
"""Stands for a value that the message does not hold, because a long one was left as it was."""


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
    """One change message, as one change: also where the mirror makes a D and an I of it.

    Attributes:
        operation: insert, update, delete or truncate.
        lsn, seq, xid, commit_ts: as in RelationRows.
        key: the row's identity after the change, or before a delete; None where the table has none of its own.
        old: what the message tells of the row before: the key where an update changed it or the row is deleted, the
            whole row under REPLICA IDENTITY FULL; else None.
        new: the row after the change; None of a delete or truncate.
    """

    relation: Relation
    operation: str
    lsn: int
    seq: int
    xid: int
    commit_ts: int
    key: Row | None
    old: Row | None
    new: Row | None

    @property
    def committed_at(self) -> dt.datetime:
        """The commit time, in UTC."""
        return _EPOCH + dt.timedelta(microseconds=self.commit_ts)


def wanted(table: str, patterns: Sequence[str]) -> bool:
    """Whether `table` (``schema.table``) is meant by `patterns`, which may have fnmatch's wildcards; none mean all."""
    return not patterns or any(pattern == table or fnmatch.fnmatchcase(table, pattern) for pattern in patterns)


def changes_of(found: Iterable[RelationRows]) -> list[Change]:
    """Return the changes to the tables of one batch in the order in which they happened.

    Raises:
        ProtocolError: a message is not as the protocol says.
    """
    changes = [change for rows in found for change in _changes_of_table(rows)]
    # By OID, too: the tables of one TRUNCATE share its number.
    return sorted(changes, key=lambda change: (change.lsn, change.seq, change.relation.oid))


def _changes_of_table(rows: RelationRows) -> Iterator[Change]:
    relation = rows.relation
    # A list or an interval is read as Postgres prints it.
    nested = [pa.types.is_nested(column.kind.arrow) for column in relation.columns]
    decoded = decode_rows(_as_text(rows, nested))
    read = [_values(decoded, index) for index in range(len(relation.columns))]
    texts = decode_rows(_as_text(rows, [True] * len(nested))) if None in read else decoded
    values = [_far_values(decoded, texts, i) if each is None else each for i, each in enumerate(read)]
    names = [column.name for column in relation.columns]
    everything = list(range(len(names)))
    key = list(relation.key)

    def pick(row: int, columns: Sequence[int]) -> Row:
        return {names[column]: values[column][row] for column in columns}

    at = 0
    for kind in rows.buffer[rows.start].tolist():
        # The op alone does not tell an update that brought its old row from a DELETE and an INSERT: the message does.
        double = kind == ord("U") and decoded.op[at] == ord("D")
        last = at + double
        has_old = double or kind == ord("D")
        yield Change(
            relation,
            _OPERATIONS[kind],
            int(decoded.lsn[at]),
            int(decoded.seq[at]),
            int(decoded.xid[at]),
            int(decoded.commit_ts[at]),
            key=pick(last, key) if key and kind != ord("T") else None,
            old=pick(at, key or everything) if has_old else None,
            new=pick(last, everything) if kind in b"IU" else None,
        )
        at = last + 1


def _as_text(rows: RelationRows, which: Sequence[bool]) -> RelationRows:
    """Return `rows` with some of the columns as text."""
    columns = (
        dataclasses.replace(column, type_oid=TEXT.type_oid, typmod=TEXT.typmod) if is_text else column
        for column, is_text in zip(rows.relation.columns, which, strict=True)
    )
    return dataclasses.replace(rows, relation=dataclasses.replace(rows.relation, columns=tuple(columns)))


def _far_values(decoded: TableChanges, texts: TableChanges, index: int) -> list[Any]:
    """Return a column that has dates or times beyond those of Python: these as Postgres prints them."""
    values: list[Any] = []
    for value, text in zip(decoded.columns[index], texts.columns[index].to_pylist(), strict=True):
        try:
            values.append(Exact(text) if _is_day_end(value) else value.as_py())
        except (OverflowError, ValueError):
            values.append(Exact(text))
    return _completed(decoded, index, values)


def _is_day_end(value: pa.Scalar) -> bool:
    """Whether it is 24:00:00, of which Python makes 00:00:00."""
    return bool(pa.types.is_time(value.type) and value.value == _DAY_MICROSECONDS)


def _values(decoded: TableChanges, index: int) -> list[Any] | None:
    """Return one column as Python values; None: some are dates or times beyond those of Python."""
    if any(map(_is_day_end, decoded.columns[index])):
        return None
    try:
        return _completed(decoded, index, decoded.columns[index].to_pylist())
    except (OverflowError, ValueError):
        return None


def _completed(decoded: TableChanges, index: int, values: list[Any]) -> list[Any]:
    """Return the values of a column with those in it that the Arrow array cannot hold."""
    column = decoded.columns[index]
    if pa.types.is_float32(column.type):  # a float4 has fewer digits than the float that Python makes of it
        values = [None if value is None else float(str(np.float32(value))) for value in values]
    for misfits in decoded.unfit:
        if misfits.column == index:
            for row, text in zip(misfits.rows.tolist(), misfits.texts, strict=True):
                values[row] = Exact(text)
    for row in np.flatnonzero(decoded.unchanged.get(index, ())).tolist():
        values[row] = UNCHANGED
    return values


def as_json(change: Change) -> str:
    """Return `change` as one JSON object on one line; every change has the same members."""
    new = change.new or {}
    return json.dumps(
        {
            "op": change.operation,
            "schema": change.relation.namespace,
            "table": change.relation.name,
            "lsn": format_lsn(change.lsn),
            "seq": change.seq,
            "xid": change.xid,
            "commit_ts": change.committed_at.isoformat(timespec="microseconds"),
            "key": _plain_row(change.key),
            "old": _plain_row(change.old),
            "new": _plain_row(change.new),
            "unchanged": [name for name, value in new.items() if value is UNCHANGED],
        }
    )


def _plain_row(row: Row | None) -> dict[str, Any] | None:
    return None if row is None else {name: _plain(value) for name, value in row.items() if value is not UNCHANGED}


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: what JSON's own types do not hold exactly becomes text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else _not_finite(value)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, decimal.Decimal):
        return format(value, "f")
    if isinstance(value, dt.date | dt.time):  # a datetime is a date, too
        return value.isoformat()
    return value


def _not_finite(value: float) -> str:
    """Return the value as Postgres spells it."""
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def boundary(change: Change) -> str:
    """Return the line that stands before a transaction's changes; `change` is its first."""
    return f"-- xid {change.xid}, LSN {format_lsn(change.lsn)}, {change.committed_at:%Y-%m-%d %H:%M:%S.%f} UTC"


def as_text(change: Change) -> str:
    """Return `change` as one line: commit time, table, operation, key in parentheses, values; ``old => new``.

    What does not print is escaped, and what is very long is cut.
    """
    words = [f"{change.committed_at:%H:%M:%S.%f}", _name(str(change.relation)), change.operation.upper()]
    key, old = change.key or {}, change.old or {}
    row = old if change.new is None else change.new
    pairs = {name: _pair(name, value, old) for name, value in row.items()}
    if key:
        words.append(f"({', '.join(pairs[name] for name in key)})")
    words += [pair for name, pair in pairs.items() if name not in key]
    return " ".join(words)


def _pair(name: str, value: Any, old: Row) -> str:
    before = _short(old[name]) + " => " if name in old and _differ(old[name], value) else ""
    return f"{_name(name)}={before}{_short(value)}"


def _differ(old: Any, new: Any) -> bool:
    """Whether two values of a column are not the same; NaN is itself."""
    return new is not UNCHANGED and repr(old) != repr(new)


def _short(value: Any) -> str:
    text = _shown(value)
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}... ({len(text)} characters)"


def _shown(value: Any) -> str:
    """Return a value as a person reads it: only text is in quotes."""
    if value is None:
        return "NULL"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, bytes):
        return f"\\x{value.hex()}"
    if isinstance(value, Exact):
        return _name(value)
    if value is UNCHANGED or isinstance(value, str):
        return repr(value)
    return value.isoformat(" ") if isinstance(value, dt.datetime) else str(_plain(value))


def _name(text: str) -> str:
    """Return a text without quotes, unless something in it does not print."""
    return str(text) if text.isprintable() else repr(str(text))
