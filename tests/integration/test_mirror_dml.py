"""Inserts, updates, deletes and truncates of every kind: warehouse and history end up as Postgres has them."""

from __future__ import annotations

import contextlib
import random
import signal
from collections import Counter

import duckdb
import psycopg
import pytest
from psycopg import sql

from tests.conftest import Database, Lake
from tests.integration.steps import agree, copies, log, operations, sync, table_state, transactions
from tests.mirror import Consumer, mirrored_rows, run_cdc, source_rows, states, until, warehouse_rows

only_18 = pytest.mark.parametrize("server", [18], indirect=True, ids=["pg18"])


def test_every_kind_of_statement(database: Database, lake: Lake) -> None:
    """C1, C2: multi-row DML, COPY, ON CONFLICT, MERGE, CTEs, triggers, cascades, updates that change nothing."""
    database.execute(
        """
        CREATE TABLE plain (id int PRIMARY KEY, v text, n int DEFAULT 0);
        CREATE TABLE parent (id int PRIMARY KEY);
        CREATE TABLE child (id int PRIMARY KEY, parent_id int REFERENCES parent ON DELETE CASCADE ON UPDATE CASCADE);
        CREATE TABLE audit (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, what text);
        CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            INSERT INTO audit (what) VALUES (TG_OP || ' ' || coalesce(NEW.id, OLD.id));
            RETURN NULL;
        END $$;
        CREATE TRIGGER note AFTER INSERT OR UPDATE OR DELETE ON child FOR EACH ROW EXECUTE FUNCTION note();
        INSERT INTO plain SELECT i, 'v' || i FROM generate_series(1, 20) i;
        INSERT INTO parent VALUES (1), (2), (3);
        INSERT INTO child VALUES (10, 1), (11, 1), (20, 2);
        """
    )
    sync(database, lake)
    connection = database.connect()
    with connection.cursor().copy("COPY plain (id, v) FROM STDIN") as copy:
        copy.write(b"".join(b"%d\tcopied %d\n" % (i, i) for i in range(100, 150)))
    transactions(
        database,
        "INSERT INTO plain VALUES (30, 'a'), (31, 'b'), (32, NULL)",
        "UPDATE plain SET v = v || '!', n = n + id WHERE id % 2 = 0",
        "DELETE FROM plain WHERE id BETWEEN 3 AND 5",
        "UPDATE plain SET v = v WHERE id = 1",
        "INSERT INTO plain VALUES (1, 'not this'), (40, 'new') ON CONFLICT (id) DO UPDATE SET v = 'was here'",
        "INSERT INTO plain VALUES (1, 'nor this') ON CONFLICT DO NOTHING",
        """
        MERGE INTO plain p USING (VALUES (6, 'merged'), (7, NULL), (50, 'merged in')) AS s (id, v) ON p.id = s.id
        WHEN MATCHED AND s.v IS NULL THEN DELETE
        WHEN MATCHED THEN UPDATE SET v = s.v
        WHEN NOT MATCHED THEN INSERT (id, v) VALUES (s.id, s.v)
        """,
        """
        WITH gone AS (DELETE FROM plain WHERE id IN (8, 9) RETURNING id, v)
        INSERT INTO plain SELECT id + 1000, v FROM gone
        """,
        "DELETE FROM parent WHERE id = 1",
        "UPDATE parent SET id = 22 WHERE id = 2",
    )
    sync(database, lake)
    agree(database, lake, {"public.plain": ["id"], "public.parent": ["id"], "public.child": ["id"]})
    agree(database, lake, {"public.audit": ["id"]})
    assert operations(lake, "public.plain", "id = 1") == "UU"  # the first changed nothing
    assert operations(lake, "public.child") == "DDU"
    assert operations(lake, "public.audit") == "III"


def test_one_key_several_times(database: Database, lake: Lake) -> None:
    """C3, C4: insert, update and delete of one key, in one transaction and over several in one batch."""
    database.execute(
        "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t SELECT i, 'old' FROM generate_series(1, 9) i"
    )
    sync(database, lake)
    transactions(
        database,
        # in one transaction
        "INSERT INTO t VALUES (10, 'a'); UPDATE t SET v = 'b' WHERE id = 10; DELETE FROM t WHERE id = 10",
        "DELETE FROM t WHERE id = 1; INSERT INTO t VALUES (1, 'again')",
        "INSERT INTO t VALUES (11, 'a'); DELETE FROM t WHERE id = 11; INSERT INTO t VALUES (11, 'b')",
        "UPDATE t SET v = 'x' WHERE id = 2; UPDATE t SET v = 'y' WHERE id = 2; UPDATE t SET v = 'z' WHERE id = 2",
        "UPDATE t SET v = 'x' WHERE id = 3; DELETE FROM t WHERE id = 3",
        # over several
        "INSERT INTO t VALUES (12, 'a')",
        "DELETE FROM t WHERE id = 12",
        "INSERT INTO t VALUES (12, 'b')",
        "UPDATE t SET v = 'c' WHERE id = 12",
        "DELETE FROM t WHERE id = 4",
        "INSERT INTO t VALUES (4, 'reused')",
        "DELETE FROM t WHERE id = 4",
    )
    sync(database, lake)
    agree(database, lake, {"public.t": ["id"]})
    written = {key: operations(lake, "public.t", f"id = {key}") for key in (10, 1, 11, 2, 3, 12, 4)}
    assert written == {10: "IUD", 1: "DI", 11: "IDI", 2: "UUU", 3: "UD", 12: "IDIU", 4: "DID"}


