"""``cdc check``: everything that stands in the way, at once."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click

from cdc.cli.options import with_settings
from cdc.errors import CdcError, SettingsError, WarehouseBusy
from cdc.refusals import refuse, refuse_choices
from cdc.settings import Settings
from cdc.sink.reader import reading, rows
from cdc.sink.stored import Checkpoint
from cdc.source import publication, slot
from cdc.source.connection import Connection, connect, connect_replication
from cdc.source.declared import DeclaredTypes
from cdc.source.preflight import Expected, Finding, findings, notes

__all__ = ["check"]

PATIENCE_S = 10.0


@click.command()
@with_settings("dsn", "warehouse", "history", "slot", "publication", "tables", "exclude", "mask", "mask_key", "types")
def check(settings: Settings) -> None:
    r"""Look for everything that would stop the consumer or do harm, each with what puts it right.

    Settings and free places of the server, rights, publications, tables without a key, other slots that hold WAL, and
    whether warehouse and history can be written. Notes are good to know, and no findings.

    Exit status 0: nothing found; 3: something was.

    \b
    Examples:
      cdc check --dsn postgresql://cdc@db.example.com/shop
      cdc check --tables "public.*"
    """
    found = list(_paths(settings))
    expected = Expected(settings.slot, settings.publication, settings.tables, settings.exclude)
    with connect(settings.dsn) as connection:
        found += findings(connection, expected)
        found += _columns(settings, connection)
        known = notes(connection, expected)
        if not any(finding.level == "error" for finding in found):
            found += _warehouse(settings, connection)
    for finding in found:
        click.echo(f"{finding.level}: {finding.message}")
        if finding.hint:
            click.echo(f"  {finding.hint}")
    for note in known:
        click.echo(f"note: {note}")
    if found:
        sys.exit(3)
    click.echo("nothing stands in the way")


def _warehouse(settings: Settings, connection: Connection) -> Iterator[Finding]:
    """Look whether slot, warehouse and history belong together."""
    try:
        replication = connect_replication(settings.dsn)  # pg_hba.conf and poolers treat it differently
        try:
            system = slot.identify(replication)
        finally:
            replication.finish()
        refuse(settings, _checkpoint(settings), system, slot.read(connection, settings.slot))
    except WarehouseBusy as busy:
        yield Finding("warning", str(busy), busy.hint)
    except CdcError as error:
        yield Finding("error", str(error), error.hint)


def _columns(settings: Settings, connection: Connection) -> Iterator[Finding]:
    """Look whether CDC_EXCLUDE, CDC_MASK and CDC_TYPES can be kept."""
    try:
        coming = publication.coming(connection, settings.publication, settings.tables)
        publication.refuse_columns(connection, settings.publication, coming, settings.exclude, settings.masks)
        refuse_choices(coming, settings.choices, DeclaredTypes(settings.dsn))
    except SettingsError as error:
        yield Finding("error", str(error), error.hint)


def _checkpoint(settings: Settings) -> Checkpoint | None:
    if not settings.warehouse.exists():
        return None
    with reading(settings.warehouse, PATIENCE_S) as ask:
        if not rows(ask("SELECT 1 FROM duckdb_tables() WHERE schema_name = '_cdc'")):
            return None
        query = "SELECT system_identifier, database, slot, publication, lsn FROM _cdc.checkpoint"
        found = rows(ask(query))
        return Checkpoint(*found[0]) if found else None


def _paths(settings: Settings) -> Iterator[Finding]:
    for name, path in (("CDC_WAREHOUSE", settings.warehouse.parent), ("CDC_HISTORY", settings.history)):
        if path is None:
            continue
        there = _nearest(path)
        try:  # root may write everywhere, if one believes the permissions
            with tempfile.TemporaryFile(dir=there):
                pass
        except OSError as error:
            message = f"{there} cannot be written: {error.strerror}"
            yield Finding("error", message, f"give this user the right to, or set {name}")


def _nearest(path: Path) -> Path:
    """Return `path`, or the nearest folder above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
