"""What becomes of the published tables, apart from their rows: which there are, how they are defined, which fail.

    watcher ──Look──▶ ┐                                       ┌─▶ sink: rows of _cdc.tables, DDL without a change
                      ├─ this ──▶ reconcile.py and drift.py ──┤
    fence ───Look───▶ ┘           tell what a look means      └─▶ copies: one that is worth nothing now is given up

A look has the catalog as it is now, and the stream may be behind. New tables are taken in at once. All else waits for
the fence that follows a look: once that has come, the look holds in the stream, too; until then changes from before
may still be on their way.

State: the looks whose fence is on its way. Used by the loop's thread alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Sequence

from cdc.copies import Copies, Observer
from cdc.drift import Verdict, judge
from cdc.errors import ConnectionLost, MaskError, Resync, TableError, Widen
from cdc.live import live_table, relation_of
from cdc.reconcile import again, reconcile
from cdc.settings import Settings
from cdc.sink.columns import LiveTable
from cdc.sink.holding import Holding
from cdc.sink.sink import Sink
from cdc.sink.storage import read as read_storage
from cdc.sink.stored import Table
from cdc.source import fence
from cdc.source.connection import connect
from cdc.source.declared import DeclaredTypes
from cdc.source.look import Look, look

__all__ = ["Tables"]


class Tables:
    """See the module."""

    def __init__(
        self, settings: Settings, sink: Sink, observer: Observer, holding: Holding, declared: DeclaredTypes
    ) -> None:
        self._settings = settings
        self._sink = sink
        self._observer = observer
        self._holding = holding
        self._declared = declared
        self._publications: tuple[str, ...] = ()
        self._copies: Copies | None = None
        self._looks: dict[bytes, Look] = {}  # by the content of the fence

    def begin(self, publications: tuple[str, ...], copies: Copies) -> None:
        """Look after what `publications` publish from here on; `copies` are what changes of theirs may end."""
        self._publications = publications
        self._copies = copies
        self._take_marks()

    # Looks, and their fences

    @property
    def fenced(self) -> bool:
        """Whether a fence is on its way."""
        return bool(self._looks)

    def fence(self) -> None:
        """Look at the catalog, and mark the place in the stream from which on that holds.

        Raises:
            ConnectionLost: the connection broke.
        """
        storages = (read_storage(table.storage) for table in self._sink.ledger.tables.values())
        known = {oid for storage in storages if storage is not None for oid in storage.members}
        with connect(self._settings.dsn) as connection:
            seen = look(connection, self._publications, self._declared, known)
            token = fence.emit(connection)
            # What changes just now may lie before the fence, and not be in the look.
            self._looks[token] = seen.settled(look(connection, self._publications, self._declared))

    def passed(self, contents: set[bytes]) -> list[Look]:
        """The stream has come past the fences with these contents: return the looks that hold in it now."""
        return [self._looks.pop(token) for token in contents & self._looks.keys()]

    def follow(self, seen: Look) -> bool:
        """Bring the tables to a look that holds in the stream; whether the stream has to be made anew for that."""
        misled = [oid for oid in seen.definitions if self._judge(oid, seen)]
        self._change(reconcile(self._sink.ledger.tables.values(), seen.published, gone=True))
        return bool(misled)

    def take_in(self, seen: Look) -> None:
        """Take what is new in a look that may be ahead of the stream; where anything else is, look behind a fence."""
        self._change(reconcile(self._sink.ledger.tables.values(), seen.published, gone=False))
        differs = reconcile(self._sink.ledger.tables.values(), seen.published, gone=True) or any(
            self._verdict(oid, seen) for oid in seen.definitions
        )
        if not self._looks and differs:
            with contextlib.suppress(ConnectionLost):  # the next poll asks again
                self.fence()

    def _verdict(self, oid: int, seen: Look) -> tuple[Verdict, LiveTable] | None:
        table, live = self._sink.ledger.tables.get(oid), self._seen_live(oid, seen)
        if table is None or table.state != "streaming" or live is None:
            return None
        verdict = judge(table, seen.definitions[oid], live, self._holding, seen.empty)
        return None if verdict is None else (verdict, live)

    def _judge(self, oid: int, seen: Look) -> bool:
        """Follow what has become of a table without a change that would tell; see `follow`."""
        misled = False
        while (found := self._verdict(oid, seen)) is not None:
            (verdict, live), definition = found, seen.definitions[oid]
            table = self._sink.ledger.tables[oid]
            at = time.time_ns() // 1000
            self.acquire()
            try:
                if verdict.kind == "renamed":
                    self._sink.rename(table, definition.schema, definition.name, at)
                    # Up to PostgreSQL 15 ALTER SCHEMA ... RENAME is not told to a session that knows the table.
                    misled |= table.schema != definition.schema
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
                self.set_aside(error)
        return misled

    # One table, as the catalog has it now

    def live(self, oid: int) -> LiveTable | None:
        """Return a published table as the catalog has it now, for the sink's schema changes; None: it is gone.

        Raises:
            ConnectionLost: the connection broke.
        """
        with connect(self._settings.dsn) as connection:
            seen = look(connection, self._publications, self._declared)
        return self._seen_live(oid, seen)

    def _seen_live(self, oid: int, seen: Look) -> LiveTable | None:
        columns = seen.columns(oid)
        if columns is None:
            return None
        definition = seen.definitions[oid]
        names = [str(definition), str(self._sink.ledger.tables.get(oid))]
        return live_table(definition, columns, self._settings.masks, names)

    # Rows of _cdc.tables

    def acquire(self) -> None:
        """Take the warehouse if it is not held, and begin what `cdc resync` has asked for meanwhile."""
        if not self._sink.warehouse.held:
            self._sink.acquire()
            self._take_marks()

    def set_aside(self, error: TableError) -> None:
        """After an error in the stream of one table: put it into its state, so that the others can go on.

        Raises:
            TableError: the table is not known.
        """
        known = self._sink.ledger.tables.get(error.oid)
        if known is not None and known.state == "resyncing" and not isinstance(error, Resync | MaskError):
            # No longer kept up to date, but its changes are still kept for the copy that is under way.
            error = Resync(str(error), error.oid, error.hint)
        elif known is not None and not isinstance(error, Resync | MaskError) and self._moved(known):
            error = Resync(f"{error}; it was rewritten meanwhile", error.oid, error.hint)
        table = self._sink.set_aside(error)
        if table is None:
            raise error
        if table.state == "error" or isinstance(error, Widen):  # a copy would have the column as it was
            self._drop_copy(table)
        self._observer.event("table", table=str(table), state=table.state, reason=str(error), hint=error.hint)

    def _moved(self, table: Table) -> bool:
        """Whether the table has been rewritten, which nobody has looked for yet: its rows are not what we think."""
        try:
            live = self.live(table.oid)
        except ConnectionLost:
            return False
        return table.state == "streaming" and live is not None and live.storage != table.storage

    def _take_marks(self) -> None:
        """Begin what `cdc resync` has asked for."""
        marked = self._sink.ledger.requested()
        # Columns that have become text get another chance: that is what a resync is asked for.
        tables = [dataclasses.replace(self._sink.ledger.tables[oid], widened=()) for oid in marked]
        self._change([again(table) for table in tables], requested=True)

    def _change(self, changed: Sequence[Table], *, requested: bool = False) -> None:
        """Write changed rows of ``_cdc.tables``; a copy that is under way for one of them is worth nothing now."""
        if not changed:
            return
        self.acquire()
        for table in changed:
            self._drop_copy(table)
            self._observer.event("table", table=str(table), state=table.state, reason=table.reason)
        self._sink.write_tables(changed, requested=requested)

    def _drop_copy(self, table: Table) -> None:
        if self._copies is not None:
            self._copies.drop(table.oid)

    def tell(self) -> int:
        """Log the DDL that was followed since the last call; return how much it was."""
        followed = self._sink.followed()
        for table, change in followed:
            self._observer.event("schema change", table=str(table), change=change, state=table.state)
        return len(followed)
