"""Copies of tables that are altered at the worst moments: no deadlock, no empty or half table, the ALTER gets through.

The moments: before the temporary slot is made, between its making and the sessions' locks, and while sessions read.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import pytest

from tests.conftest import Database, Lake
from tests.integration.copies import (
    await_states,
    await_waiting_slot,
    blocking,
    copy_lsns,
    equal,
    leftovers,
    locks,
    settle,
)
from tests.integration.gate import Gate
from tests.mirror import Consumer, mirror_once, mirrored_rows, source_rows, states, until, warehouse_rows

pg18 = pytest.mark.parametrize("server", [18], indirect=True, ids=["pg18"])

ALTERS = {
    "add": "ALTER TABLE t ADD c int DEFAULT 7; UPDATE t SET c = id WHERE id > 50",
    "drop": "ALTER TABLE t DROP v; INSERT INTO t (id) VALUES (-1)",
    "rename": "ALTER TABLE t RENAME v TO w; UPDATE t SET w = -1 WHERE id < 10",
    "swap names": "ALTER TABLE t ADD c int DEFAULT 1; ALTER TABLE t RENAME v TO x; ALTER TABLE t RENAME c TO v",
    "type": "ALTER TABLE t ALTER v TYPE text USING 'was ' || v",
    "rewrite": "ALTER TABLE t ALTER v TYPE int USING v * 100",
    "truncate": "TRUNCATE t; INSERT INTO t VALUES (1, 1), (2, 2)",
    "key": "ALTER TABLE t DROP CONSTRAINT t_pkey; ALTER TABLE t ADD PRIMARY KEY (id, v)",
}
KEYS = {"key": ["id", "v"], "truncate": ["id"]}


def make(database: Database, rows: int = 100) -> None:
    """Create and publish the table that is copied; each row is different in both columns."""
    database.execute(
        "CREATE TABLE t (id int PRIMARY KEY, v int NOT NULL);"
        f"INSERT INTO t SELECT i, i + 1000 FROM generate_series(1, {rows}) AS i;"
        "ALTER PUBLICATION cdc ADD TABLE t"
    )


@contextlib.contextmanager
def meanwhile(database: Database, statements: str) -> Iterator[threading.Thread]:
    """Run `statements`, one transaction, in the background; at the end they have got through."""
    failures: list[BaseException] = []

    def work() -> None:
        try:
            database.execute(statements)
        except BaseException as error:  # noqa: BLE001  # raised again by the test
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    yield thread
    thread.join(30)
    assert not thread.is_alive(), "the ALTER did not get through"
    assert not failures, failures[0]


def agree(consumer: Consumer, database: Database, lake: Lake, key: list[str] | None) -> None:
    """Assert that the table ends up equal, with changes that come after everything else as well; see `equal`."""
    await_states(consumer, lake, "streaming", "public.t")
    database.execute("DELETE FROM t WHERE id = 2")
    settle(consumer, database, lake)
    await_states(consumer, lake, "streaming", "public.t")
    equal(database, lake, {"public.t": key})
    assert not leftovers(lake)


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[pytest.mark.slow] * (k in ("add", "rewrite", "swap names"))) for k in ALTERS]
)
def test_altered_while_the_slot_is_made(database: Database, lake: Lake, kind: str) -> None:
    """K6: the ALTER is in the queue with an xid before the temporary slot is asked for, which waits for that xid."""
    mirror_once(lake, database.dsn)
    make(database)
    reader = database.connect(autocommit=False)
    reader.execute("SELECT count(*) FROM t")
    with meanwhile(database, ALTERS[kind]):
        until(lambda: locks(database, "t", "AccessExclusiveLock", granted=False), what="the ALTER to wait")
        with Consumer(lake, database.dsn) as consumer:
            await_waiting_slot(database, consumer)
            assert not locks(database, "t")
            reader.commit()
            agree(consumer, database, lake, KEYS.get(kind, ["id"]))
            assert len(copy_lsns(lake)) == 1


# Each kind is tried in one of the two places at every push, in both by `make soak`.
@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[pytest.mark.slow] * (k not in ("add", "rewrite", "swap names"))) for k in ALTERS]
)
def test_altered_between_slot_and_lock(database: Database, lake: Lake, kind: str) -> None:
    """K6: the snapshot is older than the table; a rewritten one is empty to it."""
    mirror_once(lake, database.dsn)
    make(database)
    blocker = blocking(database)
    with Gate(database.dsn) as gate, Consumer(lake, gate.dsn) as consumer:
        await_waiting_slot(database, consumer)
        gate.hold_newcomers()
        blocker.rollback()
        until(lambda: gate.waiting, what="a session to come for the snapshot")
        assert not locks(database, "t")
        database.execute(ALTERS[kind])
        gate.open()
        agree(consumer, database, lake, KEYS.get(kind, ["id"]))


def test_lock_is_asked_for_and_not_waited_for(database: Database, lake: Lake) -> None:
    """K6: an ALTER is in the queue when a session comes; it gets through, though the session holds a snapshot."""
    mirror_once(lake, database.dsn)
    make(database)
    blocker = blocking(database)
    with Gate(database.dsn) as gate, Consumer(lake, gate.dsn) as consumer:
        await_waiting_slot(database, consumer)
        gate.hold_newcomers()
        blocker.rollback()
        until(lambda: gate.waiting, what="a session to come for the snapshot")
        reader = database.connect(autocommit=False)
        reader.execute("SELECT count(*) FROM t")
        with meanwhile(database, ALTERS["type"]):
            until(lambda: locks(database, "t", "AccessExclusiveLock", granted=False), what="the ALTER to wait")
            gate.open()
            # The first attempt has failed when the next one waits for the ALTER's transaction.
            await_waiting_slot(database, consumer)
            assert not locks(database, "t")
            reader.commit()
            agree(consumer, database, lake, ["id"])


def test_snapshot_that_is_gone_is_taken_anew(database: Database, lake: Lake) -> None:
    """K3: the session that exported it breaks before another has imported it."""
    mirror_once(lake, database.dsn)
    make(database)
    blocker = blocking(database)
    with Gate(database.dsn) as gate, Consumer(lake, gate.dsn) as consumer:
        await_waiting_slot(database, consumer)
        gate.hold_newcomers()
        blocker.rollback()
        until(lambda: gate.waiting, what="a session to come for the snapshot")
        ended = "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE temporary AND database = %s"
        assert database.execute(ended, [database.name]) == [(True,)]
        until(lambda: not database.execute("SELECT 1 FROM pg_replication_slots WHERE temporary"), 10)
        gate.open()
        agree(consumer, database, lake, ["id"])


def make_large(database: Database) -> None:
    """Create and publish a table for two sessions; each row is different."""
    database.execute(
        "CREATE TABLE t (id int PRIMARY KEY, v int NOT NULL, pad text);"
        "ALTER TABLE t ALTER pad SET STORAGE PLAIN;"
        "INSERT INTO t SELECT i, i + 1000, repeat('x', 7000) FROM generate_series(1, 9000) AS i;"
        "ALTER PUBLICATION cdc ADD TABLE t"
    )
    assert database.execute("SELECT pg_relation_size('t') BETWEEN 64000001 AND 127999999") == [(True,)]


def test_altered_between_two_sessions(database: Database, lake: Lake) -> None:
    """K6: the second session of a parallel copy comes when an ALTER waits for the first one's lock."""
    mirror_once(lake, database.dsn)
    make_large(database)
    blocker = blocking(database)
    with Gate(database.dsn) as gate, Consumer(lake, gate.dsn, threads="2") as consumer:
        await_waiting_slot(database, consumer)
        gate.hold_newcomers()
        blocker.rollback()
        until(lambda: gate.waiting)
        while not locks(database, "t"):
            gate.admit()
            time.sleep(0.1)
        with meanwhile(database, ALTERS["add"]):
            until(lambda: locks(database, "t", "AccessExclusiveLock", granted=False), what="the ALTER to wait")
            assert len(locks(database, "t")) == 1
            gate.open()
            agree(consumer, database, lake, ["id"])
            assert warehouse_rows(lake, "SELECT count(*), sum(c) FROM public.t") == [
                (8999, sum(range(51, 9001)) + 49 * 7)
            ]


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        pytest.param("add", None, id="followed"),  # the change log is not read across an added column
        pytest.param("type", ["id"], id="copied-again"),
    ],
)
def test_altered_behind_a_running_copy(database: Database, lake: Lake, kind: str, key: list[str] | None) -> None:
    """K6, K11: the ALTER waits until the sessions have read all, and then gets through."""
    mirror_once(lake, database.dsn)
    make_large(database)
    with Gate(database.dsn) as gate, Consumer(lake, gate.dsn, threads="2") as consumer:
        gate.hold_rows(1_000_000)
        until(lambda: gate.waiting == 2, what="two sessions to be reading")
        assert len(locks(database, "t")) == 2
        with meanwhile(database, ALTERS[kind]):
            until(lambda: locks(database, "t", "AccessExclusiveLock", granted=False), what="the ALTER to wait")
            gate.open()
            agree(consumer, database, lake, key)


