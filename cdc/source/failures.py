"""What Postgres and libpq say went wrong, as our errors: one line and one hint.

`ConnectionLost` where another try may succeed, `SourceError` where somebody has to put something right first,
`StateError` where the slot no longer fits. No message holds a password.

Source: PostgreSQL manual, "PostgreSQL Error Codes".
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping

import psycopg
from psycopg import pq
from psycopg.pq import abc

from cdc.errors import CdcError, ConnectionLost, SourceError, StateError
from cdc.lsn import format_lsn

__all__ = [
    "connect_error",
    "connection_broke",
    "end_error",
    "publication_error",
    "result_error",
    "source_error",
    "start_error",
    "translated",
]

_RESYNC = "`cdc resync --all` makes a new slot and copies every table again"


@contextlib.contextmanager
def translated(what: str) -> Iterator[None]:
    """Turn what psycopg raises inside into `ConnectionLost` or `SourceError`.

    Args:
        what: the operation and its object, the head of the message.
    """
    try:
        yield
    except psycopg.Error as error:
        text = error.diag.message_primary or _first_line(str(error))
        # An OperationalError without SQLSTATE is libpq's own: the connection broke.
        lost = error.sqlstate is None and isinstance(error, psycopg.OperationalError)
        raise source_error("08006" if lost else error.sqlstate or "", what, text) from error


def source_error(sqlstate: str, what: str, text: str) -> SourceError:
    """Return the error for `sqlstate`.

    Args:
        sqlstate: five characters; '' where unknown.
        what: the operation and its object.
        text: the server's own message, one line.
    """
    message = f"{what}: {text}"
    if sqlstate.startswith("08") or sqlstate in _LOST:
        return ConnectionLost(message, _LOST.get(sqlstate, _HINT_LOST), sqlstate)
    return SourceError(message, _HINTS.get(sqlstate, _HINT_SERVER), sqlstate)


_HINT_LOST = "the server went away or restarts; the consumer tries again and loses nothing"
_HINT_SERVER = "the server's log may say more"
_HINT_PRIVILEGE = "run the SQL that `cdc setup` prints as the database's owner"
_HINT_POOLER = "a connection pooler is in between: use the port of the server itself"

_LOST: Mapping[str, str] = {
    "57P01": _HINT_LOST,
    "57P02": _HINT_LOST,
    "57P03": "the server is starting or stopping; try again in a moment",
    "57P05": _HINT_LOST,
    "53300": "close other connections, or raise max_connections or max_wal_senders",
    "55006": "another consumer uses the slot, or its last connection lingers; see pg_replication_slots.active_pid",
}
_HINTS: Mapping[str, str] = {
    "28P01": "check the password of CDC_DSN (or PGPASSWORD, or ~/.pgpass)",
    "28000": "check pg_hba.conf: both the database and the word `replication` need an entry for this user and host",
    "3D000": "check the name of the database in CDC_DSN",
    "42501": _HINT_PRIVILEGE,
    "53400": "raise max_replication_slots, or drop a slot that nobody uses",
    "55P03": "another session holds a lock on the table: try again when it has ended",
    "57014": "the statement was cancelled; run it again",
    "0A000": "the server is too old, or its wal_level is not logical",
}

# Libpq gives no SQLSTATE for a failed connect: its words have to do. (pattern, another try may succeed, hint)
_CONNECT_FAILURES: tuple[tuple[re.Pattern[str], bool, str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), lost, hint)
    for pattern, lost, hint in (
        (r"unsupported startup parameter|pgbouncer", False, _HINT_POOLER),
        (
            r"could not translate host name|name or service not known|name resolution|failed to resolve|nodename nor",
            True,
            "check the host in CDC_DSN, and that this machine can resolve it",
        ),
        (r"connection refused", True, "is the server running there, and listening on that address and port?"),
        (
            r"timeout expired|timed out|no route to host|unreachable",
            True,
            "check host and port, and the firewalls in between",
        ),
        (
            r"no such file or directory",
            True,
            "no server listens on that Unix socket: start it, or give a host in CDC_DSN",
        ),
        (r"starting up|shutting down|recovery mode|not (yet )?accepting", True, _LOST["57P03"]),
        (r"too many (clients|connections)|slots are reserved|exceeds max_wal_senders", True, _LOST["53300"]),
        (r"password authentication failed|no password supplied|empty password", False, _HINTS["28P01"]),
        (
            r"no pg_hba\.conf entry for replication|rejects replication",
            False,
            "add a line to pg_hba.conf: host replication <user> <address> scram-sha-256, then reload the server",
        ),
        (
            r"pg_hba\.conf",
            False,
            "add a line to pg_hba.conf for this user, database and address, then reload the server",
        ),
        (
            r"authentication failed|authentication method",
            False,
            "check the user and its authentication method in pg_hba.conf",
        ),
        (
            r"must be superuser or replication role|permission denied to start wal sender",
            False,
            "ALTER ROLE <user> REPLICATION (a managed service may call it otherwise), or see `cdc setup`",
        ),
        (r'role ".*" (does not exist|is not permitted)', False, "check the user in CDC_DSN, or create it: `cdc setup`"),
        (r'database ".*" does not exist', False, _HINTS["3D000"]),
        (r"permission denied", False, _HINT_PRIVILEGE),
        (r"ssl|certificate", False, "check sslmode, sslrootcert and sslcert in CDC_DSN against the server"),
        (r"unrecognized configuration parameter|invalid value for", False, "check `options` in CDC_DSN or PGOPTIONS"),
    )
)


def connect_error(text: str) -> SourceError:
    """Return the error for libpq's (or psycopg's) words about a connect that failed."""
    line = _failure_line(text)
    for pattern, lost, hint in _CONNECT_FAILURES:
        if pattern.search(text):
            return ConnectionLost(line, hint) if lost else SourceError(line, hint)
    # Unknown words, perhaps in the server's own language: the caller counts its tries.
    return ConnectionLost(line, _HINT_SERVER)


def _failure_line(text: str) -> str:
    """Return the most telling line of libpq's report, such as ``server 10.0.0.1:5432: password authentication ...``."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    line = next((line for line in reversed(lines) if " failed: " in line or "FATAL" in line), lines[0] if lines else "")
    line = re.sub(r"^(- )?(connection failed: |connection is bad: )+", "", line)
    line = re.sub(r'^connection to server at "([^"]*)"(?: \([^)]*\))?, port (\d+) failed: ', r"server \1:\2: ", line)
    line = re.sub(r'^connection to server on socket "([^"]*)" failed: ', r"server \1: ", line)
    return re.sub(r"(FATAL|ERROR):\s+", "", line) or "cannot connect to the server"


