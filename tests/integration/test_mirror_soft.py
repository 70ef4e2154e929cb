"""CDC_DELETES=soft: deleted rows stay with their last values and the time of their deletion."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from tests.conftest import Database, Lake
from tests.integration.copies import SOME_BYTES, await_states, settle
from tests.integration.gate import Gate
from tests.integration.steps import copies, log, quarantine, sync, table_state, transactions
from tests.mirror import (
    Consumer,
    differences,
    mirrored_rows,
    one_look,
    replayed,
    run_cdc,
    source_rows,
    until,
    warehouse_rows,
)


def living(database: Database, lake: Lake, *tables: str) -> None:
    """Assert that the rows without a time of deletion are those that Postgres has."""
    with one_look(lake):
        for table in tables:
            here = mirrored_rows(database, lake, table, "_deleted_at IS NULL")
            assert here == source_rows(database, lake, table), table


def deleted(lake: Lake, table: str, columns: str = "id, v") -> list[tuple[Any, ...]]:
    """Return the rows that are marked as deleted."""
    return warehouse_rows(lake, f"SELECT {columns} FROM {table} WHERE _deleted_at IS NOT NULL ORDER BY ALL")


def test_deleted_rows_stay(database: Database, lake: Lake) -> None:
    """L1: marked with the time of the commit, values kept, cleared when they come back; over batches and in one."""
    database.execute(
        "CREATE TABLE t (id int PRIMARY KEY, v text, n int); "
        "INSERT INTO t SELECT i, 'v' || i, i FROM generate_series(1, 12) i"
    )
    sync(database, lake, deletes="soft")
    living(database, lake, "public.t")
    assert deleted(lake, "public.t") == []
    transactions(
        database,
        "DELETE FROM t WHERE id = 1",
        "UPDATE t SET v = 'last' WHERE id = 2; DELETE FROM t WHERE id = 2",
        "DELETE FROM t WHERE id = 3; INSERT INTO t VALUES (3, 'again', 0)",
        "INSERT INTO t VALUES (20, 'short', 0); UPDATE t SET v = 'short life' WHERE id = 20; "
        "DELETE FROM t WHERE id = 20",
        "UPDATE t SET id = 104 WHERE id = 4",
        "UPDATE t SET id = 105 WHERE id = 5; UPDATE t SET id = 205 WHERE id = 105; DELETE FROM t WHERE id = 205",
        "UPDATE t SET id = 106 WHERE id = 6; INSERT INTO t VALUES (6, 'another', 0)",
        "DELETE FROM t WHERE id = 7",
        "INSERT INTO t VALUES (7, 'once more', 0)",
        "DELETE FROM t WHERE id = 7",
    )
    sync(database, lake, deletes="soft")
    living(database, lake, "public.t")
    gone = [
        (1, "v1"),
        (2, "last"),
        (4, "v4"),
        (5, "v5"),
        (7, "once more"),
        (20, "short life"),
        (105, "v5"),
        (205, "v5"),
    ]
    assert deleted(lake, "public.t") == gone
    # the time is that of the transaction that deleted the row
    commits = log(lake, "public.t", "SELECT id, max(_commit_ts)::VARCHAR FROM log WHERE _op = 'D' GROUP BY id")
    stamps = deleted(lake, "public.t", "id, _deleted_at::VARCHAR")
    assert stamps == [(key, dict(commits)[key]) for key, _ in gone]
    # later: a deleted row comes back, one that came back goes, and other rows take keys that are marked
    transactions(
        database,
        "INSERT INTO t VALUES (1, 'back', 1), (20, 'back', 20)",
        "DELETE FROM t WHERE id = 3",
        "UPDATE t SET id = 4 WHERE id = 104",
        "UPDATE t SET id = 2 WHERE id = 8",
        "INSERT INTO t VALUES (205, 'back', 0); DELETE FROM t WHERE id = 205",
    )
    sync(database, lake, deletes="soft")
    living(database, lake, "public.t")
    assert deleted(lake, "public.t") == [
        (3, "again"),
        (5, "v5"),
        (7, "once more"),
        (8, "v8"),
        (104, "v4"),
        (105, "v5"),
        (205, "back"),
    ]
    assert len(warehouse_rows(lake, "SELECT id FROM public.t GROUP BY id HAVING count(*) > 1")) == 0
    assert replayed(database, lake, "public.t", ["id"]) == source_rows(database, lake, "public.t")


def test_truncate_marks_all(database: Database, lake: Lake) -> None:
    """E7, E4: a TRUNCATE marks what lives, leaves older marks alone, and rows that follow in its transaction live."""
    database.execute(
        """
        CREATE TABLE t (id int PRIMARY KEY, v text);
        CREATE TABLE bare (v text);
        INSERT INTO t SELECT i, 'v' || i FROM generate_series(1, 4) i;
        INSERT INTO bare VALUES ('a'), ('a')
        """
    )
    sync(database, lake, deletes="soft")
    transactions(database, "DELETE FROM t WHERE id = 1")
    sync(database, lake, deletes="soft")
    ((before,),) = deleted(lake, "public.t", "_deleted_at::VARCHAR")
    transactions(
        database,
        "INSERT INTO t VALUES (5, 'in between'); UPDATE t SET v = 'changed' WHERE id = 2; TRUNCATE t, bare; "
        "INSERT INTO t VALUES (3, 'new'), (6, 'v6'); INSERT INTO bare VALUES ('b')",
        "DELETE FROM t WHERE id = 6",
    )
    sync(database, lake, deletes="soft")
    living(database, lake, "public.t", "public.bare")
    assert deleted(lake, "public.t") == [(1, "v1"), (2, "changed"), (4, "v4"), (5, "in between"), (6, "v6")]
    assert deleted(lake, "public.bare", "v") == [("a",), ("a",)]
    assert deleted(lake, "public.t", "_deleted_at::VARCHAR, id")[0] == (before, 1)
    ((emptied,),) = log(lake, "public.t", "SELECT _commit_ts::VARCHAR FROM log WHERE _op = 'T' AND _seq > 0")
    assert {(emptied,)} == set(warehouse_rows(lake, "SELECT _deleted_at::VARCHAR FROM public.t WHERE id IN (2, 4, 5)"))
    transactions(database, "TRUNCATE t, bare")
    sync(database, lake, deletes="soft")
    living(database, lake, "public.t", "public.bare")
    assert len(deleted(lake, "public.t")) == 6


def test_values_out_of_line_are_kept(database: Database, lake: Lake) -> None:
    """L1, D1, D2: the last values of a deleted row are whole, and so is a row that moves away from a marked key."""
    database.execute(
        """
        CREATE TABLE t (id int PRIMARY KEY, v text, big text);
        ALTER TABLE t ALTER big SET STORAGE EXTERNAL;
        INSERT INTO t SELECT i, 'v', repeat('x', 3000) || i FROM generate_series(1, 6) i
        """
    )
    sync(database, lake, deletes="soft")
    transactions(
        database,
        "UPDATE t SET v = 'last' WHERE id = 1; DELETE FROM t WHERE id = 1",
        "DELETE FROM t WHERE id = 2",
        "UPDATE t SET id = 2 WHERE id = 3",  # takes a marked key, its value comes from its own old one
        "UPDATE t SET id = 104, v = 'moved' WHERE id = 4; DELETE FROM t WHERE id = 104",
        "UPDATE t SET v = 'changed' WHERE id = 5",
    )
    sync(database, lake, deletes="soft")
    living(database, lake, "public.t")
    assert deleted(lake, "public.t", "id, v, right(big, 1), length(big)") == [
        (1, "last", "1", 3001),
        (3, "v", "3", 3001),
        (4, "v", "4", 3001),
        (104, "moved", "4", 3001),
    ]
    transactions(database, "UPDATE t SET id = 3, v = 'on' WHERE id = 2", "UPDATE t SET v = 'there' WHERE id = 3")
    sync(database, lake, deletes="soft")
    living(database, lake, "public.t")
    assert deleted(lake, "public.t", "id, right(big, 1)") == [(1, "1"), (2, "3"), (4, "4"), (104, "4")]


def test_whole_rows(database: Database, lake: Lake) -> None:
    """L1, C10: under FULL one of several equal rows is marked; a changed row leaves its old self, marked."""
    database.execute(
        """
        CREATE TABLE t (id int, v text);
        ALTER TABLE t REPLICA IDENTITY FULL;
        INSERT INTO t VALUES (1, 'a'), (1, 'a'), (1, 'a'), (2, NULL), (2, NULL), (3, 'c')
        """
    )
    sync(database, lake, deletes="soft")
    transactions(
        database,
        "DELETE FROM t WHERE ctid = (SELECT min(ctid) FROM t WHERE id = 1)",
        "DELETE FROM t WHERE ctid = (SELECT min(ctid) FROM t WHERE id = 2)",
        "UPDATE t SET v = 'd' WHERE id = 3",
        "INSERT INTO t VALUES (4, 'e'); DELETE FROM t WHERE id = 4",
    )
    sync(database, lake, deletes="soft")
    living(database, lake, "public.t")
    assert deleted(lake, "public.t") == [(1, "a"), (2, None), (3, "c"), (4, "e")]
    transactions(database, "DELETE FROM t WHERE id IN (1, 2)", "INSERT INTO t VALUES (1, 'a')")
    sync(database, lake, deletes="soft")
    living(database, lake, "public.t")
    assert deleted(lake, "public.t") == [(1, "a"), (1, "a"), (1, "a"), (2, None), (2, None), (3, "c"), (4, "e")]


def test_columns_come_and_go(database: Database, lake: Lake) -> None:
    """L1, H1: an added column and a dropped one; marked rows have the default too, as they had when they lived."""
    database.execute(
        "CREATE TABLE t (id int PRIMARY KEY, v text, old int); "
        "INSERT INTO t SELECT i, 'v' || i, i FROM generate_series(1, 4) i"
    )
    sync(database, lake, deletes="soft")
    first = copies(lake)
    transactions(
        database,
        "DELETE FROM t WHERE id = 1",
        "ALTER TABLE t ADD COLUMN n int DEFAULT 7, DROP COLUMN old",
        "DELETE FROM t WHERE id = 2",
        "UPDATE t SET n = 8 WHERE id = 3",
        "INSERT INTO t VALUES (1, 'back', 1)",
    )
    sync(database, lake, deletes="soft")
    assert copies(lake) == first
    living(database, lake, "public.t")
    assert deleted(lake, "public.t", "id, v, n") == [(2, "v2", 7)]


def test_a_new_copy_keeps_them(database: Database, lake: Lake) -> None:
    """L1: a resync carries marked rows over, and marks what was deleted while nobody followed the table."""
    database.execute(
        """
        CREATE TABLE t (id int PRIMARY KEY, v text);
        CREATE TABLE whole (id int, v text);
        ALTER TABLE whole REPLICA IDENTITY FULL;
        INSERT INTO t SELECT i, 'v' || i FROM generate_series(1, 6) i;
        INSERT INTO whole SELECT i, 'v' || i FROM generate_series(1, 3) i
        """
    )
    sync(database, lake, deletes="soft")
    transactions(database, "DELETE FROM t WHERE id = 1", "DELETE FROM whole WHERE id = 1")
    sync(database, lake, deletes="soft")
    stamps = deleted(lake, "public.t", "id, _deleted_at::VARCHAR")
    # a type change, which needs a new copy; rows go before it and behind it in the same batch
    transactions(
        database,
        "DELETE FROM t WHERE id = 2",
        "ALTER TABLE t ALTER v TYPE varchar(50); DELETE FROM t WHERE id = 3; INSERT INTO t VALUES (1, 'back')",
        "UPDATE t SET v = 'w' WHERE id = 4",
    )
    first = copies(lake)
    sync(database, lake, deletes="soft")
    assert copies(lake)["public.t"] > first["public.t"]
    living(database, lake, "public.t", "public.whole")
    assert deleted(lake, "public.t") == [(2, "v2"), (3, "v3")]
    done = run_cdc(lake, database.dsn, "resync", "--all")
    assert done.returncode == 0, done.stderr
    transactions(database, "DELETE FROM t WHERE id = 6", "DELETE FROM whole WHERE id = 2")
    before = copies(lake)
    sync(database, lake, deletes="soft")
    assert all(lsn > before[table] for table, lsn in copies(lake).items())
    living(database, lake, "public.t", "public.whole")
    assert deleted(lake, "public.t") == [(2, "v2"), (3, "v3"), (6, "v6")]
    assert deleted(lake, "public.whole") == [(1, "v1"), (2, "v2")]
    assert stamps[0][0] == 1  # the row that came back is marked no more
    assert table_state(lake, "public.t") == ("streaming", "")


def test_changing_the_setting(database: Database, lake: Lake) -> None:
    """Design: a warehouse of hard deletes refuses soft ones, and says what to do, which works, there and back."""
    database.execute("CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (1, 'a'), (2, 'b')")
    sync(database, lake)
    refused = run_cdc(lake, database.dsn, "run", "--once", deletes="soft")
    assert refused.returncode == 2
    assert "CDC_DELETES is soft, but table public.t was copied with hard" in refused.stderr
    assert "cdc resync --all" in refused.stderr
    assert run_cdc(lake, database.dsn, "resync", "--all", deletes="soft").returncode == 0
    transactions(database, "DELETE FROM t WHERE id = 1")
    sync(database, lake, deletes="soft")
    transactions(database, "DELETE FROM t WHERE id = 2")
    sync(database, lake, deletes="soft")
    living(database, lake, "public.t")
    assert (2, "b") in deleted(lake, "public.t")
    assert run_cdc(lake, database.dsn, "resync", "--all").returncode == 0
    transactions(database, "INSERT INTO t VALUES (3, 'c')")
    sync(database, lake)
    assert differences(database, lake, "public.t", ["id"]) == ""


def test_a_column_of_that_name(database: Database, lake: Lake) -> None:
    """B3: a column called _deleted_at is one of many with hard deletes; with soft ones it has a number behind it."""
    database.execute("CREATE TABLE t (id int PRIMARY KEY, _deleted_at text)")
    sync(database, lake, deletes="soft")
    transactions(database, "INSERT INTO t VALUES (1, 'x'), (2, 'y')", "DELETE FROM t WHERE id = 2")
    sync(database, lake, deletes="soft")
    living(database, lake, "public.t")
    found = warehouse_rows(lake, "SELECT id, _deleted_at_2, _deleted_at IS NULL FROM public.t ORDER BY id")
    assert found == [(1, "x", True), (2, "y", False)]
    hard = Lake(lake.root / "hard", lake.root / "hard" / "w.duckdb", lake.root / "hard" / "h")
    hard.root.mkdir()
    sync(database, hard, slot="hard")
    transactions(database, "UPDATE t SET _deleted_at = 'y'")
    sync(database, hard, slot="hard")
    assert differences(database, hard, "public.t", ["id"]) == ""


def test_tombstones_of_columns_that_are_held_otherwise(database: Database, lake: Lake) -> None:
    """L1: of a row that is deleted each value is carried as its column's new type has it, or goes into quarantine."""
    database.execute(
        "CREATE TABLE t (id int PRIMARY KEY, n numeric, u uuid, l text, i int);"
        "INSERT INTO t VALUES (1, 1.50, NULL, '{1,2}', 7), (2, 'NaN', gen_random_uuid(), 'x', 8);"
        "INSERT INTO t VALUES (3, 3.00, NULL, NULL, 9)"
    )
    sync(database, lake, deletes="soft")
    transactions(database, "DELETE FROM t WHERE id < 3")
    sync(database, lake, deletes="soft")
    transactions(
        database,
        "ALTER TABLE t ALTER l TYPE int[] USING NULL, ALTER i TYPE bigint",
        "ALTER TABLE t RENAME i TO j; ALTER TABLE t RENAME n TO i; INSERT INTO t VALUES (4, 4.00, NULL, '{4}', 4)",
    )
    sync(database, lake, deletes="soft", types="public.t.i:DECIMAL(10,2),public.t.u:VARCHAR")
    living(database, lake, "public.t")
    found = warehouse_rows(
        lake, "SELECT id, i, u IS NULL, l, j FROM public.t WHERE _deleted_at IS NOT NULL ORDER BY id"
    )
    assert found == [(1, Decimal("1.50"), True, [1, 2], 7), (2, None, False, None, 8)]
    kept = set(quarantine(lake, "public.t"))  # of rows that hold it no more
    assert kept == {("i", '{"id": "2"}', "NaN", False), ("l", '{"id": "2"}', "x", False)}


