"""Tables that developers change while they are mirrored: followed in stride, copied only where rows changed unseen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from cdc.source import fence
from cdc.source.connection import Connection
from tests.conftest import Database, Lake
from tests.integration.copies import await_states, copy_lsns, equal, settle
from tests.mirror import Consumer, differences, mirror_once, states, until, warehouse_rows

only_18 = pytest.mark.parametrize("server", [18], indirect=True, ids=["pg18"])

KEYED: dict[str, Sequence[str] | None] = {"public.t": ["id"]}
TABLE = """
CREATE TABLE t (id int PRIMARY KEY, a text, b int, c numeric(6, 2));
INSERT INTO t SELECT i, 'a' || i, i, i + 0.5 FROM generate_series(1, 5) AS i"""


def changes(lake: Lake) -> list[tuple[str, str]]:
    """Return what DDL was followed: table and change."""
    return [
        (table, change)
        for table, change in warehouse_rows(lake, "SELECT table_name, change FROM _cdc.schema_changes ORDER BY rowid")
    ]


def followed(
    database: Database, lake: Lake, statements: Sequence[str], tables: Mapping[str, Sequence[str] | None], **more: str
) -> None:
    """Mirror, run each statement in a transaction of its own, mirror again: all is equal, and nothing copied anew."""
    mirror_once(lake, database.dsn, **more)
    before = sorted(copy_lsns(lake).values())
    for statement in statements:
        database.execute(f"BEGIN; {statement}; COMMIT")
    mirror_once(lake, database.dsn, **more)
    equal(database, lake, tables)
    assert sorted(copy_lsns(lake).values()) == before


def copied(database: Database, lake: Lake, statements: str, tables: Mapping[str, Sequence[str] | None]) -> None:
    """Mirror, run `statements`, mirror again: all is equal, by a new copy of the first of `tables`."""
    mirror_once(lake, database.dsn)
    first = next(iter(tables))
    before = copy_lsns(lake)[first]
    database.psql(statements)
    said = mirror_once(lake, database.dsn)
    equal(database, lake, tables)
    assert copy_lsns(lake)[first] != before, said
    again = copy_lsns(lake)
    mirror_once(lake, database.dsn)
    assert copy_lsns(lake) == again, "once is enough"


@pytest.mark.parametrize("flush_rows", ["1", "100000"])
def test_columns_that_get_other_names(database: Database, lake: Lake, flush_rows: str) -> None:
    """H1, H7, H9, L7: renamed, swapped, a name that is free again; the key, too; and the history replays."""
    database.execute(TABLE)
    followed(
        database,
        lake,
        [
            "UPDATE t SET a = 'before' WHERE id = 1; ALTER TABLE t RENAME a TO x; UPDATE t SET x = 'y' WHERE id = 2",
            (
                "ALTER TABLE t RENAME b TO tmp; ALTER TABLE t RENAME x TO b; ALTER TABLE t RENAME tmp TO x;"
                "UPDATE t SET b = 'text', x = 7 WHERE id = 3"
            ),
            "ALTER TABLE t DROP c; ALTER TABLE t RENAME b TO c; INSERT INTO t VALUES (6, 'c', 1)",
            "ALTER TABLE t RENAME id TO key; UPDATE t SET key = 10 WHERE key = 4; DELETE FROM t WHERE key = 5",
        ],
        {"public.t": ["key"]},
        flush_rows=flush_rows,
    )
    assert ("t", "column id renamed to key") in changes(lake)
    assert warehouse_rows(lake, "SELECT old_name, new_name FROM _cdc.schema_changes LIMIT 1") == [("a", "x")]


def test_several_changes_in_one_transaction(database: Database, lake: Lake) -> None:
    """H2, H6, H9: with changes between them, of which the catalog has only the last; several versions behind."""
    database.execute(TABLE)
    followed(
        database,
        lake,
        [
            (
                "ALTER TABLE t ADD d int DEFAULT 3; UPDATE t SET d = 4 WHERE id = 1; ALTER TABLE t ADD e text;"
                "INSERT INTO t VALUES (6, 'a', 1, 1, 1, 'e'); ALTER TABLE t RENAME e TO f; ALTER TABLE t DROP a;"
                "UPDATE t SET f = 'f' WHERE id = 2"
            ),
            "ALTER TABLE t ALTER c TYPE numeric(9, 2); UPDATE t SET c = 1234567.25 WHERE id = 3",
            "ALTER TABLE t ALTER c TYPE numeric; UPDATE t SET c = 1.2345 WHERE id = 4",
            "ALTER TABLE t ADD g varchar(3) DEFAULT 'g'; INSERT INTO t (id) VALUES (7)",
            "ALTER TABLE t ALTER g TYPE varchar(10); UPDATE t SET g = 'long enough'::varchar(10) WHERE id = 7",
        ],
        KEYED,
    )


def test_ddl_without_a_change(database: Database, lake: Lake) -> None:
    """H1, H8: nothing comes in the stream; a look at the catalog is enough, and columns have their defaults."""
    database.execute(TABLE)
    followed(
        database,
        lake,
        [
            "ALTER TABLE t ADD d int DEFAULT 3; ALTER TABLE t DROP a; ALTER TABLE t RENAME b TO z",
            "ALTER TABLE t RENAME TO u",
        ],
        {"public.u": ["id"]},
    )
    assert warehouse_rows(lake, "SELECT table_name FROM duckdb_tables() WHERE schema_name = 'public'") == [("u",)]


def test_tables_that_get_other_names(database: Database, lake: Lake) -> None:
    """H8: renamed, moved to another schema, two that swap their names, and one that only changes its case."""
    database.execute(
        TABLE + ";CREATE TABLE one (id int PRIMARY KEY, v text); CREATE TABLE two (id int PRIMARY KEY, v text);"
        "CREATE TABLE moved (id int PRIMARY KEY, d numeric(5, 2), u uuid, j jsonb); CREATE SCHEMA other;"
        "INSERT INTO one VALUES (1, 'one'); INSERT INTO two VALUES (2, 'two');"
        "INSERT INTO moved VALUES (1, 1.50, 'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11', '{\"a\": 1}')"
    )
    followed(
        database,
        lake,
        [
            "UPDATE t SET a = 'before' WHERE id = 1; ALTER TABLE t RENAME TO u; UPDATE u SET a = 'after' WHERE id = 2",
            "DELETE FROM u WHERE id = 3",
            "ALTER TABLE one RENAME TO tmp; ALTER TABLE two RENAME TO one; ALTER TABLE tmp RENAME TO two",
            "INSERT INTO one VALUES (3, 'of two'); INSERT INTO two VALUES (4, 'of one')",
            "ALTER TABLE moved SET SCHEMA other; INSERT INTO other.moved VALUES (2)",
            'ALTER TABLE u RENAME TO "U"; UPDATE "U" SET a = \'case\' WHERE id = 4',
        ],
        {"public.U": ["id"], "public.one": ["id"], "public.two": ["id"], "other.moved": ["id"]},
    )
    assert ("U", "table public.u renamed to public.U") in changes(lake)
    assert set(states(lake).values()) == {"streaming"}


def test_a_name_that_is_used_again(database: Database, lake: Lake) -> None:
    """H8: dropped and created again; renamed away and created again; both while the consumer is away."""
    database.execute(TABLE)
    mirror_once(lake, database.dsn)
    database.execute("DROP TABLE t; CREATE TABLE t (id int PRIMARY KEY, n int); INSERT INTO t VALUES (1, 1)")
    mirror_once(lake, database.dsn)
    mirror_once(lake, database.dsn)
    equal(database, lake, {"public.t": ["id"]})
    database.execute("ALTER TABLE t RENAME TO archive; CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (9)")
    mirror_once(lake, database.dsn)
    mirror_once(lake, database.dsn)
    equal(database, lake, {"public.t": ["id"], "public.archive": ["id"]})


@pytest.mark.parametrize(
    "statements",
    [
        "ALTER TABLE t ALTER b TYPE int USING b * 100",
        "ALTER TABLE t ADD d int DEFAULT (random() * 1000)::int",
        "ALTER TABLE t ALTER b TYPE bigint USING b * 100; UPDATE t SET a = 'x' WHERE id = 1",
        "ALTER TABLE t DROP c; ALTER TABLE t ADD c numeric(6, 2) DEFAULT 7; UPDATE t SET b = 0 WHERE id = 1",
        "ALTER TABLE t DROP c; ALTER TABLE t ADD c numeric(6, 2); ALTER TABLE t ADD e int; INSERT INTO t VALUES (8)",
        "ALTER TABLE t ALTER a TYPE int USING length(a); INSERT INTO t VALUES (7, 1)",
        "TRUNCATE t; INSERT INTO t VALUES (1, 'a', 1); ALTER TABLE t ALTER b TYPE int USING b * 100",
        "TRUNCATE t; COMMIT; INSERT INTO t VALUES (1, 'a', 1); COMMIT; ALTER TABLE t ALTER b TYPE int USING b * 100",
        "VACUUM FULL t",
    ],
)
def test_rows_that_change_unseen(database: Database, lake: Lake, statements: str) -> None:
    """H4, H5, trap 7: rewrites say nothing; a look at the table's storage and columns does."""
    database.execute(TABLE)
    copied(database, lake, statements, KEYED)