def test_changes_of_the_key(database: Database, lake: Lake) -> None:
    """C5: one change, chains, swaps by way of a third key, shifts, and old keys that are used again in the batch."""
    database.execute(
        """
        CREATE TABLE t (id int PRIMARY KEY, v text);
        INSERT INTO t SELECT i, 'row ' || i FROM generate_series(1, 9) i;
        CREATE TABLE shifted (id int PRIMARY KEY, v text);
        INSERT INTO shifted SELECT i, 'row ' || i FROM generate_series(30, 1, -1) i;
        CREATE TABLE between (id int PRIMARY KEY, v text);
        INSERT INTO between SELECT i, 'row ' || i FROM generate_series(1, 5) i
        """
    )
    sync(database, lake)
    transactions(
        database,
        "UPDATE t SET id = 101 WHERE id = 1",
        # a chain in one transaction, a longer one over several, one that ends where it began
        "UPDATE t SET id = 102 WHERE id = 2; UPDATE t SET id = 202 WHERE id = 102; "
        "UPDATE t SET v = 'at 202' WHERE id = 202",
        "UPDATE t SET id = 103, v = 'moved' WHERE id = 3",
        "UPDATE t SET id = 203 WHERE id = 103",
        "UPDATE t SET id = 3 WHERE id = 203",
        # a swap
        "UPDATE t SET id = -1 WHERE id = 4; UPDATE t SET id = 4 WHERE id = 5; UPDATE t SET id = 5 WHERE id = -1",
        # the old key is used again: in the transaction, and in a later one
        "UPDATE t SET id = 106 WHERE id = 6; INSERT INTO t VALUES (6, 'new 6')",
        "UPDATE t SET id = 107 WHERE id = 7",
        "INSERT INTO t VALUES (7, 'new 7')",
        "DELETE FROM t WHERE id = 107",
        # inserted, moved, deleted; deleted, and its key taken by a move
        "INSERT INTO t VALUES (20, 'short'); UPDATE t SET id = 21 WHERE id = 20; DELETE FROM t WHERE id = 21",
        "DELETE FROM t WHERE id = 8; UPDATE t SET id = 8 WHERE id = 9",
        "UPDATE shifted SET id = id + 1",
        "UPDATE shifted SET id = id + 1",
        "UPDATE between SET id = 100 WHERE id = 1",
    )
    sync(database, lake)
    agree(database, lake, {"public.t": ["id"], "public.shifted": ["id"], "public.between": ["id"]})
    # one update is a D of the old key and an I of the new one, next to each other
    pairs = log(
        lake,
        "public.between",
        "SELECT _op, id, v, _seq - min(_seq) OVER () FROM log WHERE _seq > 0 ORDER BY _lsn, _seq",
    )
    assert pairs == [("D", 1, None, 0), ("I", 100, "row 1", 1)]
    transactions(
        database, "UPDATE between SET id = 1, v = 'back' WHERE id = 100", "UPDATE between SET id = 6 WHERE id = 5"
    )
    sync(database, lake)
    agree(database, lake, {"public.between": ["id"]})


def test_composite_keys(database: Database, lake: Lake) -> None:
    """C6: a part of the key changes; keys in another order than the columns, behind them, and with INCLUDE."""
    database.execute(
        """
        CREATE TABLE pair (v text, a int, b text, PRIMARY KEY (b, a));
        CREATE TABLE wide (a int, b int, c int, d int, v text, PRIMARY KEY (d, b) INCLUDE (v));
        INSERT INTO pair SELECT 'v' || i, i % 3, 'b' || i / 3 FROM generate_series(0, 11) i;
        INSERT INTO wide SELECT 1, i, NULL, i % 4, 'v' FROM generate_series(1, 12) i
        """
    )
    sync(database, lake)
    transactions(
        database,
        "UPDATE pair SET a = 10 WHERE a = 1 AND b = 'b0'",
        "UPDATE pair SET b = b || '''x' WHERE a = 2; UPDATE pair SET v = 'after' WHERE a = 2",
        "DELETE FROM pair WHERE b = 'b3'",
        # two values that read the same when joined together are two keys
        "INSERT INTO pair VALUES ('one', 11, '1'), ('two', 1, '11')",
        "UPDATE wide SET v = 'included' WHERE b < 4",
        "UPDATE wide SET b = b + 100, a = a + 1 WHERE d = 1",
        "UPDATE wide SET d = 9 WHERE d = 2",
        "DELETE FROM wide WHERE d = 3",
    )
    sync(database, lake)
    agree(database, lake, {"public.pair": ["b", "a"], "public.wide": ["d", "b"]})
    assert operations(lake, "public.wide") == "UUU" + "DIDIDI" * 2 + "DDD"


