"""What is kept of values that do not fit, as tables and columns change."""

from __future__ import annotations

from typing import Any

import pytest

from cdc.sink import quarantine
from cdc.sink.checkpoint import Ledger
from cdc.sink.stored import Table
from cdc.sink.warehouse import Warehouse

TABLE = Table(7, "main", "t", "streaming", copy_lsn=10)


@pytest.fixture(autouse=True)
def _quarantine(ledger: Ledger) -> None:
    """There is one."""
    assert ledger.tables == {}


def kept(warehouse: Warehouse) -> list[tuple[Any, ...]]:
    return warehouse.execute("SELECT column_name, key, value FROM _cdc.quarantine ORDER BY lsn, seq")


def test_columns_that_swap_their_names(warehouse: Warehouse) -> None:
    """H3: each entry since the last copy has the new names; what a copy under way has brought had them already."""
    entries = [("a", '{"a": "1", "b": "\\"a"}', "x", lsn, 1, True) for lsn in (0, 9, 10, 11)]
    quarantine.keep(warehouse, TABLE, entries)
    quarantine.rename_columns(warehouse, TABLE, {"a": "b", "b": "a"})
    before, after = ("a", entries[0][1], "x"), ("b", '{"b": "1", "a": "\\"a"}', "x")
    assert kept(warehouse) == [before, before, after, after]


def test_hidden_columns(warehouse: Warehouse) -> None:
    """Of those that are masked or excluded nothing is left, neither as a value nor in a key."""
    keys = ('{"id": "1"}', '{"email": "a@b"}', '{"id": "1", "email": "a@b"}', None)
    entries = [(name, key, "x", 5, seq, False) for seq, key in enumerate(keys) for name in ("v", "email")]
    quarantine.keep(warehouse, TABLE, entries)
    quarantine.forget_others(warehouse, TABLE, ["id", "v"], ["id"])
    assert kept(warehouse) == [("v", key, "x") for key in (keys[0], None, None, None)]
