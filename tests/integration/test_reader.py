"""Questions to a warehouse that is held: the consumer answers them over its socket."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import duckdb
import pytest

from cdc.sink.answers import CLIENTS, Answers
from cdc.sink.apply import apply
from cdc.sink.reader import socket_paths
from cdc.sink.warehouse import Warehouse
from tests.conftest import Database, Lake
from tests.integration.refusals import refused
from tests.mirror import Consumer, mirror_once, run_cdc, until
from tests.program import PROGRAM, forked, run

ENDLESS = "SELECT sum(a.i * b.i) FROM range(1000000000) AS a(i), range(1000000000) AS b(i)"

pg18 = pytest.mark.parametrize("server", [18], indirect=True, ids=["pg18"])


def answering(folder: Path) -> tuple[Warehouse, Answers]:
    """Return a warehouse that is held, and who answers questions to it."""
    warehouse = Warehouse(folder / "w.duckdb", 200_000_000, 2)
    warehouse.acquire()
    answers = Answers(warehouse)
    answers.start()
    return warehouse, answers


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Warehouse]:
    """A warehouse that is held and answers, with a committed row in t and another that is not."""
    warehouse, answers = answering(tmp_path)
    warehouse.execute("CREATE TABLE t AS SELECT 1 AS i, 2.50::DECIMAL(5,2) AS d, 0.1::DOUBLE AS f, NULL::INTEGER AS n")
    warehouse.begin()
    warehouse.execute("INSERT INTO t VALUES (2, 0, 0, 0)")
    yield warehouse
    answers.stop()
    warehouse.release()
    assert not warehouse.held
    assert not any(path.exists() for path in socket_paths(warehouse.path))


def next_batch(held: Warehouse) -> None:
    """Do as a consumer does between two batches: who holds the file for 10 s without a break lets nobody new in."""
    held.rollback()
    held.release()
    held.acquire()
    held.begin()
    held.execute("INSERT INTO t VALUES (2, 0, 0, 0)")


def query(warehouse: Path, sql: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Ask as a user does, in a process of its own."""
    command = ["query", "--warehouse", str(warehouse), *options, sql]
    return run(forked, command, env=os.environ, cwd=warehouse.parent, timeout_s=60)


def test_what_is_committed_is_answered(held: Warehouse) -> None:
    """L4: names that come twice, exact values, and nothing of the transaction that is open."""
    done = query(held.path, "SELECT i, d, f, n, i FROM t", "--format", "json")
    assert json.loads(done.stdout) == [{"i": 1, "d": "2.50", "f": 0.1, "n": None, "i_1": 1}]
    next_batch(held)
    assert query(held.path, "FROM t WHERE i > 5", "--format", "csv").stdout == "i,d,f,n\n"
    assert held.in_transaction
    next_batch(held)
    held.commit()
    assert query(held.path, "SELECT count(*) FROM t", "--format", "csv").stdout == "count_star()\n2\n"


def test_many_rows_are_answered(held: Warehouse) -> None:
    """They go through batch by batch."""
    done = query(held.path, "SELECT i FROM range(300000) AS r(i)", "--format", "csv")
    assert done.stdout.split() == ["i", *map(str, range(300000))]


@pytest.mark.parametrize("running", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["held", "free"])
@pytest.mark.parametrize(
    "sql",
    [
        "DELETE FROM t",
        "SELECT 1; DELETE FROM t",
        "COMMIT; DELETE FROM t",
        "SET memory_limit = '1MB'",
        "CHECKPOINT",
        "EXPLAIN ANALYZE DELETE FROM t",
        "",
    ],
)
def test_nothing_but_a_query_is_answered(held: Warehouse, sql: str, running: bool) -> None:
    """The same whoever answers."""
    held.rollback()
    if not running:
        held.release()
    error, _ = refused(query(held.path, sql))
    assert error.startswith("one query is answered")
    held.acquire()
    assert held.execute("SELECT i FROM t") == [(1,)]


def test_queries_that_fail(held: Warehouse) -> None:
    """At once, and after many rows; the next one is answered."""
    error, hint = refused(query(held.path, "SELECT nothing FROM t"))
    assert error.startswith("the query failed: Binder Error")
    assert hint == "tables are named as in Postgres"
    for rows in (300_000, 6_000_000):
        late = f"SELECT CAST(CASE WHEN i = {rows // 2} THEN 'x' ELSE '1' END AS INTEGER) FROM range({rows}) AS r(i)"
        next_batch(held)
        refused(query(held.path, late))
    next_batch(held)
    error, _ = refused(query(held.path, "WITH d AS (DELETE FROM t RETURNING *) SELECT * FROM d"))
    assert error.startswith("the query failed: ")
    next_batch(held)
    assert query(held.path, "SELECT i FROM t", "--format", "csv").stdout == "i\n1\n"


