"""TPC-B under kill -9: money that pgbench moves is never seen in one table and not in another, and none is lost.

Every transaction of pgbench adds the same amount to an account, a teller and a branch, and writes it down in a table
that has no key. So four sums are equal after every transaction, and a transaction that is half applied, lost or applied
twice (the additions are no upserts to the sums) makes them differ for good.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import psycopg
import pytest

from cdc.sink.warehouse import open_file
from tests.conftest import Database, Lake
from tests.crash.remains import Remains, glob, remains
from tests.mirror import Consumer, differences, run_cdc, states, until, warehouse_rows

ONLY_18 = pytest.mark.parametrize("server", [18], indirect=True, ids=["pg18"])
SCALE = 10
# Transactions per second: such that the consumer keeps up on a slow machine, and a good part of its time is in a batch.
RATE = 150
KILLS_IN_COPY = 3
KILLS_AT_START = 3
KILLS_IN_STREAM = 12
KILLS_AT_POINTS = 6
POINTS = (
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
BALANCES = """
SELECT (SELECT sum(abalance) FROM public.pgbench_accounts) AS accounts,
       (SELECT sum(bbalance) FROM public.pgbench_branches) AS branches,
       (SELECT sum(tbalance) FROM public.pgbench_tellers) AS tellers,
       (SELECT sum(delta) FROM public.pgbench_history) AS history
"""
"""TPC-B's invariant: four sums that are equal after every transaction."""
KEYS = {"accounts": ["aid"], "branches": ["bid"], "tellers": ["tid"], "history": []}
SMALL_BATCHES = {"flush_interval": "200ms", "flush_rows": "300"}