def test_tombstones_do_not_keep_a_table_from_its_copy(database: Database, lake: Lake) -> None:
    """L1, H4: what json and uuid refuse, in rows that are gone and in rows that were mended before the ALTER."""
    database.execute(
        "CREATE TABLE t (id int PRIMARY KEY, j text, u text);"
        "INSERT INTO t VALUES (1, 'hello', 'x'), (2, 'hello', gen_random_uuid()), (3, '{}', NULL)"
    )
    sync(database, lake, deletes="soft")
    transactions(
        database,
        "DELETE FROM t WHERE id = 1",
        "ALTER TABLE t ALTER j TYPE json USING CASE WHEN j = 'hello' THEN to_json(j) ELSE j::json END, "
        "ALTER u TYPE uuid USING u::uuid; UPDATE t SET j = '[]' WHERE id = 3",
    )
    sync(database, lake, deletes="soft")
    living(database, lake, "public.t")
    assert deleted(lake, "public.t", "id, j, u") == [(1, None, None)]
    assert table_state(lake, "public.t") == ("streaming", "")


def test_rows_without_a_key_that_go_while_their_table_is_copied_anew(database: Database, lake: Lake) -> None:
    """L1, C7, K9: those that the copy has alive, and the stream deletes behind it, are marked once."""
    database.execute(
        "CREATE TABLE t (id int, pad text); ALTER TABLE t REPLICA IDENTITY FULL;"
        "INSERT INTO t SELECT i, repeat(md5(i::text), 3) FROM generate_series(1, 5000) AS i"
    )
    sync(database, lake, deletes="soft")
    transactions(database, "DELETE FROM t WHERE id = 1")
    with Gate(database.dsn) as gate, Consumer(lake, gate.dsn, deletes="soft") as consumer:
        settle(consumer, database, lake)
        gate.hold_rows(SOME_BYTES)
        assert run_cdc(lake, database.dsn, "resync", "--all", deletes="soft").returncode == 0
        until(lambda: gate.waiting, what="the copy to be under way")
        transactions(database, "DELETE FROM t WHERE id IN (2, 3)")
        until(lambda: len(deleted(lake, "public.t", "id")) == 3)
        gate.open()
        await_states(consumer, lake, "streaming", "public.t")
        settle(consumer, database, lake)
        assert consumer.stop() == 0
    living(database, lake, "public.t")
    assert deleted(lake, "public.t", "id") == [(1,), (2,), (3,)]


