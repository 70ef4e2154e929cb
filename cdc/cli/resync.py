"""``cdc resync``: mark tables to be copied anew."""

from __future__ import annotations

import time

import click
import duckdb

from cdc.cli.options import with_settings
from cdc.errors import CdcError, SettingsError, StateError
from cdc.refusals import check_source, refuse_foreign
from cdc.settings import Settings
from cdc.sink.checkpoint import Ledger
from cdc.sink.stored import Checkpoint, Table
from cdc.sink.warehouse import Warehouse, explain
from cdc.source import slot
from cdc.source.connection import connect, connect_replication

__all__ = ["resync"]

PATIENCE_S = 60.0


@click.command()
@click.argument("tables", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="every table; makes a new slot too, if the old one is gone")
@with_settings("dsn", "warehouse", "slot", "publication")
def resync(settings: Settings, tables: tuple[str, ...], everything: bool) -> None:
    r"""Copy tables anew, while everything else streams on.

    A running consumer begins at once, another one when it is started. Readers see the old content until the new one
    is complete.

    \b
    Examples:
      cdc resync public.orders
      cdc resync --all
    """
    if bool(tables) == everything:
        raise click.UsageError("name the tables, or say --all")
    if not settings.warehouse.exists():
        raise CdcError(f"there is no warehouse {settings.warehouse} yet", "`cdc run` copies everything the first time")
    warehouse = Warehouse(settings.warehouse, settings.memory, settings.threads, settings.tmp)
    deadline = time.monotonic() + PATIENCE_S
    warehouse.acquire(give_up=lambda: time.monotonic() > deadline)
    try:
        ledger = Ledger(warehouse)
        ledger.load()
        if ledger.checkpoint is None:
            raise StateError(f"{settings.warehouse} is no warehouse of cdc", "set CDC_WAREHOUSE to the one you mean")
        chosen = _choose(ledger, tables)
        warehouse.begin()
        for table in chosen:
            ledger.request(table.oid)
        if everything and _slot_is_of_no_use(settings, ledger.checkpoint):
            ledger.forget_position()
        warehouse.commit()
    except duckdb.Error as error:
        raise explain(error) from error
    finally:
        warehouse.release()
    click.echo(f"marked to be copied anew: {', '.join(map(str, chosen)) or 'nothing'}")


def _choose(ledger: Ledger, names: tuple[str, ...]) -> list[Table]:
    known = {str(table): table for table in ledger.tables.values() if table.state != "dropped"}
    known |= {str(table): table for table in ledger.tables.values() if str(table) not in known}
    if not names:
        return [table for table in ledger.tables.values() if table.state != "dropped"]
    for name in names:
        if name not in known:
            raise SettingsError(f"no table {name} is known", "name it as schema.table; `cdc status` lists them")
    return [known[name] for name in names]


def _slot_is_of_no_use(settings: Settings, checkpoint: Checkpoint) -> bool:
    """Whether the slot no longer holds everything from the checkpoint on."""
    replication = connect_replication(settings.dsn)
    try:
        system = slot.identify(replication)
    finally:
        replication.finish()
    check_source(settings, checkpoint, system)
    with connect(settings.dsn) as connection:
        found = slot.read(connection, settings.slot)
    if found is None:
        return True
    refuse_foreign(settings, found, system.dbname)
    if found.wal_status == "lost" or found.restart_lsn is None:
        return True
    lsn = checkpoint.lsn
    return lsn is not None and found.confirmed_flush_lsn is not None and found.confirmed_flush_lsn > lsn
