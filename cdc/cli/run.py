"""``cdc run``: the consumer."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import click
import structlog
from psycopg.conninfo import conninfo_to_dict
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from cdc.cli.options import with_settings
from cdc.pipeline import Pipeline
from cdc.settings import Settings

__all__ = ["run"]

_LINE_S = 10.0


@click.command()
@click.option("--once", is_flag=True, help="mirror everything committed before this call, then exit")
@click.option("--fresh", is_flag=True, help="take the slot over, set an old history aside, and copy everything anew")
@with_settings()
def run(settings: Settings, once: bool, fresh: bool) -> None:
    r"""Mirror the database until SIGTERM or Ctrl-C.

    Creates publication and slot if they are absent, copies the tables that are not copied yet, then streams. A first
    signal flushes what is in hand and exits within 10 seconds; a second one quits at once. Neither loses anything.

    With --once the exit status is 3 if some table is in state error, and the others are mirrored.

    \b
    Examples:
      cdc run --dsn postgresql://cdc@db.example.com/shop
      CDC_DSN=postgresql://cdc@localhost/shop cdc run --once
    """
    with contextlib.ExitStack() as stack:
        observer = stack.enter_context(_observer(as_json=settings.log == "json"))
        observer.event("starting", **_intention(settings, once=once, fresh=fresh))
        if "STATE_DIR" in os.environ:
            observer.event("state folder not used", variable="STATE_DIR", reason="the position is kept with the data")
        pipeline = Pipeline(settings, observer)
        _stop_on_signals(pipeline)
        pipeline.run(once=once, fresh=fresh)
    if once and pipeline.failed:
        for table in pipeline.failed:
            click.echo(f"warning: table {table} is not mirrored: {table.reason}", err=True)
        click.echo("hint: mend that, then `cdc resync` each of them", err=True)
        sys.exit(3)


def _intention(settings: Settings, *, once: bool, fresh: bool) -> dict[str, Any]:
    """Return what the consumer will do, without a password."""
    source = conninfo_to_dict(settings.dsn)
    return {
        "version": importlib.metadata.version("pg-duckdb-cdc"),
        "source": "/".join(str(source[part]) for part in ("host", "port", "dbname") if source.get(part)),
        "tables": ",".join(settings.tables) or "all",
        "slot": settings.slot,
        "publication": settings.publication,
        "warehouse": str(settings.warehouse),
        "history": str(settings.history or "none"),
        "mode": " ".join(["once" if once else "until stopped", *(["fresh"] if fresh else [])]),
    }


def _stop_on_signals(pipeline: Pipeline) -> None:
    def handle(_number: int, _frame: FrameType | None) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)  # the second one quits at once
        pipeline.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)


@contextlib.contextmanager
def _observer(*, as_json: bool) -> Iterator[Log]:
    console = Console(stderr=True)
    rendered = (
        structlog.processors.JSONRenderer()
        if as_json
        else structlog.dev.ConsoleRenderer(colors=console.is_terminal, pad_event_to=0)
    )
    structlog.configure(
        processors=[
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            rendered,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    # The library that retries would log each try by itself; what matters of it comes as an event.
    logging.getLogger("stamina").setLevel(logging.CRITICAL)
    if as_json or not console.is_terminal:
        yield Log()
        return
    columns = TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        yield Bars(progress)


class Log:
    """What happens, as log lines on stderr."""

    def __init__(self) -> None:
        self._log = structlog.get_logger()
        self._lock = threading.Lock()
        self._line_at = 0.0

    def event(self, name: str, **fields: Any) -> None:
        """Print one line; empty fields are left out."""
        self._log.info(name, **{key: value for key, value in fields.items() if value not in ("", None)})

    def progress(self, table: str, rows: int, done_bytes: int, total_bytes: int) -> None:
        """Print a line now and then."""
        with self._lock:
            if time.monotonic() - self._line_at < _LINE_S:
                return
            self._line_at = time.monotonic()
        share = min(99, 100 * done_bytes // total_bytes) if total_bytes else 0
        self.event("copying", table=table, rows=rows, percent=share)

    def copied(self, table: str, rows: int) -> None:
        """Print a line."""
        self.event("copied", table=table, rows=rows)


class Bars(Log):
    """The same on a terminal, with a bar for the copy in hand."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress
        self._task: Any = None
        self._table = ""

    def progress(self, table: str, rows: int, done_bytes: int, total_bytes: int) -> None:
        """Move the bar."""
        if table != self._table:
            self._end()
            self._table, self._task = table, self._progress.add_task(f"copy {table}", total=total_bytes)
        self._progress.update(
            self._task, completed=min(done_bytes, total_bytes), description=f"copy {table}: {rows} rows"
        )

    def copied(self, table: str, rows: int) -> None:
        """End the bar."""
        self._end()
        super().copied(table, rows)

    def _end(self) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task, self._table = None, ""
