"""Schema ``_cdc`` of the warehouse: everything that must survive a restart, in the same transactions as the data.

    meta            format version and id of this warehouse
    checkpoint      one row: which source, which slot, and up to where everything is in
    tables          the published tables, their state and the columns that they have here
    quarantine      values that their column's type cannot hold, as exact text
    files           the manifest of the history
    schema_changes  what DDL was followed, and when
    buffer          changes of tables that are being copied, undecoded
    freshness       view: the moment up to which everything that was committed is in

A table's state:

    pending ──▶ copying ──▶ streaming ──▶ resyncing ──▶ streaming
                   │            │             │
                   └────────────┴─────────────┴──▶ error, dropped   (pending again by `cdc resync`, or when published)

This module alone writes these tables, but quarantine.py that one. It never commits: its callers say what belongs
together.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import uuid
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from cdc.errors import SinkError, StateError
from cdc.lsn import format_lsn
from cdc.pgoutput.types import TEXT, Basis, ColumnType, column_type
from cdc.sink.history import HistoryFile
from cdc.sink.warehouse import Warehouse

__all__ = ["FORMAT", "Checkpoint", "Ledger", "SchemaChange", "State", "StoredColumn", "Table"]

FORMAT = 3
"""Version of the ``_cdc`` schema that this code writes."""

State = Literal["pending", "copying", "streaming", "resyncing", "dropped", "error"]

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
    schema_name VARCHAR NOT NULL, table_name VARCHAR NOT NULL, oid UINTEGER, column_name VARCHAR NOT NULL, key VARCHAR,
    value VARCHAR NOT NULL, lsn UBIGINT NOT NULL, seq BIGINT NOT NULL, current BOOLEAN NOT NULL);
CREATE TABLE _cdc.files (
    path VARCHAR NOT NULL, schema_name VARCHAR NOT NULL, table_name VARCHAR NOT NULL, rows BIGINT NOT NULL,
    first_lsn UBIGINT NOT NULL, last_lsn UBIGINT NOT NULL);
CREATE TABLE _cdc.schema_changes (
    schema_name VARCHAR NOT NULL, table_name VARCHAR NOT NULL, oid UINTEGER, lsn UBIGINT NOT NULL, seq BIGINT,
    change VARCHAR NOT NULL, old_name VARCHAR, new_name VARCHAR, default_value VARCHAR,
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
        WHERE state = 'streaming' AND oid IN (SELECT oid FROM _cdc.quarantine WHERE current)""",
    ),
}

_FORMAT_WITH_FEW_TYPES = 2
# What format 2 held as more than text: bool, bytea, numbers, text, json, date and time, uuid.
_TYPES_OF_2 = {16, 17, 18, 19, 20, 21, 23, 25, 114, 700, 701, 1042, 1043, 1082, 1083, 1114, 1184, 1700, 2950, 3802}


@dataclasses.dataclass(frozen=True, slots=True)
class Checkpoint:
    """Which source this warehouse mirrors, and how far.

    Attributes:
        lsn: everything that was committed before it is in, nothing that was committed from it on; None: the slot is
            about to be created (an intent, which tells our own unfinished slot from a foreign one).
    """

    system_identifier: str
    database: str
    slot: str
    publication: str
    lsn: int | None


@dataclasses.dataclass(frozen=True, slots=True)
class StoredColumn:
    """A column as the warehouse has it, with what it was in Postgres.

    Attributes:
        type_oid, typmod: of a column that is masked by digests, which is text, those of text.
        attnum: pg_attribute.attnum: it tells a renamed column from a dropped and an added one.
        mask: `Mask.label`; '': it is not masked.
        alias: its name here, where that is another.
        held_as: the built-in type as which it is held, where that is another.
    """

    name: str
    type_oid: int
    typmod: int
    attnum: int
    mask: str = ""
    alias: str = ""
    held_as: Basis | None = None

    @property
    def here(self) -> str:
        """Its name in DuckDB and in the change log."""
        return self.alias or self.name

    @property
    def basis(self) -> Basis:
        """The built-in type as which it is held."""
        return self.held_as or Basis(self.type_oid, self.typmod)

    @property
    def kind(self) -> ColumnType:
        """How it is held."""
        return column_type(*self.basis)

    @classmethod
    def read(cls, values: Sequence[Any]) -> StoredColumn:
        """Return the column that `_cdc.tables` has, as JSON; earlier formats had fewer values of it."""
        read = cls(*values)
        return dataclasses.replace(read, held_as=Basis(*read.held_as)) if read.held_as else read