def test_tombstones_of_a_key_that_becomes_text(database: Database, lake: Lake) -> None:
    """L1, C7: who is alive is not doubled, and who was deleted stays so."""
    database.execute(
        "CREATE TABLE t (k int[], n numeric(5,0), v text, PRIMARY KEY (k, n));"
        "INSERT INTO t VALUES ('{1}', 1, 'a'), ('{1,2}', 2, 'b'), ('{}', 3, 'c')"
    )
    sync(database, lake, deletes="soft")
    transactions(database, "DELETE FROM t WHERE v = 'b'", "UPDATE t SET v = 'd' WHERE k = '{}'")
    sync(database, lake, deletes="soft")
    transactions(database, "INSERT INTO t VALUES ('{}', 'NaN', 'e')")
    sync(database, lake, deletes="soft")
    living(database, lake, "public.t")
    found = warehouse_rows(lake, "SELECT k, n, v, _deleted_at IS NULL FROM public.t ORDER BY v")
    assert found == [([1], "1", "a", True), ([1, 2], "2", "b", False), ([], "3", "d", True), ([], "NaN", "e", True)]


def test_keys_that_are_equal_and_print_otherwise(database: Database, lake: Lake) -> None:
    """C5, C7: 1 mon is 30 days to Postgres and DuckDB; the row that has the key now is alive."""
    database.execute("CREATE TABLE t (k interval PRIMARY KEY, v int); INSERT INTO t VALUES ('1 mon', 1), ('1 day', 2)")
    sync(database, lake, deletes="soft")
    transactions(database, "UPDATE t SET k = '30 days' WHERE k = '1 mon'; DELETE FROM t WHERE k = '24:00'")
    sync(database, lake, deletes="soft")
    living(database, lake, "public.t")
    rows = warehouse_rows(lake, "SELECT k::VARCHAR, v, _deleted_at IS NULL FROM public.t ORDER BY v")
    assert rows == [("30 days", 1, True), ("1 day", 2, False)]


