"""A copy of one table at one LSN, while it is being written to.

Making a temporary logical slot waits until every running transaction has ended, and yields a position L with an
exported snapshot that agree exactly: what was committed before L is in the snapshot, all else is not. So:

    1. the temporary slot; L, and the name of its snapshot
    2. a session that imports the snapshot and takes ACCESS SHARE on the table, with NOWAIT
    3. the table's definition as the snapshot has it must be the live one, else all begins again
    4. more such sessions, one per worker; then the slot is dropped: they keep the snapshot
    5. COPY by ranges of ctid, with the columns and the row filter that the publication has in the snapshot

Not the lock first: an ALTER in the queue has the xid that step 1 waits for, and waits for our lock; nobody would
notice that deadlock. Not a waiting lock in a worker, which hangs behind a queued ALTER just so. Without step 3 a table
that was rewritten between 1 and 2 is copied as empty. And nothing about columns or filters from before the snapshot:
step 1 may take hours, and what is altered meanwhile is in the snapshot and not in the stream from L on.

The caller has the table's changes kept from before step 1 on; those with a commit LSN >= L belong on top of the copy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import select
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from psycopg import pq, sql

from cdc.errors import CdcError, ConnectionLost, SourceError
from cdc.source import catalog, slot
from cdc.source.catalog import PublishedTable, TableDefinition
from cdc.source.connection import Connection, connect, connect_replication, result_error, translated

__all__ = ["CopyLimits", "Snapshot", "copy_table"]

RANGE_BYTES = 64_000_000
"""Size of a range of ctid: the grain in which workers share a table."""

WAIT_S = 5.0
"""After so long of waiting for other transactions, the caller is told whose."""


_AGAIN = "the copy begins again by itself"

# What may happen before a session comes: an ALTER has the table or waits for it (55P03), it is renamed or gone (42P01,
# 3F000), or the session that exported the snapshot has ended (22023, 42704).
_OVERTAKEN = ("55P03", "42P01", "3F000", "22023", "42704")


@dataclasses.dataclass(frozen=True, slots=True)
class CopyLimits:
    """How a copy is cut and shared out: rows and bytes of one chunk, and connections at work."""

    rows: int
    bytes: int
    workers: int


@dataclasses.dataclass(frozen=True, slots=True)
class Snapshot:
    """Where a copy stands.

    Attributes:
        lsn: L.
        taken_at: the server's clock at the snapshot, microseconds since 1970 UTC.
        definition: the table, under the snapshot.
        published: its columns.
        row_filter: SQL condition for the rows that are published, None: all.
        estimate_bytes: size of the table and its partitions.
    """

    lsn: int
    taken_at: int
    definition: TableDefinition
    published: PublishedTable
    row_filter: str | None
    estimate_bytes: int


def copy_table(  # noqa: PLR0913 -- four of them are callbacks
    dsn: str,
    publications: Sequence[str],
    oid: int,
    slot_name: str,
    limits: CopyLimits,
    *,
    started: Callable[[Snapshot], None],
    rows: Callable[[Snapshot, bytes, int], None],
    waiting: Callable[[list[slot.Blocker], float], None],
    stopping: Callable[[], bool],
) -> Snapshot:
    """Copy one published table.

    Args:
        slot_name: of the temporary slot.
        started: called once the copy's LSN is known, before any rows.
        rows: called from the workers' threads, several at a time, with rows as CSV and their number.
        waiting: told who keeps the copy from beginning, and for how many seconds by now.
        stopping: asked often; once it says yes the copy ends with ConnectionLost.

    Raises:
        ConnectionLost: worth another try: the connection broke, the table is being altered, or we are stopping.
        SourceError: this table cannot be copied.
    """
    with contextlib.ExitStack() as stack:
        snapshot, sessions = _take(dsn, publications, oid, slot_name, limits.workers, stack, waiting, stopping)
        started(snapshot)
        with translated(f"copy of {snapshot.published}"):
            _copy(snapshot, sessions, limits, rows, stopping)
        return snapshot


def _take(
    dsn: str,
    publications: Sequence[str],
    oid: int,
    slot_name: str,
    workers: int,
    stack: contextlib.ExitStack,
    waiting: Callable[[list[slot.Blocker], float], None],
    stopping: Callable[[], bool],
) -> tuple[Snapshot, list[Connection]]:
    """Steps 1 to 4. `stack` closes what was opened."""
    watcher = stack.enter_context(connect(dsn))
    before = catalog.definition(watcher, oid)
    if before is None:
        raise _unpublished(oid)
    maker = connect_replication(dsn)
    stack.callback(maker.finish)

    def look(waited_s: float) -> None:
        if stopping():
            raise ConnectionLost("the copy was stopped")
        if waited_s >= WAIT_S:
            waiting(slot.blockers(watcher), waited_s)

    lsn, name = slot.create_temporary(maker, slot_name, waiting=look)
    session = _session(dsn, name, before, stack)
    definition = catalog.definition(session, oid)
    if (
        definition is None
        or (definition.schema, definition.name) != (before.schema, before.name)
        or definition != catalog.definition(watcher, oid)
    ):
        raise ConnectionLost(f"table {before} is being altered", _AGAIN)
    _, size = _sizes(session, definition)
    others = min(workers, max(1, size // RANGE_BYTES + 1)) - 1
    sessions = [session, *(_session(dsn, name, before, stack) for _ in range(others))]
    maker.finish()  # the temporary slot goes with its connection
    found = [table for table in catalog.published(session, publications) if table.oid == oid]
    if not found:
        raise _unpublished(oid)
    row_filter = catalog.row_filter(session, oid, [table.publication for table in found])
    with translated(f"snapshot of {definition}"):
        row = session.execute("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint").fetchone()
    assert row is not None
    return Snapshot(lsn, int(row[0]), definition, found[0], row_filter, size), sessions


def _session(dsn: str, name: str, table: TableDefinition, stack: contextlib.ExitStack) -> Connection:
    """Return a session within the snapshot `name` that has its lock on `table`."""
    session = connect(dsn)
    stack.callback(session.close)  # not its own context, which would try a ROLLBACK in the middle of a COPY
    # A partitioned table with all its partitions; the children of any other are tables of their own.
    only = sql.SQL("ONLY " if table.relkind == "r" else "")
    lock = sql.SQL("LOCK TABLE {}{} IN ACCESS SHARE MODE NOWAIT").format(only, _identifier(table))
    try:
        with translated(f"snapshot of {table}"):
            session.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            session.execute(sql.SQL("SET TRANSACTION SNAPSHOT {}").format(name))
            session.execute(lock)
    except SourceError as error:
        if error.sqlstate in _OVERTAKEN:
            raise ConnectionLost(str(error), _AGAIN) from None
        raise
    return session


def _unpublished(oid: int) -> SourceError:
    return SourceError(f"the table with OID {oid} is no longer published", "it is copied once it is published again")


def _identifier(table: TableDefinition) -> sql.Identifier:
    return sql.Identifier(table.schema, table.name)


def _sizes(session: Connection, table: TableDefinition) -> tuple[int, int]:
    """Return the size of the table's largest part, itself or a partition, and that of all together, in bytes."""
    parts = [str(oid) for oid in table.leaves]
    with translated(f"size of {table}"):
        rows = session.execute("SELECT pg_relation_size(p) FROM unnest(%s::oid[]) AS p", [parts]).fetchall()
    sizes = [int(size or 0) for (size,) in rows]
    return max(sizes, default=0), sum(sizes)


