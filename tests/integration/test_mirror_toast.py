"""Values that Postgres keeps out of line and does not send while they stay the same: none may become NULL or stale."""

from __future__ import annotations

from collections import Counter

import duckdb

from cdc.pgoutput.decoder import Decoder, decode_rows
from cdc.pgoutput.messages import FRAME_HEADER_BYTES, WireBatch
from tests.conftest import Database, Lake
from tests.integration.steps import agree, log, operations, sync, table_state, transactions
from tests.mirror import differences, run_cdc

# of 3000 bytes, out of line and not compressed: SET STORAGE EXTERNAL
BIG = "repeat('{}', 3000)"


def watch(database: Database) -> None:
    """From here on keep the stream for `unsent`."""
    database.execute("SELECT pg_create_logical_replication_slot('peek', 'pgoutput')")


def unsent(database: Database) -> Counter[str]:
    """Return, by table, how many values the stream has left out since `watch` or the last call."""
    rows = database.execute(
        "SELECT data FROM pg_logical_slot_get_binary_changes('peek', NULL, NULL, 'proto_version', '1', "
        "'publication_names', 'cdc')"
    )
    frames = [b"w".ljust(FRAME_HEADER_BYTES, b"\0") + bytes(data) for (data,) in rows]
    found: Counter[str] = Counter()
    for part in Decoder(0).decode(WireBatch(frames, complete=True)).rows:
        found[part.relation.name] += sum(int(mask.sum()) for mask in decode_rows(part).unchanged.values())
    return +found


def test_unchanged_values(database: Database, lake: Lake) -> None:
    """D1, D3, D4, D7, D10: under each identity; from the warehouse, the batch and the transaction; NULL and back."""
    database.execute(
        f"""
        CREATE TABLE by_key (id int PRIMARY KEY, v text, big text, other text);
        CREATE TABLE by_index (id int, v text, big text, other text, code text NOT NULL UNIQUE);
        CREATE TABLE by_all (id int PRIMARY KEY, v text, big text, other text);
        ALTER TABLE by_key ALTER big SET STORAGE EXTERNAL, ALTER other SET STORAGE EXTERNAL;
        ALTER TABLE by_index ALTER big SET STORAGE EXTERNAL, ALTER other SET STORAGE EXTERNAL;
        ALTER TABLE by_all ALTER big SET STORAGE EXTERNAL, ALTER other SET STORAGE EXTERNAL;
        ALTER TABLE by_index REPLICA IDENTITY USING INDEX by_index_code_key;
        ALTER TABLE by_all REPLICA IDENTITY FULL;
        INSERT INTO by_key SELECT i, 'v', {BIG.format("a")} || i, {BIG.format("o")} FROM generate_series(1, 6) i;
        INSERT INTO by_index SELECT i, 'v', {BIG.format("a")} || i, {BIG.format("o")}, 'c' || i
            FROM generate_series(1, 6) i;
        INSERT INTO by_all SELECT i, 'v', {BIG.format("a")} || i, {BIG.format("o")} FROM generate_series(1, 6) i
        """
    )
    names, keys = ("by_key", "by_index", "by_all"), {"by_key": "id", "by_index": "code", "by_all": "id"}
    tables = {f"public.{name}": [keys[name]] for name in names}
    sync(database, lake)
    watch(database)
    for name in names:
        code = ", 'c10'" if name == "by_index" else ""
        transactions(
            database,
            f"UPDATE {name} SET v = 'w' WHERE id = 1",  # both values from the warehouse
            f"UPDATE {name} SET big = {BIG.format('b')} WHERE id = 2",  # one of them
            f"UPDATE {name} SET v = 'after' WHERE id = 2",  # one from the batch, one through it from the warehouse
            f"UPDATE {name} SET big = NULL WHERE id = 3",
            f"UPDATE {name} SET v = 'with NULL' WHERE id = 3",
            f"UPDATE {name} SET big = {BIG.format('c')} WHERE id = 4; UPDATE {name} SET big = NULL WHERE id = 4; "
            f"UPDATE {name} SET big = {BIG.format('d')} WHERE id = 4; UPDATE {name} SET v = 'to and fro' WHERE id = 4",
            f"INSERT INTO {name} VALUES (10, 'v', {BIG.format('e')}, NULL{code}); "
            f"UPDATE {name} SET v = 'same' WHERE id = 10",
            f"UPDATE {name} SET v = 'later' WHERE id = 10",
            f"UPDATE {name} SET v = 'gone' WHERE id = 5; DELETE FROM {name} WHERE id = 5",
        )
    left_out = unsent(database)
    assert left_out == {"by_key": 16, "by_index": 16}  # under FULL the old row has them all
    sync(database, lake)
    agree(database, lake, tables)
    # the history resolves too: what was not sent is neither NULL nor missing in it
    query = "SELECT big IS NULL, length(other) FROM log WHERE id = 1 AND _op IN ('U', 'I') AND _seq > 0"
    assert all(log(lake, table, query) == [(False, 3000)] for table in tables)
    # a process of its own, batches later, finds them in what the first one has written
    transactions(database, *(f"UPDATE {name} SET v = v || '!'" for name in names))
    assert unsent(database)["by_key"] > 6
    sync(database, lake)
    agree(database, lake, tables)