def test_a_rewrite_under_whole_rows(database: Database, lake: Lake) -> None:
    """H5, C10: old rows that the warehouse does not have, because nobody has looked yet: a copy, and no error."""
    database.execute(TABLE + "; ALTER TABLE t REPLICA IDENTITY FULL")
    copied(database, lake, "ALTER TABLE t ALTER b TYPE int USING b * 2; UPDATE t SET a = 'x'", {"public.t": []})


def test_truncates_are_no_rewrites(database: Database, lake: Lake) -> None:
    """E1, E4, E6: they give a table new storage, too, but they are in the stream; of partitions alike."""
    database.execute(
        TABLE + ";CREATE TABLE p (id int PRIMARY KEY) PARTITION BY RANGE (id);"
        "CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (10); INSERT INTO p VALUES (1)"
    )
    followed(
        database,
        lake,
        ["TRUNCATE t, p; INSERT INTO t VALUES (1); INSERT INTO p VALUES (2)", "TRUNCATE t", "INSERT INTO t VALUES (2)"],
        {"public.t": ["id"], "public.p": ["id"]},
    )
    mirror_once(lake, database.dsn)
    followed(database, lake, ["ALTER TABLE t ADD d int; INSERT INTO t VALUES (3)"], KEYED)


PARTITIONED = """
CREATE TABLE p (id int PRIMARY KEY, v text) PARTITION BY RANGE (id);
CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (10);
CREATE TABLE p2 PARTITION OF p FOR VALUES FROM (10) TO (20);
INSERT INTO p SELECT i, 'v' || i FROM generate_series(1, 19) AS i"""


