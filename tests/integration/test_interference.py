"""What moves a table on while it is being copied: marks of `cdc resync`, errors, publications, killed consumers.

A copy is only worth anything while its table's changes were kept for it without a gap. Each test holds a copy at a
point where the old one could still be swapped in, with changes missing that nobody kept.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import psycopg
import pytest

from cdc.pipeline import Pipeline
from cdc.settings import load
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
    settle,
    slot_waits,
)
from tests.integration.gate import Gate
from tests.mirror import Consumer, mirror_once, run_cdc, states, until, warehouse_rows

pg18 = pytest.mark.parametrize("server", [18], indirect=True, ids=["pg18"])

COPYING = (
    "SELECT pid FROM pg_stat_activity WHERE application_name = 'cdc' AND query LIKE 'COPY%' "
    "AND datname = current_database() ORDER BY pid"
)


def resync(lake: Lake, dsn: str, table: str) -> None:
    """Mark a table to be copied anew."""
    done = run_cdc(lake, dsn, "resync", table)
    assert done.returncode == 0, done.stderr


def reason(lake: Lake, table: str) -> str:
    """Return why a table is in its state."""
    ((text,),) = warehouse_rows(
        lake, f"SELECT reason FROM _cdc.tables WHERE schema_name || '.' || table_name = '{table}'"
    )
    return str(text)


@contextlib.contextmanager
def inserting(database: Database) -> Iterator[Callable[[], int]]:
    """Insert rows with negative keys into t all along; gives a function that tells how many are committed."""
    over = threading.Event()
    done = 0

    def work() -> None:
        nonlocal done
        with psycopg.connect(database.dsn, autocommit=True) as connection:
            while not over.wait(0.002):
                connection.execute("INSERT INTO t (id) VALUES (%s)", [-done - 1])
                done += 1

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield lambda: done
    finally:
        over.set()
        thread.join()


def some_more(count: Callable[[], int], rows: int = 30) -> None:
    """Return once so many more rows were inserted."""
    before = count()
    until(lambda: count() >= before + rows, 20, "rows to be inserted")


@pg18
@pytest.mark.parametrize("state", ["copying", pytest.param("resyncing", marks=pytest.mark.slow)])
def test_resync_of_a_table_whose_copy_is_half_read(database: Database, lake: Lake, state: str) -> None:
    """C10, K1: the copy that was under way has its L; what is inserted once the mark is taken must not be missing."""
    if state == "copying":
        mirror_once(lake, database.dsn)
    fill(database, "t", 30_000)
    if state == "resyncing":
        mirror_once(lake, database.dsn)
    with Gate(database.dsn) as gate, inserting(database) as count:
        gate.hold_rows(SOME_BYTES)
        with Consumer(lake, gate.dsn, flush_interval="0.1") as consumer:
            if state == "resyncing":
                settle(consumer, database, lake)
                resync(lake, database.dsn, "public.t")
            until(lambda: gate.waiting, what=f"the copy to be under way; see {consumer.log}")
            assert states(lake)["public.t"] == state
            (first,) = database.execute(COPYING)
            some_more(count)
            resync(lake, database.dsn, "public.t")
            some_more(count)
            settle(consumer, database, lake)
            gate.open()
            await_states(consumer, lake, "streaming", "public.t")
            some_more(count)
            assert consumer.output.count("copied ") == 1, "the copy that was given up was swapped in"
            assert first not in database.execute(COPYING)
            assert consumer.stop() == 0
    mirror_once(lake, database.dsn)
    equal(database, lake, {"public.t": ["id"]})
    assert not leftovers(lake)


@pg18
@pytest.mark.parametrize("mended", [False, True], ids=["it stays", "it goes again"])
def test_error_in_the_stream_of_a_table_being_resynced(database: Database, lake: Lake, mended: bool) -> None:
    """A3, K1: a key that its type cannot hold comes while the copy is read: a new one has it as text."""
    database.execute(
        "CREATE TABLE t (id numeric(8,0) PRIMARY KEY, pad text);"
        "INSERT INTO t SELECT i, repeat(md5(i::text), 3) FROM generate_series(1, 20000) AS i"
    )
    mirror_once(lake, database.dsn)
    before = copy_lsns(lake)["public.t"]
    with Gate(database.dsn) as gate, Consumer(lake, gate.dsn, flush_interval="0.1") as consumer:
        settle(consumer, database, lake)
        gate.hold_rows(SOME_BYTES)
        resync(lake, database.dsn, "public.t")
        until(lambda: gate.waiting, what=f"the copy to be under way; see {consumer.log}")
        database.execute("INSERT INTO t VALUES ('NaN', 'too far')")
        until(lambda: "column id of public.t becomes text" in consumer.output, 20, f"the error; see {consumer.log}")
        database.execute("INSERT INTO t VALUES (90001, 'after the error')")
        if mended:
            database.execute("DELETE FROM t WHERE id = 'NaN'")
        settle(consumer, database, lake)
        gate.open()
        await_states(consumer, lake, "streaming", "public.t")
        database.execute("INSERT INTO t VALUES (90002, 'after the copy')")
        settle(consumer, database, lake)
        assert copy_lsns(lake)["public.t"] > before
        equal(database, lake, {"public.t": ["id"]})
        assert not leftovers(lake)


@pg18
def test_key_added_before_the_snapshot_and_updates_after_it(database: Database, lake: Lake) -> None:
    """C13, H10: until a poll has moved the table, its updates are in no stream, and they are not in the copy."""
    mirror_once(lake, database.dsn)
    fill(database, "t", 30_000)
    database.execute("ALTER TABLE t DROP CONSTRAINT t_pkey")
    published = "SELECT pubname::text FROM pg_publication_tables WHERE tablename = 't'"
    blocker = blocking(database)
    # As if no poll came just now: whoever changes a publication waits.
    no_poll = database.connect(autocommit=False)
    with Gate(database.dsn) as gate, Consumer(lake, gate.dsn, flush_interval="0.1") as consumer:
        await_waiting_slot(database, consumer)
        gate.hold_rows(SOME_BYTES)
        no_poll.execute("LOCK TABLE pg_publication_rel IN SHARE MODE")
        database.execute("ALTER TABLE t ADD PRIMARY KEY (id)")
        blocker.rollback()
        until(lambda: gate.waiting and database.execute(COPYING), what=f"the copy; see {consumer.log}")
        database.execute("UPDATE t SET v = 1 WHERE id <= 1000; DELETE FROM t WHERE id = 2000")
        settle(consumer, database, lake)
        assert states(lake)["public.t"] == "copying"
        assert database.execute(published) == [("cdc_append",)]
        no_poll.rollback()
        until(lambda: database.execute(published) == [("cdc",)], 20, "the poll to move it")
        until(lambda: "published in another way" in consumer.output, 20, "the poll to be taken in")
        gate.open()
        await_states(consumer, lake, "streaming", "public.t")
        database.execute("UPDATE t SET v = 2 WHERE id BETWEEN 500 AND 600")
        settle(consumer, database, lake)
        equal(database, lake, {"public.t": ["id"]})
        assert not leftovers(lake)


@pg18
def test_published_again_while_its_copy_is_half_read(database: Database, lake: Lake) -> None:
    """G5: the first copy goes on to its end, were it not given up, after the table has come back."""
    database.execute("CREATE PUBLICATION mine; CREATE TABLE other (id int PRIMARY KEY)")
    fill(database, "t", 30_000)
    mirror_once(lake, database.dsn, publication="mine")
    database.execute("ALTER PUBLICATION mine ADD TABLE t, other")
    with Gate(database.dsn) as gate, Consumer(lake, gate.dsn, publication="mine", flush_interval="0.1") as consumer:
        gate.hold_rows(SOME_BYTES)
        until(lambda: gate.waiting and states(lake)["public.t"] == "copying", what="the copy to be under way")
        (first,) = database.execute(COPYING)
        database.execute("ALTER PUBLICATION mine DROP TABLE t")
        database.execute("UPDATE t SET v = 1 WHERE id <= 10; DELETE FROM t WHERE id = 20")
        until(lambda: states(lake)["public.t"] == "dropped", 20, "the poll to notice")
        database.execute("UPDATE t SET v = 2 WHERE id <= 10; DELETE FROM t WHERE id = 21")
        database.execute("ALTER PUBLICATION mine ADD TABLE t")
        until(lambda: states(lake)["public.t"] in ("pending", "copying"), 20, "the poll to notice")
        database.execute("UPDATE t SET v = 3 WHERE id = 30")
        settle(consumer, database, lake)
        gate.open()
        await_states(consumer, lake, "streaming", "public.t", "public.other")
        assert first not in database.execute(COPYING)
        database.execute("UPDATE t SET v = 4 WHERE id = 40")
        settle(consumer, database, lake)
        equal(database, lake, {"public.t": ["id"]})
        assert not leftovers(lake)


def test_killed_while_its_copy_waits_for_a_slot(database: Database, lake: Lake) -> None:
    """K2, K4: the server notices late that the consumer is gone; the slot it still makes is in nobody's way."""
    mirror_once(lake, database.dsn)
    fill(database, "t", 1000)
    blocker = blocking(database)
    waiting = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'walsender' AND query LIKE 'CREATE_REPL%'"
    with Consumer(lake, database.dsn) as consumer:
        await_waiting_slot(database, consumer)
        consumer.kill()
    ((left,),) = database.execute(waiting)
    temporary = "SELECT active_pid FROM pg_replication_slots WHERE temporary ORDER BY active_pid"
    assert database.execute(temporary) == [(left,)], "the server has noticed that the consumer is gone"
    with Consumer(lake, database.dsn, flush_interval="0.1") as consumer:
        until(lambda: len(database.execute(waiting)) == 2, 30, f"a second slot that waits; see {consumer.log}")
        assert (left,) in database.execute(temporary)
        assert states(lake)["public.t"] == "copying"
        database.execute("UPDATE t SET v = 1 WHERE id <= 10")
        settle(consumer, database, lake)
        assert states(lake)["public.t"] == "copying"
        assert slot_waits(database)
        blocker.rollback()
        await_states(consumer, lake, "streaming", "public.t")
        assert "error" not in consumer.output
        database.execute("UPDATE t SET v = 2 WHERE id <= 5")
        settle(consumer, database, lake)
        equal(database, lake, {"public.t": ["id"]})
        until(lambda: not database.execute(temporary), 20, "the temporary slots to go")


