"""The commands: what they print, what they do, and how they end. What they refuse is in test_bad_input.py."""

from __future__ import annotations

import contextlib
import csv
import importlib.metadata
import json
import os
import pty
import re
import select
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from cdc.cli import main
from cdc.cli.group import cdc
from cdc.settings import Settings
from tests.conftest import Database, Lake
from tests.integration.copies import (
    SOME_BYTES,
    await_states,
    await_waiting_slot,
    blocking,
    copy_lsns,
    fill,
    leftovers,
    settle,
)
from tests.integration.gate import Gate
from tests.integration.refusals import await_sent, call, complete, eventually, reader, refused, rows, took
from tests.mirror import Consumer, differences, history_files, states, until, warehouse_rows
from tests.program import PROGRAM

pg18 = pytest.mark.parametrize("server", [18], indirect=True, ids=["pg18"])

LSN = re.compile(r"[0-9A-F]{1,8}/[0-9A-F]{1,8}")
STOP_S = 10.0


def done(lake: Lake, dsn: str, *arguments: str, **settings: str) -> str:
    """Run one command that has to work; return what it printed."""
    ended = call(lake, dsn, *arguments, **settings)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def ids(lake: Lake) -> set[int]:
    """Return the keys of public.t in the warehouse."""
    return {each for (each,) in warehouse_rows(lake, "SELECT id FROM public.t")}


def positions(database: Database, lake: Lake) -> tuple[int, int]:
    """Return what the slot was confirmed up to, and where the warehouse ends."""
    query = "SELECT (confirmed_flush_lsn - '0/0')::int8 FROM pg_replication_slots WHERE slot_name = 'cdc'"
    ((confirmed,),) = database.execute(query)
    ((checkpoint,),) = warehouse_rows(lake, "SELECT lsn FROM _cdc.checkpoint")
    return confirmed, checkpoint


def confirmed(database: Database, lake: Lake) -> None:
    """Assert that Postgres was told of all that is in the warehouse, and of no more."""
    until(lambda: len(set(positions(database, lake))) == 1, 5, f"(confirmed, checkpoint): {positions(database, lake)}")


def not_beyond(database: Database, lake: Lake) -> None:
    """Assert that Postgres still has all that the warehouse has not."""
    slot, checkpoint = positions(database, lake)
    assert slot <= checkpoint


# Help and usage


def test_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command and every setting is told of."""
    for name in ("", *cdc.commands):
        for flag in ("--help", "-h"):
            monkeypatch.setattr("sys.argv", ["cdc", *([name] if name else []), flag])
            main()
            said = capsys.readouterr()
            assert said.err == ""
            assert said.out.startswith(f"Usage: cdc {name}".rstrip())
            if not name:
                assert all(f"  {command} " in said.out for command in cdc.commands)
            if name == "run":
                assert all(f"[CDC_{setting.upper()}]" in said.out for setting in Settings.model_fields)
    promised = {"demo", "setup", "check", "run", "status", "query", "tail", "resync", "teardown"}
    assert promised <= set(cdc.commands)


def test_version_and_names(lake: Lake) -> None:
    """The distribution is called pg-duckdb-cdc, with that script's name too."""
    version = importlib.metadata.version("pg-duckdb-cdc")
    assert done(lake, "", "--version") == f"cdc, version {version}\n"
    scripts = importlib.metadata.entry_points(group="console_scripts", value="cdc.cli:main")
    assert {script.name for script in scripts} == {"cdc", "pg-duckdb-cdc"}


def test_wrong_usage(lake: Lake) -> None:
    """Exit status 2, one line of error, one of hint; nothing is begun."""
    for arguments, words, hint in (
        (["nonsense"], "No such command 'nonsense'", "cdc --help"),
        (["run", "--nope"], "No such option '--nope'", "cdc run --help"),
        (["run", "extra"], "unexpected extra argument", "cdc run --help"),
        (["query"], "Missing argument 'SQL'", "cdc query --help"),
        (["query", "--format", "xml", "SELECT 1"], "'xml' is not one of", "cdc query --help"),
        (["resync"], "name the tables, or say --all", "cdc resync --help"),
        (["resync", "--all", "public.t"], "name the tables, or say --all", "cdc resync --help"),
    ):
        error, advice = refused(call(lake, "host=/nowhere", *arguments), 2)
        assert words in error
        assert hint in advice
    assert not list(lake.root.iterdir())


# run


