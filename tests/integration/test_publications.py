"""Publications: filters, lists, several at once, less than everything; and such as are altered under us."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest
from psycopg.conninfo import make_conninfo

from cdc.sink.warehouse import quote
from tests.conftest import Database, Lake
from tests.integration.copies import await_states, copy_lsns, equal, settle
from tests.integration.refusals import call, refused
from tests.integration.steps import agree, copies, log, operations, sync, table_state, transactions
from tests.mirror import Consumer, mirrored_rows, replayed, run_cdc, source_rows, states, until, warehouse_rows

only_18 = pytest.mark.parametrize("server", [18], indirect=True, ids=["pg18"])

T = (
    "CREATE TABLE t (id int PRIMARY KEY, v int, note text);"
    "INSERT INTO t SELECT i, i, 'n' FROM generate_series(1, 20) AS i;"
)


def filtered(database: Database, lake: Lake, table: str, where: str, key: list[str]) -> None:
    """Assert that warehouse and history have those rows of a table that meet a condition."""
    wanted = source_rows(database, lake, table, where)
    assert mirrored_rows(database, lake, table) == wanted
    assert replayed(database, lake, table, key) == wanted
    assert states(lake)[table] == "streaming"


def newest(lake: Lake, table: str, columns: str) -> list[tuple[Any, ...]]:
    """Return columns of the newest row of each id, as the history tells them since the newest copy; no TRUNCATE."""
    return log(
        lake,
        table,
        f"SELECT {columns} FROM log, (SELECT max(_lsn) AS l FROM log WHERE _op = 'T' AND _seq < 0) "
        "WHERE _op <> 'T' AND (_lsn = l AND _seq < 0 OR _lsn >= l AND _seq > 0) "
        "QUALIFY row_number() OVER (PARTITION BY id ORDER BY _lsn DESC, _seq DESC) = 1 AND _op <> 'D' ORDER BY id",
    )


# What others publish


def test_row_filters(database: Database, lake: Lake) -> None:
    """G1: the copy honours the filter; an UPDATE is an I, a D, a U or nothing by where the row was and is."""
    database.execute(
        """
        CREATE TABLE keyed (id int PRIMARY KEY, v text);
        CREATE TABLE whole (a int, v text);
        ALTER TABLE whole REPLICA IDENTITY FULL;
        INSERT INTO keyed SELECT i, 'v' FROM generate_series(1, 20) AS i;
        INSERT INTO whole SELECT i / 2, CASE WHEN i % 3 > 0 THEN 'v' END FROM generate_series(1, 20) AS i;
        CREATE PUBLICATION mine FOR TABLE keyed WHERE (id > 10), whole WHERE (a > 5 AND v IS NOT NULL)
        """
    )
    for _ in range(2):
        sync(database, lake, publication="mine")
        filtered(database, lake, "public.keyed", "id > 10", ["id"])
        filtered(database, lake, "public.whole", "a > 5 AND v IS NOT NULL", [])
        transactions(
            database,
            "UPDATE keyed SET v = v || '!' WHERE id IN (1, 11)",
            "UPDATE keyed SET id = id + 100 WHERE id IN (2, 12)",
            "UPDATE keyed SET id = -id WHERE id IN (3, 13)",
            "INSERT INTO keyed VALUES (0, 'out'), (50, 'in'); DELETE FROM keyed WHERE id IN (4, 14)",
            "UPDATE whole SET v = NULL WHERE a = 6; UPDATE whole SET v = 'w' WHERE v IS NULL AND a > 7",
            "UPDATE whole SET a = a + 5 WHERE a BETWEEN 2 AND 4; DELETE FROM whole WHERE a = 9",
            "INSERT INTO whole VALUES (6, 'x'), (6, 'x'), (1, 'x')",
        )
        database.execute("DELETE FROM keyed WHERE id IN (0, 50)")
    assert operations(lake, "public.keyed", "id = 102") == "I"
    assert operations(lake, "public.keyed", "id = 13") == "D"
    assert operations(lake, "public.keyed", "id IN (1, 3)") == ""


@only_18
def test_row_filters_of_partitions(database: Database, lake: Lake) -> None:
    """G1, F2: the root's filter is for all its leaves; leaf by leaf, each has its own."""
    database.execute(
        """
        CREATE TABLE root (id int PRIMARY KEY, v text) PARTITION BY RANGE (id);
        CREATE TABLE low PARTITION OF root FOR VALUES FROM (0) TO (10);
        CREATE TABLE high PARTITION OF root FOR VALUES FROM (10) TO (100);
        INSERT INTO root SELECT i, 'v' FROM generate_series(1, 20) AS i;
        CREATE PUBLICATION rooted FOR TABLE root WHERE (id > 5), low WHERE (id > 8)
        WITH (publish_via_partition_root = true);
        CREATE PUBLICATION mine FOR TABLE root, low WHERE (id > 5)
        """
    )
    leaves = Lake(lake.root / "leaves", lake.root / "leaves" / "w.duckdb", lake.root / "leaves" / "h")
    leaves.root.mkdir()
    for _ in range(2):
        sync(database, lake, publication="rooted")
        sync(database, leaves, publication="mine", slot="leaves")
        filtered(database, lake, "public.root", "id > 5", ["id"])
        filtered(database, leaves, "public.low", "id > 5", ["id"])
        filtered(database, leaves, "public.high", "true", ["id"])
        transactions(
            database,
            "UPDATE root SET id = id + 20 WHERE id IN (1, 7, 11)",
            "UPDATE root SET id = 0 WHERE id = 12; UPDATE root SET v = 'w'",
            "DELETE FROM root WHERE id IN (4, 6, 8, 13); UPDATE root SET id = 6 WHERE id = 2",
        )
    assert states(lake) == {"public.root": "streaming"}


