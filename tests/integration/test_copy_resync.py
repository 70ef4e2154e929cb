"""Copies of tables that are mirrored already: `cdc resync`, `run --fresh`, and what befalls a table in its copy.

Readers see the old content until the new one replaces it whole, and the change log replays over both.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence

import duckdb
import pytest
from click.testing import CliRunner

from cdc.cli.resync import resync as command
from tests.conftest import Database, Lake
from tests.integration.copies import (
    SOME_BYTES,
    await_states,
    await_waiting_slot,
    blocking,
    copy_lsns,
    equal,
    fill,
    leftovers,
    locks,
    log,
    pgbench,
    settle,
)
from tests.integration.gate import Gate
from tests.mirror import Consumer, history_files, mirror_once, run_cdc, states, until, warehouse_rows

pg18 = pytest.mark.parametrize("server", [18], indirect=True, ids=["pg18"])

PGBENCH = {
    "public.pgbench_accounts": ["aid"],
    "public.pgbench_branches": ["bid"],
    "public.pgbench_tellers": ["tid"],
    "public.pgbench_history": [],
}


def resync(lake: Lake, dsn: str, *tables: str) -> str:
    """Mark tables to be copied anew, in this process; return what the command said."""
    done = CliRunner().invoke(command, tables, env=lake.environment(dsn))
    assert done.exit_code == 0, done.output
    return done.output


def assert_copied_once_more(lake: Lake, table: str, before: int) -> None:
    """Assert that the history of `table` has a second copy, at a later LSN than `before`, and begins it with T."""
    copies = log(
        lake, table, "SELECT _lsn, _op FROM log WHERE _seq < 0 QUALIFY _seq = min(_seq) OVER (PARTITION BY _lsn)"
    )
    lsn = copy_lsns(lake)[f"public.{table}"]
    assert lsn > before
    assert sorted(copies) == [(before, "T"), (lsn, "T")]


@pytest.mark.slow
def test_resync_under_load(database: Database, lake: Lake) -> None:
    """C10, K1, G5: with the consumer running, then with it stopped; two tables of several, one without a key."""
    database.server.run("pgbench", "--initialize", "--quiet", "--scale=1", dbname=database.name)
    mirror_once(lake, database.dsn)
    first = copy_lsns(lake)
    again = ("public.pgbench_accounts", "public.pgbench_history")
    with pgbench(database) as traffic:
        with Consumer(lake, database.dsn) as consumer:
            until(lambda: warehouse_rows(lake, "SELECT count(*) FROM public.pgbench_history")[0][0] > 20)
            said = resync(lake, database.dsn, *again)
            assert all(table in said for table in again)
            until(lambda: all(copy_lsns(lake)[table] > first[table] for table in again), what="new copies")
            await_states(consumer, lake, "streaming", *again)
            assert traffic.poll() is None
            assert consumer.stop() == 0
        second = copy_lsns(lake)
        assert {table for table in second if second[table] != first[table]} == set(again)
        resync(lake, database.dsn, *again)
        assert copy_lsns(lake) == second
        before = database.execute("SELECT count(*) FROM pgbench_history")[0][0]
        until(lambda: database.execute("SELECT count(*) FROM pgbench_history")[0][0] > before + 50)
        with Consumer(lake, database.dsn) as consumer:
            until(lambda: all(copy_lsns(lake)[table] > second[table] for table in again), what="new copies")
            await_states(consumer, lake, "streaming", *again)
            assert traffic.poll() is None
    mirror_once(lake, database.dsn)
    equal(database, lake, PGBENCH)
    assert not leftovers(lake)
    copies = log(lake, "pgbench_history", "SELECT count(*), count(DISTINCT _lsn) FROM log WHERE _op = 'T'")
    assert copies == [(3, 3)]
    assert log(lake, "pgbench_tellers", "SELECT count(*) FROM log WHERE _op = 'T'") == [(1,)]


@pg18
@pytest.mark.parametrize("key", [("id",), ()], ids=["keyed", "keyless"])
def test_old_content_is_read_until_the_swap(database: Database, lake: Lake, key: Sequence[str]) -> None:
    """The old content is kept up to date, by each transaction, until the new one is there."""
    fill(database, "t")
    if not key:
        database.execute("ALTER TABLE t DROP CONSTRAINT t_pkey; ALTER TABLE t REPLICA IDENTITY FULL")
    mirror_once(lake, database.dsn)
    before = copy_lsns(lake)["public.t"]
    with Gate(database.dsn) as gate, Consumer(lake, gate.dsn) as consumer:
        settle(consumer, database, lake)
        gate.hold_rows(SOME_BYTES)
        resync(lake, database.dsn, "public.t")
        until(lambda: gate.waiting, 8, "the copy to begin at once, though nothing else happens")
        for i in range(1, 4):
            database.execute(f"UPDATE t SET v = {i} WHERE id <= 10; DELETE FROM t WHERE id = {100 + i}")
            want = [(5000 - i, 10 * i)]
            until(lambda: warehouse_rows(lake, "SELECT count(*), sum(v) FROM public.t") == want, 20)  # noqa: B023
            assert states(lake)["public.t"] == "resyncing"
        assert gate.waiting
        gate.open()
        await_states(consumer, lake, "streaming", "public.t")
        database.execute("UPDATE t SET v = 7 WHERE id <= 10")
        settle(consumer, database, lake)
        equal(database, lake, {"public.t": key})
        assert_copied_once_more(lake, "t", before)
        assert not leftovers(lake)


@pg18
def test_resync_of_what_is_being_copied(database: Database, lake: Lake) -> None:
    """Asked for twice, or for a table in its first copy, nothing is lost."""
    fill(database, "a", 1000)
    mirror_once(lake, database.dsn)
    fill(database, "b", 1000)
    blocker = blocking(database)
    with Consumer(lake, database.dsn) as consumer:
        await_waiting_slot(database, consumer)
        assert states(lake)["public.b"] == "copying"
        for _ in range(2):
            resync(lake, database.dsn, "public.a", "public.b")
            database.execute(
                "UPDATE a SET v = v + 1; UPDATE b SET v = v + 1; INSERT INTO b (id) SELECT max(id) + 1 FROM b"
            )
            settle(consumer, database, lake)
        # The first copy waits still, and these are in no copy.
        blocker.rollback()
        await_states(consumer, lake, "streaming", "public.a", "public.b")
        database.execute("UPDATE a SET v = v + 1; UPDATE b SET v = v + 1")
        settle(consumer, database, lake)
        equal(database, lake, {"public.a": ["id"], "public.b": ["id"]})
        assert not leftovers(lake)


@pg18
def test_resync_during_the_swap(database: Database, lake: Lake) -> None:
    """Asked for after the snapshot: what is streamed from then on is still in the copy that is swapped in."""
    fill(database, "t")
    mirror_once(lake, database.dsn)
    with Gate(database.dsn) as gate, Consumer(lake, gate.dsn) as consumer:
        settle(consumer, database, lake)
        for _ in range(2):
            gate.hold_rows(SOME_BYTES)
            resync(lake, database.dsn, "public.t")
            until(lambda: gate.waiting, what="the copy to be under way")
            database.execute("UPDATE t SET v = v + 1 WHERE id <= 10")
        resync(lake, database.dsn, "public.t")
        database.execute("UPDATE t SET v = v + 1 WHERE id <= 10; DELETE FROM t WHERE id = 50")
        settle(consumer, database, lake)
        gate.open()
        await_states(consumer, lake, "streaming", "public.t")
        settle(consumer, database, lake)
        equal(database, lake, {"public.t": ["id"]})


@pg18
def test_resync_mends_what_somebody_broke(database: Database, lake: Lake) -> None:
    """Changes that do not fit the old content any more do not keep the new one from being right."""
    database.execute(
        "CREATE TABLE t (v int, pad text); ALTER TABLE t REPLICA IDENTITY FULL;"
        "INSERT INTO t SELECT i, repeat(md5(i::text), 3) FROM generate_series(1, 5000) AS i"
    )
    mirror_once(lake, database.dsn)
    with duckdb.connect(str(lake.warehouse)) as theirs:
        theirs.execute("DELETE FROM public.t WHERE v <= 1000")
    with Gate(database.dsn) as gate, Consumer(lake, gate.dsn) as consumer:
        gate.hold_rows(SOME_BYTES)
        resync(lake, database.dsn, "public.t")
        until(lambda: gate.waiting, what="the copy to be under way")
        database.execute("UPDATE t SET v = -v WHERE v = 1")  # the warehouse has no such row
        settle(consumer, database, lake)
        database.execute("UPDATE t SET v = -v WHERE v = 2000; INSERT INTO t VALUES (0, 'new')")
        settle(consumer, database, lake)
        gate.open()
        await_states(consumer, lake, "streaming", "public.t")
        settle(consumer, database, lake)
        equal(database, lake, {"public.t": []})


@pg18
def test_unpublished_and_published_again_during_its_copy(database: Database, lake: Lake) -> None:
    """G5: what is changed while the table is not published is in no stream: only a newer copy has it."""
    database.execute("CREATE PUBLICATION mine; CREATE TABLE other (id int PRIMARY KEY)")
    mirror_once(lake, database.dsn, publication="mine")
    fill(database, "t")
    database.execute("ALTER PUBLICATION mine ADD TABLE t, other")
    with Gate(database.dsn) as gate, Consumer(lake, gate.dsn, publication="mine") as consumer:
        gate.hold_rows(SOME_BYTES)
        until(lambda: gate.waiting, what="the copy to be under way")
        database.execute("ALTER PUBLICATION mine DROP TABLE t")
        until(lambda: states(lake)["public.t"] == "dropped", 20, "the poll to notice")
        database.execute("UPDATE t SET v = 1 WHERE id <= 10; DELETE FROM t WHERE id = 20")
        gate.open()
        settle(consumer, database, lake)
        database.execute("ALTER PUBLICATION mine ADD TABLE t")
        database.execute("UPDATE t SET v = 2 WHERE id = 30")
        await_states(consumer, lake, "streaming", "public.t", "public.other")
        settle(consumer, database, lake)
        equal(database, lake, {"public.t": ["id"]})
        assert not leftovers(lake)


@pg18
def test_moved_to_the_other_publication_before_the_swap(database: Database, lake: Lake) -> None:
    """C13: until the table has a key its updates are not in the stream, nor are they in a copy that was made before."""
    mirror_once(lake, database.dsn)
    fill(database, "t")
    database.execute("ALTER TABLE t DROP CONSTRAINT t_pkey")
    blocker = blocking(database)
    with Gate(database.dsn) as gate, Consumer(lake, gate.dsn) as consumer:
        await_waiting_slot(database, consumer)
        gate.hold_streams()  # so that the checkpoint does not come to the copy's LSN
        before = copy_lsns(lake)
        blocker.rollback()
        staged = "SELECT sum(estimated_size) FROM duckdb_tables() WHERE table_name LIKE '_cdc_copy%'"
        until(lambda: warehouse_rows(lake, staged) == [(5000,)], what="all rows to be read")
        until(lambda: not locks(database, "t"))
        assert states(lake)["public.t"] == "copying"
        database.execute("UPDATE t SET v = 5 WHERE id = 5; ALTER TABLE t REPLICA IDENTITY FULL")
        member = "SELECT 1 FROM pg_publication_tables WHERE pubname = 'cdc' AND tablename = 't'"
        assert not database.execute(member)
        until(lambda: database.execute(member), 20, "the poll to move it")
        assert copy_lsns(lake) == before
        gate.open()
        await_states(consumer, lake, "streaming", "public.t")
        database.execute("UPDATE t SET v = 7 WHERE id = 7")
        settle(consumer, database, lake)
        await_states(consumer, lake, "streaming", "public.t")
        equal(database, lake, {"public.t": []})
        assert not leftovers(lake)


def test_fresh_without_the_warehouse(database: Database, lake: Lake) -> None:
    """Reset by deleting the state: the slot is taken over, the old history set aside, and everything copied anew."""
    fill(database, "t", 100)
    mirror_once(lake, database.dsn)
    database.execute("UPDATE t SET v = 1 WHERE id < 10")
    lake.warehouse.unlink()
    old = {file.name: file.read_bytes() for file in history_files(lake)}
    refused = run_cdc(lake, database.dsn, "run", "--once")
    assert refused.returncode == 1
    assert "cdc run --fresh" in refused.stderr
    made = "SELECT catalog_xmin::text, restart_lsn FROM pg_replication_slots WHERE slot_name = 'cdc'"
    before = database.execute(made)
    done = run_cdc(lake, database.dsn, "run", "--once", "--fresh")
    assert done.returncode == 0, done.stderr
    assert database.execute(made) != before
    equal(database, lake, {"public.t": ["id"]})
    (aside,) = (path for path in lake.root.iterdir() if path.is_dir() and path.name.startswith("history-"))
    assert {file.name: file.read_bytes() for file in aside.rglob("*") if file.is_file()} == old
    database.execute("DELETE FROM t WHERE id = 1")
    mirror_once(lake, database.dsn)
    equal(database, lake, {"public.t": ["id"]})


def test_fresh_with_the_warehouse(database: Database, lake: Lake) -> None:
    """Old content stays readable until its copy is there; an active slot is not taken."""
    fill(database, "t")
    database.execute("CREATE TABLE gone (id int PRIMARY KEY); INSERT INTO gone VALUES (1)")
    mirror_once(lake, database.dsn)
    database.execute("DELETE FROM t WHERE id > 4000; DROP TABLE gone")
    with Consumer(lake, database.dsn) as consumer:
        settle(consumer, database, lake)
        other = Lake(lake.root, lake.root / "other.duckdb", lake.root / "other")
        refused = run_cdc(other, database.dsn, "run", "--once", "--fresh")
        assert refused.returncode == 1
        assert "in use by process" in refused.stderr
        assert not other.history.exists() or not list(other.history.iterdir())
        database.execute("INSERT INTO t (id) VALUES (0)")
        settle(consumer, database, lake)
        equal(database, lake, {"public.t": ["id"]})
        assert consumer.stop() == 0
    database.execute("DELETE FROM t WHERE id > 3000")
    old = len(history_files(lake))
    with Gate(database.dsn) as gate:
        gate.hold_rows(SOME_BYTES)
        with Consumer(lake, gate.dsn, "--fresh") as consumer:
            until(lambda: gate.waiting, what="the copy to be under way")
            assert warehouse_rows(lake, "SELECT count(*) FROM public.t") == [(4001,)]
            gate.open()
            await_states(consumer, lake, "streaming", "public.t")
            settle(consumer, database, lake)
            equal(database, lake, {"public.t": ["id"]})
            assert states(lake)["public.gone"] == "dropped"
            assert warehouse_rows(lake, "FROM public.gone") == [(1,)]
    (aside,) = (path for path in lake.root.iterdir() if path.is_dir() and path.name.startswith("history-"))
    assert sum(path.is_file() for path in aside.rglob("*")) == old
    shutil.rmtree(aside)
    mirror_once(lake, database.dsn)
    assert not leftovers(lake)
