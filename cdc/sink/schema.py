"""What brings a table of the warehouse to the columns that the stream describes.

Pure: it compares and plans; the statements are run by the sink, in the transaction of the changes that follow them.
The live catalog may be newer than the stream. It is trusted only where it equals the Relation in hand, and only for
what the stream cannot tell: attnums, stored defaults, and whether the table was rewritten.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import pyarrow as pa

from cdc.errors import TableError
from cdc.pgoutput.masks import Mask, Masks, chosen, missing
from cdc.pgoutput.messages import Relation
from cdc.pgoutput.types import column_type
from cdc.sink.checkpoint import StoredColumn, Table
from cdc.sink.history import META
from cdc.sink.warehouse import quote

__all__ = [
    "DELETED_AT",
    "LiveColumn",
    "LiveTable",
    "Plan",
    "create_table",
    "folded",
    "masks_of",
    "nulls",
    "plan",
    "refuse",
    "same",
    "stored_columns",
]

DELETED_AT = "_deleted_at"
"""Column that CDC_DELETES=soft adds: when the row was deleted, NULL while it lives."""


@dataclasses.dataclass(frozen=True, slots=True)
class LiveColumn:
    """A column as the catalog has it now.

    Attributes:
        default: text of the value that rows written before the column was added have; None: NULL.
        mask: `Mask.label`; '': it is not masked.
    """

    name: str
    type_oid: int
    typmod: int
    attnum: int
    default: str | None = None
    mask: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class LiveTable:
    """A published table as the catalog has it: its published columns, and the storage of it and its partitions."""

    relfilenode: str
    columns: tuple[LiveColumn, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """How to follow a changed Relation.

    Attributes:
        statements: ALTERs, in order, each with the parameters of its statement.
        columns: what the table has afterwards.
        changes: what to write down, one phrase a change.
    """

    statements: tuple[tuple[str, tuple[Any, ...]], ...]
    columns: tuple[StoredColumn, ...]
    changes: tuple[str, ...]


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
        TableError: a masked column is gone, perhaps under another name, or is part of the key: nothing of the table may
            be kept then.
    """
    if gone := missing(masks, tables, columns):
        raise TableError(
            f"masked column {gone[0]} is not there any more: it was dropped, or has another name now",
            oid,
            f"put CDC_MASK right, start the consumer again, and run `cdc resync {tables[0]}`",
        )
    found = chosen(masks, tables, columns)
    if wrong := sorted(found.keys() & set(key)):
        raise TableError(
            f"masked column {columns[wrong[0]]} of {tables[0]} is part of its key now",
            oid,
            "take it out of CDC_MASK, or give the table another key; then `cdc resync` the table",
        )
    return found


def same(columns: Sequence[StoredColumn], relation: Relation) -> bool:
    """Whether `relation` has just these columns, by name, type and order."""
    return len(columns) == len(relation.columns) and all(
        (stored.name, stored.type_oid, stored.typmod) == (column.name, column.type_oid, column.typmod)
        for stored, column in zip(columns, relation.columns, strict=True)
    )


def stored_columns(live: LiveTable) -> tuple[StoredColumn, ...]:
    """Return what ``_cdc.tables`` keeps of the catalog's columns."""
    return tuple(StoredColumn(c.name, c.type_oid, c.typmod, c.attnum, c.mask) for c in live.columns)


def nulls(column: StoredColumn) -> pa.Array:
    """Return one NULL of the column's Arrow type."""
    return pa.nulls(1, column_type(column.type_oid, column.typmod).arrow)


def create_table(target: str, columns: Sequence[StoredColumn], *, soft: bool) -> str:
    """Return the statement that makes the table `target` (already quoted); `soft`: with the column for deleted rows."""
    parts = [f"{quote(c.name)} {column_type(c.type_oid, c.typmod).duckdb}" for c in columns]
    if soft:
        parts.append(f"{quote(DELETED_AT)} TIMESTAMPTZ")
    return f"CREATE OR REPLACE TABLE {target} ({', '.join(parts)})"


def folded(*names: str) -> tuple[bytes, ...]:
    """Return `names` as DuckDB compares them: it ignores the case of ASCII letters, and of no others."""
    return tuple(name.encode().lower() for name in names)


def refuse(table: Table, columns: Sequence[StoredColumn], *, soft: bool, logged: bool) -> None:
    """Check that `table` can have these columns.

    Args:
        soft: there is the column for deleted rows as well.
        logged: there is a history, which has columns of its own.

    Raises:
        TableError: DuckDB or the history cannot hold columns of these names.
    """
    hint = "rename the column in Postgres, or leave the table out with CDC_TABLES"
    if not columns:
        reason = f"table {table} has no columns, which DuckDB cannot store"
        raise TableError(reason, table.oid, "leave it out with CDC_TABLES")
    ours = folded(*(META if logged else ()), *([DELETED_AT] if soft else ()))
    seen: dict[bytes, str] = {}
    for column in columns:
        (name,) = folded(column.name)
        if name in ours:
            raise TableError(f"column {column.name} of {table} has the name of one of ours", table.oid, hint)
        if (other := seen.setdefault(name, column.name)) != column.name:
            reason = f"columns {other} and {column.name} of {table} are the same name to DuckDB"
            raise TableError(reason, table.oid, hint)


def plan(  # noqa: PLR0911 -- each is one reason for a new copy
    target: str, columns: Sequence[StoredColumn], relfilenode: str, relation: Relation, live: LiveTable | None
) -> Plan | None:
    """Return the ALTERs from `columns` to `relation`, or None where only a new copy can make the table right.

    Args:
        target: the warehouse's table, quoted.
        relfilenode: the storage that the table had when `columns` held; '': unknown.
        live: the catalog now; None: the table is gone, or cannot be read.
    """
    if live is None or not same(stored_columns(live), relation):
        return None  # the catalog has moved on: its attnums and defaults are another version's
    if not relfilenode or live.relfilenode != relfilenode:
        return None  # rewritten: rows may have changed without a word in the stream
    before = {column.attnum: column for column in columns}
    after = {column.attnum: column for column in live.columns}
    kept = before.keys() & after.keys()
    if any((before[n].type_oid, before[n].typmod) != (after[n].type_oid, after[n].typmod) for n in kept):
        return None
    if any(before[n].name != after[n].name for n in kept):
        return None
    statements: list[tuple[str, tuple[Any, ...]]] = []
    changes: list[str] = []
    for attnum in sorted(before.keys() - kept):
        statements.append((f"ALTER TABLE {target} DROP COLUMN {quote(before[attnum].name)}", ()))
        changes.append(f"column {before[attnum].name} dropped")
    for attnum in sorted(after.keys() - kept):
        column = after[attnum]
        name, kind = quote(column.name), column_type(column.type_oid, column.typmod).duckdb
        statements.append((f"ALTER TABLE {target} ADD COLUMN {name} {kind}", ()))
        changes.append(f"column {column.name} added")
        if column.default is not None:
            values, unfit = column_type(column.type_oid, column.typmod).parse(pa.array([column.default]))
            if unfit is not None and unfit.any():
                return None  # the copy puts such values into quarantine, row by row
            statements.append((f"UPDATE {target} SET {name} = CAST(? AS {kind})", (values[0].as_py(),)))
    if [before[n].name for n in sorted(before.keys() & kept)] != [c.name for c in live.columns if c.attnum in kept]:
        return None
    return Plan(tuple(statements), stored_columns(live), tuple(changes))