def test_run_once(database: Database, lake: Lake) -> None:
    """Everything committed before the call is in, durable and confirmed, also when nothing has changed."""
    rows(database, 1, 2)
    for more in (3, 4, None):
        said = complete(database, lake, flush_interval="60s")
        assert "streaming" in said
        confirmed(database, lake)
        if more is not None:
            rows(database, more)
    ((active,),) = database.execute("SELECT active FROM pg_replication_slots WHERE slot_name = 'cdc'")
    assert not active


@pg18
def test_run_on_a_terminal(database: Database, lake: Lake) -> None:
    """A progress bar per copy, whatever a table is called."""
    fill(database, 'public."[/b]"', 20_000)
    rows(database, 1)
    leader, follower = pty.openpty()
    with subprocess.Popen(
        [*PROGRAM, "run", "--once"],
        env=lake.environment(database.dsn, flush_rows="2000") | {"TERM": "xterm", "COLUMNS": "150"},
        stdout=subprocess.DEVNULL,
        stderr=follower,
        cwd=lake.root,
    ) as process:
        os.close(follower)
        shown = b""
        with contextlib.suppress(OSError):  # EIO: the terminal has no user left
            while select.select([leader], [], [], 60)[0] and (data := os.read(leader, 65536)):
                shown += data
        assert process.wait(60) == 0, shown.decode(errors="replace")
    os.close(leader)
    assert b"copy public.[/b]: " in shown
    assert b"table=public.[/b]" in re.sub(rb"\x1b\[[\d;?]*[a-zA-Z]", b"", shown)
    assert differences(database, lake, "public.[/b]") == ""


def stop(consumer: Consumer, number: signal.Signals = signal.SIGTERM) -> None:
    """Send a signal and assert that the consumer ends as promised: within 10 s, exit status 0, without complaint."""
    assert consumer.running, consumer.output
    os.kill(consumer.pid, number)
    ended = took(lambda: consumer.wait(60))
    assert consumer.wait() == 0, consumer.output
    assert ended < STOP_S, f"it took {ended:.1f} s"
    assert "error: " not in consumer.output
    assert "Traceback" not in consumer.output


def heeded(consumer: Consumer) -> bool:
    """Whether the consumer has taken note of a first signal: it no longer catches SIGTERM."""
    caught = re.findall(r"^SigCgt:\s*([0-9a-f]+)$", Path(f"/proc/{consumer.pid}/status").read_text(), re.MULTILINE)
    return not int(caught[0], 16) >> (signal.SIGTERM - 1) & 1


@contextlib.contextmanager
def inserting(database: Database) -> Iterator[Callable[[], int]]:
    """Insert rows into public.t all along; gives a function that tells how many are committed."""
    over = threading.Event()
    count = 0

    def work() -> None:
        nonlocal count
        with psycopg.connect(database.dsn, autocommit=True) as connection:
            while not over.is_set():
                connection.execute("INSERT INTO t VALUES (%s, 'traffic')", [1000 + count])
                count += 1

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield lambda: count
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_signal_when_idle(database: Database, lake: Lake, number: signal.Signals) -> None:
    """J21: what was received and not yet due is flushed and confirmed."""
    rows(database, 1)
    with Consumer(lake, database.dsn, flush_interval="60s") as consumer:
        await_states(consumer, lake, "streaming", "public.t")
        settle(consumer, database, lake)
        rows(database, 2)
        ((lsn,),) = database.execute("SELECT pg_current_wal_lsn()::text")
        await_sent(database, lsn)
        assert ids(lake) == {1}
        stop(consumer, number)
    assert ids(lake) == {1, 2}
    confirmed(database, lake)
    complete(database, lake)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)], ids=lambda number: number.name
)
def test_signal_under_load(database: Database, lake: Lake, number: signal.Signals) -> None:
    """J21: in the midst of traffic that does not end."""
    rows(database, 1)
    with Consumer(lake, database.dsn, flush_interval="50ms") as consumer, inserting(database) as count:
        await_states(consumer, lake, "streaming", "public.t")
        eventually(consumer, lambda: len(ids(lake)) > 50)
        before = count()
        stop(consumer, number)
        assert count() > before, "there was no load"
        confirmed(database, lake)
    assert len(ids(lake)) < count() + 1
    complete(database, lake)


