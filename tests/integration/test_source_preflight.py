"""What `cdc check` says about a source, and what stops a start."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

import pytest
from psycopg.conninfo import make_conninfo

from cdc.embedded import EmbeddedServer
from cdc.errors import SourceError
from cdc.installation import installations
from cdc.source import preflight, upkeep
from cdc.source.connection import Connection, connect
from cdc.source.preflight import Expected, Finding
from tests.conftest import REQUIRED_MAJOR, Database

EXPECTED = Expected("some_slot", "cdc")


def check(database: Database, expected: Expected = EXPECTED, **changes: str) -> list[Finding]:
    with connect(make_conninfo(database.dsn, **changes)) as connection:
        found = preflight.findings(connection, expected)
    # Slots of other tests on the same server are no concern of this one.
    return [finding for finding in found if "is used by nobody" not in finding.message]


@pytest.fixture
def role(database: Database) -> Iterator[str]:
    name = f"r_{database.name[-8:]}"
    database.execute(f"CREATE ROLE {name} LOGIN REPLICATION")
    yield name
    database.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")


def test_nothing_to_find(database: Database) -> None:
    database.execute("CREATE TABLE t (id int PRIMARY KEY)")
    assert check(database) == []
    with connect(database.dsn) as connection:
        preflight.require(connection, EXPECTED)
        upkeep.ensure(connection, "cdc", ())
        preflight.require(connection, EXPECTED)
    assert check(database) == []


def test_an_old_server_is_refused_by_name() -> None:
    old = cast(Connection, SimpleNamespace(info=SimpleNamespace(server_version=140012)))
    with pytest.raises(SourceError, match="PostgreSQL 14 is older than 15"):
        preflight.require(old, EXPECTED)


def test_rights(database: Database, role: str) -> None:
    """J17, K8."""
    database.execute("""
        CREATE TABLE t (id int PRIMARY KEY, secret text); CREATE SCHEMA s; CREATE TABLE s.u (id int PRIMARY KEY);
        CREATE TABLE guarded (id int PRIMARY KEY); ALTER TABLE guarded ENABLE ROW LEVEL SECURITY""")
    (missing,) = [f for f in check(database, user=role) if f.level == "error" and "publication" in f.message]
    assert "setup" in missing.hint
    with connect(database.dsn) as connection:
        upkeep.ensure(connection, "cdc", ())
    errors = check(database, user=role)
    assert {(f.message, f.hint) for f in errors} == {
        ("no right to use schema s", f'GRANT USAGE ON SCHEMA "s" TO "{role}"'),
        ("no right to read table public.t", f'GRANT SELECT ON "public"."t" TO "{role}"'),
        ("no right to read table public.guarded", f'GRANT SELECT ON "public"."guarded" TO "{role}"'),
    }
    with connect(make_conninfo(database.dsn, user=role)) as connection, pytest.raises(SourceError, match="no right"):
        preflight.require(connection, EXPECTED)
    for finding in errors:
        database.execute(finding.hint)
    database.execute(f"GRANT SELECT ON s.u TO {role}")
    (hidden,) = check(database, user=role)
    assert "row security" in hidden.message
    database.execute(hidden.hint)
    assert check(database, user=role) == []


def test_rights_on_the_published_columns_are_enough(database: Database, role: str) -> None:
    """G2."""
    database.execute(f"""
        CREATE TABLE t (id int PRIMARY KEY, secret text); CREATE PUBLICATION cdc FOR TABLE t (id);
        GRANT SELECT (id) ON t TO {role}""")
    assert check(database, user=role) == []


def test_role_without_replication(database: Database) -> None:
    role = f"n_{database.name[-8:]}"
    database.execute(f"CREATE ROLE {role} LOGIN")
    try:
        first = check(database, user=role)[0]
        assert (first.level, first.message) == ("error", f"role {role} may not replicate")
        assert f'ALTER ROLE "{role}" REPLICATION' in first.hint
    finally:
        database.execute(f"DROP ROLE {role}")


def test_tables_that_are_not_ours_to_publish(database: Database, role: str) -> None:
    database.execute("CREATE TABLE t (id int PRIMARY KEY)")
    with connect(database.dsn) as connection:
        upkeep.ensure(connection, "cdc", ())
    database.execute(f"CREATE TABLE later (id int PRIMARY KEY); GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}")
    (finding,) = check(database, user=role)
    assert (finding.level, finding.message) == ("warning", "table public.later is not ours to publish")
    assert 'ALTER PUBLICATION "cdc" ADD TABLE ONLY "public"."later"' in finding.hint


def test_tables_without_identity(database: Database) -> None:
    database.execute("CREATE TABLE t (id int)")
    (finding,) = check(database)
    assert finding.level == "warning"
    assert "public.t has no usable replica identity" in finding.message


def test_a_foreign_publication_that_does_harm(database: Database) -> None:
    """An UPDATE fails in the application; the hint mends it."""
    database.execute("CREATE TABLE t (id int); INSERT INTO t VALUES (1); CREATE PUBLICATION cdc FOR ALL TABLES")
    (finding,) = check(database)
    assert "public.t" in finding.message
    database.execute(finding.hint.split(" (")[0])
    database.execute("UPDATE t SET id = 2")
    assert check(database) == []
    database.execute("ALTER PUBLICATION cdc SET (publish = 'insert, update')")
    (finding,) = check(database)
    assert "does not publish: delete, truncate" in finding.message


def test_patterns_that_match_nothing(database: Database) -> None:
    database.execute("CREATE TABLE t (id int PRIMARY KEY)")
    (finding,) = check(database, Expected("s", "cdc", ("public.t", "public.typo")))
    assert finding.message == "no table matches public.typo"


def test_slots(database: Database) -> None:
    name = f"s_{database.name[-8:]}"
    database.execute(f"SELECT pg_create_logical_replication_slot('{name}', 'test_decoding')")
    if "test_decoding" in str(database.execute("SELECT plugin FROM pg_replication_slots")):
        (finding,) = check(database, Expected(name, "cdc"))
        assert "has the plugin test_decoding" in finding.message
    with connect(database.dsn) as connection:
        messages = [finding.message for finding in preflight.findings(connection, EXPECTED)]
        assert any(f"slot {name} is used by nobody" in message for message in messages)
        preflight.require(connection, Expected(name, "cdc"))


def test_a_server_that_is_not_ready() -> None:
    """J17: wal_level, and no room for a slot."""
    with (
        EmbeddedServer(
            installations()[REQUIRED_MAJOR], wal_level="replica", max_replication_slots=1, max_wal_senders=1
        ) as server,
        connect(server.dsn()) as connection,
    ):
        found = preflight.findings(connection, EXPECTED)
        messages = [finding.message for finding in found]
        assert "wal_level is replica, not logical" in messages
        assert "no second replication slot is free: tables cannot be copied while streaming" in messages
        assert "no second WAL sender is free: tables cannot be copied while streaming" in messages
        with pytest.raises(SourceError, match="wal_level"):
            preflight.require(connection, EXPECTED)
        connection.execute("SELECT pg_create_physical_replication_slot('taken')")
        found = preflight.findings(connection, EXPECTED)
        assert any(f.level == "error" and f.message == "no replication slot is free" for f in found)
