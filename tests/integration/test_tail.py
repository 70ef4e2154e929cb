"""`cdc tail`: what it prints, what it leaves alone, and how it ends (debezium: test_debezium.py)."""

from __future__ import annotations

import datetime as dt
import re
import signal
import subprocess
import time
from typing import Any

import pytest
from psycopg.conninfo import make_conninfo

from tests.conftest import Database, Lake
from tests.integration.copies import await_states, blocking, settle, slot_waits
from tests.integration.refusals import call, complete, refused, rows, took
from tests.integration.tailing import CLOCK, HEAD, STOP_S, Tail, gone, published, slots
from tests.mirror import Consumer, until
from tests.program import PROGRAM

pg18 = pytest.mark.parametrize("server", [18], indirect=True, ids=["pg18"])


def values_table(database: Database) -> None:
    """Make a table with a column per way of printing."""
    database.execute(
        "CREATE TABLE t (id int PRIMARY KEY, v text, n numeric(5,2), f float4, b bytea, at timestamptz, yes bool)"
    )


@pg18
def test_text(database: Database, lake: Lake) -> None:
    """Every kind of change is one line, whatever is in its values; a line before them tells the transaction."""
    values_table(database)
    published(database)
    with Tail(lake, database.dsn) as tail:
        database.execute(
            "INSERT INTO t VALUES (1, E'a\nb\u001b', 1.5, 0.1, '\\xBEEF', '2024-02-29 12:00+02', true);"
            "INSERT INTO t (id) VALUES (2);"
            "UPDATE t SET v = 'x' WHERE id = 1; UPDATE t SET id = 3 WHERE id = 2; DELETE FROM t WHERE id = 3;"
            "INSERT INTO t (id, v) VALUES (4, repeat('-', 1000))"
        )
        database.execute("TRUNCATE t")
        rest = r"n=1.50 f=0.1 b=\xbeef at=2024-02-29 10:00:00+00:00 yes=true"
        nulls = "n=NULL f=NULL b=NULL at=NULL yes=NULL"
        assert tail.text(7) == [
            rf"public.t INSERT (id=1) v='a\nb\x1b' {rest}",
            f"public.t INSERT (id=2) v=NULL {nulls}",
            f"public.t UPDATE (id=1) v='x' {rest}",
            f"public.t UPDATE (id=2 => 3) v=NULL {nulls}",
            "public.t DELETE (id=3)",
            f"public.t INSERT (id=4) v='{'-' * 199}... (1002 characters) {nulls}",
            "public.t TRUNCATE",
        ]
        assert [n for n, line in enumerate(tail.lines) if HEAD.fullmatch(line)] == [0, 7]
        tail.stop()
    gone(database)


@pg18
def test_json(database: Database, lake: Lake) -> None:
    """The same as objects, with position, transaction and exact values."""
    values_table(database)
    published(database)
    with Tail(lake, database.dsn, "--format", "json") as tail:
        statements = (
            "INSERT INTO t VALUES (1, E'a\nb', 1.5, 0.1, '\\xBEEF', '2024-02-29 12:00+02', true)",
            "UPDATE t SET id = 2",
            "DELETE FROM t",
            "TRUNCATE t",
        )
        with database.connect(autocommit=False) as connection:
            for statement in statements:
                connection.execute(statement.encode())
            ((xid,),) = connection.execute("SELECT pg_current_xact_id()::text::int8").fetchall()
            ((now,),) = connection.execute("SELECT clock_timestamp()").fetchall()
        tail.until(4)
        insert, update, delete, truncate = tail.objects
        new = {"id": 1, "v": "a\nb", "n": "1.50", "f": 0.1, "b": "beef", "at": "2024-02-29T10:00:00+00:00", "yes": True}
        place = {"schema": "public", "table": "t", "lsn": insert["lsn"], "xid": xid, "commit_ts": insert["commit_ts"]}
        empty: dict[str, Any] = {"key": None, "old": None, "new": None, "unchanged": []}
        assert insert == place | empty | {"op": "insert", "seq": 1, "key": {"id": 1}, "new": new}
        assert update == place | empty | {
            "op": "update",
            "seq": 2,
            "key": {"id": 2},
            "old": {"id": 1},
            "new": new | {"id": 2},
        }
        assert delete == place | empty | {"op": "delete", "seq": 4, "key": {"id": 2}, "old": {"id": 2}}
        assert truncate == place | empty | {"op": "truncate", "seq": 5}
        assert re.fullmatch(r"[0-9A-F]+/[0-9A-F]+", insert["lsn"])
        committed = dt.datetime.fromisoformat(insert["commit_ts"])
        assert committed.utcoffset() == dt.timedelta(0)
        assert abs(committed - now) < dt.timedelta(seconds=10)


