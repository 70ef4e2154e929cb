"""The publications that the consumer subscribes to: which there are, what they list, and what is refused of them.

Two of them, both listing tables by name and never FOR ALL TABLES: `name` publishes everything, `name`_append inserts
and truncates only. A table whose updates and deletes cannot be published (see `TableDefinition.identity_usable`)
belongs into the second: in the first the application's own UPDATE and DELETE would fail.

A publication is ours if its comment says so (`MARK`). One that is not is used as it is and never changed; ours are kept
as they should be by upkeep.py.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping, Sequence

from cdc.errors import StateError
from cdc.source import catalog, exclusion
from cdc.source.catalog import MARK, TableDefinition
from cdc.source.connection import Connection, translated

__all__ = [
    "Member",
    "Members",
    "Publication",
    "append_name",
    "coming",
    "dropped",
    "is_ours",
    "matches",
    "permitted",
    "read",
    "refuse_astray",
    "refuse_columns",
]


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
    """How a publication lists a table: attnums of the columns (None: all), and whether it has a row filter."""

    attnums: frozenset[int] | None
    filtered: bool = False


Members = Mapping[int, Member]
"""The tables that a publication lists, by OID."""


@dataclasses.dataclass(frozen=True, slots=True)
class Publication:
    """One that exists.

    Attributes:
        ours: its comment says so.
        publish: its option of that name.
        via_root: its option publish_via_partition_root.
    """

    ours: bool
    publish: str
    via_root: bool
    members: Members


def append_name(name: str) -> str:
    """Return the name of the second publication."""
    return f"{name}_append"


def matches(table: TableDefinition, patterns: Sequence[str]) -> bool:
    """Whether `table` is meant by `patterns`: ``schema.table`` with fnmatch's wildcards; none mean all."""
    name = str(table)
    return not patterns or any(pattern == name or fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def read(connection: Connection, names: Sequence[str]) -> dict[str, Publication]:
    """Return those of the publications `names` that exist, by name.

    Raises:
        ConnectionLost, SourceError: the catalog cannot be read.
    """
    # 6104 is pg_publication itself.
    with translated("read publications"):
        rows = connection.execute(
            """
            SELECT p.pubname::text, coalesce(d.description = %s, false),
                   concat_ws(', ', CASE WHEN p.pubinsert THEN 'insert' END, CASE WHEN p.pubupdate THEN 'update' END,
                             CASE WHEN p.pubdelete THEN 'delete' END, CASE WHEN p.pubtruncate THEN 'truncate' END),
                   p.pubviaroot,
                   coalesce((SELECT json_agg(json_build_array(r.prrelid::int8, r.prattrs::int2[],
                                                              r.prqual IS NOT NULL))
                             FROM pg_publication_rel AS r WHERE r.prpubid = p.oid), '[]')
            FROM pg_publication AS p
            LEFT JOIN pg_description AS d ON d.objoid = p.oid AND d.classoid = 6104 AND d.objsubid = 0
            WHERE p.pubname = ANY (%s)""",
            [MARK, list(names)],
        ).fetchall()
    return {
        name: Publication(ours, publish, via_root, dict(_member(*member) for member in members))
        for name, ours, publish, via_root, members in rows
    }


def _member(oid: int, attnums: Sequence[int] | None, filtered: bool) -> tuple[int, Member]:
    return oid, Member(None if attnums is None else frozenset(attnums), filtered)


def is_ours(connection: Connection, name: str) -> bool | None:
    """Whether the publication `name` is ours; None: there is none.

    Raises:
        ConnectionLost, SourceError: the catalog cannot be read.
    """
    found = read(connection, (name,)).get(name)
    return None if found is None else found.ours


def permitted(connection: Connection, name: str, tables: Sequence[TableDefinition]) -> list[TableDefinition]:
    """Return those of `tables` that we may put into the publications: none if these are there and not owned by us.

    Raises:
        ConnectionLost, SourceError: the catalog cannot be read.
    """
    with translated("read the owners of publications"):
        rows = connection.execute(
            "SELECT bool_and(pg_has_role(pubowner, 'USAGE')) FROM pg_publication WHERE pubname = ANY (%s)",
            [[name, append_name(name)]],
        ).fetchall()
    if rows == [(False,)]:
        return []
    owned = catalog.owned(connection, [table.oid for table in tables])
    return [table for table in tables if table.oid in owned]


def coming(connection: Connection, name: str, patterns: Sequence[str]) -> list[TableDefinition]:
    """Return the tables that are published, or that upkeep.py would publish.

    Raises:
        ConnectionLost, SourceError: the catalog cannot be read.
    """
    names = (name, append_name(name))
    if is_ours(connection, name) is False:
        published = {table.oid for table in catalog.published(connection, names)}
        return list(catalog.definitions(connection, sorted(published)).values())
    members = {oid for each in read(connection, names).values() for oid in each.members}
    tables = {table.oid: table for table in catalog.user_tables(connection) if matches(table, patterns)}
    return list((tables | catalog.definitions(connection, sorted(members - tables.keys()))).values())


def dropped(name: str) -> StateError:
    """Return the error for a publication that is not there any more."""
    return StateError(
        f"publication {name} was dropped: what is written meanwhile is not in the stream",
        "if it was made by somebody else, create it again; then `cdc run` copies every table anew",
    )


def refuse_astray(connection: Connection, name: str) -> None:
    """Refuse updates and deletes that the stream has, and that nobody can follow.

    Raises:
        StateError: a table is published by way of its root, partitions have another replica identity than that, and it
            is not ours to move to the second publication.
        ConnectionLost, SourceError: the catalog cannot be read.
    """
    published = catalog.published(connection, (name, append_name(name)))
    oids = {table.oid for table in published if {"u", "d"} & set(table.terms.publishes)}
    found = [table for table in catalog.definitions(connection, sorted(oids)).values() if table.leaves_astray]
    movable = permitted(connection, name, found) if found and is_ours(connection, name) else []
    for table in found:
        if table not in movable:
            raise StateError(
                f"publication {name} publishes updates or deletes of {table}, whose partitions have another replica "
                "identity than the root: they cannot be followed",
                f"ALTER TABLE ... REPLICA IDENTITY for each; then, if it is mirrored already, `cdc resync {table}`",
            )


def refuse_columns(
    connection: Connection,
    name: str,
    tables: Sequence[TableDefinition],
    exclude: Sequence[str],
    masked: Iterable[str],
) -> None:
    """Refuse a CDC_EXCLUDE or CDC_MASK that cannot be kept, or would do harm; change nothing.

    Args:
        tables: that are `coming`.
        masked: the columns of CDC_MASK.

    Raises:
        SettingsError: see exclusion.py.
        ConnectionLost, SourceError: the catalog cannot be read.
    """
    if exclude and is_ours(connection, name) is False:
        exclusion.refuse_published(catalog.published(connection, (name, append_name(name))), exclude, name)
    else:
        exclusion.refuse(tables, exclude)
    exclusion.refuse_masks(tables, masked)
