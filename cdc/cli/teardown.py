"""``cdc teardown``: remove what we made in Postgres."""

from __future__ import annotations

import click

from cdc.cli.options import with_settings
from cdc.errors import StateError
from cdc.settings import Settings
from cdc.source import slot, upkeep
from cdc.source.connection import connect

__all__ = ["teardown"]


@click.command()
@with_settings("dsn", "slot", "publication")
def teardown(settings: Settings) -> None:
    """Remove the slot and the publications that cdc made; warehouse and history stay as they are.

    Without its slot the warehouse cannot be continued: a later `cdc run --fresh` copies everything anew.
    """
    with connect(settings.dsn) as connection:
        found = slot.read(connection, settings.slot)
        if found is not None and (why := found.foreign(connection.info.dbname)):
            raise StateError(
                f"replication slot {settings.slot} {why}: cdc did not make it",
                "set CDC_DSN and CDC_SLOT to what the consumer used",
            )
        if found is not None and found.active:
            raise StateError(
                f"replication slot {settings.slot} is in use by process {found.active_pid} of the server",
                "stop the consumer first",
            )
        if found is not None:
            slot.drop(connection, settings.slot)
            click.echo(f"dropped replication slot {settings.slot}")
        names = upkeep.drop(connection, settings.publication)
        for name in names:
            click.echo(f"dropped publication {name}")
        if found is None and not names:
            click.echo("nothing of cdc was there")
