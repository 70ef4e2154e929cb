"""`cdc tail --format debezium`: with the package pgoutput-decoder where it is installed, and with one like it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from cdc import debezium
from tests.conftest import Database, Lake
from tests.integration.refusals import call, refused, rows
from tests.integration.tailing import Tail, gone, published
from tests.mirror import until

pg18 = pytest.mark.parametrize("server", [18], indirect=True, ids=["pg18"])

FAKE = Path(__file__).with_name("fakes")
PACKAGES = ["fake", *(["real"] if importlib.util.find_spec(debezium.PACKAGE) else [])]


@pytest.fixture(params=PACKAGES)
def _package(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the packages, for processes that are started from now on."""
    if request.param == "fake":
        monkeypatch.setenv("PYTHONPATH", str(FAKE))


@pg18
@pytest.mark.usefixtures("_package")
def test_envelopes(database: Database, lake: Lake) -> None:
    """One envelope per change to the tables that are wanted; TRUNCATE has none."""
    database.execute("CREATE TABLE t (id int PRIMARY KEY, v text, n numeric(5,2)); CREATE TABLE u (id int PRIMARY KEY)")
    published(database)
    with Tail(lake, database.dsn, "public.t", "--format", "debezium") as tail:
        database.execute(
            "INSERT INTO t VALUES (1, 'a', 1.5); INSERT INTO u VALUES (1); UPDATE t SET v = 'b'; UPDATE t SET id = 2;"
            "TRUNCATE u; DELETE FROM t; TRUNCATE t"
        )
        database.execute("ALTER TABLE t ADD w int; INSERT INTO t VALUES (3, NULL, NULL, 4)")
        tail.until(5)
        for each in tail.objects:
            assert (each["source"]["schema"], each["source"]["table"]) == ("public", "t")
            assert each["source"]["db"] == database.name
        assert [(each["op"], each["before"], each["after"]) for each in tail.objects] == [
            ("c", None, {"id": 1, "v": "a", "n": 1.5}),
            ("u", None, {"id": 1, "v": "b", "n": 1.5}),
            ("u", {"id": 1, "v": None, "n": None}, {"id": 2, "v": "b", "n": 1.5}),
            ("d", {"id": 2, "v": None, "n": None}, None),
            ("c", None, {"id": 3, "v": None, "n": None, "w": 4}),
        ]
        tail.stop()
    gone(database)


@pg18
@pytest.mark.usefixtures("_package")
def test_many(database: Database, lake: Lake) -> None:
    """More than fits into any of the pipes, and then the limit within a transaction."""
    rows(database, 0)
    published(database)
    with Tail(lake, database.dsn, "--format", "debezium", "--limit", "5003") as tail:
        database.execute("INSERT INTO t SELECT i, repeat('x', 100) FROM generate_series(1, 5000) AS i")
        database.execute("INSERT INTO t SELECT i, 'y' FROM generate_series(5001, 5010) AS i")
        assert tail.wait() == 0, tail.said
        assert [each["after"]["id"] for each in tail.objects] == list(range(1, 5004))
    gone(database)


@pg18
def test_failure(database: Database, lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that fails is an error, with its own last words."""
    monkeypatch.setenv("PYTHONPATH", str(FAKE))
    monkeypatch.setenv("FAKE_FAILS", "1")
    rows(database, 1)
    published(database)
    with Tail(lake, database.dsn, "--format", "debezium") as tail:
        rows(database, 2)
        assert tail.wait() == 1
        error, hint = tail.said[-2:]
        assert error == "error: pgoutput-decoder failed: RuntimeError: no such luck"
        assert "--format json" in hint
    gone(database)


@pg18
def test_its_process_does_not_outlive_ours(
    database: Database, lake: Lake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Not even where ours is killed."""
    monkeypatch.setenv("PYTHONPATH", str(FAKE))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    rows(database, 1)
    published(database)

    def alive() -> bool:
        return any(str(tmp_path).encode() in command for command in commands())

    with Tail(lake, database.dsn, "--format", "debezium") as tail:
        assert alive()
        tail.process.kill()
        until(lambda: not alive(), 5, "its process to end")
    gone(database)


def commands() -> list[bytes]:
    """Return the command lines of the processes that run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes())
        except OSError:
            continue
    return found


@pg18
def test_package_is_missing(database: Database, lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line of error, and how to install it."""
    published(database)
    monkeypatch.setattr(debezium, "PACKAGE", "pgoutput_decoder_that_is_not_there")
    error, hint = refused(call(lake, database.dsn, "tail", "--format", "debezium"))
    assert "pgoutput-decoder" in error
    assert hint.startswith("pip install 'pg-duckdb-cdc[debezium]'")
    gone(database)
