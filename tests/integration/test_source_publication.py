"""Our two publications: what is put into them, and that they never make the application's own statements fail."""

from __future__ import annotations

import threading
import time

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from cdc.errors import SourceError
from cdc.source import catalog, owner, publication, upkeep
from cdc.source.connection import connect
from tests.conftest import Database

TABLES = """
CREATE TABLE keyed (id int PRIMARY KEY, v int); CREATE TABLE keyless (x int);
CREATE TABLE root (id int PRIMARY KEY) PARTITION BY RANGE (id);
CREATE TABLE leaf PARTITION OF root FOR VALUES FROM (0) TO (10);
CREATE TABLE parent (id int PRIMARY KEY); CREATE TABLE child (PRIMARY KEY (id)) INHERITS (parent);
CREATE SCHEMA "S x"; CREATE TABLE "S x"."T.y" (id int PRIMARY KEY);
"""
NAMES = ("cdc", "cdc_append")


def members(database: Database, name: str = "cdc") -> tuple[list[str], list[str]]:
    """Tables of the first and the second publication."""
    with connect(database.dsn) as connection:
        found = catalog.published(connection, [name, f"{name}_append"])
    return tuple(  # type: ignore[return-value]
        [table.name for table in found if table.publication == each] for each in (name, f"{name}_append")
    )


def ensure(database: Database, *patterns: str, name: str = "cdc") -> tuple[str, ...]:
    with connect(database.dsn) as connection:
        return upkeep.ensure(connection, name, patterns)


def test_every_table_is_published_where_it_does_no_harm(database: Database) -> None:
    database.execute(TABLES)
    assert ensure(database) == NAMES
    assert members(database) == (["T.y", "child", "keyed", "parent", "root"], ["keyless"])
    database.execute("INSERT INTO keyless VALUES (1); UPDATE keyless SET x = 2; DELETE FROM keyless")
    database.execute("INSERT INTO root VALUES (1); UPDATE root SET id = 2; DELETE FROM root")
    flags = database.execute(
        "SELECT pubname, puballtables, pubinsert, pubupdate, pubdelete, pubtruncate, pubviaroot "
        "FROM pg_publication ORDER BY 1"
    )
    assert flags == [
        ("cdc", False, True, True, True, True, True),
        ("cdc_append", False, True, False, False, True, True),
    ]
    with connect(database.dsn) as connection:
        assert publication.is_ours(connection, "cdc") is True
        assert upkeep.plan(connection, "cdc", ()).statements == ()
    assert ensure(database) == NAMES


def test_patterns(database: Database) -> None:
    database.execute(TABLES)
    ensure(database, "public.key*", "S x.T.y", " ")
    assert members(database) == (["T.y", "keyed"], ["keyless"])
    database.execute("CREATE TABLE key_new (id int PRIMARY KEY); CREATE TABLE other (id int PRIMARY KEY)")
    ensure(database, "public.key*")
    assert members(database) == (["T.y", "key_new", "keyed"], ["keyless"])
    ensure(database, "public.child")
    assert members(database)[0] == ["T.y", "child", "key_new", "keyed"]


def test_a_child_by_inheritance_is_a_table_of_its_own(database: Database) -> None:
    """F6."""
    database.execute(TABLES)
    ensure(database, "public.parent")
    assert members(database) == (["parent"], [])


def test_a_table_moves_with_its_identity(database: Database) -> None:
    """C13: a lost key first makes the application's UPDATE fail, until the table is moved."""
    database.execute(TABLES)
    ensure(database)
    database.execute("INSERT INTO keyed VALUES (1, 1); ALTER TABLE keyed DROP CONSTRAINT keyed_pkey")
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
        database.execute("UPDATE keyed SET v = 2")
    with connect(database.dsn) as connection:
        assert [table.name for table in upkeep.plan(connection, "cdc", ()).lost] == ["keyed"]
    # Also when no pattern means it any more.
    ensure(database, "public.nothing")
    assert members(database) == (["T.y", "child", "parent", "root"], ["keyed", "keyless"])
    database.execute("UPDATE keyed SET v = 2")
    database.execute("ALTER TABLE keyed ADD PRIMARY KEY (id); ALTER TABLE keyless REPLICA IDENTITY FULL")
    with connect(database.dsn) as connection:
        gained = upkeep.plan(connection, "cdc", ()).gained
    assert [table.name for table in gained] == ["keyed", "keyless"]
    ensure(database)
    assert members(database) == (["T.y", "child", "keyed", "keyless", "parent", "root"], [])
    database.execute("UPDATE keyed SET v = 3; UPDATE keyless SET x = 3")


