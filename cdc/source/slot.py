"""Replication slots: what the server says about them, their making and their end.

Source: PostgreSQL manual, "pg_replication_slots" and "Streaming Replication Protocol".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from psycopg import sql
from psycopg.pq import abc
from psycopg.rows import dict_row

from cdc.errors import SourceError
from cdc.lsn import parse_lsn
from cdc.source.connection import Connection, execute, translated

__all__ = [
    "Blocker",
    "Slot",
    "System",
    "blockers",
    "create",
    "create_temporary",
    "drop",
    "drop_on",
    "identify",
    "inactive",
    "read",
]


@dataclasses.dataclass(frozen=True, slots=True)
class System:
    """What IDENTIFY_SYSTEM tells; `lsn` is the server's flush position."""

    system_identifier: str
    timeline: int
    lsn: int
    dbname: str


@dataclasses.dataclass(frozen=True, slots=True)
class Slot:
    """One row of pg_replication_slots.

    Attributes:
        plugin: None for a physical slot, as is `database`.
        restart_lsn: oldest WAL that it retains; None once that is lost, or before it reserves any.
        confirmed_flush_lsn: everything before it was confirmed.
        wal_status: reserved, extended, unreserved or lost.
        safe_wal_size: bytes that can be written before it is in danger; None: no limit is set.
        invalidation_reason: why it is of no use any more; None: it is, or the server (before 17) does not say.
        retained_bytes: from restart_lsn to the end of the WAL.
    """

    name: str
    plugin: str | None
    database: str | None
    active: bool
    active_pid: int | None
    temporary: bool
    restart_lsn: int | None
    confirmed_flush_lsn: int | None
    wal_status: str | None
    safe_wal_size: int | None
    invalidation_reason: str | None
    retained_bytes: int | None

    def foreign(self, dbname: str) -> str:
        """Return why it cannot be a slot of ours for database `dbname`, to be put behind its name; '' if it can."""
        if self.plugin is None:
            return "is a physical one"
        if self.plugin != "pgoutput":
            return f"has the plugin {self.plugin}, not pgoutput"
        return "" if self.database == dbname else f"belongs to database {self.database}"


@dataclasses.dataclass(frozen=True, slots=True)
class Blocker:
    """A transaction that the creation of a slot waits for.

    Attributes:
        pid: of its session; None for a prepared transaction.
        age_s: seconds since it began (or was prepared).
        description: user, database and state, or the prepared transaction's name; never the statement.
    """

    pid: int | None
    age_s: float
    description: str


_SLOTS = sql.SQL("""
    SELECT slot_name::text AS name, plugin::text, database::text, active, active_pid, temporary,
           (restart_lsn - '0/0')::bigint AS restart_lsn, (confirmed_flush_lsn - '0/0')::bigint AS confirmed_flush_lsn,
           wal_status, safe_wal_size, {reason} AS invalidation_reason,
           (CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END
            - restart_lsn)::bigint AS retained_bytes
    FROM pg_replication_slots
    WHERE {condition}
    ORDER BY slot_name""")

# Slots wait for every transaction with an xid in the whole server; backend_xid is seen of other users' sessions by
# members of pg_read_all_stats alone, the pid and the age of the transaction's lock by everybody.
_BLOCKERS = """
    WITH holders AS (
        SELECT DISTINCT pid, virtualtransaction
        FROM pg_locks
        WHERE locktype = 'transactionid' AND mode = 'ExclusiveLock' AND granted
    )
    SELECT holders.pid, coalesce(extract(epoch FROM clock_timestamp() - activity.xact_start), 0)::float8,
           format('user %s, database %s, %s', coalesce(activity.usename, '?'), coalesce(activity.datname, '?'),
                  coalesce(activity.state, 'state unknown'))
    FROM holders LEFT JOIN pg_stat_activity AS activity USING (pid)
    WHERE holders.pid IS NOT NULL AND holders.pid <> pg_backend_pid()
    UNION ALL
    SELECT NULL, extract(epoch FROM clock_timestamp() - prepared)::float8,
           format('prepared transaction %L, user %s, database %s', gid, owner, database)
    FROM pg_prepared_xacts
    ORDER BY 2 DESC"""