def test_the_file_stays_as_long_as_somebody_asks(held: Warehouse) -> None:
    """A client that is there keeps the file open; one that says nothing does so until it leaves."""
    held.rollback()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(next(path for path in socket_paths(held.path) if path.exists())))
        assert client.recv(1) == b"R"
        held.release()
        assert held.held
        held.begin()
        held.execute("INSERT INTO t VALUES (3, 0, 0, 0)")
        held.commit()

    def free() -> bool:
        held.release()
        return not held.held

    until(free, 10)
    assert query(held.path, "SELECT max(i) FROM t", "--format", "csv").stdout == "max(i)\n3\n"


def test_the_database_file_is_not_read_by_sql(held: Warehouse) -> None:
    """To close it would drop the consumer's lock: who asks for that, or for any file, waits until it is free."""
    held.rollback()
    other = held.path.with_name("numbers.parquet")
    held.execute(f"COPY (SELECT 7 AS n) TO '{other}'")
    for sql, answer in (
        (f"SELECT count(*) AS n FROM read_blob('{held.path}')", ""),
        (f"SELECT n FROM '{other}'", "n\n7\n"),
        (f"WITH a AS (SELECT (SELECT max(n) FROM read_parquet('{other}')) AS n) FROM a", "n\n7\n"),
    ):
        held.acquire()
        done: list[subprocess.CompletedProcess[str]] = []
        client = threading.Thread(
            target=lambda sql=sql, done=done: done.append(query(held.path, sql, "--format", "csv"))
        )
        client.start()
        client.join(2.5)
        assert client.is_alive(), "it was answered while the file is held"
        opens = "import duckdb, sys; duckdb.connect(sys.argv[1], read_only=True)"
        locked = subprocess.run([sys.executable, "-c", opens, str(held.path)], capture_output=True, check=False)
        assert b"Could not set lock" in locked.stderr
        held.release()
        client.join(30)
        assert done[0].stdout == answer or not answer
    held.acquire()


def test_a_table_with_a_name_of_ours(held: Warehouse) -> None:
    """Names in a question are those of the database, and of nothing in this program."""
    held.rollback()
    held.execute("CREATE TABLE r AS SELECT 5 AS only; CREATE TABLE main.rows AS SELECT 6 AS n")
    assert query(held.path, "SELECT i, d FROM t", "--format", "csv").stdout == "i,d\n1,2.50\n"
    assert query(held.path, "FROM r", "--format", "csv").stdout == "only\n5\n"
    held.release()
    error, _ = refused(query(held.path, "FROM names"))
    assert "names" in error
    held.acquire()


def test_a_client_that_goes_away(held: Warehouse) -> None:
    """Its query is broken off, so that the file can be let go of."""
    held.rollback()
    command = [*PROGRAM, "query", "--warehouse", str(held.path), ENDLESS]
    client = subprocess.Popen(command, cwd=held.path.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: held._guests, 20)
    time.sleep(0.5)
    client.kill()
    client.wait()
    until(lambda: not held._guests, 10, "the query to be broken off")


@pytest.mark.slow
def test_more_clients_than_places(held: Warehouse) -> None:
    """Who finds no place tries again; the silent ones are sent away."""
    held.rollback()
    path = str(next(path for path in socket_paths(held.path) if path.exists()))
    silent = []
    for _ in range(CLIENTS + 40):
        client = socket.socket(socket.AF_UNIX)
        client.connect(path)
        silent.append(client)
    until(lambda: len(held._guests) == CLIENTS, 10)
    until(lambda: not held._guests, 20, "the silent ones to be sent away")
    held.release()  # as the consumer does
    held.acquire()
    assert query(held.path, "SELECT i FROM t", "--format", "csv").stdout == "i\n1\n"
    for client in silent:
        client.close()


def end_amid(folder: Path, sql: str, patience_s: float) -> list[subprocess.CompletedProcess[str]]:
    """Let go of a warehouse in the middle of a query; return what its client has come to within `patience_s`."""
    warehouse, answers = answering(folder)
    done: list[subprocess.CompletedProcess[str]] = []
    client = threading.Thread(target=lambda: done.append(query(warehouse.path, sql)))
    client.start()
    until(lambda: warehouse._guests, 20)
    time.sleep(0.5)
    answers.stop()
    warehouse.release()
    assert not warehouse.held
    client.join(patience_s)
    return done


@pytest.mark.slow
def test_an_end_while_nothing_can_break_a_query_off(tmp_path: Path) -> None:
    """J21: everything is closed all the same."""
    end_amid(tmp_path, "SELECT levenshtein(repeat('ab', 60000), repeat('cd', 60000))", 60)


