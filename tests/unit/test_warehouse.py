"""The DuckDB file: held and let go, interrupted, named."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import duckdb
import pytest

from cdc.errors import StateError, WarehouseBusy
from cdc.sink.warehouse import ConsumerLock, Warehouse, open_file, quote


def test_an_interruption_between_two_statements_is_not_forgotten(warehouse: Warehouse) -> None:
    """J21: DuckDB forgets an interruption when no statement runs; the work that goes on must end all the same."""
    warehouse.begin()
    warehouse.execute("CREATE TABLE t AS SELECT 1 AS i")
    warehouse.interrupt()
    with pytest.raises(duckdb.InterruptException):
        warehouse.execute("INSERT INTO t VALUES (2)")
    with pytest.raises(duckdb.InterruptException):
        warehouse.arrow("SELECT 1 AS i")
    warehouse.rollback()
    warehouse.release()
    with duckdb.connect(str(warehouse.path), read_only=True) as reader:
        assert reader.execute("SELECT count(*) FROM duckdb_tables()").fetchall() == [(0,)]


@pytest.mark.parametrize("log", [False, True], ids=["at rest", "being written"])
def test_what_is_written_while_the_file_is_opened_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: bool
) -> None:
    """DuckDB reads the headers before it locks the file: the state that it goes on from may be gone by then."""
    path, past = tmp_path / "w.duckdb", tmp_path / "past.duckdb"
    with duckdb.connect(str(path)) as writer:
        writer.execute("CREATE TABLE t AS SELECT 1 AS i")
    if log:
        path.with_name("w.duckdb.wal").touch()
    connect, opened = duckdb.connect, []

    def late(file: str, **options: Any) -> duckdb.DuckDBPyConnection:
        opened.append(file)
        if len(opened) > 1:
            return connect(file, **options)
        shutil.copy(path, past)
        with connect(file) as writer:
            writer.execute("INSERT INTO t VALUES (2)")
        return connect(str(past), **options)

    monkeypatch.setattr("cdc.sink.warehouse.duckdb.connect", late)
    with open_file(path, read_only=True) as reader:
        assert reader.execute("FROM t").fetchall() == [(1,), (2,)]
    assert opened == [str(path)] * 2


def test_what_was_begun_goes_with_its_release(warehouse: Warehouse) -> None:
    """J7: closing the file leaves nothing of an open transaction."""
    warehouse.begin()
    warehouse.execute("CREATE TABLE t AS SELECT 1 AS i")
    warehouse.release()
    warehouse.acquire()
    assert not warehouse.in_transaction
    assert warehouse.execute("SELECT count(*) FROM duckdb_tables()") == [(0,)]


def test_giving_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """L5: as long as somebody else holds the file it is tried again, until the caller has had enough."""

    def held(*_arguments: object, **_options: object) -> None:
        raise duckdb.IOException("IO Error: Could not set lock on file: Conflicting lock is held in x (PID 77).")

    path = tmp_path / "w.duckdb"
    duckdb.connect(str(path)).close()
    monkeypatch.setattr(duckdb, "connect", held)
    told: list[int | None] = []
    with pytest.raises(WarehouseBusy) as raised:
        Warehouse(path, 100_000_000, 1).acquire(lambda busy, _s: told.append(busy.pid), lambda: len(told) >= 3)
    assert told == [77, 77, 77]
    assert "process 77" in str(raised.value)


def test_one_consumer(tmp_path: Path) -> None:
    """J10: the lock goes to the first; the next one has it when that is gone."""
    first, second = ConsumerLock(tmp_path / "w.duckdb"), ConsumerLock(tmp_path / "w.duckdb")
    first.acquire()
    with pytest.raises(StateError, match="already has a consumer"):
        second.acquire()
    first.release()
    second.acquire()
    second.release()


def test_names(warehouse: Warehouse) -> None:
    """B1: quotes are doubled; a schema called like a database is still a schema."""
    assert quote('a"b', "c.d") == '"a""b"."c.d"'
    warehouse.execute(f"CREATE SCHEMA {warehouse.name('temp')}")
    warehouse.execute(f"CREATE TABLE {warehouse.name('temp', 't')} (i INTEGER)")
    assert warehouse.execute(f"SELECT count(*) FROM {warehouse.name('temp', 't')}") == [(0,)]