def read(connection: Connection, name: str) -> Slot | None:
    """Return the slot `name`, or None if there is none.

    Raises:
        ConnectionLost, SourceError: the catalog cannot be read.
    """
    slots = _slots(connection, sql.SQL("slot_name = {}").format(name))
    return slots[0] if slots else None


def inactive(connection: Connection) -> list[Slot]:
    """Return the slots that nobody uses at the moment; each retains WAL.

    Raises:
        ConnectionLost, SourceError: the catalog cannot be read.
    """
    return _slots(connection, sql.SQL("NOT active"))


def identify(pgconn: abc.PGconn) -> System:
    """Return which server and database `pgconn` is connected to.

    Raises:
        ConnectionLost, SourceError: the command failed.
    """
    row = execute(pgconn, "IDENTIFY_SYSTEM")[0]
    return System(
        system_identifier=row["systemid"] or "",
        timeline=int(row["timeline"] or 0),
        lsn=parse_lsn(row["xlogpos"] or "0/0"),
        dbname=row["dbname"] or "",
    )


def create(
    pgconn: abc.PGconn, name: str, waiting: Callable[[float], None] | None = None, *, temporary: bool = False
) -> int:
    """Create a slot and return its consistent point.

    It waits for every transaction that writes, in every database of the server.

    Args:
        pgconn: a replication session.
        name: of the slot.
        waiting: called about once a second with the seconds waited; if it raises, the creation is cancelled.
        temporary: it lives as long as `pgconn`, which alone can use it.

    Raises:
        ConnectionLost, SourceError: the server refused, for example because the name is taken (SQLSTATE 42710) or all
            slots are (53400).
    """
    kind = "TEMPORARY LOGICAL" if temporary else "LOGICAL"
    row = execute(pgconn, f"CREATE_REPLICATION_SLOT {_quoted(name)} {kind} pgoutput (SNAPSHOT 'nothing')", waiting)[0]
    return parse_lsn(row["consistent_point"] or "")


def create_temporary(pgconn: abc.PGconn, name: str, waiting: Callable[[float], None] | None = None) -> tuple[int, str]:
    """Create a slot that lives as long as `pgconn`; return its consistent point and an exported snapshot's name.

    Transactions with a commit LSN below that point are in the snapshot, all others are not. The snapshot can be
    imported until the next command on `pgconn`, or its end.

    Args and Raises: as `create`.
    """
    command = f"CREATE_REPLICATION_SLOT {_quoted(name)} TEMPORARY LOGICAL pgoutput (SNAPSHOT 'export')"
    row = execute(pgconn, command, waiting)[0]
    return parse_lsn(row["consistent_point"] or ""), row["snapshot_name"] or ""


def drop(connection: Connection, name: str) -> bool:
    """Drop the slot `name`; whether it was there.

    Raises:
        ConnectionLost: it is in use.
        SourceError: our rights do not allow it.
    """
    try:
        with translated(f"drop replication slot {name}"):
            connection.execute("SELECT pg_drop_replication_slot(%s)", [name])
    except SourceError as error:
        if error.sqlstate == "42704":
            return False
        raise
    return True


def drop_on(pgconn: abc.PGconn, name: str) -> None:
    """Drop a slot from a replication session, such as the one that made a temporary slot; ends its snapshot's import.

    Raises:
        ConnectionLost, SourceError: the server refused.
    """
    execute(pgconn, f"DROP_REPLICATION_SLOT {_quoted(name)}")


def blockers(connection: Connection) -> list[Blocker]:
    """Return the transactions that a slot creation begun now waits for, the oldest first.

    Raises:
        ConnectionLost, SourceError: the catalog cannot be read.
    """
    with translated("read running transactions"):
        rows = connection.execute(_BLOCKERS).fetchall()
    return [Blocker(pid=pid, age_s=age, description=text) for pid, age, text in rows]


def _slots(connection: Connection, condition: sql.Composable) -> list[Slot]:
    # The column came with PostgreSQL 17; in 16 a conflict with a standby was a boolean.
    has_reason = connection.info.server_version >= 170000
    reason = sql.SQL("invalidation_reason" if has_reason else "NULL::text")
    with translated("read replication slots"), connection.cursor(row_factory=dict_row) as cursor:
        cursor.execute(_SLOTS.format(reason=reason, condition=condition))
        return [Slot(**row) for row in cursor]


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
