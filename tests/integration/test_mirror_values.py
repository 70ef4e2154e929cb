"""Values of every kind of type, by copy, insert and update alike; and values that their type here cannot hold."""

from __future__ import annotations

import json
import time
from collections import Counter
from typing import Any

import psycopg
import pytest

from tests.conftest import Database, Lake
from tests.integration.steps import agree, copies, log, operations, quarantine, sync, table_state, transactions
from tests.mirror import exact_differences, mirror_once, mirrored_rows, run_cdc, warehouse_rows

only_18 = pytest.mark.parametrize("server", [18], indirect=True, ids=["pg18"])

# Postgres type, DuckDB type, and values as SQL; NULL comes with each
TYPES = [
    ("bool", "BOOLEAN", ["true", "false"]),
    ("int2", "SMALLINT", ["-32768", "32767", "0"]),
    ("int4", "INTEGER", ["-2147483648", "2147483647", "0"]),
    ("int8", "BIGINT", ["-9223372036854775808", "9223372036854775807", "0"]),
    ("float4", "FLOAT", ["'NaN'", "'Infinity'", "'-Infinity'", "'-0'", "1.1", "3.4028235e38", "1e-45", "16777217"]),
    ("float8", "DOUBLE", ["'NaN'", "'Infinity'", "'-Infinity'", "'-0'", "0.1", "1e-310", "1.7976931348623157e308"]),
    ("numeric(12,4)", "DECIMAL(12,4)", ["1", "-0.0001", "99999999.9999", "0"]),
    ("numeric(38,10)", "DECIMAL(38,10)", ["-1234567890123456789012345678.0123456789", "1e-10"]),
    ("numeric(5,-2)", "VARCHAR", ["123456", "-100"]),
    ("numeric(40,2)", "VARCHAR", ["12345678901234567890123456789012345678.90", "'NaN'"]),
    ("numeric", "VARCHAR", ["1.000", "'NaN'", "'-Infinity'", "1e400", "1e-400", "-0.10"]),
    ("text", "VARCHAR", [
        "''", "' '", "'NULL'", r"'\N'", r"'\.'", "'it''s'", "'\"'", "'\"\"'", "','", "'a,\"b\"'", r"'back\slash\'",
        r"E'line\nfeed\rreturn\r\nboth\ttab\x01\x7f'", r"E'\n'", r"E'\uFFFF\U0001F600e\u0301\u200d\u202e'",
        "repeat('long ''\"\\ ', 3000)", "'%s {0} $1'",
    ]),
    ("varchar(10)", "VARCHAR", ["'ten chars '", "''"]),
    ("char(6)", "VARCHAR", ["'a'", "'sixsix'", "''"]),
    ('"char"', "VARCHAR", ["'x'", "''"]),
    ("name", "VARCHAR", ["'pg_class'"]),
    ("date", "DATE", [
        "'infinity'", "'-infinity'", "'4713-01-01 BC'", "'0001-12-31 BC'", "'5874897-12-31'", "'10000-01-01'"]),
    ("timestamp", "TIMESTAMP", [
        "'infinity'", "'-infinity'", "'4714-11-24 00:00:00 BC'", "'0044-03-15 12:00 BC'", "'10000-01-01'",
        "'294247-01-10 04:00:54.775806'"]),
    ("timestamptz", "TIMESTAMP WITH TIME ZONE", [
        "'infinity'", "'-infinity'", "'4714-11-24 00:00:00+00 BC'", "'10000-01-01 00:00+00'",
        "'294247-01-10 04:00:54.775806+00'"]),
    ("time", "TIME", ["'24:00:00'"]),
    ("date", "DATE", ["'0001-01-01'", "'9999-12-31'", "'1582-10-10'", "'1969-12-31'", "'2024-02-29'"]),
    ("time", "TIME", ["'00:00'", "'23:59:59.999999'", "'12:00:00.1'"]),
    ("timestamp", "TIMESTAMP", [
        "'0001-01-01'", "'9999-12-31 23:59:59.999999'", "'1969-12-31 23:59:59.999999'", "'2024-03-31 02:30:00.12'",
    ]),
    ("timestamptz", "TIMESTAMP WITH TIME ZONE", [
        "'0001-01-01 00:00+00'", "'9999-12-31 23:59:59.999999+00'", "'2024-03-31 02:30:00.000001 Europe/Berlin'",
        "'1883-11-18 12:03:57 America/New_York'",
    ]),
    ("uuid", "UUID", ["'00000000-0000-0000-0000-000000000000'", "'FFFFFFFF-ffff-4fff-bfff-ffffffffffff'"]),
    ("json", "JSON", [
        "'{\"b\" :  1, \"a\":1,\"a\":2}'", "'null'", "'\"\"'", r"""'"\ud83d\ude00\u0000"'""", "'1e400'", "'-0'",
        "(repeat('[', 500) || repeat(']', 500))::json", "' [1 , 2]\n'", "'123456789012345678901234567890'",
    ]),
    ("jsonb", "JSON", ["'{\"b\": 1, \"a\": {\"c\": []}}'", "'null'", "'1e400'", "'\"é😀\"'", "'1.10'", "'{}'"]),
    ("bytea", "BLOB", [r"'\x'", f"'\\x{bytes(range(256)).hex()}'", r"'\x5c783030'", "decode(repeat('00', 9), 'hex')"]),
    ("mood", "VARCHAR", ["'sad'", "'so so'", "'größer 😀'"]),
    ("int4[]", "INTEGER[]", ["'{}'", "'{1,NULL,-3}'"]),
    ("text[]", "VARCHAR[]", [r"""'{NULL,"NULL","a,b","q\"uote","back\\slash","{}",""," ","é😀"}'""", "'{}'"]),
    ("interval", "INTERVAL", [
        "'1 year 2 mons -3 days 04:05:06.7'", "'0'", "'-1 mons +2 days -00:00:00.000001'",
        "'178956970 years 7 mons 2147483647 days 2562047788:00:54.775806'",
        "'-178956970 years -8 mons -2147483648 days'", "'-1 years +1 mon'",
    ]),
    ("timetz", "VARCHAR", ["'12:00:00+05:30'", "'24:00:00-15:59:59'"]),
    ("inet", "VARCHAR", ["'192.168.0.1/24'", "'2001:db8::/32'"]),
    ("int4range", "VARCHAR", ["'empty'", "'[1,5)'", "'(,)'"]),
    ("point", "VARCHAR", ["'(1e-300,Infinity)'"]),
    ("oid", "VARCHAR", ["4294967295", "0"]),
    ("bit(3)", "VARCHAR", ["B'101'"]),
    ("tsvector", "VARCHAR", ["'a:1 b:2'"]),
    ("pair", "VARCHAR", ["ROW(1, 'a,\"b\"')", "ROW(NULL, '')"]),
    ("price", "DECIMAL(10,2)", ["1.50", "-1"]),
    ("price[]", "DECIMAL(10,2)[]", ["'{1.50,NULL}'", "'{}'"]),
    ("prices", "DECIMAL(10,2)[]", ["'{1.50,NULL}'", "'{}'"]),
    ("dear", "DECIMAL(10,2)", ["1.50"]),
    ("mood[]", "VARCHAR[]", ["'{sad,NULL,\"so so\"}'"]),
    ("pair[]", "VARCHAR[]", ["ARRAY[ROW(1, 'a,\"b\"')::pair, NULL, ROW(NULL, '')::pair]"]),
    ("interval[]", "INTERVAL[]", ["'{1 mon,NULL,-3 days 00:00:01}'", "'{}'"]),
    ("json[]", "JSON[]", ["""ARRAY['{"a": "\\u00e9"}', 'null', NULL]::json[]"""]),
    ("uuid[]", "UUID[]", ["'{00000000-0000-0000-0000-000000000000,NULL}'"]),
    ("bytea[]", "BLOB[]", [r"""ARRAY['\x', '\x5c22', NULL]::bytea[]"""]),
    ("timestamptz[]", "TIMESTAMP WITH TIME ZONE[]", ["'{infinity,2024-02-29 12:00:00+00,NULL,0044-03-15 BC}'"]),
    ("date[]", "DATE[]", ["'{-infinity,2024-02-29}'"]),
    ("float8[]", "DOUBLE[]", ["'{NaN,-0,1e-310,Infinity}'"]),
    ("numeric[]", "VARCHAR[]", ["'{NaN,1e400,1.000}'"]),
    ("bool[]", "BOOLEAN[]", ["'{t,f,NULL}'"]),
    ("char(4)[]", "VARCHAR[]", ["'{a,sixx}'"]),
    ("box[]", "VARCHAR[]", ["'{(1,1),(0,0);(2,2),(1,1)}'"]),
    ("numrange[]", "VARCHAR[]", ["""'{"[1,2)",empty,NULL}'"""]),
    ("money", "VARCHAR", ["'-92233720368547758.08'", "'1234.5'"]),
]  # fmt: skip


