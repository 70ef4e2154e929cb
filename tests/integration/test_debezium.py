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


# Type, value, and what pgoutput-decoder 0.1 is known to make of it, where that is not what Postgres has.
_SAME = object()
OPINIONS = [
    ("bool", "true", 1),
    ("int2", "'-32768'", _SAME),
    ("int4", "7", _SAME),
    ("int8", "9223372036854775807", _SAME),
    ("float4", "1.1", 1.100000023841858),
    ("float8", "1e-310", _SAME),
    ("float8", "'NaN'", None),
    ("numeric(10,2)", "1.50", 1.5),
    ("numeric", "'NaN'", None),
    ("numeric", "12345678901234567890.5", 1.2345678901234567e19),
    ("text", "'é😀\"'", _SAME),
    ("varchar(5)", "'a '", _SAME),
    ("char(4)", "'a'", _SAME),
    ("name", "'n'", _SAME),
    ("bytea", r"'\x00ff'", None),
    ("date", "'infinity'", _SAME),
    ("date", "'0044-03-15 BC'", _SAME),
    ("date", "'2024-02-29'", _SAME),
    ("time", "'24:00'", _SAME),
    ("timetz", "'12:00+02'", _SAME),
    ("timestamp", "'infinity'", _SAME),
    ("interval", "'1 mon 2 days'", _SAME),
    ("uuid", "'00000000-0000-0000-0000-00000000000a'", _SAME),
    ("json", "'{\"a\": 1}'", {"a": 1}),
    ("jsonb", "'{\"b\": [1]}'", {"b": None}),
    ("int[]", "'{1,NULL}'", None),
    ("text[]", "'{a,\"b,c\"}'", None),
    ("inet", "'10.0.0.1'", _SAME),
    ("bit(3)", "B'101'", _SAME),
    ("int4range", "'[1,5)'", _SAME),
    ("point", "'(1,2)'", _SAME),
    ("oid", "4294967295", _SAME),
    ("money", "1.5", _SAME),
    ("tsvector", "'a b'", _SAME),
]


@pg18
@pytest.mark.skipif("real" not in PACKAGES, reason="pgoutput-decoder is not installed")
def test_a_second_opinion(database: Database, lake: Lake) -> None:
    """A1 to A20: another decoder reads the same from the same messages, but for the losses that are listed."""
    columns = ", ".join(f"c{number} {kind}" for number, (kind, _, _) in enumerate(OPINIONS))
    database.execute(f"CREATE TABLE t (id int PRIMARY KEY, {columns})")
    published(database)
    with (
        Tail(lake, database.dsn, "--format", "debezium") as theirs,
        Tail(lake, database.dsn, "--format", "json") as ours,
    ):
        database.execute(f"INSERT INTO t VALUES (1, {', '.join(value for _, value, _ in OPINIONS)})")
        database.execute("INSERT INTO t (id) VALUES (2)")
        theirs.until(2)
        ours.until(2)
        (first, nulls), (mine, my_nulls) = theirs.objects, ours.objects
        found = {kind + value: first["after"][f"c{n}"] for n, (kind, value, _) in enumerate(OPINIONS)}
        expected = {
            kind + value: mine["new"][f"c{n}"] if opinion is _SAME else opinion
            for n, (kind, value, opinion) in enumerate(OPINIONS)
        }
        assert found == expected
        assert nulls["after"] == my_nulls["new"]
        # What is listed as a loss is one.
        assert all(
            repr(opinion) != repr(mine["new"][f"c{n}"])
            for n, (_, _, opinion) in enumerate(OPINIONS)
            if opinion is not _SAME
        )
        theirs.stop()
        ours.stop()
