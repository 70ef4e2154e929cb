"""What the tests of copies share: watching a consumer and the server's side of its copies."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psycopg

from tests.conftest import Database, Lake
from tests.mirror import Consumer, differences, history_files, states, until, warehouse_rows

__all__ = [
    "await_states",
    "await_waiting_slot",
    "copy_lsns",
    "blocking",
    "equal",
    "leftovers",
    "locks",
    "log_lines",
    "settle",
]


def await_states(consumer: Consumer, lake: Lake, state: str, *tables: str, timeout_s: float = 60.0) -> None:
    """Return once `tables` are in `state`; fail if they do not come there, or the consumer ends before."""

    def there() -> bool:
        assert consumer.running, consumer.output
        found = states(lake)
        return all(found.get(table) == state for table in tables)

    until(there, timeout_s, f"{tables} to be {state}; see {consumer.log}")


def settle(consumer: Consumer, database: Database, lake: Lake, timeout_s: float = 60.0) -> None:
    """Return once everything is in the warehouse that is committed by now."""
    statement = "SET synchronous_commit = local; SELECT (pg_logical_emit_message(true, 'cdc', 'test') - '0/0')::int8"
    ((lsn,),) = database.execute(statement)

    def there() -> bool:
        assert consumer.running, consumer.output
        ((found,),) = warehouse_rows(lake, "SELECT lsn FROM _cdc.checkpoint")
        return found is not None and found > lsn

    until(there, timeout_s, "the consumer to catch up")


def blocking(database: Database) -> psycopg.Connection[Any]:
    """Return a session with an open transaction that writes: no slot is complete before it ends."""
    connection = database.connect(autocommit=False)
    connection.execute("SELECT pg_current_xact_id()")
    return connection


def slot_waits(database: Database) -> bool:
    """Whether somebody makes a slot, and waits for a transaction to end."""
    return bool(
        database.execute(
            "SELECT 1 FROM pg_stat_activity AS a JOIN pg_locks AS l USING (pid) WHERE a.backend_type = 'walsender' "
            "AND l.locktype = 'transactionid' AND NOT l.granted"
        )
    )


def await_waiting_slot(database: Database, consumer: Consumer) -> None:
    """Return once a copy's slot is being made and waits for a transaction to end."""

    def there() -> bool:
        assert consumer.running, consumer.output
        return slot_waits(database)

    until(there, 30, f"a slot that waits; see {consumer.log}")


def locks(database: Database, table: str, mode: str = "AccessShareLock", *, granted: bool = True) -> list[int]:
    """Return the PIDs of sessions that hold, or wait for, a lock on the table; those of the consumer alone if shared."""
    application = "AND application_name = 'cdc'" if mode == "AccessShareLock" else ""
    rows = database.execute(
        "SELECT DISTINCT pid FROM pg_locks AS l JOIN pg_stat_activity AS a USING (pid) "
        f"WHERE l.relation = to_regclass(%s) AND l.mode = %s AND l.granted = %s {application} ORDER BY pid",
        [table, mode, granted],
    )
    return [pid for (pid,) in rows]


def equal(database: Database, lake: Lake, tables: Mapping[str, Sequence[str] | None]) -> None:
    """Assert that Postgres and the warehouse agree, and the replayed history too.

    Args:
        tables: key by schema.name, empty where there is none; None: leave the history out.
    """
    found = [differences(database, lake, table, key) for table, key in tables.items()]
    assert not any(found), "\n".join(filter(None, found))
    known = states(lake)
    assert {table: known[table] for table in tables} == dict.fromkeys(tables, "streaming")


def copy_lsns(lake: Lake) -> dict[str, Any]:
    """Return the LSN of each table's newest copy: it changes when the table is copied again."""
    return dict(warehouse_rows(lake, "SELECT schema_name || '.' || table_name, copy_lsn FROM _cdc.tables"))


def leftovers(lake: Lake) -> list[str]:
    """Return what copies that are over should not have left: tables, buffered changes, files."""
    staged = warehouse_rows(
        lake, "SELECT schema_name || '.' || table_name FROM duckdb_tables() WHERE table_name LIKE '%cdc_copy%'"
    )
    buffered = warehouse_rows(lake, "SELECT 'buffer of ' || oid FROM _cdc.buffer")
    known = {path for (path,) in warehouse_rows(lake, "SELECT path FROM _cdc.files")}
    found: list[Path] = [file for file in history_files(lake) if str(file.relative_to(lake.history)) not in known]
    return [name for (name,) in [*staged, *buffered]] + [str(file) for file in found]


def log_lines(output: str, event: str) -> list[str]:
    """Return the lines of a consumer's log that report `event`."""
    return [line for line in output.splitlines() if re.search(rf"Z {re.escape(event)}\b", line)]
