"""What the tests of `cdc tail` share."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import threading
from types import TracebackType
from typing import Any, Self

from tests.conftest import Database, Lake
from tests.integration.refusals import took
from tests.mirror import until
from tests.program import PROGRAM

__all__ = ["CLOCK", "HEAD", "STOP_S", "Tail", "gone", "published", "slots"]

STOP_S = 5.0
"""Longest time that the end may take."""

HEAD = re.compile(r"-- xid \d+, LSN [0-9A-F]+/[0-9A-F]+, \d{4}-\d\d-\d\d [\d:]{8}\.\d{6} UTC")
CLOCK = re.compile(r"\d\d:\d\d:\d\d\.\d{6} ")


class Tail:
    """`cdc tail` in the background. A context manager: it has begun when it is entered, and is gone at its end."""

    def __init__(self, lake: Lake, dsn: str, *arguments: str, begun: bool = True, **settings: str) -> None:
        self._begun = begun
        self.process = subprocess.Popen(
            [*PROGRAM, "tail", *arguments],
            env=lake.environment(dsn, **settings),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=lake.root,
        )
        self.lines: list[str] = []
        self.said: list[str] = []
        self._threads = [
            threading.Thread(target=self._read, args=[self.process.stdout, self.lines]),
            threading.Thread(target=self._read, args=[self.process.stderr, self.said]),
        ]

    @staticmethod
    def _read(source: Any, into: list[str]) -> None:
        into.extend(line.rstrip("\n") for line in source)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        if self._begun:
            self.await_begun()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self.process.kill()
        self.wait()
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()

    def await_begun(self) -> None:
        """Return once its slot is there."""
        until(lambda: any(line.startswith("what commits after") for line in self.said) or self.ended, what="a slot")
        assert not self.ended, self.said

    @property
    def ended(self) -> bool:
        """Whether the process has ended."""
        return self.process.poll() is not None

    @property
    def objects(self) -> list[Any]:
        """What it has printed, as JSON."""
        return [json.loads(line) for line in self.lines]

    def wait(self, timeout_s: float = 30.0) -> int:
        """Return the exit status, with everything read."""
        status = self.process.wait(timeout_s)
        for thread in self._threads:
            thread.join()
        return status

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End it by a signal, as promised."""
        self.process.send_signal(number)
        assert took(self.wait) < STOP_S
        assert self.process.returncode == 0, self.said
        assert not any("error" in line for line in self.said)

    def until(self, n: int) -> list[str]:
        """Return what it has printed once that is `n` lines."""
        until(lambda: len(self.lines) >= n or self.ended, 20, f"{n} lines")
        assert len(self.lines) == n, (self.lines, self.said)
        return self.lines

    def text(self, n: int) -> list[str]:
        """Return `n` changes of the text format, without the time in front of each, and without heads."""
        until(lambda: sum(not HEAD.fullmatch(line) for line in self.lines) >= n or self.ended, 20, f"{n} changes")
        changes = [line for line in self.lines if not HEAD.fullmatch(line)]
        assert all(CLOCK.match(line) for line in changes), changes
        assert len(changes) == n, (changes, self.said)
        return [CLOCK.sub("", line) for line in changes]


def published(database: Database, *tables: str, name: str = "cdc") -> None:
    """Make a publication that is not ours; `tables`: all."""
    database.execute(f"CREATE PUBLICATION {name} FOR {'TABLE ' + ', '.join(tables) if tables else 'ALL TABLES'}")


def slots(database: Database) -> list[str]:
    """Return the names of the database's slots."""
    query = "SELECT slot_name FROM pg_replication_slots WHERE database = current_database() ORDER BY 1"
    return [name for (name,) in database.execute(query)]


def gone(database: Database) -> None:
    """Assert that no temporary slot is left."""
    until(lambda: not [name for name in slots(database) if "tail" in name], 5, "the slot to be gone")
