"""How schema ``_cdc`` is laid out in the warehouse, and what brings an earlier layout to today's.

meta            format version and id of this warehouse
checkpoint      one row: which source, which slot, and up to where everything is in
tables          the published tables, their state and the columns that they have here
quarantine      values that their column's type cannot hold, as exact text
files           the manifest of the history
schema_changes  what DDL was followed, and when
buffer          changes of tables that are being copied, undecoded
freshness       view: the moment up to which everything that was committed is in
"""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections.abc import Sequence

from cdc.errors import StateError
from cdc.pgoutput.types import TEXT
from cdc.sink.stored import StoredColumn
from cdc.sink.warehouse import Warehouse

__all__ = ["FORMAT", "create", "is_there", "upgrade"]

FORMAT = 4
"""Version of the ``_cdc`` schema that this code writes."""

_SCHEMA = """
CREATE SCHEMA _cdc;
CREATE TABLE _cdc.meta (format INTEGER NOT NULL, id UUID NOT NULL);
CREATE TABLE _cdc.checkpoint (
    system_identifier VARCHAR NOT NULL, database VARCHAR NOT NULL, slot VARCHAR NOT NULL, publication VARCHAR NOT NULL,
    lsn UBIGINT, commit_ts TIMESTAMPTZ, as_of TIMESTAMPTZ);
CREATE TABLE _cdc.tables (
    schema_name VARCHAR NOT NULL, table_name VARCHAR NOT NULL, oid UINTEGER NOT NULL, storage VARCHAR NOT NULL,
    state VARCHAR NOT NULL, reason VARCHAR NOT NULL, copy_lsn UBIGINT, columns VARCHAR NOT NULL,
    natts INTEGER NOT NULL, types VARCHAR NOT NULL, deletes VARCHAR NOT NULL, publication VARCHAR NOT NULL,
    alias VARCHAR NOT NULL, widened VARCHAR NOT NULL, last_change_ts TIMESTAMPTZ,
    requested BOOLEAN NOT NULL DEFAULT false);
CREATE TABLE _cdc.quarantine (
    schema_name VARCHAR NOT NULL, table_name VARCHAR NOT NULL, oid UINTEGER, column_name VARCHAR NOT NULL,
    attnum INTEGER, key VARCHAR, value VARCHAR NOT NULL, lsn UBIGINT NOT NULL, seq BIGINT NOT NULL,
    current BOOLEAN NOT NULL);
CREATE TABLE _cdc.files (
    path VARCHAR NOT NULL, schema_name VARCHAR NOT NULL, table_name VARCHAR NOT NULL, rows BIGINT NOT NULL,
    first_lsn UBIGINT NOT NULL, last_lsn UBIGINT NOT NULL);
CREATE TABLE _cdc.schema_changes (
    schema_name VARCHAR NOT NULL, table_name VARCHAR NOT NULL, oid UINTEGER, lsn UBIGINT NOT NULL, seq BIGINT,
    change VARCHAR NOT NULL, old_name VARCHAR, new_name VARCHAR, default_value VARCHAR, attnum INTEGER,
    followed_at TIMESTAMPTZ NOT NULL DEFAULT now());
CREATE TABLE _cdc.buffer (
    oid UINTEGER NOT NULL, ordinal BIGINT NOT NULL, last_lsn UBIGINT NOT NULL, in_history BOOLEAN NOT NULL,
    rows BLOB NOT NULL);
CREATE SEQUENCE _cdc.buffer_ordinal;
CREATE VIEW _cdc.freshness AS SELECT as_of, now() - as_of AS age FROM _cdc.checkpoint;
"""

