"""Connections to the source: for catalog queries (psycopg) and for replication (libpq itself).

Text output of Postgres follows the session's settings, which a role, a database, the environment or a conninfo may
change. So each session pins what it needs (`PINNED`), as startup options, which win over ALTER ROLE and ALTER DATABASE
SET, and once more by SET, since libpq sends PGTZ and PGDATESTYLE as parameters that win over the options.

Source: PostgreSQL manual, "Database Connection Control Functions" and "Streaming Replication Protocol".
"""

from __future__ import annotations

import os
import re
import selectors
import time
from collections.abc import Callable, Mapping

import psycopg
from psycopg import conninfo, pq
from psycopg.pq import abc
from psycopg.rows import TupleRow

from cdc.errors import ConnectionLost, SettingsError, SourceError
from cdc.source.failures import connect_error, connection_broke, result_error, source_error, translated

__all__ = [
    "PINNED",
    "Connection",
    "connect",
    "connect_replication",
    "execute",
    "read_dsn",
    "result_error",
    "run_command",
    "source_error",
    "translated",
]

Connection = psycopg.Connection[TupleRow]

PINNED: Mapping[str, str] = {
    "datestyle": "ISO",
    "intervalstyle": "postgres",
    "extra_float_digits": "3",
    "bytea_output": "hex",
    "timezone": "UTC",
    "client_encoding": "UTF8",
    "lc_monetary": "C",
    "search_path": "pg_catalog",
    "quote_all_identifiers": "off",
    "row_security": "off",
    "statement_timeout": "0",
    "lock_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "idle_session_timeout": "0",
    "default_transaction_read_only": "off",
    "default_transaction_isolation": "read committed",
}
"""Settings of every session of ours. `transaction_timeout` (0) joins them after connecting, where it exists."""

_DEFAULTS: Mapping[str, str] = {
    "application_name": "cdc",
    "connect_timeout": "10",
    "keepalives": "1",
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
}
_TRANSACTION_TIMEOUT_SINCE = 170000
_INTEGER = re.compile(r"[+-]?\d+", re.ASCII)
_HINT_DSN = (
    "write it as postgresql://user:password@host:5432/database (special characters in the password as %40 and so on), "
    "or as host=... dbname=... user=..."
)


def connect(dsn: str) -> Connection:
    """Return a session in autocommit mode for catalog queries and COPY.

    Args:
        dsn: URL or conninfo; '' takes everything from libpq's own environment.

    Raises:
        SettingsError: `dsn` cannot be read.
        ConnectionLost: the server cannot be reached, or is not ready: worth another try.
        SourceError: the server refuses us.
    """
    parameters = _parameters(dsn)
    try:
        connection = psycopg.connect(conninfo.make_conninfo("", **parameters), autocommit=True, prepare_threshold=None)
    except psycopg.Error as error:
        raise connect_error(str(error)) from None
    try:
        with translated("settings of the session"):
            connection.execute(_pinning_sql(connection.info.server_version))
    except BaseException:
        connection.close()
        raise
    return connection


def connect_replication(dsn: str) -> abc.PGconn:
    """Return a walsender session bound to one database; it understands SQL and replication commands.

    The text of a SQL_ASCII database comes as it is stored: the server would otherwise stop the stream at the first
    value that is not UTF-8.

    Raises:
        As `connect`.
    """
    parameters = _parameters(dsn) | {"replication": "database"}
    failure = SourceError("no host to connect to")
    for attempt in _attempts(parameters):
        try:
            pgconn = _open(attempt)
        except SourceError as error:
            failure = error
            continue
        try:
            execute(pgconn, _pinning_sql(pgconn.server_version))
            if pgconn.parameter_status(b"server_encoding") == b"SQL_ASCII":
                execute(pgconn, "SET client_encoding = 'SQL_ASCII'")
        except BaseException:
            pgconn.finish()
            raise
        return pgconn
    raise failure


def execute(
    pgconn: abc.PGconn, command: str, waiting: Callable[[float], None] | None = None
) -> list[dict[str, str | None]]:
    """Run one simple query on a replication session and return its rows by column name, as text.

    Args:
        pgconn: the session.
        command: one statement.
        waiting: called about once a second with the seconds passed while the server works; if it raises, the command
            is cancelled and the exception goes on.

    Raises:
        ConnectionLost: the connection broke.
        SourceError: the server reported an error.
    """
    result = run_command(pgconn, command, waiting)
    if result.status not in (pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COMMAND_OK):
        raise result_error(result, pgconn, command.split(" ", 1)[0])
    names = [(result.fname(i) or b"").decode() for i in range(result.nfields)]
    return [{name: _text(result.get_value(row, i)) for i, name in enumerate(names)} for row in range(result.ntuples)]


def run_command(pgconn: abc.PGconn, command: str, waiting: Callable[[float], None] | None = None) -> abc.PGresult:
    """Run `command` and return its last result; other threads run meanwhile.

    Raises:
        ConnectionLost: the connection broke.
        SourceError: the server reported an error.
    """
    what = command.split(" ", 1)[0]
    started = time.monotonic()
    try:
        pgconn.send_query(command.encode())
        while pgconn.flush():
            _ready(pgconn.socket, True, 1.0)
        last: abc.PGresult | None = None
        # To the end, also after an error: only then does the session take another command.
        while True:
            _wait_result(pgconn, started, waiting)
            result = pgconn.get_result()
            if result is None:
                break
            if last is None or last.status != pq.ExecStatus.FATAL_ERROR:
                last = result
            if result.status == pq.ExecStatus.COPY_BOTH:
                break
    except psycopg.Error as error:
        raise connection_broke(what, error) from None
    if last is not None and last.status == pq.ExecStatus.FATAL_ERROR:
        raise result_error(last, pgconn, what)
    if last is None:
        raise ConnectionLost(f"{what}: the server closed the connection", "the server went away or restarts; try again")
    return last


