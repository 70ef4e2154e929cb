"""``cdc tail``: changes as they are decoded."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import queue
import secrets
import select
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

import click
import psycopg
from psycopg.pq import abc

from cdc.cli.options import with_settings
from cdc.debezium import Envelopes
from cdc.errors import CdcError, ConnectionLost, SettingsError, SourceError, StateError
from cdc.lsn import format_lsn
from cdc.pgoutput.decoder import Decoder, RelationRows
from cdc.pgoutput.masks import Masks, mask_rows, masks_of
from cdc.pgoutput.messages import WireBatch
from cdc.settings import Settings
from cdc.source import catalog, publication, slot, upkeep
from cdc.source.connection import Connection, connect
from cdc.source.stream import Idle, Item, Limits, Receiver
from cdc.tail import as_json, as_text, boundary, changes_of, wanted

__all__ = ["tail"]

LIMITS = Limits(rows=1000, bytes=4_000_000, age_s=0.1)
"""Small batches: what is printed should be what has just happened."""

QUEUE_BATCHES = 4

SLOT_NAME_CHARACTERS = 63
TURN_S = 1.0
STOP_S = 5.0


@click.command()
@click.argument("tables", nargs=-1, metavar="[TABLE]...")
@click.option("--format", "form", type=click.Choice(["text", "json", "debezium"]), default="text", show_default=True)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="end after N changes")
@with_settings("dsn", "publication", "mask", "mask_key")
def tail(settings: Settings, tables: tuple[str, ...], form: str, limit: int | None) -> None:
    r"""Print changes as they are committed, from now on, until Ctrl-C.

    TABLE is schema.table or a pattern such as 'public.*'; none means every published table. It reads through a
    temporary slot of its own and the publications that are there: a running consumer, its slot and the warehouse are
    left alone.

    text: a line per change: commit time, table, operation, the key in parentheses, values; a value that an update
    changed as old => new, where the source tells the old one (a changed key, REPLICA IDENTITY FULL). Values of more
    than 200 characters are cut.

    json: an object per line: op (insert, update, delete, truncate), schema, table, lsn, seq, xid, commit_ts, key, old,
    new, unchanged (names of columns whose long value was left as it was, and is not told). Values are exact: numeric
    is text, as is every type that JSON lacks, bytea is hexadecimal digits, times are ISO 8601.

    debezium: an envelope per line, as pgoutput-decoder makes it (pip install 'pg-duckdb-cdc[debezium]'). It leaves out
    TRUNCATE, and turns numeric into a float and unchanged long values into null.

    \b
    Examples:
      cdc tail
      cdc tail public.orders 'audit.*'
      cdc tail --format json --limit 100 | jq -c '[.op, .table, .key]'
    """
    if form == "debezium" and settings.mask:
        raise SettingsError(
            "envelopes are made of what the server sends: CDC_MASK does not reach them",
            "use --format json; or take the columns out of CDC_MASK for this command",
        )
    with contextlib.suppress(KeyboardInterrupt), contextlib.ExitStack() as stack:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # it ends as by Ctrl-C, wherever it waits
        with connect(settings.dsn) as connection:
            names = _publications(connection, settings.publication, tables)
            lines = _lines(form, connection.info.dbname, stack)
            inbox, receiver = _receive(settings, names, connection, stack)
        _print(_batches(inbox, receiver), tables, settings.masks, lines, limit)


Lines = Callable[[Sequence[bytes], list[RelationRows]], Iterable[str]]
"""Returns a line (or two) for each change, of a batch's frames and of the rows in them that are wanted."""


def _lines(form: str, database: str, stack: contextlib.ExitStack) -> Lines:
    if form == "debezium":
        return stack.enter_context(Envelopes(database)).of
    if form == "json":
        return lambda _frames, found: map(as_json, changes_of(found))
    told = -1

    def text(_frames: Sequence[bytes], found: list[RelationRows]) -> Iterator[str]:
        nonlocal told
        for change in changes_of(found):
            head = "" if change.lsn == told else click.style(boundary(change), dim=True) + "\n"
            told = change.lsn
            yield head + as_text(change)

    return text


