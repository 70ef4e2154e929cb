"""A steady traffic of small transactions that hold every kind of change, in a thread of its own."""

from __future__ import annotations

import random
import threading
from types import TracebackType
from typing import Any, Self

import psycopg

from tests.conftest import Database

__all__ = ["INVARIANTS", "KEYS", "SCHEMA", "Traffic", "large_transaction"]


SCHEMA = """
CREATE TABLE item (id bigint PRIMARY KEY, n int NOT NULL, body text);
ALTER TABLE item ALTER body SET STORAGE EXTERNAL;
CREATE TABLE event (tick int, note text);
CREATE TABLE bag (v int, w text);
ALTER TABLE bag REPLICA IDENTITY FULL;
CREATE TABLE scratch (id int PRIMARY KEY, v text);
CREATE TABLE account (id int PRIMARY KEY, balance int NOT NULL);
CREATE TABLE wide (id int PRIMARY KEY, v int);
CREATE TABLE filled (id int PRIMARY KEY, v int);
CREATE TABLE still (id int PRIMARY KEY, v text);
INSERT INTO item SELECT i, 0, repeat(chr(64 + i), 3000) FROM generate_series(1, 20) i;
INSERT INTO event SELECT 0, 'first' FROM generate_series(1, 20) i;
INSERT INTO bag SELECT i % 5, 'same' FROM generate_series(1, 20) i;
INSERT INTO scratch SELECT -i, 'first' FROM generate_series(1, 5) i;
INSERT INTO account SELECT i, 0 FROM generate_series(1, 100) i;
INSERT INTO wide SELECT i, i FROM generate_series(1, 20) i;
INSERT INTO filled SELECT i, i FROM generate_series(1, 20) i;
INSERT INTO still SELECT i, 'still' FROM generate_series(1, 100) i;
"""
"""item has values out of line (TOAST), event no key, bag no key but every column; scratch is truncated; account's
balances add up to nothing; wide and filled get columns; still never changes."""

KEYS: dict[str, list[str] | None] = {
    "public.item": ["id"],
    "public.event": [],
    "public.bag": [],
    "public.scratch": ["id"],
    "public.account": ["id"],
    "public.wide": ["id"],
    "public.filled": ["id"],
    "public.still": ["id"],
}
"""Each table's key, as `tests.mirror.differences` takes it."""

INVARIANTS = """
SELECT (SELECT sum(balance) FROM public.account) = 0,
       (SELECT count(*) FROM public.scratch) BETWEEN 1 AND 30,
       (SELECT max(tick) FROM public.event) = (SELECT max(n) FROM public.item)
"""
"""What holds after every transaction of the traffic, and within hardly any."""


def large_transaction(database: Database, count: int = 100) -> None:
    """Change every account twice in one transaction; half-way nothing adds up."""
    statement = f"UPDATE account SET balance = balance + %s WHERE id <= {count}".encode()
    with psycopg.connect(database.dsn) as connection:
        connection.execute(statement, [7])
        connection.execute(statement, [-7])


class Traffic:
    """A context manager: the traffic goes on from its beginning to its end. State: one thread, one connection.

    Attributes:
        transactions: how many are committed.
    """

    def __init__(self, database: Database, seed: int, pause_s: float = 0.05) -> None:
        """Prepare it.

        Args:
            seed: of its random choices.
            pause_s: between two transactions.
        """
        self.transactions = 0
        self._pause_s = pause_s
        self._dsn = database.dsn
        self._random = random.Random(seed)
        self._ended = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="traffic", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join(30)
        assert not self._thread.is_alive()
        if kind is None and self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            with psycopg.connect(self._dsn) as connection:
                ((tick, top),) = connection.execute(
                    "SELECT max(tick), (SELECT max(id) FROM item) FROM event"
                ).fetchall()
                while not self._ended.wait(self._pause_s):
                    tick, top = tick + 1, top + 2
                    self._transaction(connection, tick, top)
                    connection.commit()
                    self.transactions += 1
        except BaseException as error:  # noqa: BLE001 -- raised again by the test's thread
            self._failure = error

    def _transaction(self, connection: psycopg.Connection[Any], tick: int, top: int) -> None:
        run, pick = connection.execute, self._random.randrange
        # The keys move up: three thousand characters come along unchanged, through the old key.
        run("INSERT INTO item VALUES (%s, %s, repeat(%s, 3000))", [top - 1, tick, chr(65 + pick(26))])
        run("UPDATE item SET n = %s WHERE id = (SELECT id FROM item ORDER BY id OFFSET %s LIMIT 1)", [tick, pick(10)])
        if tick % 3 == 0:
            run("UPDATE item SET id = %s WHERE id = (SELECT min(id) FROM item)", [top])
        if tick % 2 == 0:
            run("DELETE FROM item WHERE id = (SELECT id FROM item ORDER BY id OFFSET %s LIMIT 1)", [pick(5)])
        if tick % 7 == 0:
            run("UPDATE item SET body = NULL WHERE id = (SELECT min(id) FROM item)")
        run("INSERT INTO event VALUES (%s, %s)", [tick, f"note {pick(1000)}"])
        run("INSERT INTO bag VALUES (%s, 'same'), (%s, 'same')", [pick(5), pick(5)])
        run("UPDATE bag SET w = %s WHERE ctid = (SELECT min(ctid) FROM bag)", [f"w{pick(3)}"])
        run("DELETE FROM bag WHERE ctid IN (SELECT ctid FROM bag ORDER BY v, w LIMIT 2)")
        if tick % 5 == 0:
            run("TRUNCATE scratch")
        run("INSERT INTO scratch SELECT %s * 5 + i, 'x' FROM generate_series(0, 4) i", [tick])
        amount = pick(1, 100)
        for sign in (1, -1):
            run("UPDATE account SET balance = balance + %s WHERE id = %s", [sign * amount, 1 + pick(100)])
        run("UPDATE wide SET v = v + 1 WHERE id = %s", [1 + pick(10)])
        run("UPDATE filled SET v = v + 1 WHERE id = %s", [1 + pick(10)])
