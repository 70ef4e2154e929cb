"""Soft-deleted rows, carried into a copy: which, and what becomes of their values."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest

from cdc.sink import tombstones
from cdc.sink.checkpoint import Ledger
from cdc.sink.schema import create_table
from cdc.sink.stored import StoredColumn, Table
from cdc.sink.warehouse import Warehouse

BOOL, INT, TEXT, JSON, REAL, DOUBLE, DATE = 16, 23, 25, 114, 700, 701, 1082
TIMESTAMP, NUMERIC, UUID, JSONS, UUIDS, INTS, BYTEA = 1114, 1700, 2950, 199, 2951, 1007, 17
MOOD = 16500
TEN_TWO = (10 << 16 | 2) + 4
ID = StoredColumn("id", INT, -1, 1, is_key=True)
SOME_ID = "0b1c5d2e-1111-4111-8111-111111111111"
THEN = "TIMESTAMPTZ '2026-01-01 00:00:00+00'"
SINCE = "TIMESTAMPTZ '2026-01-02 00:00:00+00'"


def table(*columns: StoredColumn) -> Table:
    return Table(7, "main", "t", "resyncing", columns=columns, deletes="soft", copy_lsn=1)


@pytest.fixture(autouse=True)
def _quarantine(ledger: Ledger) -> None:
    """What does not fit has a place."""
    assert ledger.tables == {}


def carry(
    warehouse: Warehouse, old: Table, rows: Sequence[str], new: Table, copied: Sequence[str] = ()
) -> list[tuple[Any, ...]]:
    """Carry what has to be; return the rows of the copy. `rows`: as VALUES has them, and so are those of `copied`."""
    for target, of, values in (("main.t", old, rows), ("main.c", new, copied)):
        warehouse.execute(create_table(target, of.columns, soft=True))
        for value in values:
            warehouse.execute(f"INSERT INTO {target} VALUES ({value})")
    tombstones.carry(warehouse, old, new, warehouse.name("main", "c"), (5, 6))
    names = ", ".join(column.name for column in new.columns)
    return warehouse.execute(f"SELECT {names}, _deleted_at = {THEN} FROM main.c ORDER BY ALL")


def quarantined(warehouse: Warehouse) -> list[tuple[Any, ...]]:
    return warehouse.execute("SELECT column_name, key, value, current FROM _cdc.quarantine ORDER BY ALL")


@pytest.mark.parametrize(
    ("before", "value", "after", "expected"),
    [
        (TEXT, "'{\"a\": 1}'", JSON, '{"a": 1}'),
        (TEXT, "'hello'", JSON, None),
        (TEXT, f"'{SOME_ID}'", UUID, SOME_ID),
        (TEXT, "'hello'", UUID, None),
        (TEXT, "'{\"{}\",NULL}'", JSONS, ["{}", None]),
        (TEXT, "'{1,x}'", JSONS, None),
        (TEXT, "'{x}'", UUIDS, None),
        (TEXT, "'1.5'", DOUBLE, 1.5),
        (TEXT, "'1e39'", REAL, None),
        (TEXT, "'a (BC) b'", TEXT, "a (BC) b"),
        (NUMERIC, "'1.50'", INT, None),  # numeric without a precision is text, and 1.50 is what Postgres prints
        (INT, "7", TEXT, "7"),
        (INT, "7", DOUBLE, 7.0),
        (BOOL, "true", TEXT, "true"),
        (DATE, "'2026-02-03'", TEXT, "2026-02-03"),
        (DATE, "'0044-03-15 (BC)'", TEXT, "0044-03-15 BC"),
        (TIMESTAMP, "'0044-03-15 (BC) 01:02:03'", TEXT, "0044-03-15 01:02:03 BC"),
        (TIMESTAMP, "'infinity'", TEXT, "infinity"),
        (BYTEA, r"'\x01'::BLOB", TEXT, None),
        (DOUBLE, "1e39", TEXT, None),
        (INTS, "[1, 2]", TEXT, None),
    ],
)
def test_values(warehouse: Warehouse, before: int, value: str, after: int, expected: Any) -> None:
    """L1: as the new type has them, or NULL and in quarantine, where no row holds them any more; nothing stops."""
    old, new = (table(ID, StoredColumn("v", oid, -1, 2, is_key=False)) for oid in (before, after))
    found = carry(warehouse, old, [f"1, {value}, {THEN}", f"2, NULL, {THEN}"], new)
    (_, got, first), (_, nothing, second) = found
    assert first
    assert second
    assert nothing is None
    assert (str(got) if after == UUID and got is not None else got) == expected
    kept = quarantined(warehouse)
    assert [entry[:2] + entry[3:] for entry in kept] == ([("v", '{"id": "1"}', False)] if expected is None else [])


def test_what_lives_has_no_part_in_it(warehouse: Warehouse) -> None:
    """A value of old content that the new type cannot hold, of a row that has another by now, is nobody's business."""
    old, new = (table(ID, StoredColumn("v", oid, -1, 2, is_key=False)) for oid in (TEXT, JSON))
    found = carry(warehouse, old, ["1, 'hello', NULL"], new, ["1, '\"hello\"', NULL"])
    assert [row[:2] for row in found] == [(1, '"hello"')]
    assert quarantined(warehouse) == []


