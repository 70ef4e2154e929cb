"""The demo: a Postgres of its own, an application that writes, and a consumer that is killed and loses nothing.

Everything lies below one folder; nothing is left running.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
from rich.table import Table

from cdc.embedded import EmbeddedServer
from cdc.errors import CdcError
from cdc.settings import PREDECESSOR
from cdc.sink.reader import Ask, reading, rows
from cdc.traffic import DATABASE, TABLES, Traffic, fill

__all__ = ["run_demo"]

Show = Callable[[Any], None]
"""Prints a line, or something of rich's."""

COPY_TIMEOUT_S = 300.0
_LINE_S = 3.0
_LOOK_S = 0.05
_PATIENCE_S = 30.0
_KILL_AT = 0.5  # of the traffic's time

_QUERIES = {
    "credits used, by plan": """
        SELECT s.plan, count(*) AS events, sum(e.credits) AS credits
        FROM public.usage_events e JOIN public.subscriptions s ON s.id = e.subscription_id
        GROUP BY s.plan ORDER BY credits DESC""",
    "the busiest days": """
        SELECT CAST(happened_at AS date) AS day, count(*) AS events, sum(credits) AS credits
        FROM public.usage_events GROUP BY CAST(happened_at AS date) ORDER BY credits DESC, day LIMIT 5""",
    "who left after using the most": """
        SELECT s.id, s.plan, sum(e.credits) AS credits
        FROM public.usage_events e JOIN public.subscriptions s ON s.id = e.subscription_id
        WHERE s.deleted_at IS NOT NULL GROUP BY s.id, s.plan ORDER BY credits DESC, s.id LIMIT 5""",
}
"""The same SQL for both, and the same answers."""

# Each row as one text that both print alike, hashed; the sum of the hashes does not depend on the order.
_TEXTS = {
    "subscriptions": "id, email, plan, lifetime_value, {deleted_at}, {updated_at}",
    "usage_events": "id, subscription_id, feature, credits, {happened_at}",
    "heartbeat": "id, beat",
}
_TIMES = ("deleted_at", "updated_at", "happened_at")
_POSTGRES = (
    "SELECT count(*), coalesce(sum(('x' || left(md5(concat_ws('|', {text})), 8))::bit(32)::bigint), 0) FROM public.{t}"
)
_DUCKDB = "SELECT count(*), coalesce(sum(('0x' || left(md5(concat_ws('|', {text})), 8))::BIGINT), 0) FROM public.{t}"


def run_demo(lake: Path, seconds: int, events: int, show: Show) -> None:
    """Show a Postgres being mirrored into `lake`, and what comes of it.

    Args:
        lake: folder for the warehouse and the history; what an earlier demo has left there is replaced.
        seconds: how long the application writes.
        events: how many rows its largest table has at first.

    Raises:
        CdcError: something of it failed.
    """
    _clear(lake)
    with EmbeddedServer() as server:
        show(f"PostgreSQL {server.version} is running at {server.dsn(DATABASE)}")
        began = time.monotonic()
        fill(server, events)
        show(
            f"{events:,} events and 5,000 subscriptions in {time.monotonic() - began:.1f} s; now `cdc run` copies them"
        )
        environment = _environment(server, lake)
        with _Consumer(environment, lake) as consumer:
            _await_copies(lake, consumer, show)
            with Traffic(server.dsn(DATABASE)) as traffic:
                _watch(lake, server, consumer, traffic, seconds, show)
        began = time.monotonic()
        _cdc(environment, lake, "run", "--once")
        show(f"\nThe writing has ended, and the consumer too; `cdc run --once` took {time.monotonic() - began:.1f} s.")
        with (
            psycopg.connect(server.dsn(DATABASE), autocommit=True) as connection,
            reading(lake / "warehouse.duckdb", _PATIENCE_S) as ask,
        ):
            show(_proof(connection, ask))
            _analyse(connection, ask, show)
    _farewell(lake, show)


