"""Partitions and inheritance, by way of the root or leaf by leaf, in our publications and in those of others."""

from __future__ import annotations

import pytest

from tests.conftest import Database, Lake
from tests.integration.copies import await_states, equal, settle
from tests.integration.refusals import call, refused
from tests.integration.steps import agree, copies, log, operations, sync, table_state, transactions
from tests.mirror import Consumer, mirrored_rows, replayed, run_cdc, source_rows, states, until, warehouse_rows

only_18 = pytest.mark.parametrize("server", [18], indirect=True, ids=["pg18"])

# A leaf with other columns in another order, one below another, and one that takes the rest.
ROOT = """
    CREATE TABLE root (id int, at date, v text, PRIMARY KEY (id, at)) PARTITION BY RANGE (at);
    CREATE TABLE leaf_23 PARTITION OF root FOR VALUES FROM ('2023-01-01') TO ('2024-01-01');
    CREATE TABLE leaf_24 (gone int, v text, also_gone text DEFAULT 'x', at date NOT NULL, id int NOT NULL);
    ALTER TABLE leaf_24 DROP COLUMN gone, DROP COLUMN also_gone;
    ALTER TABLE root ATTACH PARTITION leaf_24 FOR VALUES FROM ('2024-01-01') TO ('2025-01-01');
    CREATE TABLE mid_25 PARTITION OF root FOR VALUES FROM ('2025-01-01') TO ('2026-01-01') PARTITION BY HASH (id);
    CREATE TABLE leaf_25_0 PARTITION OF mid_25 FOR VALUES WITH (MODULUS 2, REMAINDER 0);
    CREATE TABLE leaf_25_1 PARTITION OF mid_25 FOR VALUES WITH (MODULUS 2, REMAINDER 1);
    INSERT INTO root SELECT i, '2023-06-01'::date + i, 'v' || i FROM generate_series(1, 900) AS i;
"""
KEY = ("id", "at")
LEAVES = dict.fromkeys(["public.leaf_23", "public.leaf_24", "public.leaf_25_0", "public.leaf_25_1"], KEY)
MINE = {
    "a table": "FOR TABLE root",
    "a schema": "FOR TABLES IN SCHEMA public",
    "everything": "FOR ALL TABLES",
    "its leaves": "FOR TABLE leaf_23, leaf_24, mid_25",
}
VIA_ROOT = "WITH (publish_via_partition_root = true)"


def mirror_mine(database: Database, lake: Lake, listed: str) -> None:
    """Make the tables, and mirror what somebody else publishes of them."""
    database.execute(ROOT)
    database.execute(f"CREATE PUBLICATION mine {listed}")
    sync(database, lake, publication="mine")


def changes(database: Database) -> None:
    """Write by the root and by the leaves, over all of them, and move rows between them."""
    transactions(
        database,
        "INSERT INTO root VALUES (1001, '2023-01-01', 'a'), (1002, '2024-01-01', 'b'), (1003, '2025-01-01', 'c')",
        "UPDATE root SET at = '2024-12-31' WHERE id = 1001",
        "UPDATE root SET v = 'changed' WHERE id % 100 = 0",
        "DELETE FROM root WHERE id % 101 = 0",
        "UPDATE root SET at = '2023-12-31', v = 'there and back' WHERE id = 1003; "
        "UPDATE root SET at = '2025-02-01' WHERE id = 1003",
        "INSERT INTO leaf_24 (id, at, v) VALUES (1004, '2024-03-01', 'by the leaf')",
        "UPDATE mid_25 SET id = id + 5001 WHERE id % 7 = 0",
        "UPDATE leaf_24 SET v = NULL WHERE id = 300; DELETE FROM leaf_23 WHERE id < 5",
    )