def test_unchanged_values_under_a_new_key(database: Database, lake: Lake) -> None:
    """D2: the row with the value stands under the OLD key: in the warehouse, in the batch, over chains and swaps."""
    database.execute(
        f"""
        CREATE TABLE t (id int, part text, v text, big text, PRIMARY KEY (part, id));
        ALTER TABLE t ALTER big SET STORAGE EXTERNAL;
        CREATE TABLE coded (id int PRIMARY KEY, code text NOT NULL UNIQUE, big text);
        ALTER TABLE coded ALTER big SET STORAGE EXTERNAL;
        ALTER TABLE coded REPLICA IDENTITY USING INDEX coded_code_key;
        INSERT INTO t SELECT i, 'p', 'v', {BIG.format("x")} || i FROM generate_series(1, 9) i;
        INSERT INTO coded SELECT i, 'c' || i, {BIG.format("x")} || i FROM generate_series(1, 5) i
        """
    )
    sync(database, lake)
    watch(database)
    transactions(
        database,
        "UPDATE t SET id = 101 WHERE id = 1",
        "UPDATE t SET v = 'after' WHERE id = 101",
        # a chain in one transaction and over several, with changes in between
        "UPDATE t SET id = 102 WHERE id = 2; UPDATE t SET v = 'there' WHERE id = 102; "
        "UPDATE t SET id = 202 WHERE id = 102",
        "UPDATE t SET part = 'q' WHERE id = 202",
        # a swap
        "UPDATE t SET id = -1 WHERE id = 3; UPDATE t SET id = 3 WHERE id = 4; UPDATE t SET id = 4 WHERE id = -1",
        # a value that came in this batch goes with the key
        f"INSERT INTO t VALUES (20, 'p', 'v', {BIG.format('y')}); UPDATE t SET id = 21 WHERE id = 20",
        "UPDATE t SET id = 22, v = 'w' WHERE id = 21",
        f"UPDATE t SET big = {BIG.format('z')} WHERE id = 5; UPDATE t SET id = 105 WHERE id = 5",
        # the old key is taken by another row, whose value is another one
        f"UPDATE t SET id = 106 WHERE id = 6; INSERT INTO t VALUES (6, 'p', 'new', {BIG.format('n')})",
        "UPDATE t SET v = 'new, changed' WHERE id = 6; UPDATE t SET v = 'old, changed' WHERE id = 106",
        "DELETE FROM t WHERE id = 7; UPDATE t SET id = 7 WHERE id = 8",
        "UPDATE coded SET id = 101 WHERE id = 1",
        "UPDATE coded SET code = 'new' WHERE id = 2",
        "UPDATE coded SET id = 103, code = 'both' WHERE id = 3; UPDATE coded SET code = 'again' WHERE id = 103",
    )
    left_out = unsent(database)
    assert left_out == {"t": 16, "coded": 4}
    sync(database, lake)
    agree(database, lake, {"public.t": ["part", "id"], "public.coded": ["code"]})
    assert operations(lake, "public.coded", "code IN ('c2', 'new')") == "DI"


def test_keys_out_of_line(database: Database, lake: Lake) -> None:
    """D6, trap 5: a key that is out of line comes with the old row, and not in the new one."""
    long = "repeat('k', 2300) || {}"
    database.execute(
        f"""
        CREATE TABLE t (k text PRIMARY KEY, v text, big text);
        ALTER TABLE t ALTER k SET STORAGE EXTERNAL, ALTER big SET STORAGE EXTERNAL;
        CREATE TABLE pair (k text, id int, v text, PRIMARY KEY (k, id));
        ALTER TABLE pair ALTER k SET STORAGE EXTERNAL;
        INSERT INTO t SELECT {long.format("i")}, 'v', {BIG.format("x")} || i FROM generate_series(1, 5) i;
        INSERT INTO pair SELECT {long.format("1")}, i, 'v' FROM generate_series(1, 5) i
        """
    )
    sync(database, lake)
    watch(database)
    transactions(
        database,
        f"UPDATE t SET v = 'changed' WHERE k = {long.format(1)}",
        f"UPDATE t SET v = v || ' twice' WHERE k = {long.format(1)}",
        f"UPDATE t SET k = {long.format(102)} WHERE k = {long.format(2)}",
        f"UPDATE t SET k = 'short' WHERE k = {long.format(3)}; UPDATE t SET v = 'short' WHERE k = 'short'",
        f"UPDATE t SET k = {long.format(203)} WHERE k = 'short'",
        f"DELETE FROM t WHERE k = {long.format(4)}",
        "UPDATE pair SET v = 'changed' WHERE id = 1",
        "UPDATE pair SET id = 12 WHERE id = 2",  # one part changes, the one out of line does not
        "UPDATE pair SET v = 'after' WHERE id = 12",
        "DELETE FROM pair WHERE id = 3",
    )
    assert unsent(database) == {"t": 6}  # the keys were not sent in the new rows, but came with the old ones
    sync(database, lake)
    agree(database, lake, {"public.t": ["k"], "public.pair": ["k", "id"]})
    # an update whose key is out of line brings the old row, so it is a D and an I
    assert operations(lake, "public.pair", "id = 1") == "DI"