@pg18
def test_signal_while_the_warehouse_is_read(database: Database, lake: Lake) -> None:
    """J21: what a reader keeps us from writing stays unconfirmed, and comes with the next start."""
    rows(database, 1)
    with Consumer(lake, database.dsn, flush_interval="100ms") as consumer:
        await_states(consumer, lake, "streaming", "public.t")
        with reader(lake.warehouse):
            rows(database, 2)
            ((lsn,),) = database.execute("SELECT pg_current_wal_lsn()::text")
            await_sent(database, lsn)
            stop(consumer)
    assert ids(lake) == {1}
    not_beyond(database, lake)
    complete(database, lake)


@pg18
def test_signal_just_before_a_reader_leaves(database: Database, lake: Lake) -> None:
    """J21: there is time to wait for it; then everything is flushed."""
    rows(database, 1)
    with Consumer(lake, database.dsn, flush_interval="100ms") as consumer:
        await_states(consumer, lake, "streaming", "public.t")
        with reader(lake.warehouse):
            rows(database, 2)
            ((lsn,),) = database.execute("SELECT pg_current_wal_lsn()::text")
            await_sent(database, lsn)
            os.kill(consumer.pid, signal.SIGTERM)
            until(lambda: heeded(consumer), 5)
        assert consumer.wait(20) == 0, consumer.output
    assert ids(lake) == {1, 2}
    confirmed(database, lake)
    complete(database, lake)


def test_signal_within_a_huge_transaction(database: Database, lake: Lake) -> None:
    """J21, C17: the transaction that is open in DuckDB is rolled back as a whole."""
    rows(database, 1)
    complete(database, lake)
    files = set(history_files(lake))
    with Consumer(lake, database.dsn, flush_rows="100") as consumer:
        settle(consumer, database, lake)
        database.execute("INSERT INTO t SELECT i, 'huge' FROM generate_series(2, 200000) i")
        eventually(consumer, lambda: len(list(lake.history.rglob("*.tmp"))) > 5)
        stop(consumer)
    assert ids(lake) == {1}, "it was not in the middle of the transaction"
    assert set(history_files(lake)) == files
    not_beyond(database, lake)
    complete(database, lake)


def test_signal_during_a_copy(database: Database, lake: Lake) -> None:
    """J21, K4: the copy in hand is given up, and leaves nothing."""
    fill(database, "t", 30_000)
    with Gate(database.dsn) as gate:
        gate.hold_rows(SOME_BYTES)
        with Consumer(lake, gate.dsn) as consumer:
            eventually(consumer, lambda: gate.waiting)
            assert states(lake) == {"public.t": "copying"}
            stop(consumer)
    not_beyond(database, lake)
    assert not database.execute("SELECT slot_name FROM pg_replication_slots WHERE temporary")
    complete(database, lake)
    assert not leftovers(lake)


@pg18
def test_signal_while_the_slot_is_made(database: Database, lake: Lake) -> None:
    """J21, K2: a transaction that is open in the server keeps nobody from stopping."""
    rows(database, 1)
    blocker = blocking(database)
    with Consumer(lake, database.dsn) as consumer:
        await_waiting_slot(database, consumer)
        stop(consumer)
    blocker.rollback()
    complete(database, lake)


@pg18
def test_signal_while_postgres_is_away(database: Database, lake: Lake) -> None:
    """J21, J9: what was received is in; the rest comes with the next start."""
    rows(database, 1)
    with Gate(database.dsn) as gate, Consumer(lake, gate.dsn, flush_interval="100ms") as consumer:
        await_states(consumer, lake, "streaming", "public.t")
        gate.hold_newcomers()
        database.execute("SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = 'cdc'")
        eventually(consumer, lambda: "connection lost" in consumer.output and gate.waiting)
        rows(database, 2)
        stop(consumer)
    complete(database, lake)


@pg18
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_second_signal(database: Database, lake: Lake, number: signal.Signals) -> None:
    """J21: it ends the process at once, and nothing is lost."""
    rows(database, 1)
    with Consumer(lake, database.dsn, flush_interval="100ms") as consumer:
        await_states(consumer, lake, "streaming", "public.t")
        with reader(lake.warehouse):
            rows(database, 2)
            ((lsn,),) = database.execute("SELECT pg_current_wal_lsn()::text")
            await_sent(database, lsn)
            os.kill(consumer.pid, signal.SIGTERM)
            until(lambda: heeded(consumer), 5)
            assert consumer.running, "one signal was enough"
            os.kill(consumer.pid, number)
            assert took(lambda: consumer.wait(20)) < 2
            assert consumer.wait() == -number
    not_beyond(database, lake)
    complete(database, lake)


# status