def test_partitions_that_are_born(database: Database, lake: Lake) -> None:
    """F4: CREATE TABLE ... PARTITION OF and an empty one that is attached need no copy, whoever writes at once."""
    database.execute(PARTITIONED)
    followed(
        database,
        lake,
        [
            "CREATE TABLE p3 PARTITION OF p FOR VALUES FROM (20) TO (30); INSERT INTO p VALUES (21, 'new')",
            "CREATE TABLE p4 (id int NOT NULL, v text); ALTER TABLE p ATTACH PARTITION p4 FOR VALUES FROM (30) TO (40)",
            (
                "CREATE TABLE p5 PARTITION OF p FOR VALUES FROM (40) TO (60) PARTITION BY RANGE (id);"
                "CREATE TABLE p51 PARTITION OF p5 FOR VALUES FROM (40) TO (50); INSERT INTO p VALUES (41, 'deep')"
            ),
            "UPDATE p SET id = id + 20 WHERE id = 2",
        ],
        {"public.p": ["id"]},
    )


@pytest.mark.parametrize(
    "statements",
    [
        "ALTER TABLE p DETACH PARTITION p1",
        "DROP TABLE p2",
        "TRUNCATE p1",
        (
            "CREATE TABLE p3 AS SELECT 21 AS id, 'x' AS v; ALTER TABLE p3 ALTER id SET NOT NULL;"
            "ALTER TABLE p ATTACH PARTITION p3 FOR VALUES FROM (20) TO (30)"
        ),
        (
            "ALTER TABLE p DETACH PARTITION p1; DELETE FROM p1 WHERE id = 1;"
            "ALTER TABLE p ATTACH PARTITION p1 FOR VALUES FROM (0) TO (10)"
        ),
        (
            "BEGIN; CREATE TABLE p3 (id int PRIMARY KEY, v text); SAVEPOINT s; INSERT INTO p3 VALUES (21); RELEASE s;"
            "ALTER TABLE p ATTACH PARTITION p3 FOR VALUES FROM (20) TO (30); COMMIT"
        ),
    ],
    ids=["detach", "drop", "truncate", "attach", "again", "one transaction"],
)
def test_partitions_that_change_unseen(database: Database, lake: Lake, statements: str) -> None:
    """F4, trap 12: what is attached, detached, dropped or truncated alone says nothing; a look at the tree does."""
    database.execute(PARTITIONED)
    copied(database, lake, statements, {"public.p": ["id"]})


