"""Keeps the publications as they should be: what is missing in them, the SQL for it, and their end.

Only those that are ours are ever changed; publication.py tells which these are, and which table belongs into which.

Source: PostgreSQL manual, "CREATE PUBLICATION" and "ALTER PUBLICATION".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import LiteralString

from psycopg import sql

from cdc.errors import ConnectionLost, SourceError, StateError
from cdc.source import catalog, exclusion
from cdc.source.catalog import MARK, TableDefinition
from cdc.source.connection import Connection, translated
from cdc.source.exclusion import Excluded
from cdc.source.publication import Member, Members, append_name, dropped, matches, permitted, read

__all__ = ["Plan", "drop", "ensure", "identifier", "plan", "render"]

LOCK_TIMEOUT_S = 5
"""ALTER PUBLICATION waits so long for a table; the caller tries again."""

_TRIES = 3
_LOCKED = "55P03"
_ALL = "insert, update, delete, truncate"
_APPEND = "insert, truncate"


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What `ensure` does, or would do.

    Attributes:
        names: of the publications to subscribe to.
        added: tables that enter a publication.
        gained: tables that move from the second publication to the first. Their updates and deletes were not in the
            stream until then: they have to be copied again.
        lost: tables that move from the first publication to the second, because their identity is not usable any more.
        relisted: tables that are published with other columns from here on, or without the row filter that somebody
            has put there.
        altered: publications with other options than ours have: somebody has altered them.
        excluded: the columns that are left out.
        statements: SQL, to be run in one transaction; empty if nothing is missing.
        creates: whether a publication is missing.
    """

    names: tuple[str, ...]
    added: tuple[TableDefinition, ...] = ()
    gained: tuple[TableDefinition, ...] = ()
    lost: tuple[TableDefinition, ...] = ()
    relisted: tuple[TableDefinition, ...] = ()
    altered: tuple[str, ...] = ()
    excluded: Excluded = dataclasses.field(default_factory=dict)
    statements: tuple[sql.Composed, ...] = ()
    creates: bool = False

    @property
    def changed(self) -> tuple[TableDefinition, ...]:
        """Tables that enter a publication or move."""
        return (*self.added, *self.gained, *self.lost, *self.relisted)


def plan(connection: Connection, name: str, patterns: Sequence[str], exclude: Sequence[str] = ()) -> Plan:
    """Return what is missing for the tables that match `patterns`; change nothing.

    Args:
        exclude: CDC_EXCLUDE, see exclusion.py.

    Raises:
        SourceError: the second publication exists and is not ours, while the first is to be made by us.
        ConnectionLost, SourceError: the catalog cannot be read.
    """
    patterns = [pattern.strip() for pattern in patterns if pattern.strip()]
    existing = read(connection, (name, append_name(name)))
    first, second = existing.get(name), existing.get(append_name(name))
    if first is not None and not first.ours:
        return Plan((name, append_name(name)) if second else (name,))
    if second is not None and not second.ours:
        raise SourceError(
            f"publication {append_name(name)} exists, and was not made by us",
            f"drop or rename it, or choose another CDC_PUBLICATION than {name}",
        )
    listed = first.members if first else {}
    listed_append = second.members if second else {}
    tables = {table.oid: table for table in catalog.user_tables(connection) if matches(table, patterns)}
    # What was listed once stays, whatever the patterns say now, in the publication that fits it.
    tables |= catalog.definitions(connection, sorted((listed.keys() | listed_append.keys()) - tables.keys()))
    creates = [*([] if first else _create(name, _ALL)), *([] if second else _create(append_name(name), _APPEND))]
    lists = {oid: member.attnums for oid, member in (*listed_append.items(), *listed.items())}
    excluded = exclusion.excluded(tables.values(), exclude, lists)
    planned = _plan(name, creates, (listed, listed_append), list(tables.values()), excluded)
    altered = [
        (each, publish)
        for each, publish in ((name, _ALL), (append_name(name), _APPEND))
        if each in existing and (existing[each].publish, existing[each].via_root) != (publish, True)
    ]
    return dataclasses.replace(
        planned,
        altered=tuple(each for each, _ in altered),
        statements=(*(_options("ALTER PUBLICATION {} SET ({})", *each) for each in altered), *planned.statements),
    )