def create(database: Database, table: str) -> list[str]:
    """Create `table` with a column per type; return the rows that `TYPES` make, as lists of values in SQL."""
    columns = ", ".join(f"c{number} {kind}" for number, (kind, _, _) in enumerate(TYPES))
    transactions(
        database,
        "CREATE TYPE mood AS ENUM ('sad', 'so so', 'größer 😀')",
        "CREATE TYPE pair AS (a int, b text)",
        "CREATE DOMAIN price AS numeric(10,2)",
        "CREATE DOMAIN prices AS price[]",
        "CREATE DOMAIN dear AS price CHECK (VALUE > 0)",
        f"CREATE TABLE {table} (id int PRIMARY KEY, path text, {columns})",
    )
    rows = max(len(values) for _, _, values in TYPES)
    return [", ".join(values[row] if row < len(values) else "NULL" for _, _, values in TYPES) for row in range(rows)]


def test_values_by_every_path(database: Database, lake: Lake) -> None:
    """A1 to A11, A13, A15 to A18, A20: copied, inserted, updated from NULL and to NULL."""
    rows = create(database, "t")
    columns = [f"c{number}" for number in range(len(TYPES))]

    def insert(path: str, first: int, values: list[str]) -> None:
        for number, row in enumerate(values):
            database.execute(f"INSERT INTO t VALUES ({first + number}, '{path}', {row})")

    nulls = ", ".join(["NULL"] * len(TYPES))
    insert("copied", 0, rows)
    insert("set", 100, [nulls] * len(rows))
    insert("cleared", 200, rows)
    sync(database, lake)
    insert("inserted", 300, rows)
    for number in range(len(rows)):
        picks = ", ".join(columns)
        database.execute(
            f"UPDATE t SET ({picks}) = (SELECT {picks} FROM t WHERE id = {number}) WHERE id = {100 + number}"
        )
    database.execute(f"UPDATE t SET ({', '.join(columns)}) = ROW({nulls}) WHERE path = 'cleared'")
    sync(database, lake)
    agree(database, lake, {"public.t": ["id"]})
    count = len(rows)
    assert operations(lake, "public.t") == "I" * count + "U" * 2 * count
    assert log(lake, "public.t", "SELECT count(*) FROM log WHERE _op = 'S'") == [(3 * count,)]
    kinds = warehouse_rows(
        lake,
        "SELECT data_type FROM duckdb_columns() WHERE schema_name = 'public' AND table_name = 't' "
        "ORDER BY column_index",
    )
    assert [kind for (kind,) in kinds] == ["INTEGER", "VARCHAR", *(duckdb for _, duckdb, _ in TYPES)]
    assert quarantine(lake, "public.t") == []