@only_18
def test_while_it_runs(database: Database, lake: Lake) -> None:
    """H1, H4, H8, F4: within a poll or two, under writes, and told in the log; the view goes along."""
    database.execute(TABLE + ";" + PARTITIONED)
    settings = {"flush_interval": "50ms", "view": "shown", "view_of": "public.t"}
    with Consumer(lake, database.dsn, **settings) as consumer:
        await_states(consumer, lake, "streaming", "public.t", "public.p")
        before = copy_lsns(lake)["public.p"]
        database.execute("ALTER TABLE t ADD d int DEFAULT 3")
        until(lambda: ("t", "column d added") in changes(lake), 20, consumer.output)
        database.execute("ALTER TABLE t RENAME TO u; UPDATE u SET d = 4 WHERE id = 1")
        database.execute("DROP TABLE p1; INSERT INTO p VALUES (11) ON CONFLICT DO NOTHING")
        until(lambda: copy_lsns(lake)["public.p"] != before, 30, consumer.output)
        settle(consumer, database, lake)
        await_states(consumer, lake, "streaming", "public.u", "public.p")
        equal(database, lake, {"public.u": ["id"], "public.p": ["id"]})
        assert warehouse_rows(lake, "SELECT sum(d) FROM shown") == [(16,)]
        assert "schema change change='column d added'" in consumer.output
        assert "reason='a partition was detached or dropped'" in consumer.output
        assert consumer.stop() == 0


def test_soft_deletes_go_along(database: Database, lake: Lake) -> None:
    """L1, H1, H8: deleted rows keep their place through renamed columns and tables."""
    database.execute(TABLE)
    mirror_once(lake, database.dsn, deletes="soft")
    database.execute("DELETE FROM t WHERE id = 1")
    mirror_once(lake, database.dsn, deletes="soft")
    database.execute("ALTER TABLE t RENAME a TO x; ALTER TABLE t RENAME TO u; DELETE FROM u WHERE id = 2")
    mirror_once(lake, database.dsn, deletes="soft")
    deleted = warehouse_rows(lake, "SELECT id, x FROM public.u WHERE _deleted_at IS NOT NULL ORDER BY 1")
    assert deleted == [(1, "a1"), (2, "a2")]
    assert warehouse_rows(lake, "SELECT count(*) FROM public.u WHERE _deleted_at IS NULL") == [(3,)]


