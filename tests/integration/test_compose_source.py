"""The source of compose.yaml: what postgres/ makes, loaded as the image does it, mirrored as the consumer's role."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import errors
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from cdc.embedded import EmbeddedServer
from tests.conftest import Database, Lake, _drop
from tests.integration.refusals import call, refused
from tests.integration.test_compose import ROOT, services
from tests.mirror import Consumer, differences, mirror_once, source_texts, states, until, warehouse_rows

POSTGRES = ROOT / "postgres"
TABLE = "public.subscriptions"


@pytest.fixture(scope="module")
def compose_server() -> Iterator[EmbeddedServer]:
    """A server with postgresql.conf, and the superuser that the image makes; roles are its own, so nobody shares it."""
    account = services()["postgres"]["environment"]
    server = EmbeddedServer(password="postgres")
    # where the server's user may read it; what cannot be the same here (port, addresses) is set after it
    settings = server.socket_directory / "compose.conf"
    shutil.copyfile(POSTGRES / "postgresql.conf", settings)
    settings.chmod(0o644)
    server.settings["include"] = settings
    with server:
        server.psql(f"CREATE ROLE {account['POSTGRES_USER']} SUPERUSER LOGIN PASSWORD '{account['POSTGRES_PASSWORD']}'")
        yield server


@pytest.fixture
def analytics(compose_server: EmbeddedServer) -> Iterator[Database]:
    """The database as the image makes it: every file of init/, in order, by psql."""
    account = services()["postgres"]["environment"]
    user, name = account["POSTGRES_USER"], account["POSTGRES_DB"]
    compose_server.psql(f"CREATE DATABASE {name} OWNER {user}")
    database = Database(compose_server, name, compose_server.dsn(name, user, account["POSTGRES_PASSWORD"]), [])
    try:
        for file in init_files():
            psql(database, file)
        yield database
    finally:
        database.close()
        _drop(database)
        compose_server.psql("DROP ROLE IF EXISTS cdc")


def init_files() -> list[Path]:
    """Return what the image runs, in its order: that of the names."""
    return sorted((POSTGRES / "init").iterdir())


def psql(database: Database, file: Path, **environment: str) -> str:
    """Run a file as the image does; return what psql printed."""
    arguments = ("--set=ON_ERROR_STOP=1", "--no-psqlrc", "--no-password", f"--file={file}", database.dsn)
    done = subprocess.run(
        [database.server.bin / "psql", *arguments],
        env=database.server.environment(database.name) | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def dsn_of(database: Database, name: str) -> str:
    """Return a connection that compose.yaml gives the consumer, as it is from here."""
    given = services()["cdc"]["environment"][name]
    assert conninfo_to_dict(given)["host"] == "postgres"
    return make_conninfo(given, host="127.0.0.1", port=database.server.port)


def changed(database: Database, before: Counter[tuple[Any, ...]]) -> tuple[set[Any], set[Any]]:
    """Return the keys of the rows that are there now and were not, and of those that are not there any more."""
    now = source_texts(database, TABLE)
    return {row[0] for row in now - before}, {row[0] for row in before - now}


def test_settings_file(compose_server: EmbeddedServer) -> None:
    """The server accepts every line, and what replication needs is in force."""
    given = "FROM pg_file_settings WHERE sourcefile LIKE '%/compose.conf'"
    assert int(compose_server.psql(f"SELECT count(*) {given}")) >= 5
    assert compose_server.psql(f"SELECT name, error {given} AND error IS NOT NULL") == ""
    # the embedded server has its own address, set after this
    late = compose_server.psql(f"SELECT name {given} AND NOT applied")
    assert late == "listen_addresses"
    assert compose_server.psql("SHOW wal_level") == "logical"
    assert compose_server.psql("SHOW max_slot_wal_keep_size") == "4GB"


def test_seed(analytics: Database) -> None:
    """Thousands of plausible rows: every plan, some of them gone, changed over two years."""
    assert analytics.execute(
        "SELECT count(*), count(DISTINCT email), count(DISTINCT plan), count(*) FILTER (WHERE lifetime_value < 0), "
        "max(updated_at) - min(updated_at) BETWEEN '700 days' AND '731 days', max(updated_at) < now(), "
        "count(*) FILTER (WHERE email !~ '^[a-z]+[.][a-z]+[0-9]*@example[.](com|net|org)$') FROM subscriptions"
    ) == [(5000, 5000, 4, 0, True, True, 0)]
    shares = analytics.execute(
        "SELECT plan, (100 * count(*) / 5000)::int, 100 * count(deleted_at) / count(*) BETWEEN 5 AND 15, "
        "(min(lifetime_value) > 0) = (plan <> 'free') FROM subscriptions GROUP BY plan ORDER BY 2 DESC"
    )
    assert shares == [
        ("free", 60, True, True),
        ("starter", 25, True, True),
        ("pro", 12, True, True),
        ("enterprise", 3, True, True),
    ]


def test_seed_is_the_same_again(analytics: Database) -> None:
    """Whatever the session's settings are."""
    first = source_texts(analytics, TABLE)
    analytics.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    for file in init_files()[:2]:
        psql(analytics, file, PGTZ="Asia/Kathmandu", PGDATESTYLE="German", PGOPTIONS="-c extra_float_digits=-5")
    assert source_texts(analytics, TABLE) == first