def test_keys_of_many_types(database: Database, lake: Lake) -> None:
    """C7: keys whose equality is not that of their text, or whose text has to be cast to be compared."""
    database.execute("CREATE EXTENSION citext; CREATE TYPE mood AS ENUM ('sad', 'so so', 'glad')")
    keys = {
        "text": ["''", "'a'", "'A'", "'a '", "'NULL'", r"'\N'", "E'x\\ny\\t\"z'", "'é😀'"],
        "citext": ["'b'", "'c'"],
        "char(4)": ["'a'", "'ab'"],
        "bytea": [r"'\x'", r"'\x00ff'", r"'\x5c78'"],
        "uuid": ["'00000000-0000-0000-0000-000000000001'", "'A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11'"],
        "float8": ["'NaN'", "0", "'-Infinity'", "1e-310", "0.1"],
        "numeric": ["1.0", "'NaN'", "1e30", "0.10"],
        "numeric(10,2)": ["1.00", "-0.01"],
        "date": ["'2024-02-29'", "'0001-01-01'"],
        "timestamptz": ["'2024-02-29 12:00:00.000001+05'", "'9999-12-31 23:59:59.999999+00'"],
        "time": ["'00:00'", "'23:59:59.999999'"],
        "bool": ["true", "false"],
        "jsonb": ["'{\"a\": 1}'", "'null'", "'[1.0]'"],
        "int[]": ["'{}'", "'{1,NULL}'"],
        "mood": ["'so so'", "'glad'"],
    }
    tables = {kind: f"k{number}" for number, kind in enumerate(keys)}
    for kind, table in tables.items():
        rows = ", ".join(f"({value}, {n})" for n, value in enumerate(keys[kind]))
        database.execute(f"CREATE TABLE {table} (k {kind} PRIMARY KEY, n int); INSERT INTO {table} VALUES {rows}")
    sync(database, lake)
    for table in tables.values():
        transactions(
            database,
            f"UPDATE {table} SET n = n + 100",
            f"DELETE FROM {table} WHERE n = 100",
            f"UPDATE {table} SET n = n + 100",
        )
    # equal to Postgres, yet written anew: -0 and 0, 1.0 and 1.00, B and b
    transactions(
        database,
        f"UPDATE {tables['float8']} SET k = '-0' WHERE k = 0",
        f"UPDATE {tables['float8']} SET n = 2 WHERE k = 0",
        f"UPDATE {tables['numeric']} SET k = 0.100 WHERE k = 0.1",
        f"UPDATE {tables['citext']} SET k = 'C' WHERE k = 'c'",
        f"UPDATE {tables['jsonb']} SET k = '[1.00]' WHERE k = '[1.0]'",
    )
    sync(database, lake)
    agree(database, lake, {f"public.{table}": None for table in tables.values()})
    for kind in ("text", "bytea", "uuid", "numeric", "timestamptz", "jsonb", "citext"):
        agree(database, lake, {f"public.{tables[kind]}": ["k"]})
    transactions(database, *(f"DELETE FROM {table}" for table in tables.values()))
    sync(database, lake)
    agree(database, lake, {f"public.{table}": None for table in tables.values()})


def test_tables_without_a_key(database: Database, lake: Lake) -> None:
    """C8, C9: under DEFAULT and NOTHING a table is append-only, keeps equal rows, and its owner may UPDATE."""
    database.execute(
        """
        CREATE TABLE bare (a int, b text);
        CREATE TABLE nothing (id int PRIMARY KEY, b text);
        ALTER TABLE nothing REPLICA IDENTITY NOTHING;
        INSERT INTO bare VALUES (1, 'x'), (1, 'x'), (NULL, NULL), (NULL, NULL);
        INSERT INTO nothing VALUES (1, 'x')
        """
    )
    sync(database, lake)
    transactions(
        database,
        "INSERT INTO bare VALUES (1, 'x'), (2, 'y'), (2, 'y'), (NULL, NULL)",
        "INSERT INTO nothing VALUES (2, 'y')",
    )
    sync(database, lake)
    agree(database, lake, {"public.bare": [], "public.nothing": []})
    appended = {name: source_rows(database, lake, f"public.{name}") for name in ("bare", "nothing")}
    transactions(
        database,
        "UPDATE bare SET b = 'changed'",
        "DELETE FROM nothing WHERE id = 1",
        "INSERT INTO bare VALUES (3, 'z')",
    )
    sync(database, lake)
    assert mirrored_rows(database, lake, "public.bare") == appended["bare"] + Counter([(3, "z")])
    assert mirrored_rows(database, lake, "public.nothing") == appended["nothing"]
    transactions(database, "TRUNCATE bare, nothing", "INSERT INTO bare VALUES (4, 'after')")
    sync(database, lake)
    agree(database, lake, {"public.bare": [], "public.nothing": []})


def test_whole_rows_as_identity(database: Database, lake: Lake) -> None:
    """C10, C11: under FULL a change takes one of several equal rows, NULLs are equal, and a key makes no difference."""
    database.execute(
        """
        CREATE TABLE bag (a int, b text, c float8, d numeric(10,2), e jsonb, f uuid, g timestamptz);
        ALTER TABLE bag REPLICA IDENTITY FULL;
        CREATE TABLE keyed (id int PRIMARY KEY, v text);
        ALTER TABLE keyed REPLICA IDENTITY FULL;
        INSERT INTO bag SELECT i % 3, NULL, 'NaN', 1.10, '{"k": null}', NULL, 'epoch' FROM generate_series(1, 12) i;
        INSERT INTO bag SELECT NULL, NULL, NULL, NULL, NULL, NULL, NULL FROM generate_series(1, 4);
        INSERT INTO bag SELECT 7, 'seven', '-0', 7, '[7]', '00000000-0000-0000-0000-000000000007', 'epoch';
        INSERT INTO keyed SELECT i, 'same' FROM generate_series(1, 5) i
        """
    )
    one = "ctid = (SELECT min(ctid) FROM bag WHERE {0}) AND {0}"
    sync(database, lake)
    transactions(
        database,
        "DELETE FROM bag WHERE " + one.format("a = 1"),
        "DELETE FROM bag WHERE " + one.format("a IS NULL"),
        "UPDATE bag SET b = 'one changed' WHERE " + one.format("a = 2"),
        "UPDATE bag SET b = 'changed' WHERE " + one.format("a IS NULL"),
        "UPDATE bag SET e = '[8]' WHERE a = 7",
        "UPDATE keyed SET v = 'other' WHERE id = 2; UPDATE keyed SET id = 30 WHERE id = 3; "
        "DELETE FROM keyed WHERE id = 4",
        # of rows that came in this batch: changed, changed back, deleted, and left
        "INSERT INTO bag (a) VALUES (50), (50), (50)",
        "UPDATE bag SET a = 51 WHERE " + one.format("a = 50"),
        "UPDATE bag SET a = 50 WHERE a = 51",
        "DELETE FROM bag WHERE " + one.format("a = 50"),
        # all rows of one kind, and they come back
        "DELETE FROM bag WHERE a = 0; INSERT INTO bag (a, b) VALUES (0, NULL), (0, NULL)",
    )
    assert database.execute("SELECT a, count(*) FROM bag WHERE a IN (0, 1, 50) GROUP BY a ORDER BY a") == [
        (0, 2),
        (1, 3),
        (50, 2),
    ]
    sync(database, lake)
    agree(database, lake, {"public.bag": [], "public.keyed": ["id"]})
    assert operations(lake, "public.keyed") == "DIDID"
    # one row, deleted; then all
    transactions(database, "DELETE FROM bag WHERE " + one.format("a = 2"), "DELETE FROM keyed WHERE id = 5")
    sync(database, lake)
    agree(database, lake, {"public.bag": [], "public.keyed": ["id"]})
    transactions(database, "DELETE FROM bag")
    sync(database, lake)
    agree(database, lake, {"public.bag": []})