def test_a_publication_of_somebody_else_is_left_alone(database: Database) -> None:
    database.execute(TABLES)
    database.execute("CREATE PUBLICATION cdc FOR TABLE keyed")
    assert ensure(database) == ("cdc",)
    assert members(database) == (["keyed"], [])
    database.execute("CREATE PUBLICATION cdc_append FOR TABLE keyless WITH (publish = 'insert')")
    assert ensure(database) == NAMES
    with connect(database.dsn) as connection:
        assert publication.is_ours(connection, "cdc") is False
        assert upkeep.drop(connection, "cdc") == ()
    assert members(database) == (["keyed"], ["keyless"])


def test_a_second_publication_of_somebody_else_is_refused(database: Database) -> None:
    database.execute(TABLES)
    database.execute("CREATE PUBLICATION cdc_append")
    with pytest.raises(SourceError, match="cdc_append exists"):
        ensure(database)


def test_drop(database: Database) -> None:
    database.execute(TABLES)
    ensure(database, name='a "b"')
    with connect(database.dsn) as connection:
        assert sorted(upkeep.drop(connection, 'a "b"')) == ['a "b"', 'a "b"_append']
        assert upkeep.drop(connection, 'a "b"') == ()
        assert publication.is_ours(connection, 'a "b"') is None
    assert database.execute("SELECT count(*) FROM pg_publication") == [(0,)]


def test_a_locked_table_is_waited_for_a_while(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "LOCK_TIMEOUT_S", 1)
    database.execute(TABLES)
    other = database.connect(autocommit=False)
    other.execute("LOCK TABLE keyed IN ACCESS EXCLUSIVE MODE")
    with pytest.raises(SourceError) as caught:
        ensure(database)
    assert caught.value.sqlstate == "55P03"
    assert database.execute("SELECT count(*) FROM pg_publication") == [(0,)]
    other.rollback()
    assert ensure(database) == NAMES


def test_writers_and_readers_go_on_meanwhile(database: Database) -> None:
    database.execute(TABLES)
    writer = database.connect(autocommit=False)
    writer.execute("INSERT INTO keyed VALUES (1, 1)")
    started = time.monotonic()
    ensure(database)
    assert time.monotonic() - started < 2
    writer.commit()


def test_a_key_that_goes_in_the_last_moment_does_no_harm(database: Database) -> None:
    """The definition is read before the lock: what changed in between is noticed, and the plan made anew."""
    database.execute(TABLES)
    other = database.connect(autocommit=False)
    other.execute("ALTER TABLE keyed DROP CONSTRAINT keyed_pkey")
    thread = threading.Thread(target=ensure, args=(database,))
    thread.start()
    time.sleep(1)  # the plan is made, and waits for the lock
    other.commit()
    thread.join(20)
    assert members(database) == (["T.y", "child", "parent", "root"], ["keyed", "keyless"])


def test_without_rights_and_with_the_sql_of_setup(database: Database) -> None:
    """J17: what we may not do is refused with a hint; the owner runs what `setup_sql` renders."""
    role = f'r "{database.name[-8:]}'
    quoted = '"' + role.replace('"', '""') + '"'
    database.execute(TABLES)
    database.execute(f"CREATE ROLE {quoted} LOGIN REPLICATION")
    dsn = make_conninfo(database.dsn, user=role)
    try:
        with connect(dsn) as connection:
            with pytest.raises(SourceError) as caught:
                upkeep.ensure(connection, "cdc", ())
            assert caught.value.sqlstate == "42501"
            assert "setup" in caught.value.hint
        with connect(database.dsn) as connection:
            script = owner.setup_sql(connection, "cdc", (), role)
            assert "rds.logical_replication" in owner.setup_sql(connection, "cdc", (), role, "rds")
        lines = [line for line in script.splitlines() if not line.startswith(("--", "ALTER SYSTEM"))]
        database.execute("\n".join(lines))
        with connect(dsn) as connection:
            assert upkeep.ensure(connection, "cdc", ()) == NAMES
            connection.execute("SELECT FROM public.keyed")
            connection.execute('SELECT FROM "S x"."T.y"')
    finally:
        database.execute(f"DROP OWNED BY {quoted}; DROP ROLE {quoted}")
