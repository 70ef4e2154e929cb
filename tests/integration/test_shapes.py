"""Tables that are very wide or very many, other encodings, and types that come from elsewhere, or are gone."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import psycopg
import pytest

from cdc.pgoutput.types.table import TYPES
from tests.conftest import Database, Lake
from tests.integration.steps import agree, copies, quarantine, sync, table_state, transactions
from tests.integration.tailing import Tail
from tests.mirror import mirror_once, run_cdc, states, until, warehouse_rows

only_18 = pytest.mark.parametrize("server", [18], indirect=True, ids=["pg18"])


@only_18
def test_1600_columns(database: Database, lake: Lake) -> None:
    """B5: as many as Postgres allows, some of them toasted, one dropped in the middle."""
    kinds = ["int", "text", "bool", "date"]
    values = ["7", "'a'", "true", "'2024-02-29'"]
    columns = ", ".join(f"c{n} {kinds[n % 4]}" for n in range(1598))
    database.execute(f"CREATE TABLE wide (id int PRIMARY KEY, big text STORAGE EXTERNAL, {columns})")
    some = [n for n in range(1598) if n % 9 == 0]
    names, row = ", ".join(f"c{n}" for n in some), ", ".join(values[n % 4] for n in some)
    insert = (
        f"INSERT INTO wide (id, big, {names}) SELECT i, repeat('x', 3000), {row} FROM generate_series({{}}, {{}}) i"
    )
    database.execute(insert.format(1, 20))
    sync(database, lake)
    agree(database, lake, {"public.wide": ["id"]})
    transactions(
        database,
        insert.format(21, 60),
        "UPDATE wide SET c0 = 8, c1597 = NULL WHERE id % 2 = 0",
        "ALTER TABLE wide DROP COLUMN c800; UPDATE wide SET c1 = 'b' WHERE id % 3 = 0",
        "DELETE FROM wide WHERE id % 5 = 0",
    )
    sync(database, lake)
    agree(database, lake, {"public.wide": ["id"]})


@only_18
@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(600)])])
def test_many_tables(database: Database, lake: Lake, count: int) -> None:
    """B5, C17: one publication, one slot, many tables; and a transaction that touches all of them."""
    for first in range(0, count, 40):
        database.execute(
            "".join(
                f"CREATE TABLE t{n} (id int PRIMARY KEY, v text); INSERT INTO t{n} VALUES ({n}, 'a');"
                for n in range(first, first + 40)
            )
        )
    sync(database, lake)
    assert Counter(states(lake).values()) == {"streaming": count}
    database.execute("".join(f"INSERT INTO t{n} VALUES (-1, 'b'); UPDATE t{n} SET v = 'c';" for n in range(count)))
    sync(database, lake)
    rows = " UNION ALL ".join(f"SELECT {n}, id, v FROM public.t{n}" for n in range(count))
    with database.connect() as connection:
        expected = connection.execute(rows.encode()).fetchall()
    assert sorted(warehouse_rows(lake, rows)) == sorted(expected)
    assert len(expected) == 2 * count


def in_encoding(database: Database, name: str) -> Database:
    """Make the database anew, in another encoding."""
    with psycopg.connect(database.dsn.rsplit("/", 1)[0] + "/postgres", autocommit=True) as connection:
        connection.execute(f'DROP DATABASE "{database.name}"'.encode())
        connection.execute(
            f"CREATE DATABASE \"{database.name}\" TEMPLATE template0 ENCODING '{name}' LOCALE 'C'".encode()
        )
        # of the tests' own sessions; a consumer sees to itself
        connection.execute(f"ALTER DATABASE \"{database.name}\" SET client_encoding = 'UTF8'".encode())
    return database


def test_latin1(database: Database, lake: Lake) -> None:
    """A9, J20: the server converts, in the copy and in the stream, names too."""
    in_encoding(database, "LATIN1")
    database.execute("CREATE TABLE größe (id int PRIMARY KEY, straße text); INSERT INTO größe VALUES (1, 'é ß ÿ ¿')")
    sync(database, lake)
    transactions(database, "INSERT INTO größe VALUES (2, 'ÄÖÜ'), (3, '')", "UPDATE größe SET straße = 'ñ' WHERE id = 1")
    sync(database, lake)
    agree(database, lake, {"public.größe": ["id"]})
    assert warehouse_rows(lake, 'SELECT "straße" FROM public."größe" ORDER BY id') == [("ñ",), ("ÄÖÜ",), ("",)]


def test_sql_ascii(database: Database, lake: Lake) -> None:
    """A9, J20: what is UTF-8 arrives as it is; other bytes are in the quarantine, by copy, insert and update."""
    in_encoding(database, "SQL_ASCII")
    raw = {1: "convert_from('\\xe9', 'SQL_ASCII')", 2: "convert_from('\\xc3a9', 'SQL_ASCII')", 3: "'plain'"}
    create = "CREATE TABLE t (id int PRIMARY KEY, v text, l text[]);"
    database.execute(create + "".join(f"INSERT INTO t VALUES ({n}, {v}, ARRAY[{v}]);" for n, v in raw.items()))
    sync(database, lake)
    transactions(
        database,
        *(f"INSERT INTO t VALUES ({n} + 10, {v}, ARRAY[{v}])" for n, v in raw.items()),
        "UPDATE t SET v = convert_from('\\xff', 'SQL_ASCII') WHERE id = 3",
    )
    sync(database, lake)
    rows = [(1, None, None), (2, "é", ["é"]), (3, None, ["plain"])]
    rows += [(11, None, None), (12, "é", ["é"]), (13, "plain", ["plain"])]
    assert warehouse_rows(lake, "SELECT id, v, l FROM public.t ORDER BY id") == rows
    current = {entry[:3] for entry in quarantine(lake, "public.t") if entry[3]}
    assert current == {
        ("v", '{"id": "1"}', "\\xe9"),
        ("v", '{"id": "11"}', "\\xe9"),
        ("v", '{"id": "3"}', "\\xff"),
        ("l", '{"id": "1"}', "{\\xe9}"),
        ("l", '{"id": "11"}', "{\\xe9}"),
    }


def test_keys_that_are_no_text(database: Database, lake: Lake) -> None:
    """C7, J20: a key that is not even text is an error of its table, and of no other."""
    in_encoding(database, "SQL_ASCII")
    database.execute(
        "CREATE TABLE t (v text PRIMARY KEY); INSERT INTO t VALUES (convert_from('\\xe9', 'SQL_ASCII'));"
        "CREATE TABLE u (v text PRIMARY KEY); INSERT INTO u VALUES ('a')"
    )
    sync(database, lake)
    state, reason = table_state(lake, "public.t")
    assert state == "error"
    assert "key column v of public.t holds bytes that are no text" in reason
    agree(database, lake, {"public.u": ["v"]})


EXTENSIONS = {
    "hstore": ['\'a=>1, b=>NULL, "c d"=>"q\\"uo,te"\'', "''"],
    "citext": ["'Case Kept'", "''"],
    "ltree": ["'Top.Science.Astronomy'", "''"],
    "isn": ["'978-0-393-04002-9'"],
    "cube": ["'(1,2),(3,4)'"],
    "seg": ["'1 .. 2'"],
}
TYPES_OF = {"isn": "isbn13"}


def test_types_of_extensions(database: Database, lake: Lake) -> None:
    """A12, A22: each as its text, its arrays as lists of texts."""
    there = {name for (name,) in database.execute("SELECT name FROM pg_available_extensions")}
    kinds = {TYPES_OF.get(name, name): values for name, values in EXTENSIONS.items() if name in there}
    if not kinds:
        pytest.skip("this server has no contrib modules")
    database.execute("".join(f"CREATE EXTENSION {name};" for name in EXTENSIONS if name in there))
    columns = ", ".join(f"{kind} {kind}, {kind}s {kind}[]" for kind in kinds)
    database.execute(f"CREATE TABLE t (id int PRIMARY KEY, {columns})")
    picks = ", ".join(f"{kind}, {kind}s" for kind in kinds)
    rows = [
        ", ".join(f"{v[row % len(v)]}, ARRAY[{v[0]}, NULL]::{kind}[]" for kind, v in kinds.items()) for row in range(2)
    ]
    for number, row in enumerate(rows):
        database.execute(f"INSERT INTO t (id, {picks}) VALUES ({number}, {row})")
    sync(database, lake)
    transactions(
        database,
        *(f"INSERT INTO t (id, {picks}) VALUES ({10 + number}, {row})" for number, row in enumerate(rows)),
        f"UPDATE t SET ({picks}) = (SELECT {picks} FROM t WHERE id = 1) WHERE id = 0",
    )
    sync(database, lake)
    agree(database, lake, {"public.t": ["id"]})
    found = warehouse_rows(lake, "SELECT DISTINCT data_type FROM duckdb_columns() WHERE table_name = 't' ORDER BY ALL")
    assert [kind for (kind,) in found] == ["INTEGER", "VARCHAR", "VARCHAR[]"]


def test_a_type_that_is_gone(database: Database, lake: Lake) -> None:
    """A21: by the time the stream comes to it the type has no row in pg_type any more; the text arrives."""
    database.execute("CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE u (id int PRIMARY KEY)")
    sync(database, lake)
    transactions(
        database,
        "CREATE TYPE mood AS ENUM ('so so'); CREATE DOMAIN price AS numeric(10,2)",
        "ALTER TABLE t ADD m mood, ADD p price, ADD ms mood[]; CREATE TABLE v (id int PRIMARY KEY, m mood)",
        "INSERT INTO t VALUES (1, 'so so', 1.50, '{so so}'); INSERT INTO u VALUES (1)",
        "INSERT INTO v VALUES (1, 'so so'); ALTER TABLE t DROP m, DROP p, DROP ms; DROP TABLE v",
        "DROP TYPE mood; DROP DOMAIN price; INSERT INTO t VALUES (2)",
    )
    sync(database, lake)
    agree(database, lake, {"public.t": ["id"], "public.u": ["id"]})


def test_choices(database: Database, lake: Lake) -> None:
    """CDC_TYPES: held as chosen, by copy and stream; another choice is followed by a copy, without being asked."""
    chosen = "public.t.a:DOUBLE,public.t.b:DECIMAL(20,4),public.t.c:VARCHAR,public.t.d:varchar"
    row = "1234567890.12345, 99.5, '{\"a\": 1}'::jsonb, '00000000-0000-0000-0000-00000000000a'::uuid"
    database.execute(
        "CREATE TABLE t (id int PRIMARY KEY, a numeric, b numeric, c jsonb, d uuid, e numeric);"
        f"INSERT INTO t VALUES (1, {row}, 1e400)"
    )
    sync(database, lake, types=chosen)
    transactions(
        database,
        f"INSERT INTO t VALUES (2, {row}, 'NaN'); INSERT INTO t VALUES (3, 'NaN', 1e16, 'null', NULL, 1)",
        "INSERT INTO t VALUES (4, 1e400, 0.00001, NULL, NULL, 1); UPDATE t SET b = 7 WHERE id = 1",
    )
    sync(database, lake, types=chosen)
    assert kinds(lake) == ["INTEGER", "DOUBLE", "DECIMAL(20,4)", "VARCHAR", "VARCHAR", "VARCHAR"]
    found = warehouse_rows(lake, "SELECT id, a::VARCHAR, b::VARCHAR, c, d FROM public.t ORDER BY id")
    uuid = "00000000-0000-0000-0000-00000000000a"
    assert found == [
        (1, "1234567890.12345", "7.0000", '{"a": 1}', uuid),
        (2, "1234567890.12345", "99.5000", '{"a": 1}', uuid),
        (3, "nan", None, "null", None),
        (4, None, None, None, None),
    ]
    ten = "1" + "0" * 400
    current = {entry[:3] for entry in quarantine(lake, "public.t") if entry[3]}
    assert current == {
        ("a", '{"id": "4"}', ten),
        ("b", '{"id": "3"}', "10000000000000000"),
        ("b", '{"id": "4"}', "0.00001"),
    }
    first = copies(lake)
    said = mirror_once(lake, database.dsn, types="public.t.b:VARCHAR")
    assert "column a is to be a VARCHAR, and was a DOUBLE" in said
    assert copies(lake) != first
    assert kinds(lake) == ["INTEGER", "VARCHAR", "VARCHAR", "JSON", "UUID", "VARCHAR"]
    transactions(database, "UPDATE t SET a = 1 WHERE id = 2")
    sync(database, lake, types="public.t.b:VARCHAR")
    agree(database, lake, {"public.t": ["id"]})


def kinds(lake: Lake) -> list[Any]:
    """Return the types of the columns of table t."""
    query = "SELECT data_type FROM duckdb_columns() WHERE table_name = 't' ORDER BY column_index"
    return [kind for (kind,) in warehouse_rows(lake, query)]


@only_18
def test_choices_that_cannot_be(database: Database, lake: Lake) -> None:
    """CDC_TYPES: refused before anything is made, by `run` and `check` alike; exit status 2."""
    database.execute("CREATE TABLE t (id int PRIMARY KEY, n numeric, v text); CREATE TABLE k (n numeric PRIMARY KEY)")
    for types, words in (
        ("public.t.v:DOUBLE", "public.t.v cannot be held as DOUBLE"),
        ("public.t.id:DECIMAL(5,2)", "public.t.id cannot be held as DECIMAL(5,2)"),
        ("public.k.n:DOUBLE", "public.k.n cannot be held as DOUBLE"),
        ("public.t.m:DOUBLE", "there is no column public.t.m"),
    ):
        done = run_cdc(lake, database.dsn, "run", "--once", types=types)
        assert (done.returncode, words in done.stderr) == (2, True), done.stderr
        found = run_cdc(lake, database.dsn, "check", types=types)
        assert (found.returncode, words in found.stdout) == (3, True), found.stdout
    assert database.execute("SELECT count(*) FROM pg_publication") == [(0,)]


@only_18
def test_values_that_are_read_along(database: Database, lake: Lake) -> None:
    """`cdc tail`: what Python has no value for is told as Postgres prints it."""
    database.execute("CREATE TABLE t (id int PRIMARY KEY, d date, ts timestamp, tm time, i interval, l int[])")
    sync(database, lake)
    with Tail(lake, database.dsn, "--format", "json") as tail:
        database.execute("INSERT INTO t VALUES (1, 'infinity', '0044-03-15 BC', '24:00', '1 mon', '{1,NULL}')")
        database.execute("INSERT INTO t VALUES (2, '2024-02-29', '2024-02-29 12:00', '12:00', NULL, '{}')")
        until(lambda: len(tail.lines) == 2)
    first, second = (json.loads(line)["new"] for line in tail.lines)
    assert first == {
        "id": 1, "d": "infinity", "ts": "0044-03-15 00:00:00 BC", "tm": "24:00:00", "i": "1 mon", "l": "{1,NULL}"
    }  # fmt: skip
    assert second == {
        "id": 2, "d": "2024-02-29", "ts": "2024-02-29T12:00:00", "tm": "12:00:00", "i": None, "l": "{}"
    }  # fmt: skip


def test_the_table_has_every_type(database: Database) -> None:
    """A1 to A20: whatever type this server has of its own is in the table of types, with its array and delimiter."""
    found = database.execute(
        "SELECT t.oid::int8, t.typarray::int8, t.typdelim::text FROM pg_type t "
        "JOIN pg_namespace n ON n.oid = t.typnamespace WHERE n.nspname = 'pg_catalog' AND t.typtype IN ('b', 'r', 'm') "
        "AND NOT EXISTS (SELECT FROM pg_type e WHERE e.typarray = t.oid)"
    )
    known = {(row.oid, row.array_oid, row.delimiter) for row in TYPES}
    assert set(found) - known == set()


@only_18
def test_generated_columns_that_are_published(database: Database, lake: Lake) -> None:
    """B9: from PostgreSQL 18 on a publication may have stored ones; virtual ones are never sent."""
    database.execute(
        """
        CREATE TABLE t (id int PRIMARY KEY, n int, double int GENERATED ALWAYS AS (n * 2) STORED,
            triple int GENERATED ALWAYS AS (n * 3) VIRTUAL, v text);
        INSERT INTO t (id, n) VALUES (1, 1);
        CREATE PUBLICATION cdc FOR TABLE t WITH (publish_generated_columns = stored)
        """
    )
    sync(database, lake)
    transactions(database, "INSERT INTO t (id, n, v) VALUES (2, 2, 'a')", "UPDATE t SET n = 5 WHERE id = 1")
    sync(database, lake)
    found = warehouse_rows(lake, "SELECT * FROM public.t ORDER BY id")
    assert found == [(1, 5, 10, None), (2, 2, 4, "a")]
