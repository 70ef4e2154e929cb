"""What the tests of copies share: watching a consumer and the server's side of its copies."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb
import psycopg

from tests.conftest import Database, Lake
from tests.mirror import Consumer, differences, history_files, one_look, states, until, warehouse_rows

__all__ = [
    "SOME_BYTES",
    "await_states",
    "await_waiting_slot",
    "blocking",
    "copy_lsns",
    "equal",
    "fill",
    "leftovers",
    "locks",
    "log",
    "pgbench",
    "settle",
    "slot_waits",
    "slots_that_wait",
]

SOME_BYTES = 100_000
"""More than what libpq and the server say to each other before the first row, less than any copy that is to be held."""


def await_states(consumer: Consumer, lake: Lake, state: str, *tables: str, timeout_s: float = 60.0) -> None:
    """Return once `tables` are in `state`; fail if they do not come there, or the consumer ends before."""

    def there() -> bool:
        assert consumer.running, f"{consumer.output}\nexit status {consumer.wait()}"
        found = states(lake)
        return all(found.get(table) == state for table in tables)

    until(there, timeout_s, f"{tables} to be {state}; see {consumer.log}")


def settle(consumer: Consumer, database: Database, lake: Lake, timeout_s: float = 60.0) -> None:
    """Return once everything is in the warehouse that is committed by now."""
    statement = "SET synchronous_commit = local; SELECT (pg_logical_emit_message(true, 'cdc', 'test') - '0/0')::int8"
    ((lsn,),) = database.execute(statement)

    def there() -> bool:
        assert consumer.running, f"{consumer.output}\nexit status {consumer.wait()}"
        ((found,),) = warehouse_rows(lake, "SELECT lsn FROM _cdc.checkpoint")
        return found is not None and found > lsn

    until(there, timeout_s, "the consumer to catch up")


def blocking(database: Database) -> psycopg.Connection[Any]:
    """Return a session with an open transaction that writes: no slot is complete before it ends."""
    connection = database.connect(autocommit=False)
    connection.execute("SELECT pg_current_xact_id()")
    return connection


def slots_that_wait(database: Database) -> int:
    """Return how many slots are being made and wait for a transaction to end."""
    ((count,),) = database.execute(
        "SELECT count(*) FROM pg_stat_activity AS a JOIN pg_locks AS l USING (pid) WHERE a.backend_type = 'walsender' "
        "AND l.locktype = 'transactionid' AND NOT l.granted"
    )
    return int(count)


def slot_waits(database: Database) -> bool:
    """Whether somebody makes a slot, and waits for a transaction to end."""
    return slots_that_wait(database) > 0


def await_waiting_slot(database: Database, consumer: Consumer) -> None:
    """Return once a copy's slot is being made and waits for a transaction to end."""

    def there() -> bool:
        assert consumer.running, f"{consumer.output}\nexit status {consumer.wait()}"
        return slot_waits(database)

    until(there, 30, f"a slot that waits; see {consumer.log}")


def locks(database: Database, table: str, mode: str = "AccessShareLock", *, granted: bool = True) -> list[int]:
    """Return the PIDs of sessions that hold (or wait for) a lock on the table; if shared, the consumer's alone."""
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
    with one_look(lake):
        found = [differences(database, lake, table, key) for table, key in tables.items()]
    assert not any(found), "\n".join(filter(None, found))
    known = states(lake)
    assert {table: known[table] for table in tables} == dict.fromkeys(tables, "streaming")


def copy_lsns(lake: Lake) -> dict[str, Any]:
    """Return the LSN of each table's newest copy: it changes when the table is copied again."""
    return dict(warehouse_rows(lake, "SELECT schema_name || '.' || table_name, copy_lsn FROM _cdc.tables"))


def log(lake: Lake, table: str, query: str) -> list[tuple[Any, ...]]:
    """Run `query` over the change log of a table in schema public, which it calls `log`."""
    connection = duckdb.connect()
    files = f"{lake.history}/public/{table}/*.parquet"
    connection.execute(f"CREATE VIEW log AS FROM read_parquet('{files}', union_by_name = true)")
    rows = connection.execute(query).fetchall()
    connection.close()
    return rows


def leftovers(lake: Lake) -> list[str]:
    """Return what copies that are over should not have left: tables, buffered changes, files."""
    staged = warehouse_rows(
        lake, "SELECT schema_name || '.' || table_name FROM duckdb_tables() WHERE table_name LIKE '%cdc_copy%'"
    )
    buffered = warehouse_rows(lake, "SELECT 'buffer of ' || oid FROM _cdc.buffer")
    known = {path for (path,) in warehouse_rows(lake, "SELECT path FROM _cdc.files")}
    found: list[Path] = [file for file in history_files(lake) if str(file.relative_to(lake.history)) not in known]
    return [name for (name,) in [*staged, *buffered]] + [str(file) for file in found]


@contextlib.contextmanager
def pgbench(database: Database, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """Keep pgbench running; at the end all its transactions have ended."""
    arguments = ("--client=4", "--time=1000", "--no-vacuum", "--rate=200", *options)
    traffic = database.server.popen(
        "pgbench", *arguments, dbname=database.name, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield traffic
    finally:
        traffic.terminate()
        traffic.wait(10)
        busy = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'pgbench'"
        until(lambda: not database.execute(busy), what="pgbench's sessions to end")


def fill(database: Database, table: str, rows: int = 5000) -> None:
    """Create `table` with a key, some rows of about 100 bytes and a second column."""
    database.execute(
        f"CREATE TABLE {table} (id int PRIMARY KEY, v int NOT NULL DEFAULT 0, pad text NOT NULL DEFAULT '');"
        f"INSERT INTO {table} (id, pad) SELECT i, repeat(md5(i::text), 3) FROM generate_series(1, {rows}) AS i"
    )
