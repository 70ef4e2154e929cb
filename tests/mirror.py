"""A consumer in a process of its own, and the comparison of what it made with what Postgres has.

Postgres is the oracle: rows are compared as multisets of values, as the server prints them on one side, and as DuckDB's
own client reads them from the warehouse, or from the replayed history, on the other (values.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import subprocess
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import duckdb
import psycopg
from psycopg import sql

from cdc.pipeline import Pipeline
from cdc.settings import load
from cdc.sink.warehouse import open_file
from tests.conftest import Database, Lake
from tests.program import Start, forked, run
from tests.values import PINNED, fits, from_duckdb, from_postgres, logged, picked

__all__ = [
    "Consumer",
    "differences",
    "exact_differences",
    "mirror_once",
    "one_look",
    "replayed",
    "run_cdc",
    "states",
    "until",
    "warehouse_rows",
]

start: Start = forked
"""How commands are started; a test may need it in another way."""

RUN_TIMEOUT_S = 100.0


def until(condition: Callable[[], object], timeout_s: float = 60.0, what: str = "") -> None:
    """Return once `condition` holds; fail the test if it does not come to that."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s in vain: {what or condition}"
        time.sleep(0.05)


def run_cdc(lake: Lake, dsn: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run one command of cdc to its end."""
    return run(start, arguments, env=lake.environment(dsn, **settings), cwd=lake.root, timeout_s=RUN_TIMEOUT_S)


class _Listener:
    """Keeps what the pipeline tells, as lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def event(self, name: str, **fields: Any) -> None:
        """Keep one line, as the command line would print it."""
        self.lines.append(
            " ".join([name, *(f"{key}={value}" for key, value in fields.items() if value not in ("", None))])
        )

    def progress(self, table: str, rows: int, done_bytes: int, total_bytes: int) -> None:
        """Not kept."""

    def copied(self, table: str, rows: int) -> None:
        """Keep one line."""
        self.event("copied", table=table, rows=rows)


def mirror_once(lake: Lake, dsn: str, **settings: str) -> str:
    """Do what `cdc run --once` does, in this process: a second less per call; return what it would have printed."""
    listener = _Listener()
    given = {"dsn": dsn, "warehouse": str(lake.warehouse), "history": str(lake.history)} | settings
    Pipeline(load(given, environ={}), listener).run(once=True)
    return "\n".join(listener.lines)


class Consumer:
    """`cdc run` in the background. A context manager; at its end the process is gone, whatever happened.

    Attributes:
        log: file with what it printed.
    """

    def __init__(self, lake: Lake, dsn: str, *arguments: str, **settings: str) -> None:
        self.log = lake.root / f"consumer-{time.monotonic_ns()}.log"
        with self.log.open("wb") as out:
            environment = lake.environment(dsn, **settings)
            self._process = start(["run", *arguments], env=environment, cwd=lake.root, out=out, err=out)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        """Its process ID."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(errors="replace")

    def kill(self) -> int:
        """Kill it with SIGKILL, unless it has ended; return its exit status."""
        self.send_signal(signal.SIGKILL)
        return self._process.wait()

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal, unless it has ended."""
        self._process.send_signal(number)

    def stop(self, timeout_s: float = 15.0) -> int:
        """Ask it to end by SIGTERM and return its exit status."""
        self.send_signal(signal.SIGTERM)
        return self._process.wait(timeout_s)

    def wait(self, timeout_s: float = 60.0) -> int:
        """Wait for it to end by itself and return its exit status."""
        return self._process.wait(timeout_s)


def open_warehouse(lake: Lake, timeout_s: float = 30.0) -> duckdb.DuckDBPyConnection:
    """Open the warehouse for reading, as any DuckDB tool would, between the consumer's flushes."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            connection = open_file(lake.warehouse, read_only=True)
        except duckdb.IOException:
            assert time.monotonic() < deadline, "the warehouse stayed locked"
            time.sleep(0.01)
        else:
            connection.execute("SET TimeZone = 'UTC'")
            return connection


_looks: dict[tuple[int, Path], duckdb.DuckDBPyConnection] = {}  # by thread


@contextlib.contextmanager
def one_look(lake: Lake) -> Iterator[None]:
    """Within it `warehouse_rows` has one connection, and no consumer can write: opening the file takes its time."""
    this = (threading.get_ident(), lake.warehouse)
    if this in _looks:
        yield
        return
    _looks[this] = open_warehouse(lake)
    try:
        yield
    finally:
        _looks.pop(this).close()


def warehouse_rows(lake: Lake, query: str) -> list[tuple[Any, ...]]:
    """Run `query` in the warehouse."""
    with one_look(lake):
        return _looks[threading.get_ident(), lake.warehouse].execute(query).fetchall()


def states(lake: Lake) -> dict[str, str]:
    """Return the state of each table by schema.name; nothing before the warehouse is there."""
    if not lake.warehouse.exists():
        return {}
    try:
        rows = warehouse_rows(lake, "SELECT schema_name || '.' || table_name, state FROM _cdc.tables")
    except duckdb.CatalogException:
        return {}
    return dict(rows)


@dataclasses.dataclass(frozen=True, slots=True)
class _Column:
    """A column: its name in Postgres, its name and DuckDB type here, and the delimiter of its arrays' elements."""

    name: str
    here: str
    kind: str
    delimiter: str


def _columns(database: Database, lake: Lake, table: str) -> list[_Column]:
    """Return the columns that are published: all but generated ones, in order."""
    schema, name = table.split(".", 1)
    with psycopg.connect(database.dsn, options=PINNED) as connection:
        names = connection.execute(
            "SELECT a.attname, coalesce(t.typdelim, ',') FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid "
            "JOIN pg_namespace n ON n.oid = c.relnamespace LEFT JOIN pg_type t ON t.oid = a.atttypid "
            "WHERE n.nspname = %s AND c.relname = %s AND a.attnum > 0 "
            "AND NOT a.attisdropped AND a.attgenerated = '' ORDER BY a.attnum",
            [schema, name],
        ).fetchall()
    known = warehouse_rows(
        lake,
        f"SELECT columns FROM _cdc.tables WHERE schema_name = {_literal(schema)} AND table_name = {_literal(name)}",
    )
    aliases = {column[0]: column[5] or column[0] for column in json.loads(known[0][0])}
    kinds = {column: kind for column, kind, *_ in warehouse_rows(lake, f"DESCRIBE {_target(lake, table)}")}
    found = [(str(column), str(aliases.get(column, column)), str(delimiter)) for column, delimiter in names]
    return [_Column(column, here, kinds.get(here, "VARCHAR"), delimiter) for column, here, delimiter in found]


def _target(lake: Lake, table: str) -> str:
    """Return a table's name in the warehouse, quoted."""
    schema, name = table.split(".", 1)
    where = f"schema_name = {_literal(schema)} AND table_name = {_literal(name)}"
    ((alias,),) = warehouse_rows(lake, f"SELECT alias FROM _cdc.tables WHERE {where}")
    return f"{_quote(schema)}.{_quote(alias or name)}"


def source_rows(database: Database, lake: Lake, table: str, where: str = "true") -> Counter[tuple[Hashable, ...]]:
    """Return a table's rows as Postgres has them, in the form that its columns in the warehouse ask for."""
    columns = _columns(database, lake, table)
    return Counter(_source_form(row, columns) for row in _printed(database, table, columns, where))


def _printed(database: Database, table: str, columns: Sequence[_Column], where: str = "true") -> list[list[str | None]]:
    """Return the text of each value of a table, as a session with `PINNED` prints it."""
    schema, name = table.split(".", 1)
    with psycopg.connect(database.dsn, options=PINNED) as connection:
        query = sql.SQL("SELECT {} FROM {} WHERE {}").format(
            sql.SQL(", ").join(sql.Identifier(column.name) for column in columns),
            sql.Identifier(schema, name),
            sql.SQL(where),
        )
        found = connection.execute(query, binary=False).pgresult
        assert found is not None
        return [
            [None if (value := found.get_value(row, i)) is None else value.decode() for i in range(len(columns))]
            for row in range(found.ntuples)
        ]


def _source_form(row: Sequence[str | None], columns: Sequence[_Column]) -> tuple[Hashable, ...]:
    return tuple(from_postgres(text, c.kind, c.delimiter) for text, c in zip(row, columns, strict=True))


def exact_differences(database: Database, lake: Lake, table: str, key: Sequence[str]) -> str:
    """Return how Postgres differs from the warehouse, the replayed history and the quarantine; '' if it does not.

    A value that does not fit, by docs/types.md, has to be NULL in the first two, and in the quarantine as just what
    Postgres prints, as current, under its row's key; and nothing else may be there as current.

    Args:
        key: columns of the replica identity, of whole numbers or text; none: the table has none, or FULL.
    """
    schema, name = table.split(".", 1)
    columns = _columns(database, lake, table)
    source: Counter[tuple[Hashable, ...]] = Counter()
    unfit: Counter[tuple[Hashable, ...]] = Counter()
    for row in _printed(database, table, columns):
        fitting = [t if t is None or fits(t, c.kind, c.delimiter) else None for t, c in zip(row, columns, strict=True)]
        source[_source_form(fitting, columns)] += 1
        texts = dict(zip((column.name for column in columns), row, strict=True))
        label = json.dumps({part: texts[part] for part in key}) if key else None
        unfit.update(
            (column.here, label, texts[column.name])
            for column, text in zip(columns, fitting, strict=True)
            if text != texts[column.name]
        )
    current = warehouse_rows(
        lake,
        "SELECT column_name, key, value FROM _cdc.quarantine "
        f"WHERE current AND (schema_name, table_name) = ({_literal(schema)}, {_literal(name)})",
    )
    sides = {
        "warehouse": (source, mirrored_rows(database, lake, table)),
        "history": (source, replayed(database, lake, table, key)),
        "quarantine": (unfit, Counter(current)),
    }
    found = (
        f"{side} of {table}: {_unlike(expected, there, side != 'quarantine' and columns)}"
        for side, (expected, there) in sides.items()
        if expected != there
    )
    return "\n".join(found)


def _unlike(
    expected: Counter[tuple[Any, ...]], found: Counter[tuple[Any, ...]], columns: Sequence[_Column] | Literal[False]
) -> str:
    """Tell what is missing, and what is too much; of rows with the same first value, only the columns that differ."""
    missing, surplus = list((expected - found).elements()), list((found - expected).elements())
    if columns:
        for row in missing:
            for other in surplus:
                unlike = [
                    f"{c.here} {c.kind}: {_short(a)} became {_short(b)}"
                    for a, b, c in zip(row, other, columns, strict=True)
                    if a != b
                ]
                if row[0] == other[0]:
                    return f"{len(missing)} rows missing, {len(surplus)} too many, as {row[0]}: {'; '.join(unlike)}"
    return f"missing {_short(missing[:3])}, too many {_short(surplus[:3])}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 500 else f"{text[:250]} ... {text[-100:]} ({len(text)})"


def source_texts(database: Database, table: str) -> Counter[tuple[str | None, ...]]:
    """Return a table's rows as Postgres prints them."""
    columns = database.execute(
        "SELECT string_agg(quote_ident(attname) || '::text', ', ' ORDER BY attnum) FROM pg_attribute "
        f"WHERE attrelid = {_literal(table)}::regclass AND attnum > 0 AND NOT attisdropped"
    )
    return Counter(database.execute(f"SELECT {columns[0][0]} FROM {table}"))


def _quote(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def mirrored_rows(database: Database, lake: Lake, table: str, where: str = "true") -> Counter[tuple[Hashable, ...]]:
    """Return a table's rows as the warehouse has them, with the columns that Postgres has now."""
    columns = _columns(database, lake, table)
    picks = ", ".join(picked(_quote(column.here), column.kind) for column in columns)
    rows = warehouse_rows(lake, f"SELECT {picks} FROM {_target(lake, table)} WHERE {where}")
    return Counter(_form(row, columns) for row in rows)


def _form(row: Sequence[Any], columns: Sequence[_Column]) -> tuple[Hashable, ...]:
    return tuple(from_duckdb(value, column.kind) for value, column in zip(row, columns, strict=True))


@dataclasses.dataclass(frozen=True, slots=True)
class _Change:
    """A column of the change log that came, went, or got another name, from the change (LSN, seq) on."""

    at: tuple[int, int]
    old_name: str | None
    new_name: str | None
    default: str | None


def replayed(database: Database, lake: Lake, table: str, key: Sequence[str]) -> Counter[tuple[Any, ...]]:
    """Return a table's rows as the history tells them: the newest copy, then every change in the order of (LSN, seq).

    Columns that were renamed, or added with a default, are followed by ``_cdc.schema_changes``.

    Args:
        key: columns of the replica identity; none: the table has no key, and each D takes one equal row.
    """
    schema, name = table.split(".", 1)
    ((alias,),) = warehouse_rows(
        lake, f"SELECT alias FROM _cdc.tables WHERE (schema_name, table_name) = ({_literal(schema)}, {_literal(name)})"
    )
    folder = lake.history / _escaped(schema) / _escaped(alias or name)
    log = f"read_parquet({_literal(f'{folder}/*.parquet')}, union_by_name = true)"
    connection = duckdb.connect()
    connection.execute("SET TimeZone = 'UTC'")
    (copy_lsn,) = connection.execute(f"SELECT max(_lsn) FROM {log} WHERE _op = 'T' AND _seq < 0").fetchall()[0]
    assert copy_lsn is not None, f"the history of {table} begins with no copy"
    # Older files may be of another table of that name, with other columns.
    paths = warehouse_rows(
        lake,
        "SELECT path FROM _cdc.files "
        f"WHERE schema_name = {_literal(schema)} AND table_name = {_literal(alias or name)} AND last_lsn >= {copy_lsn}",
    )
    log = f"read_parquet({[str(lake.history / path) for (path,) in paths]}, union_by_name = true)"
    doubles = connection.execute(f"SELECT _lsn, _seq FROM {log} GROUP BY ALL HAVING count(*) > 1").fetchall()
    assert not doubles, f"the history of {table} has changes twice: {doubles[:5]}"
    columns = _columns(database, lake, table)
    changes = [
        _Change((lsn, seq), old, new, default)
        for lsn, seq, old, new, default in warehouse_rows(
            lake,
            "SELECT lsn, coalesce(seq, 0), old_name, new_name, default_value FROM _cdc.schema_changes "
            f"WHERE schema_name = {_literal(schema)} AND table_name = {_literal(name)} AND lsn >= {copy_lsn} "
            "ORDER BY rowid",
        )
        if old or new
    ]
    there = {column.lower(): kind for column, kind, *_ in connection.execute(f"DESCRIBE FROM {log}").fetchall()}
    here = {column.name: column for column in columns}
    picks = ", ".join(picked(_over_time(column, changes, there), column.kind) for column in columns)
    keys = ", ".join(f"CAST({_over_time(here[k], changes, there)} AS VARCHAR)" for k in key)
    rows = connection.execute(
        f"SELECT _op, [{keys}], _lsn, _seq, {picks} FROM {log} "
        f"WHERE (_lsn = {copy_lsn} AND _seq < 0) OR (_lsn >= {copy_lsn} AND _seq > 0) ORDER BY _lsn, _seq"
    ).fetchall()
    connection.close()
    formed = [(*row[:4], *_form(row[4:], columns)) for row in rows]
    fills = [
        (change.at, index, from_postgres(change.default, column.kind, column.delimiter))
        for index, column in enumerate(columns)
        for change in _of(column.here, changes)
        if change.old_name is None and change.default is not None
    ]
    return _replay(formed, sorted(fills, key=lambda fill: fill[0]), keyed=bool(key))


def _of(name: str, changes: Sequence[_Change]) -> list[_Change]:
    """Return the changes of the column that is called `name` in the end, from the last to the first."""
    found: list[_Change] = []
    for change in reversed(changes):
        if change.new_name == name and not (found and found[-1].at == change.at):  # those of one moment are at once
            found.append(change)
            if change.old_name is None:
                break
            name = change.old_name
    return found


def _over_time(column: _Column, changes: Sequence[_Change], there: Mapping[str, str]) -> str:
    """Return the SQL for a column's value in the change log, under whichever name it had, and whatever was its type.

    Args:
        there: the columns of the change log in small letters, and their types.
    """
    name, cases = column.here, []

    def value() -> str:
        return logged(_quote(name), column.kind, there[name.lower()]) if name.lower() in there else "NULL"

    for change in _of(column.here, changes):
        cases.append(f"WHEN (_lsn, _seq) >= ({change.at[0]}, {change.at[1]}) THEN {value()}")
        if change.old_name is None:
            return f"CASE {' '.join(cases)} ELSE NULL END"
        name = change.old_name
    return f"CASE {' '.join(cases)} ELSE {value()} END" if cases else value()


def _escaped(name: str) -> str:
    """Return the name of the folder that the history gives a schema or table."""
    return urllib.parse.quote(name, safe="").replace(".", "%2E")


def _replay(
    rows: Sequence[Any], fills: Sequence[tuple[tuple[int, int], int, Any]], *, keyed: bool
) -> Counter[tuple[Any, ...]]:
    """Replay changes (op, key, LSN, seq, values); `fills`: from (LSN, seq) on the rows there have value of a column."""
    by_key: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    bag: Counter[tuple[Any, ...]] = Counter()
    left = list(fills)

    def fill(until: tuple[int, int] | None) -> None:
        nonlocal bag
        while left and (until is None or left[0][0] <= until):
            _, index, value = left.pop(0)
            for key, row in by_key.items():
                by_key[key] = (*row[:index], value, *row[index + 1 :])
            filled: Counter[tuple[Any, ...]] = Counter()
            for row, count in bag.items():
                filled[*row[:index], value, *row[index + 1 :]] += count
            bag = filled

    for op, key, lsn, seq, *values in rows:
        fill((lsn, seq))
        row = tuple(values)
        if op == "T":
            by_key.clear()
            bag.clear()
        elif not keyed:
            bag[row] += -1 if op == "D" else 1
        elif op == "D":
            by_key.pop(tuple(key), None)
        else:
            by_key[tuple(key)] = row
    fill(None)
    return Counter(by_key.values()) if keyed else +bag


def differences(database: Database, lake: Lake, table: str, key: Sequence[str] | None = None) -> str:
    """Return how Postgres, the warehouse and (with `key`) the replayed history differ; '' if they do not."""
    with one_look(lake):
        source = source_rows(database, lake, table)
        sides = {"warehouse": mirrored_rows(database, lake, table)}
        if key is not None:
            sides["history"] = replayed(database, lake, table, key)
    found = []
    for side, rows in sides.items():
        missing, surplus = source - rows, rows - source
        if missing or surplus:
            found.append(
                f"{side} of {table}: {missing.total()} rows missing, {surplus.total()} too many; "
                f"missing {list(missing)[:3]}, too many {list(surplus)[:3]}"
            )
    return "\n".join(found)


def status(lake: Lake, dsn: str, **settings: str) -> Any:
    """Return `cdc status --json`."""
    done = run_cdc(lake, dsn, "status", "--json", **settings)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def history_files(lake: Lake) -> list[Path]:
    """Return every file below the history."""
    return [path for path in lake.history.rglob("*") if path.is_file()]
