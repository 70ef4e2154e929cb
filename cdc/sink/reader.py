"""Questions to the warehouse, answered whoever holds it.

DuckDB lets in one writer or many readers. While nobody writes, a question opens the file read-only. While the consumer
holds it, the consumer answers (`cdc/sink/answers.py`), over a Unix socket beside the file:

    server   R: it holds the file, and keeps it until this connection ends
             F: it does not, so the file can be opened
    client   length (u32, big endian), one query (UTF-8)
    server   A, an Arrow IPC stream, and D once it is whole; or E, length (u32), why not (UTF-8); or W: this one it
             cannot answer while it holds the file
    ...      the next query, until the client has had enough
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import duckdb
import pyarrow as pa

from cdc.errors import CdcError, SinkError, WarehouseBusy
from cdc.sink.warehouse import POLL_S, cannot_open, is_held, open_file

__all__ = [
    "ANSWER",
    "DONE",
    "ERROR",
    "FREE",
    "LENGTH",
    "READY",
    "SOCKET_TIMEOUT_S",
    "WAIT",
    "Ask",
    "answer",
    "failed",
    "reading",
    "rows",
    "socket_paths",
]

READY, FREE, ANSWER, DONE, ERROR, WAIT = b"R", b"F", b"A", b"D", b"E", b"W"
LENGTH = struct.Struct(">I")

SOCKET_TIMEOUT_S = 300.0
"""A question that has no answer by then is given up."""

_PATH_BYTES = 100  # a little less than what the address of a Unix socket has room for anywhere

Ask = Callable[[str], pa.Table]
"""Takes one query and returns its rows, see `answer`."""

_NAME = "_cdc_answer"  # no table's, and no variable's

_PLAIN = {"BOOLEAN", "TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT"} | {
    "FLOAT",
    "DOUBLE",
}


def socket_paths(warehouse: Path) -> list[Path]:
    """Return where the consumer's socket may be: beside the file, or where that has no room for one."""
    beside = warehouse.absolute().with_name(warehouse.name + ".sock")
    digest = hashlib.sha256(os.fsencode(warehouse.resolve())).hexdigest()[:16]
    apart = Path(tempfile.gettempdir()) / f"cdc-{digest}.sock"
    return [apart] if len(os.fsencode(beside)) > _PATH_BYTES else [beside, apart]


def answer(connection: duckdb.DuckDBPyConnection, sql: str) -> pa.RecordBatchReader:
    """Run one query.

    Returns:
        Its rows: booleans, integers and floats as such, all else as DuckDB's text, which is exact.

    Raises:
        CdcError: it is not one query, or it fails.
    """
    try:
        kinds = [statement.type.name for statement in connection.extract_statements(sql)]
        if kinds != ["SELECT"]:
            raise CdcError("one query is answered: SELECT, FROM, WITH, VALUES, DESCRIBE, SHOW or SUMMARIZE")
        connection.execute("SET python_enable_replacements = false")  # or names would be variables of this program
        relation = connection.sql(sql)
        names = list(relation.columns)
        # By numbers: a name may come twice.
        numbered = [f"c{i}" for i in range(len(names))]
        exact = [
            name if str(kind) in _PLAIN else f"CAST({name} AS VARCHAR)"
            for name, kind in zip(numbered, relation.types, strict=True)
        ]
        chosen = relation.query(_NAME, f"SELECT {', '.join(exact)} FROM {_NAME} AS r({', '.join(numbered)})")
        assert chosen is not None  # a SELECT
        found = chosen.to_arrow_reader()
    except duckdb.Error as error:
        raise failed(error) from None
    schema = pa.schema([pa.field(name, field.type) for name, field in zip(names, found.schema, strict=True)])
    return pa.RecordBatchReader.from_batches(
        schema, (pa.RecordBatch.from_arrays(batch.columns, schema=schema) for batch in found)
    )


def failed(error: Exception) -> CdcError:
    """Return what became of a query."""
    return CdcError(f"the query failed: {str(error).splitlines()[0]}", "tables are named as in Postgres")


def rows(table: pa.Table) -> list[tuple[Any, ...]]:
    """Return the rows of an answer."""
    return list(zip(*(column.to_pylist() for column in table.columns), strict=True))


