"""Definitions of tables, as the catalogs have them; Postgres is the oracle."""

from __future__ import annotations

import psycopg
import pytest

from cdc.source import catalog
from cdc.source.catalog import TableDefinition
from cdc.source.connection import connect
from tests.conftest import Database

TABLES = """
CREATE TABLE keyed (id int PRIMARY KEY, v text);
CREATE TABLE composite (a int, b int, c int, PRIMARY KEY (c, a));
CREATE TABLE keyless (x int);
CREATE TABLE nothing (x int PRIMARY KEY); ALTER TABLE nothing REPLICA IDENTITY NOTHING;
CREATE TABLE whole (x int); ALTER TABLE whole REPLICA IDENTITY FULL;
CREATE TABLE deferred (x int PRIMARY KEY DEFERRABLE);
CREATE TABLE by_index (a int PRIMARY KEY, b int NOT NULL, c int);
CREATE UNIQUE INDEX by_b ON by_index (b) INCLUDE (c); ALTER TABLE by_index REPLICA IDENTITY USING INDEX by_b;
CREATE TABLE dropped_index (a int PRIMARY KEY, b int NOT NULL);
CREATE UNIQUE INDEX by_gone ON dropped_index (b); ALTER TABLE dropped_index REPLICA IDENTITY USING INDEX by_gone;
DROP INDEX by_gone;
CREATE TABLE zero ();
CREATE TABLE root (id int, k int, PRIMARY KEY (id, k)) PARTITION BY RANGE (k);
CREATE TABLE leaf1 PARTITION OF root FOR VALUES FROM (0) TO (10);
CREATE TABLE branch PARTITION OF root FOR VALUES FROM (10) TO (20) PARTITION BY RANGE (k);
CREATE TABLE leaf2 (k int, id int, PRIMARY KEY (id, k)); ALTER TABLE branch ATTACH PARTITION leaf2
    FOR VALUES FROM (10) TO (15);
CREATE TABLE root_keyless (id int) PARTITION BY RANGE (id);
CREATE TABLE leaf_keyed PARTITION OF root_keyless (PRIMARY KEY (id)) FOR VALUES FROM (0) TO (10);
CREATE TABLE root_whole (id int PRIMARY KEY) PARTITION BY RANGE (id); ALTER TABLE root_whole REPLICA IDENTITY FULL;
CREATE TABLE leaf_not_whole PARTITION OF root_whole FOR VALUES FROM (0) TO (10);
CREATE TABLE root_nothing (id int PRIMARY KEY) PARTITION BY RANGE (id);
CREATE TABLE leaf_nothing PARTITION OF root_nothing FOR VALUES FROM (0) TO (10);
ALTER TABLE leaf_nothing REPLICA IDENTITY NOTHING;
CREATE TABLE parent (id int PRIMARY KEY); CREATE TABLE child () INHERITS (parent);
CREATE UNLOGGED TABLE unlogged (x int); CREATE VIEW a_view AS SELECT 1 AS x; CREATE SEQUENCE a_sequence;
CREATE SCHEMA _cdc; CREATE TABLE _cdc.ours (x int);
CREATE SCHEMA "Other ""x"; CREATE TABLE "Other ""x"."T ä" ("Ü" int PRIMARY KEY);
"""
USABLE = {
    "keyed": (1,),
    "composite": (3, 1),
    "keyless": None,
    "nothing": None,
    "whole": (),
    "deferred": None,
    "by_index": (2,),
    "dropped_index": None,
    "zero": None,
    "root": (1, 2),
    "root_keyless": None,
    "root_whole": None,
    "root_nothing": None,
    "parent": (1,),
    "child": None,
    "T ä": (1,),
}


@pytest.fixture
def user_tables(database: Database) -> dict[str, TableDefinition]:
    database.execute(TABLES)
    with connect(database.dsn) as connection:
        return {table.name: table for table in catalog.user_tables(connection)}


def test_user_tables_and_their_identity(user_tables: dict[str, TableDefinition]) -> None:
    """C6, C8, C9, C10, C12, F1: what can be followed, and by which columns."""
    assert set(user_tables) == set(USABLE)
    for name, key in USABLE.items():
        assert user_tables[name].identity_usable == (key is not None), name
        if key is not None:
            assert user_tables[name].key == key, name