def test_values_in_a_session_of_other_settings(database: Database, lake: Lake) -> None:
    """Trap 10, J19: what a role or database sets for its sessions changes nothing of the text that values come in."""
    rows = create(database, "t")
    transactions(
        database,
        *(
            f'ALTER DATABASE "{database.name}" SET {setting}'
            for setting in (
                "datestyle = 'SQL, DMY'",
                "intervalstyle = 'iso_8601'",
                "timezone = 'Asia/Kathmandu'",
                "bytea_output = 'escape'",
                "extra_float_digits = -5",
                "xmlbinary = 'hex'",
                "search_path = 'nowhere'",
                "default_transaction_read_only = 'on'",
                "default_transaction_isolation = 'serializable'",
                "statement_timeout = '30s'",
            )
        ),
    )
    writer = psycopg.connect(database.dsn, autocommit=True, options="-c default_transaction_read_only=off")
    writer.execute("SET search_path = public")
    for number, row in enumerate(rows):
        writer.execute(f"INSERT INTO t VALUES ({number}, 'copied', {row})".encode())
    assert writer.execute("SELECT '2024-02-29'::date::text, '\\x00'::bytea::text").fetchone() == ("29/02/2024", r"\000")
    sync(database, lake)
    for number, row in enumerate(rows):
        writer.execute(f"INSERT INTO t VALUES ({100 + number}, 'inserted', {row})".encode())
    writer.close()
    sync(database, lake)
    with psycopg.connect(database.dsn.rsplit("/", 1)[0] + "/postgres", autocommit=True) as connection:
        connection.execute(f'ALTER DATABASE "{database.name}" RESET ALL'.encode())
    agree(database, lake, {"public.t": ["id"]})


