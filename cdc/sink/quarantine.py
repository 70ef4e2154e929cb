"""Values that the type of their column cannot hold: NULL in the table, and as exact text in ``_cdc.quarantine``.

An entry names the change (LSN and seq) by which a row came to hold the value, and its row by key, where it has one;
`current` says whether the row still holds it. All of this takes a step per row, but only for tables that have such
values. It is part of the transaction that applies the changes.

A column with more such values than the limit becomes text (`Widen`), and so does a column of the key with the first.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa

from cdc.errors import TableError, Widen
from cdc.pgoutput.changes import TableChanges, Unfit
from cdc.pgoutput.types import ColumnType
from cdc.sink.holding import DELETED_AT
from cdc.sink.rows import DELETE, Sources
from cdc.sink.stored import StoredColumn, Table
from cdc.sink.warehouse import Warehouse, quote

__all__ = [
    "check_copy",
    "forget_columns",
    "forget_copy",
    "forget_table",
    "has_current",
    "hide_columns",
    "inherit",
    "is_lost",
    "keep",
    "keep_query",
    "key_sql",
    "key_texts",
    "record",
    "rekey",
    "rename_columns",
    "rename_table",
    "take_copy",
]

_KINDS = (pa.string(), pa.string(), pa.uint64(), pa.int64(), pa.bool_())
_OF_TABLE = "oid = ?"
_N = "_cdc_n".ljust(70, "_")  # longer than any name in Postgres


def inherit(warehouse: Warehouse, table: Table, changes: TableChanges, traced: Mapping[int, Sources]) -> None:
    """Add to `changes.unfit` the unchanged values that were in quarantine before: they still do not fit.

    Args:
        traced: by column index, where the unchanged values of `changes` come from.
    """
    for index, sources in traced.items():
        known = _texts(changes, index)
        from_here = zip(sources.rows.tolist(), sources.donors.tolist(), strict=True)
        found = {row: known[donor] for row, donor in from_here if donor in known}
        absent = sources.donors < 0
        if absent.any() and has_current(warehouse, table):
            keys = _key_texts(warehouse, changes)
            asked = {row: keys[at] for row, at in zip(sources.rows[absent], sources.keyed[absent], strict=True)}
            stored = _current(warehouse, table, table.columns[index], set(asked.values()))
            found |= {int(row): stored[key] for row, key in asked.items() if key in stored}
        if found:
            texts = dict(sorted((known | found).items()))
            others = [unfit for unfit in changes.unfit if unfit.column != index]
            changes.unfit[:] = [*others, Unfit(index, np.array(list(texts), np.int64), list(texts.values()))]


def record(warehouse: Warehouse, table: Table, changes: TableChanges, limit: int) -> None:
    """Keep what of `changes` does not fit; what they replace or delete is no longer current.

    Args:
        limit: so many values of a column, still held by rows, may be here.

    Raises:
        Widen: such a value is in a key column, which can hold no NULL, or there are too many of them in another.
        TableError: a key column that is text has a value that is none.
    """
    known = has_current(warehouse, table)
    if not changes.unfit and not known:
        return
    for unfit in changes.unfit:
        if unfit.column in changes.relation.key:
            raise _key_misfit(table, table.columns[unfit.column])
    keys = _key_texts(warehouse, changes) if changes.relation.key else None
    if known and keys is not None:
        with warehouse.view("_touched", pa.table({"key": pa.array(sorted(set(keys)))})):
            warehouse.execute(
                f"UPDATE _cdc.quarantine SET current = false WHERE {_OF_TABLE} AND current "
                "AND key IN (SELECT key FROM _touched)",
                [table.oid],
            )
    newest = {text: row for row, text in enumerate(keys)} if keys is not None else {}
    for unfit in changes.unfit:
        column, rows = table.columns[unfit.column], unfit.rows.tolist()
        # The row of a delete is what was; without a key every other row is there until one takes it.
        gone = (changes.op[unfit.rows] == DELETE).tolist()
        current = [not d and (keys is None or newest[keys[row]] == row) for row, d in zip(rows, gone, strict=True)]
        keyed = [keys[row] if keys is not None else None for row in rows]
        where = changes.lsn[unfit.rows].tolist(), changes.seq[unfit.rows].tolist()
        keep(warehouse, table, column, list(zip(keyed, unfit.texts, *where, current, strict=True)))
        if keys is None:
            for text, count in Counter(text for text, d in zip(unfit.texts, gone, strict=True) if d).items():
                _take(warehouse, table, column, text, count)
        _check_limit(warehouse, table, column, limit, "current")


def _key_misfit(table: Table, column: StoredColumn) -> TableError:
    if column.kind.duckdb != "VARCHAR":
        return _widen(table, column, "it identifies rows, and has a value")
    return TableError(
        f"key column {column.here} of {table} holds bytes that are no text: a row would have no key",
        table.oid,
        "the database has the encoding SQL_ASCII: leave the table out with CDC_TABLES, or mend what it holds",
    )


def _check_limit(warehouse: Warehouse, table: Table, column: StoredColumn, limit: int, which: str) -> None:
    if column.kind.duckdb == "VARCHAR":
        return  # no UTF-8: as text it does not fit any better
    sql = f"SELECT count(*) FROM _cdc.quarantine WHERE {_OF_TABLE} AND attnum = ? AND {which}"
    ((count,),) = warehouse.execute(sql, [table.oid, column.attnum])
    if count > limit:
        raise _widen(table, column, f"it has more than {limit} values")


def _widen(table: Table, column: StoredColumn, why: str) -> Widen:
    return Widen(
        f"column {column.here} of {table} becomes text: {why} that {column.kind.duckdb} cannot hold",
        table.oid,
        f"once Postgres has no such values any more, `cdc resync {table}` gives the column its type back",
        column.attnum,
    )


def check_copy(
    warehouse: Warehouse, table: Table, columns: Iterable[StoredColumn], key: Collection[str], limit: int
) -> None:
    """Check what a copy that is being made has brought so far; see `record`.

    Args:
        columns: those of which it brought some.
        key: names of the columns that identify a row.

    Raises:
        Widen, TableError: see `record`.
    """
    for column in columns:
        if column.here in key:
            raise _key_misfit(table, column)
        _check_limit(warehouse, table, column, limit, "lsn = 0")


def keep(
    warehouse: Warehouse, table: Table, column: StoredColumn, entries: Sequence[tuple[str | None, str, int, int, bool]]
) -> None:
    """Write `entries` of a column: key, text, lsn, seq and current of each."""
    if not entries:
        return
    arrays = [pa.array(values, kind) for values, kind in zip(zip(*entries, strict=True), _KINDS, strict=True)]
    with warehouse.view("_entries", pa.table(arrays, names=["key", "value", "lsn", "seq", "current"])):
        _insert(warehouse, table, column, "SELECT key, value, lsn, seq, current FROM _entries")


def keep_query(warehouse: Warehouse, table: Table, column: StoredColumn, query: str, moment: tuple[int, int]) -> None:
    """Write what `query` finds of a column: key and value of each deleted row; `moment`: LSN and seq."""
    lsn, seq = moment
    _insert(warehouse, table, column, f"SELECT key, value, {lsn}, {seq}, false FROM ({query}) AS found (key, value)")


def _insert(warehouse: Warehouse, table: Table, column: StoredColumn, query: str) -> None:
    names = "key, value, lsn, seq, current"
    warehouse.execute(
        f"INSERT INTO _cdc.quarantine (schema_name, table_name, oid, column_name, attnum, {names}) "
        f"SELECT ?, ?, ?, ?, ?, {names} FROM ({query}) AS entry ({names})",
        [table.schema, table.name, table.oid, column.here, column.attnum],
    )


def forget_columns(warehouse: Warehouse, table: Table, attnums: Collection[int]) -> None:
    """Columns are dropped: no row holds a value in them any more."""
    warehouse.execute(
        f"UPDATE _cdc.quarantine SET current = false WHERE {_OF_TABLE} AND list_contains(?, attnum)",
        [table.oid, list(attnums)],
    )


def forget_copy(warehouse: Warehouse, table: Table) -> None:
    """Delete what an unfinished copy has brought: what has LSN 0."""
    warehouse.execute(f"DELETE FROM _cdc.quarantine WHERE {_OF_TABLE} AND lsn = 0", [table.oid])


def take_copy(warehouse: Warehouse, table: Table, lsn: int) -> None:
    """A copy at `lsn` takes the place of the table: what it has brought is current, and nothing else."""
    here = [table.oid]
    # What was applied since then comes again, from the buffer.
    warehouse.execute(f"DELETE FROM _cdc.quarantine WHERE {_OF_TABLE} AND lsn >= ?", [*here, lsn])
    warehouse.execute(f"UPDATE _cdc.quarantine SET current = false WHERE {_OF_TABLE} AND lsn > 0", here)
    warehouse.execute(f"UPDATE _cdc.quarantine SET current = true, lsn = ? WHERE {_OF_TABLE} AND lsn = 0", [lsn, *here])


def hide_columns(warehouse: Warehouse, table: Table, attnums: Collection[int]) -> None:
    """Columns are masked or not published from now on: what rows held of them goes, and all keys from before."""
    warehouse.execute(
        f"DELETE FROM _cdc.quarantine WHERE {_OF_TABLE} AND lsn > 0 AND coalesce(list_contains(?, attnum), true)",
        [table.oid, list(attnums)],
    )
    warehouse.execute(
        f"UPDATE _cdc.quarantine SET key = NULL WHERE {_OF_TABLE} AND lsn > 0 AND NOT current", [table.oid]
    )


def rename_columns(warehouse: Warehouse, table: Table, names: Mapping[int, str]) -> None:
    """Columns (by attnum) have other names now; what a copy under way has brought has its own."""
    renamed = pa.table({"attnum": pa.array(names.keys(), pa.int32()), "name": pa.array(names.values(), pa.string())})
    with warehouse.view("_renamed", renamed):
        warehouse.execute(
            "UPDATE _cdc.quarantine AS q SET column_name = r.name FROM _renamed AS r "
            f"WHERE {_OF_TABLE} AND q.lsn > 0 AND q.attnum = r.attnum AND q.column_name <> r.name",
            [table.oid],
        )


def rekey(
    warehouse: Warehouse, table: Table, target: str, before: Sequence[tuple[str, str]], now: Sequence[tuple[str, str]]
) -> None:
    """Rows are told by other columns now, or by other names of them: so is what they hold.

    Args:
        target: the warehouse's table, quoted.
        before, now: see `key_sql`, with the table as t.
    """
    labels = f"SELECT {key_sql(before)} AS before, {key_sql(now)} AS now FROM {_living(table, target)}"
    warehouse.execute(
        f"UPDATE _cdc.quarantine AS q SET key = found.now FROM ({labels}) AS found "
        f"WHERE {_OF_TABLE} AND q.current AND q.key = found.before",
        [table.oid],
    )


def is_lost(warehouse: Warehouse, table: Table, target: str, now: Sequence[tuple[str, str]]) -> bool:
    """Whether there is a current value whose row cannot be told by its key; see `rekey`."""
    labels = f"SELECT coalesce({key_sql(now)}, '') FROM {_living(table, target)}"
    lost = f"(key IS NULL OR key NOT IN ({labels}))" if now else "key IS NOT NULL"
    sql = f"SELECT 1 FROM _cdc.quarantine WHERE {_OF_TABLE} AND current AND {lost} LIMIT 1"
    return bool(warehouse.execute(sql, [table.oid]))


def _living(table: Table, target: str) -> str:
    return f"{target} AS t" + (f" WHERE t.{quote(DELETED_AT)} IS NULL" if table.deletes == "soft" else "")


def forget_table(warehouse: Warehouse, table: Table) -> None:
    """A table is gone: no row holds anything any more."""
    warehouse.execute(f"UPDATE _cdc.quarantine SET current = false WHERE {_OF_TABLE}", [table.oid])


def rename_table(warehouse: Warehouse, table: Table, names: tuple[str, str]) -> None:
    """A table has another schema and name now."""
    warehouse.execute(
        f"UPDATE _cdc.quarantine SET schema_name = ?, table_name = ? WHERE {_OF_TABLE}",
        [*names, table.oid],
    )


def has_current(warehouse: Warehouse, table: Table) -> bool:
    """Whether a row of the table holds a value that is here."""
    sql = f"SELECT 1 FROM _cdc.quarantine WHERE {_OF_TABLE} AND current LIMIT 1"
    return bool(warehouse.execute(sql, [table.oid]))


def _current(warehouse: Warehouse, table: Table, column: StoredColumn, keys: set[str]) -> dict[str, str]:
    """Return, by key, the texts that the rows with these keys hold in a column."""
    with warehouse.view("_asked", pa.table({"key": pa.array(sorted(keys), pa.string())})):
        found = warehouse.execute(
            f"SELECT key, value FROM _cdc.quarantine WHERE {_OF_TABLE} AND attnum = ? AND current "
            "AND key IN (SELECT key FROM _asked)",
            [table.oid, column.attnum],
        )
    return dict(found)


def _take(warehouse: Warehouse, table: Table, column: StoredColumn, text: str, count: int) -> None:
    """Of the equal values of rows without a key, `count` are no longer held; which ones makes no difference."""
    where = f"{_OF_TABLE} AND attnum = ? AND value = ? AND current"
    which = [table.oid, column.attnum, text]
    warehouse.execute(
        f"UPDATE _cdc.quarantine SET current = false WHERE {where} AND (lsn, seq) IN "
        f"(SELECT (lsn, seq) FROM _cdc.quarantine WHERE {where} ORDER BY lsn, seq LIMIT {count})",
        [*which, *which],
    )


def _texts(changes: TableChanges, index: int) -> dict[int, str]:
    """Return, by row, the texts of a column that do not fit."""
    found = (unfit for unfit in changes.unfit if unfit.column == index)
    return {row: text for unfit in found for row, text in zip(unfit.rows.tolist(), unfit.texts, strict=True)}


def _key_texts(warehouse: Warehouse, changes: TableChanges) -> list[str]:
    """Return each row's key as a JSON object of texts; '' for a TRUNCATE."""
    key = [changes.relation.columns[i] for i in changes.relation.key]
    rows = pa.table([changes.columns[i] for i in changes.relation.key], names=[column.name for column in key])
    return key_texts(warehouse, rows, {column.name: column.kind for column in key})


def key_texts(warehouse: Warehouse, keys: pa.Table, kinds: Mapping[str, ColumnType]) -> list[str]:
    """Return each row of `keys` as a JSON object of texts, as DuckDB prints them; '' where one is NULL.

    Args:
        kinds: by name, how the columns are held.
    """
    label = key_sql([(name, kinds[name].load(quote(name))) for name in keys.column_names])
    with warehouse.view("_labelled", keys.append_column(_N, pa.array(np.arange(keys.num_rows)))):
        found = warehouse.execute(f"SELECT coalesce({label}, '') FROM _labelled ORDER BY {_N}")
    return [text for (text,) in found]


def key_sql(columns: Sequence[tuple[str, str]]) -> str:
    """Return SQL for the key of a row of the warehouse, as `key_texts` writes it.

    Args:
        columns: name and SQL value of each key column; none: the table has no key.
    """
    if not columns:
        return "NULL"
    parts = []
    for name, value in columns:
        head = (json.dumps(name) + ": ").replace("'", "''")
        parts.append(f"'{head}' || CAST(to_json(CAST({value} AS VARCHAR)) AS VARCHAR)")
    return "'{' || " + " || ', ' || ".join(parts) + " || '}'"
