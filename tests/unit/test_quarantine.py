"""What is kept of values that do not fit, as tables and columns change."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from cdc.sink import quarantine
from cdc.sink.checkpoint import Ledger
from cdc.sink.stored import StoredColumn, Table
from cdc.sink.warehouse import Warehouse

TABLE = Table(7, "main", "t", "streaming", copy_lsn=10)
A, B = StoredColumn("a", 25, -1, 1), StoredColumn("b", 25, -1, 2)


@pytest.fixture(autouse=True)
def _quarantine(ledger: Ledger) -> None:
    """There is one."""
    assert ledger.tables == {}


def kept(warehouse: Warehouse) -> list[tuple[Any, ...]]:
    return warehouse.execute("SELECT column_name, key, value FROM _cdc.quarantine ORDER BY lsn, seq, attnum")


def test_columns_that_swap_their_names(warehouse: Warehouse) -> None:
    """H3: what is held has the new names, in the keys of what rows still hold, too; what a copy brings has them."""
    warehouse.execute("CREATE TABLE main.t (a VARCHAR, b VARCHAR)")
    warehouse.execute("INSERT INTO main.t VALUES ('1', 'x\"'), ('2', 'y')")
    keys = ['{"b": "1", "a": "x\\""}', '{"b": "2", "a": "y"}']
    quarantine.keep(warehouse, TABLE, B, [(keys[0], "v", 10, 1, True), (keys[1], "w", 11, 2, False)])
    quarantine.keep(warehouse, TABLE, B, [(keys[0], "v", 0, 3, False)])
    quarantine.rename_columns(warehouse, TABLE, {2: "a", 1: "b"})
    before, now = [("b", "t.a"), ("a", "t.b")], [("a", "t.a"), ("b", "t.b")]
    for _ in range(2):  # a resync that goes on meanwhile comes by a second time
        quarantine.rekey(warehouse, TABLE, "main.t", before, now)
    assert kept(warehouse) == [("b", keys[0], "v"), ("a", '{"a": "1", "b": "x\\""}', "v"), ("a", keys[1], "w")]


def test_who_is_deleted_has_no_key(warehouse: Warehouse) -> None:
    """L1: of two rows with one key, of which one was deleted, the other one holds the value."""
    warehouse.execute("CREATE TABLE main.t (a VARCHAR, b VARCHAR, _deleted_at TIMESTAMPTZ)")
    warehouse.execute("INSERT INTO main.t VALUES ('2', 'x', now()), ('1', 'x', NULL), ('3', 'x', now())")
    soft = dataclasses.replace(TABLE, deletes="soft")
    quarantine.keep(warehouse, soft, B, [('{"b": "x"}', "v", 10, 1, True)])
    quarantine.rekey(warehouse, soft, "main.t", [("b", "t.b")], [("a", "t.a")])
    assert kept(warehouse) == [("b", '{"a": "1"}', "v")]


def test_values_whose_row_cannot_be_told(warehouse: Warehouse) -> None:
    """C11: the old key does not lead to the new one."""
    warehouse.execute("CREATE TABLE main.t (a VARCHAR, b VARCHAR)")
    warehouse.execute("INSERT INTO main.t VALUES ('1', 'x'), (NULL, 'y')")
    label = [("a", "t.a")]
    quarantine.keep(warehouse, TABLE, B, [('{"a": "1"}', "v", 10, 1, True)])
    assert not quarantine.is_lost(warehouse, TABLE, "main.t", label)
    assert quarantine.is_lost(warehouse, TABLE, "main.t", [])
    quarantine.keep(warehouse, TABLE, B, [(None, "v", 10, 2, True), ('{"b": "y"}', "v", 10, 3, True)])
    assert quarantine.is_lost(warehouse, TABLE, "main.t", label)


def test_hidden_columns(warehouse: Warehouse) -> None:
    """Of those that are masked or excluded nothing is left, neither as a value nor in a key; the copy's own stays."""
    for column in (A, B):
        entries = [('{"a": "1"}', "v", 5, 1, False), ('{"b": "1"}', "v", 0, 2, False), ('{"b": "1"}', "v", 6, 3, True)]
        quarantine.keep(warehouse, TABLE, column, entries)
    quarantine.hide_columns(warehouse, TABLE, [1])
    key = '{"b": "1"}'
    assert kept(warehouse) == [("a", key, "v"), ("b", key, "v"), ("b", None, "v"), ("b", key, "v")]
