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
import threading
import time
from collections.abc import Iterator

import duckdb

from cdc.copies import Copies, Observer
from cdc.errors import ConnectionLost, SinkError, TableError, WarehouseBusy
from cdc.failpoints import reach
from cdc.lsn import format_lsn
from cdc.pgoutput.messages import WireBatch
from cdc.settings import Settings
from cdc.sink.answers import Answers
from cdc.sink.columns import LiveTable
from cdc.sink.history import History
from cdc.sink.holding import Holding
from cdc.sink.sink import Sink
from cdc.sink.stored import Table
from cdc.sink.view import View
from cdc.sink.warehouse import ConsumerLock, Warehouse
from cdc.source.declared import DeclaredTypes
from cdc.source.stream import Idle, Item, StreamEnded
from cdc.source.watcher import Watcher
from cdc.startup import prepare
from cdc.subscription import Subscription
from cdc.tables import Tables
from cdc.tally import Tally
from cdc.waits import Waits

__all__ = ["Observer", "Pipeline"]

STOP_S = 6.0
"""After a signal, so long for what is in hand; then it is rolled back, unconfirmed, and threads are waited for."""

_TICK_S = 0.2
_COPY_TICK_S = 0.01

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
        self._waits = Waits(observer)
        self._lock = ConsumerLock(settings.warehouse)
        self._warehouse = Warehouse(settings.warehouse, settings.memory, settings.threads, settings.tmp)
        self._answers = Answers(self._warehouse)
        self._history = History(settings.history)
        self._declared = DeclaredTypes(settings.dsn)
        self._holding = Holding(
            settings.masks,
            settings.choices,
            self._declared,
            settings.history is not None,
            settings.quarantine_limit,
        )
        self._sink = Sink(
            self._warehouse,
            self._history,
            deletes=settings.deletes,
            live=self._live,
            waiting=self._waits.for_warehouse,
            give_up=lambda: self._stopping and time.monotonic() >= self._stop_by,
            holding=self._holding,
            view=View(settings.view, settings.view_of) if settings.view else None,
        )
        self._tables = Tables(settings, self._sink, observer, self._holding, self._declared)
        self._subscription = Subscription(settings, self._sink, observer)
        self._publications: tuple[str, ...] = ()
        self._stopping = False
        self._interruptible = False
        self._deadline: threading.Timer | None = None
        self._stop_by = 0.0
        self._tally = Tally()

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
        except (Stopped, WarehouseBusy):
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
        settings, waits = self._settings, self._waits
        with self._interruption():
            self._publications = prepare(
                settings, self._sink, waits.for_transactions, waits.for_slot, fresh=fresh, once=once
            )
        if aside := self._sink.show():
            self._observer.event("renamed aside", table=settings.view, new_name=aside)
        copies = Copies(settings, self._publications, self._sink, self._observer, self._holding, waits.for_transactions)
        self._tables.begin(self._publications, copies)
        watcher = Watcher(
            settings.dsn,
            self._publications,
            settings.tables,
            settings.exclude,
            settings.poll_interval,
            self._declared,
        )
        try:
            self._connect()
            self._observer.event(
                "streaming",
                slot=settings.slot,
                position=format_lsn(self._sink.position),
                tables=len(self._sink.ledger.tables),
            )
            self._fence_surely()
            if not once:
                watcher.start()
            while not (once and not self._tables.fenced and not copies.unfinished):
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
                    self._tables.acquire()
                if not self._warehouse.in_transaction:
                    if (seen := watcher.latest()) is not None:
                        self._tables.take_in(seen)
                    copies.step(self._tables.acquire)
                    self._tally.schema_changes += self._tables.tell()
                self._subscription.want(copies.wanted)
                self._let_go(busy=self._subscription.ready or copies.ready or _backlogged(item))
        finally:
            watcher.stop()
            copies.stop()
            self._subscription.disconnect()
            if self._warehouse.in_transaction:
                self._sink.rollback()

    def _next(self, copies: Copies) -> Item | None:
        if copies.ready and not self._warehouse.in_transaction:
            return self._subscription.take(0)
        return self._subscription.take(_COPY_TICK_S if copies.active else _TICK_S)

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
        self._tables.acquire()
        decoded = self._subscription.decode(batch)
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
                    self._tables.set_aside(error)
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
        self._tables.acquire()
        self._sink.commit(idle.lsn, None, idle.at)
        self._tally.as_of = idle.at
        reach("during_idle")
        self._confirm()

    def _confirm(self) -> None:
        reach("before_ack")
        self._subscription.confirm(self._sink.position)
        reach("after_ack")

    def _drain(self) -> None:
        """After a signal: apply what the receiver has whole, then stop."""
        if not self._subscription.drain():
            return
        while (left := self._stop_by - time.monotonic()) > 0:
            item = self._subscription.take(left)
            if item is None or isinstance(item, StreamEnded):
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
        if self._tally.due():
            summary = self._tally.summary(self._sink.position, self._subscription.received)
            self._observer.event("mirrored", **summary)

    # The connection, and fences in it

    def _connect(self) -> None:
        self._subscription.connect(self._publications, self._interruption)

    def _fence_surely(self) -> None:
        """Look at the catalog behind a fence, however often the connection breaks."""
        while True:
            try:
                self._tables.fence()
            except ConnectionLost as error:
                self._observer.event("connection lost", reason=str(error))
                self._connect()
            else:
                return

    def _pass_fences(self, contents: set[bytes]) -> None:
        """The stream has come past these fences: what was so by then is so here."""
        for seen in self._tables.passed(contents):
            if self._tables.follow(seen):
                self._connect()
            if seen.unsettled:
                self._fence_surely()

    def _live(self, oid: int) -> LiveTable | None:
        return self._tables.live(oid)  # the sink is made before it

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
