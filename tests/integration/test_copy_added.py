"""Tables that enter a publication, or are copied anew, while they are written to: every row is there exactly once."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import threading
import time

import psycopg
import pytest

from tests.conftest import Database, Lake
from tests.integration.copies import await_states, copy_lsns, equal, leftovers, locks, settle, slots_that_wait
from tests.integration.writers import KINDS, Standby, Writers, late_standby, make_table
from tests.mirror import Consumer, run_cdc, states, until, warehouse_rows

pg18 = pytest.mark.parametrize("server", [18], indirect=True, ids=["pg18"])

ROUNDS = 2
KEYS = {"keyed": ["id"], "whole": [], "bare": []}


@pytest.fixture
def seed() -> int:
    """Seed of a test's random writers; a failure shows it, and the environment variable sets it."""
    chosen = int(os.environ.get("TEST_SEED") or random.randrange(10**6))
    logging.getLogger(__name__).warning("TEST_SEED=%d", chosen)
    return chosen


def added_under_load(
    database: Database, lake: Lake, seed: int, *, options: str = "", standby: Standby | None = None
) -> None:
    """Let tables enter two publications, ours by itself and somebody else's by ALTER PUBLICATION, for some rounds.

    In each round a transaction is open across it all: it has written to the new tables before they are published,
    writes again afterwards, and ends when both copies wait for it.
    """
    rng = random.Random(seed)
    theirs = Lake(lake.root, lake.root / "theirs.duckdb", lake.root / "theirs")
    make_table(database, "keyed", "first")
    database.execute("SET synchronous_commit = local; CREATE PUBLICATION mine FOR TABLE first")
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(Consumer(lake, database.dsn))
        other = stack.enter_context(Consumer(theirs, database.dsn, slot="other", publication="mine"))
        for consumer, there in ((ours, lake), (other, theirs)):
            await_states(consumer, there, "streaming", "public.first")
        writers = stack.enter_context(Writers(database, seed, options))
        writers.tables.append("first")
        for number in range(ROUNDS):
            names = {kind: f"{kind}{number}" for kind in KINDS}
            across = stack.enter_context(psycopg.connect(database.dsn, options=options))
            for kind, name in names.items():
                make_table(database, kind, name)
                across.execute(f"INSERT INTO {name} (writer, v) VALUES (-1, 1)".encode())
                across.execute("SAVEPOINT s")
                across.execute(f"INSERT INTO {name} (writer, v) VALUES (-1, 2)".encode())
                across.execute("ROLLBACK TO SAVEPOINT s")
                writers.tables.append(name)
            time.sleep(rng.uniform(0, 0.5))
            assert all(locks(database, name, "RowExclusiveLock") for name in names.values())
            database.execute(f"ALTER PUBLICATION mine ADD TABLE {names['keyed']}, {names['whole']}")
            for kind, name in names.items():
                across.execute(f"INSERT INTO {name} (writer, v) VALUES (-1, 3)".encode())
                if kind != "bare":
                    across.execute(f"UPDATE {name} SET v = 0 WHERE writer = -1 AND v = 1".encode())
            across.execute(f"INSERT INTO first (writer, v) VALUES (-1, {number})".encode())
            before = writers.committed
            until(lambda: slots_that_wait(database) == 2, 30, "both consumers to make slots for copies")
            assert states(lake)["public." + names["keyed"]] in ("pending", "copying")
            if standby is None:
                across.commit()
            else:
                commit_before_it_is_visible(database, lake, across, standby, number)
            await_states(ours, lake, "streaming", *(f"public.{name}" for name in names.values()))
            await_states(other, theirs, "streaming", f"public.{names['keyed']}", f"public.{names['whole']}")
            assert writers.committed > before
        again = [names["keyed"], names["whole"]]
        copied_again_under_load(database, lake, stack.enter_context(psycopg.connect(database.dsn)), again, standby)
        writers.stop()
        settle(ours, database, lake)
        settle(other, database, theirs)
        tables = {f"public.{name}": KEYS.get(name.rstrip("0123456789"), ["id"]) for name in writers.tables}
        equal(database, lake, tables)
        equal(database, theirs, {table: key for table, key in tables.items() if "bare" not in table})
        assert not leftovers(lake)
        assert not leftovers(theirs)


def copied_again_under_load(
    database: Database,
    lake: Lake,
    across: psycopg.Connection[tuple[object, ...]],
    tables: list[str],
    standby: Standby | None,
) -> None:
    """Let `cdc resync` copy tables anew, with a transaction open that has written to them, and writes on."""
    before = copy_lsns(lake)
    for name in tables:
        across.execute(f"INSERT INTO {name} (writer, v) VALUES (-2, 1)".encode())
    run_cdc(lake, database.dsn, "resync", *(f"public.{name}" for name in tables))
    until(lambda: slots_that_wait(database) == 1, 30, "the consumer to make a slot for a copy")
    assert states(lake)[f"public.{tables[0]}"] == "resyncing"
    for name in tables:
        across.execute(f"UPDATE {name} SET v = 2 WHERE writer = -2".encode())
    across.execute(f"INSERT INTO first (writer, v) VALUES (-1, {ROUNDS})".encode())
    if standby is None:
        across.commit()
    else:
        commit_before_it_is_visible(database, lake, across, standby, ROUNDS, waiting=1)
    until(lambda: all(copy_lsns(lake)[f"public.{name}"] != before[f"public.{name}"] for name in tables), 60)


def commit_before_it_is_visible(
    database: Database,
    lake: Lake,
    session: psycopg.Connection[tuple[object, ...]],
    standby: Standby,
    number: int,
    waiting: int = 2,
) -> None:
    """Commit while the standby is silent: the stream has the transaction, and `waiting` copies wait for it still."""
    thread = threading.Thread(target=session.commit)
    row = f"SELECT count(*) FROM public.first WHERE writer = -1 AND v = {number}"
    with standby.held():
        thread.start()
        until(lambda: warehouse_rows(lake, row) == [(1,)], 30, "the commit in the stream")
        assert database.execute(row) == [(0,)]
        assert slots_that_wait(database) == waiting
        assert thread.is_alive()
    thread.join(30)
    assert database.execute(row) == [(1,)]


@pytest.mark.slow
def test_added_under_load(database: Database, lake: Lake, seed: int) -> None:
    """G5, K10, C10: into a publication of ours, and into one that is not; with and without a key."""
    added_under_load(database, lake, seed)


@pg18
@pytest.mark.slow
def test_added_under_synchronous_replication(database: Database, lake: Lake, seed: int) -> None:
    """G5, K10: commits are in the stream before anybody can see them."""
    with late_standby(database, lake.root / "wal", seed) as standby:
        added_under_load(database, lake, seed, standby=standby)


@pg18
@pytest.mark.slow
def test_added_with_asynchronous_commits(database: Database, lake: Lake, seed: int) -> None:
    """G5, K10: commits can be seen before they are in the stream."""
    added_under_load(database, lake, seed, options="-c synchronous_commit=off")
