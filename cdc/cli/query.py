"""``cdc query``: SQL against the warehouse, while a consumer writes to it or not."""

from __future__ import annotations

import csv
import itertools
import json
import sys

import click
import duckdb
from rich.console import Console
from rich.table import Column, Table

from cdc.cli.options import with_settings
from cdc.errors import CdcError
from cdc.settings import Settings
from cdc.sink.warehouse import open_for_reading

__all__ = ["query"]

PATIENCE_S = 30.0
"""How long a query waits for the consumer to let go of the file."""

_PLAIN = ("BOOLEAN", "TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT")


@click.command()
@click.argument("sql")
@click.option("--format", "form", type=click.Choice(["table", "json", "csv"]), default="table", show_default=True)
@with_settings("warehouse")
def query(settings: Settings, sql: str, form: str) -> None:
    r"""Run one SQL query and print its rows.

    \b
    Examples:
      cdc query "SELECT count(*) FROM public.orders"
      cdc query --format csv "FROM public.orders LIMIT 10"
      cdc query "SELECT * FROM _cdc.freshness"
    """
    connection = open_for_reading(settings.warehouse, PATIENCE_S)
    try:
        names, rows = _run(connection, sql)
    except duckdb.Error as error:
        raise CdcError(f"the query failed: {str(error).splitlines()[0]}", "tables are named as in Postgres") from None
    finally:
        connection.close()
    _print(form, names, rows)


def _run(connection: duckdb.DuckDBPyConnection, sql: str) -> tuple[list[str], list[tuple[object, ...]]]:
    """Return names and rows; what Python has no exact value for (infinite dates, say) comes as DuckDB's text."""
    relation: duckdb.DuckDBPyRelation | None = connection.sql(sql)
    if relation is None:
        return [], []
    # By numbers: a name may come twice.
    numbered = [f"c{i}" for i in range(len(relation.columns))]
    chosen = [
        name if str(kind) in _PLAIN else f"CAST({name} AS VARCHAR)"
        for name, kind in zip(numbered, relation.types, strict=True)
    ]
    exact = relation.query("r", f"SELECT {', '.join(chosen)} FROM r AS r({', '.join(numbered)})")
    return list(relation.columns), exact.fetchall() if exact is not None else []


def _distinct(names: list[str]) -> list[str]:
    """Return `names` with a number behind each that came before: JSON would keep the last one only."""
    found: list[str] = []
    for name in names:
        again = (f"{name}_{i}" for i in itertools.count(1))
        found.append(name if name not in found else next(other for other in again if other not in [*found, *names]))
    return found


def _print(form: str, names: list[str], rows: list[tuple[object, ...]]) -> None:
    if form == "json":
        names = _distinct(names)
        click.echo(json.dumps([dict(zip(names, row, strict=True)) for row in rows], indent=2, default=str))
    elif form == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(names)
        writer.writerows([_text(value) for value in row] for row in rows)
    else:
        table = Table(*(Column(name, overflow="fold") for name in names))
        for row in rows:
            table.add_row(*map(_text, row))
        Console(markup=False, emoji=False).print(table)  # data, however much of it looks like markup


def _text(value: object) -> str:
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
