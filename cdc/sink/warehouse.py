"""The DuckDB file: opened, held and let go; one connection, one transaction at a time.

DuckDB admits one writer or many readers. The file is held only while there is something to write, so that any DuckDB
tool can read in between; who finds it held by a reader waits, and says so.

This module owns the connection. Nobody else opens the file in this process: closing a second handle to it would drop
the lock of the first (POSIX fcntl locks belong to the process).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import duckdb
import pyarrow as pa

from cdc.errors import SinkError, StateError, WarehouseBusy

__all__ = ["ConsumerLock", "Warehouse", "cannot_open", "explain", "folded", "is_held", "no_space", "open_file", "quote"]

STORAGE_VERSION = "v1.5.0"
"""Files stay readable by DuckDB 1.5 tools; 2.0 would write a format that they cannot open."""

WAL_AUTOCHECKPOINT = 256_000_000
"""Bytes; DuckDB's default of 16 MB makes one flush in eight wait for a checkpoint.

At most half of the memory: until a checkpoint, DuckDB cannot move long strings out of it.
"""

POLL_S = 0.02
"""How often a held file is tried again."""

_FAREWELL_S = 1.0

_GUESTS_S = 10.0
"""A file that was held for so long admits no further guests: who comes is to find it free."""


def quote(*names: str) -> str:
    """Return `names` as one SQL identifier, dotted and quoted."""
    return ".".join('"' + name.replace('"', '""') + '"' for name in names)


def folded(*names: str) -> tuple[bytes, ...]:
    """Return `names` as DuckDB compares them: it ignores the case of ASCII letters, and of no others."""
    return tuple(name.encode().lower() for name in names)


class Warehouse:
    """The DuckDB database, held between `acquire` and `release`."""

    def __init__(self, path: Path, memory_bytes: int, threads: int, tmp: Path | None = None) -> None:
        self.path = path
        self._config: dict[str, str | bool | int | float | list[str]] = {
            "storage_compatibility_version": STORAGE_VERSION,
            "memory_limit": f"{memory_bytes}B",
            "threads": threads,
            "temp_directory": str(tmp or path.with_name(path.name + ".tmp")),
            "wal_autocheckpoint": f"{min(WAL_AUTOCHECKPOINT, memory_bytes // 2)}B",
            "preserve_insertion_order": True,
        }
        self._connection: duckdb.DuckDBPyConnection | None = None
        self._opened_at = 0.0
        self._database = ""
        self.in_transaction = False
        self._committing = False
        self._interruption = threading.Lock()
        self._door = threading.RLock()
        self._guests: list[duckdb.DuckDBPyConnection] = []
        self._dismissed = False
        self._left_at = 0
        self._interrupted = False

    @property
    def held(self) -> bool:
        """Whether this process has the file open now."""
        return self._connection is not None

    @property
    def held_s(self) -> float:
        """For how many seconds the file has been held; 0: it is not."""
        return time.monotonic() - self._opened_at if self.held else 0.0

    @property
    def connection(self) -> duckdb.DuckDBPyConnection:
        """The open connection."""
        if self._connection is None:
            raise SinkError(f"warehouse {self.path} is used before it was opened")
        return self._connection

    def name(self, *names: str) -> str:
        """Return `names` (schema, table) quoted, behind the database's own name.

        Without it, a schema called temp, system or like the file would be taken for a database.
        """
        if not self._database:
            self._database = str(self.execute("SELECT current_database()")[0][0])
        return quote(self._database, *names)

    def acquire(
        self,
        waiting: Callable[[WarehouseBusy, float], None] = lambda _busy, _waited_s: None,
        give_up: Callable[[], bool] = lambda: False,
    ) -> None:
        """Open the file, waiting for as long as somebody else holds it.

        Args:
            waiting: called at each try that fails, with the reason and the seconds waited so far.
            give_up: asked after each try that fails.

        Raises:
            WarehouseBusy: `give_up` said so.
            SinkError: the file cannot be opened or is no DuckDB database.
        """
        began = time.monotonic()
        while not self.held:
            try:
                self._open()
            except WarehouseBusy as busy:
                waiting(busy, time.monotonic() - began)
                if give_up():
                    raise
                time.sleep(POLL_S)

    def _open(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self.path.exists():
                self._create()
            self._connection = open_file(self.path, config=self._config)
        except duckdb.IOException as error:
            reason = str(error).splitlines()[0]
            if not is_held(error):
                raise cannot_open(self.path, reason) from None
            pid = re.search(r"PID (\d+)", reason)
            raise WarehouseBusy(
                f"warehouse {self.path} is held by {'process ' + pid[1] if pid else 'another process'}",
                "close the program that has the file open",
                int(pid[1]) if pid else None,
            ) from None
        except (duckdb.Error, OSError) as error:
            raise cannot_open(self.path, str(error).splitlines()[0]) from None
        self._connection.execute("SET TimeZone = 'UTC'")
        self._opened_at = time.monotonic()

    def _create(self) -> None:
        """Make an empty database; a disk that is full leaves none, or DuckDB would not open it again."""
        new = self.path.with_name(self.path.name + ".new")
        new.unlink(missing_ok=True)
        try:
            duckdb.connect(str(new), config=self._config).close()
            new.rename(self.path)
        finally:
            new.unlink(missing_ok=True)

    def release(self) -> None:
        """Close the file, so that others can open it, unless a guest is there. What is not committed is rolled back."""
        with self._door:
            if self._connection is not None and not self._guests:
                self.rollback()
                with contextlib.suppress(duckdb.OperationalError):  # a dismissed guest is where nothing breaks it off
                    self._connection.close()
                self._connection = None
                self._left_at = self._written_at()

    @contextlib.contextmanager
    def guest(self) -> Iterator[duckdb.DuckDBPyConnection | None]:
        """Lend another thread a connection to the open file, and keep it open meanwhile.

        None: it is not held; or for so long already that others have to get in first.
        """
        with self._door:
            lent = None
            if self._connection is not None and not self._dismissed and self.held_s < _GUESTS_S:
                lent = self._connection.cursor()
                self._guests.append(lent)
        try:
            if lent is not None:
                lent.execute("SET TimeZone = 'UTC'")
            yield lent
        finally:
            with self._door:
                if lent in self._guests:
                    self._guests.remove(lent)
                    with contextlib.suppress(duckdb.Error):
                        lent.close()

    @property
    def guests(self) -> int:
        """How many of them there are."""
        return len(self._guests)

    def dismiss(self, *, for_good: bool = False) -> None:
        """Break off what guests do, so that the file can be closed; `for_good`: and admit nobody any more."""
        with self._door:
            self._dismissed = True
        deadline = time.monotonic() + _FAREWELL_S
        while self._guests and time.monotonic() < deadline:
            for lent in list(self._guests):
                with contextlib.suppress(duckdb.Error):  # it has just gone
                    lent.interrupt()
            time.sleep(POLL_S)
        with self._door:
            for lent in self._guests:
                with contextlib.suppress(duckdb.Error):  # it is where nothing can break it off
                    lent.close()
            self._guests.clear()
            self._dismissed = for_good

    @property
    def touched(self) -> bool:
        """Whether somebody has written to the file since it was released."""
        return not self.held and self._written_at() != self._left_at

    def _written_at(self) -> int:
        try:
            return self.path.stat().st_mtime_ns
        except OSError:  # it is not there: no reason to open it
            return self._left_at

    def interrupt(self) -> None:
        """Break off the statement that another thread is running.

        A COMMIT goes on to its end: DuckDB reports one that was broken off as failed although it may have happened.
        """
        with self._interruption:
            self._interrupted = True  # DuckDB forgets it if no statement runs just now
            connection = self._connection
            if connection is not None and not self._committing:
                connection.interrupt()

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Run one statement and return its rows.

        Raises:
            duckdb.InterruptException: after `interrupt`.
        """
        self._go_on()
        return self.connection.execute(sql, list(parameters)).fetchall() if parameters else self._run(sql)

    def _go_on(self) -> None:
        if self._interrupted:
            raise duckdb.InterruptException("interrupted")

    def _run(self, sql: str) -> list[tuple[Any, ...]]:
        return self.connection.execute(sql).fetchall()

    def arrow(self, sql: str) -> pa.Table:
        """Run one query and return its result as an Arrow table.

        Raises:
            duckdb.InterruptException: after `interrupt`.
        """
        self._go_on()
        return self.connection.sql(sql).to_arrow_table()

    def batches(self, sql: str, rows: int) -> Iterator[pa.RecordBatch]:
        """Run one query and yield its result, about `rows` at a time; run no other meanwhile.

        Raises:
            duckdb.InterruptException: after `interrupt`.
        """
        self._go_on()
        yield from self.connection.sql(sql).to_arrow_reader(rows)

    @contextlib.contextmanager
    def view(self, name: str, table: pa.Table) -> Iterator[None]:
        """Let SQL see the Arrow `table` under `name`, without a copy."""
        self.connection.register(name, table)
        try:
            yield
        finally:
            # After an error DuckDB takes nothing but a ROLLBACK, which takes the view along; the error is what counts.
            with contextlib.suppress(duckdb.TransactionException):
                self.connection.unregister(name)

    def begin(self) -> None:
        """Begin a transaction, unless one is open."""
        if not self.in_transaction:
            self._run("BEGIN TRANSACTION")
            self.in_transaction = True

    def commit(self) -> None:
        """Commit. On return everything is on disk.

        Raises:
            duckdb.Error: DuckDB could not write. Whether the transaction remains, only the file opened anew can tell:
                it does if no more than the checkpoint behind it failed.
        """
        self.in_transaction = False
        with self._interruption:
            self._committing = True
        try:
            self._run("COMMIT")
        finally:
            self._committing = False

    def rollback(self) -> None:
        """Roll back the open transaction, if there is one."""
        if not self.in_transaction:
            return
        self.in_transaction = False
        # After some errors DuckDB has ended the transaction already; then there is nothing left to undo.
        with contextlib.suppress(duckdb.TransactionException):
            self._run("ROLLBACK")