def test_usable_is_what_the_server_accepts(database: Database, user_tables: dict[str, TableDefinition]) -> None:
    """An UPDATE of a published table fails exactly where we say so, for tables that are no partitioned ones."""
    database.execute("CREATE PUBLICATION everything FOR ALL TABLES")
    for name, table in user_tables.items():
        if table.relkind != "r" or name == "zero":
            continue
        column = table.attributes[0].name
        statement = f'UPDATE "{table.schema.replace(chr(34), chr(34) * 2)}"."{name}" SET "{column}" = "{column}"'
        if name == "parent":
            statement = statement.replace("UPDATE", "UPDATE ONLY")
        try:
            database.execute(statement)
        except psycopg.errors.ObjectNotInPrerequisiteState:
            assert not table.identity_usable, name
        else:
            assert table.identity_usable, name


def test_relfilenodes_are_the_leaves(database: Database, user_tables: dict[str, TableDefinition]) -> None:
    rows = database.execute(
        "SELECT c.oid::int8, pg_relation_filenode(c.oid)::int8 FROM pg_class c WHERE relname IN ('leaf1', 'leaf2')"
    )
    root = user_tables["root"]
    assert sorted((m.oid, m.relfilenode) for m in root.members if m.is_leaf) == sorted(rows)
    assert sorted(root.leaves) == sorted(oid for oid, _ in rows)
    keyed = user_tables["keyed"]
    assert keyed.storage == f"{keyed.oid}:{keyed.oid}:0"
    database.execute("VACUUM FULL keyed")
    with connect(database.dsn) as connection:
        now = catalog.definition(connection, keyed.oid)
    assert now is not None
    assert now.storage != keyed.storage
    assert now.attributes == keyed.attributes


def test_attributes_and_what_old_rows_hold(database: Database) -> None:
    """H4, B6, B9: dropped columns are gone; the stored default is the exact text of the value."""
    values = {
        "i": ("int", "7"),
        "t": ("text", """ it''s "quoted"{}, \\ """),
        "a": ("int[]", "{1,NULL,3}"),
        "b": ("box", "(2,2),(1,1)"),
        "j": ("jsonb", '{"k": [1, "x"]}'),
        "z": ("timestamptz", "2024-05-06 07:08:09+02"),
        "e": ("text", ""),
        "n": ("text", "NULL"),
        "c": ("numeric(10,2)", "1.50"),
    }
    database.execute("CREATE TABLE t (id int PRIMARY KEY, gone int); INSERT INTO t VALUES (1); ALTER TABLE t DROP gone")
    for name, (type_name, value) in values.items():
        database.execute(f"ALTER TABLE t ADD {name} {type_name} DEFAULT '{value}'")
    database.execute("ALTER TABLE t ADD plain int, ADD g int GENERATED ALWAYS AS (id * 2) STORED")
    with connect(database.dsn) as connection:
        (table,) = catalog.user_tables(connection)
        # ADD of a stored generated column has rewritten the table: there is nothing missing any more.
        assert [attribute.missing for attribute in table.attributes] == [None] * len(table.attributes)
        assert table.attributes[-1].generated == "s"
        database.execute("ALTER TABLE t DROP g")
        for name, (type_name, value) in values.items():
            database.execute(f"ALTER TABLE t ADD {name}2 {type_name} DEFAULT '{value}'")
        (table,) = catalog.user_tables(connection)
        for name in values:
            ((text,),) = connection.execute(f"SELECT {name}2::text FROM public.t".encode()).fetchall()
            found = next(attribute for attribute in table.attributes if attribute.name == f"{name}2")
            assert found.missing == text, name
            assert found.attnum > 2
        numeric = next(attribute for attribute in table.attributes if attribute.name == "c2")
        assert (numeric.type_oid, numeric.typmod) == (1700, ((10 << 16) | 2) + 4)


