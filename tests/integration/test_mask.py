"""CDC_MASK: what is kept of a column is a digest or nothing, by copy and by stream alike."""

from __future__ import annotations

import hashlib
import hmac

import pytest

from tests.conftest import Database, Lake
from tests.integration.copies import await_states, blocking, copy_lsns, settle
from tests.integration.refusals import call, refused
from tests.integration.tailing import Tail
from tests.mirror import Consumer, mirror_once, run_cdc, states, until, warehouse_rows

pytestmark = pytest.mark.parametrize("server", [18], indirect=True, ids=["pg18"])

TABLES = """
CREATE TABLE people (id int PRIMARY KEY, name text, email text, born date, salary numeric(9, 2), note text);
ALTER TABLE people ALTER note SET STORAGE EXTERNAL;
CREATE TABLE log (at int, who text); ALTER TABLE log REPLICA IDENTITY FULL;
INSERT INTO people SELECT i, 'n' || i, 'secret' || i, '1999-12-31', i, repeat('secret', 1000)
  FROM generate_series(1, 10) AS i;
INSERT INTO log VALUES (1, 'secret'), (1, 'secret'), (2, NULL)"""
MASK = (
    "public.people.email:hmac, public.people.born:hash,public.people.salary:null,public.people.note:hmac,"
    "public.log.who:hash"
)
KEY = "a key"
CHANGES = """
UPDATE people SET name = 'm', email = 'secret x' WHERE id < 4;
UPDATE people SET name = 'l' WHERE id = 5;
UPDATE people SET id = 20, born = '1998-01-01' WHERE id = 6;
DELETE FROM people WHERE id = 7;
INSERT INTO people VALUES (11, NULL, NULL, '1999-12-31', 7, 'secret');
DELETE FROM log WHERE ctid = (SELECT min(ctid) FROM log); INSERT INTO log VALUES (3, 'secret')"""


def hashed(text: str | None) -> str | None:
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()


def keyed(text: str | None, key: str = KEY) -> str | None:
    return None if text is None else hmac.new(key.encode(), text.encode(), "sha256").hexdigest()


def people(database: Database, lake: Lake, key: str = KEY) -> None:
    """Assert that the warehouse has every row, masked."""
    rows = database.execute("SELECT id, name, email, born::text, salary, note FROM people ORDER BY id")
    assert warehouse_rows(lake, "SELECT id, name, email, born, salary, note FROM public.people ORDER BY id") == [
        (id_, name, keyed(email, key), hashed(born), None, keyed(note, key)) for id_, name, email, born, _, note in rows
    ]


def nothing_is_told(lake: Lake) -> None:
    for file in lake.root.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert b"secret" not in content, file
            assert b"1999-12-31" not in content, file


def test_what_is_masked_is_never_kept(database: Database, lake: Lake) -> None:
    """By copy, stream, update, unchanged TOAST and a changed key; of keyless tables as well; in the history's files."""
    database.execute(TABLES)
    mirror_once(lake, database.dsn, mask=MASK, mask_key=KEY)
    people(database, lake)
    database.execute(CHANGES)
    mirror_once(lake, database.dsn, mask=MASK, mask_key=KEY)
    people(database, lake)
    log = [(at, hashed(who)) for at, who in database.execute("SELECT at, who FROM log ORDER BY 1")]
    assert warehouse_rows(lake, "FROM public.log ORDER BY 1") == log
    kinds = dict(warehouse_rows(lake, "SELECT column_name, column_type FROM (DESCRIBE public.people)"))
    assert [kinds[name] for name in ("email", "born", "salary")] == ["VARCHAR", "VARCHAR", "DECIMAL(9,2)"]
    nothing_is_told(lake)
    copied = warehouse_rows(
        lake,
        f"SELECT email FROM read_parquet('{lake.history}/public/people/*.parquet') WHERE id = 5 ORDER BY _lsn, _seq",
    )
    assert copied == [(keyed("secret5"),)] * 2


def test_changes_that_are_kept_for_a_copy(database: Database, lake: Lake) -> None:
    """The buffer of a table that is being copied is in the warehouse's file, too."""
    database.execute(TABLES)
    with Consumer(lake, database.dsn, mask=MASK, mask_key=KEY, flush_interval="50ms") as consumer:
        await_states(consumer, lake, "streaming", "public.people", "public.log")
        before = copy_lsns(lake)
        with blocking(database):
            run_cdc(lake, database.dsn, "resync", "public.people")
            until(lambda: states(lake)["public.people"] == "resyncing", 30, consumer.output)
            database.execute(CHANGES)
            until(lambda: warehouse_rows(lake, "SELECT count(*) FROM _cdc.buffer") != [(0,)], 30)
            nothing_is_told(lake)
        until(lambda: copy_lsns(lake)["public.people"] != before["public.people"], 30)
        settle(consumer, database, lake)
        people(database, lake)
        assert consumer.stop() == 0
    nothing_is_told(lake)


