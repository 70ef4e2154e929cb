"""Types of users and of extensions, as pg_type has them: read when a column first has one, and kept.

What a type's row says of its kind, and of what it is made, never changes while the type is there.

Source: PostgreSQL manual, "pg_type".
"""

from __future__ import annotations

from cdc.pgoutput.types import Basis, Declared
from cdc.source.connection import connect, translated

__all__ = ["DeclaredTypes"]

# The type, what it is a domain over, or an array of, and so on. Types with subscripts of their own (point, jsonb)
# have a typelem, too, and are no arrays.
_READ = """
    WITH RECURSIVE part AS (
        SELECT t.* FROM pg_catalog.pg_type AS t WHERE t.oid = %s::text::oid
        UNION ALL
        SELECT t.* FROM part JOIN pg_catalog.pg_type AS t ON t.oid IN (part.typbasetype, part.typelem)
    )
    SELECT part.oid::int8, part.typtype = 'd', part.typbasetype::int8, part.typtypmod,
           CASE WHEN part.typsubscript = 'pg_catalog.array_subscript_handler'::regproc AND part.typlen = -1
                THEN part.typelem::int8 ELSE 0 END,
           part.typdelim::text
    FROM part"""


class DeclaredTypes:
    """Looks types up by OID; None: there is none. State: those that were looked up."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._known: dict[int, Declared | None] = {}

    def __call__(self, type_oid: int) -> Declared | None:
        """Return what pg_type says of a type.

        Raises:
            ConnectionLost, SourceError: it cannot be asked.
        """
        if type_oid not in self._known:
            with connect(self._dsn) as connection, translated("read the types of columns"):
                found = connection.execute(_READ, [str(type_oid)]).fetchall()
            self._known[type_oid] = None
            for oid, is_domain, base, typmod, element, delimiter in found:
                self._known[oid] = Declared(Basis(base, typmod) if is_domain else None, element, delimiter)
        return self._known[type_oid]