def _plan(
    name: str,
    creates: list[sql.Composed],
    listed: tuple[Members, Members],
    tables: list[TableDefinition],
    excluded: Excluded,
) -> Plan:
    """Plan for `tables`; `listed`: what the first and the second publication hold now."""
    usable = [table for table in tables if exclusion.fits(table, excluded)]
    unusable = [table for table in tables if not exclusion.fits(table, excluded)]
    first, second = listed
    lost = [table for table in unusable if table.oid in first]
    gained = [table for table in usable if table.oid in second]
    relisted = [
        [t for t in fitting if t.oid in members and members[t.oid] != Member(_attnums(t, excluded))]
        for fitting, members in ((usable, first), (unusable, second))
    ]
    statements = [
        *creates,
        *_alter(name, "DROP", [*lost, *relisted[0]]),
        *_alter(append_name(name), "DROP", [*gained, *relisted[1]]),
        *_alter(append_name(name), "ADD", [t for t in unusable if t.oid not in second] + relisted[1], excluded),
        *_alter(name, "ADD", [t for t in usable if t.oid not in first] + relisted[0], excluded),
    ]
    return Plan(
        names=(name, append_name(name)),
        added=tuple(table for table in tables if table.oid not in first.keys() | second.keys()),
        gained=tuple(gained),
        lost=tuple(lost),
        relisted=tuple(relisted[0] + relisted[1]),
        excluded=excluded,
        statements=tuple(statements),
        creates=bool(creates),
    )


def _attnums(table: TableDefinition, excluded: Excluded) -> frozenset[int] | None:
    columns = exclusion.listed(table, excluded)
    return None if columns is None else frozenset(column.attnum for column in columns)


def ensure(
    connection: Connection, name: str, patterns: Sequence[str], exclude: Sequence[str] = (), *, create: bool = True
) -> tuple[str, ...]:
    """Make the publications publish every table that matches `patterns`; return the names to subscribe to.

    Creates them if they are missing, adds tables, moves a table whose identity has become usable or unusable from one
    to the other, and takes back what somebody has altered: options, row filters, column lists; never drops a table
    otherwise. It takes SHARE UPDATE EXCLUSIVE on the tables in question, which stops no reader and no writer. Doing it
    again changes nothing.

    Publications that are there already are changed table by table, where our rights allow it: what cannot be done for
    one table, now or ever, is done for the others.

    Args:
        connection: in autocommit mode.
        name: CDC_PUBLICATION.
        patterns: CDC_TABLES; empty: every user table.
        exclude: CDC_EXCLUDE.
        create: what is missing may be created. A stream to which it belongs is of no use then.

    Raises:
        StateError: a publication is missing, and is not to be created; or somebody has altered its options, and our
            rights do not allow it to take that back.
        ConnectionLost: the connection broke, or the tables' definitions keep changing.
        SourceError: our rights do not allow it to create them (SQLSTATE 42501), a table is locked (55P03), or see
            `plan`.
    """
    for _ in range(_TRIES):
        planned = plan(connection, name, patterns, exclude)
        if not planned.statements:
            return planned.names
        if planned.creates and not create:
            raise dropped(name)
        change = _apply if planned.creates else _change
        if change(connection, name, planned):
            return planned.names
    raise ConnectionLost(f"publication {name}: the tables' definitions change all the time", "try again in a moment")


def _change(connection: Connection, name: str, planned: Plan) -> bool:
    """Run the plan table by table, as far as our rights allow; whether each was done, or is not ours to do.

    Raises:
        SourceError: a table was locked for too long; the others have been seen to.
    """
    existing = read(connection, planned.names)
    if planned.altered:
        _put_right(connection, name, planned)
    first, second = (existing[each].members if each in existing else {} for each in planned.names)
    done, locked = True, None
    for table in permitted(connection, name, planned.changed):
        try:
            done &= _apply(connection, name, _plan(name, [], (first, second), [table], planned.excluded))
        except SourceError as error:
            if error.sqlstate != _LOCKED:
                raise
            locked = locked or error
    if locked is not None:
        raise locked
    return done