def status(lake: Lake, dsn: str) -> Any:
    """Return `cdc status --json` after a look at its shape, which is promised."""
    found = json.loads(done(lake, dsn, "status", "--json"))
    assert set(found) == {"slot", "positions", "checkpoint", "tables"}
    if found["slot"] is not None:
        assert set(found["slot"]) == {
            *("name", "active", "wal_status", "restart_lsn", "confirmed_flush_lsn", "retained_bytes", "safe_bytes")
        }
    assert set(found["positions"]) == {"server", "received", "confirmed", "lag_bytes", "lag_s"}
    if found["checkpoint"] is not None:
        assert set(found["checkpoint"]) == {"lsn", "commit_ts"}
        assert LSN.fullmatch(found["checkpoint"]["lsn"])
    for table in found["tables"]:
        assert set(table) >= {"schema", "name", "state", "rows", "last_change_ts"}
    lsns = [found["positions"][name] for name in ("server", "received", "confirmed")]
    assert all(lsn is None or LSN.fullmatch(lsn) for lsn in lsns)
    return found


def test_status(database: Database, lake: Lake) -> None:
    """Without a warehouse, with a running consumer, and with one that was stopped."""
    rows(database, 1)
    found = status(lake, database.dsn)
    assert (found["slot"], found["checkpoint"], found["tables"]) == (None, None, [])
    assert found["positions"] | {"server": None} == dict.fromkeys(found["positions"])
    assert not lake.warehouse.exists()
    assert "does not exist" in done(lake, database.dsn, "status")
    with Consumer(lake, database.dsn, flush_interval="100ms") as consumer:
        await_states(consumer, lake, "streaming", "public.t")
        rows(database, 2, 3)
        settle(consumer, database, lake)
        found = status(lake, database.dsn)
        assert (found["slot"]["name"], found["slot"]["active"]) == ("cdc", True)
        assert found["slot"]["wal_status"] == "reserved"
        assert LSN.fullmatch(found["positions"]["received"])
        assert found["positions"]["lag_bytes"] >= 0
        assert 0 <= found["positions"]["lag_s"] < 60
        (table,) = found["tables"]
        assert (table["schema"], table["name"], table["state"], table["rows"]) == ("public", "t", "streaming", 3)
        assert table["last_change_ts"].startswith("20")
        assert consumer.stop() == 0
    found = status(lake, database.dsn)
    assert (found["slot"]["active"], found["positions"]["received"]) == (False, None)
    assert found["positions"]["confirmed"] == found["checkpoint"]["lsn"] == found["slot"]["confirmed_flush_lsn"]
    shown = done(lake, database.dsn, "status")
    assert all(
        word in shown for word in ("cdc, not active, reserved", "public.t", "streaming", found["checkpoint"]["lsn"])
    )


@pg18
def test_status_as_a_health_check(database: Database, lake: Lake) -> None:
    """Exit status 0 if it is not further behind than that, 3 if it is or nothing is there yet, 2 for nonsense."""
    rows(database, 1)
    found = call(lake, database.dsn, "status", "--max-lag", "60s")
    assert (found.returncode, found.stderr) == (3, "warning: nothing is mirrored yet\n")
    complete(database, lake)
    assert call(lake, database.dsn, "status", "--max-lag", "1h").returncode == 0
    found = call(lake, database.dsn, "status", "--json", "--max-lag", "1ms")
    assert found.returncode == 3
    assert re.fullmatch(r"warning: the warehouse is \d+ s behind, more than 0.001 s\n", found.stderr)
    assert json.loads(found.stdout)["positions"]["lag_s"] > 0.001
    refused(call(lake, database.dsn, "status", "--max-lag", "soon"), 2)


@pg18
def test_log(database: Database, lake: Lake) -> None:
    """It begins with what it will do, without a password; as JSON on demand, an object per line."""
    rows(database, 1)
    dsn = make_conninfo(database.dsn, password="very secret")
    ended = call(lake, dsn, "run", "--once", log="json", tables="public.*")
    assert ended.returncode == 0
    events = [json.loads(line) for line in ended.stderr.splitlines()]
    assert [each["event"] for each in events] == ["starting", "streaming", "copy", "copying", "copied"]
    assert events[0]["source"].endswith(f"/{database.name}")
    assert (events[0]["tables"], events[0]["mode"]) == ("public.*", "once")
    assert (events[-1]["table"], events[-1]["rows"]) == ("public.t", 1)
    assert "secret" not in ended.stderr
    ended = call(lake, dsn, "run", "--once", tables="public.*")
    assert re.match(r"20\S+Z starting ", ended.stderr)
    assert "secret" not in ended.stderr


