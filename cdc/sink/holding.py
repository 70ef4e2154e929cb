"""How the columns of a table are held here: under which names, and as which types.

A column keeps its name, unless DuckDB, which ignores case, or the change log has that one already: then its attnum is
put behind it. That follows from the columns alone, so a copy and the stream, today's consumer and the next, agree. Its
type is that of the table of types, unless the settings choose another, or its values did not fit.

A table likewise keeps its name, or has its OID behind it; that depends on which came first, and is kept in
``_cdc.tables``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence

from cdc.pgoutput.masks import Masks
from cdc.pgoutput.messages import Column, Relation
from cdc.pgoutput.types import TEXT, Basis, Declarations, basis, may_be
from cdc.sink.history import META
from cdc.sink.stored import StoredColumn, Table
from cdc.sink.warehouse import folded

__all__ = ["DELETED_AT", "Holding", "aliases", "held", "table_alias"]

DELETED_AT = "_deleted_at"
"""Column that CDC_DELETES=soft adds: when the row was deleted, NULL while it lives."""


@dataclasses.dataclass(frozen=True, slots=True)
class Holding:
    """What decides it, besides the table.

    Attributes:
        masks: CDC_MASK.
        choices: CDC_TYPES, by ``schema.table.column``.
        declared: what pg_type says.
        logged: there is a change log, which has columns of its own.
        limit: a column of which more values do not fit becomes text.
    """

    masks: Masks
    choices: Mapping[str, Basis]
    declared: Declarations
    logged: bool
    limit: int

    def columns(
        self,
        table: Table,
        names: Sequence[str],
        columns: Sequence[StoredColumn],
        *,
        soft: bool,
    ) -> tuple[StoredColumn, ...]:
        """Return `columns` as they are to be held.

        Args:
            names: by which the table is known, as ``schema.table``.
            soft: deleted rows stay, which takes a column of ours.
        """
        renamed = self.aliases(columns, soft=soft)
        return tuple(
            dataclasses.replace(
                column,
                alias=renamed.get(column.attnum, ""),
                held_as=_other(column, self._basis(table, names, column)),
            )
            for column in columns
        )

    def aliases(self, columns: Sequence[StoredColumn], *, soft: bool) -> dict[int, str]:
        """Return, by attnum, the names here of columns that cannot have their own."""
        ours = (*(META if self.logged else ()), *([DELETED_AT] if soft else ()))
        return aliases([(column.attnum, column.name) for column in columns], ours)

    def _basis(self, table: Table, names: Sequence[str], column: StoredColumn) -> Basis:
        if column.attnum in table.widened:
            return TEXT
        natural = basis(column.type_oid, column.typmod, self.declared)
        choices = (self.choices.get(f"{name}.{column.name}") for name in names)
        chosen = next((choice for choice in choices if choice is not None), natural)
        return chosen if may_be(natural, chosen, is_key=bool(column.is_key)) else natural


def _other(column: StoredColumn, held_as: Basis) -> Basis | None:
    return None if held_as == (column.type_oid, column.typmod) else held_as


def aliases(columns: Iterable[tuple[int, str]], ours: Collection[str]) -> dict[int, str]:
    """Return, by attnum, the names of columns that cannot have their own.

    Args:
        columns: attnum and name of each.
        ours: names that none of them can have.
    """
    by_attnum = sorted(columns)
    own = set(folded(*(name for _, name in by_attnum)))
    taken = set(folded(*ours))
    found: dict[int, str] = {}
    for attnum, name in by_attnum:
        (plain,) = folded(name)
        if plain in taken:
            alias = f"{name}_{attnum}"
            while folded(alias)[0] in own | taken:
                alias += "_"
            found[attnum] = alias
            (plain,) = folded(alias)
        taken.add(plain)
    return found


def held(table: Table, relation: Relation) -> Relation:
    """Return `relation`, whose columns are those of `table`, with the names and types that these have here."""
    columns = (
        Column(stored.here, *stored.basis, is_key=column.is_key)
        for stored, column in zip(table.columns, relation.columns, strict=True)
    )
    return dataclasses.replace(relation, columns=tuple(columns))


def table_alias(tables: Iterable[Table], oid: int, schema_name: str, name: str) -> str:
    """Return the name here of a table that cannot have its own; '' if it can.

    Of tables whose names DuckDB takes for one, the first that is here keeps its name, or else the one of the lowest
    OID; the others get their OID behind theirs.
    """
    wanted = folded(schema_name, name)
    tables = [table for table in tables if table.state != "dropped"]
    others = [table for table in tables if table.oid != oid]
    taken = {folded(*names) for table in others for names in (table.here, (table.schema, table.name))}
    own = next((table for table in tables if table.oid == oid), None)
    if own is not None and own.copy_lsn is not None and folded(*own.here) == wanted:
        return ""
    if not any(
        folded(other.schema, other.name) == wanted
        and (other.schema, other.name) != (schema_name, name)  # that one has another name by now, and will tell
        and (other.oid < oid or (other.copy_lsn is not None and folded(*other.here) == wanted))
        for other in others
    ):
        return ""
    alias = f"{name}_{oid}"
    while folded(schema_name, alias) in taken:
        alias += "_"
    return alias