def _put_right(connection: Connection, name: str, planned: Plan) -> None:
    """Take back what somebody has altered in the publications' options.

    Raises:
        StateError: our rights do not allow it.
    """
    statements = planned.statements[: len(planned.altered)]
    try:
        with translated(f"publication {name}"), connection.transaction():
            connection.execute(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT_S}s'".encode())
            for statement in statements:
                connection.execute(statement)
    except SourceError as error:
        if error.sqlstate != "42501":
            raise
        raise StateError(
            f"publication {planned.altered[0]} was altered: it does not publish all that belongs into the stream",
            f"as its owner: {' '.join(render(connection, statements))} Then `cdc run` copies its tables anew",
        ) from None


def _apply(connection: Connection, name: str, planned: Plan) -> bool:
    """Run the plan; whether the tables, now that they are locked, still are what it was made for."""
    with translated(f"publication {name}"), connection.transaction() as transaction:
        connection.execute(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT_S}s'".encode())
        for statement in planned.statements:
            connection.execute(statement)
        now = catalog.definitions(connection, [table.oid for table in planned.changed])
        out = planned.excluded
        same = all(t.oid in now and _standing(now[t.oid], out) == _standing(t, out) for t in planned.changed)
        if not same:
            transaction.force_rollback = True
    return same


def _standing(table: TableDefinition, excluded: Excluded) -> tuple[bool, frozenset[int] | None]:
    """Return what decides where and how `table` is published."""
    return exclusion.fits(table, excluded), _attnums(table, excluded)


def drop(connection: Connection, name: str) -> tuple[str, ...]:
    """Drop those of the publications `name` and its second that are ours; return their names.

    Raises:
        ConnectionLost, SourceError: the server refused.
    """
    existing = read(connection, (name, append_name(name)))
    ours = tuple(publication for publication, found in existing.items() if found.ours)
    statements = [sql.SQL("DROP PUBLICATION IF EXISTS {}").format(sql.Identifier(each)) for each in ours]
    try:
        with translated(f"drop publication {name}"):
            for statement in statements:
                connection.execute(statement)
    except SourceError as error:
        if error.sqlstate == "42501":
            error.hint = f"as its owner: {' '.join(render(connection, statements))}"
        raise
    return ours


def _create(name: str, publish: str) -> list[sql.Composed]:
    mark = sql.SQL("COMMENT ON PUBLICATION {} IS {}").format(sql.Identifier(name), sql.Literal(MARK))
    return [_options("CREATE PUBLICATION {} WITH ({})", name, publish), mark]


def _options(statement: LiteralString, name: str, publish: str) -> sql.Composed:
    options = sql.SQL("publish = {}, publish_via_partition_root = true").format(sql.Literal(publish))
    return sql.SQL(statement).format(sql.Identifier(name), options)


def _alter(
    name: str, action: str, tables: Iterable[TableDefinition], excluded: Excluded | None = None
) -> list[sql.Composed]:
    entries = [_entry(table, excluded or {}) for table in tables]
    if not entries:
        return []
    change = sql.SQL(f"ALTER PUBLICATION {{}} {action} TABLE {{}}")
    return [change.format(sql.Identifier(name), sql.SQL(", ").join(entries))]


def _entry(table: TableDefinition, excluded: Excluded) -> sql.Composed:
    # ONLY: the children of a table (by inheritance) are tables of their own, which may not match.
    only = sql.SQL("ONLY {}").format(identifier(table))
    columns = exclusion.listed(table, excluded)
    if columns is None:
        return only
    return sql.SQL("{} ({})").format(only, sql.SQL(", ").join(sql.Identifier(column.name) for column in columns))


def identifier(table: TableDefinition) -> sql.Identifier:
    """Return a table's name, quoted."""
    return sql.Identifier(table.schema, table.name)


def render(connection: Connection, statements: Iterable[sql.Composed]) -> list[str]:
    """Return statements as text, each with its semicolon."""
    return [statement.as_string(connection) + ";" for statement in statements]
