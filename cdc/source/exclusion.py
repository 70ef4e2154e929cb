"""Columns that never leave Postgres: CDC_EXCLUDE, kept by the publications' column lists, which stream and copy obey.

A list that lacks a column of the replica identity makes the application's own UPDATE and DELETE fail. So such a column
cannot be excluded, nor any of a table under REPLICA IDENTITY FULL; and a table that comes to that later is published
without its updates and deletes.

Source: PostgreSQL manual, "Column Lists".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from cdc.errors import SettingsError
from cdc.source.catalog import Attribute, PublishedTable, TableDefinition

__all__ = ["Excluded", "excluded", "fits", "listed", "refuse", "refuse_masks", "refuse_published"]

Excluded = Mapping[int, frozenset[int]]
"""By a table's OID, the attnums of the columns that must not leave Postgres."""


def excluded(
    tables: Iterable[TableDefinition], exclude: Sequence[str], lists: Mapping[int, frozenset[int] | None]
) -> Excluded:
    """Return which columns of `tables` are excluded.

    While CDC_EXCLUDE names something that is not there, a column or a table may have another name now: what is left
    out at present stays so, until the setting is put right.

    Args:
        lists: by OID, attnums of what is published at present; None: everything.
    """
    tables = list(tables)
    sure = set(exclude) <= {f"{table}.{attribute.name}" for table in tables for attribute in table.attributes}
    found = {}
    for table in tables:
        attnums = {attribute.attnum for attribute in _named(table, exclude)}
        present = lists.get(table.oid)
        if present is not None and not sure:
            attnums |= {attribute.attnum for attribute in table.attributes} - present
        found[table.oid] = frozenset(attnums)
    return found


def _named(table: TableDefinition, names: Iterable[str]) -> list[Attribute]:
    return [attribute for attribute in table.attributes if f"{table}.{attribute.name}" in names]


def _of(table: TableDefinition, excluded: Excluded) -> list[Attribute]:
    attnums = excluded.get(table.oid, frozenset())
    return [attribute for attribute in table.attributes if attribute.attnum in attnums]


def listed(table: TableDefinition, excluded: Excluded) -> tuple[Attribute, ...] | None:
    """Return the columns of `table` that its publication lists; None: it has no list."""
    left_out = _of(table, excluded)
    if not left_out:
        return None
    return tuple(a for a in table.attributes if a not in left_out and not a.generated)


def fits(table: TableDefinition, excluded: Excluded) -> bool:
    """Whether updates and deletes of `table` can be published: it has an identity, all of which is in the list."""
    return table.identity_usable and not _harmed(table, _of(table, excluded))


def _harmed(table: TableDefinition, excluded: Iterable[Attribute]) -> list[Attribute]:
    """Return those of the columns `excluded` that are needed for updates and deletes."""
    if not table.identity_usable:
        return []
    whole = table.replica_identity == "f"
    return [attribute for attribute in excluded if whole or attribute.attnum in table.key]


def refuse(tables: Iterable[TableDefinition], exclude: Sequence[str]) -> None:
    """Refuse what cannot be excluded.

    Args:
        tables: that are, or are to be, published.
        exclude: CDC_EXCLUDE.

    Raises:
        SettingsError: a column is part of the replica identity, nothing would be left of a table, or it is not there.
    """
    unknown = set(exclude)
    for table in tables:
        named = _named(table, exclude)
        unknown -= {f"{table}.{attribute.name}" for attribute in named}
        if harmed := _harmed(table, named):
            why = "it has REPLICA IDENTITY FULL" if table.replica_identity == "f" else "it is part of the key"
            raise SettingsError(
                f"CDC_EXCLUDE: {table}.{harmed[0].name} cannot be left out, because {why}: updates and deletes would "
                "fail in the application",
                f"leave the whole table out with CDC_TABLES, or give {table} another replica identity",
            )
        if named and not listed(table, {table.oid: frozenset(a.attnum for a in named)}):
            raise SettingsError(f"CDC_EXCLUDE: nothing is left of {table}", "leave it out with CDC_TABLES")
    if unknown:
        raise SettingsError(
            f"CDC_EXCLUDE: there is no column {min(unknown)} in what is published",
            "write it as schema.table.column; a column that was renamed or dropped has to be put right here, too",
        )


def refuse_masks(tables: Iterable[TableDefinition], masked: Iterable[str]) -> None:
    """Refuse what cannot be masked.

    Args:
        tables: that are, or are to be, published.
        masked: the columns of CDC_MASK.

    Raises:
        SettingsError: a column is part of the key, or it is not there.
    """
    unknown = set(masked)
    for table in tables:
        for attribute in _named(table, unknown.copy()):
            unknown.remove(f"{table}.{attribute.name}")
            if attribute.attnum in table.key:
                raise SettingsError(
                    f"CDC_MASK: {table}.{attribute.name} cannot be masked, because it is part of the key",
                    f"give {table} another replica identity, or leave the table out with CDC_TABLES",
                )
    if unknown:
        raise SettingsError(
            f"CDC_MASK: there is no column {min(unknown)} in what is published",
            "write it as schema.table.column:kind; a column that was renamed or dropped has to be put right here, too",
        )


def refuse_published(published: Iterable[PublishedTable], exclude: Sequence[str], name: str) -> None:
    """Refuse a publication that is not ours, is not changed therefore, and holds what is to be excluded.

    Raises:
        SettingsError: it does.
    """
    for table in published:
        for column in table.columns:
            if f"{table}.{column}" in exclude:
                raise SettingsError(
                    f"CDC_EXCLUDE: publication {name} publishes {table}.{column}, and is not ours to change",
                    f'as its owner give the table a column list: ALTER PUBLICATION "{name}" SET TABLE ... (...)',
                )
