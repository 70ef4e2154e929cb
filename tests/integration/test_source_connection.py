"""Sessions: their settings whatever the role says, and errors that say what to do."""

from __future__ import annotations

import threading
import time

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from cdc.errors import ConnectionLost, SettingsError, SourceError
from cdc.source.connection import PINNED, connect, connect_replication, execute, translated
from tests.conftest import Database


@pytest.fixture(params=["catalog", "replication"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def open_and_close(kind: str, dsn: str) -> None:
    if kind == "catalog":
        connect(dsn).close()
    else:
        connect_replication(dsn).finish()


def test_settings_are_pinned_against_role_and_environment(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """J19, trap 10."""
    for name, value in (("PGTZ", "Asia/Tokyo"), ("PGDATESTYLE", "German"), ("PGCLIENTENCODING", "LATIN1")):
        monkeypatch.setenv(name, value)
    role = f"r_{database.name[-8:]}"
    hostile = {
        "datestyle": "'SQL, MDY'",
        "intervalstyle": "sql_standard",
        "extra_float_digits": "0",
        "bytea_output": "escape",
        "timezone": "'America/New_York'",
        "search_path": "public",
        "statement_timeout": "1",
        "lock_timeout": "1",
        "default_transaction_read_only": "on",
        "default_transaction_isolation": "serializable",
        **({"transaction_timeout": "100"} if database.version >= 17 else {}),
    }
    database.execute(f"CREATE ROLE {role} LOGIN SUPERUSER")
    try:
        for name, value in hostile.items():
            database.execute(f"ALTER ROLE {role} SET {name} = {value}")
        dsn = make_conninfo(database.dsn, user=role, options="-c work_mem=5MB")
        expected = {**PINNED, "work_mem": "5MB"}
        if database.version >= 17:
            expected["transaction_timeout"] = "0"
        pgconn = connect_replication(dsn)
        with connect(dsn) as connection:
            for name, value in expected.items():
                shown = connection.execute(f"SHOW {name}".encode()).fetchall()[0][0]
                (replicated,) = execute(pgconn, f"SHOW {name}")[0].values()
                # The order of day and month is the role's: it says how dates are read, not how ISO ones are written.
                assert shown.removesuffix(", MDY").removesuffix(", DMY") == value, name
                assert replicated == shown, name
        pgconn.finish()
    finally:
        database.execute(f"DROP ROLE {role}")


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"port": 1}, ConnectionLost, "refused"),
        ({"host": "nowhere.invalid"}, ConnectionLost, "nowhere.invalid"),
        ({"host": "/nowhere"}, ConnectionLost, "No such file"),
        ({"user": "nobody_here"}, SourceError, 'role "nobody_here" does not exist'),
        ({"dbname": "nothing_here"}, SourceError, 'database "nothing_here" does not exist'),
        ({"sslmode": "require"}, SourceError, "SSL"),
        ({"options": "-c nonsense=1"}, SourceError, "nonsense"),
    ],
)
def test_connect_errors_are_one_line_and_a_hint(
    database: Database, kind: str, changes: dict[str, str], error: type[SourceError], words: str
) -> None:
    """J17."""
    with pytest.raises(error, match=words) as caught:
        open_and_close(kind, make_conninfo(database.dsn, **changes))
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    assert caught.value.hint


def test_role_without_replication(database: Database) -> None:
    """J17."""
    role = f"r_{database.name[-8:]}"
    database.execute(f"CREATE ROLE {role} LOGIN")
    try:
        with pytest.raises(SourceError, match=r"replication|WAL sender") as caught:
            connect_replication(make_conninfo(database.dsn, user=role))
        assert "REPLICATION" in caught.value.hint
    finally:
        database.execute(f"DROP ROLE {role}")


@pytest.mark.parametrize(
    "dsn", ["postgresql://u:hunter2@[h/d", "password=hunter2 nonsense=1", "host=h port=x password hunter2"]
)
def test_a_dsn_that_cannot_be_read_is_not_repeated(kind: str, dsn: str) -> None:
    with pytest.raises(SettingsError) as caught:
        open_and_close(kind, dsn)
    assert "hunter2" not in str(caught.value) + caught.value.hint


def test_hosts_are_tried_in_turn(database: Database, kind: str) -> None:
    port = conninfo_to_dict(database.dsn)["port"]
    open_and_close(kind, make_conninfo(database.dsn, host="127.0.0.1,127.0.0.1", port=f"1,{port}"))


def test_a_server_that_says_nothing(kind: str) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        started = time.monotonic()
        with pytest.raises(ConnectionLost, match="time"):
            open_and_close(kind, f"host=127.0.0.1 port={listener.getsockname()[1]} connect_timeout=2 user=u dbname=d")
        assert time.monotonic() - started < 5


def test_execute_reports_the_server_s_error(database: Database) -> None:
    pgconn = connect_replication(database.dsn)
    with pytest.raises(SourceError, match='column "nothing" does not exist') as caught:
        execute(pgconn, "SELECT nothing")
    assert caught.value.sqlstate == "42703"
    assert execute(pgconn, "SELECT 1 AS one, NULL AS none") == [{"one": "1", "none": None}]
    database.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'walsender'")
    with pytest.raises(ConnectionLost):
        execute(pgconn, "SELECT 1")
    pgconn.finish()


def test_execute_can_be_given_up(database: Database) -> None:
    """Other threads run meanwhile; the session can be used afterwards."""
    ticks: list[float] = []
    done = threading.Event()

    def count() -> None:
        while not done.wait(0.01):
            ticks.append(time.monotonic())

    def waiting(waited_s: float) -> None:
        if waited_s > 1.5:
            raise TimeoutError

    threading.Thread(target=count, daemon=True).start()
    pgconn = connect_replication(database.dsn)
    with pytest.raises(TimeoutError):
        execute(pgconn, "SELECT pg_sleep(30)", waiting)
    done.set()
    assert len(ticks) > 50
    assert execute(pgconn, "SELECT 1 AS one") == [{"one": "1"}]
    pgconn.finish()


def test_errors_of_psycopg_are_translated(database: Database) -> None:
    connection = connect(database.dsn)
    with pytest.raises(SourceError, match="reading: relation") as caught, translated("reading"):
        connection.execute("SELECT * FROM nothing")
    assert caught.value.sqlstate == "42P01"
    database.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'cdc'")
    with pytest.raises(ConnectionLost), translated("reading"):
        connection.execute("SELECT 1")
    with pytest.raises(ConnectionLost), translated("reading"):
        connection.execute("SELECT 1")
    assert isinstance(connection, psycopg.Connection)
    connection.close()
