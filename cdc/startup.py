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
from cdc.sink.checkpoint import Checkpoint, State, Table
from cdc.sink.sink import Sink
from cdc.source import catalog, preflight, publication, slot
from cdc.source.catalog import PublishedTable
from cdc.source.connection import Connection, connect, connect_replication, translated
from cdc.source.preflight import Expected
from cdc.source.slot import Blocker, Slot, System
from cdc.source.snapshot import WAIT_S

__all__ = ["check", "check_source", "prepare", "reconcile", "refuse", "refuse_foreign"]

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
                _refuse_in_use(settings, found, system.dbname)
            else:
                refuse(settings, checkpoint, system, found)
                if found is not None and found.active:
                    sink.release()
                    found = _await_slot(settings, connection, busy)
                    checkpoint = sink.open()
                    refuse(settings, checkpoint, system, found)
                _check_deletes(settings, sink)
            publication.refuse_exclusion(
                connection,
                settings.publication,
                settings.tables,
                settings.exclude,
                strict=fresh or checkpoint is None,
            )
            publications = _publish(connection, settings, once=once)
            published = catalog.published(connection, publications)
            _check_key(settings, connection, published)
            if fresh or checkpoint is None:  # later on it is the trouble of one table
                _refuse_strangers(settings, sink, published)
            if fresh:
                _begin_anew(settings, sink, connection, found, system)
            elif checkpoint is None:
                _write_intent(settings, sink, system)
            elif checkpoint.lsn is None and found is not None:
                slot.drop(connection, settings.slot)
            if sink.ledger.checkpoint is not None and sink.ledger.checkpoint.lsn is None:
                _make_slot(settings, sink, connection, replication, waiting)
        finally:
            replication.finish()
    sink.write_tables(reconcile(sink.ledger.tables.values(), published, gone=False, starting=True))
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
        return publication.ensure(connection, settings.publication, settings.tables, settings.exclude)
    except SourceError as error:
        # Somebody alters a new table: no reason to keep the others waiting, unless there is no publication yet.
        if error.sqlstate != "55P03" or once or publication.is_ours(connection, settings.publication) is None:
            raise
    return publication.plan(connection, settings.publication, settings.tables, settings.exclude).names


def reconcile(
    known: Iterable[Table], published: Sequence[PublishedTable], *, gone: bool, starting: bool = False
) -> list[Table]:
    """Return the rows of ``_cdc.tables`` that change now that just these tables are published.

    Args:
        gone: the stream has come to where that holds, so tables that are missing have no more changes in it. Else they
            keep their state, and a new table of the same name has to wait.
        starting: no copy is under way: one that is called so was cut short by a crash, and begins again.
    """
    again = ("dropped", "copying") if starting else ("dropped",)
    changed = []
    known_by_oid = {table.oid: table for table in known}
    where: dict[int, set[str]] = {}
    for there in published:
        where.setdefault(there.oid, set()).add(f"{there.publication}:{there.entry}")
    for there in {table.oid: table for table in published}.values():
        table = known_by_oid.get(there.oid)
        names = ",".join(sorted(where[there.oid]))
        if table is None:
            if not gone and _name_in_use(there, known_by_oid.values()):
                continue
            changed.append(Table(there.oid, there.schema, there.name, "pending", publication=names))
        elif table.state in again:
            begins = dataclasses.replace(table, schema=there.schema, name=there.name, state="pending", reason="")
            changed.append(dataclasses.replace(begins, publication=names))
        elif table.publication != names:
            # Before it came here, some of its changes were not in the stream, or not with these columns or this filter.
            moved = dataclasses.replace(table, publication=names, reason="published in another way")
            state: State = "resyncing" if table.state in ("streaming", "resyncing") else "pending"
            changed.append(moved if table.state == "error" else dataclasses.replace(moved, state=state))
    if not gone:
        return changed
    changed += [
        dataclasses.replace(table, state="dropped", reason="no longer published")
        for table in known_by_oid.values()
        if table.oid not in where and table.state != "dropped"
    ]
    return changed


def _name_in_use(there: PublishedTable, known: Iterable[Table]) -> bool:
    names = (there.schema, there.name)
    return any((table.schema, table.name) == names and table.state != "dropped" for table in known)


def refuse(settings: Settings, checkpoint: Checkpoint | None, system: System, found: Slot | None) -> None:
    """Refuse what does not belong together.

    Args:
        checkpoint: of the warehouse; None: there is none yet.
        system: where CDC_DSN leads.
        found: the slot; None: there is none.

    Raises:
        StateError, SettingsError: that is so; nothing may be done but what the hint says.
    """
    if checkpoint is None:
        _refuse_leftovers(settings, found)
        return
    check_source(settings, checkpoint, system)
    if found is not None:
        refuse_foreign(settings, found, system.dbname)
    if checkpoint.lsn is not None:
        _check_slot(settings, checkpoint.lsn, found)


