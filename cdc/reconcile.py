"""What a poll of the publications means for the tables: which rows of ``_cdc.tables`` change.

Pure: it compares; tables.py writes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence

from cdc.errors import StateError
from cdc.sink.stored import State, Table
from cdc.source.catalog import PublishedTable

__all__ = ["again", "gap", "reconcile", "refuse_less", "theirs"]

_WORDS = {"i": "insert", "u": "update", "d": "delete", "t": "truncate"}


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class _Entry:
    """By what a table is published; see `PublishedTable` and `Terms`."""

    publication: str
    entry: int
    version: int
    publishes: str
    ours: bool


@dataclasses.dataclass(frozen=True, slots=True)
class _Label:
    """What ``_cdc.tables.publication`` holds: how a table is published, and with which publications in all."""

    subscribed: frozenset[int] = frozenset()
    entries: tuple[_Entry, ...] = ()

    @classmethod
    def parse(cls, text: str) -> _Label:
        """Return the label of a row of ``_cdc.tables``, an empty one if it was not published yet.

        What is written in another way stands for nothing, too, and the table is copied anew.
        """
        if not text.startswith("["):
            return cls()
        subscribed, entries = json.loads(text)
        return cls(frozenset(subscribed), tuple(_Entry(*entry) for entry in entries))

    def __str__(self) -> str:
        return json.dumps([sorted(self.subscribed), [dataclasses.astuple(entry) for entry in self.entries]])


def _labels(published: Iterable[PublishedTable]) -> dict[int, _Label]:
    """Return the labels of what is published, by the table's OID."""
    found: dict[int, _Label] = {}
    for there in published:
        terms = there.terms
        entry = _Entry(there.publication, there.entry, terms.version, terms.publishes, terms.ours)
        before = found.get(there.oid, _Label())
        found[there.oid] = _Label(frozenset(terms.subscribed), tuple(sorted({*before.entries, entry})))
    return found


def gap(known: Iterable[Table], published: Sequence[PublishedTable]) -> bool:
    """Whether a publication is another one than the stream began with: what it lacks has to be copied.

    PostgreSQL up to 17 does not even decode what was written before a publication was there.
    """
    then = {oid for table in known if table.state != "dropped" for oid in _Label.parse(table.publication).subscribed}
    now = {oid for there in published for oid in there.terms.subscribed}
    return bool(then and now - then)


def theirs(known: Iterable[Table], name: str) -> bool:
    """Whether the last publication called `name` that published any table was not ours."""
    ours: dict[bool, list[bool]] = {True: [], False: []}
    for table in known:
        entries = _Label.parse(table.publication).entries
        ours[table.state != "dropped"] += [entry.ours for entry in entries if entry.publication == name]
    return not all(ours[True] or ours[False])


def refuse_less(known: Iterable[Table], published: Sequence[PublishedTable]) -> None:
    """Refuse a publication, not one of ours, that publishes less kinds of changes than when its tables were copied.

    Raises:
        StateError: one does.
    """
    now = {there.publication: there.terms.publishes for there in published}
    for table in known:
        if table.state in ("dropped", "error"):
            continue
        for entry in _Label.parse(table.publication).entries:
            if entry.ours:  # it is put right by the next poll, which says so where it cannot
                continue
            lost = [
                word
                for letter, word in _WORDS.items()
                if letter in entry.publishes and letter not in now.get(entry.publication, entry.publishes)
            ]
            if lost:
                before = ", ".join(_WORDS[letter] for letter in entry.publishes)
                quoted = '"' + entry.publication.replace('"', '""') + '"'
                raise StateError(
                    f"publication {entry.publication} was altered: it no longer publishes {', '.join(lost)}",
                    f"as its owner: ALTER PUBLICATION {quoted} SET (publish = '{before}'); then `cdc run` copies its "
                    "tables anew. If it is meant so: `cdc resync --all`",
                )


def reconcile(
    known: Iterable[Table], published: Sequence[PublishedTable], *, gone: bool, starting: bool = False
) -> list[Table]:
    """Return the rows of ``_cdc.tables`` that change now that just these tables are published.

    Args:
        gone: the stream has come to where that holds, so tables that are missing have no more changes in it. Else they
            keep their state, and a new table of the same name has to wait.
        starting: no copy is under way: one that is called so was cut short by a crash, and begins again. That the
            stream has no `gap`, and nobody is to `refuse_less`, has been seen to.

    Raises:
        StateError: the stream has a `gap`; or see `refuse_less`.
    """
    known = list(known)
    if not starting:
        if gap(known, published):
            raise StateError(
                "a publication was dropped and made anew: what was written meanwhile is not in the stream",
                "`cdc run` makes a new slot, and copies every table anew",
            )
        refuse_less(known, published)
    again = ("dropped", "copying") if starting else ("dropped",)
    changed = []
    known_by_oid = {table.oid: table for table in known}
    labels = _labels(published)
    for there in {table.oid: table for table in published}.values():
        table = known_by_oid.get(there.oid)
        label = str(labels[there.oid])
        if table is None:
            if not gone and _name_in_use(there, known_by_oid.values()):
                continue
            changed.append(Table(there.oid, there.schema, there.name, "pending", publication=label))
        elif table.state in again:
            begins = dataclasses.replace(table, schema=there.schema, name=there.name, state="pending", reason="")
            changed.append(dataclasses.replace(begins, publication=label))
        elif _Label.parse(table.publication).entries == labels[there.oid].entries:
            if table.publication != label:
                changed.append(dataclasses.replace(table, publication=label))
        else:
            # Before it came here, some of its changes were not in the stream, or not with these columns or this filter.
            moved = dataclasses.replace(table, publication=label, reason="published in another way")
            state: State = "resyncing" if table.state in ("streaming", "resyncing") else "pending"
            changed.append(moved if table.state == "error" else dataclasses.replace(moved, state=state))
    if not gone:
        return changed
    changed += [
        dataclasses.replace(table, state="dropped", reason="no longer published")
        for table in known_by_oid.values()
        if table.oid not in labels and table.state != "dropped"
    ]
    return changed


def _name_in_use(there: PublishedTable, known: Iterable[Table]) -> bool:
    names = (there.schema, there.name)
    return any((table.schema, table.name) == names and table.state != "dropped" for table in known)


def again(table: Table) -> Table:
    """Return the row of a table that is to be copied anew: what is up to date stays so until the copy is complete."""
    follows = table.state == "streaming" or (table.state == "resyncing" and not table.reason)
    return dataclasses.replace(table, state="resyncing" if follows else "pending", reason="")
