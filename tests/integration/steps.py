"""The steps that the tests of the mirror share: change the source, mirror it, compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import duckdb

from tests.conftest import Database, Lake
from tests.mirror import differences, mirror_once, one_look, warehouse_rows

__all__ = ["agree", "copies", "log", "operations", "quarantine", "sync", "table_state", "transactions"]


def sync(database: Database, lake: Lake, **settings: str) -> str:
    """Mirror everything that is committed by now; return what the consumer said."""
    return mirror_once(lake, database.dsn, **settings)


def transactions(database: Database, *statements: str) -> None:
    """Run each of `statements` as a transaction of its own, which several statements in one string are together."""
    connection = database.connect()
    for statement in statements:
        connection.execute(statement.encode())
    connection.close()


def agree(database: Database, lake: Lake, tables: Mapping[str, Sequence[str] | None]) -> None:
    """Assert that Postgres, the warehouse and the replayed history agree.

    Args:
        tables: each one's key, empty where it has none; None: leave the history out, as across an added column.
    """
    with one_look(lake):
        found = [differences(database, lake, table, key) for table, key in tables.items()]
    assert not any(found), "\n".join(filter(None, found))
    kept = {f"{schema}.{name}": state for schema, name, state in _states(lake)}
    assert {table: kept[table] for table in tables} == dict.fromkeys(tables, "streaming")


def _states(lake: Lake) -> list[tuple[Any, ...]]:
    return warehouse_rows(lake, "SELECT schema_name, table_name, state FROM _cdc.tables")


def table_state(lake: Lake, table: str) -> tuple[str, str]:
    """Return a table's state, and the reason for it."""
    rows = warehouse_rows(
        lake, f"SELECT state, reason FROM _cdc.tables WHERE schema_name || '.' || table_name = '{table}'"
    )
    assert len(rows) == 1, f"{len(rows)} tables called {table} are known"
    state, reason = rows[0]
    return state, reason


def copies(lake: Lake) -> dict[str, int]:
    """Return the LSN of each table's newest copy: it changes when the table is copied anew."""
    rows = warehouse_rows(lake, "SELECT schema_name || '.' || table_name, copy_lsn FROM _cdc.tables")
    return dict(rows)


def log(lake: Lake, table: str, query: str) -> list[tuple[Any, ...]]:
    """Run `query` over the table's change log, which it calls `log`."""
    schema, name = table.split(".", 1)
    paths = warehouse_rows(
        lake, f"SELECT path FROM _cdc.files WHERE schema_name = '{schema}' AND table_name = '{name}'"
    )
    files = [str(lake.history / path) for (path,) in paths]
    connection = duckdb.connect()
    connection.execute("SET TimeZone = 'UTC'")
    connection.read_parquet(files, union_by_name=True).create_view("log")
    rows = connection.execute(query).fetchall()
    connection.close()
    return rows


def operations(lake: Lake, table: str, where: str = "true") -> str:
    """Return the letters of the changes that were streamed, in order."""
    rows = log(lake, table, f"SELECT _op FROM log WHERE _seq > 0 AND ({where}) ORDER BY _lsn, _seq")
    return "".join(letter for (letter,) in rows)


def quarantine(lake: Lake, table: str) -> list[tuple[Any, ...]]:
    """Return what the quarantine holds of a table: (column, key, value, current), in the order of the changes."""
    return warehouse_rows(
        lake,
        "SELECT column_name, key, value, current FROM _cdc.quarantine "
        f"WHERE schema_name || '.' || table_name = '{table}' ORDER BY lsn, seq, column_name",
    )
