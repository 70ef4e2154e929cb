"""Fences: messages of ours in the stream, which tell that everything committed before them has come.

A fence is a transactional message, so it takes its place in commit order. `pg_current_wal_lsn()` would not do: it can
lie before the commit record of a row that is already visible.

Source: PostgreSQL manual, "pg_logical_emit_message".
"""

from __future__ import annotations

import secrets

from cdc.source.assembly import FENCE_PREFIX
from cdc.source.connection import Connection, translated

__all__ = ["emit"]


def emit(connection: Connection) -> bytes:
    """Commit a fence and return its content, a random token.

    Raises:
        ConnectionLost, SourceError: it could not be written.
    """
    token = secrets.token_hex(16)
    with translated("fence"), connection.transaction():
        # A standby that is awaited and never answers must not hold us up; the stream sees the commit all the same.
        connection.execute("SET LOCAL synchronous_commit = local")
        connection.execute("SELECT pg_logical_emit_message(true, %s, %s)", [FENCE_PREFIX.decode(), token])
    return token.encode()
