"""What brings a table of the warehouse to the columns that the stream describes.

It compares and plans; the statements are run by evolve.py, in the transaction of the changes that follow them.
The live catalog may be newer than the stream. It is trusted only where it equals the Relation in hand, and only for
what the stream cannot tell: attnums, stored defaults, and whether the table was rewritten.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

import pyarrow as pa

from cdc.errors import MaskError, TableError
from cdc.pgoutput.masks import Mask, Masks, chosen, missing
from cdc.pgoutput.messages import Column, Relation
from cdc.sink.checkpoint import StoredColumn, Table
from cdc.sink.holding import DELETED_AT, Holding
from cdc.sink.storage import rewritten
from cdc.sink.warehouse import Warehouse, folded, quote

__all__ = [
    "Change",
    "LiveColumn",
    "LiveTable",
    "Plan",
    "create_table",
    "identify",
    "masks_of",
    "nulls",
    "plan",
    "refuse",
    "refuse_renamed",
    "same",
    "stored_columns",
    "strangers",
]


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
    """A published table as the catalog has it.

    Attributes:
        storage: see `TableDefinition.storage`.
        columns: those that are published.
        natts: the highest attnum that was ever used.
        hidden: attnums of columns that are not published.
    """

    storage: str
    columns: tuple[LiveColumn, ...]
    natts: int
    hidden: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
    """One phrase; the names of a column that was renamed, added (new) or dropped (old); its default, if it has one."""

    text: str
    old_name: str | None = None
    new_name: str | None = None
    default: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """How to follow a changed Relation.

    Attributes:
        statements: in order: ALTERs, and UPDATEs, each with the one value that it finds as column value of _value.
        columns, natts: what the table has afterwards.
        changes: what to write down.
        rewritten: the table has new storage, so rows may have changed without a word in the stream: what the ALTERs
            leave is likely right, and a copy has to make sure.
    """

    statements: tuple[tuple[str, pa.Array | None], ...]
    columns: tuple[StoredColumn, ...]
    natts: int
    changes: tuple[Change, ...]
    rewritten: bool


def strangers(warehouse: Warehouse, tables: Iterable[Table], names: Iterable[tuple[str, str]]) -> list[str]:
    """Return those of `names` (schema, table) that are taken by tables or views which are no copies of `tables`."""
    ours = {folded(*table.here) for table in tables if table.copy_lsn is not None}
    there = {
        folded(*row)
        for row in warehouse.execute(
            "SELECT schema_name, table_name FROM duckdb_tables() WHERE database_name = current_database() "
            "UNION ALL SELECT schema_name, view_name FROM duckdb_views() WHERE database_name = current_database()"
        )
    }
    return [".".join(name) for name in names if folded(*name) in there - ours]


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


def same(columns: Sequence[StoredColumn], relation: Relation) -> bool:
    """Whether `relation` has just these columns, by name, type and order."""
    return len(columns) == len(relation.columns) and all(
        (stored.name, stored.type_oid, stored.typmod) == (column.name, column.type_oid, column.typmod)
        for stored, column in zip(columns, relation.columns, strict=True)
    )


def stored_columns(live: LiveTable) -> tuple[StoredColumn, ...]:
    """Return what ``_cdc.tables`` keeps of the catalog's columns, but for how they are held."""
    return tuple(StoredColumn(c.name, c.type_oid, c.typmod, c.attnum, c.mask) for c in live.columns)


def nulls(column: StoredColumn) -> pa.Array:
    """Return one NULL of the column's Arrow type."""
    return pa.nulls(1, column.kind.arrow)


def create_table(target: str, columns: Sequence[StoredColumn], *, soft: bool) -> str:
    """Return the statement that makes the table `target` (already quoted); `soft`: with the column for deleted rows."""
    parts = [f"{quote(column.here)} {column.kind.duckdb}" for column in columns]
    if soft:
        parts.append(f"{quote(DELETED_AT)} TIMESTAMPTZ")
    return f"CREATE OR REPLACE TABLE {target} ({', '.join(parts)})"


def refuse(table: Table, columns: Sequence[StoredColumn]) -> None:
    """Check that `table` can have these columns.

    Raises:
        TableError: it has none.
    """
    if not columns:
        reason = f"table {table} has no columns, which DuckDB cannot store"
        raise TableError(reason, table.oid, "leave it out with CDC_TABLES")


