"""What a poll of the publications means for the tables: which rows of ``_cdc.tables`` change.

Pure: it compares; the pipeline writes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from cdc.sink.checkpoint import State, Table
from cdc.source.catalog import PublishedTable

__all__ = ["again", "reconcile"]


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