def test_a_definition_is_that_of_the_snapshot(database: Database) -> None:
    """K6: an imported snapshot and the live state can be told apart."""
    database.execute("CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE u (id int)")
    old = connect(database.dsn)
    old.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    before = {table.oid: table for table in catalog.user_tables(old)}
    database.execute("ALTER TABLE t ADD v int; TRUNCATE t; DROP TABLE u; ALTER TABLE t RENAME TO t2")
    assert catalog.definitions(old, list(before)) == before
    with connect(database.dsn) as connection:
        now = catalog.definitions(connection, list(before))
        assert len(now) == 1
        (table,) = now.values()
        assert table.name == "t2"
        assert table.storage != before[table.oid].storage
        assert catalog.definition(connection, 4_294_967_290) is None
    old.close()


def test_how_a_leaf_came(database: Database) -> None:
    """F4: whether a partition may have had rows before it was one; attached anew, it has another link."""
    database.execute(
        "CREATE TABLE r (i int, v text NOT NULL DEFAULT 'x', PRIMARY KEY (i)) PARTITION BY RANGE (i);"
        "CREATE TABLE born PARTITION OF r FOR VALUES FROM (0) TO (10);"
        "CREATE TABLE own PARTITION OF r (v DEFAULT 'u', CHECK (i <> 13)) FOR VALUES FROM (10) TO (20);"
        "CREATE TABLE sub PARTITION OF r FOR VALUES FROM (20) TO (30) PARTITION BY RANGE (i);"
        "CREATE TABLE below PARTITION OF sub FOR VALUES FROM (20) TO (30)"
    )
    database.execute("CREATE TABLE late (LIKE r INCLUDING ALL)")
    with database.connect(autocommit=False) as one:
        one.execute("CREATE TABLE filled (i int PRIMARY KEY, v text NOT NULL)")
        one.execute("SAVEPOINT s; INSERT INTO filled VALUES (41, 'a'); RELEASE s")
        one.execute("ALTER TABLE r ATTACH PARTITION filled FOR VALUES FROM (40) TO (50)")
    database.execute("ALTER TABLE r ATTACH PARTITION late FOR VALUES FROM (30) TO (40)")
    with connect(database.dsn) as connection:
        (root,) = (table for table in catalog.user_tables(connection) if table.name == "r")
        names = dict(
            database.execute(
                "SELECT oid::int8, relname FROM pg_class WHERE relname = ANY (%s)",
                [["born", "own", "sub", "below", "late", "filled"]],
            )
        )
        found = {names[m.oid]: m.born for m in root.members if m.oid != root.oid}
        assert found == {"born": True, "own": True, "sub": True, "below": True, "late": False, "filled": False}
        database.execute("ALTER TABLE r DETACH PARTITION born")
        database.execute("ALTER TABLE r ATTACH PARTITION born FOR VALUES FROM (0) TO (10)")
        again = catalog.definition(connection, root.oid)
        assert again is not None
        assert {m.oid for m in again.members} == {m.oid for m in root.members}
        assert again.storage != root.storage


def test_published(database: Database, user_tables: dict[str, TableDefinition]) -> None:
    """G1, G2, F2, B9."""
    database.execute("""
        CREATE TABLE generated (id int PRIMARY KEY, g int GENERATED ALWAYS AS (id + 1) STORED, v int);
        CREATE PUBLICATION p1 FOR TABLE keyed (id) WHERE (id > 3), TABLE generated;
        CREATE PUBLICATION p2 FOR TABLE root WITH (publish_via_partition_root);
        CREATE PUBLICATION p3 FOR TABLE root""")
    with connect(database.dsn) as connection:
        found = catalog.published(connection, ["p1", "p2", "none"])
        assert [(t.publication, t.name, t.columns) for t in found] == [
            ("p1", "generated", ("id", "v")),
            ("p1", "keyed", ("id",)),
            ("p2", "root", ("id", "k")),
        ]
        filters = [catalog.row_filter(connection, t.oid, [t.publication]) for t in found]
        assert filters == [None, "((id > 3))", None]
        assert found[1].oid == user_tables["keyed"].oid
        assert [t.name for t in catalog.published(connection, ["p3"])] == ["leaf1", "leaf2"]
        if database.version >= 18:
            database.execute("ALTER PUBLICATION p1 SET (publish_generated_columns = stored)")
            assert catalog.published(connection, ["p1"])[0].columns == ("id", "g", "v")