@contextlib.contextmanager
def reading(warehouse: Path, patience_s: float) -> Iterator[Ask]:
    """Yield what answers questions to the warehouse; leave soon, for the consumer or other programs wait.

    Args:
        patience_s: how long to wait while some other program writes to it.

    Raises:
        SinkError: there is no warehouse, or it cannot be read.
        WarehouseBusy: it was held for longer, and whoever holds it does not answer.
    """
    with contextlib.ExitStack() as stack:
        answering = _first(warehouse, patience_s, stack)

        def ask(sql: str) -> pa.Table:
            nonlocal answering
            try:
                return answering(sql)
            except _NotWhileHeld:
                stack.close()  # or the consumer would keep the file open for us
                answering = _first(warehouse, patience_s, stack, consumer=False)
                return answering(sql)

        yield ask


def _first(warehouse: Path, patience_s: float, stack: contextlib.ExitStack, *, consumer: bool = True) -> Ask:
    """Return whoever answers first: the file itself, or its consumer."""
    if not warehouse.exists():
        raise SinkError(
            f"there is no warehouse {warehouse} yet", "`cdc run` makes it; or set CDC_WAREHOUSE to the one you mean"
        )
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return stack.enter_context(_opened(warehouse))
        except duckdb.Error as error:
            if not is_held(error):
                raise cannot_open(warehouse, str(error).splitlines()[0]) from None
            answering = _consumer(warehouse, stack) if consumer else None
            if answering is not None:
                return answering
            if time.monotonic() >= deadline:
                raise _busy(warehouse, patience_s, error) from None
            time.sleep(POLL_S)


def _busy(warehouse: Path, patience_s: float, error: duckdb.Error) -> WarehouseBusy:
    return WarehouseBusy(
        f"warehouse {warehouse} has been held for {patience_s:.0f} s: {str(error).splitlines()[0]}",
        "another program has the file open; try again later",
    )


@contextlib.contextmanager
def _opened(warehouse: Path) -> Iterator[Ask]:
    connection = open_file(warehouse, read_only=True)
    try:
        connection.execute("SET TimeZone = 'UTC'")
        yield lambda sql: _whole(answer(connection, sql))
    finally:
        connection.close()


def _whole(found: pa.RecordBatchReader) -> pa.Table:
    try:
        return found.read_all()
    except (pa.ArrowException, OSError) as error:  # whatever became of a query on the way comes as one of these
        raise failed(error) from None


class _NotWhileHeld(Exception):
    """The consumer holds the file, and cannot answer this one meanwhile."""


def _consumer(warehouse: Path, stack: contextlib.ExitStack) -> Ask | None:
    """Return what asks the consumer, None if there is none or it does not hold the file; `stack` closes it."""
    for path in socket_paths(warehouse):
        try:
            if path.stat().st_uid != warehouse.stat().st_uid:
                continue  # only whoever owns the warehouse may speak for it
            connection = stack.enter_context(socket.socket(socket.AF_UNIX))
            connection.settimeout(SOCKET_TIMEOUT_S)
            connection.connect(str(path))
            stream = stack.enter_context(connection.makefile("rb"))
            if stream.read(1) == READY:
                return functools.partial(_ask, connection, stream)
        except OSError:
            continue  # nobody listens there (any more)
    return None


def _ask(connection: socket.socket, stream: IO[bytes], sql: str) -> pa.Table:
    question = sql.encode()
    try:
        connection.sendall(LENGTH.pack(len(question)) + question)
        kind = stream.read(1)
        if kind == WAIT:
            raise _NotWhileHeld
        if kind == ERROR:
            (length,) = LENGTH.unpack(stream.read(LENGTH.size))
            raise CdcError(stream.read(length).decode(), "tables are named as in Postgres")
        if kind != ANSWER:
            raise EOFError("it has ended, or let go of the file")
        with pa.ipc.open_stream(stream) as answered:
            found = answered.read_all()
        if stream.read(1) != DONE:
            raise EOFError("the query failed on the way, or was broken off")
    except (OSError, EOFError, pa.ArrowException, struct.error) as error:
        raise CdcError(f"the consumer did not answer: {error}", "ask once more; is it still running?") from None
    return found