UNFIT = {
    "n": ("numeric(10,2)", ["'NaN'"]),
    "ts": ("timestamp", ["'294276-12-31 23:59:59.999999'", "'294247-01-10 04:00:54.775807'"]),
    "tz": ("timestamptz", ["'294276-12-31 23:59:59.999999+00'"]),
    "d": ("int4[]", ["'{{1}}'", "'[0:0]={1}'", "'{{1,2},{3,NULL}}'", "'[-1:0][2:3]={{1,2},{3,4}}'"]),
    "tm": ("numeric(5,2)[]", ["'{NaN}'", "'{1.50,NULL,NaN}'"]),
    "j": ("json", [r"""'"\ud800"'""", r"""'["\udc00", 1]'"""]),
}

UNFIT_TABLE = (
    f"CREATE TABLE t (id int PRIMARY KEY, v text, {', '.join(f'{name} {kind[0]}' for name, kind in UNFIT.items())})"
)


def held(database: Database, ids: str = "true") -> Counter[tuple[Any, ...]]:
    """Return (column, key, exact text) of each value of table t that does not fit, which is none of `GOOD`."""
    names = list(UNFIT)
    with psycopg.connect(database.dsn, options="-c timezone=UTC") as connection:
        rows = connection.execute(
            f"SELECT id, {', '.join(f'{name}::text' for name in names)} FROM t WHERE {ids}".encode()
        ).fetchall()
    return Counter(
        (name, json.dumps({"id": str(key)}), value)
        for key, *values in rows
        for name, value in zip(names, values, strict=True)
        if value is not None and value not in GOOD.values()
    )


GOOD = {
    "n": "1.50",
    "ts": "2024-02-29 12:00:00",
    "tz": "2024-02-29 12:00:00+00",
    "d": "{1}",
    "tm": "{2.50}",
    "j": '{"a": 1}',
}


def current(lake: Lake, table: str = "public.t") -> Counter[tuple[Any, ...]]:
    """Return (column, key, value) of what the quarantine says the rows still hold."""
    return Counter(entry[:3] for entry in quarantine(lake, table) if entry[3])


def test_values_that_do_not_fit(database: Database, lake: Lake) -> None:
    """A3, A5 to A7, trap 9: by every path they are NULL in the table and, as exact text, in the quarantine."""
    rows = max(len(values) for _, values in UNFIT.values())
    picks = [
        ", ".join(values[row] if row < len(values) else f"'{GOOD[name]}'" for name, (_, values) in UNFIT.items())
        for row in range(rows)
    ]
    good = ", ".join(f"'{value}'" for value in GOOD.values())
    database.execute(
        f"CREATE TABLE t (id int PRIMARY KEY, {', '.join(f'{name} {kind}' for name, (kind, _) in UNFIT.items())})"
    )
    database.execute("".join(f"INSERT INTO t VALUES ({row}, {values});" for row, values in enumerate(picks)))
    database.execute("".join(f"INSERT INTO t VALUES ({100 + row}, {good});" for row in range(rows)))
    sync(database, lake)
    bad = sum(len(values) for _, values in UNFIT.values())
    assert current(lake) == held(database)
    assert held(database).total() == bad
    columns = ", ".join(UNFIT)
    database.execute("".join(f"INSERT INTO t VALUES ({200 + row}, {values});" for row, values in enumerate(picks)))
    for row in range(rows):
        database.execute(
            f"UPDATE t SET ({columns}) = (SELECT {columns} FROM t WHERE id = {row}) WHERE id = {100 + row}"
        )
    sync(database, lake)
    assert current(lake) == held(database)
    assert held(database).total() == 3 * bad
    # NULL where it does not fit, the value where it does, by every path alike
    texts = ", ".join(f"CAST({name} AS VARCHAR)" for name in UNFIT)
    found = warehouse_rows(lake, f"SELECT id // 100, id % 100, {texts} FROM public.t ORDER BY id")
    shown = GOOD | {"d": "[1]", "tm": "[2.50]"}
    expected = [
        tuple(None if row < len(values) else shown[name] for name, (_, values) in UNFIT.items()) for row in range(rows)
    ]
    assert found == [(path, row, *expected[row]) for path in range(3) for row in range(rows)]
    # the history has the same NULLs, and the quarantine names the very change
    assert log(
        lake, "public.t", f"SELECT id // 100, id % 100, {texts} FROM log WHERE _op IN ('I', 'U') ORDER BY id"
    ) == [(path, row, *expected[row]) for path in (1, 2) for row in range(rows)]
    changes = log(lake, "public.t", "SELECT _lsn, _seq FROM log WHERE _op <> 'T' AND n IS NULL")
    entries = warehouse_rows(lake, "SELECT lsn, seq FROM _cdc.quarantine WHERE column_name = 'n'")
    assert sorted(changes) == sorted(entries)