def test_partitions_are_one_table(database: Database, lake: Lake) -> None:
    """E6, F2, F4, B6: the root alone is mirrored, over moves between leaves, other column orders, and new leaves."""
    database.execute(ROOT)
    sync(database, lake)
    assert states(lake) == {"public.root": "streaming"}
    agree(database, lake, {"public.root": KEY})
    changes(database)
    transactions(
        database,
        "CREATE TABLE leaf_26 PARTITION OF root FOR VALUES FROM ('2026-01-01') TO ('2027-01-01')",
        "INSERT INTO root VALUES (1005, '2026-01-01', 'new leaf')",
    )
    sync(database, lake)
    agree(database, lake, {"public.root": KEY})
    assert operations(lake, "public.root", "id = 1001") == "IDI"
    transactions(database, "TRUNCATE root", "INSERT INTO root VALUES (1, '2024-01-01', 'after')")
    sync(database, lake)
    agree(database, lake, {"public.root": KEY})
    assert states(lake) == {"public.root": "streaming"}


@pytest.mark.parametrize(
    "listed", ["a table", *(pytest.param(each, marks=pytest.mark.slow) for each in list(MINE)[1:])]
)
def test_leaf_by_leaf(database: Database, lake: Lake, listed: str) -> None:
    """F1, F3, E6, G4: leaf tables; a row that moves is a D in one and an I in another, in one transaction."""
    mirror_mine(database, lake, MINE[listed])
    assert states(lake) == dict.fromkeys(LEAVES, "streaming")
    agree(database, lake, LEAVES)
    first = copies(lake)
    changes(database)
    sync(database, lake, publication="mine")
    agree(database, lake, LEAVES)
    assert operations(lake, "public.leaf_23", "id = 1001") == "ID"
    assert operations(lake, "public.leaf_24", "id = 1001") == "I"
    moved = "SELECT _xid FROM log WHERE id = 1001 AND _op = {}"
    assert log(lake, "public.leaf_23", moved.format("'D'")) == log(lake, "public.leaf_24", moved.format("'I'"))
    transactions(
        database,
        "TRUNCATE mid_25",
        "INSERT INTO root VALUES (1, '2025-01-01', 'after'); TRUNCATE leaf_24",
        "INSERT INTO root VALUES (1, '2024-01-01', 'after')",
    )
    sync(database, lake, publication="mine")
    agree(database, lake, LEAVES)
    assert operations(lake, "public.leaf_23", "_op = 'T'") == ""
    transactions(database, "TRUNCATE root", "INSERT INTO root VALUES (2, '2025-01-02', 'last')")
    sync(database, lake, publication="mine")
    agree(database, lake, LEAVES)
    assert copies(lake) == first


@pytest.mark.parametrize(
    "listed",
    [pytest.param("a table", marks=pytest.mark.slow), pytest.param("a schema", marks=pytest.mark.slow), "everything"],
)
def test_by_way_of_the_root(database: Database, lake: Lake, listed: str) -> None:
    """F2, F3, E6: of somebody else's publication too, the root is one table, and its leaves are none."""
    mirror_mine(database, lake, f"{MINE[listed]} {VIA_ROOT}")
    changes(database)
    sync(database, lake, publication="mine")
    assert states(lake) == {"public.root": "streaming"}
    agree(database, lake, {"public.root": KEY})
    assert operations(lake, "public.root", "id = 1001") == "IDI"
    transactions(database, "TRUNCATE root", "INSERT INTO root VALUES (2, '2025-01-02', 'last')")
    sync(database, lake, publication="mine")
    agree(database, lake, {"public.root": KEY})
    assert warehouse_rows(lake, "SELECT table_name FROM duckdb_tables() WHERE schema_name = 'public'") == [("root",)]


def test_a_part_of_the_tree_by_way_of_its_own_root(database: Database, lake: Lake) -> None:
    """F5, F7: nested partitions of which a part is published, by way of what is listed and no higher."""
    mirror_mine(database, lake, f"FOR TABLE mid_25, leaf_23, leaf_25_1 {VIA_ROOT}")
    tables = {"public.mid_25": KEY, "public.leaf_23": KEY}
    assert states(lake) == dict.fromkeys(tables, "streaming")
    changes(database)
    transactions(database, "TRUNCATE mid_25", "INSERT INTO root VALUES (7, '2025-01-02', 'last')")
    sync(database, lake, publication="mine")
    agree(database, lake, tables)


