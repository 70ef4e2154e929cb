"""The copy of one table in the background: from Postgres' COPY to rows and files that the sink takes over.

One thread drives it, and one per connection reads and decodes. What they make goes through a small bounded queue, so a
copy is never more than a few chunks ahead of the sink. A copy whose connection breaks, or whose table is being altered,
begins again by itself; nothing of it was visible.

State: one copy at a time, owned by its thread until `Copied` or `CopyFailed` is in the queue.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import threading
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import stamina

from cdc.errors import CdcError, ConnectionLost, TableError
from cdc.pgoutput.changes import Unfit
from cdc.pgoutput.copy import decode_copy
from cdc.pgoutput.messages import Column
from cdc.settings import Settings
from cdc.sink.checkpoint import StoredColumn
from cdc.sink.history import History, HistoryFile, as_log
from cdc.sink.sink import COPY_SEQ, CopiedChunk
from cdc.source import fence
from cdc.source.connection import connect
from cdc.source.slot import Blocker
from cdc.source.snapshot import CopyLimits, Snapshot, copy_table

__all__ = ["Copied", "Copier", "CopyBegun", "CopyFailed", "CopyItem"]

_PUT_S = 0.2


@dataclasses.dataclass(frozen=True, slots=True)
class CopyBegun:
    """The copy's snapshot is taken; it may come again for the same copy, which then begins from nothing."""

    oid: int
    snapshot: Snapshot
    columns: tuple[StoredColumn, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Copied:
    """All rows of the copy have been put."""

    oid: int
    snapshot: Snapshot
    columns: tuple[StoredColumn, ...]
    key: tuple[str, ...]
    rows: int
    files: tuple[HistoryFile, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class CopyFailed:
    """The table cannot be copied."""

    oid: int
    error: CdcError


CopyItem = CopyBegun | CopiedChunk | Copied | CopyFailed


class _Stopped(Exception):
    """`Copier.stop` was called."""


class Copier:
    """Makes one copy at a time; `start` the next when the last has ended."""

    def __init__(
        self,
        settings: Settings,
        publications: Sequence[str],
        history: History,
        waiting: Callable[[list[Blocker], float, str], None],
    ) -> None:
        """Create one that does nothing yet.

        Args:
            waiting: told for whom a copy waits, for how many seconds by now, and of which table it is.
        """
        self.items: queue.Queue[CopyItem] = queue.Queue(maxsize=2)
        self._settings = settings
        self._publications = publications
        self._history = history
        self._waiting = waiting
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._rows = 0
        self._files: list[HistoryFile] = []

    @property
    def busy(self) -> bool:
        """Whether a copy is being made, or has items left in the queue."""
        return (self._thread is not None and self._thread.is_alive()) or not self.items.empty()

    def start(self, oid: int, name: str) -> None:
        """Begin the copy of the table with this OID; its changes are being kept already."""
        self._thread = threading.Thread(target=self._run, args=[oid, name], name="cdc-copier", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the copy in hand within a second or two; what it has written is removed."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(2.0)
            self._thread = None
        with contextlib.suppress(queue.Empty):
            while True:
                self.items.get_nowait()
        self._forget()

    def abandon(self) -> None:
        """End the copy in hand, and be ready for the next."""
        self.stop()
        self._stopping = threading.Event()

    def _run(self, oid: int, name: str) -> None:
        try:
            self._put(self._copy(oid, name))
        except _Stopped:
            return
        except CdcError as error:
            self._put_last(CopyFailed(oid, error))
        except Exception as bug:  # noqa: BLE001 -- whatever it is, the pipeline has to hear of it
            self._put_last(CopyFailed(oid, CdcError(f"copy of {name} failed: {type(bug).__name__}: {bug}")))

    def _copy(self, oid: int, name: str) -> Copied:
        limits = CopyLimits(self._settings.flush_rows, self._settings.flush_bytes, self._settings.threads)
        for attempt in stamina.retry_context(
            on=ConnectionLost, attempts=None, timeout=None, wait_initial=0.2, wait_max=5.0
        ):
            with attempt:
                if self._stopping.is_set():
                    raise _Stopped
                self._forget()
                snapshot = copy_table(
                    self._settings.dsn,
                    self._publications,
                    oid,
                    f"{self._settings.slot[:40]}_copy_{os.getpid()}",
                    limits,
                    started=lambda snapshot: self._put(CopyBegun(oid, snapshot, _columns(snapshot))),
                    rows=self._chunk,
                    waiting=lambda blockers, waited_s: self._waiting(blockers, waited_s, name),
                    stopping=self._stopping.is_set,
                )
                # A commit of our own behind L: on an idle server the stream would not soon go past L.
                with connect(self._settings.dsn) as connection:
                    fence.emit(connection)
        return Copied(oid, snapshot, _columns(snapshot), _key(snapshot), self._rows, tuple(self._files))

    def _chunk(self, snapshot: Snapshot, data: bytes, count: int) -> None:
        """Decode some rows, write them for the history, and put them. Runs in the workers' threads."""
        columns = _columns(snapshot)
        arrays, unfit = decode_copy(data, [Column(c.name, c.type_oid, c.typmod, is_key=False) for c in columns])
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
            file = self._history.describe(snapshot.published.schema, snapshot.published.name, log)
            with self._lock:
                self._files.append(file)
            self._history.write_temporary(file, log)
        rows = pa.table(arrays, names=names)
        self._put(CopiedChunk(snapshot.definition.oid, rows, file, _quarantined(snapshot, rows, unfit, seq)))

    def _forget(self) -> None:
        """Begin from nothing: remove the files of a copy that did not come to its end."""
        self._rows = 0
        files, self._files = self._files, []
        self._history.remove_temporary(files)

    def _put(self, item: CopyItem) -> None:
        while not self._stopping.is_set():
            try:
                self.items.put(item, timeout=_PUT_S)
            except queue.Full:
                continue
            if isinstance(item, Copied):
                self._files = []  # the sink's from here on
            return
        raise _Stopped

    def _put_last(self, item: CopyFailed) -> None:
        try:
            self._put(item)
        except _Stopped:
            return


def _columns(snapshot: Snapshot) -> tuple[StoredColumn, ...]:
    by_name = {attribute.name: attribute for attribute in snapshot.definition.attributes}
    chosen = [by_name[name] for name in snapshot.published.columns]
    return tuple(StoredColumn(a.name, a.type_oid, a.typmod, a.attnum) for a in chosen)


def _key(snapshot: Snapshot) -> tuple[str, ...]:
    key = set(snapshot.definition.key)
    return tuple(attribute.name for attribute in snapshot.definition.attributes if attribute.attnum in key)


def _quarantined(
    snapshot: Snapshot, rows: pa.Table, unfit: Sequence[Unfit], seq: np.ndarray
) -> list[tuple[str, str | None, str, int]]:
    """Return what the quarantine keeps of values that their type cannot hold: column, key, text, seq.

    Raises:
        TableError: such a value is in a key column.
    """
    key = _key(snapshot)
    found = []
    for misfit in unfit:
        name = rows.column_names[misfit.column]
        if name in key:
            raise TableError(
                f"key column {name} of {snapshot.published} holds a value that its type in DuckDB cannot",
                snapshot.definition.oid,
                "leave the table out with CDC_TABLES, or give the column a type with a smaller range",
            )
        keys = rows.select(list(key)).take(misfit.rows).to_pylist() if key else [None] * len(misfit.rows)
        for row, values, text in zip(misfit.rows.tolist(), keys, misfit.texts, strict=True):
            label = json.dumps({k: str(v) for k, v in values.items()}) if values is not None else None
            found.append((name, label, text, int(seq[row])))
    return found