def test_what_the_rows_still_hold(database: Database, lake: Lake) -> None:
    """Design: `current` follows the row, over updates, key changes, deletes, truncates and a new copy."""
    database.execute(UNFIT_TABLE)
    database.execute("INSERT INTO t (id, n) SELECT i, 'NaN' FROM generate_series(1, 9) i")
    sync(database, lake)
    assert current(lake) == held(database)
    transactions(
        database,
        "UPDATE t SET n = 1.50 WHERE id = 1",
        "UPDATE t SET v = 'still NaN' WHERE id = 2",
        "UPDATE t SET d = '{{1}}', n = NULL WHERE id = 3",
        "DELETE FROM t WHERE id = 4",
        "UPDATE t SET id = 105 WHERE id = 5",
        "UPDATE t SET id = 106 WHERE id = 6; INSERT INTO t (id, n) VALUES (6, 1.50)",
        "UPDATE t SET id = 107 WHERE id = 7; UPDATE t SET id = 207, n = 1.50 WHERE id = 107",
    )
    sync(database, lake)
    assert current(lake) == held(database)
    assert held(database).total() == 6
    # several values of one row in one batch: only the last is current
    transactions(
        database,
        "UPDATE t SET d = '[0:0]={1}' WHERE id = 8; UPDATE t SET d = '{{1}}' WHERE id = 8; "
        "UPDATE t SET n = 1.50 WHERE id = 8",
        "INSERT INTO t (id, d) VALUES (20, '{{1}}'); UPDATE t SET d = NULL WHERE id = 20",
        "INSERT INTO t (id, d) VALUES (21, '{{1}}'); DELETE FROM t WHERE id = 21",
        "INSERT INTO t (id, d) VALUES (22, '{{1}}'); DELETE FROM t WHERE id = 22; "
        "INSERT INTO t (id, d) VALUES (22, '[0:0]={1}')",
    )
    sync(database, lake)
    assert current(lake) == held(database)
    kept = [entry[2:] for entry in quarantine(lake, "public.t") if entry[:2] == ("d", '{"id": "8"}')]
    assert kept == [("[0:0]={1}", False), ("{{1}}", False), ("{{1}}", True)]
    # a new copy says what is there now
    assert run_cdc(lake, database.dsn, "resync", "public.t").returncode == 0
    transactions(database, "INSERT INTO t (id, n) VALUES (30, 'NaN')")
    sync(database, lake)
    assert current(lake) == held(database)
    transactions(database, "UPDATE t SET n = 1.50 WHERE id = 30")
    sync(database, lake)
    assert current(lake) == held(database)
    transactions(
        database, "INSERT INTO t (id, n) VALUES (31, 'NaN'); TRUNCATE t; INSERT INTO t (id, n) VALUES (32, 'NaN')"
    )
    sync(database, lake)
    assert current(lake) == held(database) == Counter([("n", '{"id": "32"}', "NaN")])
    transactions(database, "TRUNCATE t")
    sync(database, lake)
    assert current(lake) == Counter()


def test_what_is_out_of_line_and_does_not_fit(database: Database, lake: Lake) -> None:
    """D1, D2, D4: a value in quarantine that an update does not send stays current, under its new key too."""
    big = r"""('["\ud800", "' || repeat('x', 3000) || '"]')::json"""
    database.execute(
        UNFIT_TABLE + "; ALTER TABLE t ALTER j SET STORAGE EXTERNAL; "
        f"INSERT INTO t (id, v, j) SELECT i, 'v', {big} FROM generate_series(1, 4) i"
    )
    sync(database, lake)
    assert current(lake) == held(database)
    transactions(
        database,
        "UPDATE t SET v = 'w' WHERE id = 1",
        "UPDATE t SET v = 'x' WHERE id = 1",
        "UPDATE t SET id = 102 WHERE id = 2",
        f"INSERT INTO t (id, v, j) VALUES (5, 'v', {big})",
        "UPDATE t SET v = 'w' WHERE id = 5",
        "UPDATE t SET id = 105 WHERE id = 5",
        f"UPDATE t SET j = {big} WHERE id = 3; UPDATE t SET v = 'w' WHERE id = 3",
        "UPDATE t SET v = 'w' WHERE id = 4; UPDATE t SET j = '{\"a\": 1}' WHERE id = 4",
    )
    sync(database, lake)
    assert current(lake) == held(database)
    assert held(database).total() == 4
    assert warehouse_rows(lake, "SELECT id FROM public.t WHERE j IS NOT NULL") == [(4,)]
    transactions(database, "UPDATE t SET id = id + 1000", "UPDATE t SET j = NULL WHERE id = 1001")
    sync(database, lake)
    assert current(lake) == held(database)
    assert held(database).total() == 3
    # each change of the history that lost a value to the quarantine is named there
    changes = log(
        lake,
        "public.t",
        "SELECT _lsn, _seq FROM log WHERE _op IN ('I', 'U', 'S') AND j IS NULL AND NOT (_op = 'U' AND id = 1001)",
    )
    assert sorted(changes) == sorted(warehouse_rows(lake, "SELECT lsn, seq FROM _cdc.quarantine"))


