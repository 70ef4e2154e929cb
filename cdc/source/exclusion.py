"""Columns that never leave Postgres: CDC_EXCLUDE, kept by the publications' column lists, which stream and copy obey.

A list that lacks a column of the replica identity makes the application's own UPDATE and DELETE fail. So such a column
cannot be excluded, nor any of a table under REPLICA IDENTITY FULL; and a table that comes to that later is published
without its updates and deletes.

Source: PostgreSQL manual, "Column Lists".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cdc.errors import SettingsError
from cdc.source.catalog import Attribute, PublishedTable, TableDefinition

__all__ = ["fits", "listed", "refuse", "refuse_published"]


def _excluded(table: TableDefinition, exclude: Sequence[str]) -> list[Attribute]:
    return [attribute for attribute in table.attributes if f"{table}.{attribute.name}" in exclude]


def listed(table: TableDefinition, exclude: Sequence[str]) -> tuple[Attribute, ...] | None:
    """Return the columns of `table` that its publication lists; None: it has no list."""
    excluded = _excluded(table, exclude)
    if not excluded:
        return None
    return tuple(a for a in table.attributes if a not in excluded and not a.generated)


def fits(table: TableDefinition, exclude: Sequence[str]) -> bool:
    """Whether updates and deletes of `table` can be published: it has an identity, all of which is in the list."""
    return table.identity_usable and not _harmed(table, _excluded(table, exclude))


def _harmed(table: TableDefinition, excluded: Iterable[Attribute]) -> list[Attribute]:
    """Return those of the columns `excluded` that are needed for updates and deletes."""
    if not table.identity_usable:
        return []
    whole = table.replica_identity == "f"
    return [attribute for attribute in excluded if whole or attribute.attnum in table.key]


def refuse(tables: Iterable[TableDefinition], exclude: Sequence[str], *, strict: bool) -> None:
    """Refuse what cannot be excluded.

    Args:
        tables: that are, or are to be, published.
        exclude: CDC_EXCLUDE.
        strict: a column that is not there is a mistake; else somebody may have dropped it.

    Raises:
        SettingsError: a column is part of the replica identity, nothing would be left of a table, or it is not there.
    """
    unknown = set(exclude)
    for table in tables:
        excluded = _excluded(table, exclude)
        unknown -= {f"{table}.{attribute.name}" for attribute in excluded}
        if harmed := _harmed(table, excluded):
            why = "it has REPLICA IDENTITY FULL" if table.replica_identity == "f" else "it is part of the key"
            raise SettingsError(
                f"CDC_EXCLUDE: {table}.{harmed[0].name} cannot be left out, because {why}: updates and deletes would "
                "fail in the application",
                f"leave the whole table out with CDC_TABLES, or give {table} another replica identity",
            )
        if excluded and not listed(table, exclude):
            raise SettingsError(f"CDC_EXCLUDE: nothing is left of {table}", "leave it out with CDC_TABLES")
    if unknown and strict:
        raise SettingsError(
            f"CDC_EXCLUDE: there is no column {min(unknown)} in what is published", "write it as schema.table.column"
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
