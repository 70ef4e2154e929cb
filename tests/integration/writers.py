"""Sessions that write at random to tables that come and go, and a synchronous standby that acknowledges late."""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psycopg
from psycopg import sql

from tests.conftest import Database
from tests.mirror import until

__all__ = ["KINDS", "Standby", "Writers", "late_standby", "make_table"]

KINDS = {
    "keyed": "id bigserial PRIMARY KEY, writer int, v int",
    "whole": "id bigserial, writer int, v int",
    "bare": "id bigserial, writer int, v int",
}
"""Columns by the kind of table: with a key; under REPLICA IDENTITY FULL; without any identity, and only added to."""


def make_table(database: Database, kind: str, name: str) -> None:
    """Create a table with some rows; its kind is the head of its name."""
    full = f"ALTER TABLE {name} REPLICA IDENTITY FULL;" if kind == "whole" else ""
    database.execute(
        f"SET synchronous_commit = local; CREATE TABLE {name} ({KINDS[kind]}); {full}"
        f"INSERT INTO {name} (writer, v) SELECT i % 8, i FROM generate_series(1, 200) AS i"
    )


class Writers:
    """Eight sessions: short and long transactions, over one or two tables, with savepoints and rollbacks.

    Each changes and deletes only rows of its own, so that none waits for another. A context manager; at its end all
    transactions have ended.

    Attributes:
        tables: those that are written to; add to it at any time.
        committed: how many transactions were.
    """

    def __init__(self, database: Database, seed: int, options: str = "") -> None:
        self.tables: list[str] = []
        self.committed = 0
        self._database = database
        self._options = options
        self._stopping = threading.Event()
        self._failures: list[BaseException] = []
        self._threads = [
            threading.Thread(target=self._run, args=(number, random.Random(f"{seed} {number}"))) for number in range(8)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End all transactions."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in self._threads), "a writer hangs"
        assert not self._failures, self._failures

    def _run(self, number: int, rng: random.Random) -> None:
        try:
            with psycopg.connect(self._database.dsn, options=self._options) as connection:
                while not self._stopping.wait(rng.uniform(0.002, 0.03)):
                    if self.tables:
                        self._transaction(connection, number, rng)
        except BaseException as error:  # noqa: BLE001  # raised again by the test
            self._failures.append(error)

    def _transaction(self, connection: psycopg.Connection[Any], number: int, rng: random.Random) -> None:
        tables = [rng.choice(self.tables) for _ in range(rng.choice((1, 1, 2)))]
        for _ in range(rng.randint(1, 5)):
            table = rng.choice(tables)
            if rng.random() < 0.7:
                self._change(connection, table, number, rng)
                continue
            connection.execute("SAVEPOINT s")
            self._change(connection, table, number, rng)
            connection.execute(rng.choice((b"ROLLBACK TO SAVEPOINT s", b"RELEASE SAVEPOINT s")))
        if rng.random() < 0.1:
            self._stopping.wait(rng.uniform(0.1, 1.0))
        if rng.random() < 0.1:
            connection.rollback()
            return
        connection.commit()
        self.committed += 1

    @staticmethod
    def _change(connection: psycopg.Connection[Any], table: str, number: int, rng: random.Random) -> None:
        name, row = sql.Identifier(table), rng.randint(0, 30)
        what = "insert" if table.startswith("bare") else rng.choice(("insert", "insert", "update", "delete"))
        if what == "insert":
            connection.execute(sql.SQL("INSERT INTO {} (writer, v) VALUES (%s, %s)").format(name), [number, row])
        elif what == "update":
            statement = sql.SQL("UPDATE {} SET v = v + 1 WHERE writer = %s AND id %% 31 = %s").format(name)
            connection.execute(statement, [number, row])
        else:
            statement = sql.SQL("DELETE FROM {} WHERE writer = %s AND id %% 31 = %s").format(name)
            connection.execute(statement, [number, row])


class Standby:
    """A receiver of WAL that commits wait for; it is paused now and then, for up to a quarter of a second."""

    def __init__(self, process: subprocess.Popen[Any], rng: random.Random) -> None:
        self._process = process
        self._rng = rng
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._thread.join()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Acknowledge nothing."""
        with self._lock:
            self._process.send_signal(signal.SIGSTOP)
            try:
                yield
            finally:
                self._process.send_signal(signal.SIGCONT)

    def _run(self) -> None:
        while not self._stopping.wait(self._rng.uniform(0.01, 0.05)):
            with self.held():
                self._stopping.wait(self._rng.uniform(0.02, 0.25))


@contextlib.contextmanager
def late_standby(database: Database, folder: Path, seed: int) -> Iterator[Standby]:
    """Have every commit of the server wait for a standby that is slow; leave the settings as they were."""
    folder.mkdir()
    process = database.server.popen(
        "pg_receivewal",
        "--synchronous",
        f"--directory={folder}",
        "--dbname=application_name=late",
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    state = "SELECT sync_state FROM pg_stat_replication WHERE application_name = 'late'"
    try:
        until(lambda: database.execute(state), 20, "the standby to come")
        database.server.reload(synchronous_standby_names="late")
        until(lambda: database.execute(state) == [("sync",)], 20, "commits to wait for the standby")
        with Standby(process, random.Random(f"{seed} standby")) as standby:
            yield standby
    finally:
        database.server.reload(synchronous_standby_names="")
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()
        until(lambda: database.execute("SHOW synchronous_standby_names") == [("",)], 20)
        database.server.settings.pop("synchronous_standby_names")
