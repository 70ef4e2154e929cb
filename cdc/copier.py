"""The copy of one table in the background: from Postgres' COPY to rows and files that the sink takes over.

One thread drives it, and one per connection reads and decodes. What they make goes through a small bounded queue, so a
copy is never more than a few chunks ahead of the sink. A copy whose connection breaks, or whose table is being altered,
begins again by itself; nothing of it was visible.

State: what it has written, until `Copied` is taken from its queue; then it is the taker's.
"""

from __future__ import annotations

import dataclasses
import queue
import secrets
import threading
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import stamina

from cdc.errors import CdcError, ConnectionLost, SourceError
from cdc.live import live_table
from cdc.pgoutput.copy import decode_copy
from cdc.pgoutput.masks import Mask, masks_of, refuse_renamed
from cdc.pgoutput.messages import Column
from cdc.settings import Settings
from cdc.sink.evolve import COPY_SEQ
from cdc.sink.history import History, HistoryFile, as_log
from cdc.sink.holding import Holding, table_alias
from cdc.sink.staging import CopiedChunk, CopiedTable
from cdc.sink.stored import Table
from cdc.source import fence
from cdc.source.connection import connect
from cdc.source.slot import Blocker
from cdc.source.snapshot import CopyLimits, Snapshot, copy_table

__all__ = ["Copied", "Copy", "CopyBegun", "CopyFailed", "CopyItem"]

_PUT_S = 0.2