def test_values_that_do_not_fit_without_a_key(database: Database, lake: Lake) -> None:
    """C8, C10: without a key there is nothing to name the row by, but what is there is told, one entry a row."""
    database.execute(
        """
        CREATE TABLE bare (v text, d int4[]);
        CREATE TABLE whole (v text, d int4[]);
        ALTER TABLE whole REPLICA IDENTITY FULL;
        INSERT INTO bare VALUES ('a', '{{1}}');
        INSERT INTO whole VALUES ('a', '{{1}}'), ('a', '{{1}}'), ('b', '[0:0]={1}'), ('c', NULL)
        """
    )
    sync(database, lake)
    transactions(
        database,
        "INSERT INTO bare VALUES ('a', '{{1}}')",
        "INSERT INTO whole VALUES ('d', '{{1}}')",
        "DELETE FROM whole WHERE ctid = (SELECT min(ctid) FROM whole WHERE v = 'a')",
        "UPDATE whole SET d = '{1}' WHERE v = 'b'",
        "UPDATE whole SET v = 'e' WHERE v = 'd'",
        "UPDATE whole SET d = '{{1}}' WHERE v = 'c'",
        "INSERT INTO whole VALUES ('f', '{{1}}'); DELETE FROM whole WHERE v = 'f'",
    )
    sync(database, lake)
    assert current(lake, "public.bare") == Counter({("d", None, "{{1}}"): 2})
    assert mirrored_rows(database, lake, "public.whole") == Counter(
        [("a", None), ("b", (1,)), ("e", None), ("c", None)]
    )
    assert current(lake, "public.whole") == Counter({("d", None, "{{1}}"): 3})
    transactions(database, "DELETE FROM whole WHERE d = '{{1}}'")
    sync(database, lake)
    assert current(lake, "public.whole") == Counter()
    assert mirrored_rows(database, lake, "public.whole").total() == 1


def test_keys_that_do_not_fit(database: Database, lake: Lake) -> None:
    """C7: a key that its type here cannot hold becomes text by a new copy, in copy and stream; no row is lost."""
    database.execute(
        """
        CREATE TABLE copied (n numeric(5,2), k int, v text, PRIMARY KEY (n, k));
        CREATE TABLE streamed (n numeric(5,2) PRIMARY KEY, v text);
        CREATE TABLE fine (id int PRIMARY KEY, v text);
        INSERT INTO copied VALUES ('NaN', 1, 'a'), (1.50, 2, 'b')
        """
    )
    sync(database, lake)
    assert table_state(lake, "public.copied") == ("streaming", "")
    transactions(
        database,
        "INSERT INTO streamed VALUES (1.50, 'a'), (-3, 'b'); INSERT INTO fine VALUES (1, 'a')",
        "INSERT INTO fine VALUES (2, 'b')",
    )
    sync(database, lake)
    assert kind_of(lake, "streamed", "n") == "DECIMAL(5,2)"
    first = copies(lake)
    transactions(database, "INSERT INTO streamed VALUES ('NaN', 'c'); DELETE FROM streamed WHERE n = -3")
    said = mirror_once(lake, database.dsn)
    assert "column n of public.streamed becomes text: it identifies rows, and has a value that DECIMAL(5,2)" in said
    assert {table for table, lsn in copies(lake).items() if lsn != first[table]} == {"public.streamed"}
    assert [kind_of(lake, name, "n") for name in ("copied", "streamed")] == ["VARCHAR", "VARCHAR"]
    transactions(
        database,
        "UPDATE copied SET n = 2 WHERE n = 'NaN'; UPDATE streamed SET v = 'd' WHERE n = 'NaN'",
        "UPDATE copied SET v = 'z' WHERE k = 2; INSERT INTO copied VALUES ('NaN', 7, NULL)",
    )
    sync(database, lake)
    keys = {"public.copied": ["n", "k"], "public.streamed": ["n"], "public.fine": ["id"]}
    agree(database, lake, keys)
    # once there is no such value any more, a resync gives the column its type back
    transactions(database, "DELETE FROM streamed WHERE n = 'NaN'")
    assert run_cdc(lake, database.dsn, "resync", "public.streamed").returncode == 0
    sync(database, lake)
    assert kind_of(lake, "streamed", "n") == "DECIMAL(5,2)"
    agree(database, lake, keys)