@pg18
def test_full(database: Database, lake: Lake) -> None:
    """Under REPLICA IDENTITY FULL the whole old row is told; a DELETE and an INSERT stay two changes."""
    database.execute("CREATE TABLE f (a int, b float8); ALTER TABLE f REPLICA IDENTITY FULL")
    published(database)
    change = (
        "INSERT INTO f VALUES (1, 'NaN'); UPDATE f SET a = 2; UPDATE f SET b = '-infinity';"
        "DELETE FROM f; INSERT INTO f VALUES (2, 0)"
    )
    with Tail(lake, database.dsn) as text, Tail(lake, database.dsn, "--format", "json") as tail:
        database.execute(change)
        assert text.text(5) == [
            "public.f INSERT a=1 b=NaN",
            "public.f UPDATE a=1 => 2 b=NaN",
            "public.f UPDATE a=2 b=NaN => -Infinity",
            "public.f DELETE a=2 b=-Infinity",
            "public.f INSERT a=2 b=0.0",
        ]
        tail.until(5)
        told = [(each["op"], each["seq"], each["key"], each["old"], each["new"]) for each in tail.objects]
        assert told == [
            ("insert", 1, None, None, {"a": 1, "b": "NaN"}),
            ("update", 2, None, {"a": 1, "b": "NaN"}, {"a": 2, "b": "NaN"}),
            ("update", 4, None, {"a": 2, "b": "NaN"}, {"a": 2, "b": "-Infinity"}),
            ("delete", 6, None, {"a": 2, "b": "-Infinity"}, None),
            ("insert", 7, None, None, {"a": 2, "b": 0.0}),
        ]


@pg18
def test_unchanged_toast(database: Database, lake: Lake) -> None:
    """What a message does not hold is neither NULL nor left out in silence."""
    database.execute(
        "CREATE TABLE t (id int PRIMARY KEY, n int, long text); ALTER TABLE t ALTER long SET STORAGE EXTERNAL"
    )
    published(database)
    database.execute("INSERT INTO t VALUES (1, 1, repeat('x', 9000))")
    with Tail(lake, database.dsn) as text, Tail(lake, database.dsn, "--format", "json") as tail:
        database.execute("UPDATE t SET n = 2")
        database.execute("ALTER TABLE t REPLICA IDENTITY FULL; UPDATE t SET n = 3")
        cut = "'" + "x" * 199 + "... (9002 characters)"
        assert text.text(2) == [
            "public.t UPDATE (id=1) n=2 long=(unchanged)",
            f"public.t UPDATE id=1 n=2 => 3 long={cut}",
        ]
        tail.until(2)
        default, full = tail.objects
        assert (default["new"], default["unchanged"]) == ({"id": 1, "n": 2}, ["long"])
        assert (full["new"], full["unchanged"]) == ({"id": 1, "n": 3, "long": "x" * 9000}, [])


@pg18
def test_values_that_do_not_fit(database: Database, lake: Lake) -> None:
    """A value that its type cannot hold is shown exactly as Postgres prints it."""
    database.execute(
        "CREATE TABLE t (id int PRIMARY KEY, n numeric(5,2), d date, at date, z timestamptz, free numeric)"
    )
    published(database)
    with Tail(lake, database.dsn) as text, Tail(lake, database.dsn, "--format", "json") as tail:
        database.execute(
            "INSERT INTO t VALUES (1, 'NaN', 'infinity', '0044-03-15 BC', '294276-12-31 23:59:59+00', 'Infinity')"
        )
        assert text.text(1) == [
            "public.t INSERT (id=1) n=NaN d=infinity at=0044-03-15 BC z=294276-12-31 23:59:59+00 free='Infinity'"
        ]
        tail.until(1)
        assert tail.objects[0]["new"] == {
            "id": 1,
            "n": "NaN",
            "d": "infinity",
            "at": "0044-03-15 BC",
            "z": "294276-12-31 23:59:59+00",
            "free": "Infinity",
        }


@pg18
def test_tables(database: Database, lake: Lake) -> None:
    """Names and patterns choose; each transaction's changes come in their order, also across tables."""
    database.execute(
        'CREATE SCHEMA audit; CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE "T 2" (id int PRIMARY KEY);'
        "CREATE TABLE audit.a (id int PRIMARY KEY); CREATE TABLE audit.b (id int PRIMARY KEY)"
    )
    published(database)
    change = (
        'BEGIN; INSERT INTO audit.b VALUES (1); INSERT INTO t VALUES (2); INSERT INTO "T 2" VALUES (3);'
        "INSERT INTO audit.a VALUES (4); INSERT INTO audit.b VALUES (5); TRUNCATE t, audit.a; COMMIT"
    )
    with (
        Tail(lake, database.dsn, "public.T 2", "audit.*", "public.nope") as some,
        Tail(lake, database.dsn, "--format", "json") as everything,
    ):
        assert [line for line in some.said if "public.nope" in line and line.startswith("warning: ")]
        database.execute(change)
        assert some.text(5) == [
            "audit.b INSERT (id=1)",
            "public.T 2 INSERT (id=3)",
            "audit.a INSERT (id=4)",
            "audit.b INSERT (id=5)",
            "audit.a TRUNCATE",
        ]
        everything.until(7)
        assert [each["seq"] for each in everything.objects] == [1, 2, 3, 4, 5, 6, 6]
        some.stop()


