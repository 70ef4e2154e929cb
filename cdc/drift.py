"""What a look at the catalog means for a table that has no change to tell it, once the stream has come to that look.

Pure: it compares; tables.py acts.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Sequence
from typing import Literal

from cdc.sink.columns import LiveTable
from cdc.sink.holding import Holding
from cdc.sink.storage import read
from cdc.sink.stored import StoredColumn, Table
from cdc.source.catalog import TableDefinition

__all__ = ["Verdict", "judge"]


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """What has become of a table without a change that would tell.

    Attributes:
        kind: renamed; altered: its columns; rewritten: rows may be others, or print otherwise; moved: its storage or
            its types are, its rows are not.
        reason: for people, of what is rewritten.
    """

    kind: Literal["renamed", "altered", "rewritten", "moved"]
    reason: str = ""


def judge(
    table: Table, definition: TableDefinition, live: LiveTable, holding: Holding, empty: Collection[int]
) -> Verdict | None:
    """Compare a table with the catalog; None: all is as it was.

    No change of the table's rows lies between its last DDL and the place of the stream where the catalog was read, or
    else that DDL is known from the change.

    Args:
        live: the same as `definition`, in the sink's terms.
        holding: how columns are to be held.
        empty: OIDs of attached leaves that have no row.
    """
    if (definition.schema, definition.name) != (table.schema, table.name):
        return Verdict("renamed")
    described = [(c.name, c.type_oid, c.typmod) for c in live.columns]
    if described != [(c.name, c.type_oid, c.typmod) for c in table.columns]:
        return Verdict("altered")
    names = (str(table), str(definition))
    held = holding.columns(table, names, live.columns, soft=table.deletes == "soft")
    if reason := _held_otherwise(table.columns, held):
        return Verdict("rewritten", reason)
    if (definition.storage, definition.types) == (table.storage, table.types):
        return None
    reason = _rewritten(table, definition, empty) or _reprinted(table, definition)
    return Verdict("rewritten", reason) if reason else Verdict("moved")


def _held_otherwise(before: Sequence[StoredColumn], now: Sequence[StoredColumn]) -> str:
    """Return why columns that have the names and types that they had are others here all the same; '' if not."""
    for old, new in zip(before, now, strict=True):
        if old.attnum != new.attnum:
            return "a column was dropped and added again"
        if old.mask != new.mask:
            return "it has other masks under its name"
        if (old.here, old.kind.duckdb) != (new.here, new.kind.duckdb):
            return f"column {new.name} is to be {new.here} {new.kind.duckdb}, and was {old.here} {old.kind.duckdb}"
    return ""


def _rewritten(table: Table, definition: TableDefinition, empty: Collection[int]) -> str:
    """Return why rows may have changed without a word in the stream; '' if they have not."""
    before = read(table.storage)
    if before is None:
        return ""  # not known: written down by an earlier version
    if before.members.keys() - {member.oid for member in definition.members}:
        return "a partition was detached or dropped"
    for member in definition.members:
        if member.oid not in before.members or before.members[member.oid][1] != member.link:
            if member.is_leaf and not member.born and member.oid not in empty:
                return "a partition was attached"
        elif before.members[member.oid][0] != member.relfilenode:
            told = before.truncated_by == member.xid or "t" not in table.publishes
            # Behind the TRUNCATE, perhaps: a savepoint's transaction ID is greater than that of the whole.
            truncated = told and member.columns_xid < member.xid
            if not truncated:
                return "it was rewritten"
    return ""


def _reprinted(table: Table, definition: TableDefinition) -> str:
    """Return why rows print otherwise than before, without having changed; '' if they do not."""
    before, now = json.loads(table.types), json.loads(definition.types)
    changed = any(now[part] != before[part] for part in before.keys() & now.keys())
    return "values of one of its types print otherwise" if changed else ""
