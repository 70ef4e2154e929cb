"""Schema _cdc: what must survive a restart does, within the transaction of its caller and not otherwise."""

from __future__ import annotations

import dataclasses
import json

import pytest

from cdc.errors import SinkError, StateError
from cdc.pgoutput.types import Basis
from cdc.sink.checkpoint import Ledger
from cdc.sink.history import HistoryFile
from cdc.sink.layout import FORMAT
from cdc.sink.stored import Checkpoint, SchemaChange, StoredColumn, Table
from cdc.sink.warehouse import Warehouse
from tests.unit.conftest import INTENT

COLUMNS = (
    StoredColumn("id", 23, -1, 1),
    StoredColumn('we"ird\n', 1700, 655366, 4),
    StoredColumn("ID", 16400, 7, 5, "hash", "ID_5", Basis(1007, -1)),
)
TABLE = Table(
    4294967295,
    "public",
    "o'rders",
    "streaming",
    "",
    "1:2:0",
    2**63 + 1,
    COLUMNS,
    5,
    '{"1": "a"}',
    "soft",
    "cdc,cdc_append",
    "orders_1",
    (4, 5),
)


def reopened(warehouse: Warehouse) -> Ledger:
    """Return what a process that starts now finds."""
    warehouse.release()
    warehouse.acquire()
    found = Ledger(warehouse)
    found.load()
    return found


def test_a_file_without_us(warehouse: Warehouse) -> None:
    warehouse.execute("CREATE SCHEMA _cdc")
    warehouse.execute("CREATE TABLE theirs (i INTEGER)")
    found = reopened(warehouse)
    assert (found.checkpoint, found.tables) == (None, {})


def test_everything_comes_back(warehouse: Warehouse, ledger: Ledger) -> None:
    """Positions beyond 2**63 and any name included."""
    warehouse.begin()
    ledger.put(TABLE)
    ledger.put(Table(2, "public", "new", "pending"))
    ledger.advance(2**64 - 2, 1_709_210_096_789_000, 1_709_210_096_789_000)
    warehouse.commit()
    found = reopened(warehouse)
    assert found.checkpoint == Checkpoint("7300000000000000001", "shop", "cdc", "cdc", 2**64 - 2)
    assert found.tables == {TABLE.oid: TABLE, 2: Table(2, "public", "new", "pending")} == ledger.tables


def test_what_is_not_committed_is_gone(warehouse: Warehouse, ledger: Ledger) -> None:
    """L6: the ledger is part of its caller's transaction; after a rollback it is loaded again."""
    warehouse.begin()
    ledger.put(TABLE)
    ledger.advance(10, None, None)
    ledger.record_files([HistoryFile("p", "s", "t", 1, 1, 1)])
    warehouse.rollback()
    ledger.load()
    assert (ledger.checkpoint, ledger.tables) == (INTENT, {})
    assert ledger.known_files(["p"]) == set()
    ledger.advance(11, None, None)
    assert ledger.checkpoint is not None
    assert ledger.checkpoint.lsn == 11


def test_the_checkpoint_is_the_one_we_know(warehouse: Warehouse, ledger: Ledger) -> None:
    """Design, Exactly once: it moves from the position we know, in exactly one row, or not at all."""
    ledger.advance(10, None, None)
    for meddling in (
        "UPDATE _cdc.checkpoint SET lsn = 12",
        "UPDATE _cdc.checkpoint SET lsn = NULL",
        "DELETE FROM _cdc.checkpoint",
        "INSERT INTO _cdc.checkpoint SELECT * FROM _cdc.checkpoint",
    ):
        warehouse.begin()
        warehouse.execute(meddling)
        with pytest.raises(StateError, match="no longer 0/A"):
            ledger.advance(11, None, None)
        warehouse.rollback()
        ledger.load()
    ledger.advance(11, None, None)
    assert warehouse.execute("SELECT lsn FROM _cdc.checkpoint") == [(11,)]