@pg18
def test_schema_changes(database: Database, lake: Lake) -> None:
    """A table may change between two changes, within a transaction too."""
    published(database)
    with Tail(lake, database.dsn) as tail:
        database.execute("CREATE TABLE t (id int PRIMARY KEY)")
        database.execute("INSERT INTO t VALUES (1); ALTER TABLE t ADD v text; INSERT INTO t VALUES (2, 'x')")
        assert tail.text(2) == ["public.t INSERT (id=1)", "public.t INSERT (id=2) v='x'"]


@pg18
def test_limit(database: Database, lake: Lake) -> None:
    """It ends by itself after so many changes, within a transaction too; what was before it is not shown."""
    rows(database, 1)
    published(database)
    rows(database, 2)
    with Tail(lake, database.dsn, "--limit", "3", "--format", "json") as tail:
        rows(database, 3)
        database.execute("INSERT INTO t SELECT i, 'more' FROM generate_series(10, 20) AS i")
        assert tail.wait() == 0
        assert [each["key"]["id"] for each in tail.objects] == [3, 10, 11]
    gone(database)


@pg18
def test_large_transaction(database: Database, lake: Lake) -> None:
    """One that is larger than a batch has one head, and nothing is left out."""
    rows(database, 0)
    published(database)
    with Tail(lake, database.dsn) as tail:
        database.execute("INSERT INTO t SELECT i, 'row' FROM generate_series(1, 5000) AS i")
        assert tail.text(5000)[-1] == "public.t INSERT (id=5000) v='row'"
        assert len(tail.lines) == 5001


@pg18
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_signal(database: Database, lake: Lake, number: signal.Signals) -> None:
    """It ends at once, with exit status 0, and its slot is gone."""
    rows(database, 1)
    published(database)
    with Tail(lake, database.dsn, slot="s" * 63) as tail:
        (name,) = slots(database)
        assert re.fullmatch(r"s{49}_tail_[0-9a-f]{8}", name)
        tail.stop(number)
    gone(database)


@pg18
def test_waits_for_transactions(database: Database, lake: Lake) -> None:
    """It tells whom its slot waits for; what that transaction commits is before the beginning."""
    rows(database, 1)
    published(database)
    with blocking(database) as session, Tail(lake, database.dsn, "--limit", "1", begun=False) as tail:
        session.execute("INSERT INTO t VALUES (2, 'before')")
        until(lambda: len(tail.said) > 0, what="word of the wait")
        assert re.match(rf"waiting for running transactions .*pid {session.info.backend_pid}, .*: user ", tail.said[0])
        session.commit()
        tail.await_begun()
        rows(database, 3)
        assert tail.wait() == 0
        assert CLOCK.sub("", tail.lines[1]) == "public.t INSERT (id=3) v='row 3'"


@pg18
def test_signal_while_waiting(database: Database, lake: Lake) -> None:
    """The server does not go on making a slot that nobody waits for."""
    rows(database, 1)
    published(database)
    with blocking(database), Tail(lake, database.dsn, begun=False) as tail:
        until(lambda: slot_waits(database), what="a slot that waits")
        tail.stop()
        until(lambda: not slot_waits(database), 5, "the creation to be given up")
        gone(database)


@pg18
def test_beside_a_consumer(database: Database, lake: Lake) -> None:
    """Slot, publications and warehouse of a consumer are as they were, and it goes on."""
    rows(database, 1)
    database.execute("CREATE TABLE keyless (v int)")
    with Consumer(lake, database.dsn) as consumer:
        await_states(consumer, lake, "streaming", "public.t", "public.keyless")
        query = (
            "SELECT pubname, obj_description(p.oid), array_agg(prrelid::regclass::text ORDER BY 1) "
            "FROM pg_publication p JOIN pg_publication_rel ON prpubid = p.oid GROUP BY p.oid ORDER BY 1"
        )
        before = database.execute(query)
        files = sorted(lake.root.iterdir())
        with Tail(lake, database.dsn) as tail:
            assert "cdc" in slots(database)
            rows(database, 2)
            database.execute("INSERT INTO keyless VALUES (7)")
            assert tail.text(2) == ["public.t INSERT (id=2) v='row 2'", "public.keyless INSERT v=7"]
            settle(consumer, database, lake)
            tail.stop()
        gone(database)
        assert slots(database) == ["cdc"]
        assert database.execute(query) == before
        assert sorted(lake.root.iterdir()) == files
        rows(database, 3)
        assert consumer.stop() == 0
    complete(database, lake)