def plan(  # noqa: PLR0911 -- each is one reason for a new copy
    target: str, table: Table, relation: Relation, live: LiveTable | None, holding: Holding
) -> Plan | None:
    """Return the ALTERs from `table` to `relation`, or None where only a new copy can make it right.

    Args:
        target: the warehouse's table, quoted.
        table: what is known of it, as of the last Relation.
        live: the catalog now, which may be ahead of `relation`; None: the table is gone, or cannot be read.
        holding: how columns are held.
    """
    columns = table.columns
    attnums = identify(columns, table.natts, relation, live)
    if attnums is None or live is None:
        return None
    before = {column.attnum: column for column in columns}
    now = {column.attnum: column for column in live.columns}
    masks = {n: c.mask for n, c in before.items()} | {n: c.mask for n, c in now.items()}
    described = [
        StoredColumn(c.name, c.type_oid, c.typmod, n, masks.get(n, ""))
        for n, c in zip(attnums, relation.columns, strict=True)
    ]
    names = (str(table), str(relation))
    key = {attnums[index] for index in relation.key}
    stored = holding.columns(table, names, described, key, soft=table.deletes == "soft")
    after = {column.attnum: column for column in stored}
    dropped, added = sorted(before.keys() - after.keys()), sorted(after.keys() - before.keys())
    if not before.keys() & after.keys() or any(n <= table.natts for n in added):
        return None  # DuckDB keeps one column at least; one that was there already, unpublished, has values
    gone = {(before[n].name, before[n].type_oid, before[n].typmod) for n in dropped}
    if gone & {(after[n].name, after[n].type_oid, after[n].typmod) for n in added}:
        return None  # rows may have come for either of the two: to the stream they look the same
    moved = rewritten(table.storage, live.storage)
    if moved and any(n not in now or now[n].default is None for n in added):
        return None  # by the new column perhaps: a volatile default, of which each row has its own value
    steps = _Steps(target)
    for attnum in dropped:
        steps.drop(before[attnum].here)
    kept = sorted(before.keys() & after.keys())
    steps.rename([(n, before[n].here, after[n].here) for n in kept], [column.here for column in columns])
    for attnum in kept:
        if not steps.retype(before[attnum], after[attnum], rewritten=moved):
            return None
    for attnum in added:
        default = now[attnum].default if attnum in now else None
        if not steps.add(after[attnum], default):
            return None
    natts = live.natts if attnums == tuple(now) else max(table.natts, *attnums)
    return Plan(tuple(steps.statements), stored, natts, tuple(steps.changes), moved)


def identify(
    columns: Sequence[StoredColumn], natts: int, relation: Relation, live: LiveTable | None
) -> tuple[int, ...] | None:
    """Return the attnums of a Relation's columns, None where these are not certain.

    Args:
        columns: of the Relation before.
        natts: the highest attnum that was ever used then.
        live: the catalog now.

    The catalog may be several versions ahead, so names and types alone do not tell. But an attnum is never used twice,
    a new one is greater than all before, and a Relation has its columns in that order. So what is there before and
    afterwards was there in between, and a column in the place of another one is that one under another name.
    """
    if live is None:
        return None
    now = {column.attnum: column for column in live.columns}
    added = [n for n in range(natts + 1, live.natts + 1) if n not in live.hidden]
    if same(stored_columns(live), relation):
        known = [n for n in now if n > natts]
        # Else one may have come and gone in between, and this one have its name.
        return tuple(now) if known == added[: len(known)] else None
    later = {column.name for column in live.columns if column.attnum > natts}
    wanted = list(relation.columns)
    old = _identify_old(columns, wanted, now, later)
    new = None if old is None else _identify_new(len(wanted) - len(old), added, now)
    if old is None or new is None:
        return None
    there = {column.attnum for column in columns} | {n for n in now if natts < n < max(new, default=0)}
    return (*old, *new) if there & now.keys() <= {*old, *new} else None


def _identify_old(
    columns: Sequence[StoredColumn], wanted: Sequence[Column], now: Mapping[int, LiveColumn], later: Collection[str]
) -> list[int] | None:
    """Return the attnums of those of the `wanted` columns that are among `columns`: the first so many."""
    found: list[int] = []
    names = {column.name for column in now.values()}
    for position, column in enumerate(columns):
        if len(found) == len(wanted):
            break
        name = wanted[len(found)].name
        if column.attnum in now:  # it is there still, so it was there all the time
            found.append(column.attnum)
        elif name == column.name and name not in later:
            found.append(column.attnum)  # dropped since, but not yet
        elif name not in names and name not in {other.name for other in columns[position + 1 :]}:
            return None  # it has another name, or is dropped, and this is a new one
    return found