# By the format that each leaves behind. The storage of tables had no links before: it is unknown.
_UPGRADES = {
    1: (
        "ALTER TABLE _cdc.tables RENAME COLUMN relfilenode TO storage",
        "UPDATE _cdc.tables SET storage = ''",
        "ALTER TABLE _cdc.tables ADD COLUMN natts INTEGER DEFAULT 0",
        "ALTER TABLE _cdc.tables ADD COLUMN types VARCHAR DEFAULT '{}'",
        "ALTER TABLE _cdc.schema_changes ADD COLUMN oid UINTEGER",
        "ALTER TABLE _cdc.schema_changes ADD COLUMN seq BIGINT",
        "ALTER TABLE _cdc.schema_changes ADD COLUMN old_name VARCHAR",
        "ALTER TABLE _cdc.schema_changes ADD COLUMN new_name VARCHAR",
        "ALTER TABLE _cdc.schema_changes ADD COLUMN default_value VARCHAR",
    ),
    2: (
        "ALTER TABLE _cdc.tables ADD COLUMN alias VARCHAR DEFAULT ''",
        "ALTER TABLE _cdc.tables ADD COLUMN widened VARCHAR DEFAULT '[]'",
        "ALTER TABLE _cdc.quarantine ADD COLUMN oid UINTEGER",
        """UPDATE _cdc.quarantine AS q SET oid = t.oid FROM _cdc.tables AS t
        WHERE (q.schema_name, q.table_name) = (t.schema_name, t.table_name)""",
        # Keys are written in another way now, so the rows of those that are there would not be found.
        """UPDATE _cdc.tables SET state = 'resyncing', reason = 'an earlier version has written its quarantine'
        WHERE state IN ('streaming', 'resyncing') AND oid IN (SELECT oid FROM _cdc.quarantine WHERE current)""",
    ),
    3: (
        "ALTER TABLE _cdc.quarantine ADD COLUMN IF NOT EXISTS oid UINTEGER",
        "ALTER TABLE _cdc.quarantine ADD COLUMN attnum INTEGER",
        "ALTER TABLE _cdc.schema_changes ADD COLUMN attnum INTEGER",
    ),
}

# What format 2 held as more than text: bool, bytea, numbers, text, json, date and time, uuid.
_TYPES_OF_2 = {16, 17, 18, 19, 20, 21, 23, 25, 114, 700, 701, 1042, 1043, 1082, 1083, 1114, 1184, 1700, 2950, 3802}


def is_there(warehouse: Warehouse) -> bool:
    """Whether the warehouse has a ``_cdc``."""
    there = "SELECT 1 FROM duckdb_tables() WHERE schema_name = '_cdc' AND table_name = 'meta'"
    return bool(warehouse.execute(there))


def create(warehouse: Warehouse) -> None:
    """Make ``_cdc`` anew, empty; what an earlier one held is gone."""
    warehouse.execute("DROP SCHEMA IF EXISTS _cdc CASCADE")
    for statement in _SCHEMA.split(";"):
        if statement.strip():
            warehouse.execute(statement)
    warehouse.execute("INSERT INTO _cdc.meta VALUES (?, ?)", [FORMAT, str(uuid.uuid4())])


def upgrade(warehouse: Warehouse) -> None:
    """Bring ``_cdc`` to today's format, in a transaction of its own.

    Raises:
        StateError: a newer cdc has written it.
    """
    (found,) = warehouse.execute("SELECT format FROM _cdc.meta")[0]
    if found > FORMAT:
        raise StateError(
            f"warehouse {warehouse.path} was written by a newer cdc (format {found}, not {FORMAT})",
            "upgrade pg-duckdb-cdc",
        )
    if found == FORMAT:
        return
    warehouse.begin()
    for old in range(found, FORMAT):
        for statement in _UPGRADES[old]:
            warehouse.execute(statement)
        if old in _REWRITES:
            for oid, columns in warehouse.execute("SELECT oid, columns FROM _cdc.tables"):
                _REWRITES[old](warehouse, oid, [StoredColumn.read(column) for column in json.loads(columns)])
    warehouse.execute("UPDATE _cdc.meta SET format = ?", [FORMAT])
    warehouse.commit()


def _hold_as_before(warehouse: Warehouse, oid: int, columns: Sequence[StoredColumn]) -> None:
    """Note which columns are text here, though today they would not be: a copy will make the difference."""
    text = [dataclasses.replace(c, held_as=TEXT) if c.type_oid not in _TYPES_OF_2 else c for c in columns]
    warehouse.execute(
        "UPDATE _cdc.tables SET columns = ? WHERE oid = ?", [json.dumps(list(map(dataclasses.astuple, text))), oid]
    )


def _number(warehouse: Warehouse, oid: int, columns: Sequence[StoredColumn]) -> None:
    """Note the attnum of what rows hold, by the name of its column; what was before may have had other names."""
    for column in columns:
        warehouse.execute(
            "UPDATE _cdc.quarantine SET attnum = ? WHERE oid = ? AND column_name = ? AND current",
            [column.attnum, oid, column.here],
        )


_REWRITES = {2: _hold_as_before, 3: _number}