def test_columns_and_filter_are_those_of_the_snapshot(database: Database, lake: Lake) -> None:
    """K7, G1, G2: the publication is changed, by its owner, while the temporary slot is being made."""
    database.execute("CREATE PUBLICATION cdc WITH (publish = 'insert, update, delete, truncate')")
    mirror_once(lake, database.dsn)
    make(database)
    database.execute("ALTER PUBLICATION cdc SET TABLE t (id) WHERE (id > 90)")
    blocker = blocking(database)
    with Consumer(lake, database.dsn) as consumer:
        await_waiting_slot(database, consumer)
        database.execute("ALTER PUBLICATION cdc SET TABLE t (id, v) WHERE (id > 50)")
        blocker.rollback()
        await_states(consumer, lake, "streaming", "public.t")
        database.execute("INSERT INTO t VALUES (0, 0), (1000, 1)")
        settle(consumer, database, lake)
        assert mirrored_rows(database, lake, "public.t") == source_rows(database, lake, "public.t", "id > 50")


def test_locked_table_holds_up_no_other(database: Database, lake: Lake) -> None:
    """Neither a start, nor the stream, nor an altered table waits for a lock on some other published table."""
    database.execute(
        "CREATE TABLE a (id int PRIMARY KEY); CREATE TABLE b (id int PRIMARY KEY); CREATE PUBLICATION cdc;"
        "ALTER PUBLICATION cdc ADD TABLE a, b WHERE (id > 0)"
    )
    mirror_once(lake, database.dsn)
    locker = database.connect(autocommit=False)
    locker.execute("LOCK TABLE b IN ACCESS EXCLUSIVE MODE")
    with Consumer(lake, database.dsn) as consumer:
        database.execute("INSERT INTO a VALUES (1)")
        until(lambda: warehouse_rows(lake, "SELECT count(*) FROM public.a") == [(1,)], 20, consumer.output)
        database.execute("ALTER TABLE a ADD v int DEFAULT 5; INSERT INTO a VALUES (2, 2)")
        until(lambda: warehouse_rows(lake, "SELECT count(*) FROM public.a") == [(2,)], 20, consumer.output)
        assert locks(database, "b", "AccessExclusiveLock")
        assert not locks(database, "b", granted=False)
        equal(database, lake, {"public.a": None})
        locker.rollback()
        assert consumer.stop() == 0