def test_column_lists(database: Database, lake: Lake) -> None:
    """G2: copy and stream have the columns that are listed; an update of another one changes nothing."""
    database.execute(T)
    database.execute(
        "ALTER TABLE t ADD twice int GENERATED ALWAYS AS (v * 2) STORED; CREATE PUBLICATION mine FOR TABLE t (note, id)"
    )
    sync(database, lake, publication="mine")
    transactions(
        database,
        "UPDATE t SET v = -v",
        "UPDATE t SET note = 'm', v = 0 WHERE id = 3; UPDATE t SET id = 100 WHERE id = 4; DELETE FROM t WHERE id = 5",
        "INSERT INTO t VALUES (200, 1, 'new')",
        "ALTER TABLE t DROP COLUMN twice, ADD COLUMN later int DEFAULT 7",
        "UPDATE t SET later = 8 WHERE id = 6",
    )
    sync(database, lake, publication="mine")
    wanted = database.execute("SELECT id, note FROM t ORDER BY id")
    assert warehouse_rows(lake, "FROM public.t ORDER BY id") == wanted
    assert newest(lake, "public.t", "id, note") == wanted
    assert operations(lake, "public.t", "id = 1") == "U"
    assert states(lake) == {"public.t": "streaming"}


def test_overlapping_publications(database: Database, lake: Lake) -> None:
    """G1, G3: a row comes if either of two lets it; names need quotes; a table in both is one."""
    name = "We\"ird, it's \\ % été"
    first, second = quote(name), quote(f"{name}_append")
    database.execute(T)
    database.execute("CREATE TABLE plain (id int PRIMARY KEY); CREATE TABLE bare (x int); INSERT INTO bare VALUES (1)")
    database.connect().execute(f"CREATE PUBLICATION {first} FOR TABLE t WHERE (id < 5), plain".encode())
    database.connect().execute(
        f"CREATE PUBLICATION {second} FOR TABLE t WHERE (id BETWEEN 3 AND 9), plain, ONLY bare".encode()
    )
    for _ in range(2):
        sync(database, lake, publication=name)
        filtered(database, lake, "public.t", "id < 10", ["id"])
        transactions(
            database,
            "UPDATE t SET v = v + 1",
            "UPDATE t SET id = 50 WHERE id = 2; UPDATE t SET id = 2 WHERE id = 20; DELETE FROM t WHERE id IN (4, 9)",
            "INSERT INTO plain SELECT max(id) + 1 FROM t; INSERT INTO bare VALUES (2)",
            "INSERT INTO t VALUES (20, 1, 'again'), (4, 1, 'again')",
            "UPDATE t SET id = 1000 + v WHERE id = 50",
        )
    sync(database, lake, publication=name)
    agree(database, lake, {"public.plain": ["id"], "public.bare": []})
    done = call(lake, database.dsn, "check", publication=name)
    assert f"note: publication {name} publishes public.plain, public.t" in done.stdout


@only_18
def test_our_publications_by_a_name_that_needs_quotes(database: Database, lake: Lake) -> None:
    """G3: made, used, added to and put right by that name."""
    name = 'Ours, "it\'s"'
    database.execute(T)
    sync(database, lake, publication=name)
    database.execute("CREATE TABLE later (x int); INSERT INTO later VALUES (1), (1); UPDATE t SET v = 0 WHERE id = 1")
    database.connect().execute(f"ALTER PUBLICATION {quote(name)} SET (publish = 'delete')".encode())
    database.execute("UPDATE t SET v = 0 WHERE id = 2")
    sync(database, lake, publication=name)
    agree(database, lake, {"public.t": ["id"], "public.later": []})
    assert options(database, name) == ("iudt", True)


