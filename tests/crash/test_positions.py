"""Positions: what is confirmed, what is skipped, and what the server sends again.

The three traps of protocol.md that lose changes without a word: commit records that touch, a slot that moves back in a
crash of the server, and a position that is confirmed before it is durable.
"""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psycopg
import pytest

from cdc.source import slot
from cdc.source.connection import connect
from tests.conftest import Database, Lake
from tests.crash.remains import remains
from tests.mirror import Consumer, differences, open_warehouse, run_cdc, until, warehouse_rows

TABLES = "CREATE TABLE t (id int PRIMARY KEY, v int); CREATE TABLE k (v int)"
PAIR: dict[str, Sequence[str]] = {"public.t": ["id"], "public.k": []}


@dataclasses.dataclass(frozen=True, slots=True)
class Commit:
    """A transaction in the stream: where its commit record is, and where that ends."""

    lsn: int
    end_lsn: int


def once(database: Database, lake: Lake, **settings: str) -> None:
    done = run_cdc(lake, database.dsn, "run", "--once", **settings)
    assert done.returncode == 0, done.stderr


def equal(database: Database, lake: Lake, keys: dict[str, Sequence[str]]) -> None:
    found = [differences(database, lake, table, key) for table, key in keys.items()]
    assert not any(found), "\n".join(filter(None, found))


def checkpoint(lake: Lake) -> int:
    ((lsn,),) = warehouse_rows(lake, "SELECT lsn FROM _cdc.checkpoint")
    return int(lsn)


def confirmed(database: Database) -> int:
    with connect(database.dsn) as connection:
        found = slot.read(connection, "cdc")
    assert found is not None
    assert found.confirmed_flush_lsn is not None
    return found.confirmed_flush_lsn


def waiting(database: Database, slot_name: str) -> list[Commit]:
    """Return the transactions that a slot which nobody uses would send, without moving it."""
    rows = database.execute(
        "SELECT data FROM pg_logical_slot_peek_binary_changes(%s, NULL, NULL, 'proto_version', '1', "
        "'publication_names', 'cdc,cdc_append', 'messages', 'true')",
        [slot_name],
    )
    commits = [data for (data,) in rows if data[:1] == b"C"]
    return [Commit(int.from_bytes(data[2:10], "big"), int.from_bytes(data[10:18], "big")) for data in commits]


def now(database: Database) -> int:
    ((lsn,),) = database.execute("SELECT (pg_current_wal_lsn() - '0/0')::bigint")
    return int(lsn)


def commit_together(database: Database, first: int, count: int) -> None:
    """Let as many sessions write a row each, and commit only then, one right after the other."""
    sessions = [database.connect(autocommit=False) for _ in range(count)]
    for i, session in enumerate(sessions, first):
        if i % 2:
            session.execute("INSERT INTO t VALUES (%s, %s)", [i, i])
        else:
            session.execute("INSERT INTO k VALUES (%s)", [i])
    for session in sessions:
        session.commit()
    for session in sessions:
        session.close()


def test_a_stop_between_commit_records_that_touch(database: Database, lake: Lake) -> None:
    """J1, trap 1: A ends where B's commit record begins; a stop exactly between them loses and doubles neither."""
    database.execute(TABLES)
    once(database, lake)
    database.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [f"w_{database.name[-8:]}"])
    hits = 0
    for attempt in range(6):
        commit_together(database, attempt * 10, 10)
        commits = waiting(database, f"w_{database.name[-8:]}")
        touching = {a.end_lsn for a, b in itertools.pairwise(commits) if a.end_lsn == b.lsn}
        # A transaction a batch: the second is durable, and the consumer dies.
        with Consumer(lake, database.dsn, flush_rows="1", crash_at="after_duck_commit:2") as consumer:
            assert consumer.wait() == -signal.SIGKILL, consumer.output
        hits += remains(database, lake).checkpoint in touching
        once(database, lake)
        equal(database, lake, PAIR)
        if hits == 2:
            break
    assert hits == 2, "no stop came between two commit records that touch"


def until_confirmed(database: Database, lsn: int) -> None:
    until(lambda: confirmed(database) >= lsn, what="everything is confirmed")


def test_the_server_forgets_what_was_confirmed(database: Database, lake: Lake) -> None:
    """J1, trap 2: a crash of the server moves the slot back; transactions that come again are not applied again."""
    database.execute(TABLES)
    once(database, lake)
    for attempt in range(5):
        database.execute("CHECKPOINT")
        with Consumer(lake, database.dsn, flush_interval="50ms") as consumer:
            until(lambda: "streaming" in consumer.output)
            commit_together(database, attempt * 100, 20)
            until_confirmed(database, now(database))
            consumer.kill()
        before = remains(database, lake)
        database.server.kill()
        database.server.start()
        after = remains(database, lake)
        again = waiting(database, "cdc")
        assert before.confirmed is not None
        assert before.checkpoint is not None
        assert after == dataclasses.replace(before, confirmed=after.confirmed)
        commit_together(database, attempt * 100 + 50, 5)
        once(database, lake)
        equal(database, lake, PAIR)
        # The server writes slots down at other moments too: then it forgets less, or nothing.
        if sum(commit.end_lsn <= before.checkpoint for commit in again) >= 20:
            assert after.confirmed is not None
            assert after.confirmed < before.confirmed
            return
    pytest.fail("the slot never moved back")


