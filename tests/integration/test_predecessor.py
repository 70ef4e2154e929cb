"""Users of the polling predecessor find what they had: its table, its view, its variables, its way to start afresh."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import duckdb
import pytest
from psycopg.conninfo import conninfo_to_dict

from tests.conftest import Database
from tests.integration.refusals import refused
from tests.program import forked, run

pytestmark = pytest.mark.parametrize("server", [18], indirect=True, ids=["pg18"])

TABLE = """
CREATE TABLE subscriptions (
    id bigint PRIMARY KEY, email text NOT NULL, plan text NOT NULL, lifetime_value numeric(12,2) NOT NULL,
    deleted_at timestamptz, updated_at timestamptz NOT NULL DEFAULT now());
INSERT INTO subscriptions (id, email, plan, lifetime_value, deleted_at)
SELECT i, i || '@example.com', 'pro', i * 1.5, CASE WHEN i % 10 = 0 THEN now() END FROM generate_series(1, 100) AS i;
CREATE TABLE other (id int PRIMARY KEY)"""


def environment(database: Database, folder: Path, **more: str) -> dict[str, str]:
    """Return all of the predecessor's variables, and none of ours."""
    parts = conninfo_to_dict(database.dsn)
    return {
        "PATH": "/usr/bin:/bin",
        "POSTGRES_HOST": str(parts["host"]),
        "POSTGRES_PORT": str(parts["port"]),
        "POSTGRES_DB": str(parts["dbname"]),
        "POSTGRES_USER": str(parts["user"]),
        "POSTGRES_PASSWORD": "any",
        "POSTGRES_SCHEMA": "public",
        "POSTGRES_TABLE": "subscriptions",
        "POSTGRES_PRIMARY_KEY": "id",
        "SYNC_INTERVAL_SECONDS": "1",
        "BATCH_SIZE": "50",
        "DUCKDB_PATH": str(folder / "data" / "analytics.duckdb"),
        "DUCKDB_TABLE": "analytics_subscriptions",
        "PARQUET_DIR": str(folder / "data" / "parquet"),
        "STATE_DIR": str(folder / "state"),
    } | more


