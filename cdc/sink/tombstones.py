"""Soft-deleted rows, carried from what a copy replaces into the copy, which has none of them.

Columns are the same by attnum, whatever their names are, and only if they are masked alike. What the old content has
alive and the copy has not was deleted while nobody followed the table; where the key is held otherwise by now, that
cannot be told, and only rows that were known to be deleted are carried.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Collection, Iterator, Sequence

import pyarrow as pa

from cdc.sink import quarantine
from cdc.sink.holding import DELETED_AT
from cdc.sink.stored import StoredColumn, Table
from cdc.sink.warehouse import Warehouse, quote

__all__ = ["carry"]

# Of these DuckDB's own casts make what Postgres prints, or another number.
_CAST = re.compile(r"SMALLINT|INTEGER|BIGINT|DECIMAL\(.*\)|UUID|JSON")


@dataclasses.dataclass(frozen=True, slots=True)
class _Carried:
    """A column that old content and copy have.

    Attributes:
        value: SQL for what becomes of it, with the old content as t; NULL where its new type cannot hold it.
        join: SQL for what `value` needs beside t.
    """

    old: StoredColumn
    new: StoredColumn
    value: str
    join: str = ""

    @property
    def is_same(self) -> bool:
        return self.old.kind.duckdb == self.new.kind.duckdb


def carry(
    warehouse: Warehouse,
    table: Table,
    columns: Sequence[StoredColumn],
    key: Collection[str],
    staging: str,
    moment: tuple[int, int],
) -> None:
    """Copy soft-deleted rows of `table` into its staged copy; what does not fit goes into quarantine.

    Args:
        columns, key: the copy's columns, and the names here of those that identify a row.
        staging: the copy, quoted.
        moment: LSN and seq of what goes into quarantine.
    """
    there = "SELECT 1 FROM duckdb_tables() WHERE lower(schema_name) = lower(?) AND table_name = ?"
    if table.deletes != "soft" or not warehouse.execute(there, list(table.here)):
        return
    target, deleted = warehouse.name(*table.here), f"t.{quote(DELETED_AT)}"
    before = {column.attnum: column for column in table.columns}
    with contextlib.ExitStack() as stack:
        carried = [
            stack.enter_context(_carried(warehouse, target, before[column.attnum], column))
            for column in columns
            if column.attnum in before and before[column.attnum].mask == column.mask
        ]
        keys = [each for each in carried if each.new.here in key]
        if len(keys) < len(key):
            return
        source = f"{target} AS t {' '.join(each.join for each in carried)}"
        matched = " AND ".join(f"s.{quote(each.new.here)} = {each.value}" for each in keys)
        conditions = [f"NOT EXISTS (SELECT 1 FROM {staging} AS s WHERE {matched})"] if keys else []
        if not keys or not all(each.is_same for each in keys):
            conditions += [f"{deleted} IS NOT NULL", *(f"{each.value} IS NOT NULL" for each in keys)]
        where = " AND ".join(conditions)
        _keep_misfits(warehouse, table, carried, keys, f"FROM {source} WHERE {where}", moment)
        names = ", ".join(quote(each.new.here) for each in carried)
        warehouse.execute(
            f"INSERT INTO {staging} ({names}, {quote(DELETED_AT)}) "
            f"SELECT {', '.join(each.value for each in carried)}, coalesce({deleted}, now()) "
            f"FROM {source} WHERE {where}"
        )


@contextlib.contextmanager
def _carried(warehouse: Warehouse, target: str, old: StoredColumn, new: StoredColumn) -> Iterator[_Carried]:
    """Work out what becomes of a column; what was text is read as Postgres' text by the parser of its new type."""
    value, before, after = f"t.{quote(old.here)}", old.kind.duckdb, new.kind.duckdb
    if before == after:
        yield _Carried(old, new, value)
    elif before == "VARCHAR":
        found = warehouse.arrow(f"SELECT DISTINCT {value} AS text FROM {target} AS t")
        texts = pa.concat_arrays([pa.array([], pa.string()), *(c.cast(pa.string()) for c in found["text"].chunks)])
        parsed, _ = new.kind.parse(texts)
        view = f"_parsed_{new.attnum}"
        with warehouse.view(view, pa.table({"text": texts, "value": parsed})):
            yield _Carried(old, new, new.kind.load(f"{view}.value"), f"LEFT JOIN {view} ON {view}.text = {value}")
    elif _CAST.fullmatch(before) and (after == "VARCHAR" or _CAST.fullmatch(after)):
        yield _Carried(old, new, f"TRY_CAST({value} AS {after})")
    else:
        yield _Carried(old, new, f"CAST(NULL AS {after})")


def _keep_misfits(
    warehouse: Warehouse,
    table: Table,
    carried: Sequence[_Carried],
    keys: Sequence[_Carried],
    rows: str,
    moment: tuple[int, int],
) -> None:
    label = quarantine.key_sql([(each.new.here, each.value) for each in keys])
    for each in carried:
        if not each.is_same:
            old = f"t.{quote(each.old.here)}"
            quarantine.keep_query(
                warehouse,
                table,
                each.new.here,
                f"SELECT {label}, CAST({old} AS VARCHAR) {rows} AND {old} IS NOT NULL AND {each.value} IS NULL",
                moment,
            )
