"""Soft-deleted rows, carried from what a copy replaces into the copy, which has none but those deleted since.

Columns are the same by attnum, whatever their names are, and only if they are masked alike. Where types differ, values
take the way of Postgres' text; what cannot is NULL, and in quarantine.

What the old content has alive and the copy has not was deleted while nobody followed the table. That can be told only
by keys that print as they did; where they do not, rows that are known to be deleted are all that is carried.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence

import pyarrow as pa

from cdc.sink import quarantine
from cdc.sink.holding import DELETED_AT
from cdc.sink.storage import rewritten
from cdc.sink.stored import StoredColumn, Table
from cdc.sink.warehouse import Warehouse, quote

__all__ = ["carry"]

_CHUNK_ROWS = 1000  # values may be large

_NUMBER = re.compile(r"SMALLINT|INTEGER|BIGINT|DECIMAL\(.*\)")
_DATED = re.compile(r"DATE|TIMESTAMP( WITH TIME ZONE)?")
# What DuckDB prints of these is what Postgres prints, but for where dates have their BC.
_TEXTUAL = re.compile(rf"{_NUMBER.pattern}|{_DATED.pattern}|VARCHAR|BOOLEAN|UUID|JSON|TIME")

_VARYING = (25, 1043)  # text, and varchar of any length
_FIRST_OF_USERS = 16384


@dataclasses.dataclass(frozen=True, slots=True)
class _Carried:
    """A column that old content and copy have."""

    old: StoredColumn
    new: StoredColumn

    @property
    def is_same(self) -> bool:
        return self.old.kind.duckdb == self.new.kind.duckdb

    @property
    def prints_alike(self) -> bool:
        """Whether a value that nobody has changed is the same on both sides, but for types of the user's."""
        old, new = self.old, self.new
        varying = old.type_oid in _VARYING and new.type_oid in _VARYING
        return self.is_same and (varying or (old.type_oid, old.typmod) == (new.type_oid, new.typmod))

    @property
    def is_parsed(self) -> bool:
        """Whether what is there is read as what Postgres prints."""
        before, after = self.old.kind.duckdb, self.new.kind.duckdb
        numbers = _NUMBER.fullmatch(before) and _NUMBER.fullmatch(after)
        return not (self.is_same or numbers or after == "VARCHAR") and bool(_TEXTUAL.fullmatch(before))

    @property
    def text(self) -> str:
        """SQL for what Postgres prints, or something like it, with the old content as t."""
        text = f"CAST({self._here} AS VARCHAR)"
        if not _DATED.fullmatch(self.old.kind.duckdb):
            return text
        return rf"regexp_replace({text}, '^(\S+) \(BC\)(.*)$', '\1\2 BC')"

    @property
    def value(self) -> str:
        """SQL for what becomes of a value that is not parsed, with the old content as t; NULL: it does not fit."""
        if self.is_same:
            return self._here
        if self.new.kind.duckdb == "VARCHAR" and _TEXTUAL.fullmatch(self.old.kind.duckdb):
            return self.text
        numbers = _NUMBER.fullmatch(self.old.kind.duckdb) and _NUMBER.fullmatch(self.new.kind.duckdb)
        return f"TRY_CAST({self._here if numbers else 'NULL'} AS {self.new.kind.duckdb})"

    @property
    def _here(self) -> str:
        return f"t.{quote(self.old.here)}"


def carry(warehouse: Warehouse, old: Table, new: Table, staging: str, moment: tuple[int, int]) -> None:
    """Copy soft-deleted rows of a table into its copy, which has come to the same place of the stream.

    Args:
        old, new: the table, and its copy.
        staging: the copy, quoted.
        moment: LSN and seq of what goes into quarantine.
    """
    there = "SELECT 1 FROM duckdb_tables() WHERE lower(schema_name) = lower(?) AND table_name = ?"
    if old.deletes != "soft" or not warehouse.execute(there, list(old.here)):
        return
    before = {column.attnum: column for column in old.columns}
    carried = [
        _Carried(before[column.attnum], column)
        for column in new.columns
        if column.attnum in before and before[column.attnum].mask == column.mask
    ]
    keys = [each for each in carried if each.new.is_key]
    if len(keys) < sum(1 for column in new.columns if column.is_key):
        return
    _take(warehouse, carried, warehouse.name(*old.here), staging, keys if _tells(old, new, keys) else ())
    found, values = "_cdc_gone AS g", {each.new.attnum: f"g.value_{each.new.attnum}" for each in carried}
    for each in carried:
        if each.is_parsed:
            attnum = each.new.attnum
            read = _parse(warehouse, each.new)
            found += f" LEFT JOIN {read} ON {read}.n = g.n"
            values[attnum] = f"{read}.value"
    _put(warehouse, new, carried, staging, (found, values), moment)
    for each in carried:
        warehouse.execute(f"DROP TABLE IF EXISTS _cdc_read_{each.new.attnum}")
    warehouse.execute("DROP TABLE _cdc_gone")