def cdc(variables: dict[str, str], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(forked, arguments, env=variables, cwd=folder, timeout_s=100)


def test_all_variables_keep_working(database: Database, tmp_path: Path) -> None:
    """The one table, tombstones included, under its old name; the history; each variable has its effect."""
    database.execute(TABLE)
    variables = environment(database, tmp_path)
    done = cdc(variables, tmp_path, "run", "--once")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("state folder not used") == 1
    database.execute("UPDATE subscriptions SET plan = 'free' WHERE id <= 3; DELETE FROM subscriptions WHERE id = 4")
    assert cdc(variables, tmp_path, "run", "--once").returncode == 0
    with duckdb.connect(variables["DUCKDB_PATH"], read_only=True) as warehouse:
        sums = "count(*), count(*) FILTER (deleted_at IS NULL), sum(lifetime_value), count(*) FILTER (plan = 'free')"
        found = warehouse.execute(f"SELECT {sums} FROM analytics_subscriptions").fetchall()
        tables = warehouse.execute("SELECT table_name FROM duckdb_tables() WHERE schema_name = 'public'").fetchall()
    assert found == database.execute(
        "SELECT count(*), count(*) FILTER (WHERE deleted_at IS NULL), sum(lifetime_value), "
        "count(*) FILTER (WHERE plan = 'free') FROM subscriptions"
    )
    assert tables == [("subscriptions",)], "POSTGRES_TABLE is the only one"
    log = Path(variables["PARQUET_DIR"]) / "public" / "subscriptions" / "*.parquet"
    with duckdb.connect() as connection:
        counted = connection.execute(f"SELECT _op, count(*) FROM '{log}' GROUP BY ALL ORDER BY ALL").fetchall()
    assert counted == [("D", 1), ("S", 100), ("T", 1), ("U", 3)]


def test_the_view_follows_its_table(database: Database, tmp_path: Path) -> None:
    """H1, H3: columns come and go, the table is copied anew, and old queries go on."""
    database.execute(TABLE)
    variables = environment(database, tmp_path)
    assert cdc(variables, tmp_path, "run", "--once").returncode == 0

    def columns() -> list[str]:
        with duckdb.connect(variables["DUCKDB_PATH"], read_only=True) as warehouse:
            return [row[0] for row in warehouse.execute("DESCRIBE analytics_subscriptions").fetchall()]

    def warehouse_views() -> list[str]:
        with duckdb.connect(variables["DUCKDB_PATH"], read_only=True) as warehouse:
            found = warehouse.execute(
                "SELECT view_name FROM duckdb_views() WHERE NOT internal AND schema_name = 'main'"
            )
            return [name for (name,) in found.fetchall()]

    before = columns()
    database.execute(
        "ALTER TABLE subscriptions ADD country text DEFAULT 'at'; INSERT INTO subscriptions VALUES "
        "(101, 'x', 'free', 0, NULL, now(), 'de')"
    )
    assert cdc(variables, tmp_path, "run", "--once").returncode == 0
    assert columns() == [*before, "country"]
    database.execute("ALTER TABLE subscriptions DROP plan; DELETE FROM subscriptions WHERE id = 101")
    assert cdc(variables, tmp_path, "run", "--once").returncode == 0
    assert cdc(variables, tmp_path, "resync", "--all").returncode == 0
    assert cdc(variables, tmp_path, "run", "--once").returncode == 0
    assert columns() == [name for name in [*before, "country"] if name != "plan"]
    assert cdc(variables | {"DUCKDB_TABLE": "other"}, tmp_path, "run", "--once").returncode == 0
    assert warehouse_views() == ["other"], "the earlier one would only mislead"
    assert cdc(variables, tmp_path, "run", "--once").returncode == 0
    with duckdb.connect(variables["DUCKDB_PATH"], read_only=True) as warehouse:
        found = warehouse.execute("SELECT count(*), count(country) FROM Analytics_Subscriptions").fetchall()
    assert found == [(100, 100)]


def test_the_predecessors_own_table_is_renamed_aside(database: Database, tmp_path: Path) -> None:
    """It is kept and reported; a view of ours is not taken for it at the next start."""
    database.execute(TABLE)
    variables = environment(database, tmp_path)
    Path(variables["DUCKDB_PATH"]).parent.mkdir()
    with duckdb.connect(variables["DUCKDB_PATH"]) as theirs:
        theirs.execute("CREATE TABLE analytics_subscriptions AS SELECT 42 AS id")
        theirs.execute("CREATE VIEW analytics_subscriptions_before_cdc AS SELECT 43 AS id")
    done = cdc(variables, tmp_path, "run", "--once")
    assert done.returncode == 0, done.stderr
    assert "renamed aside" in done.stderr
    assert "new_name=analytics_subscriptions_before_cdc2" in done.stderr
    done = cdc(variables, tmp_path, "run", "--once")
    assert "renamed aside" not in done.stderr
    with duckdb.connect(variables["DUCKDB_PATH"], read_only=True) as warehouse:
        assert warehouse.execute("FROM analytics_subscriptions_before_cdc2").fetchall() == [(42,)]
        assert warehouse.execute("FROM analytics_subscriptions_before_cdc").fetchall() == [(43,)]
        assert warehouse.execute("SELECT count(*) FROM analytics_subscriptions").fetchall() == [(100,)]


def test_another_primary_key_is_refused(database: Database, tmp_path: Path) -> None:
    """The replica identity tells the rows of an update or delete, whatever a variable says."""
    database.execute(TABLE)
    done = cdc(environment(database, tmp_path, POSTGRES_PRIMARY_KEY="email"), tmp_path, "run", "--once")
    error, hint = refused(done, 2)
    assert error == "POSTGRES_PRIMARY_KEY is email, but the rows of public.subscriptions are identified by id"
    assert "REPLICA IDENTITY" in hint
    assert database.execute("SELECT count(*) FROM pg_publication") == [(0,)], "nothing is made before"


def test_starting_afresh(database: Database, tmp_path: Path) -> None:
    """The predecessor was reset by deleting its state: the slot is still there, and `run --fresh` takes it over."""
    database.execute(TABLE)
    variables = environment(database, tmp_path)
    assert cdc(variables, tmp_path, "run", "--once").returncode == 0
    shutil.rmtree(Path(variables["DUCKDB_PATH"]).parent)
    error, hint = refused(cdc(variables, tmp_path, "run", "--once"))
    assert "exists, but warehouse" in error
    assert "cdc run --fresh" in hint
    assert cdc(variables, tmp_path, "run", "--once", "--fresh").returncode == 0
    with duckdb.connect(variables["DUCKDB_PATH"], read_only=True) as warehouse:
        assert warehouse.execute("SELECT count(*) FROM analytics_subscriptions").fetchall() == [(100,)]


def test_names_without_a_table_of_that_name(database: Database, tmp_path: Path) -> None:
    """DUCKDB_TABLE alone means the predecessor's table; without it there is no view, and no harm."""
    database.execute("CREATE TABLE other (id int PRIMARY KEY); INSERT INTO other VALUES (1)")
    variables = environment(database, tmp_path)
    for name in ("POSTGRES_TABLE", "POSTGRES_SCHEMA", "POSTGRES_PRIMARY_KEY", "STATE_DIR"):
        del variables[name]
    done = cdc(variables, tmp_path, "run", "--once")
    assert done.returncode == 0, done.stderr
    assert "STATE_DIR" not in done.stderr
    with duckdb.connect(variables["DUCKDB_PATH"], read_only=True) as warehouse:
        assert warehouse.execute("FROM public.other").fetchall() == [(1,)]
        assert (
            warehouse.execute(
                "SELECT view_name FROM duckdb_views() WHERE NOT internal AND schema_name = 'main'"
            ).fetchall()
            == []
        )