def test_one_leaf_alone_is_published(database: Database, lake: Lake) -> None:
    """F7: a row that moves out of it is a D, one that moves in an I; the leaf beside it is not there at all."""
    mirror_mine(database, lake, "FOR TABLE leaf_24")
    transactions(
        database,
        "UPDATE root SET at = '2023-02-02' WHERE id = 300",
        "UPDATE root SET at = '2024-02-02' WHERE id = 10",
        "UPDATE root SET at = '2023-02-03' WHERE id = 11",
    )
    sync(database, lake, publication="mine")
    assert states(lake) == {"public.leaf_24": "streaming"}
    agree(database, lake, {"public.leaf_24": KEY})
    assert operations(lake, "public.leaf_24") == "DI"


@pytest.mark.parametrize("higher", ["mine", "mine_append"])
def test_two_publications_at_different_levels(database: Database, lake: Lake, higher: str) -> None:
    """F5, G3: what one of them publishes by way of a root comes so alone, though the other lists leaf and mid level."""
    database.execute(ROOT)
    lower = "mine_append" if higher == "mine" else "mine"
    database.execute(
        f"CREATE PUBLICATION {lower} FOR TABLE leaf_23, leaf_24, leaf_25_0;"
        f"CREATE PUBLICATION {higher} FOR TABLE root WITH (publish_via_partition_root = true)"
    )
    sync(database, lake, publication="mine")
    assert states(lake) == {"public.root": "streaming"}
    changes(database)
    transactions(database, "TRUNCATE root", "INSERT INTO root VALUES (2, '2023-01-02', 'last')")
    sync(database, lake, publication="mine")
    agree(database, lake, {"public.root": KEY})


def test_a_leaf_and_the_mid_level_above_it(database: Database, lake: Lake) -> None:
    """F5: two publications by way of roots: the topmost of them counts; a leaf that neither root is above is itself."""
    database.execute(ROOT)
    database.execute(
        "CREATE PUBLICATION mine FOR TABLE leaf_25_0, leaf_24 WITH (publish_via_partition_root = true);"
        "CREATE PUBLICATION mine_append FOR TABLE mid_25 WITH (publish_via_partition_root = true)"
    )
    sync(database, lake, publication="mine")
    changes(database)
    sync(database, lake, publication="mine")
    tables = {"public.mid_25": KEY, "public.leaf_24": KEY}
    assert states(lake) == dict.fromkeys(tables, "streaming")
    agree(database, lake, tables)


def test_whole_rows_identify_those_of_a_partitioned_table(database: Database, lake: Lake) -> None:
    """F1, F2, C10: no key, REPLICA IDENTITY FULL on root and leaves, equal rows; by the root, and leaf by leaf."""
    database.execute(
        """
        CREATE TABLE root (n int, v text) PARTITION BY LIST (n);
        CREATE TABLE odd PARTITION OF root FOR VALUES IN (1, 3, 5);
        CREATE TABLE even (v text, n int);
        ALTER TABLE root ATTACH PARTITION even FOR VALUES IN (2, 4);
        CREATE TABLE rest PARTITION OF root DEFAULT;
        ALTER TABLE root REPLICA IDENTITY FULL; ALTER TABLE odd REPLICA IDENTITY FULL;
        ALTER TABLE even REPLICA IDENTITY FULL; ALTER TABLE rest REPLICA IDENTITY FULL;
        INSERT INTO root SELECT i % 7, CASE WHEN i % 4 > 0 THEN 'v' END FROM generate_series(1, 50) AS i;
        CREATE PUBLICATION mine FOR TABLE root
        """
    )
    leaves = Lake(lake.root / "leaves", lake.root / "leaves" / "w.duckdb", lake.root / "leaves" / "h")
    leaves.root.mkdir()
    for _ in range(2):
        sync(database, lake)
        sync(database, leaves, publication="mine", slot="leaves")
        agree(database, lake, {"public.root": []})
        agree(database, leaves, {"public.odd": [], "public.even": [], "public.rest": []})
        transactions(
            database,
            "UPDATE root SET n = n + 1 WHERE ctid IN (SELECT min(ctid) FROM root GROUP BY tableoid)",
            "DELETE FROM root WHERE n = 2 AND v IS NULL",
            "INSERT INTO root VALUES (2, 'v'), (2, 'v'), (NULL, NULL)",
        )
    assert states(lake) == {"public.root": "streaming"}