def _clear(lake: Path) -> None:
    mark = lake / ".demo"
    if mark.exists():
        shutil.rmtree(lake)
    elif lake.exists() and any(lake.iterdir()):
        raise CdcError(f"{lake} is not empty, and not by a demo", "choose another folder with --lake")
    lake.mkdir(parents=True, exist_ok=True)
    mark.touch()


def _environment(server: EmbeddedServer, lake: Path) -> dict[str, str]:
    """Return an environment in which nobody's settings count; nor does a cdc.toml, for the folder is the lake."""
    own = {n: v for n, v in os.environ.items() if not n.startswith(("CDC_", "PG")) and n not in PREDECESSOR}
    return own | {
        "CDC_DSN": server.dsn(DATABASE, "cdc"),
        "CDC_WAREHOUSE": str(lake.absolute() / "warehouse.duckdb"),
        "CDC_HISTORY": str(lake.absolute() / "history"),
        "CDC_FLUSH_INTERVAL": "200ms",
    }


_PROGRAM = (sys.executable, "-c", "from cdc.cli import main; main()")


def _cdc(environment: dict[str, str], lake: Path, *arguments: str) -> None:
    with (lake / "consumer.log").open("a") as log:
        done = subprocess.run([*_PROGRAM, *arguments], env=environment, stderr=log, cwd=lake, check=False)
    if done.returncode:
        raise CdcError(f"cdc {arguments[0]} failed", f"see {lake / 'consumer.log'}")


class _Consumer:
    """`cdc run` in a process of its own; its log goes to a file. A context manager: at its end the process is gone."""

    def __init__(self, environment: dict[str, str], lake: Path) -> None:
        self._environment = environment
        self.log = lake / "consumer.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> _Consumer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self.kill()

    def start(self) -> None:
        with self.log.open("ab") as log:
            # a session of its own: Ctrl-C is ours to pass on
            self._process = subprocess.Popen(
                [*_PROGRAM, "run"], env=self._environment, stderr=log, cwd=self.log.parent, start_new_session=True
            )

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def check(self) -> None:
        if self._process is None or self._process.poll() is not None:
            last = self.log.read_text(errors="replace").strip().splitlines()[-2:]
            raise CdcError(f"the consumer has ended: {' '.join(last)}", f"see {self.log}")


def _await_copies(lake: Path, consumer: _Consumer, show: Show) -> None:
    """Return when every table streams."""
    began = time.monotonic()
    said = 0.0
    while (waited_s := time.monotonic() - began) < COPY_TIMEOUT_S:
        consumer.check()
        found = _ask(lake, "SELECT table_name, state FROM _cdc.tables ORDER BY 1")
        if len(found) == len(TABLES) and all(state == "streaming" for _, state in found):
            counts = [_ask(lake, f"SELECT count(*) FROM public.{table}")[0][0] for table in TABLES]
            show(f"copied {sum(counts):,} rows in {waited_s:.1f} s, into DuckDB and Parquet; from here on it streams\n")
            return
        if found and waited_s - said >= _LINE_S:
            said = waited_s
            show("  " + ", ".join(f"{table} {state}" for table, state in found))
        time.sleep(0.2)
    raise CdcError("the tables were not copied in time", f"see {consumer.log}")


def _ask(lake: Path, sql: str) -> list[tuple[Any, ...]]:
    """Ask the warehouse, as `cdc query` does; nothing while it is not there yet."""
    try:
        with reading(lake / "warehouse.duckdb", _PATIENCE_S) as ask:
            return rows(ask(sql))
    except CdcError:
        return []


