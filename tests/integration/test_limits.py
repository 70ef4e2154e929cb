"""What does not fit: unchanged values beyond the memory, tombstones of another type, a disk that is full."""

from __future__ import annotations

import resource
import subprocess
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest

from cdc.errors import SinkError
from cdc.sink.history import History
from cdc.sink.holding import Holding
from cdc.sink.sink import Sink
from cdc.sink.stored import Checkpoint
from cdc.sink.warehouse import Warehouse
from tests.conftest import Database, Lake
from tests.integration.steps import agree, quarantine, sync, table_state
from tests.mirror import mirror_once, run_cdc, states, warehouse_rows
from tests.program import PROGRAM

pg18 = pytest.mark.parametrize("server", [18], indirect=True, ids=["pg18"])


@pg18
@pytest.mark.slow
def test_unchanged_values_beyond_the_memory(database: Database, lake: Lake) -> None:
    """D1, C17: one flag of each row, and 600 MB of text beside it that has to be looked up, with 300 MB for DuckDB."""
    rows, size = 6000, 100_000
    database.execute(
        "CREATE TABLE t (id int PRIMARY KEY, seen bool NOT NULL, body text);"
        "ALTER TABLE t ALTER body SET STORAGE EXTERNAL;"
        f"INSERT INTO t SELECT i, false, repeat(md5(i::text), {size // 32}) FROM generate_series(1, {rows}) AS i"
    )
    settings = {"memory": "300MB", "history": ""}
    done = run_cdc(lake, database.dsn, "run", "--once", **settings)
    assert done.returncode == 0, done.stderr
    before = database.execute("SELECT pg_current_wal_lsn()")
    database.execute("UPDATE t SET seen = true")
    ((written,),) = database.execute("SELECT (pg_current_wal_lsn() - %s::pg_lsn)::int8", list(before[0]))
    assert written < rows * size / 20, "the texts themselves were written once more"
    done = run_cdc(lake, database.dsn, "run", "--once", **settings)
    assert done.returncode == 0, done.stderr
    assert states(lake) == {"public.t": "streaming"}
    want = database.execute("SELECT count(*), count(*) FILTER (WHERE seen), sum(length(body))::int8 FROM t")
    assert (
        warehouse_rows(lake, "SELECT count(*), count(*) FILTER (WHERE seen), sum(length(body))::BIGINT FROM public.t")
        == want
    )
    wrong = f"SELECT count(*) FROM public.t WHERE body IS DISTINCT FROM repeat(md5(id::VARCHAR), {size // 32})"
    assert warehouse_rows(lake, wrong) == [(0,)]


@pytest.mark.parametrize("key", ["id", ""], ids=["keyed", "keyless"])
def test_tombstone_that_the_new_type_cannot_hold(database: Database, lake: Lake, key: str) -> None:
    """H5, L1: the deleted row was never cast by Postgres; it stays, with NULL, and its text is in the quarantine."""
    identity = "ADD PRIMARY KEY (id)" if key else "REPLICA IDENTITY FULL"
    database.execute(
        f"CREATE TABLE t (id int, v text); ALTER TABLE t {identity};INSERT INTO t VALUES (1, 'abc'), (2, '2'), (3, '3')"
    )
    sync(database, lake, deletes="soft")
    database.execute("DELETE FROM t WHERE id = 1; DELETE FROM t WHERE id = 2")
    sync(database, lake, deletes="soft")
    dead = "SELECT id, v FROM public.t WHERE _deleted_at IS NOT NULL ORDER BY id"
    assert warehouse_rows(lake, dead) == [(1, "abc"), (2, "2")]
    stamps = "SELECT id, _deleted_at::VARCHAR FROM public.t WHERE _deleted_at IS NOT NULL ORDER BY id"
    before = warehouse_rows(lake, stamps)
    database.execute("ALTER TABLE t ALTER v TYPE int USING v::int")
    database.execute("INSERT INTO t VALUES (4, 4)")
    sync(database, lake, deletes="soft")
    assert table_state(lake, "public.t") == ("streaming", "")
    assert warehouse_rows(lake, dead) == [(1, None), (2, 2)]
    assert warehouse_rows(lake, stamps) == before
    assert warehouse_rows(lake, "SELECT id, v FROM public.t WHERE _deleted_at IS NULL ORDER BY id") == [(3, 3), (4, 4)]
    label = '{"id": "1"}' if key else None
    assert quarantine(lake, "public.t") == [("v", label, "abc", False)]  # as of any row that is deleted
    if key:
        database.execute("INSERT INTO t VALUES (1, 11)")
        sync(database, lake, deletes="soft")
        assert quarantine(lake, "public.t") == [("v", label, "abc", False)]
        assert warehouse_rows(lake, "SELECT id, v FROM public.t WHERE _deleted_at IS NULL ORDER BY id") == [
            *((1, 11), (3, 3), (4, 4))
        ]


