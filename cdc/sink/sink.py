"""Warehouse, history and ledger as one sink.

The contract: `apply` may be called several times, then `commit` makes all of it durable together with the checkpoint,
or `rollback` leaves nothing of it. What `commit` has made durable must not be given again: the caller asks `position`
where to go on. `release` lets other programs open the DuckDB file; the next call takes it back, waiting if need be.

A table that is being copied (states copying and resyncing) has its changes kept undecoded in ``_cdc.buffer``, in the
same transactions; `stage` takes the copied rows in between, and `swap` puts the copy in the table's place together
with the buffered changes that the copy does not hold, once the checkpoint has reached the copy's LSN.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import duckdb
import numpy as np
import pyarrow as pa

from cdc.errors import SinkError, TableError, WarehouseBusy
from cdc.failpoints import reach
from cdc.pgoutput.changes import decode_rows
from cdc.pgoutput.decoder import Decoded
from cdc.pgoutput.masks import Masks, mask_rows
from cdc.pgoutput.messages import Relation
from cdc.pgoutput.rows import RelationRows
from cdc.sink import quarantine, schema
from cdc.sink.apply import apply, insert, of_table
from cdc.sink.checkpoint import Checkpoint, Ledger, State, StoredColumn, Table
from cdc.sink.history import History, HistoryFile, as_log
from cdc.sink.schema import DELETED_AT, LiveTable
from cdc.sink.view import View, drop_others, make_room, refresh
from cdc.sink.warehouse import Warehouse, explain, quote

__all__ = ["COPY_SEQ", "CopiedChunk", "Resync", "Sink"]

COPY_SEQ = -(1 << 59)
"""_seq of a copy's T row; its S rows follow from COPY_SEQ + 1 on, all negative."""

_STAGING = "_cdc_copy_"

T = TypeVar("T")


class Resync(TableError):
    """The stream alone can no longer make this table right: it has to be copied again."""


@dataclasses.dataclass(frozen=True, slots=True)
class CopiedChunk:
    """Some rows of a copied table.

    Attributes:
        rows: the table's columns, by name.
        file: where the history has these rows; None: there is no history.
        unfit: (column name, key or None, text, seq) of values that their type cannot hold.
    """

    oid: int
    rows: pa.Table
    file: HistoryFile | None
    unfit: Sequence[tuple[str, str | None, str, int]]


