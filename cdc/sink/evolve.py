"""Tables whose definition changes: what DDL has done in Postgres is done here, in the transaction of what follows it.

Column by column where that is certain (schema.py); where it is not, `Resync` asks for a new copy. What was done is
written down in ``_cdc.schema_changes``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence

import numpy as np
import pyarrow as pa

from cdc.errors import Resync, TableError
from cdc.failpoints import reach
from cdc.pgoutput.masks import refuse_renamed
from cdc.pgoutput.messages import Relation
from cdc.sink import quarantine, schema
from cdc.sink.apply import of_table
from cdc.sink.checkpoint import Ledger
from cdc.sink.columns import LiveTable, same
from cdc.sink.history import History, as_log
from cdc.sink.holding import DELETED_AT, Holding, table_alias
from cdc.sink.schema import Change
from cdc.sink.stored import SchemaChange, StoredColumn, Table
from cdc.sink.view import View, refresh
from cdc.sink.warehouse import Warehouse, folded, quote

__all__ = ["COPY_SEQ", "Evolution", "Moment", "truncation"]

COPY_SEQ = -(1 << 59)
"""_seq of a copy's T row; its S rows follow from COPY_SEQ + 1 on, all negative."""

_CHUNK_ROWS = 100_000


@dataclasses.dataclass(frozen=True, slots=True)
class Moment:
    """A place in the stream: the first change that has the new definition; where DDL has none, a position and seq 0.

    Attributes:
        at: commit time, microseconds since 1970 UTC.
    """

    lsn: int
    seq: int
    at: int


