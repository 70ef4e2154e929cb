"""Looks at the catalog now and then: adds tables that match our patterns, and tells what is published, and how stored.

What somebody has altered in ours is taken back. A publication that is gone is never made here: what was written
meanwhile is not in the stream, and whose it was cannot be seen any more.

State: one thread and the newest answer. A server that cannot be reached is the stream's concern; here it is only asked
again at the next poll.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence

from cdc.errors import CdcError, SourceError, StateError
from cdc.source import publication, upkeep
from cdc.source.connection import connect
from cdc.source.declared import DeclaredTypes
from cdc.source.look import Look, look

__all__ = ["Watcher"]


class Watcher:
    """Polls from `start` to `stop`."""

    def __init__(
        self,
        dsn: str,
        publications: Sequence[str],
        patterns: Sequence[str],
        exclude: Sequence[str],
        interval_s: float,
        declared: DeclaredTypes,
    ) -> None:
        """Create one that does not poll yet.

        Args:
            publications: those that the stream is subscribed to; the first is CDC_PUBLICATION.
            patterns: CDC_TABLES.
            exclude: CDC_EXCLUDE.
            interval_s: CDC_POLL_INTERVAL.
            declared: learns the types of columns.
        """
        self._dsn = dsn
        self._publications = tuple(publications)
        self._patterns = tuple(patterns)
        self._exclude = tuple(exclude)
        self._interval_s = interval_s
        self._declared = declared
        self._stopping = threading.Event()
        self._latest: Look | StateError | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="cdc-watcher", daemon=True)

    def start(self) -> None:
        """Begin to poll; the first answer comes after an interval."""
        self._thread.start()

    def stop(self) -> None:
        """End the polling."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(2.0)

    def latest(self) -> Look | None:
        """Return the newest answer, once; None: there is no new one.

        Raises:
            StateError: a publication is gone, or was altered and cannot be put right: the stream is of no use.
        """
        with self._lock:
            latest, self._latest = self._latest, None
        if isinstance(latest, StateError):
            raise latest
        return latest

    def _run(self) -> None:
        while not self._stopping.wait(self._interval_s):
            found: Look | StateError
            try:
                found = self._look()
            except StateError as error:
                found = error
            except CdcError:
                # A restart: the next poll sees what this one did not.
                continue
            with self._lock:
                self._latest = found

    def _look(self) -> Look:
        with connect(self._dsn) as connection:
            # What cannot be added for a lock that an ALTER holds, say, the next poll tries again.
            with contextlib.suppress(SourceError):
                upkeep.ensure(connection, self._publications[0], self._patterns, self._exclude, create=False)
            for name in self._publications:
                if publication.is_ours(connection, name) is None:
                    raise publication.dropped(name)
            publication.refuse_astray(connection, self._publications[0])
            return look(connection, self._publications, self._declared)