def test_values_in_quarantine_go_along(database: Database, lake: Lake) -> None:
    """H1, H8: what a type cannot hold is found under the new names of table, column and key."""
    database.execute(TABLE + "; INSERT INTO t VALUES (9, 'x', 1, 'NaN')")
    mirror_once(lake, database.dsn)
    database.execute("ALTER TABLE t RENAME c TO amount; ALTER TABLE t RENAME id TO key; ALTER TABLE t RENAME TO u")
    mirror_once(lake, database.dsn)
    query = "SELECT table_name, column_name, key, value FROM _cdc.quarantine WHERE current"
    assert warehouse_rows(lake, query) == [("u", "amount", '{"key": "9"}', "NaN")]
    database.execute("UPDATE u SET amount = 1 WHERE key = 9")
    mirror_once(lake, database.dsn)
    assert warehouse_rows(lake, query) == []
    assert differences(database, lake, "public.u", ["key"]) == ""


def test_ddl_of_a_partitioned_table(database: Database, lake: Lake) -> None:
    """H12, F3: columns of the root come, go and change their names in all leaves, over moves between these."""
    database.execute(PARTITIONED)
    followed(
        database,
        lake,
        [
            "ALTER TABLE p ADD d int DEFAULT 3; UPDATE p SET id = 0 WHERE id = 11; UPDATE p SET d = 4 WHERE id = 2",
            "ALTER TABLE p RENAME v TO w; ALTER TABLE p DROP d; INSERT INTO p VALUES (11, 'new')",
            "ALTER TABLE p RENAME TO q; DELETE FROM q WHERE id = 12",
        ],
        {"public.q": ["id"]},
    )


def test_types_that_change(database: Database, lake: Lake) -> None:
    """H14: an enum gets a label, a domain loses its check; a label is renamed, a composite gets an attribute."""
    database.execute(
        "CREATE TYPE mood AS ENUM ('sad', 'ok'); CREATE DOMAIN short AS text CHECK (length(value) < 5);"
        "CREATE TYPE pair AS (a int, b text); CREATE DOMAIN moods AS mood[];"
        "CREATE TABLE t (id int PRIMARY KEY, m moods, s short, p pair[]);"
        "INSERT INTO t VALUES (1, '{sad}', 'abc', '{\"(1,x)\"}')"
    )
    mirror_once(lake, database.dsn)
    for statement in (
        "ALTER TYPE mood ADD VALUE 'very happy' BEFORE 'sad'",
        "INSERT INTO t VALUES (2, '{very happy}', 'abcd', '{}')",
        "ALTER DOMAIN short DROP CONSTRAINT short_check",
        "UPDATE t SET s = 'longer than that' WHERE id = 1",
    ):
        database.execute(statement)
    mirror_once(lake, database.dsn)
    equal(database, lake, KEYED)
    before = copy_lsns(lake)
    # Every row prints otherwise now, without having changed.
    for statement in ("ALTER TYPE mood RENAME VALUE 'sad' TO 'gloomy'", "ALTER TYPE pair ADD ATTRIBUTE c int"):
        database.execute(statement)
        mirror_once(lake, database.dsn)
        equal(database, lake, KEYED)
        assert copy_lsns(lake) != before
        before = copy_lsns(lake)
    mirror_once(lake, database.dsn)
    assert copy_lsns(lake) == before


@only_18
def test_columns_that_are_not_published(database: Database, lake: Lake) -> None:
    """B9, H1: a virtual column takes a number, too, and is no reason to copy."""
    database.execute(TABLE)
    virtual = "ALTER TABLE t ADD g int GENERATED ALWAYS AS (b * 2) VIRTUAL"
    added = "ALTER TABLE t ADD d int DEFAULT 3; UPDATE t SET d = 4 WHERE id = 1"
    followed(database, lake, [virtual, added], KEYED)
    dropped = "ALTER TABLE t DROP g; ALTER TABLE t RENAME d TO g; UPDATE t SET g = 5 WHERE id = 2"
    followed(database, lake, [dropped], KEYED)


