"""What brings a table of the warehouse to the columns that the stream describes.

It compares (columns.py) and plans; the statements are run by evolve.py, in the transaction of the changes that follow.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence

import pyarrow as pa

from cdc.errors import TableError
from cdc.pgoutput.messages import Relation
from cdc.sink.columns import LiveTable, identify
from cdc.sink.holding import DELETED_AT, Holding
from cdc.sink.storage import rewritten
from cdc.sink.stored import StoredColumn, Table
from cdc.sink.warehouse import Warehouse, folded, quote

__all__ = [
    "Change",
    "Plan",
    "create_table",
    "nulls",
    "plan",
    "refuse",
    "strangers",
]


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
    """One phrase; names of a column that was renamed, added (new), dropped (old); an added one's default and attnum."""

    text: str
    old_name: str | None = None
    new_name: str | None = None
    default: str | None = None
    attnum: int | None = None


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
        StoredColumn(c.name, c.type_oid, c.typmod, n, masks.get(n, ""), is_key=i in relation.key)
        for i, (n, c) in enumerate(zip(attnums, relation.columns, strict=True))
    ]
    stored = holding.columns(table, (str(table), str(relation)), described, soft=table.deletes == "soft")
    after = {column.attnum: column for column in stored}
    dropped, added = sorted(before.keys() - after.keys()), sorted(after.keys() - before.keys())
    if not before.keys() & after.keys() or any(n <= table.natts for n in added):
        return None  # DuckDB keeps one column at least; one that was there already, unpublished, has values
    gone = {(before[n].name, before[n].type_oid, before[n].typmod) for n in dropped}
    if gone & {(after[n].name, after[n].type_oid, after[n].typmod) for n in added}:
        return None  # rows may have come for either of the two: to the stream they look the same
    if any(before[n].mask != after[n].mask for n in before.keys() & after.keys()):
        return None  # columns have swapped their names, say, and a mask goes by the name
    moved = rewritten(table.storage, live.storage)
    if moved and any(n not in live.defaults for n in added):
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
        if not steps.add(after[attnum], live.defaults.get(attnum)):
            return None
    natts = live.natts if attnums == tuple(now) else max(table.natts, *attnums)
    return Plan(tuple(steps.statements), stored, natts, tuple(steps.changes), moved)


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
        self.changes.append(Change(f"column {column.here} added{known}", None, column.here, default, column.attnum))
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