def test_a_column_that_was_called_as_ours(database: Database, lake: Lake) -> None:
    """B3: from hard to soft deletes it gets another name, and is not taken for the time of a deletion."""
    database.execute(
        "CREATE TABLE t (id int PRIMARY KEY, _deleted_at timestamptz);"
        "INSERT INTO t VALUES (1, '2024-02-29 12:00+00'), (2, NULL)"
    )
    sync(database, lake)
    assert run_cdc(lake, database.dsn, "resync", "--all", deletes="soft").returncode == 0
    transactions(database, "DELETE FROM t WHERE id = 2")
    sync(database, lake, deletes="soft")
    living(database, lake, "public.t")
    assert warehouse_rows(lake, "SELECT id, _deleted_at IS NULL FROM public.t") == [(1, True)]


def test_a_change_log_that_comes_later(database: Database, lake: Lake) -> None:
    """B3: a column called as one of the log's own gets another name before anything is written there."""
    database.execute("CREATE TABLE t (id int PRIMARY KEY, _lsn int); INSERT INTO t VALUES (1, 1)")
    sync(database, lake, history="")
    assert warehouse_rows(lake, "SELECT _lsn FROM public.t") == [(1,)]
    transactions(database, "UPDATE t SET _lsn = 2", "INSERT INTO t VALUES (2, 2)")
    sync(database, lake)
    assert differences(database, lake, "public.t", ["id"]) == ""
    assert warehouse_rows(lake, "SELECT id, _lsn_2 FROM public.t ORDER BY id") == [(1, 2), (2, 2)]
