"""The settings: where they come from, which one wins, and what is refused and how."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from psycopg.conninfo import conninfo_to_dict

from cdc.errors import SettingsError
from cdc.pgoutput.types import column_type
from cdc.settings import load


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty folder to be in, and an environment without settings."""
    for name in list(os.environ):
        if name.startswith(("CDC_", "POSTGRES_", "DUCKDB_")) or name in ("BATCH_SIZE", "SYNC_INTERVAL_SECONDS"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def refused(flags: dict[str, Any] | None = None) -> SettingsError:
    with pytest.raises(SettingsError) as caught:
        load(flags or {})
    assert caught.value.exit_status == 2
    return caught.value


def test_defaults() -> None:
    """Design, Settings: the promised defaults."""
    settings = load({})
    assert (settings.dsn, settings.slot, settings.publication, settings.tables) == ("", "cdc", "cdc", ())
    assert (settings.warehouse, settings.history) == (Path("lake/warehouse.duckdb"), Path("lake/history"))
    assert (settings.flush_interval, settings.flush_rows, settings.flush_bytes) == (1.0, 100_000, 64_000_000)
    assert (settings.memory, settings.threads, settings.tmp) == (512_000_000, os.cpu_count(), None)
    assert settings.deletes == "hard"


def test_flag_environment_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Design, Settings: the flag wins over the environment, and that over the file."""
    Path("cdc.toml").write_text('flush_rows = 1\nslot = "from_file"\nmemory = "100MB"\ntables = ["a.b", "c.*"]\n')
    monkeypatch.setenv("CDC_FLUSH_ROWS", "2")
    monkeypatch.setenv("CDC_SLOT", "from_environment")
    settings = load({"flush_rows": "3"})
    assert (settings.flush_rows, settings.slot, settings.memory) == (3, "from_environment", 100_000_000)
    assert settings.tables == ("a.b", "c.*")


@pytest.mark.parametrize(
    ("text", "size"),
    [("64MB", 64_000_000), ("1gb", 10**9), ("64 MiB", 2**26), ("1.5kB", 1500), ("500", 500), ("1KiB", 1024)],
)
def test_sizes(text: str, size: int) -> None:
    assert load({"flush_bytes": text}).flush_bytes == size


@pytest.mark.parametrize(
    ("text", "seconds"), [("1s", 1), ("200ms", 0.2), ("2min", 120), ("1h", 3600), ("0.5", 0.5), ("3m", 180)]
)
def test_durations(text: str, seconds: float) -> None:
    assert load({"flush_interval": text}).flush_interval == pytest.approx(seconds)


def test_lists_of_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CDC_TABLES", " public.a , s.* ,, ")
    assert load({}).tables == ("public.a", "s.*")
    assert load({"tables": ""}).tables == ()


@pytest.mark.parametrize("source", ["flag", "environment", "file"])
def test_no_history(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Design, Settings: an empty CDC_HISTORY means none, wherever it is set."""
    flags = {}
    if source == "flag":
        flags = {"history": ""}
        monkeypatch.setenv("CDC_HISTORY", "elsewhere")
    elif source == "environment":
        monkeypatch.setenv("CDC_HISTORY", "")
    else:
        Path("cdc.toml").write_text('history = ""\n')
    assert load(flags).history is None


def test_the_predecessor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Design, Settings: the names of the polling predecessor mean the same as they did."""
    for name, value in {
        "POSTGRES_HOST": "db.example.com",
        "POSTGRES_PORT": "5433",
        "POSTGRES_DB": "shop",
        "POSTGRES_USER": "reader",
        "POSTGRES_PASSWORD": "it's a 'secret'",
        "POSTGRES_SCHEMA": "sales",
        "POSTGRES_TABLE": "orders",
        "SYNC_INTERVAL_SECONDS": "30",
        "BATCH_SIZE": "500",
        "DUCKDB_PATH": "old/db.duckdb",
        "PARQUET_DIR": "old/parquet",
    }.items():
        monkeypatch.setenv(name, value)
    settings = load({})
    assert conninfo_to_dict(settings.dsn) == {
        "host": "db.example.com",
        "port": "5433",
        "dbname": "shop",
        "user": "reader",
        "password": "it's a 'secret'",
    }
    assert settings.tables == ("sales.orders",)
    assert (settings.flush_interval, settings.flush_rows) == (30.0, 500)
    assert (settings.warehouse, settings.history) == (Path("old/db.duckdb"), Path("old/parquet"))
    # where both are set, ours wins, and a flag wins over both
    monkeypatch.setenv("CDC_DSN", "postgresql://ours/db")
    monkeypatch.setenv("CDC_FLUSH_ROWS", "7")
    monkeypatch.setenv("CDC_TABLES", "")
    monkeypatch.setenv("CDC_HISTORY", "")
    settings = load({"warehouse": "flag.duckdb"})
    assert (settings.dsn, settings.flush_rows, settings.warehouse) == ("postgresql://ours/db", 7, Path("flag.duckdb"))
    assert (settings.tables, settings.history) == ((), None)


@pytest.mark.parametrize(
    ("given", "tables"),
    [
        ({"POSTGRES_TABLE": "orders"}, ("public.orders",)),
        ({"POSTGRES_SCHEMA": "sales"}, ("sales.*",)),
        ({"POSTGRES_SCHEMA": "", "POSTGRES_TABLE": ""}, ()),
    ],
)
def test_the_predecessors_table(
    given: dict[str, str], tables: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert load({}).tables == tables


def test_unknown_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting that nobody knows is an error that names the one that may have been meant."""
    monkeypatch.setenv("CDC_FLUSH_ROW", "5")
    error = refused()
    assert (str(error), error.hint) == ("unknown setting CDC_FLUSH_ROW", "did you mean CDC_FLUSH_ROWS?")
    monkeypatch.delenv("CDC_FLUSH_ROW")
    monkeypatch.setenv("CDC_XYZZY", "5")
    assert "CDC_WAREHOUSE" in refused().hint
    monkeypatch.delenv("CDC_XYZZY")
    Path("cdc.toml").write_text("flush_row = 5\n")
    error = refused()
    assert (str(error), error.hint) == ("unknown setting flush_row in cdc.toml", "did you mean flush_rows?")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("flush_rows", "0", "CDC_FLUSH_ROWS: "),
        ("flush_rows", "many", "CDC_FLUSH_ROWS: "),
        ("flush_interval", "0", "CDC_FLUSH_INTERVAL: "),
        ("flush_interval", "soon", "CDC_FLUSH_INTERVAL: not a duration such as 1s or 200ms: 'soon'"),
        ("flush_bytes", "12 parsecs", "CDC_FLUSH_BYTES: not a size such as 64MB: '12 parsecs'"),
        ("memory", "1MB", "CDC_MEMORY: "),
        ("memory", "-1GB", "CDC_MEMORY: not a size"),
        ("threads", "0", "CDC_THREADS: "),
        ("deletes", "never", "CDC_DELETES: "),
        ("slot", "Has-Dashes", "CDC_SLOT: "),
        ("slot", "", "CDC_SLOT: "),
        ("publication", "", "CDC_PUBLICATION: "),
        ("publication", "p" * 57, "CDC_PUBLICATION: "),
        ("dsn", "postgresql://[", "CDC_DSN is no connection string: "),
        ("dsn", "nonsense=1", "CDC_DSN is no connection string: "),
    ],
)
def test_bad_values(name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is named as in the environment, with a reason and what it is for; by flag or environment alike."""
    error = refused({name: value})
    assert str(error).startswith(message)
    assert error.hint
    monkeypatch.setenv(f"CDC_{name.upper()}", value)
    assert str(refused()) == str(error)


def test_a_broken_file() -> None:
    Path("cdc.toml").write_text("flush_rows = \n")
    error = refused()
    assert str(error).startswith("cdc.toml cannot be read: ")


def test_crash_points_are_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CDC_CRASH_AT", "before_ack:1")
    assert load({}).slot == "cdc"


def test_the_predecessors_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong is named as it was given; what has no effect is refused."""
    monkeypatch.setenv("SYNC_INTERVAL_SECONDS", "soon")
    assert str(refused()).startswith("SYNC_INTERVAL_SECONDS: not a duration")
    monkeypatch.delenv("SYNC_INTERVAL_SECONDS")
    for table in ("public.orders", "ord*"):
        monkeypatch.setenv("POSTGRES_TABLE", table)
        assert str(refused()) == f"POSTGRES_TABLE must be the name of one table, and is {table}"
    monkeypatch.delenv("POSTGRES_TABLE")
    monkeypatch.setenv("POSTGRES_PRIMARY_KEY", "id")
    assert (load({}).view_of, load({}).view) == ("public.subscriptions", "")
    monkeypatch.delenv("POSTGRES_PRIMARY_KEY")
    assert str(refused({"view": "orders"})) == "CDC_VIEW needs CDC_VIEW_OF"
    assert str(refused({"primary_key": "id"})) == "CDC_PRIMARY_KEY needs CDC_VIEW_OF"


def test_types(monkeypatch: pytest.MonkeyPatch) -> None:
    """By column; the comma of a DECIMAL parts no entries."""
    monkeypatch.setenv("CDC_TYPES", "s.t.a:DOUBLE, s.t.b:decimal(12, 2),s.t.c.d:VARCHAR")
    found = {name: column_type(*basis).duckdb for name, basis in load({}).choices.items()}
    assert found == {"s.t.a": "DOUBLE", "s.t.b": "DECIMAL(12,2)", "s.t.c.d": "VARCHAR"}
    for wrong in (
        "s.t.a",
        "s.t.a:INT",
        "t.a:DOUBLE",
        "s.t.a:DECIMAL(39,2)",
        "s.t.a:DECIMAL(5,6)",
        "s.t.a:DECIMAL(0,0)",
    ):
        assert "not schema.table.column and one of :VARCHAR" in str(refused({"types": wrong})), wrong
    assert str(refused({"types": "s.t.a:DOUBLE,s.t.a:VARCHAR"})) == "CDC_TYPES: s.t.a has more than one type"
    both = "CDC_TYPES: s.t.a is in CDC_EXCLUDE or CDC_MASK as well"
    assert str(refused({"types": "s.t.a:DOUBLE", "mask": "s.t.a:hash"})) == both
    assert str(refused({"types": "s.t.a:DOUBLE", "exclude": "s.t.a"})) == both


def test_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """By column; the key is in no text that is printed."""
    monkeypatch.setenv("CDC_MASK", "s.t.a:hmac, s.t.b:null,s.t.c.d:hash")
    monkeypatch.setenv("CDC_MASK_KEY", "very secret")
    settings = load({})
    assert {name: mask.kind for name, mask in settings.masks.items()} == {
        "s.t.a": "hmac",
        "s.t.b": "null",
        "s.t.c.d": "hash",
    }
    assert "very secret" not in f"{settings!r} {settings.masks!r}"