@dataclasses.dataclass
class Sight:
    """What readers of the warehouse have seen so far."""

    lake: Lake
    looks: int = 0
    transactions: int = 0
    checkpoint: int = 0

    def look(self) -> bool:
        """Look once, unless the consumer has the file; whether it was free."""
        found = glob(self.lake)
        try:
            connection = open_file(self.lake.warehouse, read_only=True)
        except duckdb.IOException:
            return False
        try:
            sums = connection.execute(BALANCES).fetchall()[0]
            transactions = connection.execute("SELECT count(*) FROM public.pgbench_history").fetchall()[0][0]
            checkpoint = connection.execute("SELECT lsn FROM _cdc.checkpoint").fetchall()[0][0]
            manifest = {path for (path,) in connection.execute("SELECT path FROM _cdc.files").fetchall()}
        finally:
            connection.close()
        assert len({amount or 0 for amount in sums}) == 1, f"half of a transaction shows: {sums}"
        assert found <= manifest, f"a glob saw uncommitted files: {sorted(found - manifest)[:3]}"
        assert transactions >= self.transactions, "transactions have vanished again"
        assert checkpoint >= self.checkpoint, "the checkpoint has moved back"
        self.transactions, self.checkpoint = transactions, checkpoint
        self.looks += 1
        return True

    def watch(self, seconds: float) -> None:
        """Look again and again."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self.look()
            time.sleep(min(left, 0.05))


@pytest.fixture
def traffic(database: Database) -> Iterator[subprocess.Popen[Any]]:
    """Keep pgbench running, four clients over TCP."""
    database.server.run("pgbench", "--initialize", "--quiet", f"--scale={SCALE}", dbname=database.name)
    pgbench = database.server.popen(
        "pgbench",
        *("--client=4", "--jobs=2", "--no-vacuum", "--time=1000", f"--rate={RATE}", "--random-seed=1"),
        dbname=database.name,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    yield pgbench
    pgbench.kill()
    pgbench.wait()


def _streaming(lake: Lake) -> bool:
    return Counter(states(lake).values()) == {"streaming": len(KEYS)}


def _await(consumer: Consumer, word: str) -> None:
    """Wait until the consumer says `word`, from where on it also knows what to do with a signal."""
    until(lambda: word in consumer.output or not consumer.running, what=word)


def _copy_under_kills(database: Database, lake: Lake, rng: random.Random) -> int:
    """Copy all tables while pgbench runs; return how many of the kills came while a table was being copied (K1, K4)."""
    landed = 0
    for attempt in range(KILLS_IN_COPY):
        # The first is sure to come in the middle of the accounts; the others come when they come.
        where = "" if attempt else f"during_copy:{rng.randint(1, 40)}"
        with Consumer(lake, database.dsn, flush_rows="20000", crash_at=where) as consumer:
            _await(consumer, "copy ")
            if where:
                assert consumer.wait() == -signal.SIGKILL, consumer.output
            else:
                time.sleep(rng.uniform(0.0, 2.0))
                assert consumer.running, consumer.output
                assert consumer.kill() == -signal.SIGKILL
        left = remains(database, lake)
        left.check()
        landed += "copying" in left.states.values()
    with Consumer(lake, database.dsn) as consumer:
        _await(consumer, "streaming")
        until(lambda: _streaming(lake) or not consumer.running, what="four tables streaming")
        assert consumer.stop() == 0, consumer.output
    return landed


def _kill(database: Database, lake: Lake, rng: random.Random, kind: str, sight: Sight) -> Remains:
    """Start a consumer, kill it at a moment of this kind, and return what it leaves."""
    where = f"{rng.choice(POINTS)}:{rng.randint(1, 20)}" if kind == "point" else ""
    with Consumer(lake, database.dsn, **SMALL_BATCHES, crash_at=where) as consumer:
        if kind == "start":
            sight.watch(rng.uniform(0.1, 1.0))
        else:
            _await(consumer, "streaming")
        if kind == "stream":
            sight.watch(rng.uniform(0.0, 1.5))
        if kind == "point":
            until(lambda: sight.look() or not consumer.running)
            assert consumer.wait() == -signal.SIGKILL, consumer.output
        else:
            assert consumer.running, consumer.output
            assert consumer.kill() == -signal.SIGKILL
    left = remains(database, lake)
    left.check()
    assert sight.look(), "nobody has the warehouse, but it cannot be read"
    return left


@pytest.mark.slow
@pytest.mark.timeout(500)
@ONLY_18
def test_pgbench_while_the_consumer_is_killed_again_and_again(
    database: Database, lake: Lake, traffic: subprocess.Popen[Any]
) -> None:
    """J7, J4, L4, L6, K1, K4: the four sums are equal at every moment, and in the end every row is."""
    seed = int(os.environ.get("CRASH_SEED") or random.randrange(2**32))
    print(f"CRASH_SEED={seed}")  # noqa: T201 -- pytest shows it with a failure
    rng = random.Random(seed)
    in_copy = _copy_under_kills(database, lake, rng)
    assert in_copy >= 1, "no kill came while a table was being copied"
    sight = Sight(lake)
    assert sight.look()

    kinds = ["start"] * KILLS_AT_START + ["stream"] * KILLS_IN_STREAM + ["point"] * KILLS_AT_POINTS
    rng.shuffle(kinds)
    committed = [0]
    left: list[tuple[str, Remains]] = []
    for kind in kinds:
        left.append((kind, _kill(database, lake, rng, kind, sight)))
        assert traffic.poll() is None, "pgbench has ended"
        committed.append(database.execute("SELECT count(*) FROM pgbench_history")[0][0])
    # What the kills were good for.
    marks = Counter(
        f"{kind}: {mark}"
        for kind, remains_of_it in left
        for mark in ("uncommitted", "unpublished", "unconfirmed")
        if getattr(remains_of_it, mark)
    )
    print(f"{len(left)} kills, {in_copy} more in copies; {sight.looks} looks; {dict(marks)}")  # noqa: T201
    assert len(left) >= 20
    assert all(before < after for before, after in itertools.pairwise(committed)), committed
    # A consumer that streams has cleared away what its predecessor left: these are of its own batches.
    in_batch = [kind for kind, r in left if r.uncommitted or r.unpublished]
    assert in_batch.count("stream") >= 2, "hardly a random kill came in the middle of a batch"
    assert sight.looks > len(left) + 10, "hardly anybody looked while the consumer was at work"

    # A stop in order, under traffic.
    with Consumer(lake, database.dsn, **SMALL_BATCHES) as consumer:
        _await(consumer, "streaming")
        sight.watch(1.0)
        assert consumer.stop() == 0, consumer.output
    remains(database, lake).check_clean()

    traffic.kill()
    traffic.wait()
    until(
        lambda: database.execute(
            "SELECT count(*) = 0 FROM pg_stat_activity WHERE application_name = 'pgbench' AND datname = %s",
            [database.name],
        )[0][0]
    )
    done = run_cdc(lake, database.dsn, "run", "--once")
    assert done.returncode == 0, done.stderr
    remains(database, lake).check_clean()
    assert sight.look()
    assert sight.transactions == database.execute("SELECT count(*) FROM pgbench_history")[0][0]
    for name in ("branches", "tellers", "history"):
        assert differences(database, lake, f"public.pgbench_{name}", KEYS[name]) == ""
    assert _different_accounts(database, lake) == {"warehouse": 0, "history": 0}


def _different_accounts(database: Database, lake: Lake) -> dict[str, int]:
    """Compare the million accounts as `tests.mirror.differences` would, but by DuckDB: Python takes a gigabyte for it.

    Returns:
        by side, how many rows are missing or too many.
    """
    kinds = {"aid": "INTEGER", "bid": "INTEGER", "abalance": "INTEGER", "filler": "VARCHAR"}
    names = ", ".join(kinds)
    source = lake.root / "accounts.csv"
    _export(database, f"SELECT {names} FROM pgbench_accounts", source)
    connection = duckdb.connect()
    connection.execute(
        f"CREATE TABLE source AS FROM read_csv('{source}', header = false, delim = ',', columns = {kinds})"
    )
    assert connection.execute("SELECT count(*) FROM source").fetchall() == [(SCALE * 100_000,)]
    connection.execute(f"ATTACH '{lake.warehouse}' AS lake (READ_ONLY)")
    # No truncate, no delete and no changed key but the copy's own T: the last change of each key is its row.
    log = f"read_parquet('{lake.history}/public/pgbench_accounts/*.parquet')"
    connection.execute(
        f"""CREATE TABLE replayed AS
        WITH log AS (FROM {log}), copies AS (SELECT max(_lsn) AS copy_lsn FROM log WHERE _op = 'T' AND _seq < 0)
        SELECT {names} FROM log, copies
        WHERE _op <> 'T' AND ((_lsn = copy_lsn AND _seq < 0) OR (_lsn >= copy_lsn AND _seq > 0))
        QUALIFY row_number() OVER (PARTITION BY aid ORDER BY _lsn DESC, _seq DESC) = 1"""
    )
    assert connection.execute(f"SELECT DISTINCT _op FROM {log} ORDER BY 1").fetchall() == [("S",), ("T",), ("U",)]
    found = {}
    for side, table in (("warehouse", "lake.public.pgbench_accounts"), ("history", "replayed")):
        ((count,),) = connection.execute(
            f"SELECT count(*) FROM ((SELECT {names} FROM source EXCEPT ALL SELECT {names} FROM {table}) UNION ALL "
            f"(SELECT {names} FROM {table} EXCEPT ALL SELECT {names} FROM source))"
        ).fetchall()
        found[side] = count
    connection.close()
    return found


def _export(database: Database, query: str, path: Path) -> None:
    statement = f"COPY ({query}) TO STDOUT (FORMAT csv)".encode()
    with (
        psycopg.connect(database.dsn) as connection,
        connection.cursor().copy(statement) as copy,
        path.open("wb") as out,
    ):
        for block in copy:
            out.write(block)


@ONLY_18
def test_the_invariant_is_one(database: Database, lake: Lake) -> None:
    """A look at a warehouse in which half of a transaction is missing fails."""
    database.execute(
        "CREATE TABLE pgbench_accounts (aid int PRIMARY KEY, abalance int);"
        "CREATE TABLE pgbench_branches (bid int PRIMARY KEY, bbalance int);"
        "CREATE TABLE pgbench_tellers (tid int PRIMARY KEY, tbalance int);"
        "CREATE TABLE pgbench_history (delta int);"
        "INSERT INTO pgbench_accounts VALUES (1, 5); INSERT INTO pgbench_branches VALUES (1, 5);"
        "INSERT INTO pgbench_tellers VALUES (1, 5); INSERT INTO pgbench_history VALUES (4)"
    )
    assert run_cdc(lake, database.dsn, "run", "--once").returncode == 0
    assert warehouse_rows(lake, "SELECT delta FROM public.pgbench_history") == [(4,)]
    with pytest.raises(AssertionError, match="half of a transaction"):
        Sight(lake).look()
