"""The receiver: one thread that owns the replication connection from START_REPLICATION to its end.

It keeps the connection alive, cuts what comes into batches (assembly.py) and puts them into a bounded queue. What it
confirms to the server is what `Receiver.confirm` was told and never more; a full queue stops the reading, not the
feedback.

State: the connection and the feedback sent belong to the thread; `confirm`, `wanted` and `stop` may be used by any.

Source: PostgreSQL manual, "Streaming Replication Protocol"; psycopg 3 has no replication API, so this is COPY BOTH on
its libpq wrapper.
"""

from __future__ import annotations

import dataclasses
import queue
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence

import psycopg
from psycopg import pq
from psycopg.pq import abc

from cdc.errors import CdcError, SourceError, StateError
from cdc.lsn import format_lsn
from cdc.pgoutput.messages import POSTGRES_EPOCH_US, WireBatch
from cdc.source.assembly import Assembly, Limits
from cdc.source.connection import connect_replication, execute, run_command
from cdc.source.failures import connection_broke, end_error, publication_error, start_error
from cdc.source.feedback import Feedback

__all__ = ["NEVER", "Idle", "Item", "Limits", "Receiver", "StreamEnded"]

NEVER = 2**64 - 1
"""A position that the server never reaches."""

_IDLE_S = 10.0
_TURN_S = 1.0
_PUT_S = 0.2
# Messages come one by one from a walsender that is slower than we are: to let a few gather costs it and us less.
_GATHER_S = 0.002
# Reads between two looks at the clock.
_READS = 256

_KEEPALIVE = struct.Struct(">cQqB")


@dataclasses.dataclass(frozen=True, slots=True)
class Idle:
    """Everything before `lsn` has been put into the inbox; there was no change of ours since the last batch.

    Attributes:
        at: the server's clock when it said so, microseconds since 1970 UTC.
    """

    lsn: int
    at: int


@dataclasses.dataclass(frozen=True, slots=True)
class StreamEnded:
    """Nothing more comes; `error` is None after `Receiver.drain`."""

    error: CdcError | None


Item = WireBatch | Idle | StreamEnded


class _Stopped(Exception):
    """`Receiver.stop` was called."""