def test_identity_by_an_index(database: Database, lake: Lake) -> None:
    """C12, trap 4: the mirror's key is the identity's, not the primary key, whose changes send no old row."""
    database.execute(
        """
        CREATE TABLE t (id int PRIMARY KEY, code text NOT NULL, part int NOT NULL, v text);
        CREATE UNIQUE INDEX by_code ON t (part, code);
        ALTER TABLE t REPLICA IDENTITY USING INDEX by_code;
        INSERT INTO t SELECT i, 'c' || i, i % 2, 'v' FROM generate_series(1, 10) i
        """
    )
    sync(database, lake)
    transactions(
        database,
        "UPDATE t SET id = 101 WHERE id = 1",  # the primary key alone
        "UPDATE t SET code = 'new' WHERE id = 2",  # the identity alone
        "UPDATE t SET id = 103, code = 'both' WHERE id = 3",
        "UPDATE t SET id = 104, v = 'w' WHERE id = 4; UPDATE t SET id = 4 WHERE id = 104",
        "DELETE FROM t WHERE id = 5",
        "UPDATE t SET id = 6 + 100, part = 5 WHERE id = 6; DELETE FROM t WHERE id = 106",
        # the primary key of a row that is gone is used again under another code
        "DELETE FROM t WHERE id = 7; INSERT INTO t VALUES (7, 'other', 0, 'again')",
    )
    sync(database, lake)
    agree(database, lake, {"public.t": ["part", "code"]})
    assert operations(lake, "public.t", "code = 'c1'") == "U"
    assert operations(lake, "public.t", "code IN ('c2', 'new')") == "DI"


def test_rolled_back_parts(database: Database, lake: Lake) -> None:
    """C14: what savepoints, exception blocks and aborted transactions undo never happened."""
    database.execute("CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (1, 'a'), (2, 'b')")
    sync(database, lake)
    connection = database.connect(autocommit=False)
    connection.execute("INSERT INTO t VALUES (10, 'stays')")
    connection.execute("SAVEPOINT s1")
    connection.execute("UPDATE t SET v = 'undone' WHERE id = 1")
    connection.execute("SAVEPOINT s2")
    connection.execute("DELETE FROM t WHERE id = 2")
    connection.execute("ROLLBACK TO s2")
    connection.execute("INSERT INTO t VALUES (11, 'nested')")
    connection.execute("RELEASE s2")
    connection.execute("ROLLBACK TO s1")
    connection.execute("UPDATE t SET v = 'done' WHERE id = 2")
    connection.commit()
    connection.execute("INSERT INTO t VALUES (12, 'aborted'); TRUNCATE t; INSERT INTO t VALUES (13, 'aborted')")
    connection.rollback()
    connection.close()
    transactions(
        database,
        """
        DO $$ BEGIN
            INSERT INTO t VALUES (20, 'before');
            BEGIN
                INSERT INTO t VALUES (21, 'undone');
                INSERT INTO t VALUES (1, 'duplicate');
            EXCEPTION WHEN unique_violation THEN
                INSERT INTO t VALUES (22, 'handled');
            END;
        END $$
        """,
        # more subtransactions than the server keeps in memory for one (I11)
        """
        DO $$ BEGIN
            FOR i IN 100..299 LOOP
                BEGIN
                    INSERT INTO t VALUES (i, 'sub');
                    IF i % 2 = 0 THEN RAISE division_by_zero; END IF;
                EXCEPTION WHEN division_by_zero THEN NULL;
                END;
            END LOOP;
        END $$
        """,
    )
    sync(database, lake)
    agree(database, lake, {"public.t": ["id"]})
    assert operations(lake, "public.t", "id < 100") == "IUII"
    assert operations(lake, "public.t", "id >= 100") == "I" * 100


def test_what_is_no_table_of_ours(database: Database, lake: Lake) -> None:
    """C15: temporary and unlogged tables, materialised views, views and reads send nothing and appear nowhere."""
    database.execute(
        """
        CREATE TABLE t (id int PRIMARY KEY, v text);
        CREATE UNLOGGED TABLE unlogged (id int PRIMARY KEY);
        CREATE MATERIALIZED VIEW counted AS SELECT count(*) FROM t;
        CREATE VIEW seen AS SELECT * FROM t;
        CREATE SEQUENCE numbers
        """
    )
    sync(database, lake)
    transactions(
        database,
        "CREATE TEMP TABLE mine (id int PRIMARY KEY); INSERT INTO mine VALUES (1); UPDATE mine SET id = 2",
        "INSERT INTO unlogged VALUES (1)",
        "REFRESH MATERIALIZED VIEW counted",
        "SELECT nextval('numbers'), * FROM t",
        "INSERT INTO seen VALUES (1, 'by the view')",
        "CREATE INDEX ON t (v)",
        "COMMENT ON TABLE t IS 'a comment'",
    )
    sync(database, lake)
    assert states(lake) == {"public.t": "streaming"}
    agree(database, lake, {"public.t": ["id"]})
    assert warehouse_rows(lake, "SELECT table_name FROM duckdb_tables() WHERE schema_name <> '_cdc'") == [("t",)]
    assert operations(lake, "public.t") == "I"


