"""Copies at one LSN: the first load, a resync and a fresh start are exact while the tables are written to.

A gate in front of the server (gate.py) holds a copy where a test wants it, so that nothing here depends on how long a
copy takes.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator

import psycopg
import pytest

from cdc.embedded import EmbeddedServer
from cdc.source import owner
from cdc.source.connection import connect
from tests.conftest import Database, Lake
from tests.integration.copies import (
    SOME_BYTES,
    await_states,
    await_waiting_slot,
    blocking,
    copy_lsns,
    equal,
    fill,
    leftovers,
    locks,
    log,
    pgbench,
    settle,
)
from tests.integration.gate import Gate
from tests.mirror import Consumer, mirror_once, run_cdc, states, until, warehouse_rows

pg18 = pytest.mark.parametrize("server", [18], indirect=True, ids=["pg18"])

PGBENCH = {
    "public.pgbench_accounts": ["aid"],
    "public.pgbench_branches": ["bid"],
    "public.pgbench_tellers": ["tid"],
    "public.pgbench_history": [],
}


def transactions(database: Database) -> int:
    """How many transactions pgbench has committed."""
    count: int = database.execute("SELECT count(*) FROM pgbench_history")[0][0]
    return count


def test_first_copy_under_load(database: Database, lake: Lake) -> None:
    """K1: writes before, during and after the copies are there exactly once, in a table without a key too."""
    database.server.run("pgbench", "--initialize", "--quiet", "--scale=1", dbname=database.name)
    with pgbench(database) as traffic:
        until(lambda: transactions(database) > 50)
        before = transactions(database)
        with Consumer(lake, database.dsn) as consumer:
            await_states(consumer, lake, "streaming", *PGBENCH)
            assert traffic.poll() is None
            after = transactions(database)
            until(lambda: transactions(database) > after + 100)
            assert consumer.stop() == 0
    mirror_once(lake, database.dsn)
    equal(database, lake, PGBENCH)
    assert not leftovers(lake)
    lsns = copy_lsns(lake)
    assert len(set(lsns.values())) == len(PGBENCH)
    ((copied, added),) = log(
        lake, "pgbench_history", "SELECT count(*) FILTER (_op = 'S'), count(*) FILTER (_op = 'I') FROM log"
    )
    assert copied > before
    assert added > 100
    assert copied + added == transactions(database)


@pytest.fixture
def impatient(server: EmbeddedServer) -> Iterator[str]:
    """A role whose every time-out would end what a copy does; dropped after the database."""
    name = f"impatient_{secrets.token_hex(4)}"
    times = {
        "wal_sender_timeout": "2s",
        "idle_in_transaction_session_timeout": "1s",
        "statement_timeout": "1s",
        "lock_timeout": "1ms",
    }
    if server.version >= 17:
        times["transaction_timeout"] = "1s"
    settings = "".join(f"; ALTER ROLE {name} SET {setting} = '{value}'" for setting, value in times.items())
    server.psql(f"CREATE ROLE {name} LOGIN SUPERUSER {settings}")
    yield name
    server.psql(f"DROP ROLE {name}")


@pg18
@pytest.mark.slow
def test_long_parallel_copy_is_of_one_moment(impatient: str, database: Database, lake: Lake) -> None:
    """K11, K5: several sessions read one snapshot, though one comes late, and all take longer than any time-out.

    What is moved from row to row keeps the sum of all rows: a copy of two moments would have another one.
    """
    dsn = database.dsn.replace("postgres@", f"{impatient}@")
    mirror_once(lake, dsn)
    database.execute(
        "CREATE TABLE big (id int PRIMARY KEY, v int NOT NULL, pad text NOT NULL);"
        "ALTER TABLE big ALTER pad SET STORAGE PLAIN;"
        "INSERT INTO big SELECT i, 100, repeat('x', 7000) FROM generate_series(1, 18000) AS i"
    )
    assert database.execute("SELECT pg_relation_size('big') > 128000000") == [(True,)]
    script = lake.root / "move.sql"
    script.write_text(
        "\\set a random(1, 9000)\n\\set b random(9001, 18000)\n"
        "BEGIN;\nUPDATE big SET v = v - 1 WHERE id = :a;\nUPDATE big SET v = v + 1 WHERE id = :b;\nEND;\n"
    )
    blocker = blocking(database)
    with (
        Gate(dsn) as gate,
        pgbench(database, "--client=1", f"--file={script}"),
        Consumer(lake, gate.dsn, threads="3") as consumer,
    ):
        await_waiting_slot(database, consumer)
        sender = "SELECT active_pid FROM pg_replication_slots WHERE slot_name = 'cdc'"
        before = database.execute(sender)
        gate.hold_newcomers()
        blocker.rollback()
        until(lambda: gate.waiting)
        while not locks(database, "big"):
            gate.admit()
            time.sleep(0.1)
        (first,) = locks(database, "big")
        time.sleep(2.5)  # longer than the time-outs
        assert locks(database, "big") == [first]
        gate.hold_rows(SOME_BYTES)
        until(lambda: len(locks(database, "big")) == 3 and gate.waiting >= 3, what="three sessions at work")
        at_work = locks(database, "big")
        assert first in at_work
        time.sleep(2.5)
        assert locks(database, "big") == at_work
        assert gate.waiting >= 3
        gate.open()
        await_states(consumer, lake, "streaming", "public.big")
        assert database.execute(sender) == before
        settle(consumer, database, lake)
        assert "connection lost" not in consumer.output
        assert consumer.stop() == 0
    mirror_once(lake, dsn)
    query = "SELECT sum(v), count(*), count(DISTINCT id) FROM log WHERE _op = 'S' GROUP BY _lsn"
    assert log(lake, "big", query) == [(1_800_000, 18000, 18000)]
    assert log(lake, "big", "SELECT count(*) > 10 FROM log WHERE _op = 'U'") == [(True,)]
    equal(database, lake, {"public.big": ["id"]})


def test_copy_waits_for_open_transactions(database: Database, lake: Lake) -> None:
    """K2: the log names who is waited for, other tables go on streaming, and anybody can read the warehouse."""
    database.execute("CREATE TABLE other (id int PRIMARY KEY)")
    mirror_once(lake, database.dsn)
    database.execute("CREATE TABLE late (v text)")
    first = blocking(database)
    first.execute("INSERT INTO late VALUES ('of the first')")
    second = database.connect(autocommit=False)
    second.execute("INSERT INTO late VALUES ('of the second')")
    second.execute("PREPARE TRANSACTION 'held up'")
    second.commit()
    with Consumer(lake, database.dsn) as consumer:
        await_waiting_slot(database, consumer)
        for i in range(3):
            database.execute(f"INSERT INTO other VALUES ({i})")
            until(lambda: warehouse_rows(lake, "SELECT count(*) FROM public.other") == [(i + 1,)], 20)  # noqa: B023
            assert states(lake)["public.late"] == "copying"
            await_waiting_slot(database, consumer)
        until(lambda: f"pid {first.info.backend_pid}," in consumer.output, 20, "the log to name the session")
        assert "prepared transaction 'held up'" in consumer.output
        first.commit()
        await_waiting_slot(database, consumer)
        database.execute("COMMIT PREPARED 'held up'")
        await_states(consumer, lake, "streaming", "public.late")
        database.execute("INSERT INTO late VALUES ('after')")
        settle(consumer, database, lake)
        equal(database, lake, {"public.late": [], "public.other": ["id"]})


@pg18
def test_streaming_goes_on_during_a_copy(database: Database, lake: Lake) -> None:
    """Changes of other tables arrive while a table is being copied, and its own join in when it is whole."""
    database.execute("CREATE TABLE other (id int PRIMARY KEY, v text)")
    mirror_once(lake, database.dsn)
    fill(database, "big")
    with Gate(database.dsn) as gate, Consumer(lake, gate.dsn, flush_rows="10000") as consumer:
        gate.hold_rows(SOME_BYTES)
        until(lambda: gate.waiting, what="the copy to be under way")
        for i in range(3):
            database.execute(
                f"INSERT INTO other VALUES ({i}, 'new'); UPDATE big SET v = {i} + 1 WHERE id % 1000 = 0;"
                f"DELETE FROM big WHERE id = {i} + 1; INSERT INTO big (id) VALUES ({i} - 10)"
            )
            until(lambda: warehouse_rows(lake, "SELECT count(*) FROM public.other") == [(i + 1,)], 20)  # noqa: B023
            assert states(lake)["public.big"] == "copying"
            assert gate.waiting
            assert len(locks(database, "big")) == 1
        done = run_cdc(lake, database.dsn, "query", "SELECT count(*) FROM public.other")
        assert done.returncode == 0, done.stderr
        assert gate.waiting
        assert ("big",) not in warehouse_rows(lake, "SELECT table_name FROM duckdb_tables()")
        gate.open()
        await_states(consumer, lake, "streaming", "public.big")
        settle(consumer, database, lake)
        equal(database, lake, {"public.big": ["id"], "public.other": ["id"]})
        assert not leftovers(lake)


@pg18
def test_copy_of_small_chunks_leaves_room_for_the_stream(database: Database, lake: Lake) -> None:
    """The stream has its turn between two chunks, however fast these come."""
    database.execute("CREATE TABLE other (id int PRIMARY KEY)")
    mirror_once(lake, database.dsn)
    fill(database, "big", 20_000)
    with Consumer(lake, database.dsn, flush_rows="50") as consumer:
        await_states(consumer, lake, "copying", "public.big")
        database.execute("INSERT INTO other VALUES (1)")
        until(lambda: warehouse_rows(lake, "SELECT count(*) FROM public.other") == [(1,)], 20)
        assert states(lake)["public.big"] == "copying"
        await_states(consumer, lake, "streaming", "public.big")


@pg18
def test_copy_whose_sessions_break_begins_again(database: Database, lake: Lake) -> None:
    """K4, J9: what came of the copy before is not there twice."""
    mirror_once(lake, database.dsn)
    fill(database, "big", 100_000)  # more than sockets take: the server is sending still when its session ends
    with Gate(database.dsn) as gate, Consumer(lake, gate.dsn, flush_rows="1000") as consumer:
        gate.hold_rows(500_000)
        until(lambda: gate.waiting, what="the copy to be under way")
        (pid,) = locks(database, "big")
        staged = "SELECT estimated_size FROM duckdb_tables() WHERE table_name LIKE '_cdc_copy%'"
        until(lambda: any(size for (size,) in warehouse_rows(lake, staged)), what="some rows to be staged")
        database.execute("UPDATE big SET v = v + 1 WHERE id <= 1000")
        database.execute(f"SELECT pg_terminate_backend({pid})")
        gate.open()
        await_states(consumer, lake, "streaming", "public.big")
        settle(consumer, database, lake)
        equal(database, lake, {"public.big": ["id"]})
        assert not leftovers(lake)


@pg18
@pytest.mark.parametrize(
    ("point", "b_is_copied"),
    [
        ("during_copy:1", False),
        ("during_copy:4", False),
        ("before_swap:2", False),
        ("before_rename:2", True),
        ("after_swap:2", True),
    ],
)
def test_crash_costs_the_table_in_hand(database: Database, lake: Lake, point: str, b_is_copied: bool) -> None:
    """K4: no partial rows are to be seen, whole copies are kept, and nothing of the broken one is left."""
    for table in "abc":
        fill(database, table, 5000)
    first_is_copied = not point.endswith(":1")
    with Consumer(lake, database.dsn, flush_rows="2000", threads="1", crash_at=point) as consumer:
        assert consumer.wait() == -9, consumer.output
    found = states(lake)
    assert found["public.a"] == ("streaming" if first_is_copied else "copying")
    if first_is_copied:
        assert found["public.b"] == ("streaming" if b_is_copied else "copying")
    assert found["public.c"] == "pending"
    here = {
        name for (name,) in warehouse_rows(lake, "SELECT table_name FROM duckdb_tables() WHERE schema_name = 'public'")
    }
    assert ("b" in here) == b_is_copied
    for table in here & {"a", "b"}:
        assert warehouse_rows(lake, f"SELECT count(*) FROM public.{table}") == [(5000,)]
    if not b_is_copied:
        assert not list(lake.history.glob("public/b/*.parquet"))
    before = copy_lsns(lake)
    database.execute("; ".join(f"UPDATE {t} SET v = 1 WHERE id < 100; DELETE FROM {t} WHERE id = 200" for t in "abc"))
    output = mirror_once(lake, database.dsn)
    again = {line.partition("table=")[2].split()[0] for line in output.splitlines() if line.startswith("copied")}
    assert again == {f"public.{t}" for t in "abc" if found[f"public.{t}"] != "streaming"}
    after = copy_lsns(lake)
    assert all(after[table] == before[table] for table, state in found.items() if state == "streaming")
    equal(database, lake, {f"public.{table}": ["id"] for table in "abc"})
    assert not leftovers(lake)


SHAPES = """
CREATE TABLE empty (id int PRIMARY KEY, v text);
CREATE TABLE parent (id int PRIMARY KEY, v text); CREATE TABLE child (w int, PRIMARY KEY (id)) INHERITS (parent);
INSERT INTO parent SELECT i, 'parent' FROM generate_series(1, 10) AS i;
INSERT INTO child SELECT i, 'child', i FROM generate_series(11, 20) AS i;
CREATE TABLE root (id int, k int, v text, PRIMARY KEY (id, k)) PARTITION BY RANGE (k);
CREATE TABLE leaf1 PARTITION OF root FOR VALUES FROM (0) TO (10);
CREATE TABLE branch PARTITION OF root FOR VALUES FROM (10) TO (30) PARTITION BY RANGE (k);
CREATE TABLE leaf2 (gone int, v text, k int NOT NULL, id int NOT NULL, PRIMARY KEY (id, k));
ALTER TABLE leaf2 DROP gone; ALTER TABLE branch ATTACH PARTITION leaf2 FOR VALUES FROM (10) TO (20);
CREATE TABLE leaf3 PARTITION OF branch FOR VALUES FROM (20) TO (30);
INSERT INTO root SELECT i, i % 20, 'row ' || i FROM generate_series(1, 1000) AS i;
CREATE TABLE toast (id int PRIMARY KEY, v text); ALTER TABLE toast ALTER v SET STORAGE EXTERNAL;
INSERT INTO toast SELECT i, repeat(md5(i::text), 1000) FROM generate_series(1, 20) AS i;
CREATE TABLE generated (id int PRIMARY KEY, g int GENERATED ALWAYS AS (id * 2) STORED, v text);
INSERT INTO generated (id, v) VALUES (1, 'one'), (2, NULL);
CREATE SCHEMA "Other ""x"; CREATE TABLE "Other ""x"."T ä.y" ("Ü" int PRIMARY KEY, "select" text);
INSERT INTO "Other ""x"."T ä.y" VALUES (1, ''), (2, NULL), (3, E'\\\\N'), (4, E'"a",\\r\\nb');
"""
SHAPED = {
    "public.empty": ["id"],
    "public.child": ["id"],
    "public.root": ["id", "k"],
    "public.toast": ["id"],
    "public.generated": ["id"],
}


@pytest.fixture
def reader(server: EmbeddedServer) -> Iterator[str]:
    """A role without any rights of its own, but for replication; dropped after the database."""
    name = f"reader_{secrets.token_hex(4)}"
    server.psql(f"CREATE ROLE {name} LOGIN REPLICATION")
    yield name
    server.psql(f"DROP ROLE {name}")


def test_shapes_of_tables(reader: str, database: Database, lake: Lake) -> None:
    """K7, F3, F6: copied as the application sees each table, by a role that may read just what `cdc setup` grants."""
    database.execute(SHAPES)
    with connect(database.dsn) as connection:
        script = owner.setup_sql(connection, "cdc", (), reader)
    kept = [line for line in script.splitlines() if not line.startswith(("--", "ALTER SYSTEM"))]
    database.execute("\n".join(kept))
    dsn = database.dsn.replace("postgres@", f"{reader}@")
    mirror_once(lake, dsn)
    equal(database, lake, SHAPED)
    quoted = warehouse_rows(lake, 'SELECT * FROM "Other ""x"."T ä.y" ORDER BY 1')
    assert quoted == database.execute('SELECT * FROM "Other ""x"."T ä.y" ORDER BY 1')
    assert len(quoted) == 4
    only = "SELECT * FROM ONLY parent ORDER BY id"
    assert warehouse_rows(lake, "FROM public.parent ORDER BY id") == database.execute(only)
    assert len(database.execute(only)) == 10
    assert {name for name in states(lake) if "leaf" in name or "branch" in name} == set()
    database.execute(
        "INSERT INTO empty VALUES (1, 'x'); UPDATE root SET k = k + 10 WHERE id % 10 = 0 AND k < 10;"
        "INSERT INTO generated (id, v) VALUES (3, 'three'); DELETE FROM child WHERE id = 11;"
        "DELETE FROM ONLY parent WHERE id = 1"
    )
    mirror_once(lake, dsn)
    equal(database, lake, SHAPED)
    assert warehouse_rows(lake, "FROM public.parent ORDER BY id") == database.execute(only)


def test_publication_of_somebody_else_is_used_as_it_is(database: Database, lake: Lake) -> None:
    """K7, G1, G2: its columns, its filter and its tables; nothing is added to it, and no second one made."""
    database.execute(
        "CREATE TABLE t (id int PRIMARY KEY, secret text, v int); CREATE TABLE other (id int PRIMARY KEY);"
        "INSERT INTO t SELECT i, 'secret', i FROM generate_series(1, 100) AS i;"
        "CREATE PUBLICATION mine FOR TABLE t (id, v) WHERE (id > 10 AND id <> 50)"
    )
    look = (
        "SELECT pubname::text, puballtables, pubupdate, pubviaroot, obj_description(oid, 'pg_publication'),"
        "(SELECT array_agg(prrelid::regclass::text) FROM pg_publication_rel WHERE prpubid = p.oid) "
        "FROM pg_publication AS p"
    )
    before = database.execute(look)
    mirror_once(lake, database.dsn, publication="mine")
    query = "SELECT * FROM public.t ORDER BY id"
    want = "SELECT id, v FROM t WHERE id > 10 AND id <> 50 ORDER BY id"
    assert warehouse_rows(lake, query) == database.execute(want)
    database.execute(
        "INSERT INTO t VALUES (0, 'x', 0), (101, 'x', 0); UPDATE t SET id = 200 WHERE id = 50;"
        "UPDATE t SET id = 5 - id WHERE id = 20; UPDATE t SET v = -1 WHERE id > 90; DELETE FROM t WHERE id IN (1, 30)"
    )
    mirror_once(lake, database.dsn, publication="mine")
    assert warehouse_rows(lake, query) == database.execute(want)
    assert database.execute(look) == before
    assert list(states(lake)) == ["public.t"]


def test_tables_without_identity_do_the_application_no_harm(database: Database, lake: Lake) -> None:
    """C8, C9: they land in the second publication; their inserts are followed, and nobody's UPDATE or DELETE fails."""
    database.execute(
        "CREATE TABLE bare (v int); CREATE TABLE nothing (v int PRIMARY KEY);"
        "ALTER TABLE nothing REPLICA IDENTITY NOTHING; CREATE TABLE keyed (v int PRIMARY KEY);"
        "INSERT INTO bare VALUES (1), (1); INSERT INTO nothing VALUES (1), (2); INSERT INTO keyed VALUES (1)"
    )
    mirror_once(lake, database.dsn)
    members = (
        "SELECT pubname::text, array_agg(tablename::text ORDER BY 1) FROM pg_publication_tables GROUP BY 1 ORDER BY 1"
    )
    assert database.execute(members) == [("cdc", ["keyed"]), ("cdc_append", ["bare", "nothing"])]
    database.execute("INSERT INTO bare VALUES (1), (2); INSERT INTO nothing VALUES (3)")
    mirror_once(lake, database.dsn)
    equal(database, lake, {"public.bare": [], "public.nothing": []})
    for statement in (
        "UPDATE bare SET v = v + 1",
        "UPDATE nothing SET v = v + 10",
        "DELETE FROM bare",
        "DELETE FROM nothing",
    ):
        database.execute(statement)
    database.execute("INSERT INTO bare VALUES (7)")
    mirror_once(lake, database.dsn)
    assert warehouse_rows(lake, "SELECT v FROM public.bare ORDER BY v") == [(1,), (1,), (1,), (2,), (7,)]
    database.execute("TRUNCATE bare")
    mirror_once(lake, database.dsn)
    equal(database, lake, {"public.bare": []})


