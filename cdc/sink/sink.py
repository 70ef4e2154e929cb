"""Warehouse, history and ledger as one sink.

The contract: `apply` may be called several times, then `commit` makes all of it durable together with the checkpoint,
or `rollback` leaves nothing of it. What `commit` has made durable must not be given again: the caller asks `position`
where to go on. `release` lets other programs open the DuckDB file; the next call takes it back, waiting if need be.

A table that is being copied (states copying and resyncing) has its changes kept undecoded in ``_cdc.buffer``, in the
same transactions (staging.py). What changes the definition of a table is followed in between (evolve.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import duckdb
import pyarrow as pa

from cdc.errors import Resync, SinkError, TableError, WarehouseBusy, Widen
from cdc.failpoints import reach
from cdc.pgoutput.changes import decode_rows
from cdc.pgoutput.decoder import Decoded
from cdc.pgoutput.masks import mask_rows, masks_of
from cdc.pgoutput.messages import Relation
from cdc.pgoutput.rows import RelationRows
from cdc.sink.apply import apply
from cdc.sink.checkpoint import Ledger
from cdc.sink.columns import LiveTable
from cdc.sink.evolve import Evolution, Moment
from cdc.sink.history import History, HistoryFile
from cdc.sink.holding import Holding, held
from cdc.sink.staging import CopiedChunk, CopiedTable, Staging
from cdc.sink.storage import truncated
from cdc.sink.stored import Checkpoint, State, Table
from cdc.sink.view import View, drop_others, make_room
from cdc.sink.warehouse import Warehouse, explain

__all__ = ["Sink"]

T = TypeVar("T")


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
        holding: Holding,
        view: View | None = None,
    ) -> None:
        """Create a sink that holds nothing yet; `open` it.

        Args:
            deletes: CDC_DELETES, for tables that are copied from now on.
            live: returns the published table with an OID as the catalog has it now, None if it is gone.
            waiting: see `Warehouse.acquire`.
            give_up: see `Warehouse.acquire`.
            holding: how columns are held.
            view: kept in step with its table.
        """
        self.warehouse = warehouse
        self.history = history
        self.ledger = Ledger(warehouse)
        self._waiting = waiting
        self._give_up = give_up
        self._view = view
        self._holding = holding
        self._last_change: dict[int, int] = {}
        self._evolution = Evolution(warehouse, self.ledger, history, live, holding, view)
        self._staging = Staging(
            warehouse, self.ledger, history, self._evolution, self._change, holding, deletes=deletes
        )

    # Opening, and positions

    def open(self) -> Checkpoint | None:
        """Take the warehouse, finish what a crash left, and return the checkpoint, None in a new warehouse."""
        self.acquire()
        self.ledger.load()
        if self.ledger.checkpoint is not None:
            self._alone(self._staging.forget)
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
                        self._evolution.show(table)

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
        self._evolution.forget()
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
            widened = tuple({*table.widened, error.attnum}) if isinstance(error, Widen) else table.widened
            self.write_tables([dataclasses.replace(table, state=state, reason=str(error), widened=widened)])
        return self.ledger.tables.get(error.oid)

    def misnamed(self) -> list[Table]:
        """Return the tables with columns that cannot have their names any more, to be copied anew: settings changed."""
        return [
            dataclasses.replace(table, state="resyncing", reason="columns of it have names that are ours by now")
            for table in self.ledger.tables.values()
            if table.state == "streaming"
            and self._holding.aliases(table.columns, soft=table.deletes == "soft")
            != {column.attnum: column.alias for column in table.columns if column.alias}
        ]

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
            self._change(self._evolved(table, rows), self._target(self.ledger.tables[table.oid]), rows, True)
            self._last_change[table.oid] = int(rows.commit_ts[-1])

    def _evolved(self, table: Table, rows: RelationRows) -> Table:
        """Return the table as `rows` describe it, brought to that."""
        before, relation = table, rows.relation
        moment = Moment(int(rows.lsn[0]), int(rows.seq[0]), int(rows.commit_ts[0]))
        names = (relation.namespace, relation.name)
        if names != (table.schema, table.name):
            table = self._evolution.rename(table, names, self._target(table), moment)
        table = self._evolution.follow(table, relation, self._target(table), moment)
        if table.columns != before.columns:
            self._evolution.show(table)
        return table

    def _masked(self, table: Table, rows: RelationRows) -> RelationRows:
        relation = rows.relation
        columns = [column.name for column in relation.columns]
        names = (str(table), str(relation))
        return mask_rows(rows, masks_of(self._holding.masks, table.oid, names, columns, relation.key))

    def _change(self, table: Table, target: str, rows: RelationRows, logged: bool) -> None:
        def log(changes: pa.Table) -> None:
            self.history.write(*table.here, changes)

        changes = decode_rows(dataclasses.replace(rows, relation=held(table, rows.relation)))
        logged = logged and self.history.root is not None
        apply(self.warehouse, table, target, changes, log if logged else None, limit=self._holding.limit)
        if logged:
            self._evolution.logged(table, int(rows.lsn[-1]))
        truncates = changes.xid[changes.op == ord("T")]
        if len(truncates):
            storage = truncated(table.storage, int(truncates[-1]))
            self.ledger.put(dataclasses.replace(self.ledger.tables[table.oid], storage=storage))

    # DDL that no change has followed

    def rename(self, table: Table, schema_name: str, name: str, at: int) -> None:
        """Give a table the name that it has in Postgres; `at`: microseconds since 1970 UTC.

        Raises:
            TableError: see `Evolution.rename`.
        """
        names, moment = (schema_name, name), Moment(self.position, 0, at)

        def work() -> None:
            self._evolution.rename(table, names, self._target(table), moment)
            self.ledger.record_files(self.history.settle())

        self._alone(work)
        self.history.publish()

    def follow(self, table: Table, relation: Relation, live: LiveTable, at: int) -> None:
        """Bring a table to the columns that it has in Postgres.

        Args:
            relation, live: the table as the catalog has it.
            at: microseconds since 1970 UTC.

        Raises:
            TableError: see `Evolution.follow`.
        """
        moment = Moment(self.position, 0, at)

        def work() -> None:
            self._evolution.show(self._evolution.follow(table, relation, self._target(table), moment, live))

        self._alone(work)

    def followed(self) -> list[tuple[Table, str]]:
        """Return what DDL was followed since the last call, and is durable: table, and what changed."""
        return self._evolution.take()

    # Copies

    def begin_copy(self, oid: int) -> None:
        """From the current position on, keep the table's changes for a copy that is about to be made."""
        self._alone(lambda: self._staging.begin(oid))

    def begin_rows(self, copied: CopiedTable) -> None:
        """Make room for the copy's rows; called once its snapshot is taken, and again if it had to be taken anew.

        Raises:
            TableError: DuckDB has no room for a table, or for columns, of these names.
        """
        self._alone(lambda: self._staging.begin_rows(copied))

    def stage(self, chunk: CopiedChunk) -> None:
        """Keep some copied rows, where readers do not look for them yet."""
        self._alone(lambda: self._staging.stage(chunk))
        reach("during_copy")

    def swap(self, copied: CopiedTable, files: Sequence[HistoryFile]) -> None:
        """Put the copy in the table's place, brought up to the checkpoint, and stream it from here on.

        Args:
            copied: its LSN is not beyond the checkpoint.
            files: what the history has of the copy's rows, under temporary names.

        Raises:
            TableError: it cannot be; the copy is lost.
        """
        assert copied.lsn <= self.position
        reach("before_swap")
        self.history.add(files)

        def work() -> None:
            self._staging.swap(copied)
            self.ledger.record_files(self.history.settle())

        self._alone(work)
        self.history.publish()
        reach("after_swap")

    def _target(self, table: Table) -> str:
        return self.warehouse.name(*table.here)

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
