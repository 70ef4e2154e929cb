"""Whether this is still the source, the slot and the table that the warehouse comes from: J12, J14, G5, H8.

A slot that was made anew, a server that was restored from a backup: both answer as if nothing had happened, with a
gap. And what was committed before a table went is not gone: it has to be in the warehouse and in the history.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator

import pytest

from cdc.embedded import EmbeddedServer
from cdc.installation import installations
from tests.conftest import Database, Lake
from tests.integration.gate import Gate
from tests.integration.steps import agree, copies, log, operations, sync, table_state
from tests.mirror import Consumer, mirror_once, open_warehouse, run_cdc, states, until, warehouse_rows

SLOT = "SELECT active_pid FROM pg_replication_slots WHERE slot_name = 'cdc'"
CONFIRMED = "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = 'cdc'"


def test_slot_made_anew_while_disconnected(database: Database, lake: Lake) -> None:
    """J12: the new slot begins behind what was lost; the consumer that comes back stops instead of going on."""
    database.execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)")
    with Gate(database.dsn) as gate, Consumer(lake, gate.dsn, flush_interval="0.1") as consumer:
        until(lambda: states(lake).get("public.t") == "streaming", what=consumer.output)
        until(lambda: database.execute(SLOT) != [(None,)])
        gate.hold_newcomers()
        database.execute("SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = 'cdc'")
        until(lambda: "connection lost" in consumer.output and gate.waiting, what=consumer.output)
        until(lambda: database.execute(SLOT) == [(None,)])
        ((checkpoint,),) = warehouse_rows(lake, "SELECT lsn FROM _cdc.checkpoint")
        database.execute("SELECT pg_drop_replication_slot('cdc')")
        database.execute("INSERT INTO t VALUES (2)")
        database.execute("SELECT pg_create_logical_replication_slot('cdc', 'pgoutput')")
        ((begins,),) = database.execute(
            "SELECT (confirmed_flush_lsn - '0/0')::int8 FROM pg_replication_slots WHERE slot_name = 'cdc'"
        )
        assert begins > checkpoint, "nothing was lost"
        assert consumer.running
        gate.open()
        assert consumer.wait(20) == 1, consumer.output
        assert consumer.output.count("error: ") == 1
        assert "replication slot cdc was confirmed up to" in consumer.output
        assert "cdc resync --all" in consumer.output.partition("hint: ")[2]
        assert "Traceback" not in consumer.output
    database.execute("INSERT INTO t VALUES (3)")
    assert run_cdc(lake, database.dsn, "run", "--once").returncode == 1
    assert warehouse_rows(lake, "FROM public.t") == [(1,)]
    assert run_cdc(lake, database.dsn, "resync", "--all").returncode == 0
    mirror_once(lake, database.dsn)
    agree(database, lake, {"public.t": ["id"]})


@pytest.fixture
def own_server() -> Iterator[EmbeddedServer]:
    """A server of the test's own, whose data it may replace."""
    with EmbeddedServer(installations()[18]) as server:
        yield server


def go_on_and_restore(server: EmbeddedServer, lake: Lake, consumer: Consumer) -> None:
    """Keep the data as they are, go on, and put them back: the server is behind the warehouse then, and stopped."""
    older = server.data.with_name("older")
    server.stop("fast")
    subprocess.run(["cp", "-a", str(server.data), str(older)], check=True)
    server.start()
    server.psql("INSERT INTO t SELECT i, repeat('x', 500) FROM generate_series(100, 2000) i")
    until(lambda: warehouse_rows(lake, "SELECT count(*) FROM public.t") == [(1902,)], what=consumer.output)
    until(lambda: "connection lost" in consumer.output)
    server.stop("fast")
    shutil.rmtree(server.data)
    older.rename(server.data)


def test_source_restored_from_an_older_state(own_server: EmbeddedServer, lake: Lake) -> None:
    """J14: system identifier and slot are the same; refused on reconnect and at start; the slot stays where it is."""
    server = own_server
    server.psql("CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (1, 'a')")
    dsn = server.dsn()
    with Consumer(lake, dsn, flush_interval="0.1") as consumer:
        until(lambda: states(lake).get("public.t") == "streaming", what=consumer.output)
        go_on_and_restore(server, lake, consumer)
        assert consumer.running
        ((checkpoint,),) = warehouse_rows(lake, "SELECT lsn FROM _cdc.checkpoint")
        server.start()
        server.psql("INSERT INTO t VALUES (2, 'after the restore')")
        assert int(server.psql("SELECT (pg_current_wal_lsn() - '0/0')::int8")) < checkpoint
        confirmed = server.psql(CONFIRMED)
        assert consumer.wait(30) == 1, consumer.output
        assert consumer.output.count("error: ") == 1
        assert "restored from an older backup" in consumer.output
        assert "cdc run --fresh" in consumer.output.partition("hint: ")[2]
    for _ in range(2):
        refused = run_cdc(lake, dsn, "run", "--once")
        assert refused.returncode == 1
        assert "restored from an older backup" in refused.stderr
    assert server.psql(CONFIRMED) == confirmed
    assert warehouse_rows(lake, "SELECT lsn FROM _cdc.checkpoint") == [(checkpoint,)]
    done = run_cdc(lake, dsn, "run", "--once", "--fresh")
    assert done.returncode == 0, done.stderr
    assert warehouse_rows(lake, "FROM public.t ORDER BY id") == [(1, "a"), (2, "after the restore")]