def test_the_server_crashes_under_the_consumer(database: Database, lake: Lake) -> None:
    """J1, J9, trap 2: the same without a stop of the consumer, which knows better than the slot where to go on."""
    database.execute(TABLES)
    once(database, lake)
    database.execute("CHECKPOINT")
    with Consumer(lake, database.dsn, flush_interval="50ms") as consumer:
        until(lambda: "streaming" in consumer.output)
        commit_together(database, 0, 20)
        until_confirmed(database, now(database))
        commit_together(database, 100, 20)  # of which some may be on their way
        database.server.kill()
        database.server.start()
        commit_together(database, 200, 20)
        until_confirmed(database, now(database))
        assert "connection lost" in consumer.output
        assert consumer.stop() == 0, consumer.output
    equal(database, lake, PAIR)
    once(database, lake)
    equal(database, lake, PAIR)


def test_nothing_is_confirmed_that_is_not_durable(database: Database, lake: Lake) -> None:
    """J4, J3, trap 3: a reader keeps the consumer from writing for longer than the server's patience.

    Meanwhile the server hears from the consumer, keeps the connection, and is told of no progress.
    """
    database.execute(TABLES)
    once(database, lake)
    timeout_s = 2
    dsn = f"{database.dsn}?options=-c%20wal_sender_timeout%3D{timeout_s}s"
    with Consumer(lake, dsn, flush_rows="1", flush_interval="50ms") as consumer:
        commit_together(database, 0, 4)
        end = now(database)
        until(lambda: confirmed(database) >= end)
        reader = open_warehouse(lake)
        ((durable,),) = reader.execute("SELECT lsn FROM _cdc.checkpoint").fetchall()
        # Many more batches than there is room for between receiver and applier.
        for i in range(30):
            commit_together(database, 100 + 10 * i, 2)
        end = now(database)
        observed = (
            "SELECT pid, (sent_lsn - '0/0')::bigint, (flush_lsn - '0/0')::bigint, reply_time FROM pg_stat_replication"
        )
        ((pid, *_),) = database.execute(observed)
        replies = set()
        began = time.monotonic()
        while time.monotonic() < began + 2.5 * timeout_s:
            ((pid_now, sent, flushed, replied),) = database.execute(observed)
            assert pid_now == pid, "the connection did not last"
            assert max(flushed, confirmed(database)) <= durable, "confirmed before it was durable"
            replies.add(replied)
            time.sleep(0.1)
        assert sent >= end, "the server has not even sent it"
        assert len(replies) >= 5, "the server was not answered"
        reader.close()
        until(lambda: confirmed(database) >= end)
        assert checkpoint(lake) >= end
        assert consumer.output.count("streaming") == 1, consumer.output
        assert consumer.stop() == 0
    equal(database, lake, PAIR)


def test_the_slot_is_never_ahead_of_the_warehouse(database: Database, lake: Lake) -> None:
    """J4: at every observation, and when the consumer is gone without a word."""
    database.execute(TABLES)
    once(database, lake)
    seen: set[int] = set()

    def observe() -> int:
        # In this order: what is confirmed at a moment has to be durable at that moment, and so it is later.
        told = confirmed(database)
        assert told <= checkpoint(lake), "confirmed before it was durable"
        seen.add(told)
        return told

    for round_ in range(3):
        with Consumer(lake, database.dsn, flush_interval="20ms", flush_rows="2") as consumer:
            until(lambda: "streaming" in consumer.output)
            for burst in range(4):
                commit_together(database, 1000 * round_ + 100 * burst, 10)
                end = now(database)
                while observe() < end:
                    assert consumer.running, consumer.output
            commit_together(database, 1000 * round_ + 900, 10)
            consumer.kill()
        remains(database, lake).check()
    assert len(seen) >= 10
    once(database, lake)
    equal(database, lake, PAIR)


def test_a_slot_that_is_ahead_of_the_warehouse_is_refused(database: Database, lake: Lake) -> None:
    """J1, J16, trap 3: changes were confirmed that the warehouse does not have; going on would lose them in silence."""
    database.execute(TABLES)
    once(database, lake)
    database.execute("INSERT INTO t VALUES (1, 1)")
    before = remains(database, lake)
    database.execute("SELECT pg_replication_slot_advance('cdc', pg_current_wal_lsn())")
    assert before.checkpoint is not None
    assert confirmed(database) > before.checkpoint
    done = run_cdc(lake, database.dsn, "run", "--once")
    assert done.returncode == 1
    assert "what lies between is lost" in done.stderr
    assert "cdc resync --all" in done.stderr
    assert dataclasses.replace(remains(database, lake), confirmed=before.confirmed) == before
    assert warehouse_rows(lake, "SELECT * FROM public.t") == []
    # The way out that the message names.
    assert run_cdc(lake, database.dsn, "resync", "--all").returncode == 0
    once(database, lake)
    equal(database, lake, PAIR)


