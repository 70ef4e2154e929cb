"""CDC_EXCLUDE: columns that never leave Postgres, and nothing that would harm the source."""

from __future__ import annotations

import duckdb
import psycopg
import pytest

from tests.conftest import Database, Lake
from tests.integration.copies import await_states, copy_lsns, settle
from tests.integration.refusals import call, refused
from tests.mirror import Consumer, mirror_once, run_cdc, until, warehouse_rows

pytestmark = pytest.mark.parametrize("server", [18], indirect=True, ids=["pg18"])

TABLES = """
CREATE TABLE people (id int PRIMARY KEY, name text, iban text, born date);
CREATE TABLE log (at int, who text, what text);
CREATE TABLE plain (id int PRIMARY KEY, iban text);
INSERT INTO people SELECT i, 'n' || i, 'secret' || i, '2000-01-01' FROM generate_series(1, 10) AS i;
INSERT INTO log VALUES (1, 'secret', 'x'); INSERT INTO plain VALUES (1, 'open')"""
EXCLUDE = "public.people.iban, public.people.born,public.log.who"


def columns(lake: Lake, table: str) -> list[str]:
    return [name for (name, *_) in warehouse_rows(lake, f"DESCRIBE public.{table}")]


def logged(lake: Lake, table: str) -> list[str]:
    """Return the columns that the change log of a table has."""
    with duckdb.connect() as connection:
        files = f"{lake.history}/public/{table}/*.parquet"
        described = connection.execute(f"DESCRIBE FROM read_parquet('{files}', union_by_name = true)").fetchall()
    return [name for (name, *_) in described if not name.startswith("_")]


def people(database: Database, lake: Lake, chosen: str) -> None:
    """Assert that these columns are the same on both sides."""
    found = warehouse_rows(lake, f"SELECT {chosen} FROM public.people ORDER BY id")
    assert found == database.execute(f"SELECT {chosen} FROM people ORDER BY id")


def test_what_is_excluded_never_comes(database: Database, lake: Lake) -> None:
    """G2: neither by the copy nor by the stream, of keyed and of keyless tables; the application goes on as before."""
    database.execute(TABLES)
    mirror_once(lake, database.dsn, exclude=EXCLUDE)
    database.execute(
        "UPDATE people SET name = 'm', iban = 'new secret' WHERE id < 4; DELETE FROM people WHERE id = 5;"
        "INSERT INTO people VALUES (11, 'n', 'secret', '2001-01-01'); INSERT INTO log VALUES (2, 'secret', 'y');"
        "UPDATE people SET id = 20 WHERE id = 6"
    )
    mirror_once(lake, database.dsn, exclude=EXCLUDE)
    assert (columns(lake, "people"), columns(lake, "log")) == (["id", "name"], ["at", "what"])
    assert (logged(lake, "people"), logged(lake, "log")) == (["id", "name"], ["at", "what"])
    assert columns(lake, "plain") == ["id", "iban"]
    people(database, lake, "id, name")
    assert warehouse_rows(lake, "FROM public.log ORDER BY 1") == [(1, "x"), (2, "y")]
    assert all(b"secret" not in file.read_bytes() for file in lake.root.rglob("*") if file.is_file())


def test_columns_that_are_added(database: Database, lake: Lake) -> None:
    """H1: a list does not grow by itself: the table is listed and copied anew, and no value is missing."""
    database.execute(TABLES)
    with Consumer(lake, database.dsn, exclude=EXCLUDE, flush_interval="50ms") as consumer:
        await_states(consumer, lake, "streaming", "public.people", "public.log", "public.plain")
        before = copy_lsns(lake)
        database.execute("ALTER TABLE people ADD city text DEFAULT 'Wien'")
        database.execute(
            "UPDATE people SET city = 'Graz' WHERE id = 3; INSERT INTO people (id, city) VALUES (12, 'Linz')"
        )
        until(lambda: copy_lsns(lake)["public.people"] != before["public.people"], 30, consumer.output)
        database.execute("UPDATE people SET city = 'Bonn' WHERE id = 4")
        settle(consumer, database, lake)
        assert columns(lake, "people") == ["id", "name", "city"]
        people(database, lake, "id, name, city")
        assert copy_lsns(lake)["public.plain"] == before["public.plain"]
        assert consumer.stop() == 0


def test_another_mind(database: Database, lake: Lake) -> None:
    """A column that is excluded later goes; one that is not any more comes, with its values."""
    database.execute(TABLES)
    mirror_once(lake, database.dsn, exclude="public.people.born")
    assert columns(lake, "people") == ["id", "name", "iban"]
    mirror_once(lake, database.dsn, exclude="public.people.iban")
    assert columns(lake, "people") == ["id", "name", "born"]
    people(database, lake, "id, name, born")
    mirror_once(lake, database.dsn)
    assert columns(lake, "people") == ["id", "name", "iban", "born"]
    people(database, lake, "id, name, iban, born")
    again = copy_lsns(lake)
    mirror_once(lake, database.dsn)
    assert copy_lsns(lake) == again


def test_what_did_not_fit_goes_too(database: Database, lake: Lake) -> None:
    """The quarantine keeps nothing of a column that is excluded later, and all of the others'."""
    database.execute(
        "CREATE TABLE t (id int PRIMARY KEY, iban text[], n numeric(5,2));INSERT INTO t VALUES (1, '{{secret}}', 'NaN')"
    )
    mirror_once(lake, database.dsn)
    assert len(warehouse_rows(lake, "FROM _cdc.quarantine")) == 2
    mirror_once(lake, database.dsn, exclude="public.t.iban")
    found = warehouse_rows(lake, "SELECT DISTINCT column_name, value FROM _cdc.quarantine")
    assert found == [("n", "NaN")]


