"""``cdc setup``: the SQL that the database's owner has to run."""

from __future__ import annotations

import click

from cdc.cli.options import with_settings
from cdc.settings import Settings
from cdc.source.connection import connect, translated
from cdc.source.owner import SERVICES, setup_sql

__all__ = ["setup"]


@click.command()
@click.option("--role", default="cdc", show_default=True, help="the role that the consumer will use")
@click.option(
    "--service",
    type=click.Choice(SERVICES),
    default="own",
    show_default=True,
    help="who runs the server",
)
@click.option("--apply", is_flag=True, help="run it now, as the role of CDC_DSN")
@with_settings("dsn", "publication", "tables", "exclude")
def setup(settings: Settings, role: str, service: str, apply: bool) -> None:
    r"""Print the SQL that the database's owner has to run once: settings, role, grants, publications.

    \b
    Examples:
      cdc setup --dsn postgresql://owner@localhost/shop --role cdc > setup.sql
      cdc setup --service rds
    """
    with connect(settings.dsn) as connection:
        script = setup_sql(connection, settings.publication, settings.tables, role, service, settings.exclude)
        if not apply:
            click.echo(script, nl=False)
            return
        for line in script.splitlines():
            if line and not line.startswith("--"):
                with translated(line.split(" TO ", maxsplit=1)[0]):
                    connection.execute(line.encode())
                click.echo(line)