@dataclasses.dataclass(frozen=True, slots=True)
class CopyBegun:
    """The copy's snapshot is taken; it may come again for the same copy, which then begins from nothing."""

    table: CopiedTable
    estimate_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class Copied:
    """All rows of the copy have been put."""

    table: CopiedTable
    rows: int
    files: tuple[HistoryFile, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class CopyFailed:
    """The table cannot be copied."""

    oid: int
    error: CdcError


CopyItem = CopyBegun | CopiedChunk | Copied | CopyFailed


class _Stopped(Exception):
    """`Copy.stop` was called."""


class Copy:
    """One copy: `start` it, take its `items` until `Copied` or `CopyFailed`, or `stop` it.

    Nothing is shared with another copy: one that was stopped and has not noticed yet can do no harm to the next.
    """

    def __init__(
        self,
        table: Table,
        tables: Sequence[Table],
        settings: Settings,
        publications: Sequence[str],
        history: History,
        holding: Holding,
        waiting: Callable[[list[Blocker], float, str], None],
    ) -> None:
        """Create a copy of `table` that does nothing yet.

        Args:
            tables: that are known.
            holding: how columns are held.
            waiting: told for whom it waits, for how many seconds by now, and the table's name.
        """
        self.oid = table.oid
        self.items: queue.Queue[CopyItem] = queue.Queue(maxsize=2)
        self._name = str(table)
        self._table, self._tables = table, tables
        self._holding = holding
        self._was_masked = any(column.mask for column in table.columns)
        self._settings = settings
        self._publications = publications
        self._history = history
        self._waiting = waiting
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"cdc-copy-{table.oid}", daemon=True)
        self._lock = threading.Lock()
        self._rows = 0
        self._files: list[HistoryFile] = []
        self._copied: CopiedTable
        self._masks = settings.masks
        self._chosen: dict[int, Mask] = {}

    def start(self) -> None:
        """Begin; the table's changes are being kept already."""
        self._thread.start()

    def stop(self, patience_s: float) -> None:
        """End it, and wait so long for that; its thread removes what it has written."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(patience_s)

    def _run(self) -> None:
        last: CopyItem
        try:
            last = self._copy()
        except _Stopped:
            self._forget()
            return
        except CdcError as error:
            self._forget()
            last = CopyFailed(self.oid, error)
        except Exception as bug:  # noqa: BLE001 -- whatever it is, the pipeline has to hear of it
            self._forget()
            last = CopyFailed(self.oid, CdcError(f"copy of {self._name} failed: {type(bug).__name__}: {bug}"))
        try:
            self._put(last)
        except _Stopped:
            self._forget()

    def _copy(self) -> Copied:
        limits = CopyLimits(self._settings.flush_rows, self._settings.flush_bytes, self._settings.threads)
        for attempt in stamina.retry_context(
            on=_worth_another_try, attempts=None, timeout=None, wait_initial=0.2, wait_max=5.0
        ):
            with attempt:
                if self._stopping.is_set():
                    raise _Stopped
                self._forget()
                copy_table(
                    self._settings.dsn,
                    self._publications,
                    self.oid,
                    # Of its own at each try: the server may not have noticed yet that an earlier one was given up.
                    f"{self._settings.slot[:40]}_copy_{secrets.token_hex(4)}",
                    limits,
                    started=self._begin,
                    rows=self._chunk,
                    waiting=lambda blockers, waited_s: self._waiting(blockers, waited_s, self._name),
                    stopping=self._stopping.is_set,
                )
                # A commit of our own behind L: on an idle server the stream would not soon go past L.
                with connect(self._settings.dsn) as connection:
                    fence.emit(connection)
        return Copied(self._copied, self._rows, tuple(self._files))

    def _begin(self, snapshot: Snapshot) -> None:
        self._chosen = self._masked(snapshot)
        self._copied = self._described(snapshot)
        self._put(CopyBegun(self._copied, snapshot.estimate_bytes))

    def _chunk(self, snapshot: Snapshot, data: bytes, count: int) -> None:
        """Decode some rows, write them for the history, and put them. Runs in the workers' threads."""
        columns = [Column(column.here, *column.basis, is_key=False) for column in self._copied.columns]
        arrays, unfit = decode_copy(data, columns, self._chosen)
        with self._lock:
            seq = np.arange(COPY_SEQ + 1 + self._rows, COPY_SEQ + 1 + self._rows + count)
            self._rows += count
        names = [column.name for column in columns]
        file = None
        if self._history.root is not None:
            log = as_log(
                np.full(count, ord("S"), np.uint8),
                np.full(count, snapshot.lsn, np.uint64),
                seq,
                np.zeros(count, np.uint32),
                np.full(count, snapshot.taken_at, np.int64),
                names,
                arrays,
            )
            file = self._history.describe(*self._copied.here, log)
            with self._lock:
                self._files.append(file)
            self._history.write_temporary(file, log)
        rows = pa.table(arrays, names=names)
        self._put(CopiedChunk(self.oid, rows, int(seq[0]), file, unfit))

    def _masked(self, snapshot: Snapshot) -> dict[int, Mask]:
        """Return the masks of the copied columns.

        Raises:
            MaskError: see `masks_of` and `refuse_renamed`.
        """
        names = snapshot.published.columns
        known = (self._name, str(snapshot.published))
        refuse_renamed(self._masks, self.oid, known, names, was_masked=self._was_masked)
        attnums = {attribute.name: attribute.attnum for attribute in snapshot.definition.attributes}
        key = [index for index, name in enumerate(names) if attnums[name] in snapshot.definition.key]
        return masks_of(self._masks, self.oid, known[1:], names, key)

    def _described(self, snapshot: Snapshot) -> CopiedTable:
        """Return what is copied, as the warehouse has it."""
        definition, known = snapshot.definition, (self._name, str(snapshot.published))
        live = live_table(definition, snapshot.published.columns, self._masks, known[1:])
        soft = self._settings.deletes == "soft"
        return CopiedTable(
            self.oid,
            definition.schema,
            definition.name,
            snapshot.lsn,
            definition.storage,
            definition.natts,
            definition.types,
            self._holding.columns(self._table, known, live.columns, soft=soft),
            live.hidden,
            table_alias(self._tables, self.oid, definition.schema, definition.name),
        )

    def _forget(self) -> None:
        """Begin from nothing: remove the files of a try that did not come to its end."""
        self._rows = 0
        files, self._files = self._files, []
        self._history.remove_temporary(files)

    def _put(self, item: CopyItem) -> None:
        while not self._stopping.is_set():
            try:
                self.items.put(item, timeout=_PUT_S)
            except queue.Full:
                continue
            return
        raise _Stopped


def _worth_another_try(error: Exception) -> bool:
    """Whether a copy begins again by itself: the connection broke, or the server has no room for it just now."""
    lost = isinstance(error, ConnectionLost)
    return lost or (isinstance(error, SourceError) and error.sqlstate in ("42710", "53400"))
