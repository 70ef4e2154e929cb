"""Tables that change while they are mirrored, names of every shape, and tables that cannot be mirrored."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import psycopg
import pytest
from psycopg import sql

from cdc.sink.warehouse import quote
from tests.conftest import Database, Lake
from tests.integration.steps import agree, copies, log, operations, sync, table_state, transactions
from tests.mirror import differences, mirrored_rows, run_cdc, source_rows, states, warehouse_rows

only_18 = pytest.mark.parametrize("server", [18], indirect=True, ids=["pg18"])


def changes(lake: Lake, table: str) -> list[str]:
    """Return what DDL was followed for a table, in order."""
    rows = warehouse_rows(
        lake,
        f"SELECT change FROM _cdc.schema_changes WHERE schema_name || '.' || table_name = '{table}' ORDER BY rowid",
    )
    return [change for (change,) in rows]


def column_names(lake: Lake, table: str) -> list[str]:
    """Return the names of the columns that the warehouse has."""
    schema, name = table.split(".", 1)
    rows = warehouse_rows(
        lake,
        f"SELECT column_name FROM duckdb_columns() WHERE lower(schema_name) = '{schema}' "
        f"AND table_name = '{name}' ORDER BY column_index",
    )
    return [column for (column,) in rows]


def test_columns_come_and_go(database: Database, lake: Lake) -> None:
    """H1, H4: added with and without a default, which older rows have too; dropped; none of it a new copy."""
    defaults = {
        "text": "'it''s \"quoted\" \\ é😀'",
        "int": "-7",
        "numeric(10,2)": "1.50",
        "numeric": "1.500",
        "float8": "'NaN'",
        "real": "1.1",
        "bool": "true",
        "date": "'2024-02-29'",
        "timestamp": "'2024-02-29 12:34:56.789'",
        "timestamptz": "'2024-02-29 12:34:56.789+05'",
        "time": "'12:34:56.5'",
        "uuid": "'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'",
        "jsonb": "'{\"a\": [1, null]}'",
        "bytea": r"'\x00ff5c'",
        "int[]": "'{1,NULL,3}'",
        "box": "'((1,2),(3,4))'",
        "char(5)": "'ab'",
    }
    names = {f"c{number}": kind for number, kind in enumerate(defaults)}
    adds = ", ".join(f"ADD COLUMN {name} {kind} DEFAULT {defaults[kind]}" for name, kind in names.items())
    database.execute(
        """
        CREATE TABLE t (id int PRIMARY KEY, v text, old int);
        CREATE TABLE many (id int PRIMARY KEY, v text);
        CREATE TABLE keyless (v text);
        CREATE TABLE whole (v text);
        ALTER TABLE whole REPLICA IDENTITY FULL;
        INSERT INTO t SELECT i, 'v' || i, i FROM generate_series(1, 5) i;
        INSERT INTO many SELECT i, 'v' || i FROM generate_series(1, 3) i;
        INSERT INTO keyless VALUES ('a'), ('a');
        INSERT INTO whole VALUES ('a'), ('a'), ('b')
        """
    )
    sync(database, lake)
    first = copies(lake)
    transactions(
        database,
        "UPDATE t SET v = 'before' WHERE id = 1",
        "ALTER TABLE t ADD COLUMN plain text, ADD COLUMN filled text DEFAULT 'default', DROP COLUMN old",
        "UPDATE t SET plain = 'p', filled = 'f' WHERE id = 2",
        "INSERT INTO t (id, v) VALUES (6, 'after'); DELETE FROM t WHERE id = 3",
        f"ALTER TABLE many {adds}; INSERT INTO many (id) VALUES (4)",
        "ALTER TABLE keyless ADD COLUMN n int DEFAULT 5; INSERT INTO keyless VALUES ('b', NULL)",
        "ALTER TABLE whole ADD COLUMN n int DEFAULT 5",
        "DELETE FROM whole WHERE v = 'b'; UPDATE whole SET n = 6 WHERE ctid = (SELECT min(ctid) FROM whole)",
    )
    sync(database, lake)
    tables = dict.fromkeys(["public.t", "public.many", "public.keyless", "public.whole"])
    agree(database, lake, tables)
    assert copies(lake) == first  # followed by ALTERs, not copied anew
    assert changes(lake, "public.t") == ["column old dropped", "column plain added", "column filled added"]
    assert column_names(lake, "public.t") == ["id", "v", "plain", "filled"]
    # rows from before the column have no value in the history; the changes behind it do
    assert log(lake, "public.t", "SELECT id, v, plain, filled FROM log WHERE id = 6") == [(6, "after", None, "default")]
    # the default goes, and the column; its name comes back with another type
    transactions(
        database,
        "ALTER TABLE t ALTER filled DROP DEFAULT; INSERT INTO t (id) VALUES (7)",
        "ALTER TABLE t DROP COLUMN plain",
        "UPDATE t SET v = 'w' WHERE id = 1",
        "ALTER TABLE t DROP COLUMN filled; ALTER TABLE t ADD COLUMN filled int DEFAULT 3; "
        "INSERT INTO t VALUES (8, 'x', 4)",
        "ALTER TABLE t ADD COLUMN last date; INSERT INTO t VALUES (9, 'y', 5, '2024-01-01')",
    )
    sync(database, lake)
    agree(database, lake, tables)
    assert column_names(lake, "public.t") == ["id", "v", "filled", "last"]


def test_a_partitioned_table_gets_a_column_with_a_default(database: Database, lake: Lake) -> None:
    """H4, H12: the root holds no rows, so the value that older rows have is noted at its leaves alone."""
    database.execute(
        """
        CREATE TABLE t (id int, p int, PRIMARY KEY (id, p)) PARTITION BY LIST (p);
        CREATE TABLE t_0 PARTITION OF t FOR VALUES IN (0);
        CREATE TABLE t_1 PARTITION OF t FOR VALUES IN (1);
        INSERT INTO t SELECT i, i % 2 FROM generate_series(1, 4) i
        """
    )
    sync(database, lake)
    first = copies(lake)
    transactions(database, "ALTER TABLE t ADD COLUMN c int DEFAULT 7, ADD COLUMN d text", "INSERT INTO t VALUES (5, 1)")
    sync(database, lake)
    agree(database, lake, {"public.t": None})
    assert copies(lake) == first


def test_ddl_within_a_transaction(database: Database, lake: Lake) -> None:
    """H2, H3, H6: DDL between the changes of one transaction; DDL that is rolled back; a name that is used again."""
    database.execute(
        """
        CREATE TABLE between (id int PRIMARY KEY, v text);
        CREATE TABLE undone (id int PRIMARY KEY, v text);
        CREATE TABLE replaced (id int PRIMARY KEY, v text, w text);
        INSERT INTO between SELECT i, 'v' || i FROM generate_series(1, 5) i;
        INSERT INTO undone SELECT i, 'v' || i FROM generate_series(1, 5) i;
        INSERT INTO replaced SELECT i, 'v' || i, 'w' FROM generate_series(1, 5) i
        """
    )
    sync(database, lake)
    first = copies(lake)
    connection = database.connect(autocommit=False)
    for statement in (
        "UPDATE between SET v = 'one' WHERE id = 1",
        "ALTER TABLE between ADD COLUMN a int DEFAULT 1",
        "UPDATE between SET a = 2 WHERE id = 2",
        "INSERT INTO between VALUES (6, 'six', 6)",
        "ALTER TABLE between DROP COLUMN v",
        "UPDATE between SET a = 3 WHERE id = 3",
        "ALTER TABLE between ADD COLUMN b text",
        "INSERT INTO between VALUES (7, 7, 'seven')",
        "DELETE FROM between WHERE id = 4",
    ):
        connection.execute(statement.encode())
    connection.commit()
    for statement in (
        "UPDATE undone SET v = 'one' WHERE id = 1",
        "SAVEPOINT s",
        "ALTER TABLE undone ADD COLUMN a int DEFAULT 1",
        "UPDATE undone SET a = 2",
        "ALTER TABLE undone DROP COLUMN v",
        "INSERT INTO undone VALUES (9, 9)",
        "ROLLBACK TO s",
        "INSERT INTO undone VALUES (6, 'six')",
        "ALTER TABLE replaced DROP COLUMN v",
        "ALTER TABLE replaced ADD COLUMN v int",
        "UPDATE replaced SET v = id WHERE id < 3",
    ):
        connection.execute(statement.encode())
    connection.commit()
    connection.close()
    sync(database, lake)
    agree(database, lake, {"public.between": None, "public.undone": ["id"], "public.replaced": None})
    assert column_names(lake, "public.between") == ["id", "a", "b"]
    assert operations(lake, "public.undone") == "UI"
    assert copies(lake)["public.undone"] == first["public.undone"]
    assert changes(lake, "public.undone") == []


def test_changes_that_need_a_new_copy(database: Database, lake: Lake) -> None:
    """H4, H5, H13: other types, USING, a volatile default: it copies anew by itself."""
    database.execute(
        """
        CREATE TABLE wider (id int PRIMARY KEY, n int, s varchar(5), d numeric(6,2));
        CREATE TABLE other (id int PRIMARY KEY, v text);
        CREATE TABLE volatile (id int PRIMARY KEY);
        CREATE TABLE key_type (id int PRIMARY KEY, v text);
        CREATE TABLE quiet (id int PRIMARY KEY, v text);
        INSERT INTO wider SELECT i, i, 'v' || i, i FROM generate_series(1, 5) i;
        INSERT INTO other SELECT i, i::text FROM generate_series(1, 5) i;
        INSERT INTO volatile SELECT generate_series(1, 5);
        INSERT INTO key_type SELECT i, 'v' FROM generate_series(1, 5) i;
        INSERT INTO quiet SELECT i, 'v' FROM generate_series(1, 5) i
        """
    )
    tables = dict.fromkeys(f"public.{name}" for name in ("wider", "other", "volatile", "key_type", "quiet"))
    sync(database, lake)
    first = copies(lake)
    transactions(
        database,
        "ALTER TABLE wider ALTER n TYPE bigint, ALTER s TYPE varchar(50), ALTER d TYPE numeric(12,4)",
        "INSERT INTO wider VALUES (6, 3000000000, repeat('s', 40), 12345678.1234)",
        "ALTER TABLE other ALTER v TYPE int USING v::int * 100",
        "UPDATE other SET v = v + 1 WHERE id = 1",
        "ALTER TABLE volatile ADD COLUMN r float8 DEFAULT random()",
        "INSERT INTO volatile (id) VALUES (6)",
        "ALTER TABLE key_type ALTER id TYPE text; UPDATE key_type SET id = 'x' || id; "
        "DELETE FROM key_type WHERE id = 'x3'",
        "UPDATE quiet SET v = 'w'",
    )
    output = sync(database, lake)
    agree(database, lake, tables)
    again = copies(lake)
    assert {table for table in tables if again[table] != first[table]} == tables.keys() - {"public.quiet"}
    assert "state=resyncing" in output
    agree(database, lake, {"public.wider": ["id"], "public.key_type": ["id"]})
    # from here on they stream as before
    transactions(
        database,
        "UPDATE wider SET n = n + 1, d = 0.0001",
        "UPDATE volatile SET r = 0",
    )
    sync(database, lake)
    agree(database, lake, tables)
    assert copies(lake) == again


def test_names_that_duckdb_or_we_have_already(database: Database, lake: Lake) -> None:
    """B2, B3, H11: names that differ in case alone, and names of ours, have a number behind them here; it is told."""
    database.execute(
        """
        CREATE TABLE cases (id int PRIMARY KEY, a int, "A" int, a_3 int);
        CREATE TABLE ours (id int, _lsn text, "_OP" text, _deleted_at int, PRIMARY KEY (id, _lsn));
        CREATE TABLE later (id int PRIMARY KEY, v text);
        CREATE TABLE "Twin" (id int PRIMARY KEY, v text);
        CREATE TABLE twin (id int PRIMARY KEY, v text);
        CREATE TABLE "TWIN" ("ID" int PRIMARY KEY, id int);
        CREATE SCHEMA "Public";
        CREATE TABLE "Public".twin (id int PRIMARY KEY);
        INSERT INTO cases VALUES (1, 1, 2, 3);
        INSERT INTO ours VALUES (1, 'x', 'y', 1);
        INSERT INTO later VALUES (1, 'a');
        INSERT INTO "Twin" VALUES (1, 'Twin');
        INSERT INTO twin VALUES (1, 'twin');
        INSERT INTO "TWIN" VALUES (1, 2);
        INSERT INTO "Public".twin VALUES (7)
        """
    )
    names = ["cases", "ours", "later", "Twin", "twin"]
    tables = {f"public.{name}": ["id", "_lsn"] if name == "ours" else ["id"] for name in names}
    tables |= {"public.TWIN": ["ID"], "Public.twin": ["id"]}
    sync(database, lake)
    agree(database, lake, tables)
    assert column_names(lake, "public.cases") == ["id", "a", "A_3_", "a_3"]
    assert column_names(lake, "public.ours") == ["id", "_lsn_2", "_OP_3", "_deleted_at"]
    aliases = dict(warehouse_rows(lake, "SELECT schema_name || '.' || table_name, alias FROM _cdc.tables"))
    oids = dict(
        database.execute(
            "SELECT n.nspname || '.' || c.relname, c.oid::int8 FROM pg_class c "
            "JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind = 'r' AND lower(c.relname) = 'twin'"
        )
    )
    # of those that are made at the same time the one with the lowest OID keeps its name
    assert {table: alias for table, alias in aliases.items() if alias} == {
        table: f"{table.partition('.')[2]}_{oids[table]}" for table in ("public.twin", "public.TWIN", "Public.twin")
    }
    transactions(
        database,
        'UPDATE cases SET a = 3, "A" = 4; INSERT INTO cases VALUES (2, NULL, 1, 1); DELETE FROM ours',
        "ALTER TABLE later ADD COLUMN \"V\" int DEFAULT 5, ADD COLUMN _seq int; UPDATE later SET v = 'b', _seq = 1",
        "INSERT INTO ours VALUES (1, 'y', 'z', 2); UPDATE ours SET _lsn = 'k'; UPDATE ours SET \"_OP\" = NULL",
        'UPDATE twin SET v = \'changed\'; DELETE FROM "Twin"; UPDATE "TWIN" SET id = 3',
        'INSERT INTO "Public".twin VALUES (8); TRUNCATE twin; INSERT INTO twin VALUES (5)',
    )
    said = sync(database, lake)
    assert "column V_3 added, which is V in Postgres" in said
    agree(database, lake, tables)
    assert column_names(lake, "public.later") == ["id", "v", "V_3", "_seq_4"]
    first = copies(lake)
    transactions(database, 'ALTER TABLE cases DROP COLUMN a; UPDATE cases SET "A" = 9; ALTER TABLE later RENAME v TO w')
    sync(database, lake)
    agree(database, lake, tables)
    assert column_names(lake, "public.cases") == ["id", "A", "a_3"]
    assert column_names(lake, "public.later") == ["id", "w", "V", "_seq_4"]
    assert copies(lake) == first
    status = json.loads(run_cdc(lake, database.dsn, "status", "--json").stdout)
    told = {f"{table['schema']}.{table['name']}": (table["alias"], table["rows"]) for table in status["tables"]}
    assert told["Public.twin"] == (f"twin_{oids['Public.twin']}", 2)
    assert told["public.Twin"] == (None, 0)


def test_tables_without_columns(database: Database, lake: Lake) -> None:
    """B4: an error of that table alone, from the start or later on, and the rest of their transaction is not lost."""
    database.execute(
        """
        CREATE TABLE "none" ();
        CREATE TABLE fine (id int PRIMARY KEY, v text);
        CREATE TABLE later (v text);
        INSERT INTO "none" DEFAULT VALUES;
        INSERT INTO fine VALUES (1, 'a');
        INSERT INTO later VALUES ('a')
        """
    )
    sync(database, lake)
    assert table_state(lake, "public.none") == ("error", "table public.none has no columns, which DuckDB cannot store")
    transactions(
        database,
        "ALTER TABLE later DROP COLUMN v; INSERT INTO later DEFAULT VALUES; INSERT INTO fine VALUES (5, 'e')",
        'INSERT INTO "none" DEFAULT VALUES; INSERT INTO fine VALUES (6, NULL)',
    )
    sync(database, lake)
    agree(database, lake, {"public.fine": ["id"]})
    broken = ["public.later", "public.none"]
    assert sorted(table for table, state in states(lake).items() if state == "error") == broken
    # mended, they are copied on demand
    transactions(database, 'ALTER TABLE "none" ADD COLUMN id int DEFAULT 7', "ALTER TABLE later ADD COLUMN v text")
    done = run_cdc(lake, database.dsn, "resync", *broken)
    assert done.returncode == 0, done.stderr
    transactions(database, "INSERT INTO later VALUES ('b')")
    sync(database, lake)
    agree(database, lake, {table: [] for table in broken})


NAMES = [
    ("we ird.\"sch/ema'", 'Ta ble.%"x/../y', ["co l.\"/ü'", "select", "a%sb?", "日本語"]),
    ("..", ".", ["..", " ", "\\"]),
    ("temp", "temp", ["temp", "t", "k"]),
    ("system", "tables", ["main", "v"]),
    ("warehouse", "warehouse", ["warehouse", "v"]),
    ("main", "t", ["id", "v"]),
    ("Größe 😀", "order", ["group", "_cdc_n", "_cdc_at"]),
    ("s" * 63, "é" * 31, ["c" * 63, "C" * 62]),
    ("public", "_rows", ["n", "_keys", "_need"]),
    ("public", "Ärger", ["id", "É", "é", "ß", "ss"]),
    ("public", "ärger", ["id", "v"]),
    ("public", "a\nb\t*?[x]", ["a\nb", "$1", "{0}"]),
]


def test_names_of_every_shape(database: Database, lake: Lake) -> None:
    """B1, B7: names that have to be quoted, that mean something to DuckDB, or that a file system reads otherwise."""
    connection = database.connect()
    for schema, table, (key, *others) in NAMES:
        connection.execute(sql.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(sql.Identifier(schema)))
        columns = sql.SQL(", ").join(
            sql.SQL("{} text STORAGE EXTERNAL" if database.version >= 16 else "{} text").format(sql.Identifier(name))
            for name in others
        )
        target = sql.Identifier(schema, table)
        connection.execute(
            sql.SQL("CREATE TABLE {} ({} int PRIMARY KEY, {})").format(target, sql.Identifier(key), columns)
        )
        for name in others:
            connection.execute(
                sql.SQL("ALTER TABLE {} ALTER {} SET STORAGE EXTERNAL").format(target, sql.Identifier(name))
            )
        _fill(connection, schema, table, others, "1, 2, 3, 4")
    sync(database, lake)
    for schema, table, (key, *others) in NAMES:
        target, identifier = sql.Identifier(schema, table), sql.Identifier(key)
        _fill(connection, schema, table, others, "5, 6")
        first = sql.Identifier(others[0])
        for statement in (
            "UPDATE {t} SET {v} = 'changed' WHERE {k} = 1",
            "UPDATE {t} SET {k} = 12 WHERE {k} = 2",
            "DELETE FROM {t} WHERE {k} = 3",
            "ALTER TABLE {t} ADD COLUMN added text DEFAULT 'it''s'",
            "UPDATE {t} SET added = 'added' WHERE {k} = 5",
        ):
            connection.execute(sql.SQL(statement).format(t=target, v=first, k=identifier))
    sync(database, lake)
    for schema, table, (key, *others) in NAMES:
        picks = [key, *others, "added"]
        query = sql.SQL("SELECT {} FROM {}").format(
            sql.SQL(", ").join(map(sql.Identifier, picks)), sql.Identifier(schema, table)
        )
        source: Counter[tuple[Any, ...]] = Counter(connection.execute(query))
        assert len(source) == 5
        names = ", ".join(map(quote, picks))
        mirror = warehouse_rows(lake, f"SELECT {names} FROM {quote('warehouse', schema, table)}")
        assert Counter(mirror) == source, (schema, table)
        paths = warehouse_rows(
            lake,
            f"SELECT path FROM _cdc.files WHERE schema_name = {_text(schema)} AND table_name = {_text(table)}",
        )
        assert len(paths) >= 3
        for (path,) in paths:
            file = lake.history / path
            assert file.is_file()
            assert file.resolve().parent.parent.parent == lake.history.resolve()  # <history>/<schema>/<table>/<file>
    assert set(states(lake).values()) == {"streaming"}


def _fill(connection: psycopg.Connection[Any], schema: str, table: str, others: list[str], keys: str) -> None:
    values = sql.SQL(", ").join([sql.SQL("repeat({}, 3000)").format(name) for name in others])
    connection.execute(
        sql.SQL("INSERT INTO {} SELECT i, {} FROM unnest(ARRAY[{}]) i").format(
            sql.Identifier(schema, table),
            values,
            sql.SQL(keys),
        )
    )


def _text(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def test_one_name_in_two_schemas(database: Database, lake: Lake) -> None:
    """B7: tables of one name in several schemas do not meet."""
    database.execute(
        """
        CREATE SCHEMA a; CREATE SCHEMA b;
        CREATE TABLE a.t (id int PRIMARY KEY, v text);
        CREATE TABLE b.t (id int PRIMARY KEY, w int);
        INSERT INTO a.t VALUES (1, 'a');
        INSERT INTO b.t VALUES (1, 1)
        """
    )
    sync(database, lake)
    transactions(
        database, "UPDATE a.t SET v = 'b'; INSERT INTO b.t VALUES (2, 2); TRUNCATE a.t; INSERT INTO a.t VALUES (3, 'c')"
    )
    sync(database, lake)
    agree(database, lake, {"a.t": ["id"], "b.t": ["id"]})
    assert (operations(lake, "a.t"), operations(lake, "b.t")) == ("UTI", "I")


@only_18
def test_generated_columns(database: Database, lake: Lake) -> None:
    """B8, B9: identity and default columns are columns as any; generated ones are not published and not mirrored."""
    database.execute(
        """
        CREATE TABLE t (
            id bigint GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY, n int DEFAULT 5,
            double int GENERATED ALWAYS AS (n * 2) STORED, v text);
        INSERT INTO t (v) VALUES ('a'), ('b')
        """
    )
    sync(database, lake)
    transactions(database, "INSERT INTO t (n, v) VALUES (7, 'c')", "UPDATE t SET n = 8 WHERE id = 1")
    sync(database, lake)
    agree(database, lake, {"public.t": ["id"]})
    assert column_names(lake, "public.t") == ["id", "n", "v"]
    assert differences(database, lake, "public.t") == ""
    assert mirrored_rows(database, lake, "public.t") == source_rows(database, lake, "public.t")


@only_18
def test_trouble_within_a_large_transaction(database: Database, lake: Lake) -> None:
    """H2, C17: a table that fails in the midst of a transaction in pieces costs the other tables of it nothing."""
    database.execute(
        """
        CREATE TABLE fine (id int PRIMARY KEY, v text);
        CREATE TABLE retyped (id int PRIMARY KEY, n int);
        CREATE TABLE broken (id int PRIMARY KEY, v text);
        INSERT INTO retyped VALUES (1, 1);
        INSERT INTO broken VALUES (1, 'a')
        """
    )
    sync(database, lake)
    first = copies(lake)
    rows = "INSERT INTO fine SELECT i, 'v' FROM generate_series({}, {}) i;"
    database.execute(
        rows.format(1, 500)
        + "ALTER TABLE retyped ALTER n TYPE bigint; INSERT INTO retyped SELECT i, i FROM generate_series(2, 400) i;"
        + rows.format(501, 800)
        + "ALTER TABLE broken DROP COLUMN id, DROP COLUMN v; INSERT INTO broken SELECT FROM generate_series(2, 400);"
        + "UPDATE fine SET v = 'w' WHERE id % 3 = 0;"
    )
    output = sync(database, lake, flush_rows="100")
    assert output.count("state=resyncing") == output.count("state=error") == 1
    agree(database, lake, {"public.fine": ["id"], "public.retyped": ["id"]})
    assert copies(lake)["public.retyped"] > first["public.retyped"]
    assert table_state(lake, "public.broken")[0] == "error"
    assert operations(lake, "public.fine") == "I" * 800 + "U" * 266
    ((pieces,),) = log(lake, "public.fine", "SELECT count(DISTINCT _lsn) FROM log WHERE _seq > 0")
    files = warehouse_rows(lake, "SELECT count(*) FROM _cdc.files WHERE table_name = 'fine' AND rows <= 100")
    assert (pieces, files[0][0] > 5) == (1, True)
