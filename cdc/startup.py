"""Before the first batch: source, slot, warehouse and history must belong together, or be made to.

    warehouse   slot      what happens
    none        none      publication, then an intent row in the warehouse, then the slot; every table is copied
    none        there     refused: it may be somebody else's, and using it would cost them data (`run --fresh` takes it)
    intent      any       the slot that a crash left half made is dropped and made again
    there       there     go on from the checkpoint, if the slot has not been confirmed beyond it
    there       none      refused: changes may be missing (`resync --all` begins anew)

A publication that was dropped and made anew leaves a gap in the stream, and up to PostgreSQL 17 a stream that cannot be
read any more: every table is copied anew then, with a new slot.

The publication is committed before the slot is made: changes decoded from before it existed would make the slot
useless. The intent tells our own half-made slot from a foreign one.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

from psycopg.pq.abc import PGconn

from cdc.errors import SinkError, SourceError
from cdc.failpoints import reach
from cdc.reconcile import gap, reconcile, refuse_less
from cdc.refusals import in_use, refuse, refuse_choices, refuse_in_use, refuse_missing, refuse_settings, refuse_tables
from cdc.settings import Settings
from cdc.sink.sink import Sink
from cdc.sink.stored import Checkpoint, Table
from cdc.source import catalog, preflight, publication, slot, upkeep
from cdc.source.catalog import PublishedTable
from cdc.source.connection import Connection, connect, connect_replication, translated
from cdc.source.declared import DeclaredTypes
from cdc.source.preflight import Expected
from cdc.source.slot import Blocker, Slot, System
from cdc.source.snapshot import WAIT_S

__all__ = ["check", "prepare"]

_POLL_S = 0.2
# Where the server never gives a lost connection up, its default.
_PATIENCE_S = 60.0


def prepare(
    settings: Settings,
    sink: Sink,
    waiting: Callable[[list[Blocker], float], None],
    busy: Callable[[Slot, float], None],
    *,
    fresh: bool,
    once: bool,
) -> tuple[str, ...]:
    """Bring everything to where streaming can begin at the sink's position; return the publications.

    Nothing is made or changed anywhere before everything that can be refused has been.

    Args:
        waiting: told whose transactions keep the slot from being made, and for how many seconds by now.
        busy: told of the slot as long as somebody else uses it, and for how many seconds by now.
        fresh: take the slot over and copy everything anew.
        once: nobody looks for tables later: those that cannot be published just now are an error.

    Raises:
        SourceError: Postgres is not as it must be.
        StateError: slot and warehouse do not belong together.
        SettingsError: a setting contradicts what is there.
    """
    with connect(settings.dsn) as connection:
        # Later on, one table that may not be read is put aside when its copy fails: the others can go on.
        begins = fresh or not settings.warehouse.exists()
        expected = Expected(settings.slot, settings.publication, settings.tables, settings.exclude)
        preflight.require(connection, expected, rights=begins)
        replication = connect_replication(settings.dsn)
        try:
            system = slot.identify(replication)
            found = slot.read(connection, settings.slot)
            checkpoint = sink.open()
            if checkpoint is None and not begins:  # an empty file: a first start was refused, or somebody made it
                preflight.require(connection, expected)
            if fresh:
                refuse_in_use(settings, found, system.dbname)
            else:
                refuse(settings, checkpoint, system, found)
                if found is not None and found.active:
                    sink.release()
                    found = _await_slot(settings, connection, busy)
                    checkpoint = sink.open()
                    refuse(settings, checkpoint, system, found)
                refuse_settings(settings, sink)
                if checkpoint is not None and publication.is_ours(connection, settings.publication) is None:
                    refuse_missing(settings, sink)
            coming = publication.coming(connection, settings.publication, settings.tables)
            publication.refuse_columns(connection, settings.publication, coming, settings.exclude, settings.masks)
            refuse_choices(coming, settings.choices, DeclaredTypes(settings.dsn))
            refuse_tables(settings, sink, coming, begins=fresh or checkpoint is None)
            publications = _publish(connection, settings, once=once)
            published = catalog.published(connection, publications)
            if fresh:
                _begin_anew(settings, sink, connection, found, system)
            elif checkpoint is None:
                _write_intent(settings, sink, system)
            else:
                _compare(sink, published)
            begun = sink.ledger.checkpoint
            if begun is not None and begun.lsn is None:
                if found is not None and not fresh:
                    slot.drop(connection, settings.slot)
                _make_slot(settings, sink, connection, replication, waiting)
        finally:
            replication.finish()
    sink.write_tables(reconcile(sink.ledger.tables.values(), published, gone=False, starting=True))
    sink.write_tables(sink.misnamed())
    return publications


def check(settings: Settings, checkpoint: Checkpoint | None) -> None:
    """Look, before the stream begins again, whether source and slot are still those that the checkpoint belongs to.

    Meanwhile the slot may have been made anew, or CDC_DSN lead to another server: START_REPLICATION would not mind.

    Raises:
        ConnectionLost, SourceError: Postgres cannot be asked.
        StateError, SettingsError: see `refuse`.
    """
    with connect(settings.dsn) as connection:
        found = slot.read(connection, settings.slot)
    replication = connect_replication(settings.dsn)
    try:
        refuse(settings, checkpoint, slot.identify(replication), found)
    finally:
        replication.finish()


def _publish(connection: Connection, settings: Settings, *, once: bool) -> tuple[str, ...]:
    try:
        return upkeep.ensure(connection, settings.publication, settings.tables, settings.exclude)
    except SourceError as error:
        # Somebody alters a new table: no reason to keep the others waiting, unless there is no publication yet.
        if error.sqlstate != "55P03" or once or publication.is_ours(connection, settings.publication) is None:
            raise
    return upkeep.plan(connection, settings.publication, settings.tables, settings.exclude).names


def _compare(sink: Sink, published: Sequence[PublishedTable]) -> None:
    """Compare what is published with what was when the tables were copied; give the position up if it is worth nothing.

    Raises:
        StateError: less is published, and nobody has asked for that.
    """
    tables = sink.ledger.tables
    marked = sink.ledger.requested()
    refuse_less([table for oid, table in tables.items() if oid not in marked], published)
    if not gap(tables.values(), published):
        return
    # Still with the old label, so that a start after a crash comes here again; the position goes last.
    followed = [table for table in tables.values() if table.state not in ("dropped", "error")]
    sink.write_tables([dataclasses.replace(table, state="pending", reason="") for table in followed])
    sink.warehouse.begin()
    sink.ledger.forget_position()
    sink.warehouse.commit()


def _await_slot(settings: Settings, connection: Connection, busy: Callable[[Slot, float], None]) -> Slot | None:
    """Return the slot once nobody uses it: a consumer that was killed seems to go on until the server notices.

    Raises:
        StateError: it is used for longer than the server takes for that.
    """
    with translated("read wal_sender_timeout"):
        query = "SELECT setting::int8 / 1000.0::float8 FROM pg_settings WHERE name = 'wal_sender_timeout'"
        ((timeout_s,),) = connection.execute(query).fetchall()
    began = time.monotonic()
    while (found := slot.read(connection, settings.slot)) is not None and found.active:
        waited_s = time.monotonic() - began
        if waited_s > (timeout_s or _PATIENCE_S):
            raise in_use(found)
        busy(found, waited_s)
        time.sleep(_POLL_S)
    return found


def _begin_anew(settings: Settings, sink: Sink, connection: Connection, found: Slot | None, system: System) -> None:
    """`run --fresh`: the slot is taken over, the history set aside, and every table copied as if for the first time."""
    if found is not None:
        slot.drop(connection, settings.slot)
    if settings.history is not None and settings.history.is_dir() and any(settings.history.iterdir()):
        aside = settings.history.with_name(f"{settings.history.name}-{time.strftime('%Y%m%dT%H%M%S')}")
        try:
            settings.history.rename(aside)
        except OSError as error:
            raise SinkError(
                f"history {settings.history} cannot be moved to {aside}: {error.strerror}",
                "move it away yourself, or set CDC_HISTORY to another folder",
            ) from None
    # The tables that are ours stay readable until their new copies replace them.
    known = sink.ledger.tables.values()
    ours = [dataclasses.replace(table, state="dropped", reason="", widened=()) for table in known]
    _write_intent(settings, sink, system, ours)


def _write_intent(settings: Settings, sink: Sink, system: System, tables: Sequence[Table] = ()) -> None:
    intent = Checkpoint(system.system_identifier, system.dbname, settings.slot, settings.publication, None)
    sink.create(intent, tables)
    reach("after_intent")


def _make_slot(
    settings: Settings,
    sink: Sink,
    connection: Connection,
    replication: PGconn,
    waiting: Callable[[list[Blocker], float], None],
) -> None:
    def look(waited_s: float) -> None:
        if waited_s >= WAIT_S:
            waiting(slot.blockers(connection), waited_s)

    sink.release()  # it may take as long as the longest transaction in the server
    lsn = slot.create(replication, settings.slot, look)
    sink.acquire()
    reach("after_slot_create")
    sink.commit(lsn, None)