def limited(lake: Lake, dsn: str, file_bytes: int) -> subprocess.CompletedProcess[str]:
    """Run `cdc run --once`, as `run_cdc` does, with no room for files larger than that."""
    return subprocess.run(
        [*PROGRAM, "run", "--once"],
        env=lake.environment(dsn, history=""),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=lake.root,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, resource.RLIM_INFINITY)),
    )


@pg18
def test_no_room_in_the_middle_of_a_commit(database: Database, lake: Lake) -> None:
    """L5: one line of error, one of hint; nothing is confirmed, and the next start goes on from there."""
    database.execute("CREATE TABLE t (id int PRIMARY KEY, v text)")
    mirror_once(lake, database.dsn, history="")
    room = lake.warehouse.stat().st_size + 300_000
    database.execute("INSERT INTO t SELECT i, repeat(md5(i::text), 3) FROM generate_series(1, 30000) AS i")
    failed = limited(lake, database.dsn, room)
    assert failed.returncode == 1, failed.stderr
    assert "Traceback" not in failed.stderr
    assert failed.stderr.count("error: ") == 1
    assert failed.stderr.count("hint: free some space") == 1
    mirror_once(lake, database.dsn, history="")
    agree(database, lake, {"public.t": None})


class _Broken:
    """A connection whose COMMIT fails for good, as when DuckDB cannot write its checkpoint."""

    def __init__(self, real: duckdb.DuckDBPyConnection) -> None:
        self._real = real
        self._failed = False

    def execute(self, statement: str, *parameters: object) -> duckdb.DuckDBPyConnection:
        if self._failed:
            raise duckdb.FatalException("FATAL Error: the database has been invalidated\nrestart it")
        if statement == "COMMIT":
            self._real.execute("ROLLBACK")
            self._failed = True
            raise duckdb.FatalException("FATAL Error: Failed to commit: No space left on device\nmore of it")
        return self._real.execute(statement, *parameters)

    def close(self) -> None:
        self._real.close()


def test_warehouse_that_fails_for_good(tmp_path: Path) -> None:
    """L5: after a FatalException DuckDB refuses every statement, a ROLLBACK too: the first error is what is told."""
    history = History(tmp_path / "history")
    sink = Sink(
        warehouse := Warehouse(tmp_path / "w.duckdb", 100_000_000, 1),
        history,
        deletes="hard",
        live=lambda _oid: None,
        waiting=lambda _busy, _waited_s: None,
        give_up=lambda: False,
        holding=Holding({}, {}, lambda _oid: None, logged=True, limit=10),
    )
    sink.open()
    sink.create(Checkpoint("1", "d", "cdc", "cdc", 1))
    real = warehouse.connection
    warehouse._connection = _Broken(real)  # type: ignore[assignment]
    history.write("public", "t", pa.table({"_lsn": pa.array([1], pa.uint64()), "_seq": [1]}))
    with pytest.raises(SinkError, match="No space left") as raised:
        sink.commit(2, None)
    assert "the warehouse cannot be written" in str(raised.value)
    assert "free some space" in raised.value.hint
    assert "\n" not in str(raised.value)
    assert not warehouse.held, "the file has to be opened again"
    # DuckDB says the same when the commit has happened, and the checkpoint behind it has failed.
    assert [path.suffix for path in (tmp_path / "history").rglob("*") if path.is_file()] == [".tmp"]
    sink.acquire()
    assert warehouse.execute("SELECT lsn FROM _cdc.checkpoint") == [(1,)]
    warehouse.release()
    history.close()
