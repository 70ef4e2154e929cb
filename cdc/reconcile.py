"""What a look at the catalog means for the tables, once the stream has come to where it was taken.

Pure: it compares; the pipeline acts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from typing import Literal

from cdc.sink.checkpoint import State, Table
from cdc.sink.schema import LiveTable
from cdc.sink.storage import read
from cdc.source.catalog import PublishedTable, TableDefinition

__all__ = ["Verdict", "again", "judge", "reconcile"]


def reconcile(
    known: Iterable[Table], published: Sequence[PublishedTable], *, gone: bool, starting: bool = False
) -> list[Table]:
    """Return the rows of ``_cdc.tables`` that change now that just these tables are published.

    Args:
        gone: the stream has come to where that holds, so tables that are missing have no more changes in it. Else they
            keep their state, and a new table of the same name has to wait.
        starting: no copy is under way: one that is called so was cut short by a crash, and begins again.
    """
    again = ("dropped", "copying") if starting else ("dropped",)
    changed = []
    known_by_oid = {table.oid: table for table in known}
    where: dict[int, set[str]] = {}
    for there in published:
        where.setdefault(there.oid, set()).add(f"{there.publication}:{there.entry}")
    for there in {table.oid: table for table in published}.values():
        table = known_by_oid.get(there.oid)
        names = ",".join(sorted(where[there.oid]))
        if table is None:
            if not gone and _name_in_use(there, known_by_oid.values()):
                continue
            changed.append(Table(there.oid, there.schema, there.name, "pending", publication=names))
        elif table.state in again:
            begins = dataclasses.replace(table, schema=there.schema, name=there.name, state="pending", reason="")
            changed.append(dataclasses.replace(begins, publication=names))
        elif table.publication != names:
            # Before it came here, some of its changes were not in the stream, or not with these columns or this filter.
            moved = dataclasses.replace(table, publication=names, reason="published in another way")
            state: State = "resyncing" if table.state in ("streaming", "resyncing") else "pending"
            changed.append(moved if table.state == "error" else dataclasses.replace(moved, state=state))
    if not gone:
        return changed
    changed += [
        dataclasses.replace(table, state="dropped", reason="no longer published")
        for table in known_by_oid.values()
        if table.oid not in where and table.state != "dropped"
    ]
    return changed


def _name_in_use(there: PublishedTable, known: Iterable[Table]) -> bool:
    names = (there.schema, there.name)
    return any((table.schema, table.name) == names and table.state != "dropped" for table in known)


def again(table: Table) -> Table:
    """Return the row of a table that is to be copied anew: what is up to date stays so until the copy is complete."""
    follows = table.state == "streaming" or (table.state == "resyncing" and not table.reason)
    return dataclasses.replace(table, state="resyncing" if follows else "pending", reason="")


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """What has become of a table without a change that would tell.

    Attributes:
        kind: renamed; altered: its columns; rewritten: rows may be others; moved: its storage is, its rows are not.
        reason: for people, of what is rewritten.
    """

    kind: Literal["renamed", "altered", "rewritten", "moved"]
    reason: str = ""


def judge(table: Table, definition: TableDefinition, live: LiveTable, empty: Collection[int]) -> Verdict | None:
    """Compare a table with the catalog; None: all is as it was.

    No change of the table's rows lies between its last DDL and the place of the stream where the catalog was read, or
    else that DDL is known from the change.

    Args:
        live: the same as `definition`, in the sink's terms.
        empty: OIDs of attached leaves that have no row.
    """
    if (definition.schema, definition.name) != (table.schema, table.name):
        return Verdict("renamed")
    described = [(c.name, c.type_oid, c.typmod) for c in live.columns]
    if described != [(c.name, c.type_oid, c.typmod) for c in table.columns]:
        return Verdict("altered")
    if [c.attnum for c in live.columns] != [c.attnum for c in table.columns]:
        return Verdict("rewritten", "a column was dropped and added again")
    if definition.storage == table.storage:
        return None
    reason = _rewritten(table, definition, empty)
    return Verdict("rewritten", reason) if reason else Verdict("moved")


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
            truncated = before.truncated_by == member.xid and not member.altered
            if not truncated:
                return "it was rewritten"
    return ""
