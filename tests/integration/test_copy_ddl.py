"""Copies of tables that are altered at the worst moments: no deadlock, no empty or half table, the ALTER gets through.

The moments: before the temporary slot is made, between its making and the sessions' locks, and while sessions read.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

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
from tests.mirror import Consumer, mirror_once, states, until, warehouse_rows

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


def agree(consumer: Consumer, database: Database, lake: Lake, key: list[str]) -> None:
    """Assert that the table ends up equal, with changes that come after everything else as well."""
    await_states(consumer, lake, "streaming", "public.t")
    database.execute("DELETE FROM t WHERE id = 2; INSERT INTO t (id) VALUES (1001)" if not key else f"DELETE FROM t WHERE id = {1}")
    settle(consumer, database, lake)
    await_states(consumer, lake, "streaming", "public.t")
    equal(database, lake, {"public.t": key})
    assert not leftovers(lake)


@pytest.mark.parametrize("kind", ALTERS)
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


@pytest.mark.parametrize("kind", ALTERS)
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