@only_18
def test_different_lists_in_two_publications(database: Database, lake: Lake) -> None:
    """G2, G3: the server would end the stream at the first change: refused before anything is made."""
    database.execute(T)
    database.execute(
        "CREATE PUBLICATION mine FOR TABLE t (id, v); CREATE PUBLICATION mine_append FOR TABLE t (id, note)"
    )
    error, hint = refused(call(lake, database.dsn, "run", "--once", publication="mine"))
    assert error == "publications mine and mine_append publish different columns of table public.t"
    assert "column list" in hint
    assert database.execute("SELECT count(*) FROM pg_replication_slots WHERE database = current_database()") == [(0,)]
    assert error in call(lake, database.dsn, "check", publication="mine").stdout
    database.execute("ALTER PUBLICATION mine_append SET TABLE t (id, v)")
    sync(database, lake, publication="mine")
    database.execute("UPDATE t SET v = 0, note = 'm' WHERE id = 1")
    sync(database, lake, publication="mine")
    assert warehouse_rows(lake, "FROM public.t ORDER BY id") == database.execute("SELECT id, v FROM t ORDER BY id")
    # and when it comes to that later, the stream says so
    database.execute("ALTER PUBLICATION mine_append SET TABLE t")
    error, _ = refused(call(lake, database.dsn, "run", "--once", publication="mine"))
    assert "different columns" in error


@pytest.mark.parametrize(
    "everything", ["FOR ALL TABLES", pytest.param('FOR TABLES IN SCHEMA public, "S x"', marks=pytest.mark.slow)]
)
def test_tables_that_come_later(database: Database, lake: Lake, everything: str) -> None:
    """G4: a table that is created later appears with the rows that it had by then; one of another kind does not."""
    database.execute(T)
    database.execute('CREATE SCHEMA "S x"; CREATE TABLE "S x"."T.1" (id int PRIMARY KEY)')
    database.execute(f"CREATE PUBLICATION mine {everything}")
    sync(database, lake, publication="mine")
    transactions(
        database,
        'CREATE TABLE "S x"."T ""2""" (id int PRIMARY KEY, v text); INSERT INTO "S x"."T ""2""" VALUES (1, \'a\')',
        'UPDATE "S x"."T ""2""" SET v = \'b\'; INSERT INTO "S x"."T.1" VALUES (1)',
        "CREATE UNLOGGED TABLE unlogged (id int PRIMARY KEY); INSERT INTO unlogged VALUES (1)",
        "CREATE MATERIALIZED VIEW seen AS TABLE t; CREATE VIEW as_well AS TABLE t; UPDATE t SET v = 0",
    )
    sync(database, lake, publication="mine")
    transactions(database, 'INSERT INTO "S x"."T ""2""" VALUES (2, \'c\')', "REFRESH MATERIALIZED VIEW seen")
    sync(database, lake, publication="mine")
    tables = {"public.t": ["id"], "S x.T.1": ["id"], 'S x.T "2"': ["id"]}
    assert states(lake) == dict.fromkeys(tables, "streaming")
    agree(database, lake, tables)


@only_18
def test_tables_that_come_and_go_while_it_runs(database: Database, lake: Lake) -> None:
    """G4, G5: rows that are there already are copied, while they are written to; what is taken out stays as it was."""
    database.execute(T)
    database.execute("CREATE TABLE other (id int PRIMARY KEY); CREATE PUBLICATION mine FOR TABLE other")
    with Consumer(lake, database.dsn, publication="mine", flush_interval="50ms") as consumer:
        await_states(consumer, lake, "streaming", "public.other")
        writer = database.connect(autocommit=False)
        writer.execute("UPDATE t SET v = -1 WHERE id = 1; INSERT INTO t VALUES (100, 1, 'open')")
        transactions(
            database,
            "ALTER PUBLICATION mine ADD TABLE t",
            "UPDATE t SET v = -2 WHERE id = 2; DELETE FROM t WHERE id = 3",
        )
        until(lambda: "public.t" in states(lake), 20, "the poll to find it")
        writer.execute("UPDATE t SET v = -3 WHERE id = 4")
        writer.commit()
        await_states(consumer, lake, "streaming", "public.t")
        database.execute("UPDATE t SET note = 'copied' WHERE id < 5; INSERT INTO other VALUES (1)")
        settle(consumer, database, lake)
        equal(database, lake, {"public.t": ["id"], "public.other": ["id"]})
        left = warehouse_rows(lake, "FROM public.t ORDER BY id")
        transactions(database, "ALTER PUBLICATION mine DROP TABLE t", "DELETE FROM t", "INSERT INTO other VALUES (2)")
        until(lambda: states(lake)["public.t"] == "dropped", 20, "the poll to notice")
        settle(consumer, database, lake)
        assert warehouse_rows(lake, "FROM public.t ORDER BY id") == left
        equal(database, lake, {"public.other": ["id"]})
        assert consumer.stop() == 0