def kind_of(lake: Lake, table: str, column: str) -> str:
    """Return the DuckDB type of a column."""
    query = f"SELECT data_type FROM duckdb_columns() WHERE table_name = '{table}' AND column_name = '{column}'"
    ((kind,),) = warehouse_rows(lake, query)
    return str(kind)


def test_too_many_values_that_do_not_fit(database: Database, lake: Lake) -> None:
    """Design, Types: past CDC_QUARANTINE_LIMIT a column becomes text by a new copy, in copy and stream; it is told."""
    database.execute(
        """
        CREATE TABLE copied (id int PRIMARY KEY, n numeric(5,2), d int4[]);
        CREATE TABLE streamed (id int PRIMARY KEY, n numeric(5,2), d int4[]);
        INSERT INTO copied SELECT i, 'NaN', '{{1}}' FROM generate_series(1, 5) i;
        INSERT INTO copied VALUES (6, 'NaN', '{1}');
        """
    )
    sync(database, lake, quarantine_limit="5")
    assert [kind_of(lake, "copied", name) for name in "nd"] == ["VARCHAR", "INTEGER[]"]
    assert current(lake, "public.copied").total() == 5
    for number in range(5):
        transactions(database, f"INSERT INTO streamed VALUES ({number}, 'NaN', '{{{{1}}}}')")
    sync(database, lake, quarantine_limit="5")
    transactions(database, "UPDATE streamed SET n = 1 WHERE id = 0", "INSERT INTO streamed VALUES (10, 'NaN', '{1}')")
    sync(database, lake, quarantine_limit="5")
    assert [kind_of(lake, "streamed", name) for name in "nd"] == ["DECIMAL(5,2)", "INTEGER[]"]
    transactions(
        database, "INSERT INTO streamed VALUES (11, 'NaN', '{1}')", "INSERT INTO streamed VALUES (12, 1, NULL)"
    )
    said = mirror_once(lake, database.dsn, quarantine_limit="5")
    assert "column n of public.streamed becomes text: it has more than 5 values that DECIMAL(5,2) cannot hold" in said
    assert [kind_of(lake, "streamed", name) for name in "nd"] == ["VARCHAR", "INTEGER[]"]
    assert {column for column, *_ in current(lake, "public.streamed")} == {"d"}
    with database.connect() as connection:
        texts = connection.execute("SELECT id, n::text FROM streamed ORDER BY id").fetchall()
    assert warehouse_rows(lake, "SELECT id, n FROM public.streamed ORDER BY id") == texts
    # it stays so, and goes on
    transactions(database, "ALTER TABLE streamed RENAME n TO m; UPDATE streamed SET m = 'NaN' WHERE id = 12")
    sync(database, lake, quarantine_limit="5")
    assert kind_of(lake, "streamed", "m") == "VARCHAR"
    assert warehouse_rows(lake, "SELECT m FROM public.streamed WHERE id = 12") == [("NaN",)]


@only_18
def test_a_dropped_column_holds_nothing(database: Database, lake: Lake) -> None:
    """H1, H6: what a dropped column held is no longer current, also when another column takes its name."""
    database.execute("CREATE TABLE t (id int PRIMARY KEY, v text, d int4[]); INSERT INTO t VALUES (1, 'a', '{{1}}')")
    sync(database, lake)
    assert current(lake) == Counter([("d", '{"id": "1"}', "{{1}}")])
    first = copies(lake)
    transactions(database, "ALTER TABLE t DROP COLUMN d", "INSERT INTO t VALUES (2, 'b')")
    sync(database, lake)
    assert current(lake) == Counter()
    transactions(database, "ALTER TABLE t ADD COLUMN d int4[]", "INSERT INTO t VALUES (3, 'c', '[0:0]={1}')")
    sync(database, lake)
    assert current(lake) == Counter([("d", '{"id": "3"}', "[0:0]={1}")])
    assert copies(lake) == first
    transactions(database, "DELETE FROM t WHERE id = 3")
    sync(database, lake)
    agree(database, lake, {"public.t": ["id"]})


