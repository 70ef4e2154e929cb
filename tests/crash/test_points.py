"""kill -9 at every named point of the consumer (cdc/failpoints.py), the first, second and seventh time it comes by.

Each round: small transactions of every kind go on; the consumer dies at the point; what it leaves behind shows no half
of anything; a new one, which knows of nothing, makes every table equal again, in the warehouse and in the history.
"""

from __future__ import annotations

import os
import signal
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from cdc.failpoints import POINTS
from tests.conftest import Database, Lake
from tests.crash.remains import Remains, remains
from tests.crash.traffic import INVARIANTS, KEYS, SCHEMA, Traffic, large_transaction
from tests.mirror import Consumer, differences, run_cdc, until, warehouse_rows

# The version cannot matter: the points are in the consumer, and what comes in is the same.
ONLY_18 = pytest.mark.parametrize("server", [18], indirect=True, ids=["pg18"])
# Steps with another one right before or behind them.
LEFT_TO_SOAK = ("after_recv", "before_duck_begin", "before_parquet_tmp", "before_rename", "after_ack")

# Six consumers and more, each with a start of its own.
pytestmark = pytest.mark.timeout(300)

# Once at every push, where the pgbench test dies at many points as well; the others belong to `make soak`.
NTH = (1, 2, 7) if os.environ.get("SOAK") else (2,)
IN_STREAM = (
    "after_recv",
    "before_duck_begin",
    "mid_duck_apply",
    "before_parquet_tmp",
    "after_parquet_tmp",
    "before_duck_commit",
    "after_duck_commit",
    "before_rename",
    "after_rename",
    "before_ack",
    "after_ack",
)
IN_COPY = ("during_copy", "before_swap", "after_swap")
# Once in the life of a process that makes its slot, and never again.
ONCE = ("after_intent", "after_slot_create")
OTHERS = ("mid_txn", "during_ddl_apply", "during_idle")

SMALL = {"flush_interval": "50ms", "flush_rows": "20"}


def test_every_point_has_its_rounds() -> None:
    """J7: no point is left out."""
    assert sorted((*IN_STREAM, *IN_COPY, *ONCE, *OTHERS)) == sorted(POINTS)


@pytest.fixture
def mirror(database: Database, lake: Lake) -> None:
    """Fill the tables and copy them all."""
    database.execute(SCHEMA)
    done = run_cdc(lake, database.dsn, "run", "--once")
    assert done.returncode == 0, done.stderr


def seed_of(point: str, nth: int) -> int:
    """Return the seed of a round's traffic, always the same."""
    return zlib.crc32(f"{point}:{nth}".encode())


def die(
    database: Database,
    lake: Lake,
    point: str,
    nth: int,
    meanwhile: Callable[[], object] = lambda: None,
    **settings: str,
) -> Remains:
    """Run a consumer until it dies at the point, and see what it leaves; `meanwhile` is called again and again."""
    with Consumer(lake, database.dsn, **{**SMALL, **settings}, crash_at=f"{point}:{nth}") as consumer:

        def ended() -> bool:
            meanwhile()
            return not consumer.running

        until(ended, timeout_s=150, what=f"{point}, time {nth}")
        assert consumer.wait() == -signal.SIGKILL, consumer.output
    left = remains(database, lake, settings.get("slot", "cdc"))
    left.check()
    if {"public.account", "public.scratch", "public.event", "public.item"} <= left.tables:
        assert_whole(lake, left)
    return left


def assert_whole(lake: Lake, left: Remains) -> None:
    """Assert that no half of a transaction shows; across tables that is only true once all of them stream (L4)."""
    balanced, truncated, together = warehouse_rows(lake, INVARIANTS)[0]
    assert balanced, "half of a transaction shows in account"
    assert truncated, "half of a transaction shows in scratch"
    assert together or set(left.states.values()) != {"streaming"}, "event and item are of different times"