class Receiver(threading.Thread):
    """Receives one slot's stream. Call `connect`, then `start`; `stop` and `join` at the end.

    A `StreamEnded` is the last item, unless `stop` was called: then none comes.
    """

    def __init__(
        self,
        dsn: str,
        slot: str,
        publications: Sequence[str],
        start_lsn: int,
        limits: Limits,
        inbox: queue.Queue[Item],
    ) -> None:
        """Create a receiver that is not connected.

        Args:
            dsn: URL or conninfo of the source.
            slot: a logical slot of plugin pgoutput, which exists by the time of START_REPLICATION.
            publications: names, as they are.
            start_lsn: the checkpoint: everything before it is durable, and is confirmed as such.
            limits: where batches end.
            inbox: bounded; takes `WireBatch`, `Idle` and `StreamEnded`.
        """
        super().__init__(name="cdc-receiver", daemon=True)
        self._dsn = dsn
        self._slot = slot
        self._publications = tuple(publications)
        self._inbox = inbox
        self._assembly = Assembly(limits, self._put, self._on_keepalive)
        self._pgconn: abc.PGconn | None = None
        self._stopping = False
        self._draining = False
        self._fault: StateError | None = None
        self._wake_sockets: tuple[socket.socket, socket.socket] | None = None

        self._feedback = Feedback(start_lsn)
        self._wanted = NEVER

        self._start_lsn = start_lsn
        self._received = start_lsn
        # The newest position in the inbox, and one that may follow: of a keepalive that found nothing waiting, or
        # that waits for the batch in hand to go first.
        self._put_lsn = start_lsn
        self._idle = Idle(0, 0)
        self._held = Idle(0, 0)
        self._idle_at = -_IDLE_S

    # What other threads may call.

    @property
    def received(self) -> int:
        """The newest position that the server has named."""
        return self._received

    @property
    def wanted(self) -> int:
        """An Idle at or past this position is put at once; `NEVER` to begin with."""
        return self._wanted

    @wanted.setter
    def wanted(self, lsn: int) -> None:
        self._wanted = lsn
        self._wake()

    def confirm(self, lsn: int) -> None:
        """Tell the server, at once, that everything before `lsn` is durable. A lower position changes nothing."""
        if self._feedback.confirm(lsn):
            self._wake()

    def drain(self) -> None:
        """End the reading: put what is whole, then a `StreamEnded` without error; go on confirming until `stop`."""
        self._draining = True
        self._wake()

    def stop(self) -> None:
        """Send what was confirmed, close the connection and end the thread soon; without a thread, close at once."""
        self._stopping = True
        self._wake()
        if self.ident is None:
            self._close()

    def connect(self, make_slot: Callable[[abc.PGconn], object] | None = None) -> None:
        """Connect and start the stream, in the caller's thread.

        Args:
            make_slot: makes a temporary slot on this connection, the only one that can use it.

        Raises:
            ConnectionLost: the server cannot be reached, or the slot is in use.
            StateError: the slot is missing, or has lost what it retained.
            SourceError: the server refuses, or what `make_slot` raises.
        """
        pgconn = connect_replication(self._dsn)
        try:
            if make_slot is not None:
                make_slot(pgconn)
            self._begin(pgconn)
        except BaseException:
            pgconn.finish()
            raise
        self._pgconn = pgconn
        self._wake_sockets = socket.socketpair()
        for each in self._wake_sockets:
            each.setblocking(False)

    # The thread.

    def run(self) -> None:
        """Receive until the stream ends or `stop` is called."""
        error: CdcError | None = None
        try:
            self._receive()
        except _Stopped:
            pass
        except CdcError as ended:
            error = ended
        except psycopg.Error as broken:
            error = connection_broke("replication stream", broken)
        except Exception as bug:  # noqa: BLE001  # the applier must hear of it, whatever it is
            error = SourceError(f"the receiver failed: {type(bug).__name__}: {bug}", "please report this")
            error.__cause__ = bug
        finally:
            self._close()
        if error is not None:
            self._put_last(StreamEnded(error))

    def _receive(self) -> None:
        pgconn = self._pgconn
        if pgconn is None or self._wake_sockets is None:
            raise SourceError("the receiver is not connected", "call connect() before start()")
        self._feedback.heard()
        self._feedback.send(pgconn, time.monotonic())
        with selectors.DefaultSelector() as selector:
            selector.register(pgconn.socket, selectors.EVENT_READ, True)
            selector.register(self._wake_sockets[0], selectors.EVENT_READ, False)
            while not self._stopping and not self._draining:
                dry = self._read(pgconn)
                wait_s = self._turn(pgconn)
                for key, _ in selector.select(wait_s if dry else 0):
                    if key.data:
                        self._feedback.heard()
                        if dry:
                            time.sleep(_GATHER_S)
                    else:
                        self._wake_sockets[0].recv(4096)
        if not self._stopping:
            self._linger(pgconn, self._wake_sockets[0])
        if self._feedback.pending:
            self._feedback.send(pgconn, time.monotonic())

    def _linger(self, pgconn: abc.PGconn, wake: socket.socket) -> None:
        """After `drain`: hand over what is whole and confirm it when told so, without reading any more."""
        self._assembly.cut()
        self._offer(StreamEnded(None))
        with selectors.DefaultSelector() as selector:
            selector.register(wake, selectors.EVENT_READ)
            while not self._stopping:
                self._feedback.send_if_due(pgconn)
                if selector.select(max(0.0, min(_TURN_S, self._feedback.due(time.monotonic())))):
                    wake.recv(4096)

    def _read(self, pgconn: abc.PGconn) -> bool:
        """Read and take what has come; whether that was all.

        Under TLS a part of what came can be inside of OpenSSL, where no selector sees it: so read until nothing comes
        twice (the first read of a large message makes room for its rest).
        """
        get = pgconn.get_copy_data
        misses = 0
        for _ in range(_READS):
            pgconn.consume_input()
            misses = 0 if self._assembly.take(get) else misses + 1
            if self._assembly.ended:
                raise end_error(pgconn, self._put_lsn)
            if misses == 2:
                return True
        return False

    def _turn(self, pgconn: abc.PGconn) -> float:
        """Do all that time or another thread asks for; return the seconds until the next turn must come."""
        now = time.monotonic()
        frame = self._assembly.last_frame
        if frame is not None:
            self._see(int.from_bytes(frame[9:17], "big"))
        urgent = self._wanted <= self._held.lsn or self._feedback.reply_wanted
        left = self._assembly.age_left(now)
        if left is not None and (urgent or left <= 0):
            self._assembly.cut()
            left = None
        self._put_idle(now, urgent)
        self._feedback.send_if_due(pgconn)
        self._feedback.check_silence(pgconn, now)
        pgconn.flush()
        return max(0.0, min(_TURN_S, self._feedback.due(now), _TURN_S if left is None else left))

    # Towards the inbox.

    def _put(self, item: WireBatch | Idle) -> None:
        """Put `item`, keeping the server content while the inbox is full.

        Raises:
            StateError: the server has skipped something that belongs before `item`.
            _Stopped: `stop` was called.
        """
        if self._fault is not None:
            raise self._fault
        self._offer(item)
        self._feedback.heard()
        if isinstance(item, Idle):
            self._put_lsn = item.lsn
        elif item.complete:
            # The walEnd of a Commit is its end LSN.
            self._put_lsn = max(self._put_lsn, int.from_bytes(item.frames[-1][9:17], "big"))
            self._idle = self._held
            self._see(self._put_lsn)

    def _offer(self, item: Item) -> None:
        """Wait for room in the inbox; feedback goes on meanwhile."""
        while not self._stopping:
            try:
                self._inbox.put(item, timeout=_PUT_S)
            except queue.Full:
                if self._pgconn is not None:
                    self._feedback.send_if_due(self._pgconn)
            else:
                return
        raise _Stopped

    def _put_idle(self, now: float, urgent: bool) -> None:
        idle = self._idle
        if idle.lsn > self._put_lsn and (urgent or self._wanted <= idle.lsn or now - self._idle_at >= _IDLE_S):
            self._idle_at = now
            self._put(idle)

    def _put_last(self, item: StreamEnded) -> None:
        """Wait for room in the inbox, with the connection closed."""
        while not self._stopping:
            try:
                self._inbox.put(item, timeout=_PUT_S)
            except queue.Full:
                continue
            return

    # From and to the server.

    def _on_keepalive(self, message: memoryview) -> None:
        _, wal_end, sent_us, reply = _KEEPALIVE.unpack(message)
        self._see(wal_end)
        self._feedback.reply_wanted |= bool(reply)
        # Within a transaction it says nothing about what we have seen whole.
        if not self._assembly.open:
            self._held = Idle(wal_end, sent_us + POSTGRES_EPOCH_US)
            if self._assembly.empty:
                self._idle = self._held

    def _on_notice(self, result: abc.PGresult) -> None:
        """Note the warning with which PostgreSQL 18 skips the changes of a publication that is missing."""
        if (
            result.error_field(pq.DiagnosticField.SEVERITY_NONLOCALIZED) == b"WARNING"
            and result.error_field(pq.DiagnosticField.SQLSTATE) == b"55000"
        ):
            text = (result.error_field(pq.DiagnosticField.MESSAGE_PRIMARY) or b"").decode("utf-8", "replace")
            self._fault = publication_error(text, self._put_lsn)

    def _see(self, lsn: int) -> None:
        self._received = max(self._received, lsn)

    def _wake(self) -> None:
        if self._wake_sockets is None:
            return
        try:
            self._wake_sockets[1].send(b"\0")
        except OSError:
            # Full: it will wake anyway. Closed: nobody is left to wake.
            return

    def _close(self) -> None:
        if self._pgconn is not None:
            self._pgconn.finish()
        for each in self._wake_sockets or ():
            each.close()

    def _begin(self, pgconn: abc.PGconn) -> None:
        try:
            rows = execute(pgconn, "SELECT setting FROM pg_settings WHERE name = 'wal_sender_timeout'")
            self._feedback.sender_timeout_s = int(rows[0]["setting"] or 0) / 1000
            pgconn.notice_handler = self._on_notice
            run_command(pgconn, self._start_command())
            pgconn.nonblocking = 1
        except SourceError as error:
            raise start_error(error, self._slot) from error

    def _start_command(self) -> str:
        names = ",".join('"' + name.replace('"', '""') + '"' for name in self._publications).replace("'", "''")
        slot = self._slot.replace('"', '""')
        return (
            f'START_REPLICATION SLOT "{slot}" LOGICAL {format_lsn(self._start_lsn)} '
            f"(proto_version '1', publication_names '{names}', messages 'true')"
        )
