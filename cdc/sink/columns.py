"""Which column is which: those that are here, those that a Relation describes, and those of the catalog.

The live catalog may be newer than the stream. It is trusted only where it equals the Relation in hand, and only for
what the stream cannot tell: attnums, stored defaults, and whether the table was rewritten.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from cdc.pgoutput.messages import Column, Relation
from cdc.sink.stored import StoredColumn

__all__ = ["LiveTable", "identify", "same"]


@dataclasses.dataclass(frozen=True, slots=True)
class LiveTable:
    """A published table as the catalog has it.

    Attributes:
        storage: see `TableDefinition.storage`.
        columns: those that are published, but for how they are held.
        natts: the highest attnum that was ever used.
        hidden: attnums of columns that are not published.
        defaults: by attnum, text of the value that rows written before the column was added have; else they have NULL.
    """

    storage: str
    columns: tuple[StoredColumn, ...]
    natts: int
    hidden: frozenset[int] = frozenset()
    defaults: Mapping[int, str] = dataclasses.field(default_factory=dict)


def same(columns: Sequence[StoredColumn], relation: Relation) -> bool:
    """Whether `relation` has just these columns, by name, type and order."""
    return len(columns) == len(relation.columns) and all(
        (stored.name, stored.type_oid, stored.typmod) == (column.name, column.type_oid, column.typmod)
        for stored, column in zip(columns, relation.columns, strict=True)
    )


def identify(
    columns: Sequence[StoredColumn], natts: int, relation: Relation, live: LiveTable | None
) -> tuple[int, ...] | None:
    """Return the attnums of a Relation's columns, None where these are not certain.

    Args:
        columns: of the Relation before.
        natts: the highest attnum that was ever used then.
        live: the catalog now.

    The catalog may be several versions ahead, so names and types alone do not tell. But an attnum is never used twice,
    a new one is greater than all before, and a Relation has its columns in that order. So what is there before and
    afterwards was there in between, and a column in the place of another one is that one under another name.
    """
    if live is None:
        return None
    now = {column.attnum: column for column in live.columns}
    added = [n for n in range(natts + 1, live.natts + 1) if n not in live.hidden]
    if same(live.columns, relation):
        known = [n for n in now if n > natts]
        # Else one may have come and gone in between, and this one have its name.
        return tuple(now) if known == added[: len(known)] else None
    later = {column.name for column in live.columns if column.attnum > natts}
    wanted = list(relation.columns)
    old = _identify_old(columns, wanted, now, later)
    new = None if old is None else _identify_new(len(wanted) - len(old), added, now)
    if old is None or new is None:
        return None
    there = {column.attnum for column in columns} | {n for n in now if natts < n < max(new, default=0)}
    return (*old, *new) if there & now.keys() <= {*old, *new} else None


def _identify_old(
    columns: Sequence[StoredColumn], wanted: Sequence[Column], now: Mapping[int, StoredColumn], later: Collection[str]
) -> list[int] | None:
    """Return the attnums of those of the `wanted` columns that are among `columns`: the first so many."""
    found: list[int] = []
    names = {column.name for column in now.values()}
    for position, column in enumerate(columns):
        if len(found) == len(wanted):
            break
        name = wanted[len(found)].name
        if column.attnum in now:  # it is there still, so it was there all the time
            found.append(column.attnum)
        elif name == column.name and name not in later:
            found.append(column.attnum)  # dropped since, but not yet
        elif name not in names and name not in {other.name for other in columns[position + 1 :]}:
            return None  # it has another name, or is dropped, and this is a new one
    return found


def _identify_new(wanted: int, added: Sequence[int], now: Collection[int]) -> list[int] | None:
    """Return the attnums of so many new columns, all of which are among `added`."""
    if wanted == len(added):
        return list(added)
    first = list(added[:wanted])
    # What is there still was there before all that came later; of what is dropped by now nobody knows when.
    return first if len(first) == wanted and all(n in now for n in first) else None
