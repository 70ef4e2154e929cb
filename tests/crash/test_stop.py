"""A stop in order, and an error of one table: the ends that are no crash, and must lose just as little."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import duckdb
import pytest

from cdc.sink.history import History
from cdc.sink.holding import Holding
from cdc.sink.sink import Sink
from cdc.sink.warehouse import Warehouse
from tests.conftest import Database, Lake
from tests.crash.remains import remains
from tests.mirror import Consumer, differences, run_cdc, until, warehouse_rows
from tests.program import spawned

ONLY_18 = pytest.mark.parametrize("server", [18], indirect=True, ids=["pg18"])


def once(database: Database, lake: Lake, status: int = 0, **settings: str) -> str:
    done = run_cdc(lake, database.dsn, "run", "--once", **settings)
    assert done.returncode == status, done.stderr
    return done.stderr


@ONLY_18
def test_a_signal_ends_a_consumer_that_is_far_behind(database: Database, lake: Lake) -> None:
    """J21: what cannot be flushed within 10 s stays unconfirmed and comes with the next start; exit status 0 anyway."""
    database.execute("CREATE TABLE t (id int PRIMARY KEY, v int); CREATE TABLE k (v int)")
    once(database, lake)
    with database.connect() as connection:
        for i in range(3000):
            connection.execute("INSERT INTO t VALUES (%s, 0)", [i])
    database.execute("INSERT INTO k SELECT generate_series(1, 10)")
    with Consumer(lake, database.dsn, flush_rows="1") as consumer:
        until(lambda: "streaming" in consumer.output)
        until(lambda: list(lake.history.glob("public/t/*.parquet"))[20:], what="some batches")
        began = time.monotonic()
        assert consumer.stop(30) == 0, consumer.output
        took = time.monotonic() - began
    assert took < 10, f"it took {took:.1f} s"
    assert "error" not in consumer.output
    left = remains(database, lake)
    left.check_clean()
    assert left.confirmed == left.checkpoint
    ((count,),) = warehouse_rows(lake, "SELECT count(*) FROM public.t")
    assert 20 < count < 3000, "it was not far behind"
    once(database, lake)
    assert differences(database, lake, "public.t", ["id"]) == ""
    assert differences(database, lake, "public.k", []) == ""


@pytest.fixture
def warehouse(lake: Lake) -> Warehouse:
    """An open warehouse of this process, without ``_cdc``."""
    warehouse = Warehouse(lake.warehouse, memory_bytes=512_000_000, threads=2)
    warehouse.acquire()
    return warehouse


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks at the signals of a process by /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_is_being_loaded(lake: Lake, number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """J21: nothing is in hand yet, and the exit status is 0."""
    monkeypatch.setattr("tests.mirror.start", spawned)
    with Consumer(lake, "host=127.0.0.1 port=1") as consumer:
        status = Path(f"/proc/{consumer.pid}/status")

        def caught() -> bool:
            masks = dict(line.split(":", 1) for line in status.read_text().splitlines())
            return bool(int(masks["SigCgt"], 16) >> (signal.SIGTERM - 1) & 1)

        until(caught, 20)
        consumer.send_signal(number)
        assert consumer.wait() == 0
        assert consumer.output == ""


def test_an_interruption_is_no_error_of_the_warehouse(warehouse: Warehouse, lake: Lake) -> None:
    """J21: the statement that the deadline after a signal breaks off is rolled back, and told apart from a failure."""
    sink = Sink(
        warehouse,
        History(lake.history),
        deletes="hard",
        live=lambda _oid: None,
        waiting=lambda _busy, _waited_s: None,
        give_up=lambda: False,
        holding=Holding({}, {}, lambda _oid: None, logged=True, limit=10),
    )

    def work() -> None:
        warehouse.execute("SELECT sum(sin(i)) FROM range(100000000000) r(i)")

    timer = threading.Timer(0.3, warehouse.interrupt)
    timer.start()
    with pytest.raises(duckdb.InterruptException):
        sink._alone(work)
    assert not warehouse.in_transaction
    warehouse.release()


def test_a_commit_is_not_broken_off(warehouse: Warehouse) -> None:
    """J4: DuckDB reports an interrupted COMMIT as failed even if it has happened: then nobody would know what is in."""
    # Straight on the connection: after an interruption the warehouse itself runs nothing more.
    run = warehouse.connection.execute
    run("CREATE TABLE t (i int, v varchar)")
    for i in range(30):
        began, ended = threading.Event(), threading.Event()

        def interrupt(began: threading.Event = began, ended: threading.Event = ended) -> None:
            while not ended.is_set():
                warehouse.interrupt()
                began.set()

        warehouse.begin()
        run("INSERT INTO t SELECT ?, md5(j::varchar) FROM range(20000) r(j)", [i])
        thread = threading.Thread(target=interrupt)
        thread.start()
        began.wait()
        try:
            warehouse.commit()
        finally:
            ended.set()
            thread.join()
    assert run("SELECT count(*) FROM t").fetchall() == [(600_000,)]
    warehouse.release()


@ONLY_18
def test_what_duckdb_refuses_is_trouble_of_one_table(database: Database, lake: Lake) -> None:
    """L5: somebody has meddled with a table in the warehouse; it is put aside with the reason, and the others go on."""
    database.execute("CREATE TABLE t (id int PRIMARY KEY, v int); CREATE TABLE k (v int)")
    once(database, lake)
    with duckdb.connect(str(lake.warehouse)) as meddler:
        meddler.execute("ALTER TABLE public.t DROP COLUMN v")
    database.execute("INSERT INTO t VALUES (1, 1); INSERT INTO k VALUES (1)")
    assert "warning: table public.t is not mirrored" in once(database, lake, status=3)
    assert differences(database, lake, "public.k", []) == ""
    ((state, reason),) = warehouse_rows(lake, "SELECT state, reason FROM _cdc.tables WHERE table_name = 't'")
    assert state == "error"
    assert "Binder Error" in reason
    assert run_cdc(lake, database.dsn, "resync", "public.t").returncode == 0
    database.execute("INSERT INTO t VALUES (2, 2)")
    once(database, lake)
    assert differences(database, lake, "public.t", ["id"]) == ""
    remains(database, lake).check_clean()


@ONLY_18
def test_a_resync_mends_a_table_that_cannot_be_followed_meanwhile(database: Database, lake: Lake) -> None:
    """K10: while the new copy is made, a change that does not fit the old content is kept for the new one."""
    database.execute(
        "CREATE TABLE t (id int PRIMARY KEY, n int, v text); ALTER TABLE t ALTER v SET STORAGE EXTERNAL;"
        "INSERT INTO t SELECT i, 0, repeat('x', 3000) FROM generate_series(1, 10) i;"
        "INSERT INTO t SELECT i, 0, 'x' FROM generate_series(11, 20000) i"
    )
    once(database, lake)
    with duckdb.connect(str(lake.warehouse)) as meddler:
        meddler.execute("DELETE FROM public.t WHERE id = 1")
    assert run_cdc(lake, database.dsn, "resync", "public.t").returncode == 0
    with Consumer(lake, database.dsn, flush_interval="20ms", flush_rows="100") as consumer:
        until(lambda: list(lake.history.rglob("*.tmp")), what="copied rows")
        # The copy has its snapshot. What is unchanged in row 1 has to be looked up, and is not there.
        database.execute("UPDATE t SET n = 1 WHERE id = 1")
        database.execute("UPDATE t SET n = 2 WHERE id = 2")
        until(lambda: "copied" in consumer.output)
        assert consumer.stop() == 0
    told = consumer.output
    assert 0 < told.find("are not in the warehouse") < told.find("copied"), (
        "the change was no trouble, or came too late"
    )
    once(database, lake)
    assert differences(database, lake, "public.t", ["id"]) == ""