def test_rows_that_the_warehouse_lacks(database: Database, lake: Lake) -> None:
    """C16: of a row that somebody removed from the warehouse, an update brings it back, a delete is content.

    Where only whole rows identify, the table says so and is copied anew on demand.
    """
    database.execute(
        """
        CREATE TABLE t (id int PRIMARY KEY, v text);
        CREATE TABLE whole (id int, v text);
        ALTER TABLE whole REPLICA IDENTITY FULL;
        INSERT INTO t VALUES (1, 'a'), (2, 'b'), (3, 'c');
        INSERT INTO whole VALUES (1, 'a'), (2, 'b')
        """
    )
    sync(database, lake)
    with duckdb.connect(str(lake.warehouse)) as meddler:
        meddler.execute("DELETE FROM public.t WHERE id < 3; DELETE FROM public.whole WHERE id = 1")
    transactions(
        database, "UPDATE t SET v = 'back' WHERE id = 1", "DELETE FROM t WHERE id = 2", "DELETE FROM whole WHERE id = 1"
    )
    sync(database, lake)
    agree(database, lake, {"public.t": ["id"]})
    state, reason = table_state(lake, "public.whole")
    assert state == "error"
    assert "1 changed rows of public.whole are not in the warehouse" in reason
    transactions(database, "INSERT INTO whole VALUES (3, 'c')", "UPDATE t SET v = 'on' WHERE id = 3")
    assert run_cdc(lake, database.dsn, "resync", "public.whole").returncode == 0
    sync(database, lake)
    agree(database, lake, {"public.t": ["id"], "public.whole": []})


def test_a_large_transaction_in_pieces(database: Database, lake: Lake) -> None:
    """C17: 100,000 rows over small batches are one transaction, in order, in warehouse and history."""
    database.execute(
        "CREATE TABLE t (id int PRIMARY KEY, v text, n int); CREATE TABLE last (id int PRIMARY KEY); "
        "INSERT INTO t SELECT i, 'old ' || i, 0 FROM generate_series(1, 1000) i"
    )
    sync(database, lake)
    transactions(
        database,
        """
        INSERT INTO t SELECT i, 'new ' || i, 0 FROM generate_series(1001, 90000) i;
        UPDATE t SET n = id WHERE id <= 5000;
        UPDATE t SET id = -id WHERE id BETWEEN 500 AND 1500;
        DELETE FROM t WHERE id BETWEEN 80001 AND 90000;
        INSERT INTO last VALUES (1)
        """,
    )
    sync(database, lake, flush_rows="9000", memory="128MB")
    agree(database, lake, {"public.t": ["id"], "public.last": ["id"]})
    changes = 89000 + 5000 + 2 * 1001 + 10000
    query = "SELECT count(DISTINCT _lsn), count(*), count(DISTINCT _seq), min(_seq), max(_seq) FROM log WHERE _seq > 0"
    assert log(lake, "public.t", query) == [(1, changes, changes, 1, changes)]
    ((lsn,),) = log(lake, "public.last", "SELECT _lsn FROM log WHERE _seq > 0")
    pieces = warehouse_rows(lake, f"SELECT path FROM _cdc.files WHERE table_name = 't' AND first_lsn = {lsn}")
    assert len(pieces) >= 10  # it did come in pieces
    ((last,),) = log(lake, "public.last", "SELECT _seq FROM log WHERE _seq > 0")
    assert last == changes + 1  # counted over all tables


@only_18
def test_many_small_transactions(database: Database, lake: Lake) -> None:
    """C17: 10,000 transactions of one row each keep their own LSNs and their order."""
    database.execute("CREATE TABLE t (id int PRIMARY KEY, v int); INSERT INTO t VALUES (0, 0)")
    sync(database, lake)
    transactions(
        database,
        """
        DO $$ BEGIN
            FOR i IN 1..5000 LOOP
                INSERT INTO t VALUES (i, i); COMMIT;
                UPDATE t SET v = i WHERE id = 0; COMMIT;
            END LOOP;
        END $$
        """,
    )
    sync(database, lake)
    agree(database, lake, {"public.t": ["id"]})
    assert log(lake, "public.t", "SELECT count(DISTINCT _lsn), count(*), max(_seq) FROM log WHERE _seq > 0") == [
        (10000, 10000, 1)
    ]


@only_18
@pytest.mark.slow
def test_one_transaction_over_many_tables(database: Database, lake: Lake) -> None:
    """C17: one transaction that writes to 50 tables, of which some are new to the stream and some are emptied."""
    names = [f"t{i}" for i in range(50)]
    database.execute(
        "".join(f"CREATE TABLE {n} (id int PRIMARY KEY, v text); INSERT INTO {n} VALUES (1, 'a');" for n in names)
    )
    sync(database, lake)
    writes = [
        f"INSERT INTO {n} VALUES (2, '{n}'); UPDATE {n} SET v = 'b' WHERE id = 1;"
        + (f"TRUNCATE {n};" if i % 7 == 0 else "")
        for i, n in enumerate(names)
    ]
    database.execute("".join(writes) + "INSERT INTO t0 VALUES (9, 'the last')")
    sync(database, lake)
    agree(database, lake, {f"public.{n}": ["id"] for n in names})
    lsns = {log(lake, f"public.{n}", "SELECT max(_lsn) FROM log WHERE _seq > 0")[0] for n in names}
    assert len(lsns) == 1
    assert log(lake, "public.t0", "SELECT max(_seq) FROM log") == [(2 * 50 + 8 + 1,)]