@only_18
def test_less_than_everything_is_published(database: Database, lake: Lake) -> None:
    """G6, E5: inserts alone are followed, as chosen by whoever made the publication; `check` tells what is missing."""
    database.execute(T)
    database.execute("CREATE TABLE bare (x int); CREATE PUBLICATION mine FOR TABLE t, bare WITH (publish = 'insert')")
    sync(database, lake, publication="mine")
    transactions(
        database,
        "UPDATE t SET v = 0 WHERE id = 1; DELETE FROM t WHERE id IN (2, 3)",
        "INSERT INTO t VALUES (30, 30, 'new'); INSERT INTO bare VALUES (1), (1)",
        "UPDATE bare SET x = 2; DELETE FROM bare",
        "TRUNCATE t, bare",
        "INSERT INTO t VALUES (31, 31, 'new'); INSERT INTO bare VALUES (3)",
    )
    sync(database, lake, publication="mine")
    inserted = [*((i, i, "n") for i in range(1, 21)), (30, 30, "new"), (31, 31, "new")]
    assert warehouse_rows(lake, "FROM public.t ORDER BY id") == inserted
    assert newest(lake, "public.t", "id, v, note") == inserted
    assert warehouse_rows(lake, "FROM public.bare ORDER BY x") == [(1,), (1,), (3,)]
    assert operations(lake, "public.t") == "II"
    done = call(lake, database.dsn, "check", publication="mine")
    assert "warning: publication mine does not publish: update, delete, truncate" in done.stdout
    assert "ALTER PUBLICATION \"mine\" SET (publish = 'insert, update, delete, truncate')" in done.stdout
    # What it did not publish is copied as soon as it does.
    database.execute("ALTER PUBLICATION mine DROP TABLE bare; ALTER PUBLICATION mine SET (publish = 'insert, update')")
    sync(database, lake, publication="mine")
    database.execute("UPDATE t SET v = -1 WHERE id = 31")
    sync(database, lake, publication="mine")
    agree(database, lake, {"public.t": ["id"]})


@only_18
@pytest.mark.parametrize(
    ("publish", "between"),
    [
        ("insert", "DELETE FROM t WHERE id = 2"),
        ("insert, update", "DELETE FROM t WHERE id = 2"),
        ("insert, update, delete", "TRUNCATE t"),
    ],
)
def test_a_key_that_comes_again(database: Database, lake: Lake, publish: str, between: str) -> None:
    """E5, G6: what took the row away is not published: the row that comes in its place replaces it."""
    database.execute(T)
    database.execute(f"CREATE PUBLICATION mine FOR TABLE t WITH (publish = '{publish}')")
    sync(database, lake, publication="mine")
    transactions(database, between, "INSERT INTO t VALUES (2, 200, 'again')")
    sync(database, lake, publication="mine")
    assert newest(lake, "public.t", "id, v") == [(i, 200 if i == 2 else i) for i in range(1, 21)]
    assert warehouse_rows(lake, "FROM public.t WHERE id = 2") == [(2, 200, "again")]


def test_a_publication_that_lists_nothing_yet(database: Database, lake: Lake) -> None:
    """G5: a table is added to it later, with rows that were written before and after."""
    database.execute(T)
    database.execute("CREATE PUBLICATION mine")
    sync(database, lake, publication="mine")
    assert states(lake) == {}
    transactions(database, "UPDATE t SET v = 0", "ALTER PUBLICATION mine ADD TABLE t", "DELETE FROM t WHERE id = 1")
    for _ in range(2):
        sync(database, lake, publication="mine")
        agree(database, lake, {"public.t": ["id"]})
        database.execute("UPDATE t SET v = v + 1")


@only_18
def test_nothing_of_ours_is_in_the_database(database: Database, lake: Lake) -> None:
    """G8: neither a table nor a schema for our own purposes, so none can be published or mirrored."""
    objects = "SELECT count(*), (SELECT count(*) FROM pg_namespace) FROM pg_class WHERE oid >= 16384"
    database.execute(T)
    before = database.execute(objects)
    database.execute("CREATE PUBLICATION mine FOR ALL TABLES")
    sync(database, lake, publication="mine")
    database.execute("UPDATE t SET v = 0")
    sync(database, lake, publication="mine")
    assert database.execute(objects) == before
    assert states(lake) == {"public.t": "streaming"}


# Altered under us

