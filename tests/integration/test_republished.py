"""Publications of somebody else that change between two looks at them: what the stream lacked is copied again."""

from __future__ import annotations

import pytest

from tests.conftest import Database, Lake
from tests.integration.copies import await_states, copy_lsns, settle
from tests.mirror import Consumer, states, until, warehouse_rows

pytestmark = pytest.mark.parametrize("server", [18], indirect=True, ids=["pg18"])

TABLE = (
    "CREATE TABLE t (id int PRIMARY KEY, v int, note text); CREATE TABLE other (id int PRIMARY KEY);"
    "INSERT INTO t SELECT i, i, 'n' FROM generate_series(1, 20) AS i"
)
BEFORE = {
    "a table": "FOR TABLE t, other",
    "its schema": "FOR TABLES IN SCHEMA public",
    "a row filter": "FOR TABLE t WHERE (id <= 10), other",
    "a column list": "FOR TABLE t (id, v), other",
}
# Each in statements of their own, so that changes come in between.
CHANGES = {
    "a table": ("ALTER PUBLICATION mine DROP TABLE t", "ALTER PUBLICATION mine ADD TABLE t"),
    "its schema": (
        "ALTER PUBLICATION mine DROP TABLES IN SCHEMA public",
        "ALTER PUBLICATION mine ADD TABLES IN SCHEMA public",
    ),
    "a row filter": ("SELECT 1", "ALTER PUBLICATION mine SET TABLE t WHERE (id <= 15), other"),
    "a column list": ("SELECT 1", "ALTER PUBLICATION mine SET TABLE t (id, v, note), other"),
}
WANTED = {
    "a table": "SELECT id, v, note FROM t",
    "its schema": "SELECT id, v, note FROM t",
    "a row filter": "SELECT id, v, note FROM t WHERE id <= 15",
    "a column list": "SELECT id, v, note FROM t",
}


@pytest.mark.parametrize(
    "what",
    [
        "a table",
        pytest.param("its schema", marks=pytest.mark.slow),
        "a row filter",
        pytest.param("a column list", marks=pytest.mark.slow),
    ],
)
def test_what_changes_between_two_looks(database: Database, lake: Lake, what: str) -> None:
    """G1, G2, G4, G5: the table is as one that is new to the publication; the others go on as they are."""
    database.execute(TABLE)
    database.execute(f"CREATE PUBLICATION mine {BEFORE[what]}")
    with Consumer(lake, database.dsn, publication="mine", flush_interval="50ms") as consumer:
        await_states(consumer, lake, "streaming", "public.t", "public.other")
        before = copy_lsns(lake)
        first, second = CHANGES[what]
        database.execute(first)
        database.execute("UPDATE t SET v = -v, note = 'm' WHERE id IN (3, 12); DELETE FROM t WHERE id = 5")
        database.execute(second)
        assert states(lake)["public.t"] == "streaming", "a poll came in between"
        until(lambda: copy_lsns(lake)["public.t"] != before["public.t"], 30, consumer.output)
        database.execute("UPDATE t SET v = 100 WHERE id = 7; INSERT INTO other VALUES (1)")
        settle(consumer, database, lake)
        assert states(lake) == {"public.t": "streaming", "public.other": "streaming"}
        found = warehouse_rows(lake, "SELECT id, v, note FROM public.t ORDER BY id")
        assert found == database.execute(f"{WANTED[what]} ORDER BY id")
        assert (copy_lsns(lake)["public.other"] == before["public.other"]) == (what != "its schema")
        until(lambda: not database.execute("SELECT 1 FROM pg_replication_slots WHERE temporary"), 10)
        once = copy_lsns(lake)
        consumer.stop()
    with Consumer(lake, database.dsn, publication="mine") as consumer:
        until(lambda: "streaming" in consumer.output)
        settle(consumer, database, lake)
        assert copy_lsns(lake) == once, "it was copied again without need"