def test_transactions_that_overlap(database: Database, lake: Lake) -> None:
    """I1: transactions take effect in the order of their commits, not in that of their beginnings."""
    database.execute("CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (1, 'a'), (2, 'b')")
    sync(database, lake)
    first, second = database.connect(autocommit=False), database.connect(autocommit=False)
    first.execute("INSERT INTO t VALUES (10, 'first')")
    second.execute("INSERT INTO t VALUES (20, 'second')")
    first.execute("UPDATE t SET v = 'first' WHERE id = 1")
    second.execute("UPDATE t SET v = 'second' WHERE id = 2")
    second.execute("DELETE FROM t WHERE id = 20")
    second.commit()
    first.execute("UPDATE t SET v = v || ', then first' WHERE id = 2")
    first.execute("INSERT INTO t VALUES (20, 'first')")
    first.commit()
    sync(database, lake)
    agree(database, lake, {"public.t": ["id"]})
    order = log(lake, "public.t", "SELECT _xid FROM log WHERE _seq > 0 GROUP BY _xid ORDER BY min(_lsn)")
    assert len(order) == 2
    assert order[0] > order[1]  # who began first has the lower xid, and committed last


def test_prepared_transactions(database: Database, lake: Lake) -> None:
    """I5: a prepared transaction counts from COMMIT PREPARED on, and one that is rolled back never does."""
    database.execute("CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (1, 'a'), (2, 'b')")
    sync(database, lake)
    for number, name in enumerate(("kept", "dropped"), start=1):
        connection = database.connect(autocommit=False)
        connection.execute(sql.SQL("UPDATE t SET v = {} WHERE id = {}").format(name, number))
        connection.execute(sql.SQL("INSERT INTO t VALUES ({}, {})").format(number * 10, name))
        connection.execute(sql.SQL("PREPARE TRANSACTION {}").format(f"{database.name} {name}"))
        connection.close()
    transactions(database, "INSERT INTO t VALUES (3, 'meanwhile')")
    sync(database, lake)
    agree(database, lake, {"public.t": ["id"]})
    assert operations(lake, "public.t") == "I"
    transactions(
        database,
        f"COMMIT PREPARED '{database.name} kept'",
        f"ROLLBACK PREPARED '{database.name} dropped'",
    )
    sync(database, lake)
    agree(database, lake, {"public.t": ["id"]})
    assert operations(lake, "public.t", "id IN (1, 10)") == "UI"
    assert operations(lake, "public.t", "id IN (2, 20)") == ""


def test_messages_of_others(database: Database, lake: Lake) -> None:
    """I7: logical messages of others, our own prefix among them, and those of aborted transactions, change nothing."""
    database.execute("CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (1, 'a')")
    sync(database, lake)
    transactions(
        database,
        "SELECT pg_logical_emit_message(true, 'theirs', 'hello'); INSERT INTO t VALUES (2, 'b')",
        "SELECT pg_logical_emit_message(false, 'cdc', 'not a fence')",
        "SELECT pg_logical_emit_message(true, 'cdc', '')",
        r"SELECT pg_logical_emit_message(true, 'binary', decode(repeat('00ff5c', 100000), 'hex')); "
        r"INSERT INTO t VALUES (3, 'c')",
    )
    connection = database.connect(autocommit=False)
    connection.execute("INSERT INTO t VALUES (4, 'aborted')")
    connection.execute("SELECT pg_logical_emit_message(false, 'cdc', 'arrives all the same')")
    connection.execute("SELECT pg_logical_emit_message(true, 'cdc', 'does not')")
    connection.rollback()
    connection.close()
    transactions(database, "INSERT INTO t VALUES (5, 'the last')")
    sync(database, lake)
    agree(database, lake, {"public.t": ["id"]})
    assert operations(lake, "public.t") == "III"


def test_truncates(database: Database, lake: Lake) -> None:
    """E1 to E4: one table, several in one message, cascades, and rows before and after within one transaction."""
    database.execute(
        """
        CREATE TABLE e1 (id int PRIMARY KEY, v text);
        CREATE TABLE e2a (id int PRIMARY KEY, v text);
        CREATE TABLE e2b (v text);
        CREATE TABLE e3 (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, v text);
        CREATE TABLE e3_child (id int PRIMARY KEY, parent int REFERENCES e3);
        CREATE TABLE e4 (id int PRIMARY KEY, v text);
        CREATE TABLE e4_full (id int, v text);
        ALTER TABLE e4_full REPLICA IDENTITY FULL;
        INSERT INTO e1 VALUES (1, 'a'), (2, 'b');
        INSERT INTO e2a VALUES (1, 'a');
        INSERT INTO e2b VALUES ('a'), ('a');
        INSERT INTO e3 (v) VALUES ('a'), ('b');
        INSERT INTO e3_child VALUES (1, 1);
        INSERT INTO e4 VALUES (1, 'a'), (2, 'b');
        INSERT INTO e4_full VALUES (1, 'a'), (1, 'a')
        """
    )
    keys = {"e1": ["id"], "e2a": ["id"], "e2b": [], "e3": ["id"], "e3_child": ["id"], "e4": ["id"], "e4_full": []}
    tables = {f"public.{name}": key for name, key in keys.items()}
    sync(database, lake)
    transactions(
        database,
        "TRUNCATE e1",
        "INSERT INTO e2a VALUES (2, 'b')",
        "TRUNCATE e2a, e2b",
        "INSERT INTO e2b VALUES ('after')",
        "TRUNCATE e3 RESTART IDENTITY CASCADE",
        "INSERT INTO e3 (v) VALUES ('first again')",
        "INSERT INTO e4 VALUES (3, 'c'); UPDATE e4 SET v = 'x'; TRUNCATE e4; "
        "INSERT INTO e4 VALUES (1, 'new'), (4, 'd')",
        "UPDATE e4 SET v = 'y' WHERE id = 1",
        "INSERT INTO e4_full VALUES (2, 'b'); TRUNCATE e4_full; INSERT INTO e4_full VALUES (1, 'a')",
        "UPDATE e4_full SET v = 'b'",
    )
    sync(database, lake)
    agree(database, lake, tables)
    assert operations(lake, "public.e4") == "IUUUTIIU"
    assert operations(lake, "public.e3_child") == "T"
    # twice in one transaction, twice in one batch, and as the last of a batch
    transactions(
        database,
        "TRUNCATE e1; INSERT INTO e1 VALUES (1, 'a'); TRUNCATE e1; INSERT INTO e1 VALUES (2, 'b')",
        "TRUNCATE e4",
        "INSERT INTO e4 VALUES (1, 'c')",
        "TRUNCATE e4",
    )
    sync(database, lake)
    agree(database, lake, tables)


