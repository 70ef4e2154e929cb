"""``cdc demo``: see it work, with nothing to set up."""

from __future__ import annotations

import importlib.resources
import signal
from pathlib import Path

import click
from click.core import ParameterSource
from rich.console import Console

from cdc.errors import CdcError, SourceError
from cdc.settings import load
from cdc.source.connection import connect, translated

__all__ = ["demo"]

_SHOW_CHANGED = b"""
SELECT CASE WHEN deleted_at = now() THEN 'soft-deleted'
            WHEN id = currval(pg_get_serial_sequence('public.subscriptions', 'id')) THEN 'inserted'
            ELSE 'updated' END,
       id, email, plan, lifetime_value
FROM public.subscriptions WHERE updated_at = now() ORDER BY id DESC"""
"""What the transaction has changed: the table's trigger stamps each row with its time."""

_HINTS = {
    "42P01": "this is for the database of compose.yaml; the SQL that makes its table is in postgres/init",
    "42501": "the role has to be one that may write: name it by --dsn or CDC_DEMO_DSN",
}


@click.command()
@click.option(
    "--seconds", default=45, show_default=True, type=click.IntRange(6, 3600), help="how long the application writes"
)
@click.option(
    "--events",
    default=1_000_000,
    show_default=True,
    type=click.IntRange(1, 100_000_000),
    help="rows of its largest table at first",
)
@click.option(
    "--lake", default=Path("lake/demo"), show_default=True, type=click.Path(path_type=Path), help="where to write"
)
@click.option("--changes", is_flag=True, help="only change three rows of compose.yaml's database")
@click.option(
    "--dsn",
    metavar="VALUE",
    envvar="CDC_DEMO_DSN",
    help="with --changes: that database, as a role that may write [CDC_DEMO_DSN; else CDC_DSN]",
)
def demo(seconds: int, events: int, lake: Path, changes: bool, dsn: str | None) -> None:
    r"""Start a Postgres of its own, mirror an application's traffic live, and show what comes of it.

    The consumer is killed in the middle of it, and every row is compared at the end. Takes a good minute.

    With --changes nothing is started: in the database of compose.yaml it inserts one row of public.subscriptions,
    updates one and soft-deletes one, in one transaction, for the consumer to mirror. Each time three others.

    \b
    Examples:
      cdc demo
      docker compose exec cdc cdc demo --changes
      cdc demo --changes --dsn postgresql://analyst:analyst@localhost:5437/analytics
    """
    _refuse_mixture("changes", "dsn", changes=changes)
    if changes:
        _change(dsn)
        return
    try:
        from cdc.demo import run_demo  # noqa: PLC0415 -- needs the extra `demo`, other commands do not
    except ImportError as error:
        raise CdcError(
            f"the demo needs a package that is not installed: {error.name}", "pip install 'pg-duckdb-cdc[demo]'"
        ) from None
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: nothing is left running
    console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
    run_demo(lake, seconds, events, console.print)


def _refuse_mixture(*own: str, changes: bool) -> None:
    """Refuse flags that mean nothing with --changes, or without it; `own` are those that do with it."""
    context = click.get_current_context()
    for name in context.params:
        given = context.get_parameter_source(name) == ParameterSource.COMMANDLINE
        if given and changes != (name in own):
            raise click.UsageError(f"--{name} {'cannot be used with' if changes else 'needs'} --changes")


def _change(dsn: str | None) -> None:
    """Run changes.sql in one transaction, and print the rows that it changed."""
    script = importlib.resources.files("cdc").joinpath("changes.sql").read_bytes()
    with connect(load({"dsn": dsn} if dsn else {}).dsn) as connection:
        try:
            with translated("change three rows"), connection.transaction():
                connection.execute(script)
                rows = connection.execute(_SHOW_CHANGED).fetchall()
        except SourceError as error:
            error.hint = _HINTS.get(error.sqlstate, error.hint)
            raise
    for change, key, email, plan, lifetime_value in rows:
        click.echo(f"{change}: {key}, {email}, {plan}, {lifetime_value}")
    click.echo('now in DuckDB: cdc query "FROM public.subscriptions ORDER BY updated_at DESC LIMIT 3"')