class _Listener:
    """Keeps the lines; see `cdc.copies.Observer`."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def event(self, name: str, **fields: object) -> None:
        self.lines.append(f"{name} {fields}")

    def progress(self, table: str, rows: int, done_bytes: int, total_bytes: int) -> None:
        pass

    def copied(self, table: str, rows: int) -> None:
        self.event("copied", table=table, rows=rows)


@contextlib.contextmanager
def in_process(lake: Lake, dsn: str, **settings: str) -> Iterator[_Listener]:
    """Run a consumer in a thread of this process, whose threads can be seen."""
    listener = _Listener()
    given = {"dsn": dsn, "warehouse": str(lake.warehouse), "history": str(lake.history)} | settings
    pipeline = Pipeline(load(given, environ={}), listener)
    thread = threading.Thread(target=pipeline.run)
    thread.start()
    try:
        yield listener
    finally:
        pipeline.stop()
        thread.join(20)
        assert not thread.is_alive()


@contextlib.contextmanager
def no_free_slot(database: Database) -> Iterator[None]:
    """Use up all replication slots of the server."""
    made: list[str] = []
    with contextlib.suppress(psycopg.errors.ConfigurationLimitExceeded):
        while True:
            name = f"taken_{len(made)}"
            database.execute("SELECT pg_create_physical_replication_slot(%s)", [name])
            made.append(name)
    try:
        yield
    finally:
        for name in made:
            database.execute("SELECT pg_drop_replication_slot(%s)", [name])


@pg18
def test_resync_of_what_waits_for_a_free_slot(database: Database, lake: Lake) -> None:
    """K4, J17: a copy that is given up between two tries makes no third one beside the copy that replaces it."""
    mirror_once(lake, database.dsn)
    fill(database, "t", 1000)
    ((oid,),) = database.execute("SELECT 't'::regclass::oid::int8")
    database.execute(f"ALTER DATABASE {database.name} SET log_replication_commands = on")

    def slots_asked_for() -> int:
        wanted = "received replication command: CREATE_REPLICATION_SLOT"
        return sum(wanted in line for line in database.server.log.read_text(errors="replace").splitlines())

    def drivers() -> int:
        return sum(thread.name == f"cdc-copy-{oid}" for thread in threading.enumerate())

    # The warehouse is not looked into: the same process must not open it twice.
    with in_process(lake, database.dsn, flush_interval="0.1") as listener:

        def begun() -> int:
            return sum(line.startswith("copy ") for line in listener.lines)

        def copied() -> int:
            return sum(line.startswith("copied ") for line in listener.lines)

        with no_free_slot(database):
            until(lambda: slots_asked_for() >= 3, what="some tries in vain")
            assert begun() == 1
            for _ in range(2):
                resync(lake, database.dsn, "public.t")
                database.execute("UPDATE t SET v = v + 1")
            until(lambda: begun() == 3, 20, str(listener.lines))
            assert not copied()
            tries = slots_asked_for()
        until(copied, 20, str(listener.lines))
        until(lambda: not drivers(), 10, "those that were given up to notice")
        assert slots_asked_for() <= tries + 2, "the one that made it, and a try that was under way"
        assert copied() == 1
        database.execute("UPDATE t SET v = v + 1 WHERE id < 10")
    mirror_once(lake, database.dsn)
    equal(database, lake, {"public.t": ["id"]})
    assert not leftovers(lake)