@only_18
def test_a_truncate_ignores_the_row_filter(database: Database, lake: Lake) -> None:
    """E8, G1: of a publication that is not ours only the filtered rows come; a TRUNCATE takes them all."""
    database.execute(
        """
        CREATE TABLE t (id int PRIMARY KEY, v text);
        CREATE PUBLICATION theirs FOR TABLE t WHERE (id > 10);
        INSERT INTO t VALUES (1, 'hidden'), (11, 'seen'), (12, 'seen')
        """
    )
    sync(database, lake, publication="theirs")
    assert mirrored_rows(database, lake, "public.t") == source_rows(database, lake, "public.t", "id > 10")
    transactions(
        database,
        "INSERT INTO t VALUES (2, 'hidden'), (13, 'seen')",
        "UPDATE t SET id = 3 WHERE id = 11",  # leaves
        "UPDATE t SET id = 21 WHERE id = 1",  # enters
    )
    sync(database, lake, publication="theirs")
    assert mirrored_rows(database, lake, "public.t") == source_rows(database, lake, "public.t", "id > 10")
    assert operations(lake, "public.t") == "IDI"
    transactions(database, "TRUNCATE t", "INSERT INTO t VALUES (4, 'hidden'), (14, 'seen')")
    sync(database, lake, publication="theirs")
    assert (
        mirrored_rows(database, lake, "public.t")
        == source_rows(database, lake, "public.t", "id > 10")
        == Counter([(14, "seen")])
    )


SEED = 20240229

# statements with their weights; {a} and {b} are numbers below 12, {big} is NULL or a value out of line
STATEMENTS = {
    "INSERT INTO keyed VALUES ({a}, '{b}', {big})": 6,
    "UPDATE keyed SET v = v || '{b}' WHERE id = {a}": 4,
    "UPDATE keyed SET big = {big} WHERE id = {a}": 2,
    "UPDATE keyed SET id = {b} WHERE id = {a}": 4,
    "UPDATE keyed SET v = ''": 1,
    "DELETE FROM keyed WHERE id = {a}": 2,
    "INSERT INTO whole SELECT {a} % 3, 'w' FROM generate_series(0, {b} % 3)": 2,
    "UPDATE whole SET v = 'u{b}' WHERE ctid = (SELECT min(ctid) FROM whole WHERE a = {a} % 3)": 2,
    "DELETE FROM whole WHERE ctid = (SELECT max(ctid) FROM whole WHERE a = {a} % 3)": 2,
    "INSERT INTO bare VALUES ({a}, '{b}')": 2,
    "TRUNCATE keyed": 0.3,
    "TRUNCATE bare, whole": 0.3,
}


def workload(connection: psycopg.Connection[tuple[object, ...]], seed: int, count: int) -> None:
    """Run `count` random transactions, some of which are rolled back, over the tables keyed, whole and bare."""
    draw = random.Random(seed)
    for _ in range(count):
        with connection.transaction(force_rollback=draw.random() < 0.1):
            for (statement,) in (
                draw.choices([*STATEMENTS], [*STATEMENTS.values()]) for _ in range(draw.randrange(1, 7))
            ):
                a, b, big = draw.randrange(12), draw.randrange(12), draw.choice(["NULL", "repeat('x', 3000)"])
                # a key that is there already: the statement alone is undone
                with contextlib.suppress(psycopg.errors.UniqueViolation), connection.transaction():
                    connection.execute(statement.format(a=a, b=b, big=big).encode())


@only_18
def test_batches_make_no_difference(database: Database, lake: Lake) -> None:
    """L2: the same stream in batches of 1, 2, 7 and any number of changes makes the same tables and history."""
    database.execute(
        """
        CREATE TABLE keyed (id int PRIMARY KEY, v text, big text);
        ALTER TABLE keyed ALTER big SET STORAGE EXTERNAL;
        CREATE TABLE whole (a int, v text);
        ALTER TABLE whole REPLICA IDENTITY FULL;
        CREATE TABLE bare (a int, v text);
        INSERT INTO keyed SELECT i, 'v', repeat('x', 3000) FROM generate_series(0, 5) i;
        INSERT INTO whole VALUES (1, 'w'), (1, 'w')
        """
    )
    sizes = ("1", "2", "7", "100000")
    lakes = {size: Lake(lake.root / size, lake.root / size / "w.duckdb", lake.root / size / "h") for size in sizes}
    tables = {"public.keyed": ["id"], "public.whole": [], "public.bare": []}
    for size, other in lakes.items():
        other.root.mkdir()
        sync(database, other, slot=f"by_{size}")
    workload(database.connect(), SEED, 30)
    logs = {}
    for size, other in lakes.items():
        sync(database, other, slot=f"by_{size}", flush_rows=size)
        agree(database, other, tables)
        logs[size] = [
            log(
                other,
                table,
                "SELECT * REPLACE (_commit_ts::VARCHAR AS _commit_ts) FROM log WHERE _seq > 0 ORDER BY _lsn, _seq",
            )
            for table in tables
        ]
    assert len(logs["1"][0]) > 50
    assert all(logs[size] == logs["1"] for size in sizes)
    files = [warehouse_rows(other, "SELECT count(*) FROM _cdc.files")[0] for other in lakes.values()]
    assert files == sorted(files, reverse=True)
    assert len(set(files)) == len(sizes)  # the batches did differ