def _watch(lake: Path, server: EmbeddedServer, consumer: _Consumer, traffic: Traffic, seconds: int, show: Show) -> None:
    """Show what goes on while the application writes; kill the consumer in the middle."""
    show("an application inserts, updates and soft-deletes; the consumer follows:")
    with psycopg.connect(server.dsn(DATABASE), autocommit=True) as connection:
        began = said = time.monotonic()
        changes = 0
        killed_at: float | None = None
        while (now := time.monotonic()) < began + seconds:
            if killed_at is None and now - began >= seconds * _KILL_AT:
                killed_at = now
                consumer.kill()
                show("  kill -9: the consumer is gone in the middle of it; another one is started")
                consumer.start()
            consumer.check()
            for (beat,) in _ask(lake, "SELECT beat FROM public.heartbeat"):
                traffic.seen(beat)
            if now - said >= _LINE_S:
                rate = (traffic.changes - changes) / (now - said)
                changes, said = traffic.changes, now
                show(_line(now - began, lake, connection, rate, traffic.latency_s()))
            time.sleep(_LOOK_S)


def _line(at_s: float, lake: Path, connection: psycopg.Connection[Any], rate: float, latency_s: float | None) -> str:
    total = sum(
        count for (count,) in _ask(lake, " UNION ALL ".join(f"SELECT count(*) FROM public.{t}" for t in TABLES))
    )
    lag = "SELECT coalesce(max(pg_current_wal_lsn() - confirmed_flush_lsn), 0)::int8 FROM pg_replication_slots"
    ((lag_bytes,),) = connection.execute(lag).fetchall()
    visible = "-" if latency_s is None else f"{latency_s * 1000:.0f} ms"
    return (
        f"  {at_s:4.0f} s  {total:>9,} rows in DuckDB  {rate:5.0f} changes/s  "
        f"slot lag {lag_bytes / 1000:6.0f} kB  commit to visible {visible}"
    )


def _proof(connection: psycopg.Connection[Any], ask: Ask) -> Table:
    """Compare every row of every table: count, and the sum of the rows' hashes.

    Raises:
        CdcError: they differ.
    """
    shown = Table("table", "rows in Postgres", "rows in DuckDB", "sum of the rows' hashes", title="After the kill -9")
    for table in TABLES:
        text = _TEXTS[table]
        theirs = {name: f"(extract(epoch FROM {name}) * 1000000)::bigint" for name in _TIMES}
        ours = {name: f"epoch_us({name})" for name in _TIMES}
        query = _POSTGRES.format(text=text.format(**theirs), t=table)
        ((source_rows, source_sum),) = connection.execute(query.encode()).fetchall()
        ((mirror_rows, mirror_sum),) = rows(ask(_DUCKDB.format(text=text.format(**ours), t=table)))
        if (source_rows, str(source_sum)) != (mirror_rows, str(mirror_sum)):
            raise CdcError(
                f"table {table} differs: {source_rows} rows in Postgres, {mirror_rows} in DuckDB",
                "this must not happen: please report it, with the folder of the demo",
            )
        shown.add_row(table, f"{source_rows:,}", f"{mirror_rows:,}", f"{source_sum} = {mirror_sum}")
    return shown


def _analyse(connection: psycopg.Connection[Any], ask: Ask, show: Show) -> None:
    """Ask both the same, and show DuckDB's answers with the times of both."""
    for title, sql in _QUERIES.items():
        began = time.monotonic()
        found = ask(sql)
        here_s = time.monotonic() - began
        began = time.monotonic()
        connection.execute(sql.encode()).fetchall()
        there_s = time.monotonic() - began
        caption = f"DuckDB {here_s * 1000:.0f} ms, Postgres {there_s * 1000:.0f} ms"
        shown = Table(*found.column_names, title=title, caption=caption)
        for row in rows(found):
            shown.add_row(*map(str, row))
        show(shown)


def _farewell(lake: Path, show: Show) -> None:
    warehouse = lake / "warehouse.duckdb"
    log = lake / "history" / "public" / "subscriptions" / "*.parquet"
    show(f"Nothing is left running. The warehouse is {warehouse}, the change log {lake / 'history'}.")
    show("Ask them something:")
    show(f"  cdc query --warehouse {warehouse} 'SELECT plan, count(*) FROM public.subscriptions GROUP BY plan'")
    show(f"  cdc query --warehouse {warehouse} \"SELECT _op, count(*) FROM '{log}' GROUP BY _op\"")
    show("Then mirror your own database: cdc setup --help, cdc check --help, cdc run --help")