def refuse_foreign(settings: Settings, found: Slot, dbname: str) -> None:
    """Refuse a slot that cannot be ours: to drop it could cost somebody else data.

    Raises:
        StateError: it is one.
    """
    if why := found.foreign(dbname):
        raise StateError(
            f"replication slot {settings.slot} {why}: it is somebody else's",
            "begin with another CDC_SLOT (and, where these exist, another CDC_WAREHOUSE and CDC_HISTORY); "
            "or drop that slot, if nobody needs it, and run `cdc resync --all`",
        )


def _refuse_in_use(settings: Settings, found: Slot | None, dbname: str) -> None:
    """Refuse what `run --fresh` may not take over."""
    if found is None:
        return
    refuse_foreign(settings, found, dbname)
    if found.active:
        raise _in_use(found)


def _in_use(found: Slot) -> StateError:
    return StateError(
        f"replication slot {found.name} is in use by process {found.active_pid} of the server",
        "stop the consumer that uses it (pg_stat_activity tells where it runs), or choose another name with CDC_SLOT",
    )


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
            raise _in_use(found)
        busy(found, waited_s)
        time.sleep(_POLL_S)
    return found


def _refuse_strangers(settings: Settings, sink: Sink, published: Sequence[PublishedTable]) -> None:
    """Refuse to replace what is no copy of ours."""
    if names := sink.strangers((table.schema, table.name) for table in published):
        raise StateError(
            f"DuckDB file {settings.warehouse} has a {names[0]} that cdc did not make and would have to replace",
            "set CDC_WAREHOUSE to another file, or rename what is there; or leave the table out with CDC_TABLES",
        )


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


def check_source(settings: Settings, checkpoint: Checkpoint, system: System) -> None:
    """Refuse a warehouse that mirrors something else.

    Raises:
        StateError, SettingsError: it does.
    """
    theirs = (checkpoint.system_identifier, checkpoint.database)
    if theirs != (system.system_identifier, system.dbname):
        raise StateError(
            f"warehouse {settings.warehouse} mirrors database {checkpoint.database} of system "
            f"{checkpoint.system_identifier}, but CDC_DSN leads to {system.dbname} of {system.system_identifier}",
            "set CDC_DSN back, or CDC_WAREHOUSE and CDC_HISTORY to new places",
        )
    if checkpoint.lsn is not None and system.lsn < checkpoint.lsn:
        raise StateError(
            f"the server is at {format_lsn(system.lsn)}, before {format_lsn(checkpoint.lsn)} where warehouse "
            f"{settings.warehouse} ends: it was restored from an older backup",
            "`cdc run --fresh` begins anew from what the server has now",
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
    if found.wal_status == "lost" or found.restart_lsn is None:
        raise StateError(f"replication slot {settings.slot} has lost WAL that was not read yet", anew)
    if found.confirmed_flush_lsn is not None and found.confirmed_flush_lsn > lsn:
        raise StateError(
            f"replication slot {settings.slot} was confirmed up to {format_lsn(found.confirmed_flush_lsn)}, but the "
            f"warehouse ends at {format_lsn(lsn)}: what lies between is lost",
            f"was the warehouse restored from an older copy, or the slot made anew? {anew}",
        )


def _check_key(settings: Settings, connection: Connection, published: Sequence[PublishedTable]) -> None:
    """Refuse another key than the server's: it alone tells the rows of an update or a delete."""
    if not settings.primary_key:
        return
    for table in published:
        if f"{table.schema}.{table.name}" == settings.view_of:
            definition = catalog.definition(connection, table.oid)
            key = set(definition.key) if definition is not None else set()
            names = [a.name for a in (definition.attributes if definition is not None else ()) if a.attnum in key]
            if sorted(names) != sorted(name.strip() for name in settings.primary_key.split(",")):
                raise SettingsError(
                    f"POSTGRES_PRIMARY_KEY is {settings.primary_key}, but the rows of {settings.view_of} are "
                    f"identified by {', '.join(names) or 'nothing'}",
                    "leave it away, or make it the key: ALTER TABLE ... REPLICA IDENTITY USING INDEX ...",
                )


def _check_deletes(settings: Settings, sink: Sink) -> None:
    marked = sink.ledger.requested() if sink.ledger.checkpoint is not None else []
    for table in sink.ledger.tables.values():
        if table.state == "streaming" and table.oid not in marked and table.deletes != settings.deletes:
            raise SettingsError(
                f"CDC_DELETES is {settings.deletes}, but table {table} was copied with {table.deletes}",
                f"set it back, or run `cdc resync --all` with CDC_DELETES={settings.deletes}",
            )
