"""What is published and how it is stored, at one moment: what a poll of the catalog brings."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence

from psycopg import sql

from cdc.errors import SourceError
from cdc.source import catalog
from cdc.source.catalog import PublishedTable, TableDefinition
from cdc.source.connection import Connection, translated
from cdc.source.declared import DeclaredTypes

__all__ = ["Look", "look"]

_PATIENCE = b"SET LOCAL lock_timeout = '1s'; SET LOCAL statement_timeout = '10s'"


@dataclasses.dataclass(frozen=True, slots=True)
class Look:
    """All of it is of one snapshot.

    Attributes:
        definitions: of the published tables, by OID.
        empty: OIDs of leaves that were attached and hold no row.
        unsettled: some definitions were left out, for they were changing.
    """

    published: list[PublishedTable]
    definitions: Mapping[int, TableDefinition]
    empty: frozenset[int]
    unsettled: bool = False

    def columns(self, oid: int) -> tuple[str, ...] | None:
        """Return the names of a table's published columns; None: it is not published."""
        return next((table.columns for table in self.published if table.oid == oid), None)

    def settled(self, later: Look) -> Look:
        """Return this look without the definitions that another one, taken later, does not have just so."""
        same = {
            oid: definition
            for oid, definition in self.definitions.items()
            if later.definitions.get(oid) == definition and later.columns(oid) == self.columns(oid)
        }
        unsettled = later.definitions.keys() != same.keys()
        return dataclasses.replace(self, definitions=same, unsettled=unsettled)


def look(
    connection: Connection,
    publications: Sequence[str],
    declared: DeclaredTypes,
    known: Collection[int] | None = None,
) -> Look:
    """Return what the publications publish.

    Args:
        declared: learns the types of columns.
        known: leaves of which it makes no difference whether they have rows; None: of none it does.

    Raises:
        ConnectionLost, SourceError: the catalog cannot be read.
    """
    with translated("read what is published"), connection.transaction():
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        published = catalog.published(connection, publications)
        definitions = catalog.definitions(connection, sorted({table.oid for table in published}))
        declared.learn(connection, {a.type_oid for table in definitions.values() for a in table.attributes})
    new = [] if known is None else [oid for oid in _attached(definitions.values()) if oid not in known]
    return Look(published, definitions, frozenset(oid for oid in new if _is_empty(connection, oid)))


def _attached(definitions: Collection[TableDefinition]) -> Iterator[int]:
    for table in definitions:
        yield from (m.oid for m in table.members if m.is_leaf and m.oid != table.oid and not m.born)


def _is_empty(connection: Connection, oid: int) -> bool:
    """Whether a table has no row; one that we may not read, or that is locked, may have some."""
    try:
        with translated("look into a partition"), connection.transaction():
            connection.execute(_PATIENCE)
            names = connection.execute(
                "SELECT n.nspname::text, c.relname::text FROM pg_class AS c "
                "JOIN pg_namespace AS n ON n.oid = c.relnamespace WHERE c.oid = %s::text::oid",
                [str(oid)],
            ).fetchone()
            if names is None:
                return False
            query = sql.SQL("SELECT EXISTS (SELECT FROM ONLY {})").format(sql.Identifier(*names))
            return connection.execute(query).fetchall() == [(False,)]
    except SourceError:
        return False
