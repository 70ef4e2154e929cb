"""Copies of tables, from their first row until they replace what was there.

A copy is a table beside its target, where readers do not look, until `swap` puts it in the target's place together with
the changes that came since. All of it happens in transactions that the sink begins and ends.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pyarrow as pa

from cdc.errors import Resync, SinkError
from cdc.pgoutput.changes import Unfit
from cdc.pgoutput.rows import RelationRows
from cdc.sink import quarantine, schema, tombstones
from cdc.sink.apply import insert, of_table
from cdc.sink.checkpoint import Ledger
from cdc.sink.evolve import COPY_SEQ, Evolution, Moment, truncation
from cdc.sink.history import History, HistoryFile
from cdc.sink.holding import Holding, table_alias
from cdc.sink.stored import StoredColumn, Table
from cdc.sink.warehouse import Warehouse, quote

__all__ = ["CopiedChunk", "CopiedTable", "Staging"]

_PREFIX = "_cdc_copy_"


@dataclasses.dataclass(frozen=True, slots=True)
class CopiedChunk:
    """Some rows of a copied table.

    Attributes:
        rows: the table's columns, by their names here.
        first_seq: the first row's number in the history; the others follow.
        file: where the history has these rows; None: there is no history.
        unfit: values that their type cannot hold.
    """

    oid: int
    rows: pa.Table
    first_seq: int
    file: HistoryFile | None
    unfit: Sequence[Unfit]


@dataclasses.dataclass(frozen=True, slots=True)
class CopiedTable:
    """A table as a copy's snapshot has it.

    Attributes:
        lsn: the copy's L: what was committed before is in it, nothing that was committed from there on.
        storage, natts, types, columns, alias: see `Table`.
        hidden: attnums of columns that are not published.
    """

    oid: int
    schema: str
    name: str
    lsn: int
    storage: str
    natts: int
    types: str
    columns: tuple[StoredColumn, ...]
    hidden: frozenset[int]
    alias: str = ""

    @property
    def here(self) -> tuple[str, str]:
        """Its schema and name in DuckDB and in the change log."""
        return self.schema, self.alias or self.name

    @property
    def key(self) -> tuple[str, ...]:
        """Names here of the columns of its replica identity, none where it has no key."""
        return tuple(column.here for column in self.columns if column.is_key)

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}"


class Staging:
    """The copies that are being made. State: what each (by OID) is a copy of."""

    def __init__(
        self,
        warehouse: Warehouse,
        ledger: Ledger,
        history: History,
        evolution: Evolution,
        change: Callable[[Table, str, RelationRows, bool], None],
        holding: Holding,
        *,
        deletes: str,
    ) -> None:
        """Create it with no copy.

        Args:
            change: applies rows to a DuckDB table (quoted), and writes them to the history if told so.
            holding: how columns are held.
            deletes: CDC_DELETES, for tables that are copied from now on.
        """
        self._warehouse = warehouse
        self._ledger = ledger
        self._history = history
        self._evolution = evolution
        self._change = change
        self._limit = holding.limit
        self._deletes = deletes
        self._copied: dict[int, CopiedTable] = {}

    def begin(self, oid: int) -> None:
        """From the current position on, keep the table's changes for a copy that is about to be made."""
        table = self._ledger.tables[oid]
        self._ledger.clear_buffer(oid)
        self._drop(oid)
        if table.state != "resyncing":
            self._ledger.put(dataclasses.replace(table, state="copying", reason=""))

    def begin_rows(self, copied: CopiedTable) -> None:
        """Make room for the copy's rows.

        Raises:
            TableError: DuckDB has no room for a table, or for columns, of these names.
        """
        known = self._ledger.tables[copied.oid]
        table = dataclasses.replace(known, schema=copied.schema, name=copied.name, alias=copied.alias)
        if table_alias(self._ledger.tables.values(), table.oid, table.schema, table.name) != table.alias:
            raise Resync(f"{table} cannot have the name {'.'.join(table.here)} any more", table.oid)
        self._evolution.refuse_stranger(table)
        soft = self._deletes == "soft"
        schema.refuse(table, copied.columns)
        self._drop(copied.oid)
        self._copied[copied.oid] = copied
        with of_table(table):
            self._warehouse.execute(f"CREATE SCHEMA IF NOT EXISTS {self._warehouse.name(copied.schema)}")
            self._warehouse.execute(schema.create_table(self._table(copied.oid), copied.columns, soft=soft))
        quarantine.forget_copy(self._warehouse, self._ledger.tables[copied.oid])

    def stage(self, chunk: CopiedChunk) -> None:
        """Keep some copied rows."""
        table, copied = self._ledger.tables[chunk.oid], self._copied[chunk.oid]
        kinds = {column.here: column.kind for column in copied.columns}
        with of_table(table):
            insert(self._warehouse, self._table(chunk.oid), chunk.rows, kinds)
        for unfit in chunk.unfit:
            column, rows = copied.columns[unfit.column], unfit.rows.tolist()
            keys: Sequence[str | None] = [None] * len(rows)
            if copied.key and column.here not in copied.key:
                of_rows = chunk.rows.select(list(copied.key)).take(pa.array(unfit.rows))
                keys = quarantine.key_texts(self._warehouse, of_rows, kinds)
            # LSN 0: not known to be in the table until the swap
            found = zip(rows, keys, unfit.texts, strict=True)
            entries = [(key, text, 0, chunk.first_seq + row, False) for row, key, text in found]
            quarantine.keep(self._warehouse, table, column, entries)
        brought = [copied.columns[unfit.column] for unfit in chunk.unfit]
        quarantine.check_copy(self._warehouse, table, brought, copied.key, self._limit)

    def swap(self, copied: CopiedTable) -> None:
        """Put the copy in the table's place, brought up to the checkpoint, and stream it from here on.

        Raises:
            TableError: see `Evolution`.
        """
        old = self._ledger.tables[copied.oid]
        if old.state not in ("copying", "resyncing"):
            raise SinkError(f"table {old} was copied, but its changes were not kept meanwhile", "please report this")
        new = dataclasses.replace(
            old,
            schema=copied.schema,
            name=copied.name,
            state="streaming",
            reason="",
            alias=copied.alias,
            storage=copied.storage,
            natts=copied.natts,
            types=copied.types,
            copy_lsn=copied.lsn,
            columns=copied.columns,
            deletes=self._deletes,
        )
        staging = self._table(copied.oid)
        quarantine.rename_columns(self._warehouse, old, {column.attnum: column.here for column in copied.columns})
        quarantine.take_copy(self._warehouse, old, copied.lsn)
        masked = {column.attnum for column in copied.columns if column.mask}
        shown = {column.attnum for column in old.columns if not column.mask}
        self._evolution.hide(old, shown & (copied.hidden | masked))
        if (old.schema, old.name) != (new.schema, new.name):
            quarantine.rename_table(self._warehouse, old, (new.schema, new.name))
        if self._history.root:
            self._history.write(*new.here, truncation(copied.lsn, copied.columns))
            self._evolution.logged(new, copied.lsn)
        self._ledger.put(new)
        for ordinal in self._ledger.buffered(copied.oid, copied.lsn):
            in_history, message = self._ledger.read_buffer(ordinal)
            rows = RelationRows.from_ipc(message).after(copied.lsn)
            if (rows.relation.namespace, rows.relation.name) != (new.schema, new.name):
                raise Resync(f"table {new} got another name while it was copied", new.oid)
            moment = Moment(int(rows.lsn[0]), int(rows.seq[0]), int(rows.commit_ts[0]))
            new = self._evolution.follow(self._ledger.tables[copied.oid], rows.relation, staging, moment)
            self._change(new, staging, rows, not in_history)
            new = self._ledger.tables[copied.oid]
        self._ledger.clear_buffer(copied.oid)
        if self._deletes == "soft":
            with of_table(old):
                tombstones.carry(self._warehouse, old, new, staging, (copied.lsn, COPY_SEQ))
        if old.copy_lsn is not None:
            self._warehouse.execute(f"DROP TABLE IF EXISTS {self._warehouse.name(*old.here)}")
        self._evolution.make_room(new)
        self._warehouse.execute(f"ALTER TABLE {staging} RENAME TO {quote(new.here[1])}")
        self._evolution.show(new, of=str(old))

    def forget(self) -> None:
        """After a start: no copy is under way, so what a crash left of one is of no use."""
        find = "SELECT schema_name, table_name FROM duckdb_tables() WHERE starts_with(table_name, ?)"
        for schema_name, table_name in self._warehouse.execute(find, [_PREFIX]):
            self._warehouse.execute(f"DROP TABLE {self._warehouse.name(schema_name, table_name)}")
        self._warehouse.execute("DELETE FROM _cdc.buffer")
        self._warehouse.execute("DELETE FROM _cdc.quarantine WHERE lsn = 0")

    def _table(self, oid: int) -> str:
        return self._warehouse.name(self._copied[oid].schema, f"{_PREFIX}{oid}")

    def _drop(self, oid: int) -> None:
        if oid in self._copied:
            self._warehouse.execute(f"DROP TABLE IF EXISTS {self._table(oid)}")