def _tells(old: Table, new: Table, keys: Sequence[_Carried]) -> bool:
    """Whether a row that is alive in the old content, and whose key the copy has not, was deleted."""
    if not keys or not all(each.prints_alike for each in keys):
        return False
    followed = old.state == "resyncing" and not old.reason
    if followed and rewritten(old.storage, new.storage):
        return False  # what was deleted is known, and the key may have been written anew
    before, now = json.loads(old.types), json.loads(new.types)
    printed_anew = any(before[part] != now[part] for part in before.keys() & now.keys())
    return not (printed_anew and any(each.new.type_oid >= _FIRST_OF_USERS for each in keys))


def _take(
    warehouse: Warehouse, carried: Sequence[_Carried], target: str, staging: str, telling: Sequence[_Carried]
) -> None:
    """Put what may have to be carried into a table of its own; `telling`: the key, if absent rows were deleted."""
    deleted = f"t.{quote(DELETED_AT)}"
    picks = [f"coalesce({deleted}, now()) AS deleted_at", "row_number() OVER () AS n"]
    for each in carried:
        if not each.is_parsed:
            picks.append(f"{each.value} AS value_{each.new.attnum}")
        if not each.is_same:
            picks.append(f"{each.text} AS text_{each.new.attnum}")
    where = f"{deleted} IS NOT NULL"
    if telling:
        same = " AND ".join(f"s.{quote(each.new.here)} = {each.value}" for each in telling)
        where += f" OR NOT EXISTS (SELECT 1 FROM {staging} AS s WHERE {same})"
    warehouse.execute(
        f"CREATE OR REPLACE TEMP TABLE _cdc_gone AS SELECT {', '.join(picks)} FROM {target} AS t WHERE {where}"
    )


def _parse(warehouse: Warehouse, column: StoredColumn) -> str:
    """Read the texts of a column by the parser of its new type; return the name of a table with n and value of each."""
    name, kind, text = f"_cdc_read_{column.attnum}", column.kind, f"text_{column.attnum}"
    warehouse.execute(f"CREATE OR REPLACE TEMP TABLE {name} (n BIGINT, value {kind.duckdb})")
    ((count,),) = warehouse.execute("SELECT count(*) FROM _cdc_gone")
    for low in range(0, count, _CHUNK_ROWS):
        some = f"n > {low} AND n <= {low + _CHUNK_ROWS} AND {text} IS NOT NULL"
        found = warehouse.arrow(f"SELECT n, {text} AS text FROM _cdc_gone WHERE {some}")
        texts = pa.concat_arrays([pa.array([], pa.string()), *(c.cast(pa.string()) for c in found["text"].chunks)])
        parsed, _ = kind.parse(texts)
        with warehouse.view("_parsed", pa.table({"n": found["n"], "value": parsed})):
            warehouse.execute(f"INSERT INTO {name} SELECT n, TRY({kind.load('_parsed.value')}) FROM _parsed")
    return name


def _put(
    warehouse: Warehouse,
    new: Table,
    carried: Sequence[_Carried],
    staging: str,
    source: tuple[str, dict[int, str]],
    moment: tuple[int, int],
) -> None:
    """Insert rows that the copy has not, and keep what of them does not fit.

    Args:
        source: SQL for the rows that may have to be carried, with n and deleted_at; by attnum, for their values.
    """
    found, values = source
    keys = [(each.new.here, values[each.new.attnum]) for each in carried if each.new.is_key]
    names = ", ".join([*(quote(each.new.here) for each in carried), quote(DELETED_AT)])
    picks = ", ".join([*(values[each.new.attnum] for each in carried), "g.deleted_at"])
    if keys:
        matched = " AND ".join(f"s.{quote(name)} = {value}" for name, value in keys)
        there = " AND ".join(f"{value} IS NOT NULL" for _, value in keys)
        found += f" WHERE {there} AND NOT EXISTS (SELECT 1 FROM {staging} AS s WHERE {matched})"
    else:  # what a commit has deleted since the copy's snapshot is there already
        since = f"SELECT {quote(DELETED_AT)} FROM {staging} WHERE {quote(DELETED_AT)} IS NOT NULL"
        found += f" WHERE g.deleted_at NOT IN ({since})"
    for each in carried:
        if not each.is_same:
            text, value = f"g.text_{each.new.attnum}", values[each.new.attnum]
            misfits = (
                f"SELECT {quarantine.key_sql(keys)}, {text} FROM {found} AND {text} IS NOT NULL AND {value} IS NULL"
            )
            quarantine.keep_query(warehouse, new, each.new, misfits, moment)
    # Of rows whose keys are equal by now, the first: a row is found by its key.
    partition = ", ".join(value for _, value in keys)
    one = f"QUALIFY row_number() OVER (PARTITION BY {partition} ORDER BY g.n) = 1" if keys else ""
    warehouse.execute(f"INSERT INTO {staging} ({names}) SELECT {picks} FROM {found} {one}")