class Evolution:
    """Follows DDL in the open transaction, which others begin and end.

    State: since the last `take`, what was followed; per name, up to which LSN the history has changes.
    """

    def __init__(
        self,
        warehouse: Warehouse,
        ledger: Ledger,
        history: History,
        live: Callable[[int], LiveTable | None],
        holding: Holding,
        view: View | None,
    ) -> None:
        """Create one.

        Args:
            live: returns the published table with an OID as the catalog has it now, None if it is gone.
            holding: how columns are held.
            view: kept in step with its table.
        """
        self._warehouse = warehouse
        self._ledger = ledger
        self._history = history
        self._live = live
        self._holding = holding
        self._view = view
        self._viewed: int | None = None
        self._followed: list[tuple[Table, str]] = []
        self._logged: dict[tuple[str, str], int] = {}

    def take(self) -> list[tuple[Table, str]]:
        """Return what was followed since the last call: table, and what changed."""
        followed, self._followed = self._followed, []
        return followed

    def forget(self) -> None:
        """After a rollback: nothing was followed."""
        self._followed, self._logged = [], {}

    def logged(self, table: Table, lsn: int) -> None:
        """Note that the history has changes under this name up to `lsn`."""
        self._logged[table.here] = lsn

    def follow(
        self, table: Table, relation: Relation, target: str, moment: Moment, live: LiveTable | None = None
    ) -> Table:
        """Bring `target` (quoted) to the columns of `relation`; return the table as it is then.

        It is in state resyncing, if a copy has to make sure of its rows.

        Args:
            live: the table as the catalog has it; None: it is asked.

        Raises:
            Resync: only a new copy can.
            TableError: DuckDB cannot have columns of these names.
        """
        if same(table.columns, relation):
            return self._follow_key(table, set(relation.key), target, live)
        live = live or self._live(relation.oid)
        plan = schema.plan(target, table, relation, live, self._holding)
        if plan is None or live is None:
            raise Resync(f"the definition of {table} changed in a way that needs a new copy", table.oid)
        schema.refuse(table, plan.columns)
        with of_table(table):
            for statement, value in plan.statements:
                with self._warehouse.view("_value", pa.table({"value": [] if value is None else value})):
                    self._warehouse.execute(statement)
                reach("during_ddl_apply")
        before = {column.attnum: column.here for column in table.columns}
        after = {column.attnum: column.here for column in plan.columns}
        quarantine.forget_columns(self._warehouse, table, before.keys() - after.keys())
        quarantine.rename_columns(self._warehouse, table, after)
        self._rekey(table, plan.columns, target, live)
        self.hide(table, live.hidden & before.keys() - after.keys())
        table = dataclasses.replace(table, columns=plan.columns, natts=plan.natts)
        if plan.rewritten and table.state == "streaming":
            table = dataclasses.replace(table, state="resyncing", reason="")
        self._ledger.put(table)
        for change in plan.changes:
            self._note(table, moment, change)
        return table

    def _follow_key(self, table: Table, key: Collection[int], target: str, live: LiveTable | None) -> Table:
        """Note by which of its columns (their indexes) a table's rows are told from here on."""
        if all(column.is_key == (index in key) for index, column in enumerate(table.columns)):
            return table
        columns = tuple(dataclasses.replace(column, is_key=i in key) for i, column in enumerate(table.columns))
        self._rekey(table, columns, target, live)
        table = dataclasses.replace(table, columns=columns)
        self._ledger.put(table)
        return table

    def _rekey(self, table: Table, columns: Sequence[StoredColumn], target: str, live: LiveTable | None) -> None:
        """See that what is in quarantine is found by the key that `columns` have, which `target` has already.

        What is of a table whose key an earlier version has not noted stays as it is.

        Raises:
            Resync: the old key does not lead to the new one; a copy will have that.
        """
        before, now = ([column for column in those if column.is_key] for those in (table.columns, columns))
        unknown = any(column.is_key is None for column in table.columns)
        if unknown or before == now or not quarantine.has_current(self._warehouse, table):
            return
        there = {column.attnum: f"t.{quote(column.here)}" for column in columns}
        labels = [(column.here, there[column.attnum]) for column in now]
        if before and all(column.attnum in there for column in before):
            old = [(column.here, there[column.attnum]) for column in before]
            quarantine.rekey(self._warehouse, table, target, old, labels)
        if not quarantine.is_lost(self._warehouse, table, target, labels):
            return
        live = live or self._live(table.oid)
        # Else the catalog is ahead, and another key will come; or it says otherwise for good, as of a partitioned
        # table whose index is not valid yet: then a copy would have that, and begin again and again.
        if live is not None and {c.attnum for c in live.columns if c.is_key} == {c.attnum for c in now}:
            raise Resync(f"{table} has another key, and some of its values are in the quarantine", table.oid)

    def hide(self, table: Table, attnums: Collection[int]) -> None:
        """What was kept of columns that are masked or not published from now on goes."""
        if attnums:
            quarantine.hide_columns(self._warehouse, table, attnums)
            self._ledger.hide_defaults(table, attnums)

    def rename(self, table: Table, names: tuple[str, str], target: str, moment: Moment) -> Table:
        """Give a mirrored table its new schema and name, here and in the history; return it as it is then.

        The history has a folder per name: the new one begins with the rows that the table has.

        Args:
            names: schema and name.
            target: its present name, quoted.

        Raises:
            Resync: only a new copy can.
            TableError: the name is taken by something that is not ours.
            MaskError: its masks go by the old name.
        """
        refuse_renamed(
            self._holding.masks,
            table.oid,
            (str(table), ".".join(names)),
            [column.name for column in table.columns],
            was_masked=any(column.mask for column in table.columns),
        )
        if any(name.startswith(f"{'.'.join(names)}.") for name in self._holding.masks):
            raise Resync(f"{table} is {'.'.join(names)} now, which has masks", table.oid)
        alias = table_alias(self._ledger.tables.values(), table.oid, *names)
        renamed = dataclasses.replace(table, schema=names[0], name=names[1], alias=alias)
        if self._history.root is not None and self._logged.get(renamed.here) == moment.lsn:
            raise Resync(f"{table} is {'.'.join(names)} now, a name that the same transaction used before", table.oid)
        self.make_room(renamed)
        self.move(table, renamed, target)
        quarantine.rename_table(self._warehouse, table, names)
        self._ledger.put(renamed)
        known = f", which is {'.'.join(renamed.here)} here" if alias else ""
        self._note(renamed, moment, Change(f"table {table} renamed to {renamed}{known}"))
        self._log_rows(renamed, moment)
        self.show(renamed, of=str(table))
        return renamed

    def move(self, table: Table, renamed: Table, source: str) -> None:
        """Give the DuckDB table `source` (quoted) the names of `renamed`."""
        target = self._warehouse.name(*renamed.here)
        with of_table(table):
            if folded(renamed.schema) == folded(table.schema):
                detour = f"_cdc_moved_{table.oid}"  # DuckDB ignores case: `t` is in the way of `T`
                self._warehouse.execute(f"ALTER TABLE {source} RENAME TO {quote(detour)}")
                source = self._warehouse.name(table.schema, detour)
                self._warehouse.execute(f"ALTER TABLE {source} RENAME TO {quote(renamed.here[1])}")
            else:
                self._warehouse.execute(f"CREATE SCHEMA IF NOT EXISTS {self._warehouse.name(renamed.schema)}")
                self._warehouse.execute(f"CREATE TABLE {target} AS FROM {source}")
                self._warehouse.execute(f"DROP TABLE {source}")

    def make_room(self, table: Table) -> None:
        """Take a table's name here from what has it: what is gone goes, and what has another name by now will tell.

        Raises:
            TableError: it is none of ours.
        """
        oid, wanted = table.oid, folded(*table.here)
        for other in list(self._ledger.tables.values()):
            if other.oid == oid or folded(*other.here) != wanted:
                continue
            target = self._warehouse.name(*other.here)
            if other.state == "dropped":  # and a table was created under its name, which has a new OID
                self._warehouse.execute(f"DROP TABLE IF EXISTS {target}")
                self._ledger.forget(other.oid)
                quarantine.forget_table(self._warehouse, other)
            if other.state == "dropped" or other.copy_lsn is None:
                continue
            aside = dataclasses.replace(other, name=f"_cdc_moved_{other.oid}", alias="")
            self._warehouse.execute(f"ALTER TABLE {target} RENAME TO {quote(aside.name)}")
            quarantine.rename_table(self._warehouse, other, (aside.schema, aside.name))
            if any(column.mask for column in other.columns):
                reason = f"table {other} has another name now, and CDC_MASK goes by the old one"
                aside = dataclasses.replace(aside, state="error", reason=reason)
            self._ledger.put(aside)
        self.refuse_stranger(table)

    def refuse_stranger(self, table: Table) -> None:
        """Refuse to replace what is none of ours.

        Raises:
            TableError: it has the table's name here.
        """
        if schema.strangers(self._warehouse, self._ledger.tables.values(), [table.here]):
            raise TableError(
                f"DuckDB has a {'.'.join(table.here)} that cdc did not make and would have to replace",
                table.oid,
                "rename it, or leave the table out with CDC_TABLES; then `cdc resync` the table",
            )

    def show(self, table: Table, of: str = "") -> None:
        """Make the view anew, if `table` is the one that it shows; `of`: the name by which it did until now."""
        if self._view is not None and self._view.table in (str(table), of):
            self._viewed = table.oid
        if self._view is not None and self._viewed == table.oid:
            refresh(self._warehouse, self._view, table)

    def _log_rows(self, table: Table, moment: Moment) -> None:
        """Begin the history of a table under its new name with a copy of what it has."""
        if self._history.root is None:
            return
        self._history.write(*table.here, truncation(moment.lsn, table.columns))
        kinds = [column.kind for column in table.columns]
        picks = ", ".join(c.kind.unload(quote(c.here)) for c in table.columns)
        where = f"WHERE {quote(DELETED_AT)} IS NULL" if table.deletes == "soft" else ""
        found = self._warehouse.batches(f"SELECT {picks} FROM {self._warehouse.name(*table.here)} {where}", _CHUNK_ROWS)
        seq = COPY_SEQ + 1
        for batch in found:
            n = batch.num_rows
            log = as_log(
                np.full(n, ord("S"), np.uint8),
                np.full(n, moment.lsn, np.uint64),
                np.arange(seq, seq + n),
                np.zeros(n, np.uint32),
                np.full(n, moment.at, np.int64),
                [column.here for column in table.columns],
                [batch.column(i).cast(kind.arrow) for i, kind in enumerate(kinds)],
            )
            seq += n
            file = self._history.describe(*table.here, log)
            self._history.write_temporary(file, log)
            self._history.add([file])
        self.logged(table, moment.lsn)

    def _note(self, table: Table, moment: Moment, change: Change) -> None:
        noted = SchemaChange(
            moment.lsn, moment.seq, change.text, change.old_name, change.new_name, change.default, change.attnum
        )
        self._ledger.record_change(table, noted)
        self._followed.append((table, change.text))


def truncation(lsn: int, columns: tuple[StoredColumn, ...]) -> pa.Table:
    """Return the T row with which every copy begins, so that an emptied table replays too."""
    nulls = {column.here: schema.nulls(column) for column in columns}
    return as_log(
        np.array([ord("T")], np.uint8),
        np.array([lsn], np.uint64),
        np.array([COPY_SEQ], np.int64),
        np.array([0], np.uint32),
        np.array([0], np.int64),
        list(nulls),
        list(nulls.values()),
    )