class Sink:
    """See the module."""

    def __init__(
        self,
        warehouse: Warehouse,
        history: History,
        *,
        deletes: str,
        live: Callable[[int], LiveTable | None],
        waiting: Callable[[WarehouseBusy, float], None],
        give_up: Callable[[], bool],
        view: View | None = None,
        masks: Masks | None = None,
    ) -> None:
        """Create a sink that holds nothing yet; `open` it.

        Args:
            deletes: CDC_DELETES, for tables that are copied from now on.
            live: returns the published table with an OID as the catalog has it now, None if it is gone.
            waiting: see `Warehouse.acquire`.
            give_up: see `Warehouse.acquire`.
            view: kept in step with its table.
            masks: CDC_MASK.
        """
        self.warehouse = warehouse
        self.history = history
        self.ledger = Ledger(warehouse)
        self._deletes = deletes
        self._live = live
        self._waiting = waiting
        self._give_up = give_up
        self._view = view
        self._masks = masks or {}
        self._last_change: dict[int, int] = {}

    # Opening, and positions

    def open(self) -> Checkpoint | None:
        """Take the warehouse, finish what a crash left, and return the checkpoint, None in a new warehouse."""
        self.acquire()
        self.ledger.load()
        if self.ledger.checkpoint is not None:
            self._alone(self._forget_copies)
            self.history.recover(self.ledger.known_files)
        return self.ledger.checkpoint

    def create(self, checkpoint: Checkpoint, tables: Iterable[Table] = ()) -> None:
        """Make ``_cdc`` anew, with `checkpoint` as its first and `tables` as what is known of what is here."""

        def work() -> None:
            self.ledger.create(checkpoint)
            for table in tables:
                self.ledger.put(table)

        self._alone(work)
        self.history.recover(self.ledger.known_files)

    def acquire(self) -> None:
        """Take the warehouse if it is not held."""
        self.warehouse.acquire(self._waiting, self._give_up)

    def release(self) -> None:
        """Let others open the warehouse, unless a transaction is open."""
        if not self.warehouse.in_transaction:
            self.warehouse.release()

    @property
    def position(self) -> int:
        """The checkpoint's LSN: all of what was committed before it is durable here."""
        checkpoint = self.ledger.checkpoint
        return 0 if checkpoint is None or checkpoint.lsn is None else checkpoint.lsn

    def strangers(self, names: Iterable[tuple[str, str]]) -> list[str]:
        """Return those of `names` (schema, table) that are taken by tables or views which are no copies of ours."""
        ours = {schema.folded(t.schema, t.name) for t in self.ledger.tables.values() if t.copy_lsn is not None}
        there = {
            schema.folded(*row)
            for row in self.warehouse.execute(
                "SELECT schema_name, table_name FROM duckdb_tables() WHERE database_name = current_database() "
                "UNION ALL SELECT schema_name, view_name FROM duckdb_views() WHERE database_name = current_database()"
            )
        }
        return [".".join(name) for name in names if schema.folded(*name) in there - ours]

    def show(self) -> str:
        """Make the view, if its table is here already, and drop what an earlier setting has left.

        Returns:
            the new name of what had the view's; '' if nothing had.

        Raises:
            StateError: the name is that of a mirrored table.
        """
        view, aside = self._view, ""

        def work() -> None:
            nonlocal aside
            drop_others(self.warehouse, view)
            if view is not None:
                aside = make_room(self.warehouse, view, self.ledger.tables.values())
                for table in self.ledger.tables.values():
                    if table.copy_lsn is not None:
                        refresh(self.warehouse, view, table)

        self._alone(work)
        return aside

    # The stream

    def apply(self, decoded: Decoded) -> None:
        """Apply what was decoded from one batch, in the open transaction or a new one.

        Raises:
            TableError: one table cannot be applied; the transaction is lost, see `set_aside`.
            SinkError: nothing can.
        """
        reach("before_duck_begin")

        def work() -> None:
            for rows in decoded.rows:
                self._rows(rows)

        self._in_transaction(work)

    def commit(self, lsn: int, commit_ts: int | None, as_of: int | None = None) -> None:
        """Make everything applied durable, with the checkpoint at `lsn`; times in microseconds since 1970 UTC."""
        self._in_transaction(lambda: self._commit(lsn, commit_ts, as_of))

    def _commit(self, lsn: int, commit_ts: int | None, as_of: int | None) -> None:
        self.ledger.touch(self._last_change)
        self._last_change = {}
        self.ledger.record_files(self.history.settle())
        self.ledger.advance(lsn, commit_ts, commit_ts if as_of is None else as_of)
        reach("before_duck_commit")
        self._make_durable()
        reach("after_duck_commit")
        self.history.publish()

    def _make_durable(self) -> None:
        try:
            self.warehouse.commit()
        except BaseException:
            self.history.leave()
            raise

    def rollback(self) -> None:
        """Leave nothing of what was applied since the last commit."""
        self.warehouse.rollback()
        self.history.discard()
        self._last_change = {}
        if self.warehouse.held:
            try:
                self.ledger.load()
            except duckdb.FatalException:  # after a failed checkpoint, say, the file has to be opened again
                self.warehouse.dismiss()
                self.warehouse.release()

    def set_aside(self, error: TableError) -> Table | None:
        """After a rollback: put the table that failed into its state, so that the others can go on.

        Returns:
            the table, now in state error, or resyncing where a new copy will mend it; None: it is not known any more.
        """
        table = self.ledger.tables.get(error.oid)
        if table is not None:
            state: State = "resyncing" if isinstance(error, Resync) else "error"
            self.write_tables([dataclasses.replace(table, state=state, reason=str(error))])
        return self.ledger.tables.get(error.oid)

    def write_tables(self, tables: Iterable[Table], *, requested: bool = False) -> None:
        """Write rows of ``_cdc.tables`` in a transaction of their own; `requested`: that is what `cdc resync` asked."""

        def work() -> None:
            for table in tables:
                self.ledger.put(table)
                if requested:
                    self.ledger.take_up(table.oid)

        self._alone(work)

    def _rows(self, rows: RelationRows) -> None:
        table = self.ledger.tables.get(rows.relation.oid)
        if table is None or table.state not in ("copying", "streaming", "resyncing"):
            return  # not published to us (yet), or set aside: its next copy will have these rows
        rows = self._masked(table, rows)
        last_lsn = int(rows.lsn[-1])
        following = table.state == "streaming" or (table.state == "resyncing" and not table.reason)
        if table.state != "streaming":
            self.ledger.append_buffer(table.oid, last_lsn, following, rows.to_ipc())
        if following:
            before = table.columns
            table = self._follow(table, rows.relation, self._target(table), last_lsn)
            if table.columns != before:
                refresh(self.warehouse, self._view, table)
            self._change(table, self._target(table), rows, logged=True)
            self._last_change[table.oid] = int(rows.commit_ts[-1])

    def _masked(self, table: Table, rows: RelationRows) -> RelationRows:
        relation = rows.relation
        columns = [column.name for column in relation.columns]
        names = (str(table), str(relation))
        return mask_rows(rows, schema.masks_of(self._masks, table.oid, names, columns, relation.key))

    def _change(self, table: Table, target: str, rows: RelationRows, *, logged: bool) -> None:
        def log(changes: pa.Table) -> None:
            self.history.write(table.schema, table.name, changes)

        changes = decode_rows(rows)
        apply(self.warehouse, table, target, changes, log if logged and self.history.root else None)
        if (changes.op == ord("T")).any() and table.relfilenode:
            self.ledger.put(dataclasses.replace(self.ledger.tables[table.oid], relfilenode=""))

    def _follow(self, table: Table, relation: Relation, target: str, lsn: int) -> Table:
        """Bring `target` to the columns of `relation`.

        Raises:
            Resync: only a new copy can.
        """
        if schema.same(table.columns, relation):
            return table
        plan = schema.plan(target, table.columns, table.relfilenode, relation, self._live(relation.oid))
        if plan is None:
            raise Resync(f"the definition of {table} changed in a way that needs a new copy", table.oid)
        schema.refuse(table, plan.columns, soft=table.deletes == "soft", logged=self.history.root is not None)
        with of_table(table):
            for statement, parameters in plan.statements:
                self.warehouse.execute(statement, parameters)
                reach("during_ddl_apply")
        left = {column.attnum for column in plan.columns}
        quarantine.forget_columns(self.warehouse, table, [c.name for c in table.columns if c.attnum not in left])
        for change in plan.changes:
            self.ledger.record_change(table, lsn, change)
        table = dataclasses.replace(table, columns=plan.columns)
        self.ledger.put(table)
        return table

    # Copies

    def begin_copy(self, oid: int) -> None:
        """From the current position on, keep the table's changes for a copy that is about to be made."""

        def work() -> None:
            table = self.ledger.tables[oid]
            self.ledger.clear_buffer(oid)
            self.warehouse.execute(f"DROP TABLE IF EXISTS {self._staging(table)}")
            if table.state != "resyncing":
                self.ledger.put(dataclasses.replace(table, state="copying", reason=""))

        self._alone(work)

    def begin_rows(self, oid: int, columns: Sequence[StoredColumn]) -> None:
        """Make room for the copy's rows; called once its snapshot is taken, and again if it had to be taken anew.

        Raises:
            TableError: DuckDB has no room for a table, or for columns, of these names.
        """

        def work() -> None:
            table = self.ledger.tables[oid]
            self._refuse_namesake(table)
            soft = self._deletes == "soft"
            schema.refuse(table, columns, soft=soft, logged=self.history.root is not None)
            with of_table(table):
                self.warehouse.execute(f"CREATE SCHEMA IF NOT EXISTS {self.warehouse.name(table.schema)}")
                self.warehouse.execute(schema.create_table(self._staging(table), columns, soft=soft))
            self.warehouse.execute(
                "DELETE FROM _cdc.quarantine WHERE schema_name = ? AND table_name = ? AND lsn = 0",
                [table.schema, table.name],
            )

        self._alone(work)

    def stage(self, chunk: CopiedChunk) -> None:
        """Keep some copied rows, where readers do not look for them yet."""

        def work() -> None:
            table = self.ledger.tables[chunk.oid]
            with of_table(table):
                insert(self.warehouse, self._staging(table), chunk.rows)
            # LSN 0: not known to be in the table until the swap
            entries = [(name, key, text, 0, seq, False) for name, key, text, seq in chunk.unfit]
            quarantine.keep(self.warehouse, table, entries)

        self._alone(work)
        reach("during_copy")

    def swap(
        self,
        oid: int,
        lsn: int,
        relfilenode: str,
        columns: Sequence[StoredColumn],
        key: Sequence[str],
        files: Sequence[HistoryFile],
    ) -> None:
        """Put the copy in the table's place, brought up to the checkpoint, and stream it from here on.

        Args:
            lsn: the copy's L, not beyond the checkpoint.
            relfilenode, columns, key: the table's definition in the copy's snapshot; `key` names the columns of its
                replica identity, none where it has no key.
            files: what the history has of the copy's rows, under temporary names.
        """
        assert lsn <= self.position
        reach("before_swap")
        self.history.add(files)

        def work() -> None:
            old = self.ledger.tables[oid]
            if old.state not in ("copying", "resyncing"):
                raise SinkError(
                    f"table {old} was copied, but its changes were not kept meanwhile", "please report this"
                )
            new = dataclasses.replace(
                old,
                state="streaming",
                reason="",
                relfilenode=relfilenode,
                copy_lsn=lsn,
                columns=tuple(columns),
                deletes=self._deletes,
            )
            staging, target = self._staging(old), self._target(old)
            here = [old.schema, old.name]
            where = "schema_name = ? AND table_name = ?"
            # What was applied since L comes again below, from the buffer.
            self.warehouse.execute(f"DELETE FROM _cdc.quarantine WHERE {where} AND lsn >= ?", [*here, lsn])
            self.warehouse.execute(f"UPDATE _cdc.quarantine SET current = false WHERE {where} AND lsn > 0", here)
            self.warehouse.execute(
                f"UPDATE _cdc.quarantine SET current = true, lsn = ? WHERE {where} AND lsn = 0", [lsn, *here]
            )
            if self._deletes == "soft":
                with of_table(old):
                    self._carry_tombstones(old, lsn, key)
            if self.history.root:
                self.history.write(old.schema, old.name, _truncation(lsn, columns))
            self.ledger.put(new)
            for ordinal in self.ledger.buffered(oid, lsn):
                in_history, message = self.ledger.read_buffer(ordinal)
                rows = RelationRows.from_ipc(message).after(lsn)
                new = self._follow(self.ledger.tables[oid], rows.relation, staging, int(rows.lsn[-1]))
                self._change(new, staging, rows, logged=not in_history)
            self.ledger.clear_buffer(oid)
            self.warehouse.execute(f"DROP TABLE IF EXISTS {target}")
            self.warehouse.execute(f"ALTER TABLE {staging} RENAME TO {quote(old.name)}")
            refresh(self.warehouse, self._view, new)
            self._replace_namesakes(new)
            self.ledger.record_files(self.history.settle())

        self._alone(work)
        self.history.publish()
        reach("after_swap")

    def _replace_namesakes(self, table: Table) -> None:
        """A table that was dropped and created again has a new OID: forget the old one."""
        for other in list(self.ledger.tables.values()):
            if other.oid != table.oid and (other.schema, other.name) == (table.schema, table.name):
                self.ledger.forget(other.oid)

    def _forget_copies(self) -> None:
        """After a start: no copy is under way, so what a crash left of one is of no use."""
        find = "SELECT schema_name, table_name FROM duckdb_tables() WHERE starts_with(table_name, ?)"
        for schema_name, table_name in self.warehouse.execute(find, [_STAGING]):
            self.warehouse.execute(f"DROP TABLE {self.warehouse.name(schema_name, table_name)}")
        self.warehouse.execute("DELETE FROM _cdc.buffer")
        self.warehouse.execute("DELETE FROM _cdc.quarantine WHERE lsn = 0")

    def _refuse_namesake(self, table: Table) -> None:
        """DuckDB ignores case: two tables whose names differ in nothing else cannot both be here."""
        for other in self.ledger.tables.values():
            if other.oid == table.oid or other.state in ("dropped", "error"):
                continue
            names, others = (table.schema, table.name), (other.schema, other.name)
            if names != others and schema.folded(*names) == schema.folded(*others):
                raise TableError(
                    f"tables {table} and {other} have the same name to DuckDB",
                    table.oid,
                    "rename one of them in Postgres, or leave it out with CDC_TABLES",
                )
        if self.strangers([(table.schema, table.name)]):
            raise TableError(
                f"DuckDB has a {table} that cdc did not make and would have to replace",
                table.oid,
                "rename it, or leave the table out with CDC_TABLES; then `cdc resync` the table",
            )

    def _carry_tombstones(self, table: Table, lsn: int, key: Sequence[str]) -> None:
        """Copy soft-deleted rows into the staged copy, as far as their columns are still there.

        What the old content has alive and the copy has not was deleted while nobody followed the table. A value that
        its column's new type cannot hold goes into quarantine.
        """
        staging, target = self._staging(table), self._target(table)
        old, new = self._kinds(table.schema, table.name), self._kinds(table.schema, _staging_name(table))
        if DELETED_AT not in old or not old.keys() >= set(key):
            return
        shared = {name: kind for name, kind in new.items() if name in old and name != DELETED_AT}
        values = {
            name: f"t.{quote(name)}" if old[name] == kind else f"TRY_CAST(t.{quote(name)} AS {kind})"
            for name, kind in shared.items()
        }
        matched = " AND ".join(f"s.{quote(name)} = {values[name]}" for name in key)
        where = (
            f"NOT EXISTS (SELECT 1 FROM {staging} s WHERE {matched})" if key else f"t.{quote(DELETED_AT)} IS NOT NULL"
        )
        at = f"coalesce(t.{quote(DELETED_AT)}, now())" if key else f"t.{quote(DELETED_AT)}"
        names = ", ".join(map(quote, shared))
        label = quarantine.key_sql([(name, values[name]) for name in key])
        misfits = f"FROM {target} t WHERE {where}"
        for name in shared:
            if old[name] != new[name]:
                self.warehouse.execute(
                    "INSERT INTO _cdc.quarantine "
                    f"SELECT ?, ?, ?, {label}, CAST(t.{quote(name)} AS VARCHAR), ?, ?, true {misfits} "
                    f"AND t.{quote(name)} IS NOT NULL AND {values[name]} IS NULL",
                    [table.schema, table.name, name, lsn, COPY_SEQ],
                )
        self.warehouse.execute(
            f"INSERT INTO {staging} ({names}, {quote(DELETED_AT)}) "
            f"SELECT {', '.join(values.values())}, {at} FROM {target} t WHERE {where}"
        )

    def _kinds(self, schema_name: str, table_name: str) -> dict[str, str]:
        """Return the columns of a table of the warehouse, in order, and their types."""
        rows = self.warehouse.execute(
            "SELECT column_name, data_type FROM duckdb_columns() WHERE database_name = current_database() "
            "AND schema_name = ? AND table_name = ? ORDER BY column_index",
            [schema_name, table_name],
        )
        return dict(rows)

    def _target(self, table: Table) -> str:
        return self.warehouse.name(table.schema, table.name)

    def _staging(self, table: Table) -> str:
        return self.warehouse.name(table.schema, _staging_name(table))

    def _alone(self, work: Callable[[], None]) -> None:
        """Run `work` in a transaction of its own. The stream must not have one open: it would be committed half-way."""
        if self.warehouse.in_transaction:
            raise SinkError("a copy was given to the warehouse in the middle of a streamed transaction")

        def whole() -> None:
            work()
            self._make_durable()

        self._in_transaction(whole)

    def _in_transaction(self, work: Callable[[], T]) -> T:
        """Run `work` in the open transaction or a new one; any error rolls back all of it."""
        try:
            self.warehouse.begin()
            return work()
        except BaseException as error:
            self.rollback()
            if isinstance(error, duckdb.Error) and not isinstance(error, duckdb.InterruptException):
                raise explain(error) from error
            raise


def _staging_name(table: Table) -> str:
    return f"{_STAGING}{table.oid}"


def _truncation(lsn: int, columns: Sequence[StoredColumn]) -> pa.Table:
    """Return the T row with which every copy begins, so that an emptied table replays too."""
    nulls: Mapping[str, pa.Array] = {column.name: schema.nulls(column) for column in columns}
    return as_log(
        np.array([ord("T")], np.uint8),
        np.array([lsn], np.uint64),
        np.array([COPY_SEQ], np.int64),
        np.array([0], np.uint32),
        np.array([0], np.int64),
        list(nulls),
        list(nulls.values()),
    )
