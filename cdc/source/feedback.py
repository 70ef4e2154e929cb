"""What the server is told, and when: standby status updates, and whether it is still there.

State: the position confirmed, the last update sent, and when the server was last heard. `Feedback.confirm` may be
called by any thread, the rest by the receiver's alone.

Source: PostgreSQL manual, "Streaming Replication Protocol", Standby status update.
"""

from __future__ import annotations

import struct
import threading
import time

from psycopg.pq import abc

from cdc.errors import ConnectionLost
from cdc.pgoutput.messages import POSTGRES_EPOCH_US

__all__ = ["Feedback"]

SILENCE_S = 60.0
"""After so long without a word from the server (or wal_sender_timeout, if longer) it is asked for one."""

_INTERVAL_S = 10.0
# Between two replies that say the same: a server that shuts down asks again as soon as it is answered.
_REPLY_S = 0.1

_UPDATE = struct.Struct(">cQQQqB")


class Feedback:
    """Keeps one replication connection content.

    Attributes:
        sender_timeout_s: wal_sender_timeout of the session; 0: none.
        reply_wanted: whether the server has asked for an update.
    """

    def __init__(self, start_lsn: int) -> None:
        self.sender_timeout_s = 0.0
        self.reply_wanted = False
        self._lock = threading.Lock()
        self._confirmed = start_lsn
        self._sent_lsn = 0
        self._sent_at = 0.0
        self._heard_at = time.monotonic()
        self._asked_at: float | None = None

    @property
    def pending(self) -> bool:
        """Whether something was confirmed that the server has not been told."""
        return self._confirmed > self._sent_lsn

    def confirm(self, lsn: int) -> bool:
        """Note that everything before `lsn` is durable; whether that is news."""
        with self._lock:
            if lsn <= self._confirmed:
                return False
            self._confirmed = lsn
        return True

    def heard(self) -> None:
        """Note a sign of life; also after a time in which nobody listened."""
        self._heard_at = time.monotonic()
        self._asked_at = None

    def due(self, now: float) -> float:
        """Return the seconds until an update has to be sent; not positive: now."""
        since = now - self._sent_at
        if self.pending:
            return 0.0
        if self.reply_wanted:
            return _REPLY_S - since
        return (min(_INTERVAL_S, self.sender_timeout_s / 4) if self.sender_timeout_s else _INTERVAL_S) - since

    def send(self, pgconn: abc.PGconn, now: float, *, ask: bool = False) -> None:
        """Send an update; `ask` the server for an answer.

        Raises:
            psycopg.OperationalError: the connection is broken.
        """
        lsn = self._confirmed
        sent_us = time.time_ns() // 1000 - POSTGRES_EPOCH_US
        pgconn.put_copy_data(_UPDATE.pack(b"r", lsn, lsn, lsn, sent_us, ask))
        pgconn.flush()
        self._sent_lsn = lsn
        self._sent_at = now
        self.reply_wanted = False

    def send_if_due(self, pgconn: abc.PGconn) -> None:
        """Send an update if one has to be sent by now."""
        now = time.monotonic()
        if self.due(now) <= 0:
            self.send(pgconn, now)

    def check_silence(self, pgconn: abc.PGconn, now: float) -> None:
        """Ask a silent server for a word.

        Raises:
            ConnectionLost: it was asked, and gave none.
        """
        silence = max(SILENCE_S, self.sender_timeout_s)
        if now - self._heard_at <= silence:
            return
        if self._asked_at is None:
            self._asked_at = now
            self.send(pgconn, now, ask=True)
        elif now - self._asked_at > silence:
            raise ConnectionLost(
                f"replication stream: the server has been silent for {now - self._heard_at:.0f} s",
                "check the network in between; the consumer tries again and loses nothing",
            )