def test_a_column_that_gets_another_name(database: Database, lake: Lake) -> None:
    """Nothing of it comes unmasked: the table is put aside until CDC_MASK is put right; the others go on."""
    database.execute(TABLES)
    mirror_once(lake, database.dsn, mask=MASK, mask_key=KEY)
    with Consumer(lake, database.dsn, mask=MASK, mask_key=KEY, flush_interval="50ms") as consumer:
        until(lambda: "streaming" in consumer.output, 30)
        database.execute("ALTER TABLE people RENAME email TO mail; UPDATE people SET mail = 'secret y' WHERE id = 1")
        database.execute("INSERT INTO log VALUES (5, 'secret')")
        await_states(consumer, lake, "error", "public.people")
        until(lambda: warehouse_rows(lake, "SELECT count(*) FROM public.log") == [(4,)], 30, consumer.output)
        assert "masked column public.people.email is not there any more" in consumer.output
        assert consumer.stop() == 0
    nothing_is_told(lake)
    error, hint = refused(call(lake, database.dsn, "run", "--once", mask=MASK, mask_key=KEY), 2)
    assert "there is no column public.people.email" in error
    assert "renamed" in hint
    better = MASK.replace("people.email", "people.mail")
    assert run_cdc(lake, database.dsn, "resync", "public.people").returncode == 0
    mirror_once(lake, database.dsn, mask=better, mask_key=KEY)
    assert states(lake)["public.people"] == "streaming"
    nothing_is_told(lake)


def test_another_mind(database: Database, lake: Lake) -> None:
    """Another mask, or another key, is refused until the table is copied anew."""
    database.execute(TABLES)
    mirror_once(lake, database.dsn, mask=MASK, mask_key=KEY)
    for settings, words in (
        ({"mask": MASK, "mask_key": "another"}, "was copied with hmac and key"),
        ({"mask": MASK.replace("email:hmac", "email:hash"), "mask_key": KEY}, "and now has hash"),
        ({"mask": MASK.replace("public.log.who:hash", "public.log.at:null"), "mask_key": KEY}, "log"),
    ):
        error, hint = refused(call(lake, database.dsn, "run", "--once", **settings), 2)
        assert words in error
        assert "cdc resync public." in hint
    assert run_cdc(lake, database.dsn, "resync", "public.people").returncode == 0
    mirror_once(lake, database.dsn, mask=MASK, mask_key="another")
    people(database, lake, "another")


def test_what_was_there_before_the_mask(database: Database, lake: Lake) -> None:
    """L1: deleted rows are not carried in the clear into the copy, nor does the quarantine keep what did not fit."""
    database.execute(
        "CREATE TABLE t (id int PRIMARY KEY, v text, l text[]);"
        "INSERT INTO t VALUES (1, 'clear-1', '{{clear-2}}'), (2, 'clear-3', '{clear-4}')"
    )
    mirror_once(lake, database.dsn, deletes="soft", history="")
    database.execute("DELETE FROM t WHERE id = 2")
    mirror_once(lake, database.dsn, deletes="soft", history="")
    mask = "public.t.v:hash,public.t.l:null"
    assert run_cdc(lake, database.dsn, "resync", "--all", deletes="soft", mask=mask).returncode == 0
    mirror_once(lake, database.dsn, deletes="soft", mask=mask, history="")
    rows = warehouse_rows(lake, "SELECT id, v, l, _deleted_at IS NULL FROM public.t ORDER BY id")
    assert rows == [(1, hashlib.sha256(b"clear-1").hexdigest(), None, True), (2, None, None, False)]
    assert warehouse_rows(lake, "SELECT * FROM _cdc.quarantine") == []


def test_a_name_and_a_mask_at_once(database: Database, lake: Lake) -> None:
    """What the quarantine kept of a column under its old name goes when it comes masked under a new one."""
    database.execute("CREATE TABLE t (id int PRIMARY KEY, l text[]); INSERT INTO t VALUES (1, '{{clear}}')")
    mirror_once(lake, database.dsn)
    assert warehouse_rows(lake, "SELECT value FROM _cdc.quarantine") == [("{{clear}}",)]
    database.execute("ALTER TABLE t RENAME l TO m")
    assert run_cdc(lake, database.dsn, "resync", "--all", mask="public.t.m:null").returncode == 0
    mirror_once(lake, database.dsn, mask="public.t.m:null")
    assert warehouse_rows(lake, "FROM public.t") == [(1, None)]
    assert warehouse_rows(lake, "FROM _cdc.quarantine") == []


