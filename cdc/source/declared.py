"""Types of users and of extensions, as pg_type has them: read when a column first has one, and kept.

What a type's row says of its kind, and of what it is made, never changes while the type is there.

Source: PostgreSQL manual, "pg_type".
"""

from __future__ import annotations

from collections.abc import Iterable

from cdc.pgoutput.types import Basis, Declared, is_built_in
from cdc.source.connection import Connection, connect, translated

__all__ = ["DeclaredTypes"]

# The types, what they are domains over, or arrays of, and so on. Types with subscripts of their own (point, jsonb)
# have a typelem, too, and are no arrays.
_READ = """
    WITH RECURSIVE part AS (
        SELECT t.* FROM pg_catalog.pg_type AS t WHERE t.oid = ANY (%s::text[]::oid[])
        UNION ALL
        SELECT t.* FROM part JOIN pg_catalog.pg_type AS t ON t.oid IN (part.typbasetype, part.typelem)
    )
    SELECT part.oid::int8, part.typtype = 'd', part.typbasetype::int8, part.typtypmod,
           CASE WHEN part.typsubscript = 'pg_catalog.array_subscript_handler'::regproc AND part.typlen = -1
                THEN part.typelem::int8 ELSE 0 END,
           part.typdelim::text
    FROM part"""


class DeclaredTypes:
    """Looks types up by OID; None: there is none. State: those that were looked up. Threads may share it."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._known: dict[int, Declared | None] = {}

    def __call__(self, type_oid: int) -> Declared | None:
        """Return what pg_type says of a type.

        Raises:
            ConnectionLost, SourceError: it cannot be asked.
        """
        if type_oid not in self._known:
            with connect(self._dsn) as connection:
                self.learn(connection, [type_oid])
        return self._known[type_oid]

    def learn(self, connection: Connection, type_oids: Iterable[int]) -> None:
        """Read the types that are not known yet, at once.

        Raises:
            ConnectionLost, SourceError: they cannot be asked for.
        """
        asked = [oid for oid in type_oids if oid not in self._known and not is_built_in(oid)]
        if not asked:
            return
        with translated("read the types of columns"):
            found = connection.execute(_READ, [[str(oid) for oid in asked]]).fetchall()
        types = {
            oid: Declared(Basis(base, typmod) if is_domain else None, element, delimiter)
            for oid, is_domain, base, typmod, element, delimiter in found
        }
        self._known.update(dict.fromkeys(asked) | types)