def test_a_key_of_another_type(warehouse: Warehouse) -> None:
    """A row that cannot be found by its key is left out; one of those whose keys are equal by now stays."""
    old, new = (
        table(StoredColumn("k", oid, -1, 1, is_key=True), StoredColumn("v", INT, -1, 2, is_key=False))
        for oid in (TEXT, INT)
    )
    rows = [f"'{key}', {v}, {at}" for key, v, at in (("1", 1, THEN), ("2", 2, "NULL"), ("x", 3, THEN), ("4", 4, THEN))]
    found = carry(warehouse, old, rows, new, ["2, 20, NULL", "4, 40, NULL"])
    assert found == [(1, 1, True), (2, 20, None), (4, 40, None)]


def test_keys_that_are_one_by_now(warehouse: Warehouse) -> None:
    """numeric(10,2) to integer: two rows have the key that one can have."""
    old, new = (table(StoredColumn("k", oid, mod, 1, is_key=True)) for oid, mod in ((NUMERIC, TEN_TWO), (INT, -1)))
    assert carry(warehouse, old, [f"1.10, {THEN}", f"1.20, {THEN}", f"2.00, {THEN}"], new) == [(1, True), (2, True)]


@pytest.mark.parametrize(
    ("told", "change"),
    [
        (True, {}),
        (False, {"types": '{"16500": ["other"]}'}),
        (False, {"storage": "1:5:0", "state": "resyncing", "reason": ""}),
        (True, {"storage": "1:5:0", "reason": "it was rewritten"}),
    ],
)
def test_who_is_absent(warehouse: Warehouse, told: bool, change: dict[str, Any]) -> None:
    """L1: deleted while nobody followed; not if the key may print otherwise: the enum's labels, or a USING."""
    key = StoredColumn("k", MOOD, -1, 1, is_key=True)
    old = dataclasses.replace(table(key), types='{"16500": ["one"]}', storage="1:4:0", reason="not followed")
    of_old = {name: value for name, value in change.items() if name in ("state", "reason")}
    of_new = {name: value for name, value in change.items() if name in ("types", "storage")}
    new = dataclasses.replace(old, **of_new)
    rows = ["'one', NULL", f"'two', {THEN}", "'three', NULL"]
    found = carry(warehouse, dataclasses.replace(old, **of_old), rows, new, ["'one', NULL"])
    assert found == [("one", None), *([("three", False)] if told else []), ("two", True)]


def test_rows_without_a_key(warehouse: Warehouse) -> None:
    """C7: what was deleted since the copy's snapshot is in the copy as deleted already, so often and no more."""
    column = StoredColumn("v", TEXT, -1, 1, is_key=False)
    old = [f"'a', {THEN}", f"'a', {SINCE}", f"'b', {SINCE}", "'c', NULL"]
    copied = [f"'a', {SINCE}", f"'b', {SINCE}", "'c', NULL", "'d', NULL"]
    found = carry(warehouse, table(column), old, table(column), copied)
    assert found == [("a", False), ("a", True), ("b", False), ("c", None), ("d", None)]


def test_rows_without_a_key_that_are_held_otherwise(warehouse: Warehouse) -> None:
    """C7: what is there already is neither there twice nor in the quarantine, whatever its value has become."""
    old, new = (table(StoredColumn("v", oid, -1, 1, is_key=False)) for oid in (DOUBLE, TEXT))
    found = carry(warehouse, old, [f"1.5, {SINCE}", f"2.5, {THEN}"], new, [f"'1.50', {SINCE}"])
    assert found == [("1.50", False), (None, True)]
    assert quarantined(warehouse) == [("v", None, "2.5", False)]