SEVERAL = """
    CREATE TABLE filtered (id int PRIMARY KEY, v int);
    INSERT INTO filtered SELECT i, i FROM generate_series(1, 20) AS i;
    CREATE TABLE listed (id int PRIMARY KEY, v int); INSERT INTO listed VALUES (1, 1), (2, 2);
    CREATE TABLE gone (id int PRIMARY KEY, v int); INSERT INTO gone VALUES (1, 1), (2, 2);
    CREATE TABLE bare (x int); INSERT INTO bare VALUES (1);
    CREATE TABLE root (id int PRIMARY KEY, v int) PARTITION BY RANGE (id);
    CREATE TABLE leaf PARTITION OF root FOR VALUES FROM (0) TO (100); INSERT INTO root VALUES (1, 1), (2, 2);
"""
KEYS = {f"public.{name}": ["id"] for name in ("filtered", "listed", "gone", "root")} | {"public.bare": []}
ALTER = {
    "options": "ALTER PUBLICATION cdc SET (publish = 'insert')",
    "the second's options": "ALTER PUBLICATION cdc_append SET (publish = 'truncate')",
    "leaf by leaf": "ALTER PUBLICATION cdc SET (publish_via_partition_root = false)",
    "a row filter": "ALTER PUBLICATION cdc DROP TABLE filtered; "
    "ALTER PUBLICATION cdc ADD TABLE filtered WHERE (id < 10)",
    "a column list": "ALTER PUBLICATION cdc DROP TABLE listed; ALTER PUBLICATION cdc ADD TABLE listed (id)",
    "a table out": "ALTER PUBLICATION cdc DROP TABLE gone",
    "one table alone": "ALTER PUBLICATION cdc SET TABLE filtered WHERE (id > 10)",
    "put back": "ALTER PUBLICATION cdc SET (publish = 'insert')",
}


def options(database: Database, name: str = "cdc") -> tuple[str, bool]:
    """Return what a publication publishes, and whether by way of the root."""
    (row,) = database.execute(
        "SELECT concat(CASE WHEN pubinsert THEN 'i' END, CASE WHEN pubupdate THEN 'u' END, "
        "CASE WHEN pubdelete THEN 'd' END, CASE WHEN pubtruncate THEN 't' END), pubviaroot "
        "FROM pg_publication WHERE pubname = %s",
        [name],
    )
    publishes, via_root = row
    return publishes, via_root


def write(database: Database) -> None:
    """Change each of SEVERAL, so that what is not published shows."""
    database.execute(
        "".join(f"UPDATE {t} SET v = v - 100; DELETE FROM {t} WHERE id = 2;" for t in ("filtered", "listed", "gone"))
        + "UPDATE root SET v = -1 WHERE id = 1; DELETE FROM root WHERE id = 2; INSERT INTO root VALUES (50, 50);"
        "INSERT INTO bare VALUES (2)"
    )


@only_18
@pytest.mark.parametrize(
    "what",
    [
        *("options", "a row filter"),
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in (
                "leaf by leaf",
                "put back",
                "the second's options",
                "a column list",
                "a table out",
                "one table alone",
            )
        ),
    ],
)
def test_ours_altered_while_it_is_down(database: Database, lake: Lake, what: str) -> None:
    """G7, G1, G2: the next start puts it right, and copies anew what may have been missed."""
    database.execute(SEVERAL)
    sync(database, lake)
    before = copies(lake)
    database.execute(ALTER[what])
    write(database)
    if what == "put back":
        database.execute("ALTER PUBLICATION cdc SET (publish = 'insert, update, delete, truncate')")
    sync(database, lake)
    agree(database, lake, KEYS)
    assert {
        table: lsn for table, lsn in copies(lake).items() if states(lake)[table] == "streaming"
    }.keys() == KEYS.keys()
    assert copies(lake) != before
    assert options(database) == ("iudt", True)
    assert options(database, "cdc_append") == ("it", True)
    assert database.execute(
        "SELECT count(*) FROM pg_publication_rel WHERE prqual IS NOT NULL OR prattrs IS NOT NULL"
    ) == [(0,)]
    once = copies(lake)
    database.execute("UPDATE listed SET v = 7; UPDATE filtered SET v = 7")
    sync(database, lake)
    agree(database, lake, KEYS)
    assert copies(lake) == once, "they were copied again without need"