def _identify_new(wanted: int, added: Sequence[int], now: Collection[int]) -> list[int] | None:
    """Return the attnums of so many new columns, all of which are among `added`."""
    if wanted == len(added):
        return list(added)
    first = list(added[:wanted])
    # What is there still was there before all that came later; of what is dropped by now nobody knows when.
    return first if len(first) == wanted and all(n in now for n in first) else None


class _Steps:
    """The ALTERs of a plan, as they come together."""

    def __init__(self, target: str) -> None:
        self.statements: list[tuple[str, pa.Array | None]] = []
        self.changes: list[Change] = []
        self._target = target

    def drop(self, name: str) -> None:
        self._alter(f"DROP COLUMN {quote(name)}")
        self.changes.append(Change(f"column {name} dropped", old_name=name))

    def rename(self, names: Sequence[tuple[int, str, str]], taken: Sequence[str]) -> None:
        """Rename columns (attnum, old, new); by way of names that nobody has, where one takes another's."""
        changed = [each for each in names if each[1] != each[2]]
        there = set(folded(*taken))
        detour = any(folded(new)[0] in there for _, _, new in changed)
        for attnum, old, new in changed:
            self._alter(f"RENAME COLUMN {quote(old)} TO {quote(f'_cdc_{attnum}' if detour else new)}")
            self.changes.append(Change(f"column {old} renamed to {new}", old, new))
        for attnum, _, new in changed if detour else ():
            self._alter(f"RENAME COLUMN {quote(f'_cdc_{attnum}')} TO {quote(new)}")

    def retype(self, old: StoredColumn, new: StoredColumn, *, rewritten: bool) -> bool:
        """Change a column's type, if every value stays what it was; return whether it does."""
        if (old.type_oid, old.typmod) == (new.type_oid, new.typmod):
            return old.kind.duckdb == new.kind.duckdb
        before, after = old.kind.duckdb, new.kind.duckdb
        widened = (old.type_oid, new.type_oid) in _WIDENED
        same_text = before != "VARCHAR" or old.type_oid == new.type_oid or {old.type_oid, new.type_oid} <= _TEXTS
        if not widened and (rewritten or not _holds(before, after) or (before == after and not same_text)):
            return False
        if before != after:
            self._alter(f"ALTER COLUMN {quote(new.here)} TYPE {after}")
        self.changes.append(Change(f"column {new.here} is {after} now"))
        return True

    def add(self, column: StoredColumn, default: str | None) -> bool:
        """Add a column; return whether older rows can have its default: the copy puts what cannot into quarantine."""
        name, kind = quote(column.here), column.kind
        self._alter(f"ADD COLUMN {name} {kind.duckdb}")
        known = f", which is {column.name} in Postgres" if column.alias else ""
        self.changes.append(Change(f"column {column.here} added{known}", None, column.here, default))
        if default is not None:
            value, unfit = kind.parse(pa.array([default]))
            if unfit is not None:
                return False
            load = kind.load("v.value")
            self.statements.append((f"UPDATE {self._target} SET {name} = {load} FROM _value AS v", value))
        return True

    def _alter(self, action: str) -> None:
        self.statements.append((f"ALTER TABLE {self._target} {action}", None))


# text and varchar: of other types that are text here, each prints in its own way.
_TEXTS = {25, 1043}

# Types of which the second holds each value of the first, unless USING made others of them: int2, int4, int8, floats.
_WIDENED = {(21, 23), (21, 20), (23, 20), (700, 701)}


def _holds(before: str, after: str) -> bool:
    """Whether DuckDB's `after` holds the values of `before` just as Postgres has them, where it rewrote nothing."""
    if before == after:
        return True
    old, new = _DECIMAL.fullmatch(before), _DECIMAL.fullmatch(after)
    if old and new:
        return old[2] == new[2] and int(old[1]) <= int(new[1])
    return bool(old) and after == "VARCHAR"


_DECIMAL = re.compile(r"DECIMAL\((\d+),(\d+)\)")