def test_what_somebody_else_publishes_no_longer(database: Database, lake: Lake) -> None:
    """G2: the stream tells of it before the catalog is looked at; the quarantine keeps nothing of that column."""
    database.execute(
        "CREATE TABLE t (id int PRIMARY KEY, iban text[], n numeric(5,2)); CREATE PUBLICATION cdc FOR TABLE t;"
        "INSERT INTO t VALUES (1, '{{secret}}', 'NaN')"
    )
    with Consumer(lake, database.dsn, poll_interval="1h") as consumer:
        await_states(consumer, lake, "streaming", "public.t")
        database.execute("ALTER PUBLICATION cdc SET TABLE t (id, n); INSERT INTO t VALUES (2, '{{secret}}', 'NaN')")
        settle(consumer, database, lake)
        assert columns(lake, "t") == ["id", "n"]
        found = warehouse_rows(lake, "SELECT column_name, key, value, current FROM _cdc.quarantine ORDER BY key")
        assert found == [("n", f'{{"id": "{number}"}}', "NaN", True) for number in (1, 2)]
        assert consumer.stop() == 0


def test_what_cannot_be_excluded(database: Database, lake: Lake) -> None:
    """Exit status 2, and nothing is made; `check` tells it too."""
    database.execute(TABLES + "; CREATE TABLE whole (id int, v text); ALTER TABLE whole REPLICA IDENTITY FULL;")
    for exclude, words in (
        ("public.people.id", "public.people.id cannot be left out, because it is part of the key"),
        ("public.whole.v", "public.whole.v cannot be left out, because it has REPLICA IDENTITY FULL"),
        ("public.people.nothing", "there is no column public.people.nothing"),
        ("people.iban", "there is no column people.iban"),
        ("public.log.at,public.log.who,public.log.what", "nothing is left of public.log"),
    ):
        error, _ = refused(call(lake, database.dsn, "run", "--once", exclude=exclude), 2)
        assert words in error
        found = call(lake, database.dsn, "check", exclude=exclude)
        assert found.returncode == 3
        assert words in found.stdout
    assert database.execute("SELECT count(*) FROM pg_publication") == [(0,)]
    database.execute("CREATE PUBLICATION mine FOR TABLE people (id, name), plain")
    refused_again, hint = refused(
        call(lake, database.dsn, "run", "--once", publication="mine", exclude="public.plain.iban"), 2
    )
    assert "publication mine publishes public.plain.iban, and is not ours to change" in refused_again
    assert "SET TABLE" in hint
    mirror_once(lake, database.dsn, publication="mine", exclude="public.people.iban")
    assert columns(lake, "people") == ["id", "name"]


def test_a_table_that_comes_to_need_what_is_excluded(database: Database, lake: Lake) -> None:
    """Its updates would fail in the application: within a poll it is published without them."""
    database.execute(TABLES)
    with Consumer(lake, database.dsn, exclude=EXCLUDE, flush_interval="50ms") as consumer:
        await_states(consumer, lake, "streaming", "public.people")
        database.execute("ALTER TABLE people REPLICA IDENTITY FULL")

        def works() -> bool:
            try:
                database.execute("UPDATE people SET name = 'z' WHERE id = 1")
            except psycopg.errors.InvalidColumnReference:
                return False
            return True

        assert not works()
        until(works, 30)
        assert consumer.running
    assert all(b"secret" not in file.read_bytes() for file in lake.root.rglob("*") if file.is_file())


def test_setup(database: Database, lake: Lake) -> None:
    """The SQL for the owner has the lists, and the consumer is content with it."""
    database.execute(TABLES)
    script = run_cdc(lake, database.dsn, "setup", exclude=EXCLUDE).stdout
    assert 'ONLY "public"."people" ("id", "name")' in script
    assert 'ONLY "public"."log" ("at", "what")' in script
    assert call(lake, database.dsn, "setup", "--apply", exclude=EXCLUDE).returncode == 0
    mirror_once(lake, database.dsn, exclude=EXCLUDE)
    assert columns(lake, "people") == ["id", "name"]
    database.execute("DROP OWNED BY cdc; DROP ROLE cdc")


def test_names_that_change(database: Database, lake: Lake) -> None:
    """H1, H8: what gets another name stays out, whatever is added beside it, until CDC_EXCLUDE is put right."""
    database.execute(TABLES)
    exclude = "public.people.iban,public.log.who"
    with Consumer(lake, database.dsn, exclude=exclude, flush_interval="50ms") as consumer:
        await_states(consumer, lake, "streaming", "public.people", "public.log")
        database.execute("ALTER TABLE people RENAME iban TO account; ALTER TABLE log RENAME TO journal")
        database.execute("ALTER TABLE people ADD city text; ALTER TABLE people REPLICA IDENTITY FULL")
        until(lambda: "no longer published" in consumer.output or "another way" in consumer.output, 30)
        database.execute("UPDATE people SET account = 'secret a', name = 'z' WHERE id = 1")
        database.execute("INSERT INTO journal VALUES (3, 'secret', 'z')")
        settle(consumer, database, lake)
        assert consumer.stop() == 0
    assert columns(lake, "people") == ["id", "name", "born"]
    assert all(b"secret" not in file.read_bytes() for file in lake.root.rglob("*") if file.is_file())
    error, hint = refused(call(lake, database.dsn, "run", "--once", exclude=exclude), 2)
    assert "there is no column public.log.who" in error
    assert "renamed" in hint
