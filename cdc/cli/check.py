"""``cdc check``: everything that stands in the way, at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from cdc.cli.options import with_settings
from cdc.settings import Settings
from cdc.source.connection import connect, connect_replication
from cdc.source.preflight import Expected, Finding, findings

__all__ = ["check"]


@click.command()
@with_settings("dsn", "warehouse", "history", "slot", "publication", "tables")
def check(settings: Settings) -> None:
    """Look for everything that would stop the consumer or do harm, each with what puts it right.

    Exit status 0: nothing found; 3: something was.
    """
    found = list(_paths(settings))
    with connect(settings.dsn) as connection:
        found += findings(connection, Expected(settings.slot, settings.publication, settings.tables))
    if not any(finding.level == "error" for finding in found):
        connect_replication(settings.dsn).finish()  # pg_hba.conf and poolers treat it differently
    for finding in found:
        click.echo(f"{finding.level}: {finding.message}")
        if finding.hint:
            click.echo(f"  {finding.hint}")
    if found:
        sys.exit(3)
    click.echo("nothing stands in the way")


def _paths(settings: Settings) -> Iterator[Finding]:
    for name, path in (("CDC_WAREHOUSE", settings.warehouse.parent), ("CDC_HISTORY", settings.history)):
        if path is None:
            continue
        there = _nearest(path)
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            yield Finding("error", f"{there} cannot be written", f"give this user the right to, or set {name}")


def _nearest(path: Path) -> Path:
    """Return `path`, or the nearest folder above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