def _statements(snapshot: Snapshot, connection: Connection) -> Iterator[bytes]:
    """Yield one COPY per range of ctid; of a partitioned table, each takes that range of every partition.

    A partition by itself is not read: the right to read the root is enough.
    """
    table = snapshot.definition
    columns = sql.SQL(", ").join(map(sql.Identifier, snapshot.published.columns))
    origin = sql.SQL("ONLY {}" if table.relkind == "r" else "{}").format(_identifier(table))
    filtered = sql.SQL("({})").format(sql.SQL(snapshot.row_filter)) if snapshot.row_filter else sql.SQL("true")
    block = int(connection.execute("SELECT current_setting('block_size')").fetchall()[0][0])
    largest, total = _sizes(connection, table)
    blocks = max(1, -(-largest // block))
    step = -(-blocks // max(1, -(-total // RANGE_BYTES)))
    edges = list(range(0, blocks, step))
    for low, high in zip(edges, [*edges[1:], None], strict=True):
        # The last range has no upper bound: the size is that of now, and rows of the snapshot may lie behind it.
        upper = sql.SQL(" AND ctid < {}::tid").format(f"({high},0)") if high is not None else sql.SQL("")
        statement = sql.SQL("COPY (SELECT {} FROM {} WHERE ctid >= {}::tid{} AND {}) TO STDOUT (FORMAT csv)").format(
            columns, origin, f"({low},0)", upper, filtered
        )
        yield statement.as_bytes(connection)


def _copy(
    snapshot: Snapshot,
    sessions: Sequence[Connection],
    limits: CopyLimits,
    rows: Callable[[Snapshot, bytes, int], None],
    stopping: Callable[[], bool],
) -> None:
    """Step 5: one thread per session, each taking the next range."""
    ranges: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    for statement in _statements(snapshot, sessions[0]):
        ranges.put(statement)
    failures: list[BaseException] = []

    def work(session: Connection) -> None:
        try:
            if session.info.parameter_status("server_encoding") == "SQL_ASCII":
                # As in the stream: the text comes as it is stored, or the server would stop at what is no UTF-8.
                session.execute("SET client_encoding = 'SQL_ASCII'")
            while not failures:
                try:
                    statement = ranges.get_nowait()
                except queue.Empty:
                    return
                for data, count in _read(session, statement, limits, lambda: bool(failures) or stopping()):
                    rows(snapshot, data, count)
        except BaseException as error:  # noqa: BLE001 -- raised again by the caller's thread
            failures.append(error)

    threads = [
        threading.Thread(target=work, args=[s], name=f"cdc-copy-{i}", daemon=True) for i, s in enumerate(sessions)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def _read(
    session: Connection, statement: bytes, limits: CopyLimits, stopping: Callable[[], bool]
) -> Iterator[tuple[bytes, int]]:
    """Run one COPY TO STDOUT and yield its rows in chunks, joined, with their number.

    On libpq itself: psycopg's own COPY takes a generator's turn per row.
    """
    pgconn = session.pgconn
    pgconn.send_query(statement)
    while pgconn.flush():
        time.sleep(0.001)
    while pgconn.is_busy():
        _wait(pgconn, stopping)
    result = pgconn.get_result()
    if result is None or result.status != pq.ExecStatus.COPY_OUT:
        raise _failure(result, pgconn)
    get = pgconn.get_copy_data
    lines: list[bytes] = []
    size = 0
    while True:
        n, view = get(1)
        if n > 0:
            lines.append(bytes(view))
            size += n
            if size >= limits.bytes or len(lines) >= limits.rows:
                yield b"".join(lines), len(lines)
                lines, size = [], 0
        elif n == 0:
            _wait(pgconn, stopping)
        else:
            break
    while (ended := pgconn.get_result()) is not None:
        if ended.status != pq.ExecStatus.COMMAND_OK:
            raise _failure(ended, pgconn)
    if lines:
        yield b"".join(lines), len(lines)


def _wait(pgconn: pq.abc.PGconn, stopping: Callable[[], bool]) -> None:
    if stopping():
        raise ConnectionLost("the copy was stopped")
    select.select([pgconn.socket], [], [], 0.2)
    pgconn.consume_input()


def _failure(result: pq.abc.PGresult | None, pgconn: pq.abc.PGconn) -> CdcError:
    if result is None:
        return ConnectionLost("the connection of a copy broke", _AGAIN)
    return result_error(result, pgconn, "copy")