def test_what_cannot_be_masked(database: Database, lake: Lake) -> None:
    """Exit status 2, one line, one hint, and nothing is made; `check` tells it too."""
    database.execute(TABLES)
    for mask, words in (
        ("public.people.id:hash", "public.people.id cannot be masked, because it is part of the key"),
        ("public.people.nothing:hash", "there is no column public.people.nothing"),
        ("people.email:hash", "not schema.table.column"),
        ("public.people.email:md5", "not schema.table.column and one of :hmac, :null, :hash"),
        ("public.people.email:hmac", "CDC_MASK_KEY is empty"),
        ("public.people.email:hash,public.people.email:null", "more than one mask"),
    ):
        error, _ = refused(call(lake, database.dsn, "run", "--once", mask=mask), 2)
        assert words in error
    found = call(lake, database.dsn, "check", mask="public.people.id:hash")
    assert found.returncode == 3
    assert "cannot be masked" in found.stdout
    error, _ = refused(
        call(lake, database.dsn, "run", "--once", mask="public.people.email:null", exclude="public.people.email"), 2
    )
    assert "is in CDC_EXCLUDE as well" in error
    assert database.execute("SELECT count(*) FROM pg_publication") == [(0,)]


def test_columns_that_come_later(database: Database, lake: Lake) -> None:
    """H1: DDL beside a masked column is followed without a copy; a masked one that becomes the key ends the table."""
    database.execute(TABLES)
    mirror_once(lake, database.dsn, mask=MASK, mask_key=KEY)
    before = copy_lsns(lake)
    database.execute(
        "ALTER TABLE people ADD city text DEFAULT 'Wien'; UPDATE people SET email = 'secret z' WHERE id = 2"
    )
    mirror_once(lake, database.dsn, mask=MASK, mask_key=KEY)
    people(database, lake)
    assert copy_lsns(lake) == before
    assert warehouse_rows(lake, "SELECT DISTINCT city FROM public.people") == [("Wien",)]
    database.execute(
        "ALTER TABLE people DROP CONSTRAINT people_pkey; ALTER TABLE people ALTER email SET NOT NULL;"
        "CREATE UNIQUE INDEX u ON people (email); ALTER TABLE people REPLICA IDENTITY USING INDEX u;"
        "UPDATE people SET name = 'q' WHERE id = 2"
    )
    error, _ = refused(call(lake, database.dsn, "run", "--once", mask=MASK, mask_key=KEY), 2)
    assert "public.people.email cannot be masked, because it is part of the key" in error


def test_tail(database: Database, lake: Lake) -> None:
    """Nothing is printed that would not be kept."""
    database.execute(TABLES)
    mirror_once(lake, database.dsn, mask=MASK, mask_key=KEY)
    with Tail(lake, database.dsn, "--format", "json", mask=MASK, mask_key=KEY) as tail:
        database.execute("UPDATE people SET email = 'secret q' WHERE id = 1")
        (line,) = tail.until(1)
        assert "secret q" not in line
        assert str(keyed("secret q")) in line
    error, _ = refused(call(lake, database.dsn, "tail", "--format", "debezium", mask=MASK, mask_key=KEY), 2)
    assert "CDC_MASK" in error


@pytest.mark.parametrize(
    "statements",
    [
        "TRUNCATE log; ALTER TABLE log RENAME who TO whom; INSERT INTO log VALUES (9, 'secret')",
        "TRUNCATE log; ALTER TABLE log RENAME TO journal; INSERT INTO journal VALUES (9, 'secret')",
        (
            "ALTER TABLE log RENAME TO old; ALTER TABLE other RENAME TO log; INSERT INTO old VALUES (9, 'secret');"
            "INSERT INTO log VALUES (9, 'secret')"
        ),
    ],
    ids=["column", "table", "swap"],
)
def test_other_names_and_other_rows(database: Database, lake: Lake, statements: str) -> None:
    """H8: a rewrite beside a new name mends nothing: what CDC_MASK names is never in clear, nor what takes its name."""
    database.execute("CREATE TABLE log (at int, who text); CREATE TABLE other (at int, who text)")
    database.execute("INSERT INTO log VALUES (1, 'secret')")
    mask = {"mask": "public.log.who:hash"}
    mirror_once(lake, database.dsn, **mask)
    with Consumer(lake, database.dsn, flush_interval="50ms", **mask) as consumer:
        until(lambda: "streaming" in consumer.output, 30)
        database.execute(f"BEGIN; {statements}; COMMIT")
        until(lambda: "error" in states(lake).values(), 30, consumer.output)
        settle(consumer, database, lake)
        assert consumer.output.count("CDC_MASK") < 5, consumer.output
        assert consumer.stop() == 0
    nothing_is_told(lake)
    run_cdc(lake, database.dsn, "resync", "--all", **mask)
    call(lake, database.dsn, "run", "--once", **mask)
    nothing_is_told(lake)