def test_types_out_of_line(database: Database, lake: Lake) -> None:
    """D8, D9: arrays, json, bytea, hstore, decimals with many digits; and over a column that was added in between."""
    database.execute("CREATE EXTENSION hstore")
    values = {
        "text[]": f"ARRAY[{BIG.format('x')}, NULL, '', 'NULL', '\"']",
        "int[]": "(SELECT array_agg(i * 1000003) FROM generate_series(1, 900) i)",
        "json": f'(\'{{"a":  [1, 1.0], "a": "\' || {BIG.format("j")} || \'"}}\')::json',
        "jsonb": f"jsonb_build_object('k', {BIG.format('b')}, 'n', null, 'u', 'é😀')",
        "bytea": r"decode(repeat('00ff5c27', 800), 'hex')",
        "hstore": f"hstore(ARRAY['a', {BIG.format('h')}, 'b', NULL])",
        "varchar(4000)": f"'é😀' || {BIG.format('v')}",
        "numeric": "('1.' || repeat('7', 9000))::numeric",
    }
    columns = {f"c{number}": kind for number, kind in enumerate(values)}
    database.execute(
        "CREATE TABLE t (id int PRIMARY KEY, v text, "
        + ", ".join(f"{name} {kind}" for name, kind in columns.items())
        + ");"
        + "".join(f"ALTER TABLE t ALTER {name} SET STORAGE EXTERNAL;" for name in columns)
        + "".join(f"INSERT INTO t VALUES ({i}, 'v', {', '.join(values.values())});" for i in (1, 2, 3))
    )
    sync(database, lake)
    watch(database)
    transactions(
        database,
        "UPDATE t SET v = 'one' WHERE id = 1",
        "UPDATE t SET id = 12 WHERE id = 2",
        "INSERT INTO t SELECT 4, 'copy', " + ", ".join(columns) + " FROM t WHERE id = 3",
        "UPDATE t SET v = 'copied' WHERE id = 4",
    )
    assert unsent(database) == {"t": 3 * len(columns)}
    sync(database, lake)
    agree(database, lake, {"public.t": ["id"]})
    transactions(
        database,
        "UPDATE t SET v = 'before' WHERE id = 3",
        "ALTER TABLE t ADD COLUMN added text",
        "UPDATE t SET v = 'after' WHERE id = 3",
        "UPDATE t SET added = 'added', id = 13 WHERE id = 3",
        "UPDATE t SET v = v || '!'",
    )
    assert unsent(database)["t"] == 7 * len(columns)
    sync(database, lake)
    agree(database, lake, {"public.t": ["id"]})


def test_unchanged_values_of_missing_rows(database: Database, lake: Lake) -> None:
    """D5: where the warehouse has lost the row that holds the value, the table says so, and a resync mends it."""
    database.execute(
        f"""
        CREATE TABLE t (id int PRIMARY KEY, v text, big text);
        ALTER TABLE t ALTER big SET STORAGE EXTERNAL;
        CREATE TABLE others (id int PRIMARY KEY, v text);
        INSERT INTO t SELECT i, 'v', {BIG.format("x")} FROM generate_series(1, 3) i
        """
    )
    sync(database, lake)
    watch(database)
    with duckdb.connect(str(lake.warehouse)) as meddler:
        meddler.execute("DELETE FROM public.t WHERE id = 1")
    transactions(database, "UPDATE t SET v = 'w' WHERE id = 1; INSERT INTO others VALUES (1, 'a')")
    assert unsent(database) == {"t": 1}
    sync(database, lake)
    state, reason = table_state(lake, "public.t")
    assert state == "error"
    assert "1 changed rows of public.t are not in the warehouse" in reason
    agree(database, lake, {"public.others": ["id"]})
    transactions(database, "UPDATE t SET v = 'x' WHERE id = 2; UPDATE others SET v = 'b'")
    sync(database, lake)
    assert differences(database, lake, "public.t") != ""
    agree(database, lake, {"public.others": ["id"]})
    assert run_cdc(lake, database.dsn, "resync", "public.t").returncode == 0
    transactions(database, "UPDATE t SET v = 'y' WHERE id = 3")
    sync(database, lake)
    agree(database, lake, {"public.t": ["id"], "public.others": ["id"]})