@only_18
def test_readers_see_whole_transactions(database: Database, lake: Lake) -> None:
    """L4: who opens the warehouse while it is written sees all of a transaction over several tables, or nothing."""
    database.execute(
        "".join(
            f"CREATE TABLE {n} (id int PRIMARY KEY, n int); INSERT INTO {n} SELECT i, 0 FROM generate_series(1, 20) i;"
            for n in "abc"
        )
    )
    query = "SELECT DISTINCT n FROM (FROM public.a UNION ALL FROM public.b UNION ALL FROM public.c)"
    reads = 0
    with Consumer(lake, database.dsn, flush_rows="7", flush_interval="20ms") as consumer:
        until(lambda: states(lake) == dict.fromkeys(["public.a", "public.b", "public.c"], "streaming"))
        for number in range(1, 9):
            database.execute("".join(f"UPDATE {n} SET n = {number};" for n in "abc"))
            seen: set[tuple[object, ...]] = set()

            def arrived(number: int = number, seen: set[tuple[object, ...]] = seen) -> bool:
                nonlocal reads
                found = warehouse_rows(lake, query)
                reads += 1
                assert len(found) == 1, f"a reader saw {found} at once"
                seen.update(found)
                return found == [(number,)]

            until(arrived)
            assert seen <= {(number - 1,), (number,)}
        assert consumer.running
    assert reads >= 8
    ((pieces,),) = warehouse_rows(
        lake, "SELECT max(n) FROM (SELECT count(*) AS n FROM _cdc.files WHERE table_name = 'a' GROUP BY last_lsn)"
    )
    assert pieces > 1  # the transactions did come in pieces


@only_18
def test_readers_get_in_while_the_consumer_is_far_behind(database: Database, lake: Lake) -> None:
    """L4: a consumer that is never idle lets go of the warehouse now and then."""
    rows = 4000
    database.execute("CREATE TABLE t (id int PRIMARY KEY)")
    sync(database, lake)
    database.execute(f"DO 'BEGIN FOR i IN 1..{rows} LOOP INSERT INTO t VALUES (i); COMMIT; END LOOP; END'")
    seen: list[int] = []

    def half_way() -> bool:
        ((count,),) = warehouse_rows(lake, "SELECT count(*) FROM public.t")
        seen.append(count)
        return bool(0 < count < rows)

    with Consumer(lake, database.dsn, flush_rows="1") as consumer:
        until(half_way, 30, "a reader to see a part of what is there")
        assert consumer.running
        consumer.kill()
    assert seen[-1] < rows


@only_18
def test_a_column_called_rowid(database: Database, lake: Lake) -> None:
    """C10, B3: a column that hides DuckDB's own row numbers must not decide which row a delete takes."""
    database.execute(
        """
        CREATE TABLE keyed ("RowID" int PRIMARY KEY, v text);
        CREATE TABLE whole (rowid int, v text);
        ALTER TABLE whole REPLICA IDENTITY FULL;
        INSERT INTO keyed VALUES (1, 'a'), (2, 'b');
        INSERT INTO whole VALUES (1, 'a'), (1, 'a'), (1, 'b'), (NULL, 'c')
        """
    )
    sync(database, lake)
    transactions(
        database,
        'UPDATE keyed SET v = \'c\' WHERE "RowID" = 1; DELETE FROM keyed WHERE "RowID" = 2',
        "DELETE FROM whole WHERE ctid = (SELECT min(ctid) FROM whole)",
        "UPDATE whole SET v = 'd' WHERE rowid IS NULL",
    )
    sync(database, lake)
    tables = {"public.keyed": ["RowID"], "public.whole": []}
    agree(database, lake, tables)
    first = copies(lake)
    transactions(database, "DELETE FROM whole WHERE rowid = 1 AND v = 'a'", "INSERT INTO whole VALUES (7, 'e')")
    sync(database, lake)
    agree(database, lake, tables)
    assert copies(lake) == first


@only_18
def test_half_a_transaction_is_never_there(database: Database, lake: Lake) -> None:
    """L4, C17: a consumer that dies within a transaction in pieces leaves none of it in table or history."""
    database.execute(
        "".join(
            f"CREATE TABLE {n} (id int PRIMARY KEY, n int); INSERT INTO {n} SELECT i, 0 FROM generate_series(1, 20) i;"
            for n in "abc"
        )
    )
    sync(database, lake)
    database.execute("".join(f"UPDATE {n} SET n = 1;" for n in "abc"))
    for nth in (1, 5):
        died = run_cdc(lake, database.dsn, "run", "--once", flush_rows="7", crash_at=f"mid_txn:{nth}")
        assert died.returncode == -signal.SIGKILL  # it died between two pieces
        for n in "abc":
            assert warehouse_rows(lake, f"SELECT DISTINCT n FROM public.{n}") == [(0,)]
            assert operations(lake, f"public.{n}") == ""
    sync(database, lake)
    agree(database, lake, {f"public.{n}": ["id"] for n in "abc"})
    assert operations(lake, "public.c") == "U" * 20