def test_the_quarantine_goes_by_the_key(database: Database, lake: Lake) -> None:
    """C11, H1: rows are told by other columns from now on; only where there was no key that needs a new copy."""
    database.execute(
        "CREATE TABLE t (id int PRIMARY KEY, code int NOT NULL UNIQUE, n numeric(5,2));"
        "CREATE TABLE u (id int NOT NULL, code int NOT NULL, n numeric(5,2)); ALTER TABLE u REPLICA IDENTITY FULL;"
        "INSERT INTO t VALUES (1, 10, 'NaN'), (2, 20, 'NaN'); INSERT INTO u VALUES (1, 10, 'NaN'), (2, 20, 'NaN')"
    )
    sync(database, lake)
    first = copies(lake)
    transactions(
        database,
        "ALTER TABLE t REPLICA IDENTITY USING INDEX t_code_key",
        "ALTER TABLE u ADD PRIMARY KEY (id); ALTER TABLE u REPLICA IDENTITY DEFAULT",
        "UPDATE t SET n = 1 WHERE id = 1; UPDATE u SET n = 1 WHERE id = 1",
        "ALTER TABLE u DROP CONSTRAINT u_pkey, ADD PRIMARY KEY (code)",
        "UPDATE u SET n = 2 WHERE id = 1",
    )
    sync(database, lake)
    assert current(lake) == Counter([("n", '{"code": "20"}', "NaN")])
    assert current(lake, "public.u") == Counter([("n", '{"code": "20"}', "NaN")])
    assert copies(lake)["public.t"] == first["public.t"]
    assert copies(lake)["public.u"] > first["public.u"]
    transactions(database, "ALTER TABLE t DROP id; ALTER TABLE t RENAME code TO id; UPDATE t SET n = 2 WHERE id = 10")
    sync(database, lake)
    assert current(lake) == Counter([("n", '{"id": "20"}', "NaN")])
    assert exact_differences(database, lake, "public.t", ["id"]) == ""
    assert exact_differences(database, lake, "public.u", ["code"]) == ""


def test_the_quarantine_of_tables_that_swap_their_names(database: Database, lake: Lake) -> None:
    """H8, B2: each table keeps what is its own, whatever it is called; so do rows whose key is not ASCII."""
    database.execute(
        """
        CREATE TABLE t (id text PRIMARY KEY, n numeric(5,2));
        CREATE TABLE "T" (id text PRIMARY KEY, d int4[]);
        INSERT INTO t VALUES ('é"', 'NaN'), ('b', 1);
        INSERT INTO "T" VALUES ('é"', '{{1}}'), ('b', '{{2}}')
        """
    )
    sync(database, lake)
    transactions(
        database,
        'ALTER TABLE t RENAME TO u; ALTER TABLE "T" RENAME TO t; ALTER TABLE u RENAME TO "T"',
        "ALTER TABLE t RENAME id TO i; UPDATE t SET d = '{1}' WHERE i = 'b'",
        "ALTER TABLE \"T\" RENAME n TO m; UPDATE \"T\" SET m = 'NaN' WHERE id = 'b'",
    )
    sync(database, lake)
    assert current(lake) == Counter([("d", '{"i": "é\\""}', "{{1}}")])
    assert current(lake, "public.T") == Counter([("m", f'{{"id": "{key}"}}', "NaN") for key in ('é\\"', "b")])
    transactions(database, "UPDATE t SET d = '{1}'", 'UPDATE "T" SET m = 1')
    sync(database, lake)
    agree(database, lake, {"public.t": ["i"], "public.T": ["id"]})
    assert current(lake) == current(lake, "public.T") == Counter()


@only_18
def test_many_values_that_do_not_fit(database: Database, lake: Lake) -> None:
    """Design: a column full of them, as `valid_to = '{{1}}'` is, costs no statement per value."""
    database.execute(
        "CREATE TABLE t (id int PRIMARY KEY, d int4[]); "
        "INSERT INTO t SELECT i, '{{1}}' FROM generate_series(1, 50000) i"
    )
    sync(database, lake, quarantine_limit="100000")
    transactions(
        database,
        "INSERT INTO t SELECT i, '{{1}}' FROM generate_series(50001, 100000) i",
        "UPDATE t SET d = '{1}' WHERE id <= 20000; DELETE FROM t WHERE id % 2 = 0",
    )
    began = time.monotonic()
    sync(database, lake, quarantine_limit="100000")
    assert time.monotonic() - began < 30
    entries = warehouse_rows(lake, "SELECT current, count(*) FROM _cdc.quarantine GROUP BY ALL ORDER BY ALL")
    assert entries == [(False, 60000), (True, 40000)]
    assert mirrored_rows(database, lake, "public.t", "d IS NULL").total() == 40000
