"""The loop: source to sink, and the confirmation back. The only module that knows every room.

    receiver thread ──WireBatch, Idle──▶ ┐
                                         ├─ this loop ──▶ decoder ──▶ sink (one transaction) ──▶ receiver.confirm
    copier threads ──copied rows───────▶ ┘

Rules. A batch's transaction commits data and checkpoint together, and only then is the slot confirmed. A transaction
larger than a batch stays open over several; copies wait for its end. The warehouse is let go of whenever there is
nothing to write, and every few seconds while there always is. An error in one table puts that table aside; any other
ends the loop with nothing confirmed that is not durable. A broken connection is made anew from the checkpoint, with a
decoder that knows nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
import time
from collections.abc import Iterator, Sequence

import duckdb
import stamina

from cdc.copies import Copies, Observer
from cdc.drift import Verdict, judge
from cdc.errors import ConnectionLost, MaskError, SinkError, TableError, WarehouseBusy
from cdc.failpoints import reach
from cdc.live import live_table, relation_of
from cdc.lsn import format_lsn
from cdc.pgoutput.decoder import Decoder
from cdc.pgoutput.messages import WireBatch
from cdc.reconcile import again, reconcile
from cdc.settings import Settings
from cdc.sink.answers import Answers
from cdc.sink.checkpoint import Table
from cdc.sink.evolve import Resync
from cdc.sink.history import History
from cdc.sink.schema import LiveTable
from cdc.sink.sink import Sink
from cdc.sink.storage import read as read_storage
from cdc.sink.view import View
from cdc.sink.warehouse import ConsumerLock, Warehouse
from cdc.source import fence
from cdc.source.catalog import TableDefinition
from cdc.source.connection import connect
from cdc.source.look import Look, look
from cdc.source.slot import Blocker, Slot
from cdc.source.stream import NEVER, Idle, Item, Limits, Receiver, StreamEnded
from cdc.source.watcher import Watcher
from cdc.startup import check, prepare
from cdc.tally import Tally

__all__ = ["Observer", "Pipeline"]

STOP_S = 6.0
"""After a signal, so long for what is in hand; then it is rolled back, unconfirmed, and threads are waited for."""

QUEUE_BATCHES = 2
"""Batches between receiver and applier; each is bounded by CDC_FLUSH_ROWS and CDC_FLUSH_BYTES."""

_TICK_S = 0.2
_COPY_TICK_S = 0.01
_BUSY_WARNING_S = 5.0

# A consumer that is always busy lets go of the warehouse that often, and for so long, for those who wait for it.
_HOLD_S = 5.0
_ROOM_S = 0.1


class Stopped(Exception):
    """`Pipeline.stop` was called while nothing was in hand."""


class Pipeline:
    """One consumer: `run` it once. `stop` may be called from a signal handler of the same thread."""

    def __init__(self, settings: Settings, observer: Observer) -> None:
        self._settings = settings
        self._observer = observer
        self._lock = ConsumerLock(settings.warehouse)
        self._warehouse = Warehouse(settings.warehouse, settings.memory, settings.threads, settings.tmp)
        self._answers = Answers(self._warehouse)
        self._history = History(settings.history)
        self._sink = Sink(
            self._warehouse,
            self._history,
            deletes=settings.deletes,
            live=self._live,
            waiting=self._waiting_for_warehouse,
            give_up=lambda: self._stopping and time.monotonic() >= self._stop_by,
            view=_view(settings),
            masks=settings.masks,
        )
        self._limits = Limits(settings.flush_rows, settings.flush_bytes, settings.flush_interval)
        self._publications: tuple[str, ...] = ()
        self._copies: Copies | None = None
        self._stopping = False
        self._interruptible = False
        self._deadline: threading.Timer | None = None
        self._stop_by = 0.0
        self._warned_at = 0.0
        self._tally = Tally()
        # Of the present connection:
        self._inbox: queue.Queue[Item] = queue.Queue(QUEUE_BATCHES)
        self._receiver: Receiver | None = None
        self._decoder = Decoder(0)
        # By the fence that follows it: how the catalog was then. So it is in the stream, too, once the fence has come;
        # until then changes from before may still be on their way.
        self._fences: dict[bytes, Look] = {}

    # From outside

    def run(self, *, once: bool = False, fresh: bool = False) -> None:
        """Mirror until `stop`; with `once`, until everything that was committed before the call is in.

        Raises:
            CdcError: see the tree in errors.py. Nothing is lost by any of them.
        """
        self._lock.acquire()
        try:
            self._listen()
            self._run(once=once, fresh=fresh)
        except (Stopped, WarehouseBusy, queue.Empty):
            if not self._stopping:
                raise
        except duckdb.InterruptException:  # the deadline after a signal has passed
            self._observer.event("stopped before everything was flushed", hint="the rest comes with the next start")
        finally:
            if self._deadline is not None:
                self._deadline.cancel()
            with contextlib.ExitStack() as stack:  # each of them, whatever becomes of the others; from the last on
                stack.callback(self._lock.release)
                stack.callback(self._history.close)
                stack.callback(self._warehouse.release)
                stack.callback(self._answers.stop)

    @property
    def failed(self) -> list[Table]:
        """The tables in state error: nothing of them is mirrored until they are copied anew."""
        return [table for table in self._sink.ledger.tables.values() if table.state == "error"]

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

    def _listen(self) -> None:
        try:
            self._answers.start()
        except OSError as error:  # no reason not to mirror
            reason = f"no socket can be made: {error.strerror}"
            self._observer.event("queries have to wait while the warehouse is written", reason=reason)

    # The loop

    def _run(self, *, once: bool, fresh: bool) -> None:
        with self._interruption():
            self._publications = prepare(
                self._settings, self._sink, self._waiting_for_slot, self._slot_in_use, fresh=fresh, once=once
            )
        if aside := self._sink.show():
            self._observer.event("renamed aside", table=self._settings.view, new_name=aside)
        self._take_marks()
        copies = Copies(self._settings, self._publications, self._sink, self._observer, self._waiting_for_slot)
        self._copies = copies
        settings = self._settings
        watcher = Watcher(settings.dsn, self._publications, settings.tables, settings.exclude, settings.poll_interval)
        try:
            self._connect()
            self._observer.event(
                "streaming",
                slot=self._settings.slot,
                position=format_lsn(self._sink.position),
                tables=len(self._sink.ledger.tables),
            )
            self._fence_surely()
            if not once:
                watcher.start()
            while not (once and not self._fences and not copies.unfinished):
                if self._stopping:
                    watcher.stop()
                    copies.stop()
                    self._drain()
                    break
                self._summarize()
                item = self._next(copies)
                if item is not None:
                    self._pass_fences(self._handle(item))
                if self._warehouse.touched:  # perhaps by `cdc resync`
                    self._acquire()
                if not self._warehouse.in_transaction:
                    self._reconcile(watcher.latest())
                    copies.step(self._acquire)
                    self._tell()
                if self._receiver is not None:
                    self._receiver.wanted = NEVER if copies.wanted is None else copies.wanted
                self._let_go(busy=not self._inbox.empty() or copies.ready or _backlogged(item))
        finally:
            watcher.stop()
            copies.stop()
            self._disconnect()
            if self._warehouse.in_transaction:
                self._sink.rollback()

    def _next(self, copies: Copies) -> Item | None:
        try:
            if copies.ready and not self._warehouse.in_transaction:
                return self._inbox.get_nowait()
            return self._inbox.get(timeout=_COPY_TICK_S if copies.active else _TICK_S)
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
                    self._tally.count(decoded)
                    return set()
                if decoded.end_lsn is not None and decoded.end_lsn > self._sink.position:
                    self._sink.commit(decoded.end_lsn, decoded.commit_ts)
                    self._tally.count(decoded)
                    self._tally.as_of = decoded.commit_ts
                else:  # only what was durable already
                    self._sink.rollback()
                break
            except ConnectionLost as error:  # the catalog was needed, to follow DDL
                self._observer.event("connection lost", reason=str(error))
                self._connect()
                return set()
            except (TableError, SinkError) as error:
                if isinstance(error, TableError):
                    self._set_aside(error)
                elif not self._make_room(error):
                    raise
                if continues:  # what came before in this transaction is lost with it
                    self._connect()
                    return set()
        self._confirm()
        return {message.content for message in decoded.messages}

    def _make_room(self, error: SinkError) -> bool:
        """Whether what was short of memory may be tried again: queries share it, and were broken off."""
        if not isinstance(error.__cause__, duckdb.OutOfMemoryException) or not self._warehouse.guests:
            return False
        self._observer.event("queries were broken off", reason="the memory of CDC_MEMORY is needed for the stream")
        self._warehouse.dismiss()
        return True

    def _idle(self, idle: Idle) -> None:
        """Note a position that the stream has reached without a change for us; only then may it be confirmed."""
        if self._warehouse.in_transaction or idle.lsn <= self._sink.position:
            return
        self._acquire()
        self._sink.commit(idle.lsn, None, idle.at)
        self._tally.as_of = idle.at
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

    def _let_go(self, *, busy: bool) -> None:
        """Let others have the warehouse; while there is always something to write, every few seconds."""
        if not busy:
            self._sink.release()
        elif self._warehouse.held_s >= _HOLD_S and not self._warehouse.in_transaction:
            self._sink.release()
            if not self._warehouse.held:
                time.sleep(_ROOM_S)

    def _summarize(self) -> None:
        """Once a minute, tell how far it is."""
        if not self._tally.due():
            return
        position = self._sink.position
        received = position if self._receiver is None else self._receiver.received
        self._observer.event("mirrored", **self._tally.summary(position, received))

    # The connection

    def _connect(self) -> None:
        """Stream from the checkpoint on, trying again for as long as Postgres cannot be reached."""
        self._disconnect()
        self._sink.release()
        lost: ConnectionLost | None = None
        with self._interruption():
            for attempt in stamina.retry_context(
                on=ConnectionLost, attempts=None, timeout=None, wait_initial=0.1, wait_max=5.0, wait_jitter=0.5
            ):
                with attempt:
                    if lost is not None and attempt.num == 2:  # once, not at every try
                        self._observer.event("waiting for Postgres", reason=str(lost), hint=lost.hint)
                    self._inbox = queue.Queue(QUEUE_BATCHES)
                    receiver = Receiver(
                        self._settings.dsn,
                        self._settings.slot,
                        self._publications,
                        self._sink.position,
                        self._limits,
                        self._inbox,
                    )
                    self._sink.release()  # a guest may have kept it open
                    try:
                        check(self._settings, self._sink.ledger.checkpoint)
                        receiver.connect()
                    except ConnectionLost as error:
                        lost = error
                        raise
        self._decoder = Decoder(self._sink.position)
        self._receiver = receiver
        receiver.start()

    def _disconnect(self) -> None:
        if self._receiver is not None:
            self._receiver.stop()
            self._receiver.join(2.0)
            self._receiver = None

    # Tables

    def _fence(self) -> None:
        """Look at the catalog, and mark the place in the stream from which on that holds."""
        storages = (read_storage(table.storage) for table in self._sink.ledger.tables.values())
        known = {oid for storage in storages if storage is not None for oid in storage.members}
        with connect(self._settings.dsn) as connection:
            seen = look(connection, self._publications, known)
            token = fence.emit(connection)
            # What changes just now may lie before the fence, and not be in the look.
            self._fences[token] = seen.settled(look(connection, self._publications))

    def _fence_surely(self) -> None:
        """Do so however often the connection breaks."""
        while True:
            try:
                self._fence()
            except ConnectionLost as error:
                self._observer.event("connection lost", reason=str(error))
                self._connect()
            else:
                return

    def _pass_fences(self, contents: set[bytes]) -> None:
        """The stream has come past these fences: what was so by then is so here."""
        for token in contents & self._fences.keys():
            seen = self._fences.pop(token)
            for oid in seen.definitions:
                self._judge(oid, seen)
            self._change(reconcile(self._sink.ledger.tables.values(), seen.published, gone=True))
            if seen.unsettled:
                self._fence_surely()

    def _reconcile(self, seen: Look | None) -> None:
        """Take in what a poll has found."""
        if seen is None:
            return
        self._change(reconcile(self._sink.ledger.tables.values(), seen.published, gone=False))
        differs = reconcile(self._sink.ledger.tables.values(), seen.published, gone=True) or any(
            self._verdict(oid, seen) for oid in seen.definitions
        )
        if not self._fences and differs:
            with contextlib.suppress(ConnectionLost):  # the next poll asks again
                self._fence()

    def _verdict(self, oid: int, seen: Look) -> tuple[Verdict, LiveTable] | None:
        table, definition = self._sink.ledger.tables.get(oid), seen.definitions[oid]
        columns = seen.columns(oid)
        if table is None or table.state != "streaming" or columns is None:
            return None
        live = live_table(definition, columns, self._settings.masks, self._names(definition))
        verdict = judge(table, definition, live, seen.empty)
        return None if verdict is None else (verdict, live)

    def _judge(self, oid: int, seen: Look) -> None:
        """Follow what has become of a table without a change that would tell."""
        while (found := self._verdict(oid, seen)) is not None:
            (verdict, live), definition = found, seen.definitions[oid]
            table = self._sink.ledger.tables[oid]
            at = time.time_ns() // 1000
            self._acquire()
            try:
                if verdict.kind == "renamed":
                    self._sink.rename(table, definition.schema, definition.name, at)
                    if table.schema != definition.schema:
                        # Up to PostgreSQL 15 ALTER SCHEMA ... RENAME is not told to a session that knows the table.
                        self._connect()
                elif verdict.kind == "altered":
                    self._sink.follow(table, relation_of(definition, live), live, at)
                elif verdict.kind == "moved":
                    self._sink.write_tables(
                        [dataclasses.replace(table, storage=definition.storage, types=definition.types)]
                    )
                else:
                    self._observer.event("copied anew", table=str(table), reason=verdict.reason)
                    self._change([again(table)])
            except TableError as error:
                self._set_aside(error)

    def _tell(self) -> None:
        """Log the DDL that was followed."""
        for table, change in self._sink.followed():
            self._tally.schema_changes += 1
            self._observer.event("schema change", table=str(table), change=change, state=table.state)

    def _take_marks(self) -> None:
        """Begin what `cdc resync` has asked for."""
        marked = self._sink.ledger.requested()
        self._change([again(self._sink.ledger.tables[oid]) for oid in marked], requested=True)

    def _change(self, changed: Sequence[Table], *, requested: bool = False) -> None:
        """Write changed rows of ``_cdc.tables``; a copy that is under way for one of them is worth nothing now."""
        if not changed:
            return
        self._acquire()
        for table in changed:
            if self._copies is not None:
                self._copies.drop(table.oid)
            self._observer.event("table", table=str(table), state=table.state, reason=table.reason)
        self._sink.write_tables(changed, requested=requested)

    def _set_aside(self, error: TableError) -> None:
        """After an error in the stream of one table: put it into its state, so that the others can go on."""
        known = self._sink.ledger.tables.get(error.oid)
        if known is not None and known.state == "resyncing" and not isinstance(error, MaskError):
            # No longer kept up to date, but its changes are still kept for the copy that is under way.
            error = Resync(str(error), error.oid, error.hint)
        elif known is not None and not isinstance(error, Resync | MaskError) and self._moved(known):
            error = Resync(f"{error}; it was rewritten meanwhile", error.oid, error.hint)
        table = self._sink.set_aside(error)
        if table is None:
            raise error
        if table.state == "error" and self._copies is not None:
            self._copies.drop(table.oid)
        self._observer.event("table", table=str(table), state=table.state, reason=str(error), hint=error.hint)

    def _moved(self, table: Table) -> bool:
        """Whether the table has been rewritten, which nobody has looked for yet: its rows are not what we think."""
        try:
            live = self._live(table.oid)
        except ConnectionLost:
            return False
        return table.state == "streaming" and live is not None and live.storage != table.storage

    def _live(self, oid: int) -> LiveTable | None:
        """Return a published table as the catalog has it now, for the sink's schema changes."""
        with connect(self._settings.dsn) as connection:
            seen = look(connection, self._publications)
        columns = seen.columns(oid)
        if columns is None:
            return None
        definition = seen.definitions[oid]
        return live_table(definition, columns, self._settings.masks, self._names(definition))

    def _names(self, definition: TableDefinition) -> list[str]:
        return [str(definition), str(self._sink.ledger.tables.get(definition.oid))]

    # Waiting

    def _acquire(self) -> None:
        if not self._warehouse.held:
            self._sink.acquire()
            self._take_marks()

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

    def _slot_in_use(self, found: Slot, waited_s: float) -> None:
        if waited_s >= _BUSY_WARNING_S and time.monotonic() - self._warned_at >= _BUSY_WARNING_S:
            self._warned_at = time.monotonic()
            self._observer.event(
                "waiting for the replication slot", slot=found.name, used_by=found.active_pid, waited_s=round(waited_s)
            )

    @contextlib.contextmanager
    def _interruption(self) -> Iterator[None]:
        """Within it, a signal ends what is under way at once: nothing is in hand that would have to be flushed."""
        if self._stopping:
            raise Stopped
        self._interruptible = True
        try:
            yield
        except RuntimeError as error:  # what DuckDB makes of an exception in a signal handler
            if not self._stopping:
                raise
            raise Stopped from error
        finally:
            self._interruptible = False


def _backlogged(item: Item | None) -> bool:
    """Whether the next batch is likely on its way: to close the warehouse now would cost more than it gives."""
    return isinstance(item, WireBatch) and item.full


def _view(settings: Settings) -> View | None:
    return View(settings.view, settings.view_of) if settings.view else None
