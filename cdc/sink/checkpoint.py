"""Everything that must survive a restart: what schema ``_cdc`` of the warehouse holds, read and written.

It is written in the same transactions as the data, by this module alone, but for ``_cdc.quarantine`` (quarantine.py).
It never commits: its callers say what belongs together.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from cdc.errors import SinkError, StateError
from cdc.lsn import format_lsn
from cdc.sink import layout
from cdc.sink.history import HistoryFile
from cdc.sink.stored import Checkpoint, SchemaChange, StoredColumn, Table
from cdc.sink.warehouse import Warehouse

__all__ = ["Ledger"]


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
        if not layout.is_there(self._warehouse):
            return
        layout.upgrade(self._warehouse)
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

    def create(self, checkpoint: Checkpoint) -> None:
        """Make ``_cdc`` anew, with `checkpoint` as its first; what an earlier one held is gone."""
        layout.create(self._warehouse)
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
            "default_value, attnum) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [table.schema, table.name, table.oid, *dataclasses.astuple(change)],
        )

    def hide_defaults(self, table: Table, attnums: Collection[int]) -> None:
        """Columns of a table are masked or no longer published: what rows from before them had goes."""
        self._warehouse.execute(
            "UPDATE _cdc.schema_changes SET default_value = NULL WHERE oid = ? "
            "AND coalesce(list_contains(?, attnum), true)",
            [table.oid, list(attnums)],
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