def test_an_end_in_the_middle_of_a_query(tmp_path: Path) -> None:
    """J21: a consumer that is told to stop breaks the query off; its client is told so."""
    refused(end_amid(tmp_path, ENDLESS, 30)[0])


def test_a_folder_whose_name_is_too_long_for_a_socket(tmp_path: Path) -> None:
    """The address of a socket has room for about a hundred bytes."""
    folder = tmp_path / ("long" * 25)
    warehouse, answers = answering(folder)
    try:
        assert query(warehouse.path, "SELECT 7", "--format", "csv").stdout == "7\n7\n"
    finally:
        answers.stop()
        warehouse.release()


def test_a_socket_of_somebody_who_was_killed(held: Warehouse) -> None:
    """Its file is still there: the next consumer takes its place, and until then a question waits for the file."""
    held.rollback()
    path = held.path.with_name("other.duckdb")
    program = (
        "import sys; from pathlib import Path; from cdc.sink.warehouse import Warehouse; import os, signal\n"
        "from cdc.sink.answers import CLIENTS, Answers\n"
        "w = Warehouse(Path(sys.argv[1]), 200_000_000, 1); w.acquire(); Answers(w).start()\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", program, str(path)], check=False, timeout=30)
    assert any(each.exists() for each in socket_paths(path))
    assert query(path, "SELECT 7", "--format", "csv").stdout == "7\n7\n"
    warehouse = Warehouse(path, 200_000_000, 1)
    warehouse.acquire()
    answers = Answers(warehouse)
    answers.start()
    assert query(path, "SELECT 8", "--format", "csv").stdout == "8\n8\n"
    answers.stop()
    warehouse.release()


@pg18
@pytest.mark.slow
def test_answers_under_backlog(database: Database, lake: Lake) -> None:
    """`query` and `status` while the consumer has thousands of batches before it, and holds the file."""
    rows = 4000
    database.execute("CREATE TABLE t (id int PRIMARY KEY)")
    mirror_once(lake, database.dsn)
    database.execute(f"DO 'BEGIN FOR i IN 1..{rows} LOOP INSERT INTO t VALUES (i); COMMIT; END LOOP; END'")
    counts: list[int] = []
    locked = 0
    with Consumer(lake, database.dsn, flush_rows="1") as consumer:
        until(lambda: "streaming" in consumer.output)
        for _ in range(4):
            try:
                duckdb.connect(str(lake.warehouse), read_only=True).close()
            except duckdb.IOException:
                locked += 1
            done = run_cdc(lake, database.dsn, "query", "--format", "csv", "SELECT count(*) FROM public.t")
            assert done.returncode == 0, done.stderr
            counts.append(int(done.stdout.split()[-1]))
            done = run_cdc(lake, database.dsn, "status", "--json")
            assert done.returncode == 0, done.stderr
            (table,) = json.loads(done.stdout)["tables"]
            counts.append(table["rows"])
        assert consumer.running
        consumer.kill()
    assert counts == sorted(counts)
    assert 0 < counts[-1] < rows
    assert locked >= 2, "the file was free most of the time"


@pg18
def test_the_stream_goes_before_queries(database: Database, lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    """They share CDC_MEMORY: where it does not do for both, the batch comes again without them, and nothing is lost."""
    database.execute("CREATE TABLE t (id int PRIMARY KEY)")
    mirror_once(lake, database.dsn)
    database.execute("INSERT INTO t VALUES (1), (2)")
    real: Callable[..., None] = apply
    lent: list[Any] = []
    with ExitStack() as stack:

        def crowded(warehouse: Warehouse, *rest: Any, **named: Any) -> None:
            if not lent:
                lent.append(stack.enter_context(warehouse.guest()))
                real(warehouse, *rest, **named)
                raise duckdb.OutOfMemoryException("failed to allocate data")
            real(warehouse, *rest, **named)

        monkeypatch.setattr("cdc.sink.sink.apply", crowded)
        said = mirror_once(lake, database.dsn)
        with pytest.raises(duckdb.Error):
            lent[0].execute("SELECT 1")
    assert "queries were broken off" in said
    connection = duckdb.connect(str(lake.warehouse), read_only=True)
    assert connection.execute("SELECT id FROM public.t ORDER BY 1").fetchall() == [(1,), (2,)]
    connection.close()
    database.execute("INSERT INTO t VALUES (3)")
    monkeypatch.setattr("cdc.sink.sink.apply", _short_of_memory)
    with pytest.raises(Exception, match="cannot be written"):
        mirror_once(lake, database.dsn)


def _short_of_memory(*_: Any, **__: Any) -> None:
    raise duckdb.OutOfMemoryException("failed to allocate data")