@pg18
def test_a_copied_table_is_not_read_again(reader: str, database: Database, lake: Lake) -> None:
    """K9: without the right to read it, a table that is copied already goes on streaming over restarts."""
    database.execute(
        "CREATE TABLE a (id int PRIMARY KEY); CREATE TABLE b (id int PRIMARY KEY); INSERT INTO a VALUES (1);"
        f"GRANT SELECT ON a, b TO {reader}; CREATE PUBLICATION mine FOR TABLE a, b"
    )
    dsn = database.dsn.replace("postgres@", f"{reader}@")
    mirror_once(lake, dsn, publication="mine")
    before = copy_lsns(lake)
    database.execute(f"REVOKE SELECT ON a FROM {reader}; INSERT INTO a VALUES (2); INSERT INTO b VALUES (1)")
    with psycopg.connect(dsn) as theirs, pytest.raises(psycopg.errors.InsufficientPrivilege):
        theirs.execute("SELECT FROM a")
    mirror_once(lake, dsn, publication="mine")
    equal(database, lake, {"public.a": ["id"], "public.b": ["id"]})
    assert copy_lsns(lake) == before


@pg18
def test_a_table_that_cannot_be_copied_is_put_aside(reader: str, database: Database, lake: Lake) -> None:
    """J17: one table without the right to read it; the others are copied, and it too once that is mended."""
    database.execute(
        "CREATE TABLE a (id int PRIMARY KEY); CREATE TABLE c (id int PRIMARY KEY);"
        f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {reader}; CREATE PUBLICATION mine FOR ALL TABLES"
    )
    dsn = database.dsn.replace("postgres@", f"{reader}@")
    mirror_once(lake, dsn, publication="mine")
    with Consumer(lake, dsn, publication="mine") as consumer:
        database.execute("CREATE TABLE b (id int PRIMARY KEY); INSERT INTO b VALUES (1)")
        await_states(consumer, lake, "error", "public.b")
        database.execute("INSERT INTO a VALUES (1); INSERT INTO b VALUES (2)")
        settle(consumer, database, lake)
        equal(database, lake, {"public.a": ["id"], "public.c": ["id"]})
        ((reason,),) = warehouse_rows(lake, "SELECT reason FROM _cdc.tables WHERE table_name = 'b'")
        assert "permission denied" in reason
        assert not leftovers(lake)
        assert consumer.stop() == 0
    # It does not keep the consumer from starting either.
    output = mirror_once(lake, dsn, publication="mine")
    assert "public.b" not in output
    database.execute(f"GRANT SELECT ON b TO {reader}")
    done = run_cdc(lake, dsn, "resync", "public.b", publication="mine")
    assert done.returncode == 0, done.stderr
    mirror_once(lake, dsn, publication="mine")
    equal(database, lake, {"public.a": ["id"], "public.b": ["id"], "public.c": ["id"]})