def test_freshness(warehouse: Warehouse, ledger: Ledger) -> None:
    """Design, The warehouse: as_of never goes back; a position without a commit keeps the commit's time."""
    for lsn, commit_ts, as_of in ((10, 2_000_000, 2_000_000), (11, None, 5_000_000), (12, 3_000_000, 3_000_000)):
        ledger.advance(lsn, commit_ts, as_of)
    query = (
        "SELECT epoch(c.commit_ts), epoch(f.as_of), f.age > INTERVAL 1 YEAR FROM _cdc.checkpoint c, _cdc.freshness f"
    )
    assert warehouse.execute(query) == [(3.0, 5.0, True)]


def test_a_newer_format(warehouse: Warehouse, ledger: Ledger) -> None:
    warehouse.execute("UPDATE _cdc.meta SET format = ?", [FORMAT + 1])
    with pytest.raises(StateError, match="newer cdc") as caught:
        ledger.load()
    assert "upgrade" in caught.value.hint


def test_beginning_anew(warehouse: Warehouse, ledger: Ledger) -> None:
    """Lifecycle: `create` forgets all of before, and the warehouse becomes another one."""
    ledger.put(TABLE)
    ledger.append_buffer(TABLE.oid, 5, True, b"x")
    (before,) = warehouse.execute("SELECT id FROM _cdc.meta")
    other = Checkpoint("1", "other", "s", "p", None)
    ledger.create(other)
    found = reopened(warehouse)
    assert (found.checkpoint, found.tables) == (other, {})
    assert warehouse.execute("SELECT id FROM _cdc.meta") != [before]
    assert warehouse.execute("SELECT count(*) FROM _cdc.buffer") == [(0,)]


def test_forgetting_the_position(warehouse: Warehouse, ledger: Ledger) -> None:
    """J11: a new slot means that what was streaming has to be copied; what is dropped or in error stays so."""
    states = {1: "streaming", 2: "resyncing", 3: "error", 4: "dropped", 5: "pending"}
    for oid, state in states.items():
        ledger.put(Table(oid, "public", f"t{oid}", state))  # type: ignore[arg-type]
    ledger.advance(10, None, None)
    ledger.forget_position()
    found = reopened(warehouse)
    assert found.checkpoint == INTENT
    assert {oid: t.state for oid, t in found.tables.items()} == states | {1: "pending", 2: "pending"}


def test_marks_of_another_process(ledger: Ledger) -> None:
    """`cdc resync` marks tables between two flushes; a mark stays until the consumer has taken it up."""
    ledger.put(TABLE)
    ledger.put(Table(2, "public", "new", "pending"))
    assert ledger.requested() == []
    ledger.request(TABLE.oid)
    ledger.put(dataclasses.replace(TABLE, reason="changed meanwhile"))
    assert ledger.requested() == [TABLE.oid]
    ledger.take_up(TABLE.oid)
    assert ledger.requested() == []


def test_the_buffer(ledger: Ledger) -> None:
    """K1: chunks come back in the order in which they were kept, those of one table, from a position on."""
    for oid, lsn, in_history, rows in (
        (1, 5, False, b"a"),
        (2, 6, False, b"b"),
        (1, 7, True, b"c\0"),
        (1, 7, False, b""),
    ):
        ledger.append_buffer(oid, lsn, in_history, rows)
    assert [ledger.read_buffer(n) for n in ledger.buffered(1, 0)] == [(False, b"a"), (True, b"c\0"), (False, b"")]
    assert [ledger.read_buffer(n) for n in ledger.buffered(1, 6)] == [(True, b"c\0"), (False, b"")]
    first, *_ = ledger.buffered(1, 0)
    ledger.clear_buffer(1)
    assert (ledger.buffered(1, 0), len(ledger.buffered(2, 0))) == ([], 1)
    with pytest.raises(SinkError, match="are gone"):
        ledger.read_buffer(first)


