"""``cdc status``: where the slot, the stream and the warehouse stand."""

from __future__ import annotations

import datetime as dt
import json
import sys
import time
from typing import Any

import click
from rich.console import Console
from rich.table import Column, Table

from cdc.cli.options import Seconds, with_settings
from cdc.errors import SinkError
from cdc.lsn import format_lsn
from cdc.settings import Settings
from cdc.sink.reader import reading, rows
from cdc.sink.warehouse import folded, quote
from cdc.source import slot
from cdc.source.connection import connect, translated

__all__ = ["status"]

PATIENCE_S = 10.0

_POSITIONS = """
SELECT extract(epoch FROM clock_timestamp())::float8, (pg_current_wal_lsn() - '0/0')::int8,
       (SELECT (sent_lsn - '0/0')::int8 FROM pg_stat_replication JOIN pg_replication_slots ON active_pid = pid
        WHERE slot_name = %s)"""


@click.command()
@click.option("--json", "as_json", is_flag=True, help="print one JSON object")
@click.option("--watch", is_flag=True, help="print again every two seconds, until Ctrl-C")
@click.option("--max-lag", type=Seconds(), metavar="DURATION", help="exit with 3 if it is further behind than that")
@with_settings("dsn", "warehouse", "slot", "publication")
def status(settings: Settings, as_json: bool, watch: bool, max_lag: float | None) -> None:
    r"""Show the slot, the positions and lag, the checkpoint and each table.

    Works with and without a running consumer. The lag in seconds is the server's clock less the moment up to which
    everything that was committed is in; a consumer that has nothing to do moves that on every ten seconds.

    \b
    Examples:
      cdc status
      cdc status --json
      cdc status --max-lag 60s    for a health check
    """
    while True:
        found = _gather(settings)
        if as_json:
            click.echo(json.dumps(found, indent=None if watch else 2))
        else:
            _print(found)
        if max_lag is not None and (reason := _behind(found["positions"]["lag_s"], max_lag)):
            click.echo(f"warning: {reason}", err=True)
            sys.exit(3)
        if not watch:
            return
        time.sleep(2.0)


def _behind(lag_s: float | None, max_lag_s: float) -> str:
    """Return in what the warehouse is too far behind; '' if it is not."""
    if lag_s is None:
        return "nothing is mirrored yet"
    return f"the warehouse is {lag_s:.0f} s behind, more than {max_lag_s:g} s" if lag_s > max_lag_s else ""


def _gather(settings: Settings) -> dict[str, Any]:
    warehouse = _warehouse(settings)
    with connect(settings.dsn) as connection:
        found = slot.read(connection, settings.slot)
        with translated("positions"):
            now, server, sent = connection.execute(_POSITIONS, [settings.slot]).fetchall()[0]
    confirmed = found.confirmed_flush_lsn if found else None
    checkpoint = warehouse["checkpoint"]
    as_of = warehouse["as_of"]
    return {
        "slot": None
        if found is None
        else {
            "name": found.name,
            "active": found.active,
            "wal_status": found.wal_status,
            "restart_lsn": _lsn(found.restart_lsn),
            "confirmed_flush_lsn": _lsn(confirmed),
            "retained_bytes": found.retained_bytes,
            "safe_bytes": found.safe_wal_size,
        },
        "positions": {
            "server": _lsn(server),
            "received": _lsn(sent),
            "confirmed": _lsn(confirmed),
            "lag_bytes": max(0, server - confirmed) if confirmed is not None else None,
            "lag_s": round(max(0.0, now - as_of), 3) if as_of is not None else None,
        },
        "checkpoint": {"lsn": _lsn(checkpoint[0]), "commit_ts": checkpoint[1]} if checkpoint else None,
        "tables": warehouse["tables"],
    }


def _warehouse(settings: Settings) -> dict[str, Any]:
    """Return what the warehouse says; nothing much if there is none yet."""
    empty: dict[str, Any] = {"checkpoint": None, "as_of": None, "tables": []}
    if not settings.warehouse.exists():
        return empty
    with reading(settings.warehouse, PATIENCE_S) as ask:
        if not rows(ask("SELECT 1 FROM duckdb_tables() WHERE schema_name = '_cdc' AND table_name = 'tables'")):
            raise SinkError(f"{settings.warehouse} is no warehouse of cdc", "set CDC_WAREHOUSE to the one you mean")
        for lsn, commit_ts, as_of in rows(ask("SELECT lsn, commit_ts, epoch(as_of) FROM _cdc.checkpoint")):
            empty |= {"checkpoint": (lsn, commit_ts), "as_of": as_of}
        ((database,),) = rows(ask("SELECT current_database()"))
        there = {folded(*names) for names in rows(ask("SELECT schema_name, table_name FROM duckdb_tables()"))}
        aliases = "SELECT 1 FROM duckdb_columns() WHERE schema_name = '_cdc' AND column_name = 'alias'"
        alias_of = "alias" if rows(ask(aliases)) else "''"  # an earlier version has written it
        for schema, name, alias, state, reason, changed in rows(
            ask(
                f"SELECT schema_name, table_name, {alias_of}, state, reason, last_change_ts FROM _cdc.tables "
                "ORDER BY 1, 2"
            )
        ):
            here = (schema, alias or name)
            counted = f"SELECT count(*) FROM {quote(database, *here)}"
            empty["tables"].append(
                {
                    "schema": schema,
                    "name": name,
                    "state": state,
                    "reason": reason,
                    "alias": alias or None,
                    "rows": rows(ask(counted))[0][0] if folded(*here) in there else None,
                    "last_change_ts": changed,
                }
            )
    return empty


def _lsn(value: int | None) -> str | None:
    return None if value is None else format_lsn(value)


def _print(found: dict[str, Any]) -> None:
    console = Console(markup=False, emoji=False)  # names, however much they look like markup
    now = dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    there, positions = found["slot"], found["positions"]
    facts = Table(title=f"cdc at {now}", show_header=False)
    if there is None:
        facts.add_row("slot", "does not exist")
    else:
        facts.add_row(
            "slot", f"{there['name']}, {'active' if there['active'] else 'not active'}, {there['wal_status']}"
        )
        facts.add_row("WAL retained", f"{_size(there['retained_bytes'])}, left: {_size(there['safe_bytes'])}")
    for name in ("server", "received", "confirmed"):
        facts.add_row(name, str(positions[name] or "-"))
    lag_s = positions["lag_s"]
    lag = "-" if positions["lag_bytes"] is None else _size(positions["lag_bytes"])
    facts.add_row("lag", f"{lag}, {'-' if lag_s is None else f'{lag_s:.1f} s'}")
    if found["checkpoint"]:
        facts.add_row("checkpoint", f"{found['checkpoint']['lsn']}, {found['checkpoint']['commit_ts'] or '-'}")
    console.print(facts)
    tables = Table(*(Column(name, overflow="fold") for name in ("table", "state", "rows", "last change", "reason")))
    for table in found["tables"]:
        rows = "-" if table["rows"] is None else f"{table['rows']:,}"
        name = f"{table['schema']}.{table['name']}" + (f" as {table['alias']}" if table["alias"] else "")
        tables.add_row(name, table["state"], rows, table["last_change_ts"] or "-", table["reason"])
    console.print(tables)


def _size(value: int | None) -> str:
    return "no limit" if value is None else f"{value / 1e6:,.1f} MB"