def test_idle_positions_move_the_slot(database: Database, lake: Lake) -> None:
    """J2: traffic in tables that are not published and in other databases holds up no WAL, and makes no false alarm."""
    database.execute(TABLES + "; CREATE SCHEMA apart; CREATE TABLE apart.u (v text)")
    once(database, lake, tables="public.*")
    kept = remains(database, lake)
    with connect(database.dsn) as connection:
        begin = slot.read(connection, "cdc")
    assert begin is not None
    assert begin.restart_lsn is not None

    database.execute("INSERT INTO apart.u SELECT repeat('x', 100) FROM generate_series(1, 10000)")
    end = now(database)
    with Consumer(lake, database.dsn, tables="public.*") as consumer:
        until(lambda: confirmed(database) >= end, what="unpublished traffic is passed")
        assert end > begin.restart_lsn + 1_000_000
        # A checkpoint writes down which transactions run: only such a record lets restart_lsn follow.
        with psycopg.connect(database.server.dsn("postgres"), autocommit=True) as other:
            other.execute("CREATE TABLE passing AS SELECT repeat('x', 100) FROM generate_series(1, 10000)")
            other.execute("DROP TABLE passing")
            other.execute("CHECKPOINT")
        end = now(database)
        until(lambda: confirmed(database) >= end, what="another database's traffic is passed")
        assert confirmed(database) <= checkpoint(lake)
        with connect(database.dsn) as connection:
            passed = slot.read(connection, "cdc")
        assert passed is not None
        assert passed.restart_lsn is not None
        assert passed.restart_lsn > begin.restart_lsn
        assert consumer.stop() == 0
    left = remains(database, lake)
    left.check()
    assert left.manifest == kept.manifest, "there was a change after all"
    assert warehouse_rows(lake, "SELECT as_of IS NOT NULL FROM _cdc.freshness") == [(True,)]
    database.execute("INSERT INTO t VALUES (1, 1)")
    once(database, lake, tables="public.*")
    equal(database, lake, PAIR)


@pytest.mark.parametrize("server", [18], indirect=True, ids=["pg18"])
def test_batches_after_a_copy_are_as_long_as_they_should_be(database: Database, lake: Lake) -> None:
    """A copy asks the stream to hurry to its LSN; once it is there the flush interval holds again."""
    database.execute(TABLES)
    interval_s, duration_s = 1.0, 4.0
    with Consumer(lake, database.dsn, flush_interval=f"{interval_s}s") as consumer:
        until(lambda: consumer.output.count("copied") == 2, what="two copies")
        stop = threading.Event()

        def write() -> None:
            with psycopg.connect(database.dsn, autocommit=True) as connection:
                for i in itertools.count():
                    if stop.wait(0.005):
                        return
                    connection.execute("INSERT INTO t VALUES (%s, 0)", [i])

        writer = threading.Thread(target=write)
        writer.start()
        time.sleep(duration_s)
        stop.set()
        writer.join()
        assert consumer.stop() == 0
    once(database, lake)
    ((batches, rows),) = warehouse_rows(
        lake, "SELECT count(*), sum(rows) FROM _cdc.files WHERE table_name = 't' AND path NOT LIKE '%-s%'"
    )
    assert rows > 100
    assert batches <= duration_s / interval_s + 4
    equal(database, lake, PAIR)


@pytest.mark.parametrize("server", [18], indirect=True, ids=["pg18"])
def test_the_stream_replayed_from_an_earlier_position(database: Database, lake: Lake, tmp_path: Path) -> None:
    """L3, J16: warehouse, history and slot of an earlier day, all three: what comes again leads to the same."""
    database.execute(TABLES + "; INSERT INTO t VALUES (1, 1), (2, 2); INSERT INTO k VALUES (1), (1)")
    once(database, lake)
    database.execute("SELECT pg_copy_logical_replication_slot('cdc', 'spare')")
    shutil.copytree(lake.root, tmp_path / "earlier")
    for statement in (
        "INSERT INTO t VALUES (3, 3); UPDATE t SET id = 4 WHERE id = 2; DELETE FROM t WHERE id = 1",
        "INSERT INTO k VALUES (2); TRUNCATE k; INSERT INTO k VALUES (3); INSERT INTO t VALUES (5, 5)",
        "ALTER TABLE t ADD w text DEFAULT 'w'; INSERT INTO t VALUES (6, 6)",
        "ALTER TABLE t RENAME w TO x; UPDATE t SET x = 'y' WHERE id = 5",
    ):
        database.execute(statement)
    once(database, lake)
    equal(database, lake, PAIR)
    files = sorted(str(file.relative_to(lake.history)) for file in lake.history.rglob("*.parquet"))
    shutil.rmtree(lake.root)
    shutil.copytree(tmp_path / "earlier", lake.root)
    database.execute("SELECT pg_drop_replication_slot('cdc')")
    database.execute("SELECT pg_copy_logical_replication_slot('spare', 'cdc')")
    once(database, lake)
    equal(database, lake, PAIR)
    assert sorted(str(file.relative_to(lake.history)) for file in lake.history.rglob("*.parquet")) == files