def open_file(path: Path, **options: Any) -> duckdb.DuckDBPyConnection:
    """Open a DuckDB file that others write to, and see what they have written.

    DuckDB 2.0.0 reads a file's headers before it asks for its lock. What was written in between it does not see: it
    would go on from a state that is gone, and read blocks that hold something else by now, or write over them. So
    whatever has changed meanwhile is opened once more.

    Args:
        options: for `duckdb.connect`.

    Raises:
        duckdb.Error: it cannot be opened; IOException "Could not set lock": somebody else holds it.
    """
    while True:
        before = _written(path)
        try:
            connection = duckdb.connect(str(path), **options)
        except duckdb.Error as error:
            if is_held(error) or _written(path) == before:
                raise
            continue
        if _written(path) == before:
            return connection
        connection.close()


def is_held(error: duckdb.Error) -> bool:
    """Whether a file could not be opened because somebody else has it."""
    return "Could not set lock" in str(error)


def _written(path: Path) -> tuple[object, ...]:
    """Return what differs once somebody has written to the file.

    Without opening it: to close it again would drop the lock that this process may have.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        return ()
    log = path.with_name(path.name + ".wal").exists()  # until whoever writes is done
    return found.st_ino, found.st_size, found.st_mtime_ns, log


def explain(error: duckdb.Error) -> SinkError:
    """Return what `error`, of a statement that writes, means to the user."""
    reason = str(error).splitlines()[0]
    if no_space(reason):
        hint = "free some space on the disk; nothing was confirmed to Postgres, and the consumer goes on from there"
    elif isinstance(error, duckdb.OutOfMemoryException):
        hint = "raise CDC_MEMORY, or lower CDC_FLUSH_ROWS and CDC_FLUSH_BYTES"
    else:
        hint = "nothing was confirmed to Postgres; once the cause is mended, start the consumer again"
    return SinkError(f"the warehouse cannot be written: {reason}", hint)


def no_space(reason: str) -> bool:
    """Whether `reason`, in the words of the system or of DuckDB, is that the disk is full or a quota used up."""
    return any(
        words in reason.lower() for words in ("no space left", "out of disk", "file too large", "quota exceeded")
    )


def cannot_open(path: Path, reason: str) -> SinkError:
    """Return what the failure to open a DuckDB file means to the user."""
    if no_space(reason):
        return SinkError(f"warehouse {path} cannot be opened: {reason}", "free some space on the disk")
    if "newer" in reason or "version number" in reason:
        return SinkError(f"warehouse {path} has another format: {reason}", "upgrade the duckdb package")
    return SinkError(
        f"warehouse {path} cannot be opened: {reason}",
        "CDC_WAREHOUSE must name a DuckDB file, or a new one in a folder that this user may write to",
    )


class ConsumerLock:
    """A locked file beside the warehouse: at most one consumer, for the life of the process.

    The kernel drops the lock with the process, however it ends; the file stays and is used again.
    """

    def __init__(self, warehouse: Path) -> None:
        self.path = warehouse.with_name(warehouse.name + ".lock")
        self._file: IO[str] | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            StateError: another consumer has it.
            SinkError: the folder cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.open("a+", encoding="ascii")
        except OSError as error:
            # FileExistsError is what mkdir says to a file where a folder should be.
            reason = "it is no folder" if isinstance(error, FileExistsError) else error.strerror
            raise SinkError(
                f"{self.path.parent} cannot be written: {reason}",
                "give this user the right to write there, or set CDC_WAREHOUSE to another place",
            ) from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            file.close()
            raise StateError(
                f"warehouse {self.path.with_suffix('')} already has a consumer (process {owner})",
                "stop that one first, or give this one a warehouse and a slot of its own",
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        self._file = file

    def release(self) -> None:
        """Let go of the lock."""
        if self._file is not None:
            self._file.close()
            self._file = None
