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
    blocking,
    copy_lsns,
    equal,
    leftovers,
    locks,
    log_lines,
    settle,
)
from tests.integration.gate import Gate
from tests.mirror import Consumer, mirror_once, run_cdc, states, until, warehouse_rows

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
    mirror_once(lake, database.dsn)
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


@pg18
def test_long_parallel_copy_is_of_one_moment(impatient: str, database: Database, lake: Lake) -> None:
    """K11, K5: several sessions read one snapshot, though one comes late, and all take longer than any time-out.

    What is moved from row to row keeps the sum of all rows: a copy of two moments would have another one.
    """
    dsn = database.dsn.replace("postgres@", f"{impatient}@")
    mirror_once(lake, dsn)
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
    mirror_once(lake, dsn)
    log = f"read_parquet('{lake.history}/public/big/*.parquet', union_by_name = true)"
    query = f"SELECT _lsn, sum(v), count(*), count(DISTINCT id) FROM {log} WHERE _op = 'S' GROUP BY _lsn"
    assert [row[1:] for row in duckdb.sql(query).fetchall()] == [(1_800_000, 18000, 18000)]
    assert duckdb.sql(f"SELECT count(*) > 10 FROM {log} WHERE _op = 'U'").fetchall() == [(True,)]
    equal(database, lake, {"public.big": ["id"]})


def test_copy_waits_for_open_transactions(database: Database, lake: Lake) -> None:
    """K2: the log names who is waited for, other tables go on streaming, and anybody can read the warehouse."""
    database.execute("CREATE TABLE other (id int PRIMARY KEY)")
    mirror_once(lake, database.dsn)
    database.execute("CREATE TABLE late (v text)")
    first = blocking(database)
    first.execute("INSERT INTO late VALUES ('of the first')")
    second = database.connect(autocommit=False)
    second.execute("INSERT INTO late VALUES ('of the second')")
    second.execute("PREPARE TRANSACTION 'held up'")
    second.commit()
    with Consumer(lake, database.dsn) as consumer:
        await_waiting_slot(database, consumer)
        for i in range(3):
            database.execute(f"INSERT INTO other VALUES ({i})")
            until(lambda: warehouse_rows(lake, "SELECT count(*) FROM public.other") == [(i + 1,)], 20)  # noqa: B023
            assert states(lake)["public.late"] == "copying"
            await_waiting_slot(database, consumer)
        until(lambda: f"pid {first.info.backend_pid}," in consumer.output, 20, "the log to name the session")
        assert "prepared transaction 'held up'" in consumer.output
        first.commit()
        await_waiting_slot(database, consumer)
        database.execute("COMMIT PREPARED 'held up'")
        await_states(consumer, lake, "streaming", "public.late")
        database.execute("INSERT INTO late VALUES ('after')")
        settle(consumer, database, lake)
        equal(database, lake, {"public.late": [], "public.other": ["id"]})


@pg18
def test_streaming_goes_on_during_a_copy(database: Database, lake: Lake) -> None:
    """Changes of other tables arrive while a table is being copied, and its own join in when it is whole."""
    database.execute("CREATE TABLE other (id int PRIMARY KEY, v text)")
    mirror_once(lake, database.dsn)
    fill(database, "big")
    with Gate(database.dsn) as gate, Consumer(lake, gate.dsn, flush_rows="10000") as consumer:
        gate.hold_rows(SOME_BYTES)
        until(lambda: gate.waiting, what="the copy to be under way")
        for i in range(3):
            database.execute(
                f"INSERT INTO other VALUES ({i}, 'new'); UPDATE big SET v = {i} + 1 WHERE id % 1000 = 0;"
                f"DELETE FROM big WHERE id = {i} + 1; INSERT INTO big (id) VALUES ({i} - 10)"
            )
            until(lambda: warehouse_rows(lake, "SELECT count(*) FROM public.other") == [(i + 1,)], 20)  # noqa: B023
            assert states(lake)["public.big"] == "copying"
            assert gate.waiting
            assert len(locks(database, "big")) == 1
        done = run_cdc(lake, database.dsn, "query", "SELECT count(*) FROM public.other")
        assert done.returncode == 0, done.stderr
        assert gate.waiting
        assert ("big",) not in warehouse_rows(lake, "SELECT table_name FROM duckdb_tables()")
        gate.open()
        await_states(consumer, lake, "streaming", "public.big")
        settle(consumer, database, lake)
        equal(database, lake, {"public.big": ["id"], "public.other": ["id"]})
        assert not leftovers(lake)


