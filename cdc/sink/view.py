"""A view of one mirrored table in schema main, under a name that old queries know.

Source: DuckDB refuses a view whose table has other columns than it had when the view was made, so it is made anew in
the transaction that changes them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import duckdb

from cdc.errors import StateError
from cdc.sink.stored import Table
from cdc.sink.warehouse import Warehouse, folded, quote

__all__ = ["View", "drop_others", "make_room", "refresh"]

MARK = "managed by pg-duckdb-cdc"
"""The comment on a view of ours."""

_SCHEMA = "main"


@dataclasses.dataclass(frozen=True, slots=True)
class View:
    """`name` shows the mirrored table `table` (``schema.table``)."""

    name: str
    table: str


def drop_others(warehouse: Warehouse, view: View | None) -> None:
    """Drop views of ours that have another name than `view`: what an earlier setting asked for."""
    found = warehouse.execute(
        "SELECT view_name FROM duckdb_views() WHERE database_name = current_database() AND schema_name = ? "
        "AND comment = ?",
        [_SCHEMA, MARK],
    )
    for (name,) in found:
        if view is None or folded(name) != folded(view.name):
            warehouse.execute(f"DROP VIEW {warehouse.name(_SCHEMA, name)}")


def make_room(warehouse: Warehouse, view: View, tables: Iterable[Table]) -> str:
    """Rename a table or view that has the name of ours and that we did not make.

    Returns:
        its new name; '' if there was none.

    Raises:
        StateError: the name is that of one of the mirrored `tables`.
    """
    for table in tables:
        if folded(*table.here) == folded(_SCHEMA, view.name):
            raise StateError(f"view {view.name} would have the name of table {table}", "choose another CDC_VIEW")
    here = f"database_name = current_database() AND schema_name = '{_SCHEMA}'"
    found = warehouse.execute(
        f"SELECT table_name, 'TABLE', NULL FROM duckdb_tables() WHERE {here} "
        f"UNION ALL SELECT view_name, 'VIEW', comment FROM duckdb_views() WHERE {here}"
    )
    names = folded(*(name for name, _, _ in found))
    for name, kind, comment in found:
        if folded(name) == folded(view.name) and comment != MARK:
            possible = (f"{name}_before_cdc{n}" for n in ("", *range(2, len(names) + 3)))
            aside = next(each for each in possible if folded(each)[0] not in names)
            try:
                warehouse.execute(f"ALTER {kind} {warehouse.name(_SCHEMA, name)} RENAME TO {quote(aside)}")
            except duckdb.DependencyException as error:
                raise StateError(
                    f"{name} in the warehouse has the name of a view of ours and cannot be renamed: {error}",
                    "drop its indexes, or what refers to it; or choose another CDC_VIEW (DUCKDB_TABLE)",
                ) from None
            return aside
    return ""


def refresh(warehouse: Warehouse, view: View, table: Table) -> None:
    """Make `view` anew, to show `table`: its columns are new, its name, or the table itself."""
    there = "SELECT 1 FROM duckdb_tables() WHERE lower(schema_name) = lower(?) AND table_name = ?"
    if not warehouse.execute(there, list(table.here)):
        return  # somebody has dropped it, or it comes under another name: with its next copy
    name = warehouse.name(_SCHEMA, view.name)
    target = warehouse.name(*table.here)
    warehouse.execute(f"CREATE OR REPLACE VIEW {name} AS SELECT * FROM {target}")
    warehouse.execute(f"COMMENT ON VIEW {name} IS '{MARK}'")