@dataclasses.dataclass(frozen=True, slots=True)
class Table:
    """One row of ``_cdc.tables``.

    Attributes:
        storage: `TableDefinition.storage`, as it was when the table was last found to have been rewritten by nobody;
            behind it `truncated` notes the last TRUNCATE since then. '': unknown.
        copy_lsn: the L of its copy: what was committed before is in the copy, what was committed from there on is not.
        natts: the highest attnum that was ever used when it had `columns`; a column that is added has a higher one.
        types: `TableDefinition.types`, as they were when the table was last found to print as before.
        deletes: hard or soft, as it was when the table was copied.
        publication: by which entries of which publications it is published, and what these publish (reconcile.py writes
            it): as that changes, so does what comes of it in the stream.
        alias: its name here, where that is another.
        widened: attnums of columns that are held as text, because their type here cannot hold what they have.
    """

    oid: int
    schema: str
    name: str
    state: State
    reason: str = ""
    storage: str = ""
    copy_lsn: int | None = None
    columns: tuple[StoredColumn, ...] = ()
    natts: int = 0
    types: str = "{}"
    deletes: str = "hard"
    publication: str = ""
    alias: str = ""
    widened: tuple[int, ...] = ()

    @property
    def here(self) -> tuple[str, str]:
        """Its schema and name in DuckDB and in the change log."""
        return self.schema, self.alias or self.name

    @property
    def publishes(self) -> frozenset[str]:
        """The first letters of insert, update, delete and truncate, as far as the stream has them."""
        return _publishes(self.publication)

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}"


@functools.lru_cache(maxsize=4096)
def _publishes(publication: str) -> frozenset[str]:
    if not publication.startswith("["):
        return frozenset("iudt")
    _, entries = json.loads(publication)
    return frozenset(kind for _, _, _, publishes, _ in entries for kind in publishes)


@dataclasses.dataclass(frozen=True, slots=True)
class SchemaChange:
    """DDL that was followed.

    Attributes:
        lsn, seq: the first change of the table after it; of DDL without one, a position of the stream and 0. What is
            noted for one of them happened at once: two columns may swap their names.
        text: what changed.
        old_name, new_name: of a column that was renamed; of one that was added or dropped one of them; else None.
        default_value: what rows from before have in a column that was added, as Postgres prints it; None: NULL.
    """

    lsn: int
    seq: int
    text: str
    old_name: str | None = None
    new_name: str | None = None
    default_value: str | None = None