@pg18
def test_holds_no_wal(database: Database, lake: Lake) -> None:
    """What was printed is confirmed."""
    rows(database, 1)
    published(database)
    with Tail(lake, database.dsn) as tail:
        rows(database, 2)
        ((lsn,),) = database.execute("SELECT pg_current_wal_lsn()::text")
        tail.text(1)
        query = (
            "SELECT 1 FROM pg_replication_slots WHERE slot_name ~ 'tail' AND confirmed_flush_lsn >= %s::pg_lsn - 200"
        )
        until(lambda: database.execute(query, [lsn]), 5, f"{lsn} to be confirmed")


@pg18
def test_lost_connection(database: Database, lake: Lake) -> None:
    """One line of error and a hint; what came before was printed."""
    rows(database, 1)
    published(database)
    with Tail(lake, database.dsn) as tail:
        rows(database, 2)
        tail.text(1)
        database.execute("SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name ~ 'tail'")
        assert tail.wait() == 1
        error, hint = tail.said[-2:]
        assert error.startswith("error: replication stream: ")
        assert hint.startswith("hint: run it again")
    gone(database)


@pg18
def test_dropped_publication(database: Database, lake: Lake) -> None:
    """The same when the publication goes."""
    rows(database, 1)
    published(database)
    with Tail(lake, database.dsn) as tail:
        database.execute("DROP PUBLICATION cdc")
        rows(database, 2, 3)
        assert tail.wait() == 1
        assert "publication" in tail.said[-2]
        assert tail.said[-1].startswith("hint: run it again")


@pg18
def test_reader_has_had_enough(database: Database, lake: Lake) -> None:
    """A pipe that nobody reads any more ends it in peace, at the next line or without one."""
    rows(database, 1)
    published(database)
    for busy in (True, False):
        with subprocess.Popen(
            [*PROGRAM, "tail"],
            env=lake.environment(database.dsn),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=lake.root,
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stderr.readline()
            process.stdout.close()
            if busy:
                database.execute("UPDATE t SET v = v || '.'")
            assert process.wait(10) == 0
            assert process.stderr.read() == b""
        gone(database)


@pg18
def test_signal_while_nobody_reads(database: Database, lake: Lake) -> None:
    """A reader that has paused does not keep it from ending."""
    rows(database, 1)
    published(database)
    with subprocess.Popen(
        [*PROGRAM, "tail"],
        env=lake.environment(database.dsn),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=lake.root,
    ) as process:
        assert process.stderr is not None
        process.stderr.readline()
        database.execute("INSERT INTO t SELECT i, repeat('x', 100) FROM generate_series(10, 20000) AS i")
        blocked = (
            "SELECT 1 FROM pg_stat_replication WHERE sent_lsn > (SELECT confirmed_flush_lsn FROM pg_replication_slots)"
        )
        until(lambda: database.execute(blocked), what="the stream to stand still")
        time.sleep(1)
        process.terminate()
        assert took(lambda: process.wait(30)) < STOP_S
        assert process.returncode == 0
        assert process.stderr.read() == b""
    gone(database)


@pg18
def test_missing_publication(database: Database, lake: Lake) -> None:
    """It makes none."""
    rows(database, 1)
    error, hint = refused(call(lake, database.dsn, "tail"))
    assert error == "there is no publication cdc or cdc_append"
    assert "cdc setup" in hint
    assert "cdc run" in hint
    published(database, "t", name="mine")
    with Tail(lake, database.dsn, publication="mine") as tail:
        rows(database, 2)
        tail.text(1)
    assert database.execute("SELECT pubname FROM pg_publication") == [("mine",)]


@pg18
def test_missing_right(database: Database, lake: Lake) -> None:
    """A role that may not replicate is told so."""
    rows(database, 1)
    published(database)
    role = f"reader_{database.name[-8:]}"
    database.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'x'; GRANT SELECT ON t TO {role}")
    try:
        error, hint = refused(call(lake, make_conninfo(database.dsn, user=role, password="x"), "tail"))
    finally:
        database.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")
    assert "permission denied to start WAL sender" in error
    assert "REPLICATION" in hint


def test_help(lake: Lake) -> None:
    """The examples stand on lines of their own."""
    lines = call(lake, "", "tail", "--help").stdout.splitlines()
    assert "    cdc tail public.orders 'audit.*'" in lines


def test_wrong_usage(lake: Lake) -> None:
    """Exit status 2."""
    for arguments in (["--format", "xml"], ["--limit", "0"], ["--limit", "x"], ["--warehouse", "x"]):
        refused(call(lake, "host=/nowhere", "tail", *arguments), 2)
