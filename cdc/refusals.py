"""What does not belong together: source, slot, warehouse, history and settings. Each is refused before it does harm.

Nothing here changes anything, but for reading.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from cdc.errors import SettingsError, StateError
from cdc.lsn import format_lsn
from cdc.pgoutput.types import Basis, Declarations, basis, column_type, may_be
from cdc.reconcile import theirs
from cdc.settings import Settings
from cdc.sink.schema import strangers
from cdc.sink.sink import Sink
from cdc.sink.stored import Checkpoint
from cdc.sink.warehouse import folded
from cdc.source.catalog import TableDefinition
from cdc.source.slot import Slot, System

__all__ = [
    "check_source",
    "in_use",
    "refuse",
    "refuse_foreign",
    "refuse_in_use",
    "refuse_missing",
    "refuse_settings",
    "refuse_tables",
]


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


def refuse_in_use(settings: Settings, found: Slot | None, dbname: str) -> None:
    """Refuse what `run --fresh` may not take over."""
    if found is None:
        return
    refuse_foreign(settings, found, dbname)
    if found.active:
        raise in_use(found)


def in_use(found: Slot) -> StateError:
    """Return the error for a slot that somebody else reads."""
    return StateError(
        f"replication slot {found.name} is in use by process {found.active_pid} of the server",
        "stop the consumer that uses it (pg_stat_activity tells where it runs), or choose another name with CDC_SLOT",
    )


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


def refuse_tables(settings: Settings, sink: Sink, coming: Iterable[TableDefinition], *, begins: bool) -> None:
    """Refuse settings that do not go with the tables that are published, or are to be.

    Args:
        begins: there is no copy of any of them yet. Later on, a name that is taken is the trouble of one table.

    Raises:
        SettingsError: POSTGRES_PRIMARY_KEY is not what identifies the rows: it alone tells those of an update.
        StateError: a name in the warehouse is taken.
    """
    coming = list(coming)
    names = [(table.schema, table.name) for table in coming]
    for table in coming:
        if settings.primary_key and str(table) == settings.view_of:
            _check_key(settings, table)
        if settings.view and folded(table.schema, table.name) == folded("main", settings.view):
            raise StateError(f"view {settings.view} would have the name of table {table}", "choose another CDC_VIEW")
    if begins and (taken := strangers(sink.warehouse, sink.ledger.tables.values(), names)):
        raise StateError(
            f"DuckDB file {settings.warehouse} has a {taken[0]} that cdc did not make and would have to replace",
            "set CDC_WAREHOUSE to another file, or rename what is there; or leave the table out with CDC_TABLES",
        )


def _check_key(settings: Settings, table: TableDefinition) -> None:
    names = [attribute.name for attribute in table.attributes if attribute.attnum in table.key]
    if sorted(names) != sorted(name.strip() for name in settings.primary_key.split(",")):
        raise SettingsError(
            f"POSTGRES_PRIMARY_KEY is {settings.primary_key}, but the rows of {table} are identified by "
            f"{', '.join(names) or 'nothing'}",
            "leave it away, or make it the key: ALTER TABLE ... REPLICA IDENTITY USING INDEX ...",
        )


def refuse_choices(tables: Iterable[TableDefinition], choices: Mapping[str, Basis], declared: Declarations) -> None:
    """Refuse a CDC_TYPES that cannot be.

    Args:
        tables: that are, or are to be, published.

    Raises:
        SettingsError: a column is not there, or cannot be held as what is chosen.
    """
    unknown = set(choices)
    for table in tables:
        for attribute in table.attributes:
            name = f"{table}.{attribute.name}"
            if name not in choices:
                continue
            unknown.discard(name)
            natural = basis(attribute.type_oid, attribute.typmod, declared)
            is_key = attribute.attnum in table.key
            if not may_be(natural, choices[name], is_key=is_key):
                raise SettingsError(
                    f"CDC_TYPES: {name} cannot be held as {column_type(*choices[name]).duckdb}",
                    f"it can be {column_type(*natural).duckdb} or VARCHAR; numeric alone can be DOUBLE or a DECIMAL, "
                    "and DOUBLE only where it is no part of the key",
                )
    if unknown:
        raise SettingsError(
            f"CDC_TYPES: there is no column {min(unknown)} in what is published",
            "write it as schema.table.column:type; a column that was renamed or dropped has to be put right here, too",
        )


def refuse_missing(settings: Settings, sink: Sink) -> None:
    """Refuse to make a publication in the place of one that was not ours: that may have published less, on purpose.

    Raises:
        StateError: one that is missing was not ours.
    """
    if theirs(sink.ledger.tables.values(), settings.publication):
        raise StateError(
            f"publication {settings.publication} is missing, and was not ours to make again",
            "create it again; then `cdc run` makes a new slot, and copies every table anew",
        )


def refuse_settings(settings: Settings, sink: Sink) -> None:
    """Refuse settings that are not those with which tables were copied, but for what is to be copied anew.

    Raises:
        SettingsError: CDC_DELETES or CDC_MASK is another.
    """
    marked = sink.ledger.requested() if sink.ledger.checkpoint is not None else []
    for table in sink.ledger.tables.values():
        if table.state != "streaming" or table.oid in marked:
            continue
        if table.deletes != settings.deletes:
            raise SettingsError(
                f"CDC_DELETES is {settings.deletes}, but table {table} was copied with {table.deletes}",
                f"set it back, or run `cdc resync --all` with CDC_DELETES={settings.deletes}",
            )
        for column in table.columns:
            mask = settings.masks.get(f"{table}.{column.name}")
            if (label := "" if mask is None else mask.label) != column.mask:
                raise SettingsError(
                    f"CDC_MASK: column {column.name} of {table} was copied with {_mask(column.mask)}, and now has "
                    f"{_mask(label)}",
                    f"set it back, or copy the table anew: `cdc resync {table}`, then `cdc run`",
                )


def _mask(label: str) -> str:
    kind, _, key = label.partition(":")
    return f"{kind} and key {key}" if key else kind or "no mask"
