"""``cdc query``: SQL against the warehouse, while a consumer writes to it or not."""

from __future__ import annotations

import csv
import itertools
import json
import math
import sys
from typing import Any

import click
from rich.console import Console
from rich.table import Column, Table

from cdc.cli.options import with_settings
from cdc.settings import Settings
from cdc.sink.reader import reading, rows

__all__ = ["query"]

PATIENCE_S = 30.0
"""How long a query waits while another program writes to the file."""


@click.command()
@click.argument("sql")
@click.option("--format", "form", type=click.Choice(["table", "json", "csv"]), default="table", show_default=True)
@with_settings("warehouse")
def query(settings: Settings, sql: str, form: str) -> None:
    r"""Run one SQL query and print its rows.

    Whether a consumer runs or not: one that holds the file answers itself.

    \b
    Examples:
      cdc query "SELECT count(*) FROM public.orders"
      cdc query --format csv "FROM public.orders LIMIT 10"
      cdc query "SELECT * FROM _cdc.freshness"
    """
    with reading(settings.warehouse, PATIENCE_S) as ask:
        found = ask(sql)
    _print(form, found.column_names, rows(found))


def _distinct(names: list[str]) -> list[str]:
    """Return `names` with a number behind each that came before: JSON would keep the last one only."""
    found: list[str] = []
    for name in names:
        again = (f"{name}_{i}" for i in itertools.count(1))
        found.append(name if name not in found else next(other for other in again if other not in [*found, *names]))
    return found


def _print(form: str, names: list[str], found: list[tuple[Any, ...]]) -> None:
    if form == "json":
        names = _distinct(names)
        click.echo(
            json.dumps([dict(zip(names, map(_plain, row), strict=True)) for row in found], indent=2, default=str)
        )
    elif form == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(names)
        writer.writerows([_text(value) for value in row] for row in found)
    else:
        table = Table(*(Column(name, overflow="fold") for name in names))
        for row in found:
            table.add_row(*map(_text, row))
        Console(markup=False, emoji=False).print(table)  # data, however much of it looks like markup


def _plain(value: Any) -> Any:
    """Return a value without floats that JSON lacks: these become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {name if isinstance(name, str) else str(name): _plain(each) for name, each in value.items()}
    return value


def _text(value: object) -> str:
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