def recover(database: Database, lake: Lake, keys: Mapping[str, Sequence[str] | None] = KEYS, **settings: Any) -> None:
    """Run a new consumer to the end of what is committed; everything must be equal, and nothing be left over."""
    done = run_cdc(lake, database.dsn, "run", "--once", **settings)
    assert done.returncode == 0, done.stderr
    remains(database, lake, settings.get("slot", "cdc")).check_clean()
    found = [differences(database, lake, table, key) for table, key in keys.items()]
    assert not any(found), "\n".join(filter(None, found))
    assert warehouse_rows(lake, "SELECT count(*) FROM _cdc.buffer") == [(0,)]
    copies = "SELECT table_name FROM duckdb_tables() WHERE table_name LIKE '%cdc_copy%'"
    assert warehouse_rows(lake, copies) == [], "half of a copy is still there"


@pytest.mark.usefixtures("mirror")
@pytest.mark.parametrize(
    "point", [pytest.param(point, marks=[pytest.mark.slow] * (point in LEFT_TO_SOAK)) for point in IN_STREAM]
)
@ONLY_18
def test_in_the_stream(database: Database, lake: Lake, point: str) -> None:
    """J7, J4, L4, L6, C5, C10, D4, D7, E4: at each step of a batch; what was durable stays, the rest comes again."""
    for nth in NTH:
        with Traffic(database, seed_of(point, nth)):
            left = die(database, lake, point, nth)
        assert_left(point, left)
        recover(database, lake)


def assert_left(point: str, left: Remains) -> None:
    """Assert that the death came where the point's name says."""
    if point in ("after_parquet_tmp", "before_duck_commit"):
        assert left.uncommitted
        assert not left.unpublished
    elif point in ("after_duck_commit", "before_rename"):
        assert left.unpublished
        assert not left.uncommitted
        assert left.unconfirmed
    elif point in ("after_rename", "before_ack"):
        assert left.found == left.manifest
        assert left.unconfirmed
    elif point == "after_ack":
        assert not left.temporary


@pytest.mark.usefixtures("mirror")
@ONLY_18
def test_in_a_transaction_larger_than_a_batch(database: Database, lake: Lake) -> None:
    """J7, C17, L4: the pieces of it that were applied already are as if they had never come."""
    for nth in NTH:
        large_transaction(database)
        before = remains(database, lake)
        with Traffic(database, seed_of("mid_txn", nth)):
            left = die(database, lake, "mid_txn", nth)
        # The transaction came first, so not a single commit can have been durable.
        assert left.checkpoint == before.checkpoint
        assert left.found == before.found
        recover(database, lake)


@pytest.mark.usefixtures("mirror")
@ONLY_18
def test_while_columns_are_added(database: Database, lake: Lake) -> None:
    """J7, H1, H4, H9: DDL is a part of the batch's transaction: none of it is left, and all of it comes again."""
    columns = "SELECT table_name, column_name FROM duckdb_columns() WHERE table_name IN ('wide', 'filled') ORDER BY ALL"
    added = (
        "SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass AND attname ~ '^c[0-9]' AND NOT attisdropped"
    )
    for nth in NTH:
        for table, default in (("wide", ""), ("filled", " DEFAULT 5")):
            drops = [f"DROP {name}" for (name,) in database.execute(added, [table])]
            adds = [f"ADD c{nth}_{i} int{default}" for i in range(8)]
            database.execute(f"ALTER TABLE {table} {', '.join((*drops, *adds))}")
            database.execute(f"UPDATE {table} SET v = v + 1, c{nth}_1 = id WHERE id <= 5")
        before = warehouse_rows(lake, columns)
        with Traffic(database, seed_of("during_ddl_apply", nth)):
            die(database, lake, "during_ddl_apply", nth)
        assert warehouse_rows(lake, columns) == before
        # The history does not hold a default of rows that were not changed since: that is for `cdc restore`.
        recover(database, lake, {**KEYS, "public.filled": None})
        followed = f"SELECT count(*) FROM _cdc.schema_changes WHERE change LIKE 'column c{nth}\\_% added' ESCAPE '\\'"
        assert warehouse_rows(lake, followed) == [(16,)], "the tables were copied anew instead"