@pg18
def test_status_with_a_table_in_trouble(database: Database, lake: Lake) -> None:
    """The reason is told, names are shown as they are, and a long one is not cut off."""
    long = "a_rather_long_name_for_a_table_that_does_not_fit_a_terminal_60"
    database.execute(f'CREATE TABLE "[/b]" (id int PRIMARY KEY); CREATE TABLE {long} ()')
    ended = call(lake, database.dsn, "run", "--once")
    assert ended.returncode == 3
    *_, warning, hint = ended.stderr.splitlines()
    assert warning.startswith(f"warning: table public.{long} is not mirrored: table public.{long} has no columns")
    assert "cdc resync" in hint
    tables = {table["name"]: table for table in status(lake, database.dsn)["tables"]}
    assert (tables["[/b]"]["state"], tables["[/b]"]["rows"]) == ("streaming", 0)
    assert (tables[long]["state"], tables[long]["rows"]) == ("error", None)
    assert tables[long]["reason"]
    shown = done(lake, database.dsn, "status")
    assert "public.[/b]" in shown
    # Folded into its column, nothing is missing.
    cells = [re.split("[│|]", line)[1].strip() for line in shown.splitlines() if line.count("│") == 6]
    assert f"public.{long}" in "".join(cells)


@pg18
def test_status_again_and_again(database: Database, lake: Lake) -> None:
    """--watch prints one object after the other, until Ctrl-C."""
    rows(database, 1)
    with subprocess.Popen(
        [*PROGRAM, "status", "--json", "--watch"],
        env=lake.environment(database.dsn),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=lake.root,
    ) as process:
        assert process.stdout is not None
        for _ in range(2):
            assert set(json.loads(process.stdout.readline())) == {"slot", "positions", "checkpoint", "tables"}
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert process.stderr is not None
        assert process.stderr.read().strip() == "", "more than the end of the line that shows ^C"


# query


@pg18
def test_query(database: Database, lake: Lake) -> None:
    """As a table, as JSON and as CSV: values exact, names that come twice kept, nothing taken for markup."""
    database.execute("CREATE TABLE t (id int PRIMARY KEY, v text, n numeric(30,2), b bool)")
    database.execute(
        "INSERT INTO t VALUES (1, '[red]x[/b] :smile: \"y\", z', 12345678901234567890123456.78, true), "
        "(2, NULL, NULL, false)"
    )
    done(lake, database.dsn, "run", "--once")
    # What Python has no value for, and a list whose text looks like markup.
    more = "CASE id WHEN 1 THEN DATE 'infinity' END AS d, CASE id WHEN 1 THEN ['a', NULL] END AS l"
    select = f"SELECT id, v, n, {more}, b, id AS id FROM public.t ORDER BY 1"
    first = {"id": 1, "v": '[red]x[/b] :smile: "y", z', "n": "12345678901234567890123456.78", "d": "infinity"}
    first |= {"b": True, "l": "[a, NULL]", "id_1": 1}
    second = {"id": 2, "v": None, "n": None, "d": None, "b": False, "l": None, "id_1": 2}
    assert json.loads(done(lake, "", "query", "--format", "json", select)) == [first, second]
    out = done(lake, "", "query", "--format", "csv", select)
    assert "\r" not in out
    header, one, two = csv.reader(out.splitlines())
    assert header == ["id", "v", "n", "d", "l", "b", "id"]
    assert one == ["1", first["v"], first["n"], "infinity", "[a, NULL]", "true", "1"]
    assert two == ["2", "", "", "", "", "false", "2"]
    wide = "SELECT v, ['a', NULL] AS l, repeat('0123456789', 20) AS w FROM public.t WHERE id = 1"
    out = done(lake, "", "query", wide)
    # Folded into their columns, nothing is missing.
    folded = ["".join(line.split("│")[i].strip() for line in out.splitlines() if "│" in line) for i in (1, 2, 3)]
    assert [text.replace(" ", "") for text in folded] == [
        '[red]x[/b]:smile:"y",z',
        "[a,NULL]",
        "0123456789" * 20,
    ]
    assert done(lake, "", "query", "--format", "json", "SELECT 1 WHERE false") == "[]\n"
    ((as_of,),) = warehouse_rows(lake, "SELECT as_of::VARCHAR FROM _cdc.freshness")
    assert json.loads(done(lake, "", "query", "--format", "json", "SELECT as_of FROM _cdc.freshness")) == [
        {"as_of": as_of}
    ]