def unfinished_business(database: Database) -> None:
    """Change t in each way, a transaction each."""
    for statement in (
        "INSERT INTO t VALUES (2, 'b')",
        "UPDATE t SET id = 3 WHERE id = 2",
        "UPDATE t SET v = 'c' WHERE id = 1",
        "INSERT INTO t VALUES (4, 'd')",
        "DELETE FROM t WHERE id = 4",
    ):
        database.execute(statement)
        time.sleep(0.1)  # each a batch of its own


LEFT = [(1, "c"), (3, "b")]
"""What `unfinished_business` leaves of t."""


@pytest.fixture
def published(database: Database) -> Database:
    """A database with a table t, and another, in a publication that is not ours to add them to again."""
    database.execute(
        "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (1, 'a');"
        "CREATE TABLE u (id int PRIMARY KEY); CREATE PUBLICATION mine FOR TABLE t, u"
    )
    return database


def assert_all_there(database: Database, lake: Lake, before: dict[str, int]) -> None:
    """Assert that t has everything that it was, and u goes on."""
    assert table_state(lake, "public.t") == ("dropped", "no longer published")
    assert warehouse_rows(lake, "FROM public.t ORDER BY id") == LEFT
    assert operations(lake, "public.t") == "IDIUID"
    assert copies(lake) == before
    database.execute("INSERT INTO u VALUES (1)")
    sync(database, lake, publication="mine")
    agree(database, lake, {"public.u": ["id"]})
    assert warehouse_rows(lake, "FROM public.t ORDER BY id") == LEFT


@pytest.mark.parametrize("end", ["DROP TABLE t", "ALTER PUBLICATION mine DROP TABLE t"])
def test_changes_before_a_table_goes(published: Database, lake: Lake, end: str) -> None:
    """G5, H8: the catalog says that it is gone, at the start, while the stream still has changes of it."""
    sync(published, lake, publication="mine")
    before = copies(lake)
    unfinished_business(published)
    published.execute(end)
    sync(published, lake, publication="mine")
    assert_all_there(published, lake, before)


@pytest.mark.parametrize("server", [18], indirect=True, ids=["pg18"])
def test_changes_before_a_table_goes_while_running(published: Database, lake: Lake) -> None:
    """G5, H8: the same by a poll, which is ahead of the stream as long as the warehouse is held by a reader."""
    sync(published, lake, publication="mine")
    before = copies(lake)
    with Consumer(lake, published.dsn, publication="mine", flush_interval="0.05") as consumer:
        until(lambda: published.execute(SLOT) != [(None,)] and "streaming" in consumer.output)
        with open_warehouse(lake) as reader:
            assert reader.execute("FROM public.t").fetchall() == [(1, "a")]
            unfinished_business(published)
            published.execute("DROP TABLE t")
            time.sleep(2.0)  # nothing outside tells that a poll has been
            assert reader.execute("FROM public.t").fetchall() == [(1, "a")]
        until(lambda: states(lake)["public.t"] == "dropped", 20, consumer.output)
        assert consumer.stop() == 0
    assert_all_there(published, lake, before)


def test_changes_before_a_table_is_made_anew(database: Database, lake: Lake) -> None:
    """H8: a new table of the same name is copied; in the history, what befell the old one is complete."""
    database.execute("CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (1, 'a')")
    sync(database, lake)
    (first,) = copies(lake).values()
    unfinished_business(database)
    database.execute("DROP TABLE t; CREATE TABLE t (id int PRIMARY KEY, v text, w int)")
    database.execute("INSERT INTO t VALUES (1, 'new', 1), (7, 'new', 7)")
    sync(database, lake)
    agree(database, lake, {"public.t": ["id"]})
    (second,) = copies(lake).values()
    assert second > first
    streamed = log(
        lake, "public.t", f"SELECT _op, id, v FROM log WHERE _seq > 0 AND _lsn < {second} ORDER BY _lsn, _seq"
    )
    assert streamed == [("I", 2, "b"), ("D", 2, None), ("I", 3, "b"), ("U", 1, "c"), ("I", 4, "d"), ("D", 4, None)]
    database.execute("UPDATE t SET v = 'newer' WHERE id = 1; DELETE FROM t WHERE id = 7")
    sync(database, lake)
    agree(database, lake, {"public.t": ["id"]})