@only_18
@pytest.mark.parametrize(
    ("alter", "concerned"),
    [
        pytest.param("ALTER PUBLICATION cdc ADD TABLE leaf", set(), marks=pytest.mark.slow),
        pytest.param("CREATE SCHEMA s; ALTER PUBLICATION cdc ADD TABLES IN SCHEMA s", set(), marks=pytest.mark.slow),
        ("ALTER PUBLICATION cdc ADD TABLES IN SCHEMA public", {*KEYS}),
        ("ALTER PUBLICATION cdc SET (publish_generated_columns = stored)", {*KEYS} - {"public.bare"}),
    ],
)
def test_ours_added_to_while_it_is_down(database: Database, lake: Lake, alter: str, concerned: set[str]) -> None:
    """G3, G4, G7: what is published in more ways than one is one table; what is published in addition does no harm."""
    database.execute(SEVERAL)
    database.execute("ALTER TABLE listed ADD twice int GENERATED ALWAYS AS (v * 2) STORED")
    sync(database, lake)
    before = copies(lake)
    database.execute(alter)
    write(database)
    for _ in range(2):
        sync(database, lake)
        agree(database, lake, KEYS)
        after = copies(lake)
        assert {table for table in before if after[table] != before[table]} == concerned
        database.execute("UPDATE listed SET v = v + 1; INSERT INTO bare VALUES (3)")
    sync(database, lake)
    assert set(states(lake)) == {*KEYS}
    if "generated" in alter:
        assert warehouse_rows(lake, "FROM public.listed") == database.execute("SELECT * FROM listed")


@only_18
@pytest.mark.parametrize("what", ["options", pytest.param("entries", marks=pytest.mark.slow)])
def test_ours_altered_while_it_runs(database: Database, lake: Lake, what: str) -> None:
    """G7, G1, G2: within a poll it is put right, and what may have been missed is copied anew."""
    database.execute(SEVERAL)
    with Consumer(lake, database.dsn, flush_interval="50ms") as consumer:
        await_states(consumer, lake, "streaming", *KEYS)
        before = copy_lsns(lake)
        chosen = ["options", "leaf by leaf"] if what == "options" else ["a row filter", "a column list", "a table out"]
        for each in chosen:
            database.execute(ALTER[each])
        write(database)
        concerned = {*KEYS} - {"public.bare"}
        concerned -= set() if what == "options" else {"public.root"}

        def copied() -> set[str]:
            lsns = copy_lsns(lake)
            return {table for table in KEYS if lsns[table] != before[table]}

        until(lambda: copied() == concerned, 30, consumer.output)
        database.execute("UPDATE filtered SET v = 7; UPDATE gone SET v = 8")
        settle(consumer, database, lake)
        equal(database, lake, KEYS)
        assert copied() == concerned
        assert consumer.stop() == 0
    assert options(database) == ("iudt", True)


@pytest.fixture
def role(database: Database) -> Iterator[str]:
    """A role that may replicate and read, and nothing more."""
    name = f"reader_{database.name[-8:]}"
    database.execute(f"CREATE ROLE {name} LOGIN REPLICATION; GRANT pg_read_all_data TO {name}")
    yield name
    database.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")


@only_18
@pytest.mark.parametrize("what", ["options", pytest.param("leaf by leaf", marks=pytest.mark.slow)])
def test_ours_altered_and_not_ours_to_alter(database: Database, lake: Lake, role: str, what: str) -> None:
    """G7, J17: where our rights do not allow it, running or not, it is an error whose hint puts it right."""
    database.execute(SEVERAL)
    assert call(lake, database.dsn, "setup", "--apply", "--role", role).returncode == 0
    dsn = make_conninfo(database.dsn, user=role)
    words = "publication cdc was altered: it does not publish all that belongs into the stream"
    with Consumer(lake, dsn, flush_interval="50ms") as consumer:
        await_states(consumer, lake, "streaming", *KEYS)
        database.execute(ALTER[what])
        write(database)
        assert consumer.wait(20) == 1
        *_, error, hint = consumer.output.splitlines()
    assert error == f"error: {words}"
    statement = (
        'ALTER PUBLICATION "cdc" SET '
        "(publish = 'insert, update, delete, truncate', publish_via_partition_root = true)"
    )
    assert statement in hint
    assert f"error: {words}" in call(lake, dsn, "check").stdout
    assert f"warning: {words}" in call(lake, database.dsn, "check").stdout
    again, hint = refused(call(lake, dsn, "run", "--once"))
    assert again == words
    assert statement in hint
    database.execute(statement)
    sync(Database(database.server, database.name, dsn, []), lake)
    agree(database, lake, KEYS)


@only_18
def test_a_filter_that_is_not_ours_to_remove(database: Database, lake: Lake, role: str) -> None:
    """G1, G2, G7: who may alter our publication, as we may not, decides what is mirrored; `check` tells."""
    database.execute(SEVERAL)
    assert call(lake, database.dsn, "setup", "--apply", "--role", role).returncode == 0
    theirs = Database(database.server, database.name, make_conninfo(database.dsn, user=role), [])
    sync(theirs, lake)
    database.execute(f"{ALTER['a row filter']}; {ALTER['a column list']}")
    write(database)
    for _ in range(2):
        sync(theirs, lake)
        filtered(database, lake, "public.filtered", "id < 10", ["id"])
        assert warehouse_rows(lake, "FROM public.listed") == database.execute("SELECT id FROM listed")
        agree(database, lake, {table: KEYS[table] for table in ("public.gone", "public.root", "public.bare")})
        database.execute("UPDATE filtered SET id = -id; INSERT INTO listed SELECT max(id) + 1 FROM listed")
    found = call(lake, theirs.dsn, "check").stdout
    for name in ("filtered", "listed"):
        assert f"warning: table public.{name} is not ours to publish" in found
    sync(database, lake)
    agree(database, lake, KEYS)


