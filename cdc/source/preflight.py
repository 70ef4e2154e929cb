"""Whether the source is as it must be: before a start (`require`) and for ``cdc check`` (`findings`).

Nothing here changes anything. Each check yields findings in the order in which they would stop a start.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from psycopg import sql

from cdc.errors import SourceError, StateError
from cdc.source import catalog, exclusion, publication, slot, upkeep
from cdc.source.catalog import TableDefinition
from cdc.source.connection import Connection, translated

__all__ = ["MINIMUM_VERSION", "Expected", "Finding", "findings", "notes", "require"]

MINIMUM_VERSION = 15

_SETUP = "run the SQL that `cdc setup` prints as the database's owner"


@dataclasses.dataclass(frozen=True, slots=True)
class Expected:
    """What the consumer will use.

    Attributes:
        slot: CDC_SLOT.
        publication: CDC_PUBLICATION.
        patterns: CDC_TABLES.
        exclude: CDC_EXCLUDE.
    """

    slot: str
    publication: str
    patterns: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it should be: an error stops the consumer, a warning does not."""

    level: Literal["error", "warning"]
    message: str
    hint: str


def findings(connection: Connection, expected: Expected) -> list[Finding]:
    """Return everything that is not as it should be, errors first.

    Raises:
        ConnectionLost, SourceError: the catalog cannot be read.
    """
    found = list(_findings(connection, expected))
    return sorted(found, key=lambda finding: finding.level != "error")


def require(connection: Connection, expected: Expected, *, rights: bool = True) -> None:
    """Return if a consumer can start. What state the slot is in is not looked at here: a fresh start may replace it.

    Args:
        rights: to read each table are needed as well. Tables that are copied already are not read again.

    Raises:
        SourceError: the first reason why it cannot.
        ConnectionLost: the connection broke.
    """
    for finding in _essentials(connection, expected, rights=rights):
        if finding.level == "error":
            raise SourceError(finding.message, finding.hint)


def notes(connection: Connection, expected: Expected) -> list[str]:
    """Return what is good to know: what each publication holds, and whether an absent consumer can fill the disk.

    Raises:
        ConnectionLost, SourceError: the catalog cannot be read.
    """
    if _major(connection) < MINIMUM_VERSION:
        return []
    names = (expected.publication, publication.append_name(expected.publication))
    held: dict[str, list[str]] = {}
    for table in catalog.published(connection, names):
        held.setdefault(table.publication, []).append(str(table))
    found = [f"publication {name} publishes {_some(held[name])}" for name in names if name in held]
    (limit,) = _row(connection, "SELECT current_setting('max_slot_wal_keep_size')")
    if limit == "-1":
        found.append(
            "max_slot_wal_keep_size is not set: the server keeps WAL for an absent consumer until the disk is full; "
            "ALTER SYSTEM SET max_slot_wal_keep_size = '10GB' (or so) bounds it"
        )
    return found