RIGHTS = """
    SELECT rolsuper, rolcreaterole, rolcreatedb, rolbypassrls, rolcanlogin, rolreplication,
           (SELECT count(*) FROM pg_auth_members WHERE member = r.oid)::int,
           has_database_privilege(oid, current_database(), 'CONNECT'),
           has_database_privilege(oid, current_database(), 'CREATE, TEMPORARY'),
           has_schema_privilege(oid, 'public', 'CREATE'), has_table_privilege(oid, 'public.subscriptions', 'SELECT'),
           has_table_privilege(oid, 'public.subscriptions', 'INSERT, UPDATE, DELETE, TRUNCATE, REFERENCES, TRIGGER'),
           has_sequence_privilege(oid, 'public.subscriptions_id_seq', 'USAGE, SELECT, UPDATE'),
           (SELECT count(*) FROM pg_publication WHERE pubowner = r.oid)::int
    FROM pg_roles AS r WHERE rolname = %s"""
LEAST = (False, False, False, False, True, True, 0, True, False, False, True, False, False, 0)


def test_role_has_the_rights_that_it_needs_and_no_others(analytics: Database, lake: Lake) -> None:
    """Checked, mirrored and streamed as the consumer of compose.yaml does it, with its password."""
    dsn = dsn_of(analytics, "CDC_DSN")
    role = conninfo_to_dict(dsn)["user"]
    assert analytics.execute(RIGHTS, [role]) == [LEAST]
    checked = call(lake, dsn, "check")
    assert checked.stdout.splitlines() == [f"note: publication cdc publishes {TABLE}", "nothing stands in the way"]
    mirror_once(lake, dsn)
    assert differences(analytics, lake, TABLE, ["id"]) == ""
    assert analytics.execute("SELECT count(*) FROM pg_publication") == [(1,)], "it is used as it is"
    for statement in (
        "DELETE FROM subscriptions",
        "CREATE TABLE t ()",
        "CREATE TEMPORARY TABLE t ()",
        "DROP PUBLICATION cdc",
    ):
        with psycopg.connect(dsn) as connection, pytest.raises(errors.InsufficientPrivilege):
            connection.execute(statement.encode())


def test_changes_file(analytics: Database, lake: Lake) -> None:
    """Three rows, each time three others, and the mirror has them."""
    dsn = dsn_of(analytics, "CDC_DSN")
    mirror_once(lake, dsn)
    touched: set[Any] = set()
    for _ in range(2):
        before = source_texts(analytics, TABLE)
        assert psql(analytics, POSTGRES / "changes.sql").split("\n")[:3] == ["INSERT 0 1", "UPDATE 1", "DELETE 0"]
        appeared, left = changed(analytics, before)
        assert (len(appeared), len(left), len(appeared - left)) == (3, 2, 1)
        assert not appeared & touched
        touched |= appeared
        mirror_once(lake, dsn)
        assert differences(analytics, lake, TABLE, ["id"]) == ""
    newest = "SELECT deleted_at IS NULL, plan FROM subscriptions ORDER BY updated_at DESC LIMIT 3"
    assert warehouse_rows(lake, newest.replace("subscriptions", TABLE)) == analytics.execute(newest)
    assert [live for live, _ in analytics.execute(newest)] == [False, True, True]