@pg18
def test_queries_that_cannot_be_answered(database: Database, lake: Lake) -> None:
    """Wrong SQL, no such table, an attempt to write, no warehouse: exit status 1, and nothing is changed."""
    error, hint = refused(call(lake, "", "query", "SELECT 1"))
    assert error == f"there is no warehouse {lake.warehouse} yet"
    assert "`cdc run` makes it" in hint
    assert not lake.warehouse.exists()
    rows(database, 1)
    complete(database, lake)
    for sql, words in (
        ("SELEC 1", "syntax error"),
        ("FROM public.nothing", "nothing"),
        ("SELECT 1/", "syntax error"),
        ("SELECT CAST('x' AS INTEGER)", "Could not convert"),
        ("WITH d AS (DELETE FROM public.t RETURNING *) FROM d", "read-only"),
    ):
        error, _ = refused(call(lake, "", "query", sql))
        assert error.startswith("the query failed: ")
        assert words in error
    complete(database, lake)


def test_query_while_the_consumer_runs(database: Database, lake: Lake) -> None:
    """It answers under traffic too, each time with whole transactions, and holds up nothing for long."""
    rows(database, 1)
    with Consumer(lake, database.dsn, flush_interval="100ms") as consumer, inserting(database) as count:
        await_states(consumer, lake, "streaming", "public.t")
        seen = 0
        for _ in range(3):
            (answer,) = json.loads(done(lake, "", "query", "--format", "json", "SELECT count(*) AS n FROM public.t"))
            assert seen <= answer["n"] <= count() + 1
            seen = answer["n"]
            eventually(consumer, lambda seen=seen: len(ids(lake)) > seen)  # type: ignore[misc]
        assert consumer.stop() == 0
    complete(database, lake)


