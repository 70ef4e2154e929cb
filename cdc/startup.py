"""Before the first batch: source, slot, warehouse and history must belong together, or be made to.

    warehouse   slot      what happens
    none        none      publication, then an intent row in the warehouse, then the slot; every table is copied
    none        there     refused: it may be somebody else's, and using it would cost them data (`run --fresh` takes it)
    intent      any       the slot that a crash left half made is dropped and made again
    there       there     go on from the checkpoint, if the slot has not been confirmed beyond it
    there       none      refused: changes may be missing (`resync --all` begins anew)

The publication is committed before the slot is made: changes decoded from before it existed would make the slot
useless. The intent tells our own half-made slot from a foreign one.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from psycopg.pq.abc import PGconn

from cdc.errors import SettingsError, SinkError, SourceError, StateError
from cdc.failpoints import reach
from cdc.lsn import format_lsn
from cdc.settings import Settings
from cdc.sink.checkpoint import Checkpoint, Table
from cdc.sink.sink import Sink
from cdc.source import catalog, preflight, publication, slot
from cdc.source.catalog import PublishedTable
from cdc.source.connection import Connection, connect, connect_replication
from cdc.source.preflight import Expected
from cdc.source.slot import Blocker, Slot, System
from cdc.source.snapshot import WAIT_S

__all__ = ["prepare", "reconcile"]


def prepare(
    settings: Settings, sink: Sink, waiting: Callable[[list[Blocker], float], None], *, fresh: bool
) -> tuple[str, ...]:
    """Bring everything to where streaming can begin at the sink's position; return the publications.

    Args:
        waiting: told whose transactions keep the slot from being made, and for how many seconds by now.
        fresh: take the slot over and copy everything anew.

    Raises:
        SourceError: Postgres is not as it must be.
        StateError: slot and warehouse do not belong together.
        SettingsError: a setting contradicts what is there.
    """
    with connect(settings.dsn) as connection:
        preflight.require(connection, Expected(settings.slot, settings.publication, settings.tables))
        publications = publication.ensure(connection, settings.publication, settings.tables)
        published = catalog.published(connection, publications)
        replication = connect_replication(settings.dsn)
        try:
            system = slot.identify(replication)
            found = slot.read(connection, settings.slot)
            checkpoint = sink.open()
            if fresh:
                _begin_anew(settings, sink, connection, found, system)
                checkpoint, found = sink.ledger.checkpoint, None
            if checkpoint is None:
                _refuse_leftovers(settings, found)
                _write_intent(settings, sink, system)
                _make_slot(settings, sink, connection, replication, waiting)
            elif checkpoint.lsn is None:
                _check_source(settings, checkpoint, system)
                if found is not None:
                    slot.drop(connection, settings.slot)
                _make_slot(settings, sink, connection, replication, waiting)
            else:
                _check_source(settings, checkpoint, system)
                _check_slot(settings, checkpoint.lsn, found)
        finally:
            replication.finish()
    _check_deletes(settings, sink.ledger.tables.values())
    sink.write_tables(reconcile(sink.ledger.tables.values(), published, starting=True))
    return publications


def reconcile(known: Iterable[Table], published: Sequence[PublishedTable], *, starting: bool = False) -> list[Table]:
    """Return the rows of ``_cdc.tables`` that change now that just these tables are published.

    Args:
        starting: no copy is under way: one that is called so was cut short by a crash, and begins again.
    """
    again = ("dropped", "copying") if starting else ("dropped",)
    changed = []
    known_by_oid = {table.oid: table for table in known}
    where: dict[int, set[str]] = {}
    for there in published:
        where.setdefault(there.oid, set()).add(there.publication)
    for there in {table.oid: table for table in published}.values():
        table = known_by_oid.get(there.oid)
        names = ",".join(sorted(where[there.oid]))
        if table is None:
            changed.append(Table(there.oid, there.schema, there.name, "pending", publication=names))
        elif table.state in again:
            begins = dataclasses.replace(table, schema=there.schema, name=there.name, state="pending", reason="")
            changed.append(dataclasses.replace(begins, publication=names))
        elif table.publication != names:
            # Until it was moved here, some of its changes were not in the stream.
            moved = dataclasses.replace(table, publication=names, reason="moved to another publication")
            changed.append(dataclasses.replace(moved, state="resyncing" if table.state == "streaming" else table.state))
    changed += [
        dataclasses.replace(table, state="dropped", reason="no longer published")
        for table in known_by_oid.values()
        if table.oid not in where and table.state != "dropped"
    ]
    return changed


def _begin_anew(settings: Settings, sink: Sink, connection: Connection, found: Slot | None, system: System) -> None:
    """`run --fresh`: the slot is taken over, the history set aside, and every table copied as if for the first time."""
    if found is not None:
        if found.active:
            raise StateError(
                f"replication slot {settings.slot} is in use by process {found.active_pid} of the server",
                "stop the consumer that uses it, or choose another name with CDC_SLOT",
            )
        slot.drop(connection, settings.slot)
    if settings.history is not None and settings.history.is_dir() and any(settings.history.iterdir()):
        aside = settings.history.with_name(f"{settings.history.name}-{time.strftime('%Y%m%dT%H%M%S')}")
        try:
            settings.history.rename(aside)
        except OSError as error:
            raise SinkError(f"history {settings.history} cannot be moved to {aside}: {error.strerror}") from None
    # The tables that are ours stay readable until their new copies replace them.
    ours = [dataclasses.replace(table, state="dropped", reason="") for table in sink.ledger.tables.values()]
    _write_intent(settings, sink, system, ours)


def _refuse_leftovers(settings: Settings, found: Slot | None) -> None:
    if found is not None:
        raise StateError(
            f"replication slot {settings.slot} exists, but warehouse {settings.warehouse} knows nothing of it",
            "if the slot is yours to take, `cdc run --fresh` does so and copies everything anew; else set CDC_SLOT",
        )
    if settings.history is not None and _has_files(settings.history):
        raise StateError(
            f"history {settings.history} holds the change log of another warehouse",
            "`cdc run --fresh` sets it aside and begins anew; or set CDC_HISTORY to another folder",
        )


def _has_files(history: Path) -> bool:
    return history.is_dir() and next(history.rglob("*.parquet"), None) is not None


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


def _check_source(settings: Settings, checkpoint: Checkpoint, system: System) -> None:
    """Refuse a warehouse that mirrors something else."""
    theirs = (checkpoint.system_identifier, checkpoint.database)
    if theirs != (system.system_identifier, system.dbname):
        raise StateError(
            f"warehouse {settings.warehouse} mirrors database {checkpoint.database} of system "
            f"{checkpoint.system_identifier}, but CDC_DSN leads to {system.dbname} of {system.system_identifier}",
            "set CDC_DSN back, or CDC_WAREHOUSE and CDC_HISTORY to new places",
        )
    for name, old, new in (
        ("CDC_SLOT", checkpoint.slot, settings.slot),
        ("CDC_PUBLICATION", checkpoint.publication, settings.publication),
    ):
        if old != new:
            raise SettingsError(
                f"{name} is {new}, but warehouse {settings.warehouse} was begun with {old}",
                f"set {name} back to {old}, or CDC_WAREHOUSE and CDC_HISTORY to new places",
            )


def _check_slot(settings: Settings, lsn: int, found: Slot | None) -> None:
    """Refuse a slot that no longer holds everything from the checkpoint on."""
    anew = "`cdc resync --all`, and then `cdc run`, make a new slot and copy every table again"
    if found is None:
        raise StateError(f"replication slot {settings.slot} is gone: changes may be missing", anew)
    if found.plugin != "pgoutput":
        raise SourceError(
            f"slot {settings.slot} is of plugin {found.plugin}, not pgoutput", "choose another name with CDC_SLOT"
        )
    if found.wal_status == "lost" or found.restart_lsn is None:
        raise StateError(f"replication slot {settings.slot} has lost WAL that was not read yet", anew)
    if found.confirmed_flush_lsn is not None and found.confirmed_flush_lsn > lsn:
        raise StateError(
            f"slot {settings.slot} was confirmed up to {format_lsn(found.confirmed_flush_lsn)}, but the warehouse "
            f"ends at {format_lsn(lsn)}: what lies between is lost",
            f"was the warehouse restored from an older copy, or the slot made anew? {anew}",
        )


def _check_deletes(settings: Settings, tables: Iterable[Table]) -> None:
    for table in tables:
        if table.state == "streaming" and table.deletes != settings.deletes:
            raise SettingsError(
                f"CDC_DELETES is {settings.deletes}, but table {table} was copied with {table.deletes}",
                f"set it back, or run `cdc resync --all` with CDC_DELETES={settings.deletes}",
            )
