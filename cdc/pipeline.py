"""The loop: source to sink, and the confirmation back. The only module that knows every room.

    receiver thread ──WireBatch, Idle──▶ ┐
                                         ├─ this loop ──▶ decoder ──▶ sink (one transaction) ──▶ receiver.confirm
    copier threads ──copied rows───────▶ ┘

Rules. A batch's transaction commits data and checkpoint together, and only then is the slot confirmed. A transaction
larger than a batch stays open over several; copies wait for its end. The warehouse is let go of whenever there is
nothing to write. An error in one table puts that table aside; any other ends the loop with nothing confirmed that is
not durable. A broken connection is made anew from the checkpoint, with a decoder that knows nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any, Protocol

import duckdb
import stamina

from cdc.copier import Copied, Copier, CopyBegun, CopyFailed, CopyItem
from cdc.errors import CdcError, ConnectionLost, SinkError, TableError, WarehouseBusy
from cdc.failpoints import reach
from cdc.lsn import format_lsn
from cdc.pgoutput.decoder import Decoder
from cdc.pgoutput.messages import WireBatch
from cdc.settings import Settings
from cdc.sink.checkpoint import Table
from cdc.sink.history import History
from cdc.sink.schema import LiveColumn, LiveTable
from cdc.sink.sink import CopiedChunk, Resync, Sink
from cdc.sink.warehouse import ConsumerLock, Warehouse
from cdc.source import catalog, fence
from cdc.source.catalog import PublishedTable
from cdc.source.connection import connect
from cdc.source.slot import Blocker
from cdc.source.stream import NEVER, Idle, Item, Limits, Receiver, StreamEnded
from cdc.source.watcher import Watcher
from cdc.startup import prepare, reconcile

__all__ = ["Observer", "Pipeline"]

STOP_S = 8.0
"""After a signal, so long for what is in hand; then it is rolled back, unconfirmed."""

QUEUE_BATCHES = 2
"""Batches between receiver and applier; each is bounded by CDC_FLUSH_ROWS and CDC_FLUSH_BYTES."""

_TICK_S = 0.2
_COPY_TICK_S = 0.01
_BUSY_WARNING_S = 5.0


class Observer(Protocol):
    """Who is told what happens. Methods may be called from several threads."""

    def event(self, name: str, **fields: Any) -> None:
        """Something worth a line in the log."""

    def progress(self, table: str, rows: int, done_bytes: int, total_bytes: int) -> None:
        """A copy has come so far."""

    def copied(self, table: str, rows: int) -> None:
        """A copy is complete and streams from here on."""


@dataclasses.dataclass(slots=True)
class _Progress:
    """How far the copy in hand has come; sizes in bytes, `total_bytes` that of the table in Postgres, an estimate."""

    table: str
    total_bytes: int
    rows: int = 0
    bytes: int = 0


class Stopped(Exception):
    """`Pipeline.stop` was called while nothing was in hand."""


class Pipeline:
    """One consumer: `run` it once. `stop` may be called from a signal handler of the same thread."""

    def __init__(self, settings: Settings, observer: Observer) -> None:
        self._settings = settings
        self._observer = observer
        self._lock = ConsumerLock(settings.warehouse)
        self._warehouse = Warehouse(settings.warehouse, settings.memory, settings.threads, settings.tmp)
        self._history = History(settings.history)
        self._sink = Sink(
            self._warehouse,
            self._history,
            deletes=settings.deletes,
            live=self._live,
            waiting=self._waiting_for_warehouse,
            give_up=lambda: self._stopping,
        )
        self._limits = Limits(settings.flush_rows, settings.flush_bytes, settings.flush_interval)
        self._publications: tuple[str, ...] = ()
        self._stopping = False
        self._interruptible = False
        self._deadline: threading.Timer | None = None
        self._stop_by = 0.0
        self._warned_at = 0.0
        # Of the present connection:
        self._inbox: queue.Queue[Item] = queue.Queue(QUEUE_BATCHES)
        self._receiver: Receiver | None = None
        self._decoder = Decoder(0)
        # Of the copy in hand: what has been copied and waits for the checkpoint to reach its LSN.
        self._copied: Copied | None = None
        self._progress = _Progress("", 0)

    # From outside

    def run(self, *, once: bool = False, fresh: bool = False) -> None:
        """Mirror until `stop`; with `once`, until everything that was committed before the call is in.

        Raises:
            CdcError: see the tree in errors.py. Nothing is lost by any of them.
        """
        self._lock.acquire()
        try:
            self._run(once=once, fresh=fresh)
        except (Stopped, WarehouseBusy, queue.Empty):
            if not self._stopping:
                raise
        except duckdb.InterruptException:  # the deadline after a signal has passed
            self._observer.event("stopped before everything was flushed", hint="the rest comes with the next start")
        finally:
            if self._deadline is not None:
                self._deadline.cancel()
            self._warehouse.release()
            self._history.close()
            self._lock.release()

    def stop(self) -> None:
        """Flush what is in hand, confirm it and let `run` return, within 10 s."""
        if self._stopping:
            return
        self._stopping = True
        self._stop_by = time.monotonic() + STOP_S
        self._deadline = threading.Timer(STOP_S, self._warehouse.interrupt)
        self._deadline.daemon = True
        self._deadline.start()
        if self._interruptible:
            raise Stopped

    # The loop

    def _run(self, *, once: bool, fresh: bool) -> None:
        with self._interruption():
            self._publications = prepare(self._settings, self._sink, self._waiting_for_slot, fresh=fresh)
        copier = Copier(self._settings, self._publications, self._history, self._waiting_for_slot)
        watcher = Watcher(self._settings.dsn, self._settings.publication, self._settings.tables)
        wanted: bytes | None = None
        try:
            self._connect()
            self._observer.event(
                "streaming",
                slot=self._settings.slot,
                position=format_lsn(self._sink.position),
                tables=len(self._sink.ledger.tables),
            )
            if once:
                with connect(self._settings.dsn) as connection:
                    wanted = fence.emit(connection)
            else:
                watcher.start()
            while not (once and wanted is None and not self._copying(copier)):
                if self._stopping:
                    copier.stop()
                    self._drain()
                    break
                item = self._next(copier)
                if item is not None and wanted in self._handle(item):
                    wanted = None
                if not self._warehouse.in_transaction:
                    self._reconcile(watcher.latest())
                    self._copies(copier)
                if self._inbox.empty() and copier.items.empty() and not _backlogged(item):
                    self._sink.release()
        finally:
            watcher.stop()
            copier.stop()
            self._disconnect()
            if self._warehouse.in_transaction:
                self._sink.rollback()

    def _next(self, copier: Copier) -> Item | None:
        try:
            if not copier.items.empty() and not self._warehouse.in_transaction:
                return self._inbox.get_nowait()
            return self._inbox.get(timeout=_COPY_TICK_S if copier.busy else _TICK_S)
        except queue.Empty:
            return None

    def _handle(self, item: Item) -> set[bytes]:
        """Take one item of the stream; return the contents of the fences that it has made durable."""
        reach("after_recv")
        match item:
            case WireBatch():
                return self._batch(item)
            case Idle():
                self._idle(item)
            case StreamEnded():
                self._sink.rollback()
                if item.error is not None and not isinstance(item.error, ConnectionLost):
                    raise item.error
                self._observer.event("connection lost", reason=str(item.error))
                self._connect()
        return set()

    def _batch(self, batch: WireBatch) -> set[bytes]:
        self._acquire()
        decoded = self._decoder.decode(batch)
        continues = self._warehouse.in_transaction
        while True:
            try:
                self._sink.apply(decoded)
                if not batch.complete:
                    reach("mid_txn")
                    return set()
                if decoded.end_lsn is not None and decoded.end_lsn > self._sink.position:
                    self._sink.commit(decoded.end_lsn, decoded.commit_ts)
                else:  # only what was durable already
                    self._sink.rollback()
                break
            except ConnectionLost as error:  # the catalog was needed, to follow DDL
                self._observer.event("connection lost", reason=str(error))
                self._connect()
                return set()
            except TableError as error:
                self._set_aside(error)
                if continues:  # what came before in this transaction is lost with it
                    self._connect()
                    return set()
        self._confirm()
        return {message.content for message in decoded.messages}

    def _idle(self, idle: Idle) -> None:
        """Note a position that the stream has reached without a change for us; only then may it be confirmed."""
        if self._warehouse.in_transaction or idle.lsn <= self._sink.position:
            return
        self._acquire()
        self._sink.commit(idle.lsn, None, idle.at)
        reach("during_idle")
        self._confirm()

    def _confirm(self) -> None:
        reach("before_ack")
        if self._receiver is not None:
            self._receiver.confirm(self._sink.position)
        reach("after_ack")

    def _drain(self) -> None:
        """After a signal: apply what the receiver has whole, then stop."""
        if self._receiver is None:
            return
        self._receiver.drain()
        while (left := self._stop_by - time.monotonic()) > 0:
            item = self._inbox.get(timeout=left)
            if isinstance(item, StreamEnded):
                break
            self._handle(item)

    # The connection

    def _connect(self) -> None:
        """Stream from the checkpoint on, trying again for as long as Postgres cannot be reached."""
        self._disconnect()
        self._sink.release()
        with self._interruption():
            for attempt in stamina.retry_context(
                on=ConnectionLost, attempts=None, timeout=None, wait_initial=0.1, wait_max=5.0, wait_jitter=0.5
            ):
                with attempt:
                    if attempt.num == 2:  # once, not at every try
                        self._observer.event("waiting for Postgres")
                    self._inbox = queue.Queue(QUEUE_BATCHES)
                    receiver = Receiver(
                        self._settings.dsn,
                        self._settings.slot,
                        self._publications,
                        self._sink.position,
                        self._limits,
                        self._inbox,
                    )
                    receiver.connect()
        self._decoder = Decoder(self._sink.position)
        self._receiver = receiver
        receiver.start()

    def _disconnect(self) -> None:
        if self._receiver is not None:
            self._receiver.stop()
            self._receiver.join(2.0)
            self._receiver = None

    # Tables and copies

    def _reconcile(self, published: list[PublishedTable] | None) -> None:
        if published is None:
            return
        changed = reconcile(self._sink.ledger.tables.values(), published)
        if changed:
            self._acquire()
            self._sink.write_tables(changed)
            for table in changed:
                self._observer.event("table", table=str(table), state=table.state, reason=table.reason)

    def _copying(self, copier: Copier) -> bool:
        """Whether a table is being copied or waits to be."""
        return copier.busy or self._copied is not None or self._waiting_table() is not None

    def _waiting_table(self) -> Table | None:
        tables = self._sink.ledger.tables.values()
        return next((table for table in tables if table.state in ("pending", "resyncing", "copying")), None)

    def _copies(self, copier: Copier) -> None:
        """Take one thing that the copier has made; swap in a copy that the checkpoint has reached; begin the next."""
        with contextlib.suppress(queue.Empty):  # no more than one: the stream has its turn between two
            item = copier.items.get_nowait()
            self._acquire()
            try:
                self._copy_item(item)
            except TableError as error:
                self._set_aside(error)
                copier.abandon()
        if self._copied is not None and self._sink.position >= self._copied.snapshot.lsn:
            self._swap(self._copied)
        if self._copied is None and not copier.busy and (table := self._waiting_table()) is not None:
            self._acquire()
            self._sink.begin_copy(table.oid)
            copier.start(table.oid, str(table))
            self._observer.event("copy", table=str(table))

    def _copy_item(self, item: CopyItem) -> None:
        match item:
            case CopyBegun():
                self._sink.begin_rows(item.oid, item.columns)
                self._progress = _Progress(str(item.snapshot.published), item.snapshot.estimate_bytes)
            case CopiedChunk():
                self._sink.stage(item)
                self._progress.rows += item.rows.num_rows
                self._progress.bytes += item.rows.nbytes
                done = self._progress
                self._observer.progress(done.table, done.rows, done.bytes, done.total_bytes)
            case Copied():
                self._copied = item
                if self._receiver is not None:
                    self._receiver.wanted = item.snapshot.lsn
            case CopyFailed():
                raise _of_table(item)

    def _swap(self, copied: Copied) -> None:
        self._acquire()
        self._copied = None
        if self._receiver is not None:
            self._receiver.wanted = NEVER
        snapshot = copied.snapshot
        try:
            self._sink.swap(
                copied.oid, snapshot.lsn, _storage(snapshot.definition), copied.columns, copied.key, copied.files
            )
        except ConnectionLost as error:  # the catalog was needed, to follow DDL
            self._set_aside(Resync(f"the copy of {snapshot.published} begins again: {error}", copied.oid))
        except TableError as error:
            self._set_aside(error)
        else:
            self._observer.copied(str(snapshot.published), copied.rows)

    def _set_aside(self, error: TableError) -> None:
        table = self._sink.set_aside(error)
        if table is None:
            raise error
        self._observer.event("table", table=str(table), state=table.state, reason=str(error), hint=error.hint)

    def _live(self, oid: int) -> LiveTable | None:
        """Return a published table as the catalog has it now, for the sink's schema changes."""
        with connect(self._settings.dsn) as connection:
            definition = catalog.definition(connection, oid)
            published = [t for t in catalog.published(connection, self._publications) if t.oid == oid]
        if definition is None or not published:
            return None
        return LiveTable(
            _storage(definition),
            tuple(
                LiveColumn(a.name, a.type_oid, a.typmod, a.attnum, a.missing)
                for a in definition.attributes
                if a.name in published[0].columns
            ),
        )

    # Waiting

    def _acquire(self) -> None:
        for oid in self._sink.acquire():
            table = self._sink.ledger.tables[oid]
            self._observer.event("table", table=str(table), state=table.state, reason="cdc resync")

    def _waiting_for_warehouse(self, busy: WarehouseBusy, waited_s: float) -> None:
        if waited_s >= _BUSY_WARNING_S and time.monotonic() - self._warned_at >= _BUSY_WARNING_S:
            self._warned_at = time.monotonic()
            self._observer.event(
                "waiting for the warehouse", reason=str(busy), waited_s=round(waited_s), hint=busy.hint
            )

    def _waiting_for_slot(self, blockers: list[Blocker], waited_s: float, table: str = "") -> None:
        if time.monotonic() - self._warned_at >= _BUSY_WARNING_S:
            self._warned_at = time.monotonic()
            who = "; ".join(f"pid {b.pid}, {b.age_s:.0f} s old: {b.description}" for b in blockers[:3])
            self._observer.event(
                "waiting for running transactions to end", table=table, waited_s=round(waited_s), transactions=who
            )

    @contextlib.contextmanager
    def _interruption(self) -> Iterator[None]:
        """Within it, a signal ends what is under way at once: nothing is in hand that would have to be flushed."""
        if self._stopping:
            raise Stopped
        self._interruptible = True
        try:
            yield
        finally:
            self._interruptible = False


def _backlogged(item: Item | None) -> bool:
    """Whether the next batch is likely on its way: to close the warehouse now would cost more than it gives."""
    return isinstance(item, WireBatch) and item.full


def _storage(definition: catalog.TableDefinition) -> str:
    return ",".join(f"{oid}:{node}" for oid, node in definition.relfilenodes)


def _of_table(failed: CopyFailed) -> CdcError:
    """Return why a copy failed as an error of its table."""
    if isinstance(failed.error, TableError | SinkError):
        return failed.error
    return TableError(str(failed.error), failed.oid, failed.error.hint)