@pg18
def test_query_whose_reader_has_had_enough(database: Database, lake: Lake) -> None:
    """A pipe that is closed is no error."""
    rows(database, 1)
    complete(database, lake)
    with subprocess.Popen(
        [*PROGRAM, "query", "--format", "csv", "SELECT * FROM range(1000000)"],
        env=lake.environment(""),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "range\n"
        process.stdout.close()
        assert process.wait(60) == 0
        assert process.stderr.read() == ""


# check


def test_check(database: Database, lake: Lake) -> None:
    """Exit status 0 with nothing found, 3 with something, which is all told at once; it changes nothing."""
    rows(database, 1)
    assert done(lake, database.dsn, "check").splitlines()[-1] == "nothing stands in the way"
    assert not lake.warehouse.exists()
    assert database.execute("SELECT count(*) FROM pg_publication") == [(0,)]
    complete(database, lake)
    with Consumer(lake, database.dsn) as consumer:
        eventually(consumer, lambda: "streaming" in consumer.output)
        assert done(lake, database.dsn, "check").splitlines()[-1] == "nothing stands in the way"
        assert consumer.stop() == 0
    notes = done(lake, database.dsn, "check").splitlines()
    assert "note: publication cdc publishes public.t" in notes
    assert any(line.startswith("note: max_slot_wal_keep_size is not set") for line in notes)
    database.execute("CREATE TABLE keyless (id int)")
    found = call(lake, database.dsn, "check", "--tables", "public.*,nothing.*")
    assert (found.returncode, found.stderr) == (3, "")
    lines = found.stdout.splitlines()
    assert "warning: no table matches nothing.*" in lines
    at = next(i for i, line in enumerate(lines) if line.startswith("warning: table public.keyless has no usable"))
    assert 'ALTER TABLE "public"."keyless" ADD PRIMARY KEY' in lines[at + 1]
    database.execute("DROP TABLE keyless")
    assert done(lake, database.dsn, "check").splitlines()[-1] == "nothing stands in the way"


# resync


def test_resync(database: Database, lake: Lake) -> None:
    """With the consumer running and without, one table or all; the others go on as they are."""
    rows(database, 1)
    database.execute("CREATE TABLE other (id int PRIMARY KEY); INSERT INTO other VALUES (1)")
    complete(database, lake)
    first = copy_lsns(lake)
    with Consumer(lake, database.dsn, flush_interval="100ms") as consumer:
        settle(consumer, database, lake)
        assert done(lake, database.dsn, "resync", "public.t") == "marked to be copied anew: public.t\n"
        eventually(consumer, lambda: copy_lsns(lake)["public.t"] > first["public.t"])
        rows(database, 2)
        eventually(consumer, lambda: ids(lake) == {1, 2})
        assert consumer.stop() == 0
    second = copy_lsns(lake)
    assert second["public.other"] == first["public.other"]
    error, hint = refused(call(lake, database.dsn, "resync", "public.t", "public.typo"), 2)
    assert error == "no table public.typo is known"
    assert "`cdc status` lists them" in hint
    complete(database, lake)
    assert copy_lsns(lake) == second, "the mark of the one that is known was not taken back"
    assert "public.t" in done(lake, database.dsn, "resync", "--all")
    complete(database, lake)
    assert all(copy_lsns(lake)[table] > second[table] for table in second)
    assert differences(database, lake, "public.other", ["id"]) == ""


def test_resync_without_warehouse(database: Database, lake: Lake) -> None:
    """There is nothing to copy anew yet, and none is made."""
    error, hint = refused(call(lake, database.dsn, "resync", "--all"))
    assert error == f"there is no warehouse {lake.warehouse} yet"
    assert "`cdc run` copies everything the first time" in hint
    assert not lake.warehouse.exists()


# teardown


def test_teardown(database: Database, lake: Lake) -> None:
    """Slot and publications of ours go, once nobody uses them; the data and what others have made stay."""
    rows(database, 1)
    database.execute("CREATE PUBLICATION theirs FOR TABLE t")
    with Consumer(lake, database.dsn) as consumer:
        await_states(consumer, lake, "streaming", "public.t")
        error, hint = refused(call(lake, database.dsn, "teardown"))
        assert error.startswith("replication slot cdc is in use by process ")
        assert hint == "stop the consumer first"
        assert consumer.stop() == 0
    until(lambda: not database.execute("SELECT 1 FROM pg_replication_slots WHERE active"), 10)
    kept = {path: path.read_bytes() for path in [lake.warehouse, *history_files(lake)]}
    assert len(kept) > 1
    assert done(lake, database.dsn, "teardown").splitlines() == [
        "dropped replication slot cdc",
        "dropped publication cdc",
        "dropped publication cdc_append",
    ]
    assert database.execute("SELECT pubname::text FROM pg_publication") == [("theirs",)]
    assert database.execute("SELECT slot_name FROM pg_replication_slots") == []
    assert {path: path.read_bytes() for path in [lake.warehouse, *history_files(lake)]} == kept
    assert done(lake, database.dsn, "teardown") == "nothing of cdc was there\n"
    rows(database, 2)
    error, _ = refused(call(lake, database.dsn, "run"))
    assert error == "replication slot cdc is gone: changes may be missing"
    done(lake, database.dsn, "run", "--once", "--fresh")
    complete(database, lake)


# setup


@pytest.fixture
def roles(database: Database) -> Iterator[tuple[str, str]]:
    """The owner of the database, who is no superuser, and the name of a role for the consumer, to be made."""
    owner, consumer = f"owner_{database.name[-8:]}", f"cdc_{database.name[-8:]}"
    database.execute(f"CREATE ROLE {owner} LOGIN; ALTER DATABASE {database.name} OWNER TO {owner}")
    yield owner, consumer
    database.execute(f"DROP OWNED BY {owner} CASCADE; DROP OWNED BY {consumer} CASCADE; DROP ROLE {consumer}")
    database.execute(f"ALTER DATABASE {database.name} OWNER TO postgres; DROP ROLE {owner}")


RIGHTS = """
    SELECT rolsuper, rolcreaterole, rolcreatedb, rolbypassrls, rolcanlogin, rolreplication,
           (SELECT count(*) FROM pg_auth_members WHERE member = r.oid)::int,
           has_database_privilege(oid, current_database(), 'CREATE'), has_table_privilege(oid, 't', 'SELECT'),
           has_table_privilege(oid, 't', 'INSERT, UPDATE, DELETE, TRUNCATE, REFERENCES, TRIGGER')
    FROM pg_roles AS r WHERE rolname = %s"""
LEAST = (False, False, False, False, True, True, 0, False, True, False)


def works_with_least_rights(database: Database, lake: Lake, role: str) -> None:
    """Assert that the role has the rights that it needs and no others, and that the consumer works with them."""
    assert database.execute(RIGHTS, [role]) == [LEAST]
    dsn = make_conninfo(database.dsn, user=role)
    assert done(lake, dsn, "check").splitlines()[-1] == "nothing stands in the way"
    complete(database, lake, dsn)
    rows(database, 2)
    assert database.execute("SELECT count(*) FROM pg_stat_activity WHERE usename = %s", [role]) == [(0,)]
    with Consumer(lake, dsn, flush_interval="100ms") as consumer:
        eventually(consumer, lambda: ids(lake) == {1, 2})
        users = "SELECT DISTINCT usename::text FROM pg_stat_activity WHERE application_name = 'cdc'"
        assert database.execute(users + " AND datname = current_database()") == [(role,)]
        assert consumer.stop() == 0
    assert status(lake, dsn)["tables"][0]["rows"] == 2
    complete(database, lake, dsn)


def test_setup(database: Database, lake: Lake, roles: tuple[str, str]) -> None:
    """Its SQL, run by a superuser, makes a role that can do what the consumer needs, and nothing else."""
    owner, role = roles
    rows(database, 1)
    database.execute(f"ALTER TABLE t OWNER TO {owner}; REVOKE TEMPORARY ON DATABASE {database.name} FROM PUBLIC")
    script = done(lake, database.dsn, "setup", "--role", role)
    assert database.execute("SELECT count(*) FROM pg_publication") == [(0,)]
    assert "ALTER SYSTEM" not in script, "wal_level is logical already"
    database.psql(script)
    works_with_least_rights(database, lake, role)
    again = done(lake, database.dsn, "setup", "--role", role)
    assert "-- It is there already" in again
    assert "-- nothing is missing" in again
    # A table that comes later may be read by itself, but only its owner can publish it: `check` says how.
    database.execute(f"SET ROLE {owner}; CREATE TABLE later (id int PRIMARY KEY); INSERT INTO later VALUES (1)")
    database.execute(f"GRANT SELECT ON later TO {role}")
    dsn = make_conninfo(database.dsn, user=role)
    complete(database, lake, dsn)
    found = call(lake, dsn, "check")
    assert found.returncode == 3
    hint = found.stdout.splitlines()[1].strip()
    assert found.stdout.splitlines()[0] == "warning: table public.later is not ours to publish"
    database.execute(hint.removeprefix("as its owner: "))
    complete(database, lake, dsn)
    assert differences(database, lake, "public.later", ["id"]) == ""


def test_setup_apply(database: Database, lake: Lake, roles: tuple[str, str]) -> None:
    """The database's owner, who is no superuser, runs it, once somebody who may has made the role."""
    owner, role = roles
    rows(database, 1)
    database.execute(f"ALTER TABLE t OWNER TO {owner}")
    dsn = make_conninfo(database.dsn, user=owner)
    database.execute(f"CREATE ROLE {role} LOGIN REPLICATION")
    printed = done(lake, dsn, "setup", "--role", role)
    applied = done(lake, dsn, "setup", "--role", role, "--apply")
    assert applied.splitlines() == [line for line in printed.splitlines() if line and not line.startswith("--")]
    works_with_least_rights(database, lake, role)
    error, hint = refused_after_output(call(lake, make_conninfo(database.dsn, user=role), "teardown"))
    assert error == "drop publication cdc: must be owner of publication cdc"
    database.execute(hint.removeprefix("as its owner: "))
    assert database.execute("SELECT count(*) FROM pg_publication") == [(0,)]


def refused_after_output(ended: subprocess.CompletedProcess[str]) -> tuple[str, str]:
    """As `refused`, of a command that had done a part of its work, and told so."""
    assert ended.stdout == "dropped replication slot cdc\n"
    ended.stdout = ""
    return refused(ended)


@pg18
def test_setup_of_managed_services(database: Database, lake: Lake) -> None:
    """Their own words for what ALTER SYSTEM and REPLICATION are elsewhere."""
    rows(database, 1)
    for service, words in (
        ("rds", ["rds.logical_replication = 1", 'GRANT rds_replication TO "cdc"']),
        ("cloudsql", ["cloudsql.logical_decoding = on", 'CREATE ROLE "cdc" LOGIN REPLICATION']),
        ("azure", ["wal_level = logical", 'CREATE ROLE "cdc" LOGIN REPLICATION']),
        ("supabase", ["not by the pooler", 'CREATE ROLE "cdc" LOGIN REPLICATION']),
        ("neon", ["host without -pooler", "Make cdc in the console"]),
    ):
        script = done(lake, database.dsn, "setup", "--service", service)
        assert all(word in script for word in [*words, 'GRANT SELECT ON "public"."t" TO "cdc"'])
        assert "ALTER SYSTEM" not in script