IDENTITIES = """
    CREATE TABLE root (id int PRIMARY KEY, k int NOT NULL, v text) PARTITION BY RANGE (id);
    CREATE TABLE low PARTITION OF root FOR VALUES FROM (0) TO (10);
    CREATE TABLE high (v text, k int NOT NULL, id int NOT NULL);
    ALTER TABLE root ATTACH PARTITION high FOR VALUES FROM (10) TO (20);
    INSERT INTO root SELECT i, i, 'v' FROM generate_series(1, 18) AS i;
    CREATE PUBLICATION mine FOR TABLE root WITH (publish_via_partition_root = true);
"""


def moves(database: Database) -> None:
    """Change rows, and their keys, within a leaf and over two of them."""
    transactions(
        database,
        "UPDATE root SET v = 'w' WHERE id IN (1, 11); UPDATE root SET k = k + 100 WHERE id IN (2, 12)",
        "UPDATE root SET id = 0 WHERE id = 12; UPDATE root SET id = 19 WHERE id = 4",
        "DELETE FROM root WHERE id IN (3, 13)",
    )


@only_18
@pytest.mark.parametrize(
    "identity",
    [
        "ALTER TABLE root REPLICA IDENTITY FULL",
        "CREATE UNIQUE INDEX by_k ON low (k); ALTER TABLE low REPLICA IDENTITY USING INDEX by_k",
        "CREATE UNIQUE INDEX by_both ON root (id, k); ALTER TABLE root REPLICA IDENTITY USING INDEX by_both",
        "ALTER TABLE root REPLICA IDENTITY NOTHING",
    ],
)
def test_leaves_with_another_identity_than_the_root(database: Database, lake: Lake, identity: str) -> None:
    """F2, F3, C12: what would be looked for in vain is refused; of ours inserts are left, as `check` tells."""
    database.execute(IDENTITIES)
    database.execute(identity)
    error, hint = refused(call(lake, database.dsn, "run", "--once", publication="mine"))
    assert "public.root, whose partitions have another replica identity than the root" in error
    assert "REPLICA IDENTITY" in hint
    assert f"error: {error}" in call(lake, database.dsn, "check", publication="mine").stdout
    database.execute("ALTER PUBLICATION mine SET (publish_via_partition_root = false)")
    sync(database, lake, publication="mine")
    moves(database)
    sync(database, lake, publication="mine")
    agree(database, lake, {"public.low": None, "public.high": None})
    ours = Lake(lake.root / "ours", lake.root / "ours" / "w.duckdb", lake.root / "ours" / "h")
    ours.root.mkdir()
    sync(database, ours, slot="ours")
    found = call(ours, database.dsn, "check", slot="ours").stdout
    assert "public.root has no usable replica identity: only its inserts and truncates are followed" in found


@only_18
@pytest.mark.parametrize(
    ("key", "statements"),
    [
        ("", ["ALTER TABLE ONLY root ADD PRIMARY KEY (id); ALTER TABLE leaf ADD CONSTRAINT own PRIMARY KEY (id)"]),
        ("PRIMARY KEY", ["ALTER TABLE leaf REPLICA IDENTITY FULL", "ALTER TABLE root REPLICA IDENTITY FULL"]),
    ],
    ids=["a root whose index is not valid yet", "the leaf before its root"],
)
def test_a_key_that_catalog_and_stream_do_not_agree_on(
    database: Database, lake: Lake, key: str, statements: list[str]
) -> None:
    """C11, G5: what is in the quarantine goes by the key, yet a copy would not make them agree."""
    database.execute(
        f"CREATE TABLE root (id int NOT NULL {key}, n numeric(5,2)) PARTITION BY RANGE (id);"
        "CREATE TABLE leaf PARTITION OF root FOR VALUES FROM (0) TO (1000); INSERT INTO root VALUES (1, 'NaN')"
    )
    with Consumer(lake, database.dsn) as consumer:
        await_states(consumer, lake, "streaming", "public.root")
        for number, statement in enumerate(statements, start=10):
            transactions(database, statement, f"INSERT INTO root VALUES ({number}, 1)")
            settle(consumer, database, lake)
        assert run_cdc(lake, database.dsn, "resync", "--all").returncode == 0
        first = copies(lake)
        until(lambda: copies(lake) != first, what="the copy that was asked for")
        seen = set()
        for number in range(20, 25):
            database.execute(f"INSERT INTO root VALUES ({number}, 2)")
            settle(consumer, database, lake)
            await_states(consumer, lake, "streaming", "public.root")
            seen.add(copies(lake)["public.root"])
        assert len(seen) == 1, consumer.output
    rows = "SELECT id, nullif(n, 'NaN') FROM root ORDER BY id"
    assert warehouse_rows(lake, "SELECT id, n FROM public.root ORDER BY id") == database.execute(rows)