def read_dsn(dsn: str) -> dict[str, str]:
    """Return libpq's parameters as `dsn` gives them; nobody is asked whether they lead anywhere.

    Raises:
        SettingsError: `dsn` is no URL and no conninfo, or has a number where none is; the message holds no password.
    """
    try:
        given = {key: str(value) for key, value in conninfo.conninfo_to_dict(dsn).items() if value is not None}
    except psycopg.Error as error:
        # Libpq repeats what it could not read, which may be the password.
        secret = "password" in dsn.lower() or "@" in dsn
        raise SettingsError(
            "CDC_DSN is no connection string" + ("" if secret else f": {str(error).strip().splitlines()[0]}"),
            _HINT_DSN,
        ) from None
    # Not repeated either: behind a forgotten user name the password stands in the port's place.
    for port in given.get("port", "").split(","):
        if port.strip() and not (_INTEGER.fullmatch(port.strip()) and 1 <= int(port) <= 65535):
            raise SettingsError("CDC_DSN is no connection string: its port is no number from 1 to 65535", _HINT_DSN)
    if "connect_timeout" in given and not _INTEGER.fullmatch(given["connect_timeout"].strip()):
        raise SettingsError("CDC_DSN is no connection string: connect_timeout is no number of seconds", _HINT_DSN)
    return given


def _parameters(dsn: str) -> dict[str, str]:
    """Return libpq's parameters for `dsn` with our own added; those that the user gives win, but not over the pins."""
    given = read_dsn(dsn)
    options = given.pop("options", None) or os.environ.get("PGOPTIONS", "")
    pins = " ".join(f"-c {name}={_escaped(value)}" for name, value in PINNED.items())
    defaults = {name: value for name, value in _DEFAULTS.items() if name not in given}
    return given | defaults | {"options": f"{options} {pins}".strip(), "client_encoding": "UTF8"}


def _escaped(value: str) -> str:
    """Escape `value` for the server's splitting of ``options``."""
    return value.replace("\\", "\\\\").replace(" ", "\\ ")


def _pinning_sql(server_version: int) -> str:
    """Return the SETs that options cannot do: newer settings, and those that PGTZ and PGDATESTYLE override."""
    sets = [f"SET {name} = '{PINNED[name]}'" for name in ("datestyle", "timezone")]
    if server_version >= _TRANSACTION_TIMEOUT_SINCE:
        sets.append("SET transaction_timeout = 0")
    return "; ".join(sets)


def _attempts(parameters: dict[str, str]) -> list[dict[str, str]]:
    """Return one set of parameters per host: only so can each have its own time-out."""
    lists = {
        name: value.split(",")
        for name in ("host", "hostaddr", "port")
        if (value := parameters.get(name) or os.environ.get(f"PG{name.upper()}"))
    }
    count = max((len(values) for name, values in lists.items() if name != "port"), default=1)
    if count == 1:
        return [parameters]
    return [
        parameters | {name: values[i] if len(values) > 1 else values[0] for name, values in lists.items()}
        for i in range(count)
    ]


def _open(parameters: dict[str, str]) -> abc.PGconn:
    """Connect to one host; unlike PQconnectdb this lets signals and other threads in.

    Raises:
        ConnectionLost, SourceError: see `connect`.
    """
    deadline = time.monotonic() + _connect_timeout(parameters)
    pgconn = pq.PGconn.connect_start(conninfo.make_conninfo("", **parameters).encode())
    try:
        _poll(pgconn, deadline, f"server {parameters.get('host', '')}: timeout expired")
    except BaseException:
        pgconn.finish()
        raise
    return pgconn


def _poll(pgconn: abc.PGconn, deadline: float, late: str) -> None:
    """Take a connection that was started to its end.

    Raises:
        ConnectionLost, SourceError: it failed, or the deadline (of the monotonic clock) passed: message `late`.
    """
    status = pq.PollingStatus.WRITING
    while pgconn.status != pq.ConnStatus.BAD and status != pq.PollingStatus.FAILED:
        left = deadline - time.monotonic()
        if left <= 0:
            raise connect_error(late)
        _ready(pgconn.socket, status == pq.PollingStatus.WRITING, min(left, 1.0))
        status = pq.PollingStatus(pgconn.connect_poll())
        if status == pq.PollingStatus.OK:
            return
    raise connect_error(pgconn.get_error_message())


def _ready(socket: int, writing: bool, timeout_s: float) -> bool:
    """Wait until `socket` can be read (or written); whether it can. No select(): it fails past 1024 files."""
    with selectors.DefaultSelector() as selector:
        selector.register(socket, selectors.EVENT_WRITE if writing else selectors.EVENT_READ)
        return bool(selector.select(timeout_s))


def _connect_timeout(parameters: dict[str, str]) -> float:
    """Return connect_timeout in seconds; 0 and less mean none, as for libpq."""
    seconds = int(parameters["connect_timeout"])
    return seconds if seconds > 0 else float("inf")


def _wait_result(pgconn: abc.PGconn, started: float, waiting: Callable[[float], None] | None) -> None:
    """Return when a result can be had without blocking."""
    while pgconn.is_busy():
        if _ready(pgconn.socket, False, 1.0):
            pgconn.consume_input()
        elif waiting is not None:
            try:
                waiting(time.monotonic() - started)
            except BaseException:
                _cancel(pgconn)
                raise


def _cancel(pgconn: abc.PGconn) -> None:
    """Cancel the running command and read its results to the end."""
    pgconn.get_cancel().cancel()
    while pgconn.get_result() is not None:
        pass


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("utf-8", "replace")