class Ledger:
    """Reads and writes ``_cdc`` through a held warehouse.

    `tables` (by OID) is a copy of ``_cdc.tables`` that is kept in step; after a rollback, `load` it again.
    """

    def __init__(self, warehouse: Warehouse) -> None:
        self._warehouse = warehouse
        self.checkpoint: Checkpoint | None = None
        self.tables: dict[int, Table] = {}

    def load(self) -> None:
        """Read what is there; `checkpoint` is None in a warehouse without ``_cdc``.

        Raises:
            StateError: a newer cdc has written it.
        """
        self.checkpoint, self.tables = None, {}
        run = self._warehouse.execute
        if not run("SELECT 1 FROM duckdb_tables() WHERE schema_name = '_cdc' AND table_name = 'meta'"):
            return
        (found,) = run("SELECT format FROM _cdc.meta")[0]
        if found > FORMAT:
            raise StateError(
                f"warehouse {self._warehouse.path} was written by a newer cdc (format {found}, not {FORMAT})",
                "upgrade pg-duckdb-cdc",
            )
        if found < FORMAT:
            self._upgrade(found)
        for row in run("SELECT system_identifier, database, slot, publication, lsn FROM _cdc.checkpoint"):
            self.checkpoint = Checkpoint(*row)
        for row in run(
            "SELECT oid, schema_name, table_name, state, reason, storage, copy_lsn, columns, natts, types, "
            "deletes, publication, alias, widened FROM _cdc.tables"
        ):
            oid, schema, name, state, reason, storage, copy_lsn, columns, *rest, widened = row
            stored = tuple(StoredColumn.read(column) for column in json.loads(columns))
            table = Table(oid, schema, name, state, reason, storage, copy_lsn, stored, *rest)
            self.tables[oid] = dataclasses.replace(table, widened=tuple(json.loads(widened)))

    def _upgrade(self, found: int) -> None:
        self._warehouse.begin()
        for old in range(found, FORMAT):
            for statement in _UPGRADES[old]:
                self._warehouse.execute(statement)
            if old == _FORMAT_WITH_FEW_TYPES:
                self._hold_as_before()
        self._warehouse.execute("UPDATE _cdc.meta SET format = ?", [FORMAT])
        self._warehouse.commit()

    def _hold_as_before(self) -> None:
        """Note which columns are text here, though today they would not be: a copy will make the difference."""
        for oid, columns in self._warehouse.execute("SELECT oid, columns FROM _cdc.tables"):
            held = [StoredColumn.read(column) for column in json.loads(columns)]
            text = [dataclasses.replace(c, held_as=TEXT) if c.type_oid not in _TYPES_OF_2 else c for c in held]
            self._warehouse.execute(
                "UPDATE _cdc.tables SET columns = ? WHERE oid = ?",
                [json.dumps(list(map(dataclasses.astuple, text))), oid],
            )

    def create(self, checkpoint: Checkpoint) -> None:
        """Make ``_cdc`` anew, with `checkpoint` as its first; what an earlier one held is gone."""
        self._warehouse.execute("DROP SCHEMA IF EXISTS _cdc CASCADE")
        for statement in _SCHEMA.split(";"):
            if statement.strip():
                self._warehouse.execute(statement)
        self._warehouse.execute("INSERT INTO _cdc.meta VALUES (?, ?)", [FORMAT, str(uuid.uuid4())])
        self._warehouse.execute(
            "INSERT INTO _cdc.checkpoint VALUES (?, ?, ?, ?, ?, NULL, NULL)", list(dataclasses.astuple(checkpoint))
        )
        self.checkpoint, self.tables = checkpoint, {}

    def advance(self, lsn: int, commit_ts: int | None, as_of: int | None) -> None:
        """Move the checkpoint to `lsn`; times in microseconds since 1970 UTC, None: as it was.

        Raises:
            StateError: the row is not the one that we know: somebody replaced the file under us.
        """
        known = self.checkpoint
        assert known is not None
        changed = self._warehouse.execute(
            "UPDATE _cdc.checkpoint SET lsn = $1, commit_ts = coalesce(make_timestamptz($2), commit_ts), "
            "as_of = greatest(as_of, make_timestamptz($3)) WHERE lsn IS NOT DISTINCT FROM $4 RETURNING 1",
            [lsn, commit_ts, as_of, known.lsn],
        )
        if len(changed) != 1:
            expected = "none" if known.lsn is None else format_lsn(known.lsn)
            raise StateError(
                f"the checkpoint in {self._warehouse.path} is no longer {expected}: somebody else wrote the file",
                "restart the consumer; if it refuses, run `cdc resync --all`",
            )
        self.checkpoint = dataclasses.replace(known, lsn=lsn)

    def forget_position(self) -> None:
        """Turn the checkpoint into an intent: the next start makes a new slot, and every table has to be copied."""
        assert self.checkpoint is not None
        self._warehouse.execute("UPDATE _cdc.checkpoint SET lsn = NULL")
        self._warehouse.execute("UPDATE _cdc.tables SET state = 'pending' WHERE state IN ('streaming', 'resyncing')")
        self.checkpoint = dataclasses.replace(self.checkpoint, lsn=None)

    def put(self, table: Table) -> None:
        """Write one row of ``_cdc.tables``, new or not."""
        columns = json.dumps([dataclasses.astuple(column) for column in table.columns])
        values: list[Any] = [
            *(table.schema, table.name, table.storage, table.state, table.reason, table.copy_lsn),
            *(columns, table.natts, table.types, table.deletes, table.publication, table.alias),
            *(json.dumps(table.widened), table.oid),
        ]
        if not self._warehouse.execute(
            "UPDATE _cdc.tables SET schema_name = ?, table_name = ?, storage = ?, state = ?, reason = ?, "
            "copy_lsn = ?, columns = ?, natts = ?, types = ?, deletes = ?, publication = ?, alias = ?, widened = ? "
            "WHERE oid = ? RETURNING 1",
            values,
        ):
            self._warehouse.execute(
                "INSERT INTO _cdc.tables (schema_name, table_name, storage, state, reason, copy_lsn, columns, "
                "natts, types, deletes, publication, alias, widened, oid) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                values,
            )
        self.tables[table.oid] = table

    def forget(self, oid: int) -> None:
        """Delete a table's row, and what is buffered for it."""
        self._warehouse.execute("DELETE FROM _cdc.tables WHERE oid = ?", [oid])
        self.clear_buffer(oid)
        self.tables.pop(oid, None)

    def touch(self, last_change: dict[int, int]) -> None:
        """Note when tables (by OID) last changed: commit time in microseconds since 1970 UTC."""
        for oid, commit_ts in last_change.items():
            self._warehouse.execute(
                "UPDATE _cdc.tables SET last_change_ts = make_timestamptz(?) WHERE oid = ?", [commit_ts, oid]
            )

    def request(self, oid: int) -> None:
        """Mark a table to be copied anew, for the consumer: only that one changes states."""
        self._warehouse.execute("UPDATE _cdc.tables SET requested = true WHERE oid = ?", [oid])

    def requested(self) -> list[int]:
        """Return the OIDs of tables that are marked, and not taken up yet (`take_up`)."""
        rows = self._warehouse.execute("SELECT oid FROM _cdc.tables WHERE requested")
        return [oid for (oid,) in rows if oid in self.tables]

    def take_up(self, oid: int) -> None:
        """Take the mark away: the table's row says by now that it is to be copied."""
        self._warehouse.execute("UPDATE _cdc.tables SET requested = false WHERE oid = ?", [oid])

    def record_files(self, files: Iterable[HistoryFile]) -> None:
        """Name `files` in the manifest."""
        for file in files:
            self._warehouse.execute("INSERT INTO _cdc.files VALUES (?, ?, ?, ?, ?, ?)", list(dataclasses.astuple(file)))

    def known_files(self, paths: Sequence[str]) -> set[str]:
        """Return those of `paths` that the manifest names."""
        found = self._warehouse.execute("SELECT path FROM _cdc.files WHERE path IN (SELECT unnest(?))", [list(paths)])
        return {path for (path,) in found}

    def record_change(self, table: Table, change: SchemaChange) -> None:
        """Note DDL that was followed."""
        self._warehouse.execute(
            "INSERT INTO _cdc.schema_changes (schema_name, table_name, oid, lsn, seq, change, old_name, new_name, "
            "default_value) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [table.schema, table.name, table.oid, *dataclasses.astuple(change)],
        )

    def append_buffer(self, oid: int, last_lsn: int, in_history: bool, rows: bytes) -> None:
        """Keep changes of a table that is being copied."""
        self._warehouse.execute(
            "INSERT INTO _cdc.buffer VALUES (?, nextval('_cdc.buffer_ordinal'), ?, ?, ?)",
            [oid, last_lsn, in_history, rows],
        )

    def buffered(self, oid: int, from_lsn: int) -> Sequence[int]:
        """Return the ordinals, in order, of a table's buffered chunks that reach `from_lsn` or beyond."""
        return [
            ordinal
            for (ordinal,) in self._warehouse.execute(
                "SELECT ordinal FROM _cdc.buffer WHERE oid = ? AND last_lsn >= ? ORDER BY ordinal", [oid, from_lsn]
            )
        ]

    def read_buffer(self, ordinal: int) -> tuple[bool, bytes]:
        """Return one buffered chunk: whether the history has it already, and its rows."""
        row = self._warehouse.execute("SELECT in_history, rows FROM _cdc.buffer WHERE ordinal = ?", [ordinal])
        if not row:
            raise SinkError(f"the buffered changes {ordinal} are gone from the warehouse", "run `cdc resync` again")
        return row[0][0], row[0][1]

    def clear_buffer(self, oid: int) -> None:
        """Delete what is buffered for a table."""
        self._warehouse.execute("DELETE FROM _cdc.buffer WHERE oid = ?", [oid])
