"""Brings tables in beside the stream: one copy at a time, from `pending` or `resyncing` to `streaming`.

A copy is only worth anything while its table's changes are kept for it without a gap, from before its snapshot until
its swap. Whatever moves the table to another state in between ends that: whoever does so calls `drop`.

State: the copy in hand, and the one that waits for the checkpoint to reach its LSN. Used by the loop's thread alone,
and never while a streamed transaction is open.
"""

from __future__ import annotations

import dataclasses
import queue
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from cdc.copier import Copied, Copy, CopyBegun, CopyFailed, CopyItem
from cdc.errors import CdcError, ConnectionLost, Resync, SinkError, TableError
from cdc.settings import Settings
from cdc.sink.holding import Holding
from cdc.sink.sink import Sink
from cdc.sink.staging import CopiedChunk
from cdc.sink.stored import Table
from cdc.source.slot import Blocker

__all__ = ["Copies", "Observer"]

PATIENCE_S = 2.0
"""How long the end of a copy that was given up is waited for."""


class Observer(Protocol):
    """Who is told what happens. Methods may be called from several threads."""

    def event(self, name: str, **fields: Any) -> None:
        """Something worth a line in the log."""

    def progress(self, table: str, rows: int, done_bytes: int, total_bytes: int) -> None:
        """A copy has come so far; `total_bytes` is the table's size in Postgres, an estimate."""

    def copied(self, table: str, rows: int) -> None:
        """A copy is complete and streams from here on."""


@dataclasses.dataclass(slots=True)
class _Progress:
    """How far the copy in hand has come."""

    table: str
    total_bytes: int
    rows: int = 0
    bytes: int = 0


class Copies:
    """See the module."""

    def __init__(
        self,
        settings: Settings,
        publications: Sequence[str],
        sink: Sink,
        observer: Observer,
        holding: Holding,
        waiting: Callable[[list[Blocker], float, str], None],
    ) -> None:
        """Create it without a copy in hand.

        Args:
            holding: how columns are held.
            waiting: told for whom a copy waits, for how many seconds by now, and of which table it is.
        """
        self._settings = settings
        self._publications = publications
        self._sink = sink
        self._observer = observer
        self._holding = holding
        self._waiting = waiting
        self._copy: Copy | None = None
        self._copied: Copied | None = None
        self._progress = _Progress("", 0)

    @property
    def active(self) -> bool:
        """Whether a copy is being made."""
        return self._copy is not None

    @property
    def ready(self) -> bool:
        """Whether the copy in hand has something for `step`."""
        return self._copy is not None and not self._copy.items.empty()

    @property
    def unfinished(self) -> bool:
        """Whether a table is being copied or waits to be."""
        return self._copy is not None or self._copied is not None or self._next_table() is not None

    @property
    def wanted(self) -> int | None:
        """The position that the checkpoint has to reach for the next swap."""
        return self._copied.table.lsn if self._copied is not None else None

    def step(self, acquire: Callable[[], None]) -> None:
        """Take one thing that the copy in hand has made; swap in what the checkpoint has reached; begin the next.

        Args:
            acquire: takes the warehouse; it may `drop` what is in hand.
        """
        if self.ready:
            acquire()
            self._take()
        if self._copied is not None and self._sink.position >= self._copied.table.lsn:
            acquire()
            self._swap()
        if self._copy is None and self._copied is None and self._next_table() is not None:
            acquire()
            if (table := self._next_table()) is not None:
                self._begin(table)

    def drop(self, oid: int) -> None:
        """Give up the copy of the table `oid`, if it is the one in hand: the table's state has changed."""
        if self._copy is not None and self._copy.oid == oid:
            self._copy.stop(PATIENCE_S)
            self._copy = None
        if self._copied is not None and self._copied.table.oid == oid:
            self._sink.history.remove_temporary(self._copied.files)
            self._copied = None

    def stop(self) -> None:
        """Give up whatever is in hand."""
        if self._copy is not None:
            self.drop(self._copy.oid)
        if self._copied is not None:
            self.drop(self._copied.table.oid)

    def _next_table(self) -> Table | None:
        tables = self._sink.ledger.tables.values()
        return next((table for table in tables if table.state in ("pending", "resyncing", "copying")), None)

    def _begin(self, table: Table) -> None:
        self._sink.begin_copy(table.oid)
        tables, history = list(self._sink.ledger.tables.values()), self._sink.history
        self._copy = Copy(table, tables, self._settings, self._publications, history, self._holding, self._waiting)
        self._copy.start()
        self._observer.event("copy", table=str(table))

    def _take(self) -> None:
        if self._copy is None:
            return
        try:
            item = self._copy.items.get_nowait()
        except queue.Empty:
            return
        try:
            self._item(item)
        except TableError as error:
            self._fail(error)

    def _item(self, item: CopyItem) -> None:
        match item:
            case CopyBegun():
                self._sink.begin_rows(item.table)
                self._progress = _Progress(str(item.table), item.estimate_bytes)
            case CopiedChunk():
                self._sink.stage(item)
                self._progress.rows += item.rows.num_rows
                self._progress.bytes += item.rows.nbytes
                done = self._progress
                self._observer.progress(done.table, done.rows, done.bytes, done.total_bytes)
            case Copied():
                self._copy, self._copied = None, item
            case CopyFailed():
                self._copy = None
                raise _of_table(item)

    def _swap(self) -> None:
        copied, self._copied = self._copied, None
        if copied is None:
            return
        table = self._sink.ledger.tables.get(copied.table.oid)
        if table is None or table.state not in ("copying", "resyncing"):  # it was put aside meanwhile
            self._sink.history.remove_temporary(copied.files)
            return
        try:
            self._sink.swap(copied.table, copied.files)
        except ConnectionLost as error:  # the catalog was needed, to follow DDL
            self._fail(Resync(f"the copy of {copied.table} begins again: {error}", copied.table.oid))
        except TableError as error:
            self._fail(error)
        else:
            self._observer.copied(str(copied.table), copied.rows)

    def _fail(self, error: TableError) -> None:
        self.drop(error.oid)
        table = self._sink.set_aside(error)
        if table is None:
            raise error
        self._observer.event("table", table=str(table), state=table.state, reason=str(error), hint=error.hint)


def _of_table(failed: CopyFailed) -> CdcError:
    """Return why a copy failed as an error of its table."""
    if isinstance(failed.error, TableError | SinkError):
        return failed.error
    return TableError(str(failed.error), failed.oid, failed.error.hint)