@only_18
def test_ddl_between_a_look_and_its_fence(database: Database, lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    """H1: the stream is ahead of the look then; what the look lacks is not taken back."""
    database.execute(TABLE)
    mirror_once(lake, database.dsn)
    real = fence.emit
    pending = ["ALTER TABLE t ADD d text; UPDATE t SET d = 'precious' WHERE id = 1"]

    def late(connection: Connection) -> bytes:
        if pending:
            database.execute(pending.pop())
        return real(connection)

    monkeypatch.setattr("cdc.source.fence.emit", late)
    mirror_once(lake, database.dsn)
    equal(database, lake, KEYED)
    assert [change for _, change in changes(lake)] == ["column d added"]


def test_names_that_differ_in_case(database: Database, lake: Lake) -> None:
    """B2, H8: to DuckDB they are one: the table that takes the name of another has its OID behind it, and says so."""
    database.execute(TABLE + "; CREATE TABLE u (id int PRIMARY KEY); INSERT INTO u VALUES (1)")
    mirror_once(lake, database.dsn)
    ((oid,),) = database.execute("SELECT 'u'::regclass::oid::int8")
    database.execute('ALTER TABLE u RENAME TO "T"')
    mirror_once(lake, database.dsn)
    database.execute('INSERT INTO "T" VALUES (2); INSERT INTO t VALUES (7)')
    mirror_once(lake, database.dsn)
    equal(database, lake, KEYED | {"public.T": ["id"]})
    assert warehouse_rows(lake, f'SELECT id FROM public."T_{oid}" ORDER BY id') == [(1,), (2,)]
    renamed = [change for _, change in changes(lake) if "renamed" in change]
    assert renamed == [f"table public.u renamed to public.T, which is public.T_{oid} here"]
    # with the other one gone it keeps its name, until it gets another
    database.execute('DROP TABLE t; INSERT INTO "T" VALUES (3)')
    mirror_once(lake, database.dsn)
    assert warehouse_rows(lake, f'SELECT count(*) FROM public."T_{oid}"') == [(3,)]
    database.execute('ALTER TABLE "T" RENAME TO v')
    mirror_once(lake, database.dsn)
    equal(database, lake, {"public.v": ["id"]})


def test_schemas_that_get_other_names(database: Database, lake: Lake) -> None:
    """H8: told by no Relation up to PostgreSQL 15; once is enough."""
    database.execute("CREATE SCHEMA a; CREATE TABLE a.t (id int PRIMARY KEY); INSERT INTO a.t VALUES (1)")
    with Consumer(lake, database.dsn, flush_interval="50ms") as consumer:
        await_states(consumer, lake, "streaming", "a.t")
        database.execute("INSERT INTO a.t VALUES (2)")
        database.execute("ALTER SCHEMA a RENAME TO b; INSERT INTO b.t VALUES (3)")
        await_states(consumer, lake, "streaming", "b.t")
        database.execute("INSERT INTO b.t VALUES (4)")
        settle(consumer, database, lake)
        equal(database, lake, {"b.t": ["id"]})
        assert len(changes(lake)) == 1
        assert consumer.stop() == 0


@pytest.mark.parametrize(
    "statements",
    [
        "ALTER TABLE g ALTER v DROP EXPRESSION; INSERT INTO g VALUES (3, 3, 99)",
        "ALTER TABLE g ADD c text, DROP v, DROP a, DROP id, DROP o; INSERT INTO g VALUES ('c')",
        "ALTER TABLE g ALTER o TYPE regclass; INSERT INTO g (id, o) VALUES (3, 'pg_type')",
    ],
)
def test_columns_that_only_a_copy_brings(database: Database, lake: Lake, statements: str) -> None:
    """H5, B9: values that were never published, no column left of what was there, and a text that prints otherwise."""
    database.execute(
        "CREATE TABLE g (id int, a int, v int GENERATED ALWAYS AS (a * 2) STORED, o oid DEFAULT 1259);"
        "ALTER TABLE g REPLICA IDENTITY FULL; INSERT INTO g VALUES (1, 1), (2, 2)"
    )
    copied(database, lake, statements, {"public.g": []})