def _publications(connection: Connection, name: str, patterns: Sequence[str]) -> tuple[str, ...]:
    """Return the names of what is there to subscribe to; warn of patterns that it has nothing for."""
    names = upkeep.plan(connection, name, ()).names
    missing = [each for each in names if publication.is_ours(connection, each) is None]
    if missing:
        raise SourceError(
            f"there is no publication {' or '.join(missing)}",
            "`cdc run` makes it where its rights allow it; `cdc setup` prints the SQL; or set CDC_PUBLICATION",
        )
    tables = catalog.published(connection, names)
    for pattern in patterns:
        if not any(wanted(str(table), [pattern]) for table in tables):
            click.echo(f"warning: no table that is published by now is called {pattern}", err=True)
    return names


def _receive(
    settings: Settings, names: tuple[str, ...], connection: Connection, stack: contextlib.ExitStack
) -> tuple[queue.Queue[Item], Receiver]:
    """Begin to receive on a slot that goes with the receiver's connection; `stack` ends it."""
    suffix = f"_tail_{secrets.token_hex(4)}"
    slot_name = settings.slot[: SLOT_NAME_CHARACTERS - len(suffix)] + suffix
    inbox: queue.Queue[Item] = queue.Queue(QUEUE_BATCHES)
    receiver = Receiver(settings.dsn, slot_name, names, 0, LIMITS, inbox)
    receiver.connect(functools.partial(_make_slot, slot_name, connection))
    stack.callback(receiver.join, STOP_S)
    stack.callback(receiver.stop)
    receiver.start()
    return inbox, receiver


def _make_slot(name: str, connection: Connection, pgconn: abc.PGconn) -> None:
    told: list[int | None] | None = None

    def waiting(waited_s: float) -> None:
        nonlocal told
        found = slot.blockers(connection)
        pids = [each.pid for each in found]
        if pids != told:
            told = pids
            who = "; ".join(f"pid {each.pid}, {each.age_s:.0f} s old: {each.description}" for each in found[:3])
            who = who or "none of them is seen from here"
            click.echo(f"waiting for running transactions to end ({waited_s:.0f} s by now): {who}", err=True)

    try:
        lsn = slot.create(pgconn, name, waiting, temporary=True)
    except KeyboardInterrupt:
        with contextlib.suppress(psycopg.Error):
            pgconn.get_cancel().cancel()  # the server would go on waiting, whoever hangs up
        raise
    click.echo(f"what commits after {format_lsn(lsn)} is printed, until Ctrl-C", err=True)


def _batches(inbox: queue.Queue[Item], receiver: Receiver) -> Iterator[WireBatch]:
    """Yield what comes, without end; confirm idle positions, so that the server keeps no WAL for us."""
    while not _unread():
        try:
            item = inbox.get(timeout=TURN_S)
        except queue.Empty:
            continue
        if isinstance(item, WireBatch):
            yield item
            # The walEnd of a Commit is its end LSN.
            if item.complete:
                receiver.confirm(int.from_bytes(item.frames[-1][9:17], "big"))
        elif isinstance(item, Idle):
            receiver.confirm(item.lsn)
        elif item.error is not None:
            raise _ended(item.error)


def _print(batches: Iterable[WireBatch], tables: Sequence[str], masks: Masks, lines: Lines, limit: int | None) -> None:
    decoder = Decoder(0)
    left = limit
    for batch in batches:
        found = [rows for rows in decoder.decode(batch).rows if wanted(str(rows.relation), tables)]
        printed = list(itertools.islice(lines(batch.frames, [_masked(rows, masks) for rows in found]), left))
        if printed:
            _write("\n".join(printed))
        if left is not None:
            left -= len(printed)
            if not left:
                return


def _masked(rows: RelationRows, masks: Masks) -> RelationRows:
    relation = rows.relation
    names, columns = (str(relation),), [column.name for column in relation.columns]
    return mask_rows(rows, masks_of(masks, relation.oid, names, columns, relation.key))


def _write(text: str) -> None:
    try:
        click.echo(text)
    except KeyboardInterrupt:
        # Whoever reads has paused: at exit Python would wait for them to take the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _ended(error: CdcError) -> CdcError:
    """Return `error` with what is to be done about it here: there is nothing to be gone on with."""
    if isinstance(error, ConnectionLost | StateError):
        error.hint = "run it again: it prints what commits from then on"
    return error


def _unread() -> bool:
    """Whether stdout is a pipe that nobody reads any more: without changes no write would tell."""
    try:
        poll = select.poll()
        poll.register(sys.stdout, 0)
    except (AttributeError, OSError, ValueError):  # no select.poll here, or no file
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))