def _some(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 10 else f"{len(names)} tables: {', '.join(names[:10])}, ..."


@dataclasses.dataclass(frozen=True, slots=True)
class _Readable:
    """Columns that we have to be able to read."""

    oid: int
    schema: str
    name: str
    columns: tuple[str, ...]


def _findings(connection: Connection, expected: Expected) -> Iterator[Finding]:
    yield from _essentials(connection, expected, rights=True)
    if _major(connection) >= MINIMUM_VERSION:
        yield from _slot(connection, expected.slot)
        yield from _other_slots(connection, expected.slot)


def _essentials(connection: Connection, expected: Expected, *, rights: bool) -> Iterator[Finding]:
    if _major(connection) < MINIMUM_VERSION:
        # The catalogs that the other checks read are not there.
        yield Finding(
            "error",
            f"PostgreSQL {_major(connection)} is older than {MINIMUM_VERSION}, the oldest that is supported",
            f"upgrade the server to PostgreSQL {MINIMUM_VERSION} or newer",
        )
        return
    yield from _server(connection)
    yield from _room(connection, expected.slot)
    yield from _publications(connection, expected)
    if rights:
        yield from _rights(connection, _readables(connection, expected))


def _major(connection: Connection) -> int:
    return connection.info.server_version // 10000


def _server(connection: Connection) -> Iterator[Finding]:
    row = _row(
        connection,
        """
        SELECT pg_is_in_recovery(), current_setting('wal_level'), r.rolname::text,
               r.rolsuper OR r.rolreplication OR EXISTS (
                   SELECT FROM pg_roles AS rds
                   WHERE rds.rolname = 'rds_replication' AND pg_has_role(rds.oid, 'MEMBER')),
               coalesce(current_setting('idle_replication_slot_timeout', true), '0')
        FROM pg_roles AS r WHERE r.rolname = current_user""",
    )
    standby, wal_level, role, may_replicate, idle_timeout = row
    if standby:
        yield Finding("error", "the server is a standby", "connect to the primary (target_session_attrs=primary)")
    if wal_level != "logical":
        yield Finding(
            "error",
            f"wal_level is {wal_level}, not logical",
            "ALTER SYSTEM SET wal_level = 'logical', then restart the server; managed services: see `cdc setup`",
        )
    if not may_replicate:
        statement = sql.SQL("ALTER ROLE {} REPLICATION").format(sql.Identifier(role)).as_string(connection)
        yield Finding("error", f"role {role} may not replicate", f"{statement}; managed services: see `cdc setup`")
    if idle_timeout not in ("0", "0s"):
        yield Finding(
            "warning",
            f"idle_replication_slot_timeout is {idle_timeout}: a consumer stopped for longer loses its slot",
            "ALTER SYSTEM SET idle_replication_slot_timeout = 0",
        )


def _room(connection: Connection, slot_name: str) -> Iterator[Finding]:
    """Look for free slots and senders: the consumer's own (if it is not there yet), and one for copies."""
    slots, senders, exists, active = _row(
        connection,
        """
        SELECT current_setting('max_replication_slots')::int - (SELECT count(*)::int FROM pg_replication_slots),
               current_setting('max_wal_senders')::int - (SELECT count(*)::int FROM pg_stat_replication),
               coalesce(bool_or(slot_name = %s), false), coalesce(bool_or(slot_name = %s AND active), false)
        FROM pg_replication_slots""",
        [slot_name, slot_name],
    )
    for free, held, noun, setting in (
        (slots, exists, "replication slot", "max_replication_slots"),
        (senders, active, "WAL sender", "max_wal_senders"),
    ):
        left = free + (1 if held else 0)
        if left >= 2:
            continue
        hint = f"raise {setting} and restart the server, or end what nobody needs"
        if left < 1:
            yield Finding("error", f"no {noun} is free", hint)
        else:
            yield Finding("warning", f"no second {noun} is free: tables cannot be copied while streaming", hint)


def _slot(connection: Connection, name: str) -> Iterator[Finding]:
    found = slot.read(connection, name)
    if found is None:
        return
    if why := found.foreign(connection.info.dbname):
        yield Finding("error", f"replication slot {name} {why}", "choose another CDC_SLOT")
    if found.wal_status == "lost" or found.invalidation_reason:
        yield Finding(
            "error",
            f"replication slot {name} has lost WAL that it needs ({found.invalidation_reason or found.wal_status})",
            "`cdc resync --all` makes a new slot and copies every table again",
        )
    elif found.wal_status == "unreserved":
        yield Finding(
            "warning",
            f"replication slot {name} retains more WAL than max_slot_wal_keep_size and may be lost soon",
            "let the consumer catch up, or raise max_slot_wal_keep_size",
        )


def _publications(connection: Connection, expected: Expected) -> Iterator[Finding]:
    ours = publication.is_ours(connection, expected.publication)
    try:
        publication.refuse_astray(connection, expected.publication)
    except StateError as error:
        yield Finding("error", str(error), error.hint)
    if ours is False:
        yield from _foreign(connection, expected.publication)
        return
    yield from _unmatched(connection, expected.patterns)
    planned = upkeep.plan(connection, expected.publication, expected.patterns, expected.exclude)
    creates = planned.statements if ours is None else ()
    if creates and not _row(connection, "SELECT has_database_privilege(current_database(), 'CREATE')")[0]:
        yield Finding("error", f"publication {expected.publication} is missing, and we may not create it", _SETUP)
        return
    yield from _altered(connection, planned)
    # A start needs what is there already; what is missing in it can be added later.
    level: Literal["error", "warning"] = "error" if ours is None else "warning"
    permitted = publication.permitted(connection, expected.publication, planned.changed)
    for table in planned.changed:
        if table in permitted:
            continue
        yield Finding(level, f"table {table} is not ours to publish", f"as its owner: {_script(connection, planned)}")
    for table in planned.lost:
        yield Finding(
            "warning",
            f"table {table} has lost its replica identity: the application's UPDATE and DELETE on it fail",
            f"the consumer moves it to the second publication; by hand: {_script(connection, planned)}",
        )
    for table in catalog.user_tables(connection):
        if publication.matches(table, expected.patterns) and not table.identity_usable:
            yield Finding(
                "warning",
                f"table {table} has no usable replica identity: only its inserts and truncates are followed",
                f"ALTER TABLE {_quoted(connection, table)} ADD PRIMARY KEY (...), or REPLICA IDENTITY FULL",
            )


def _altered(connection: Connection, planned: upkeep.Plan) -> Iterator[Finding]:
    """Look for options that somebody has given to publications of ours."""
    for each in planned.altered:
        (permitted,) = _row(
            connection, "SELECT pg_has_role(pubowner, 'USAGE') FROM pg_publication WHERE pubname = %s", [each]
        )
        yield Finding(
            "warning" if permitted else "error",
            f"publication {each} was altered: it does not publish all that belongs into the stream",
            f"{'the consumer does this' if permitted else 'as its owner'}: {_script(connection, planned)}; "
            "its tables are copied anew",
        )


def _unmatched(connection: Connection, patterns: Sequence[str]) -> Iterator[Finding]:
    tables = catalog.user_tables(connection)
    for pattern in patterns:
        if not any(publication.matches(table, [pattern]) for table in tables):
            yield Finding(
                "warning", f"no table matches {pattern}", "check CDC_TABLES: schema.table, or a pattern of it"
            )


def _foreign(connection: Connection, name: str) -> Iterator[Finding]:
    """Look at a publication that is not ours, and its second, if there is one."""
    listed: dict[int, tuple[str, ...]] = {}
    for table in catalog.published(connection, (name, publication.append_name(name))):
        if listed.setdefault(table.oid, table.columns) != table.columns:
            yield Finding(
                "error",
                f"publications {name} and {publication.append_name(name)} publish different columns of table {table}",
                "the server ends the stream at its first change: give it the same column list in both, or in one alone",
            )
    for each in (name, publication.append_name(name)):
        with translated("read publications"):
            row = connection.execute(
                "SELECT pubinsert, pubupdate, pubdelete, pubtruncate FROM pg_publication WHERE pubname = %s", [each]
            ).fetchone()
        if row is None:
            continue
        absent = [
            word for word, there in zip(("insert", "update", "delete", "truncate"), row, strict=True) if not there
        ]
        if absent and each == name:
            identifier = sql.Identifier(each).as_string(connection)
            yield Finding(
                "warning",
                f"publication {each} does not publish: {', '.join(absent)}",
                f"ALTER PUBLICATION {identifier} SET (publish = 'insert, update, delete, truncate')",
            )
        if row[1] or row[2]:
            yield from _harmful(connection, each)


def _harmful(connection: Connection, name: str) -> Iterator[Finding]:
    """Look for tables whose own UPDATE and DELETE fail because of the publication `name`."""
    oids = [table.oid for table in catalog.published(connection, [name])]
    for table in catalog.definitions(connection, oids).values():
        if not table.identity_usable and not table.leaves_astray:
            yield Finding(
                "warning",
                f"publication {name} publishes updates or deletes of {table}, which has no usable replica identity: "
                "they fail in the application, or cannot be followed",
                f"ALTER TABLE {_quoted(connection, table)} REPLICA IDENTITY FULL (each partition too), "
                "or give it a primary key",
            )


def _readables(connection: Connection, expected: Expected) -> list[_Readable]:
    """Return what is published, and what would be."""
    names = (expected.publication, publication.append_name(expected.publication))
    published = catalog.published(connection, names)
    readables = [_Readable(table.oid, table.schema, table.name, table.columns) for table in published]
    if publication.is_ours(connection, expected.publication) is not False:
        planned = upkeep.plan(connection, expected.publication, expected.patterns, expected.exclude)
        for table in planned.added:
            columns = exclusion.listed(table, planned.excluded) or table.attributes
            readables.append(_Readable(table.oid, table.schema, table.name, tuple(a.name for a in columns)))
    return readables


def _rights(connection: Connection, readables: Sequence[_Readable]) -> Iterator[Finding]:
    """Look at the right to read each table, and at row security, which would hide rows from a copy."""
    user = sql.Identifier(connection.info.user)
    for table in readables:
        usage, select, filtered = _row(
            connection,
            """
            SELECT has_schema_privilege(n.oid, 'USAGE'),
                   has_table_privilege(c.oid, 'SELECT') OR coalesce((
                       SELECT bool_and(has_column_privilege(c.oid, a.attnum, 'SELECT')) FROM pg_attribute AS a
                       WHERE a.attrelid = c.oid AND a.attname = ANY (%s) AND NOT a.attisdropped), false),
                   row_security_active(c.oid)
            FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace WHERE c.oid = %s::text::oid
            UNION ALL SELECT true, true, false LIMIT 1""",
            [list(table.columns), str(table.oid)],
        )
        name = sql.Identifier(table.schema, table.name)
        if not usage:
            grant = sql.SQL("GRANT USAGE ON SCHEMA {} TO {}").format(sql.Identifier(table.schema), user)
            yield Finding("error", f"no right to use schema {table.schema}", grant.as_string(connection))
        elif not select:
            grant = sql.SQL("GRANT SELECT ON {} TO {}").format(name, user)
            yield Finding("error", f"no right to read table {table.schema}.{table.name}", grant.as_string(connection))
        elif filtered:
            bypass = sql.SQL("ALTER ROLE {} BYPASSRLS").format(user).as_string(connection)
            yield Finding("error", f"row security hides rows of table {table.schema}.{table.name} from us", bypass)


def _other_slots(connection: Connection, own: str) -> Iterator[Finding]:
    for other in slot.inactive(connection):
        if other.name != own and other.retained_bytes:
            retained_mb = other.retained_bytes / 1e6
            yield Finding(
                "warning",
                f"replication slot {other.name} is used by nobody and retains {retained_mb:.0f} MB of WAL",
                f"if nobody needs it: SELECT pg_drop_replication_slot('{other.name}')",
            )


def _script(connection: Connection, planned: upkeep.Plan) -> str:
    return "; ".join(statement.as_string(connection) for statement in planned.statements)


def _quoted(connection: Connection, table: TableDefinition) -> str:
    return sql.Identifier(table.schema, table.name).as_string(connection)


def _row(connection: Connection, query: str, parameters: Sequence[Any] = ()) -> tuple[Any, ...]:
    """Return the only row of `query`."""
    with translated("read the state of the server"):
        row = connection.execute(query.encode(), parameters).fetchone()
    if row is None:
        raise SourceError("the server gave no answer about itself", "the role may have been dropped meanwhile")
    return row