@only_18
def test_a_publication_of_others_that_publishes_less(database: Database, lake: Lake) -> None:
    """G6, G7: noticed within a poll, and at each start, until it is put back; then its tables are copied anew."""
    database.execute(T)
    database.execute('CREATE PUBLICATION "Mine" FOR TABLE t')
    words = "publication Mine was altered: it no longer publishes update, delete"
    with Consumer(lake, database.dsn, publication="Mine", flush_interval="50ms") as consumer:
        await_states(consumer, lake, "streaming", "public.t")
        database.execute("ALTER PUBLICATION \"Mine\" SET (publish = 'insert, truncate')")
        database.execute("UPDATE t SET v = -1 WHERE id = 1; DELETE FROM t WHERE id = 2")
        assert consumer.wait(20) == 1
        *_, error, hint = consumer.output.splitlines()
    assert error == f"error: {words}"
    back = "ALTER PUBLICATION \"Mine\" SET (publish = 'insert, update, delete, truncate')"
    assert back in hint
    assert refused(call(lake, database.dsn, "run", "--once", publication="Mine"))[0] == words
    database.execute(back)
    sync(database, lake, publication="Mine")
    agree(database, lake, {"public.t": ["id"]})


@only_18
@pytest.mark.parametrize("meant", [False, True])
def test_less_is_published_while_it_is_down(database: Database, lake: Lake, meant: bool) -> None:
    """G6, G7: refused; accepted where `cdc resync --all` says so; put back in time its tables are copied anew."""
    database.execute(T)
    database.execute("CREATE PUBLICATION mine FOR TABLE t")
    sync(database, lake, publication="mine")
    database.execute("ALTER PUBLICATION mine SET (publish = 'insert, update')")
    database.execute("UPDATE t SET v = -1 WHERE id = 1; DELETE FROM t WHERE id = 2")
    if meant:
        error, hint = refused(call(lake, database.dsn, "run", "--once", publication="mine"))
        assert error == "publication mine was altered: it no longer publishes delete, truncate"
        assert "`cdc resync --all`" in hint
        assert call(lake, database.dsn, "resync", "--all", publication="mine").returncode == 0
        sync(database, lake, publication="mine")
        agree(database, lake, {"public.t": ["id"]})
        database.execute("UPDATE t SET v = -3 WHERE id = 3")
    else:
        database.execute("ALTER PUBLICATION mine SET (publish = 'insert, update, delete, truncate')")
    sync(database, lake, publication="mine")
    agree(database, lake, {"public.t": ["id"]})


# Dropped, made anew

MADE = {"cdc": "", "mine": "CREATE PUBLICATION mine FOR TABLE t WHERE (id < 1000)"}