@only_18
def test_leaves_that_tell_more_than_the_root_promises(database: Database, lake: Lake) -> None:
    """F2, F3, C11: a leaf under FULL has the root's key in its old rows."""
    database.execute(IDENTITIES)
    database.execute("ALTER TABLE low REPLICA IDENTITY FULL")
    sync(database, lake, publication="mine")
    moves(database)
    sync(database, lake, publication="mine")
    agree(database, lake, {"public.root": ["id"]})


@only_18
def test_a_leaf_that_goes_astray_while_it_runs(database: Database, lake: Lake) -> None:
    """F2, C13: within a poll the consumer ends; when that is mended, a resync makes up for what it could not follow."""
    database.execute(IDENTITIES)
    with Consumer(lake, database.dsn, publication="mine", flush_interval="50ms") as consumer:
        await_states(consumer, lake, "streaming", "public.root")
        database.execute("CREATE UNIQUE INDEX by_k ON low (k); ALTER TABLE low REPLICA IDENTITY USING INDEX by_k")
        moves(database)
        assert consumer.wait(20) == 1
        *_, error, hint = consumer.output.splitlines()
    assert "another replica identity than the root" in error
    assert "`cdc resync public.root`" in hint
    database.execute("ALTER TABLE low REPLICA IDENTITY DEFAULT")
    assert call(lake, database.dsn, "resync", "public.root", publication="mine").returncode == 0
    sync(database, lake, publication="mine")
    agree(database, lake, {"public.root": ["id"]})


@only_18
def test_columns_that_are_left_out_of_partitions(database: Database, lake: Lake) -> None:
    """F3, G2: the root's column list is for leaves with other columns in another order, too."""
    database.execute(IDENTITIES)
    for _ in range(2):
        sync(database, lake, exclude="public.root.k")
        assert warehouse_rows(lake, "FROM public.root ORDER BY id") == database.execute(
            "SELECT id, v FROM root ORDER BY id"
        )
        moves(database)
    assert states(lake) == {"public.root": "streaming"}


@only_18
@pytest.mark.parametrize("via_root", [False, True])
def test_new_partitions_while_it_runs(database: Database, lake: Lake, via_root: bool) -> None:
    """F4: partitions that are created meanwhile, with their first rows in the same transaction."""
    database.execute(ROOT)
    database.execute(f"CREATE PUBLICATION mine FOR TABLE root WITH (publish_via_partition_root = {via_root})")
    with Consumer(lake, database.dsn, publication="mine", flush_interval="50ms") as consumer:
        await_states(consumer, lake, "streaming", *(["public.root"] if via_root else LEAVES))
        transactions(
            database,
            "CREATE TABLE leaf_26 PARTITION OF root FOR VALUES FROM ('2026-01-01') TO ('2027-01-01');"
            "INSERT INTO root SELECT i, '2026-03-01', 'new' FROM generate_series(1, 50) AS i",
            "CREATE TABLE mid_27 PARTITION OF root FOR VALUES FROM ('2027-01-01') TO ('2030-01-01') "
            "PARTITION BY LIST (id)",
            "CREATE TABLE leaf_27 PARTITION OF mid_27 DEFAULT; UPDATE root SET at = at + 365 WHERE id % 3 = 0",
            "UPDATE root SET v = 'again', at = at + 365 WHERE id % 5 = 0",
        )
        new = {} if via_root else dict.fromkeys(["public.leaf_26", "public.leaf_27"], KEY)
        await_states(consumer, lake, "streaming", *new, timeout_s=20)
        database.execute("UPDATE root SET v = 'last' WHERE at > '2026-01-01'; DELETE FROM root WHERE id = 15")
        settle(consumer, database, lake)
        equal(database, lake, {"public.root": KEY} if via_root else LEAVES | new)
        assert consumer.running
    assert set(states(lake)) == ({"public.root"} if via_root else {*LEAVES, *new})