def result_error(result: abc.PGresult, pgconn: abc.PGconn, what: str) -> SourceError:
    """Return the error that `result` reports about the operation `what`."""
    sqlstate = _text(result.error_field(pq.DiagnosticField.SQLSTATE)) or ""
    text = _text(result.error_field(pq.DiagnosticField.MESSAGE_PRIMARY))
    if pgconn.status == pq.ConnStatus.BAD and not sqlstate:
        sqlstate = "08006"
    # Why a slot is of no use stands in the detail alone.
    detail = _text(result.error_field(pq.DiagnosticField.MESSAGE_DETAIL)) if sqlstate == "55000" else None
    text = text or _first_line(pgconn.get_error_message())
    return source_error(sqlstate, what, f"{text} ({detail})" if detail else text)


def connection_broke(what: str, error: psycopg.Error) -> ConnectionLost:
    """Return the error for a connection that libpq found broken during `what`."""
    return ConnectionLost(f"{what}: {_first_line(str(error))}", _HINT_LOST)


def start_error(error: SourceError, slot: str) -> CdcError:
    """Return what `error`, the answer to START_REPLICATION, says about `slot`."""
    if error.sqlstate == "42704":
        return StateError(f"replication slot {slot} is missing: changes may have been lost", _RESYNC)
    if error.sqlstate == "55000" and "wal_level" not in str(error):
        text = str(error).removeprefix("START_REPLICATION: ")
        return StateError(f"replication slot {slot} cannot be used: {text}", _RESYNC)
    return error


def end_error(pgconn: abc.PGconn, lsn: int) -> CdcError:
    """Return why the server ended the stream, after everything before `lsn` had come."""
    result = pgconn.get_result()
    if result is None or result.status != pq.ExecStatus.FATAL_ERROR:
        return ConnectionLost("replication stream: the server shuts down", _HINT_LOST)
    error = result_error(result, pgconn, "replication stream")
    if error.sqlstate == "42704":
        return publication_error(str(error).removeprefix("replication stream: "), lsn)
    if error.sqlstate == "0A000":
        error.hint = "a table must have the same column list in each of the publications that list it"
    if error.sqlstate in ("55000", "58P01"):
        return StateError(str(error), _RESYNC)
    return error


def publication_error(text: str, lsn: int) -> StateError:
    """Return the error for a publication that the server (`text`) does not find in the WAL after `lsn`."""
    return StateError(
        f"the stream lacks a publication after {format_lsn(lsn)}: {text}",
        "it was dropped: once it is there again, `cdc run` makes a new slot and copies every table anew; "
        "where it does not, `cdc run --fresh`",
    )


def _first_line(text: str) -> str:
    return text.strip().split("\n", 1)[0]


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("utf-8", "replace")