@pg18
def test_copy_of_small_chunks_leaves_room_for_the_stream(database: Database, lake: Lake) -> None:
    """The stream has its turn between two chunks, however fast these come."""
    database.execute("CREATE TABLE other (id int PRIMARY KEY)")
    mirror_once(lake, database.dsn)
    fill(database, "big", 50_000)
    with Consumer(lake, database.dsn, flush_rows="100") as consumer:
        await_states(consumer, lake, "copying", "public.big")
        database.execute("INSERT INTO other VALUES (1)")
        until(lambda: warehouse_rows(lake, "SELECT count(*) FROM public.other") == [(1,)], 20)
        assert states(lake)["public.big"] == "copying"
        await_states(consumer, lake, "streaming", "public.big")


@pg18
def test_copy_whose_sessions_break_begins_again(database: Database, lake: Lake) -> None:
    """K4, J9: what came of the copy before is not there twice."""
    mirror_once(lake, database.dsn)
    fill(database, "big")
    with Gate(database.dsn) as gate, Consumer(lake, gate.dsn, flush_rows="1000") as consumer:
        gate.hold_rows(5_000_000)
        until(lambda: gate.waiting, what="the copy to be under way")
        (pid,) = locks(database, "big")
        staged = "SELECT estimated_size FROM duckdb_tables() WHERE table_name LIKE '_cdc_copy%'"
        until(lambda: warehouse_rows(lake, staged)[0][0] > 0, what="some rows to be staged")
        database.execute("UPDATE big SET v = v + 1 WHERE id <= 1000")
        database.execute(f"SELECT pg_terminate_backend({pid})")
        gate.open()
        await_states(consumer, lake, "streaming", "public.big")
        settle(consumer, database, lake)
        equal(database, lake, {"public.big": ["id"]})
        assert not leftovers(lake)


@pg18
@pytest.mark.parametrize(
    ("point", "b_is_copied"),
    [
        ("during_copy:1", False),
        ("during_copy:4", False),
        ("before_swap:2", False),
        ("before_rename:2", True),
        ("after_swap:2", True),
    ],
)
def test_crash_costs_the_table_in_hand(database: Database, lake: Lake, point: str, b_is_copied: bool) -> None:
    """K4: no partial rows are to be seen, whole copies are kept, and nothing of the broken one is left."""
    for table in "abc":
        fill(database, table, 5000)
    first_is_copied = not point.endswith(":1")
    with Consumer(lake, database.dsn, flush_rows="2000", threads="1", crash_at=point) as consumer:
        assert consumer.wait() == -9, consumer.output
    found = states(lake)
    assert found["public.a"] == ("streaming" if first_is_copied else "copying")
    if first_is_copied:
        assert found["public.b"] == ("streaming" if b_is_copied else "copying")
    assert found["public.c"] == "pending"
    here = {name for (name,) in warehouse_rows(lake, "SELECT table_name FROM duckdb_tables() WHERE schema_name = 'public'")}
    assert ("b" in here) == b_is_copied
    for table in here & {"a", "b"}:
        assert warehouse_rows(lake, f"SELECT count(*) FROM public.{table}") == [(5000,)]
    if not b_is_copied:
        assert not list(lake.history.glob("public/b/*.parquet"))
    before = copy_lsns(lake)
    database.execute(
        "; ".join(f"UPDATE {t} SET v = 1 WHERE id < 100; DELETE FROM {t} WHERE id = 200" for t in "abc")
    )
    output = mirror_once(lake, database.dsn)
    again = {line.partition("table=")[2].split()[0] for line in output.splitlines() if line.startswith("copied")}
    assert again == {f"public.{t}" for t in "abc" if found[f"public.{t}"] != "streaming"}
    after = copy_lsns(lake)
    assert all(after[table] == before[table] for table, state in found.items() if state == "streaming")
    equal(database, lake, {f"public.{table}": ["id"] for table in "abc"})
    assert not leftovers(lake)

