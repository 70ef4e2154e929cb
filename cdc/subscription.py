"""The stream from the checkpoint on, made anew as often as it breaks.

State: of the present connection the receiver, the queue between it and the loop, and a decoder that knows nothing of
earlier ones. Used by the loop's thread alone.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable, Sequence

import stamina

from cdc.copies import Observer
from cdc.errors import ConnectionLost
from cdc.pgoutput.decoder import Decoded, Decoder
from cdc.pgoutput.messages import WireBatch
from cdc.settings import Settings
from cdc.sink.sink import Sink
from cdc.source.stream import NEVER, Item, Limits, Receiver
from cdc.startup import check

__all__ = ["Subscription"]

QUEUE_BATCHES = 2
"""Batches between receiver and applier; each is bounded by CDC_FLUSH_ROWS and CDC_FLUSH_BYTES."""


class Subscription:
    """See the module; it is not connected at first."""

    def __init__(self, settings: Settings, sink: Sink, observer: Observer) -> None:
        self._settings = settings
        self._sink = sink
        self._observer = observer
        self._limits = Limits(settings.flush_rows, settings.flush_bytes, settings.flush_interval)
        self._inbox: queue.Queue[Item] = queue.Queue(QUEUE_BATCHES)
        self._receiver: Receiver | None = None
        self._decoder = Decoder(0)

    def connect(
        self, publications: Sequence[str], interruption: Callable[[], contextlib.AbstractContextManager[None]]
    ) -> None:
        """Stream from the checkpoint on, trying again for as long as Postgres cannot be reached.

        Args:
            interruption: within it, what is tried may be broken off by an exception.

        Raises:
            StateError, SettingsError, SourceError: the stream is not that of the checkpoint any more.
        """
        self.disconnect()
        self._sink.release()
        with interruption():
            receiver = self._connected(publications)
        self._decoder = Decoder(self._sink.position)
        self._receiver = receiver
        receiver.start()

    def _connected(self, publications: Sequence[str]) -> Receiver:
        lost: ConnectionLost | None = None
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
                    publications,
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
        return receiver

    def disconnect(self) -> None:
        """Give the connection up, and what it has brought that was not taken."""
        if self._receiver is not None:
            self._receiver.stop()
            self._receiver.join(2.0)
            self._receiver = None

    @property
    def ready(self) -> bool:
        """Whether there is something to `take` at once."""
        return not self._inbox.empty()

    def take(self, patience_s: float) -> Item | None:
        """Return what comes next, None if nothing does within `patience_s`."""
        try:
            return self._inbox.get(timeout=patience_s) if patience_s > 0 else self._inbox.get_nowait()
        except queue.Empty:
            return None

    def decode(self, batch: WireBatch) -> Decoded:
        """Return the next batch, decoded."""
        return self._decoder.decode(batch)

    def want(self, position: int | None) -> None:
        """Have an idle server's position told as soon as it is beyond this one, not only now and then."""
        if self._receiver is not None:
            self._receiver.wanted = NEVER if position is None else position

    @property
    def received(self) -> int:
        """How far the stream has come in."""
        return self._sink.position if self._receiver is None else self._receiver.received

    def confirm(self, lsn: int) -> None:
        """Tell the server, at once, that everything before `lsn` is durable."""
        if self._receiver is not None:
            self._receiver.confirm(lsn)

    def drain(self) -> bool:
        """Have what is whole brought, and then the stream's end; whether there is a stream."""
        if self._receiver is not None:
            self._receiver.drain()
        return self._receiver is not None