def test_soft_delete(analytics: Database, lake: Lake) -> None:
    """DELETE keeps the row and stamps it, once."""
    dsn = dsn_of(analytics, "CDC_DSN")
    mirror_once(lake, dsn)
    gone = "SELECT id, deleted_at, updated_at FROM subscriptions WHERE id BETWEEN 1 AND 10 AND deleted_at IS NOT NULL"
    before = analytics.execute(gone)
    assert before, "the first row was seeded as deleted"
    for _ in range(2):
        analytics.execute("DELETE FROM subscriptions WHERE id <= 10")
    after = analytics.execute(gone)
    assert sorted(key for key, _, _ in after) == list(range(1, 11))
    assert set(before) <= set(after), "what was deleted before keeps its times"
    assert all(deleted == updated for _, deleted, updated in after)
    assert analytics.execute("SELECT count(*) FROM subscriptions") == [(5000,)]
    mirror_once(lake, dsn)
    assert differences(analytics, lake, TABLE, ["id"]) == ""
    assert warehouse_rows(lake, f"SELECT count(deleted_at) FROM {TABLE} WHERE id <= 10") == [(10,)]


def test_erase(analytics: Database, lake: Lake) -> None:
    """The documented setting erases for good, for its transaction."""
    dsn = dsn_of(analytics, "CDC_DSN")
    mirror_once(lake, dsn)
    connection = analytics.connect()
    with connection.transaction():
        connection.execute("SET LOCAL analytics.erase = 'on'")
        assert connection.execute("DELETE FROM subscriptions WHERE id <= 10").rowcount == 10
    assert connection.execute("DELETE FROM subscriptions WHERE id <= 20").rowcount == 0
    connection.execute("SET analytics.erase = off")
    assert connection.execute("DELETE FROM subscriptions WHERE id <= 30").rowcount == 0
    connection.execute("SET analytics.erase = 'please'")
    with pytest.raises(errors.InvalidTextRepresentation):
        connection.execute("DELETE FROM subscriptions WHERE id <= 40")
    assert analytics.execute("SELECT min(id), count(*) FROM subscriptions") == [(11, 4990)]
    mirror_once(lake, dsn)
    assert differences(analytics, lake, TABLE, ["id"]) == ""


def test_updated_at(analytics: Database) -> None:
    """Whatever the statement says."""
    ((now, updated_at),) = analytics.execute(
        "UPDATE subscriptions SET plan = 'pro', updated_at = '2001-01-01' WHERE id = 7 RETURNING now(), updated_at"
    )
    assert updated_at == now
    ((now, updated_at),) = analytics.execute(
        "INSERT INTO subscriptions (email) VALUES ('someone@example.com') RETURNING now(), updated_at"
    )
    assert updated_at == now


def test_demo_changes(analytics: Database, lake: Lake) -> None:
    """As the container does it: a consumer streams as its own role, and the demo writes as another one."""
    dsn, writer = dsn_of(analytics, "CDC_DSN"), dsn_of(analytics, "CDC_DEMO_DSN")
    before = source_texts(analytics, TABLE)
    with Consumer(lake, dsn, flush_interval="100ms", demo_dsn=writer) as consumer:
        until(lambda: states(lake).get(TABLE) == "streaming", what="the copy")
        shown = call(lake, dsn, "demo", "--changes", demo_dsn=writer)
        assert shown.returncode == 0, shown.stderr
        *lines, last = shown.stdout.splitlines()
        assert [line.split(":")[0] for line in lines] == ["inserted", "updated", "soft-deleted"]
        assert last.startswith("now in DuckDB: cdc query ")
        keys = {line.split()[1].rstrip(",") for line in lines}
        assert changed(analytics, before)[0] == keys
        until(lambda: not differences(analytics, lake, TABLE), what="the changes")
        assert consumer.stop() == 0


def test_demo_changes_tells_what_is_wrong(analytics: Database, lake: Lake) -> None:
    """No right to write, no such table, flags that do not go together; and nothing is changed."""
    before = source_texts(analytics, TABLE)
    error, hint = refused(call(lake, dsn_of(analytics, "CDC_DSN"), "demo", "--changes"))
    assert error == "change three rows: permission denied for table subscriptions"
    assert "CDC_DEMO_DSN" in hint
    elsewhere = analytics.server.dsn("postgres")
    error, hint = refused(call(lake, "", "demo", "--changes", "--dsn", elsewhere))
    assert error == 'change three rows: relation "public.subscriptions" does not exist'
    assert "postgres/init" in hint
    refused(call(lake, "", "demo", "--changes", "--dsn", analytics.dsn, "--seconds", "3"), status=2)
    refused(call(lake, "", "demo", "--dsn", analytics.dsn), status=2)
    refused(call(lake, "", "demo", "--changes", "--dsn", "nonsense"), status=2)
    assert source_texts(analytics, TABLE) == before
