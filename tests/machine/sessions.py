"""The connections of a run of the machine, and the script that they write down: what it takes to see a failure again.

Whatever cannot be done (it is blocked for longer than an instant, or Postgres refuses it) counts as not done: it is
rolled back to a savepoint, and stands in the script as a comment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import psycopg

__all__ = ["Script", "Session"]

_OPTIONS = "-c lock_timeout=50ms -c statement_timeout=10s -c timezone=UTC -c client_min_messages=error"


class Script:
    """What was done, in order, as SQL; what the consumer did in between as comments."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        """Write down what was done other than by SQL."""
        self.lines.append("-- " + " ".join(text.split()))

    def statement(self, text: str, number: int) -> None:
        """Write down a statement that was done by connection `number`."""
        self.lines.append(f"{' '.join(text.split())};  -- {number}")

    def __str__(self) -> str:
        return "\n".join(self.lines)


class Session:
    """One connection, perhaps with an open transaction; the last of them does nothing outside of one."""

    def __init__(self, number: int, dsn: str, script: Script) -> None:
        self.number = number
        self.savepoints = 0
        self.always = number == 2
        self._script = script
        self._connection = psycopg.connect(dsn, autocommit=True, options=_OPTIONS)

    @property
    def open(self) -> bool:
        """Whether a transaction is open."""
        return self._connection.info.transaction_status != psycopg.pq.TransactionStatus.IDLE

    def close(self) -> None:
        """Close it; what is open is rolled back."""
        self._connection.close()

    def look(self, query: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Return what the catalogs say, as this session's transaction sees them; not a part of the script."""
        return self._connection.execute(query.encode(), parameters).fetchall()

    def begin(self) -> None:
        """Open a transaction, or a savepoint in the one that is open."""
        if not self.open:
            self._do("BEGIN")
        else:
            self.savepoints += 1
            self._do(f"SAVEPOINT s{self.savepoints}")

    def back(self) -> None:
        """Roll back to the last savepoint, if there is one."""
        if self.savepoints:
            self._do(f"ROLLBACK TO s{self.savepoints}")
            self.savepoints -= 1

    def end(self, *, commit: bool) -> None:
        """End the open transaction, if there is one."""
        if self.open:
            self.savepoints = 0
            self._do("COMMIT" if commit else "ROLLBACK")

    def run(self, statements: Sequence[str]) -> bool:
        """Do all of `statements`, in the open transaction or as one of their own, or none; return whether."""
        alone = not self.open
        if alone and self.always:
            self.begin()
            alone = False
        first, last, undo = ("BEGIN", "COMMIT", "ROLLBACK") if alone else ("SAVEPOINT _", "RELEASE _", "ROLLBACK TO _")
        bare = alone and len(statements) == 1  # VACUUM has to be
        done = [first, *statements, last] if alone and not bare else statements
        if not bare:
            self._execute(first)
        try:
            for statement in statements:
                self._execute(statement)
        except psycopg.Error as error:
            self._script.note(f"{self.number}: not done ({str(error).splitlines()[0]}): {'; '.join(statements)}")
            if not bare:
                self._execute(undo)
            return False
        if not bare:
            self._execute(last)
        for statement in done:
            self._script.statement(statement, self.number)
        return True

    def _do(self, statement: str) -> None:
        self._execute(statement)
        self._script.statement(statement, self.number)

    def _execute(self, statement: str) -> None:
        self._connection.execute(statement.encode())