def test_locked_new_table_does_not_keep_the_others(database: Database, lake: Lake) -> None:
    """A start and a poll go on without a table that cannot be published yet; it is added once that is possible."""
    database.execute("CREATE TABLE a (id int PRIMARY KEY)")
    mirror_once(lake, database.dsn)
    make(database)
    database.execute("ALTER PUBLICATION cdc DROP TABLE t")
    locker = database.connect(autocommit=False)
    locker.execute("LOCK TABLE t IN ACCESS EXCLUSIVE MODE")
    with Consumer(lake, database.dsn) as consumer:
        database.execute("INSERT INTO a VALUES (1)")
        until(lambda: states(lake).get("public.a") == "streaming" and consumer.running, 20, consumer.output)
        until(lambda: warehouse_rows(lake, "SELECT count(*) FROM public.a") == [(1,)], 20, consumer.output)
        database.execute("CREATE TABLE c (id int PRIMARY KEY)")
        in_hand = "SELECT 1 FROM pg_publication_tables WHERE tablename = 'c'"
        until(lambda: database.connect(options="-c lock_timeout=5s").execute(in_hand).fetchall(), 40)
        assert "public.t" not in states(lake)
        locker.rollback()
        await_states(consumer, lake, "streaming", "public.t", "public.c")
        settle(consumer, database, lake)
        equal(database, lake, {"public.t": ["id"], "public.a": ["id"], "public.c": ["id"]})
