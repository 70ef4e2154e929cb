"""The changes of one table, applied to one DuckDB table, inside the transaction that is open.

    resolve    values of unchanged TOAST, from earlier in the batch, else from the warehouse at the OLD key
    collapse   last change per key
    write      DELETE ... USING, then INSERT; no PRIMARY KEY, no MERGE (doc: docs/internals)

The order of what it is given is the order of the stream. Applied twice it would be wrong: the checkpoint, moved in the
same transaction, is what keeps that from happening.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cdc.errors import TableError
from cdc.failpoints import reach
from cdc.pgoutput.changes import TableChanges
from cdc.pgoutput.types import ColumnType
from cdc.sink import quarantine, rows
from cdc.sink.history import as_log
from cdc.sink.holding import DELETED_AT
from cdc.sink.stored import Table
from cdc.sink.warehouse import Warehouse, folded, quote

__all__ = ["LOCAL_ROWS", "LOOK_UP_BYTES", "apply", "insert", "of_table"]

LOOK_UP_BYTES = 64_000_000
"""How much is looked up at once for unchanged values."""

LOCAL_ROWS = 36_028_797_018_960_000
"""The rowid from which on rows are those that the open transaction has inserted (DuckDB's MAX_ROW_ID).

DuckDB 2.0.0 overwrites memory, of other tables too, when a DELETE or UPDATE joins on rowid and finds rows of both
kinds. So each kind has a statement of its own.
"""


def apply(
    warehouse: Warehouse,
    table: Table,
    target: str,
    changes: TableChanges,
    log: Callable[[pa.Table], None] | None,
    *,
    limit: int,
) -> None:
    """Apply `changes` to the DuckDB table `target` (quoted).

    Args:
        table: whose changes these are, and how its deletes are kept.
        log: takes the resolved changes for the history; None: they are in there already.
        limit: so many values of a column that do not fit may be in quarantine.

    Raises:
        TableError: this table cannot be brought to where Postgres has it.
    """
    work = _Work(warehouse, table, target, limit)
    with of_table(table):
        for segment in rows.segments(changes):
            if segment.op[0] == rows.TRUNCATE:
                work.truncate(int(segment.commit_ts[0]))
            for part in work.bearable(segment):
                resolved = work.resolve(part)
                if log is not None:
                    names = [column.name for column in resolved.relation.columns]
                    meta = (resolved.op, resolved.lsn, resolved.seq, resolved.xid, resolved.commit_ts)
                    log(as_log(*meta, names, resolved.columns))
                reach("mid_duck_apply")
                work.write(resolved)


@contextlib.contextmanager
def of_table(table: Table) -> Iterator[None]:
    """Make what DuckDB holds against this one table's definition or values an error of this table."""
    try:
        yield
    except (duckdb.ProgrammingError, duckdb.DataError, duckdb.IntegrityError, duckdb.NotSupportedError) as error:
        reason = str(error).splitlines()[0]
        raise TableError(f"table {table} cannot be applied: {reason}", table.oid, f"cdc resync {table}") from error


# Names of working columns beside those of a table: longer than any name in Postgres.
_N, _AT, _ASIDE = (f"_cdc_{name}".ljust(70, "_") for name in ("n", "at", "aside"))


class _Work:
    """One table's part of one batch."""

    def __init__(self, warehouse: Warehouse, table: Table, target: str, limit: int) -> None:
        self.warehouse = warehouse
        self.table = table
        self.target = target
        self.soft = table.deletes == "soft"
        self.limit = limit

    def truncate(self, commit_ts: int) -> None:
        if self.soft:
            sql = (
                f"UPDATE {self.target} SET {quote(DELETED_AT)} = make_timestamptz(?) WHERE {quote(DELETED_AT)} IS NULL"
            )
            self.warehouse.execute(sql, [commit_ts])
        else:
            self.warehouse.execute(f"DELETE FROM {self.target}")
        quarantine.forget_table(self.warehouse, self.table)

    def bearable(self, changes: TableChanges) -> Iterator[TableChanges]:
        """Cut `changes` so that what has to be looked up for each part fits into memory.

        An unchanged value is one byte of the batch, whatever its size in the warehouse.
        """
        if not changes.unchanged or len(changes.op) == 1 or self._stored_bytes(changes) <= LOOK_UP_BYTES:
            yield changes
            return
        parts = list(rows.halves(changes))
        if len(parts) == 1:
            yield changes
            return
        for part in parts:
            yield from self.bearable(part)

    def _stored_bytes(self, changes: TableChanges) -> int:
        """Return about how much the unchanged values of `changes` are in the warehouse."""
        asking = np.flatnonzero(np.logical_or.reduce(list(changes.unchanged.values())))
        keyed = np.where(changes.op[asking] == rows.INSERT, asking - 1, asking)  # an I follows the D of the old key
        sizes = [_size(changes, i) for i in changes.unchanged]
        if not changes.relation.key:
            return 0
        with self.warehouse.view("_need", self._keys(changes, keyed)):
            ((size,),) = self.warehouse.execute(
                f"SELECT coalesce(sum({' + '.join(sizes)}), 0)::BIGINT FROM {self._keyed('_need', changes)} n "
                f"JOIN {self.target} t ON {self._match(changes, 'n')}"
            )
        return int(size)

    def resolve(self, changes: TableChanges) -> TableChanges:
        """Return `changes` with every unchanged value filled in."""
        if not changes.unchanged:
            return changes
        key = changes.relation.key
        if not key:
            raise TableError(
                f"table {self.table} has unchanged values but no key to find them by", self.table.oid, "cdc resync it"
            )
        codes = rows.key_codes([changes.columns[i] for i in key])
        traced = {i: rows.trace(codes, changes.op, mask) for i, mask in changes.unchanged.items()}
        asked = np.unique(np.concatenate([s.keyed[s.donors < 0] for s in traced.values()]))
        stored = self._look_up(changes, asked, sorted(traced)) if len(asked) else None
        columns = list(changes.columns)
        for index, sources in traced.items():
            pool = columns[index]
            take = np.arange(len(pool))
            take[sources.rows] = sources.donors
            absent = sources.donors < 0
            if stored is not None:
                pool = pa.concat_arrays([pool, stored[index]])
                take[sources.rows[absent]] = len(columns[index]) + np.searchsorted(asked, sources.keyed[absent])
            columns[index] = pool.take(pa.array(take))
        quarantine.inherit(self.warehouse, self.table, changes, traced)
        changes.columns[:] = columns
        changes.unchanged.clear()
        return changes

    def _look_up(
        self, changes: TableChanges, asked: npt.NDArray[np.int64], wanted: Sequence[int]
    ) -> dict[int, pa.Array]:
        """Return, per column index in `wanted`, the warehouse's values of the rows with the keys of rows `asked`."""
        need = self._keys(changes, asked).append_column(_N, pa.array(np.arange(len(asked))))
        picks = ", ".join(f"{_kind(changes, i).unload(f't.{_name(changes, i)}')} AS c{i}" for i in wanted)
        with self.warehouse.view("_need", need):
            found = self.warehouse.arrow(
                f"SELECT n.{_N}, {picks} FROM {self._keyed('_need', changes, _N)} n JOIN {self.target} t "
                f"ON {self._match(changes, 'n')}"
            )
        # Not by DuckDB, which needs the memory for all of it twice to sort long values.
        found = found.take(pa.array(np.argsort(found[_N].to_numpy())))
        if found.num_rows != len(asked):
            raise self._missing(len(asked) - found.num_rows)
        return {i: _one(found[f"c{i}"]).cast(changes.columns[i].type) for i in wanted}

    def write(self, changes: TableChanges) -> None:
        """Bring the target to where resolved `changes` leave it."""
        op = changes.op
        quarantine.record(self.warehouse, self.table, changes, self.limit)
        new = self._told_of_absence or not changes.relation.key
        if not self.soft and new and (op == rows.INSERT).all():
            self._insert(changes, None, None)
        elif changes.relation.key:
            self._write_keyed(changes)
        else:
            self._write_unkeyed(changes)

    def _write_keyed(self, changes: TableChanges) -> None:
        live = np.flatnonzero(changes.op != rows.TRUNCATE)
        if not len(live):
            return
        op = changes.op[live]
        kept = rows.collapse(rows.key_codes([changes.columns[i].take(live) for i in changes.relation.key]), op)
        gone = op[kept.last] == rows.DELETE
        if not self.soft:
            # A key whose first change is an insert cannot be here yet: Postgres has it unique. But who is not told of
            # deletes does not know that it went.
            here = op[kept.first] != rows.INSERT if self._told_of_absence else np.ones(len(kept.first), np.bool_)
            self._delete(changes, live[kept.last[here]])
            self._insert(changes, live[kept.last[~gone]], None)
            return
        valued = kept.valued >= 0
        self._mark(changes, live[kept.last[~valued]])  # first: of keys that are equal, one may print otherwise
        self._delete(changes, live[kept.last[valued]])  # a key that has come back replaces its tombstone
        stamps = np.where(gone, changes.commit_ts[live[kept.last]], -1)[valued]
        self._insert(changes, live[kept.valued[valued]], stamps)

    @property
    def _told_of_absence(self) -> bool:
        return {"d", "t"} <= self.table.publishes

    def _write_unkeyed(self, changes: TableChanges) -> None:
        """Tables without a key: inserts as they are; under FULL each delete takes one row that is equal throughout."""
        added = np.flatnonzero(changes.op == rows.INSERT)
        self._insert(changes, added, np.full(len(added), -1) if self.soft else None)
        gone = np.flatnonzero(changes.op == rows.DELETE)
        if not len(gone):
            return
        taken = self._take_equal(changes, gone)
        if taken != len(gone):
            raise self._missing(len(gone) - taken)

    def _take_equal(self, changes: TableChanges, gone: npt.NDArray[np.int64]) -> int:
        """Delete one row of the target for each of the rows `gone`; return how many there were."""
        hidden = next((c.name for c in changes.relation.columns if folded(c.name) == folded("rowid")), None)
        if hidden is None:
            return self._take_by_number(changes, gone, {})
        # A column of that name hides DuckDB's row numbers, which tell equal rows apart.
        self.warehouse.execute(f"ALTER TABLE {self.target} RENAME COLUMN {quote(hidden)} TO {quote(_ASIDE)}")
        taken = self._take_by_number(changes, gone, {hidden: _ASIDE})
        self.warehouse.execute(f"ALTER TABLE {self.target} RENAME COLUMN {quote(_ASIDE)} TO {quote(hidden)}")
        return taken

    def _take_by_number(self, changes: TableChanges, gone: npt.NDArray[np.int64], renamed: Mapping[str, str]) -> int:
        every = range(len(changes.relation.columns))
        names = [column.name for column in changes.relation.columns]
        exact = {i: _kind(changes, i).exact(f"a.{quote(renamed.get(names[i], names[i]))}") for i in every}
        equal = " AND ".join(f"{exact[i]} IS NOT DISTINCT FROM g.c{i}" for i in every)
        same = " AND ".join(f"a.c{i} IS NOT DISTINCT FROM g.c{i}" for i in every)
        codes = ", ".join(f"c{i}" for i in every)
        given = ", ".join(
            _kind(changes, i).exact(_kind(changes, i).load(_name(changes, i))) + f" AS c{i}" for i in every
        )
        picks = ", ".join(f"{exact[i]} AS c{i}" for i in every)
        table = _relation_table(changes, gone).append_column(_AT, pa.array(changes.commit_ts[gone]))
        with self.warehouse.view("_gone", table):
            self.warehouse.execute(
                f"""CREATE OR REPLACE TEMP TABLE _taken AS
                WITH gone AS (
                    SELECT *, row_number() OVER (PARTITION BY {codes} ORDER BY moment) AS nth
                    FROM (SELECT {given}, {_AT} AS moment FROM _gone)),
                alive AS (
                    SELECT *, row_number() OVER (PARTITION BY {codes} ORDER BY place) AS nth
                    FROM (SELECT a.rowid AS place, {picks} FROM {self.target} a SEMI JOIN gone g ON {equal}
                        {f"WHERE a.{quote(DELETED_AT)} IS NULL" if self.soft else ""}))
                SELECT a.place, make_timestamptz(g.moment) AS stamp
                FROM alive a JOIN gone g ON {same} AND a.nth = g.nth"""
            )
        taken = 0
        for kind in (f"place < {LOCAL_ROWS}", f"place >= {LOCAL_ROWS}"):
            rows_of_kind = f"(SELECT * FROM _taken WHERE {kind})"
            if self.soft:
                sql = f"UPDATE {self.target} AS t SET {quote(DELETED_AT)} = k.stamp FROM {rows_of_kind} k"
            else:
                sql = f"DELETE FROM {self.target} AS t USING {rows_of_kind} k"
            ((count,),) = self.warehouse.execute(f"{sql} WHERE t.rowid = k.place")
            taken += count
        self.warehouse.execute("DROP TABLE _taken")
        return taken

    def _delete(self, changes: TableChanges, which: npt.NDArray[np.int64]) -> None:
        if len(which):
            with self.warehouse.view("_keys", self._keys(changes, which)):
                keys = self._keyed("_keys", changes)
                self.warehouse.execute(
                    f"DELETE FROM {self.target} AS t USING {keys} k WHERE {self._match(changes, 'k')}"
                )

    def _mark(self, changes: TableChanges, which: npt.NDArray[np.int64]) -> None:
        """Soft-delete the rows with the keys of rows `which`."""
        if len(which):
            keys = self._keys(changes, which).append_column(_AT, pa.array(changes.commit_ts[which]))
            with self.warehouse.view("_keys", keys):
                self.warehouse.execute(
                    f"UPDATE {self.target} AS t SET {quote(DELETED_AT)} = make_timestamptz(k.{_AT}) "
                    f"FROM {self._keyed('_keys', changes, _AT)} k "
                    f"WHERE {self._match(changes, 'k')} AND t.{quote(DELETED_AT)} IS NULL"
                )

    def _insert(
        self, changes: TableChanges, which: npt.NDArray[np.int64] | None, deleted_at: npt.NDArray[np.int64] | None
    ) -> None:
        """Insert rows `which` (None: all).

        Args:
            deleted_at: microseconds since 1970 UTC, -1 for a living row; None: there is no such column.
        """
        if which is not None and not len(which):
            return
        table = _relation_table(changes, which)
        kinds = {column.name: column.kind for column in changes.relation.columns}
        if deleted_at is not None:
            stamps = pa.array(deleted_at, mask=deleted_at < 0).cast(pa.timestamp("us", "UTC"))
            table = table.append_column(DELETED_AT, stamps)
        insert(self.warehouse, self.target, table, kinds)

    def _keys(self, changes: TableChanges, which: npt.NDArray[np.int64]) -> pa.Table:
        key = changes.relation.key
        names = [changes.relation.columns[i].name for i in key]
        return pa.table([changes.columns[i].take(which) for i in key], names=names)

    def _keyed(self, view: str, changes: TableChanges, extra: str = "") -> str:
        return f"(SELECT {self._casts(changes, changes.relation.key)}{', ' + extra if extra else ''} FROM {view})"

    def _match(self, changes: TableChanges, alias: str) -> str:
        names = [quote(changes.relation.columns[i].name) for i in changes.relation.key]
        return " AND ".join(f"t.{name} = {alias}.{name}" for name in names)

    def _casts(self, changes: TableChanges, which: Iterable[int]) -> str:
        return ", ".join(f"{_kind(changes, i).load(_name(changes, i))} AS {_name(changes, i)}" for i in which)

    def _missing(self, count: int) -> TableError:
        return TableError(
            f"{count} changed rows of {self.table} are not in the warehouse: somebody else has written to the table",
            self.table.oid,
            f"copy it anew with: cdc resync {self.table}",
        )


def insert(warehouse: Warehouse, target: str, table: pa.Table, kinds: Mapping[str, ColumnType]) -> None:
    """Insert all rows of `table` into `target` (quoted), by column name.

    Args:
        kinds: by name, how columns are held; others are as Arrow has them.
    """
    names = ", ".join(quote(name) for name in table.column_names)
    values = ", ".join(kinds[n].load(quote(n)) if n in kinds else quote(n) for n in table.column_names)
    with warehouse.view("_rows", table):
        warehouse.execute(f"INSERT INTO {target} ({names}) SELECT {values} FROM _rows")


def _relation_table(changes: TableChanges, which: npt.NDArray[np.int64] | None) -> pa.Table:
    """Return rows `which` (None: all) as a table with the relation's column names."""
    names = [column.name for column in changes.relation.columns]
    return pa.table(changes.columns if which is None else [c.take(which) for c in changes.columns], names=names)


def _name(changes: TableChanges, index: int) -> str:
    return quote(changes.relation.columns[index].name)


def _kind(changes: TableChanges, index: int) -> ColumnType:
    """Return how a column is held."""
    return changes.relation.columns[index].kind


def _size(changes: TableChanges, index: int) -> str:
    """Return SQL for about how many bytes a column's value in the warehouse takes."""
    name, kind = f"t.{_name(changes, index)}", _kind(changes, index).duckdb
    if kind == "BLOB":
        return f"coalesce(octet_length({name}), 0)"
    return f"coalesce(strlen({name if kind == 'VARCHAR' else f'CAST({name} AS VARCHAR)'}), 0)"


def _one(column: pa.ChunkedArray) -> pa.Array:
    combined = column.combine_chunks()
    return combined if isinstance(combined, pa.Array) else pa.concat_arrays(combined.chunks)