@pytest.mark.parametrize("traffic", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("name", list(MADE))
def test_dropped_while_it_is_down(database: Database, lake: Lake, name: str, traffic: bool) -> None:
    """G7: ours is made again, another one has to be; then a new slot and copies make up for what the stream lacks."""
    database.execute(T)
    database.execute("CREATE TABLE private (id int PRIMARY KEY)")
    settings = {"publication": name, "tables": "public.t"}
    database.execute(MADE[name] or "SELECT 1")
    sync(database, lake, **settings)
    transactions(database, "UPDATE t SET v = 0 WHERE id = 1", f"DROP PUBLICATION {name}")
    if traffic:
        database.execute("UPDATE t SET v = -1 WHERE id = 2; DELETE FROM t WHERE id = 3")
    if MADE[name]:
        error, hint = refused(call(lake, database.dsn, "run", "--once", publication=name))
        assert error == "publication mine is missing, and was not ours to make again"
        assert "create it again" in hint
        assert database.execute("SELECT count(*) FROM pg_publication") == [(0,)]
        database.execute(MADE[name])
    database.execute("UPDATE t SET v = -4 WHERE id = 4")
    before = copies(lake)
    sync(database, lake, **settings)
    agree(database, lake, {"public.t": ["id"]})
    assert copies(lake) != before
    once = copies(lake)
    database.execute("UPDATE t SET v = -5 WHERE id = 5")
    sync(database, lake, **settings)
    agree(database, lake, {"public.t": ["id"]})
    assert copies(lake) == once
    assert set(states(lake)) == {"public.t"}


@pytest.mark.parametrize(
    ("name", "traffic"),
    [
        ("cdc", False),
        ("mine", True),
        pytest.param("cdc", True, marks=pytest.mark.slow),
        pytest.param("mine", False, marks=pytest.mark.slow),
    ],
)
def test_dropped_while_it_runs(database: Database, lake: Lake, name: str, traffic: bool) -> None:
    """G7: the consumer ends with an error, by the stream or within a poll, and makes none by itself; see above."""
    database.execute(T)
    database.execute(MADE[name] or "SELECT 1")
    with Consumer(lake, database.dsn, publication=name, flush_interval="50ms") as consumer:
        await_states(consumer, lake, "streaming", "public.t")
        database.execute(f"DROP PUBLICATION {name}")
        if traffic:
            database.execute("UPDATE t SET v = -1 WHERE id = 2; DELETE FROM t WHERE id = 3")
        assert consumer.wait(20) == 1
        *_, error, hint = consumer.output.splitlines()
    assert name in error
    assert "was dropped" in error or (traffic and "lacks a publication" in error)
    assert "copies every table anew" in hint
    assert database.execute("SELECT count(*) FROM pg_publication WHERE pubname = %s", [name]) == [(0,)]
    database.execute(MADE[name] or "SELECT 1")
    sync(database, lake, publication=name)
    database.execute("UPDATE t SET v = -5 WHERE id = 5")
    sync(database, lake, publication=name)
    agree(database, lake, {"public.t": ["id"]})


@only_18
@pytest.mark.parametrize("traffic", [False, True])
def test_made_anew_between_two_looks(database: Database, lake: Lake, traffic: bool) -> None:
    """G7: it looks the same, and yet what was written meanwhile is not in the stream."""
    database.execute(T)
    database.execute(MADE["mine"])
    with Consumer(lake, database.dsn, publication="mine", flush_interval="50ms") as consumer:
        await_states(consumer, lake, "streaming", "public.t")
        between = "UPDATE t SET v = -1 WHERE id = 2" if traffic else "SELECT 1"
        transactions(database, "DROP PUBLICATION mine", between, MADE["mine"], "UPDATE t SET v = -1 WHERE id = 3")
        assert consumer.wait(20) == 1
        *_, error, hint = consumer.output.splitlines()
    assert ("lacks a publication" if traffic else "made anew") in error
    assert "copies every table anew" in hint
    sync(database, lake, publication="mine")
    agree(database, lake, {"public.t": ["id"]})


def test_the_second_is_dropped_or_comes_later(database: Database, lake: Lake) -> None:
    """G7, G3: an empty one counts too: without it the stream cannot be read, nor if it came after the slot."""
    database.execute(T)
    sync(database, lake)
    transactions(database, "UPDATE t SET v = 1 WHERE id = 1", "DROP PUBLICATION cdc_append", "UPDATE t SET v = 2")
    sync(database, lake)
    agree(database, lake, {"public.t": ["id"]})
    other = Lake(lake.root / "other", lake.root / "other" / "w.duckdb", lake.root / "other" / "h")
    other.root.mkdir()
    database.execute("CREATE TABLE bare (x int); CREATE PUBLICATION mine FOR TABLE t")
    sync(database, other, publication="mine", slot="other")
    transactions(
        database,
        "UPDATE t SET v = 3",
        "CREATE PUBLICATION mine_append FOR TABLE bare WITH (publish = 'insert')",
        "UPDATE t SET v = 4; INSERT INTO bare VALUES (1)",
    )
    sync(database, other, publication="mine", slot="other")
    agree(database, other, {"public.t": ["id"], "public.bare": []})
    transactions(database, "DROP PUBLICATION mine_append", "UPDATE t SET v = 5; INSERT INTO bare VALUES (2)")
    sync(database, other, publication="mine", slot="other")
    agree(database, other, {"public.t": ["id"]})
    assert table_state(other, "public.bare") == ("dropped", "no longer published")


@only_18
def test_killed_between_giving_up_and_making_the_slot(database: Database, lake: Lake) -> None:
    """G7, J7: whatever cuts the new beginning short, the next start comes to the same end."""
    database.execute(T)
    database.execute("CREATE TABLE other (id int PRIMARY KEY)")
    sync(database, lake)
    transactions(database, "DROP PUBLICATION cdc", "UPDATE t SET v = -1 WHERE id = 2; INSERT INTO other VALUES (1)")
    for label in ("after_slot_create", "during_copy", "before_swap"):
        assert run_cdc(lake, database.dsn, "run", "--once", crash_at=label).returncode == -signal.SIGKILL
    sync(database, lake)
    agree(database, lake, {"public.t": ["id"], "public.other": ["id"]})