FAMILY = """
    CREATE TABLE parent (id int PRIMARY KEY, v text);
    CREATE TABLE child (extra int, PRIMARY KEY (id)) INHERITS (parent);
    CREATE TABLE grandchild (PRIMARY KEY (id)) INHERITS (child);
    INSERT INTO parent SELECT i, 'parent' FROM generate_series(1, 20) AS i;
    INSERT INTO child SELECT i, 'child', i FROM generate_series(21, 40) AS i;
    INSERT INTO grandchild SELECT i, 'grandchild', i FROM generate_series(41, 60) AS i;
"""


@pytest.mark.parametrize(
    ("publication", "names"),
    [
        ("", ["parent", "child", "grandchild"]),
        ("FOR TABLE parent", ["parent", "child", "grandchild"]),
        ("FOR TABLE ONLY parent, child *", ["parent", "child", "grandchild"]),
        ("FOR TABLE ONLY parent, ONLY grandchild", ["parent", "grandchild"]),
        pytest.param(
            "FOR ALL TABLES WITH (publish_via_partition_root = true)",
            ["parent", "child", "grandchild"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_inheritance(database: Database, lake: Lake, publication: str, names: list[str]) -> None:
    """F6: parent and children are tables of their own, each with the rows that are in it ONLY."""
    database.execute(FAMILY)
    settings = {"publication": "mine"} if publication else {}
    if publication:
        database.execute(f"CREATE PUBLICATION mine {publication}")
    sync(database, lake, **settings)
    transactions(
        database,
        "UPDATE parent SET v = v || '!' WHERE id % 5 = 0",  # of all three
        "UPDATE ONLY parent SET v = 'only' WHERE id = 1",
        "DELETE FROM parent WHERE id % 7 = 0",
        "INSERT INTO child VALUES (100, 'new', 1); INSERT INTO parent VALUES (101, 'new')",
        "UPDATE child SET extra = -1 WHERE id > 50",
    )
    sync(database, lake, **settings)
    assert states(lake) == {f"public.{name}": "streaming" for name in names}
    for name in names:
        # what Postgres shows of a parent includes its children
        only = f"tableoid = 'public.{name}'::regclass"
        assert mirrored_rows(database, lake, f"public.{name}") == source_rows(database, lake, f"public.{name}", only)
        assert replayed(database, lake, f"public.{name}", ["id"]) == source_rows(database, lake, f"public.{name}", only)
    transactions(database, "TRUNCATE ONLY parent", "TRUNCATE child", "INSERT INTO grandchild VALUES (1, 'after', 2)")
    sync(database, lake, **settings)
    assert warehouse_rows(lake, "SELECT count(*) FROM public.parent") == [(0,)]
    assert warehouse_rows(lake, "FROM public.grandchild") == [(1, "after", 2)]


@only_18
def test_leaves_after_the_root_and_the_root_again(database: Database, lake: Lake) -> None:
    """F5, G7: somebody else's publication changes its mind: what is published now is right, what is not stays."""
    mirror_mine(database, lake, f"FOR TABLE root {VIA_ROOT}")
    transactions(
        database,
        "DELETE FROM root WHERE id = 1",
        "ALTER PUBLICATION mine SET (publish_via_partition_root = false)",
        "DELETE FROM root WHERE id = 2",
    )
    sync(database, lake, publication="mine")
    assert table_state(lake, "public.root") == ("dropped", "no longer published")
    agree(database, lake, LEAVES)
    transactions(database, "DELETE FROM root WHERE id = 3")
    transactions(database, "ALTER PUBLICATION mine SET (publish_via_partition_root = true)")
    transactions(database, "DELETE FROM root WHERE id = 4")
    sync(database, lake, publication="mine")
    agree(database, lake, {"public.root": KEY})
    assert table_state(lake, "public.leaf_24") == ("dropped", "no longer published")