@pytest.mark.parametrize(
    ("point", "rounds"),
    [
        *((point, NTH) for point in IN_COPY),
        ("before_parquet_tmp", (7,)),
        pytest.param("after_parquet_tmp", (7,), marks=pytest.mark.slow),
    ],
    ids=[*IN_COPY, "before_parquet_tmp", "after_parquet_tmp"],
)
@ONLY_18
def test_in_a_copy(database: Database, lake: Lake, point: str, rounds: Sequence[int]) -> None:
    """J7, K1, K4, K10: the first copy, then two rounds of `cdc resync --all`, all of them under traffic."""
    database.execute(SCHEMA)
    for nth in rounds:
        first = not lake.warehouse.exists()
        if not first:
            assert run_cdc(lake, database.dsn, "resync", "--all").returncode == 0
        with Traffic(database, seed_of(f"copy {point}", nth), pause_s=0.1):
            left = die(database, lake, point, nth, flush_rows="100", flush_interval="500ms")
        unfinished = {name for name, state in left.states.items() if state != "streaming"}
        if point == "after_swap":
            assert len(unfinished) == len(KEYS) - nth
        else:
            assert len(unfinished) >= (len(KEYS) - nth + 1 if point == "before_swap" else 1)
        assert left.tables == (set(KEYS) - unfinished if first else set(KEYS))
        recover(database, lake)


@pytest.mark.parametrize(
    "point", [pytest.param(point, marks=[pytest.mark.slow] * (point == "after_intent")) for point in ONCE]
)
@ONLY_18
def test_before_the_first_checkpoint(database: Database, lake: Lake, point: str) -> None:
    """J7, J11, J12: a slot that is half made is made anew, at whichever step and however often that fails."""
    database.execute(SCHEMA)
    with Traffic(database, seed_of(point, 1)):
        left = die(database, lake, point, 1)
        assert left.checkpoint is None
        assert (left.confirmed is None) == (point == "after_intent")
        # The intent stands; each start from here on makes the slot, and finds the one that the last has made.
        for _ in range(2):
            left = die(database, lake, "after_slot_create", 1)
            assert left.checkpoint is None
            assert left.confirmed is not None
            assert not left.tables
            database.execute("UPDATE still SET v = v || '.'")
    recover(database, lake)
    # A process comes by here once: it cannot die of a second time, or a seventh.
    for nth in (each for each in NTH if each > 1):
        other = Lake(lake.root, lake.root / f"{nth}.duckdb", lake.root / f"history{nth}")
        recover(database, other, slot=f"slot{nth}", crash_at=f"{point}:{nth}")


@pytest.mark.usefixtures("mirror")
@ONLY_18
def test_while_nothing_happens(database: Database, lake: Lake) -> None:
    """J7, J4, J2: the position of an idle stream is durable before it is confirmed, so no alarm is false afterwards.

    A stream names its first idle position at once, and further ones seldom; so the connection is cut after each.
    """
    for nth in NTH:
        before = remains(database, lake)
        marks: list[int] = []

        def next_idle(marks: list[int] = marks) -> None:
            ((confirmed, end),) = database.execute(
                "SELECT (confirmed_flush_lsn - '0/0')::bigint, (pg_current_wal_lsn() - '0/0')::bigint "
                "FROM pg_replication_slots WHERE slot_name = 'cdc'"
            )
            if not marks or confirmed >= marks[-1]:
                database.execute(f"COMMENT ON TABLE still IS 'comment {end}'")
                marks.append(end + 1)
                database.execute(
                    "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = 'cdc'"
                )

        left = die(database, lake, "during_idle", nth, next_idle)
        assert before.checkpoint is not None
        assert left.checkpoint is not None
        assert left.checkpoint > before.checkpoint
        assert left.unconfirmed
        assert left.manifest == before.manifest, "there was a change after all"
        with Traffic(database, seed_of("during_idle", nth)) as traffic:
            until(lambda: traffic.transactions > 5)
        recover(database, lake)
