"""Copies at one LSN: the first load, a resync and a fresh start are exact while the tables are written to.

A gate in front of the server (gate.py) holds a copy where a test wants it, so that nothing here depends on how long a
copy takes.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import subprocess
import time
from collections.abc import Iterator

import duckdb
import psycopg
import pytest
from psycopg import sql

from cdc.embedded import EmbeddedServer
from tests.conftest import Database, Lake
from tests.integration.copies import (
    await_states,
    await_waiting_slot,
    begin,
    blocking,
    copy_lsns,
    equal,
    leftovers,
    locks,
    log_lines,
    settle,
)
from tests.integration.gate import Gate
from tests.mirror import Consumer, run_cdc, states, until, warehouse_rows

pg18 = pytest.mark.parametrize("server", [18], indirect=True, ids=["pg18"])

PGBENCH = {
    "public.pgbench_accounts": ["aid"],
    "public.pgbench_branches": ["bid"],
    "public.pgbench_tellers": ["tid"],
    "public.pgbench_history": [],
}

# More than what libpq and the server say to each other before the first row, less than any table that is held.
SOME_BYTES = 100_000
# A row of this table has about 100 bytes: sent in full it is well above SOME_BYTES and what sockets take.
MANY_ROWS = 100_000


@contextlib.contextmanager
def pgbench(database: Database, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """Keep pgbench running; at the end all its transactions have ended."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    arguments = ("--client=4", "--time=1000", "--no-vacuum", "--rate=200", *options)
    traffic = database.server.popen("pgbench", *arguments, dbname=database.name, **quiet)
    try:
        yield traffic
    finally:
        traffic.terminate()
        traffic.wait(10)
        busy = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'pgbench'"
        until(lambda: not database.execute(busy), what="pgbench's sessions to end")


def fill(database: Database, table: str, rows: int = MANY_ROWS) -> None:
    """Create `table` with a key, some rows of about 100 bytes and a second column."""
    database.execute(
        f"CREATE TABLE {table} (id int PRIMARY KEY, v int NOT NULL DEFAULT 0, pad text NOT NULL DEFAULT '');"
        f"INSERT INTO {table} (id, pad) SELECT i, repeat(md5(i::text), 3) FROM generate_series(1, {rows}) AS i"
    )


def transactions(database: Database) -> int:
    """How many transactions pgbench has committed."""
    count: int = database.execute("SELECT count(*) FROM pgbench_history")[0][0]
    return count


def test_first_copy_under_load(database: Database, lake: Lake) -> None:
    """K1: writes before, during and after the copies are there exactly once, in a table without a key too."""
    database.server.run("pgbench", "--initialize", "--quiet", "--scale=1", dbname=database.name)
    with pgbench(database) as traffic:
        until(lambda: transactions(database) > 50)
        before = transactions(database)
        with Consumer(lake, database.dsn) as consumer:
            await_states(consumer, lake, "streaming", *PGBENCH)
            assert traffic.poll() is None
            after = transactions(database)
            until(lambda: transactions(database) > after + 100)
            assert consumer.stop() == 0
    done = run_cdc(lake, database.dsn, "run", "--once")
    assert done.returncode == 0, done.stderr
    equal(database, lake, PGBENCH)
    assert not leftovers(lake)
    lsns = copy_lsns(lake)
    assert len(set(lsns.values())) == len(PGBENCH)
    log = f"read_parquet('{lake.history}/public/pgbench_history/*.parquet', union_by_name = true)"
    copied, added = duckdb.sql(f"SELECT count(*) FILTER (_op = 'S'), count(*) FILTER (_op = 'I') FROM {log}").fetchall()[0]
    assert copied > before
    assert added > 100
    assert copied + added == transactions(database)


@pytest.fixture
def impatient(server: EmbeddedServer) -> Iterator[str]:
    """A role whose every time-out would end what a copy does; dropped after the database."""
    name = f"impatient_{secrets.token_hex(4)}"
    times = {
        "wal_sender_timeout": "2s",
        "idle_in_transaction_session_timeout": "1s",
        "statement_timeout": "1s",
        "lock_timeout": "1ms",
    }
    if server.version >= 17:
        times["transaction_timeout"] = "1s"
    settings = "".join(f"; ALTER ROLE {name} SET {setting} = '{value}'" for setting, value in times.items())
    server.psql(f"CREATE ROLE {name} LOGIN SUPERUSER {settings}")
    yield name
    server.psql(f"DROP ROLE {name}")


def test_long_parallel_copy_is_of_one_moment(impatient: str, database: Database, lake: Lake) -> None:
    """K11, K5: several sessions read one snapshot, though one comes late, and all take longer than any time-out.

    What is moved from row to row keeps the sum of all rows: a copy of two moments would have another one.
    """
    dsn = database.dsn.replace("postgres@", f"{impatient}@")
    begin(lake, dsn)
    database.execute(
        "CREATE TABLE big (id int PRIMARY KEY, v int NOT NULL, pad text NOT NULL);"
        "ALTER TABLE big ALTER pad SET STORAGE PLAIN;"
        "INSERT INTO big SELECT i, 100, repeat('x', 7000) FROM generate_series(1, 18000) AS i"
    )
    assert database.execute("SELECT pg_relation_size('big') > 128000000") == [(True,)]
    script = lake.root / "move.sql"
    script.write_text(
        "\\set a random(1, 9000)\n\\set b random(9001, 18000)\n"
        "BEGIN;\nUPDATE big SET v = v - 1 WHERE id = :a;\nUPDATE big SET v = v + 1 WHERE id = :b;\nEND;\n"
    )
    blocker = blocking(database)
    with (
        Gate(dsn) as gate,
        pgbench(database, "--client=1", f"--file={script}"),
        Consumer(lake, gate.dsn, threads="3") as consumer,
    ):
        await_waiting_slot(database, consumer)
        sender = "SELECT active_pid FROM pg_replication_slots WHERE slot_name = 'cdc'"
        before = database.execute(sender)
        gate.hold_newcomers()
        blocker.rollback()
        until(lambda: gate.waiting)
        until(lambda: gate.admit() or locks(database, "big"), what="the first session to have its lock")
        (first,) = locks(database, "big")
        time.sleep(2.5)  # longer than the time-outs
        assert locks(database, "big") == [first]
        gate.hold_rows(SOME_BYTES)
        until(lambda: len(locks(database, "big")) == 3 and gate.waiting >= 3, what="three sessions at work")
        at_work = locks(database, "big")
        assert first in at_work
        time.sleep(2.5)
        assert locks(database, "big") == at_work
        assert gate.waiting >= 3
        gate.open()
        await_states(consumer, lake, "streaming", "public.big")
        assert database.execute(sender) == before
        settle(consumer, database, lake)
        assert "connection lost" not in consumer.output
        assert consumer.stop() == 0
    begin(lake, dsn)
    log = f"read_parquet('{lake.history}/public/big/*.parquet', union_by_name = true)"
    query = f"SELECT _lsn, sum(v), count(*), count(DISTINCT id) FROM {log} WHERE _op = 'S' GROUP BY _lsn"
    assert [row[1:] for row in duckdb.sql(query).fetchall()] == [(1_800_000, 18000, 18000)]
    assert duckdb.sql(f"SELECT count(*) > 10 FROM {log} WHERE _op = 'U'").fetchall() == [(True,)]
    equal(database, lake, {"public.big": ["id"]})