def test_forgetting_a_table(warehouse: Warehouse, ledger: Ledger) -> None:
    ledger.put(TABLE)
    ledger.append_buffer(TABLE.oid, 5, True, b"x")
    ledger.forget(TABLE.oid)
    ledger.forget(12345)
    assert (reopened(warehouse).tables, ledger.tables) == ({}, {})
    assert warehouse.execute("SELECT count(*) FROM _cdc.buffer") == [(0,)]


def test_notes(warehouse: Warehouse, ledger: Ledger) -> None:
    """The manifest, the DDL that was followed, and when a table last changed."""
    ledger.put(TABLE)
    ledger.record_files([HistoryFile("a", "s", "t", 1, 1, 2), HistoryFile("b", "s", "t", 1, 3, 2**64 - 1)])
    assert ledger.known_files(["b", "c"]) == {"b"}
    assert ledger.known_files([]) == set()
    ledger.record_change(TABLE, SchemaChange(7, 2, "column x added"))
    ledger.touch({TABLE.oid: 1_709_210_096_789_000})
    assert warehouse.execute("SELECT table_name, oid, lsn, seq, change FROM _cdc.schema_changes") == [
        ("o'rders", TABLE.oid, 7, 2, "column x added")
    ]
    assert warehouse.execute("SELECT last_change_ts::VARCHAR FROM _cdc.tables") == [("2024-02-29 12:34:56.789+00",)]
    ledger.put(TABLE)
    assert warehouse.execute("SELECT last_change_ts IS NULL FROM _cdc.tables") == [(False,)]


def test_an_older_format_is_upgraded(warehouse: Warehouse, ledger: Ledger) -> None:
    """Format 1 had no links in what it knew of storage: that is unknown. Format 2 held most types as text."""
    warehouse.begin()
    plain = dataclasses.replace(TABLE, columns=(*COLUMNS[:2], StoredColumn("l", 1007, -1, 6)), alias="", widened=())
    ledger.put(plain)
    in_2 = [list(dataclasses.astuple(column)[:5]) for column in plain.columns]
    warehouse.execute("UPDATE _cdc.tables SET columns = ?", [json.dumps(in_2)])
    for statement in (
        "ALTER TABLE _cdc.tables RENAME storage TO relfilenode",
        "UPDATE _cdc.tables SET relfilenode = '1:2'",
        "ALTER TABLE _cdc.tables DROP natts",
        "ALTER TABLE _cdc.tables DROP types",
        "ALTER TABLE _cdc.tables DROP alias",
        "ALTER TABLE _cdc.tables DROP widened",
        "ALTER TABLE _cdc.quarantine DROP oid",
        "ALTER TABLE _cdc.quarantine DROP attnum",
        "INSERT INTO _cdc.quarantine VALUES ('public', 'o''rders', 'id', '{\"id\": \"1\"}', 'NaN', 1, 1, true)",
        *(
            f"ALTER TABLE _cdc.schema_changes DROP {name}"
            for name in ("oid", "seq", "old_name", "new_name", "default_value", "attnum")
        ),
        "UPDATE _cdc.meta SET format = 1",
    ):
        warehouse.execute(statement)
    warehouse.commit()
    again = reopened(warehouse)
    text = dataclasses.replace(plain.columns[2], held_as=Basis(25, -1))
    columns = (*plain.columns[:2], text)
    assert again.tables == {
        TABLE.oid: dataclasses.replace(
            plain,
            storage="",
            natts=0,
            types="{}",
            columns=columns,
            state="resyncing",
            reason="an earlier version has written its quarantine",
        )
    }
    assert warehouse.execute("SELECT oid, attnum, value FROM _cdc.quarantine") == [(TABLE.oid, 1, "NaN")]
    assert warehouse.execute("SELECT format FROM _cdc.meta") == [(FORMAT,)]
    again.put(TABLE)
    again.record_change(TABLE, SchemaChange(7, 2, "column a renamed to b", "a", "b"))
    assert reopened(warehouse).tables == {TABLE.oid: TABLE}
