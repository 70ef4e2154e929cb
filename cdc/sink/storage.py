"""What is kept of a table's storage: it tells that rows changed without a word in the stream.

A rewrite (ALTER TABLE ... USING, a volatile default, but VACUUM FULL as well) gives a table another relfilenode, and
says nothing. Nor do a partition that is attached, detached or dropped with rows in it, or the TRUNCATE of a partition
alone. A TRUNCATE of the whole table gives it another relfilenode, too, but it is in the stream, with its transaction.

As text: ``oid:relfilenode:link`` of the table and each partition (`TableDefinition.storage`), by comma; behind that,
``|T`` and the transaction ID of the last streamed TRUNCATE since.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

__all__ = ["Storage", "read", "rewritten", "truncated"]


@dataclasses.dataclass(frozen=True, slots=True)
class Storage:
    """Storage as it was.

    Attributes:
        members: by OID, relfilenode and link.
        truncated_by: transaction ID of the last TRUNCATE since; None: there was none.
    """

    members: Mapping[int, tuple[int, int]]
    truncated_by: int | None


def read(text: str) -> Storage | None:
    """Return what `text` says; None: nothing, the storage is not known."""
    members, _, xid = text.partition("|T")
    if not members:
        return None
    found = (tuple(map(int, entry.split(":"))) for entry in members.split(","))
    return Storage({oid: (node, link) for oid, node, link in found}, int(xid) if xid else None)


def truncated(text: str, xid: int) -> str:
    """Return `text` with a TRUNCATE of the transaction `xid` noted."""
    members, _, _ = text.partition("|T")
    return f"{members}|T{xid}" if members else ""


def rewritten(before: str, now: str) -> bool:
    """Whether rows of a table may have been rewritten between the two; new and lost partitions are another matter."""
    old, new = read(before), read(now)
    if old is None or new is None or old.truncated_by is not None:
        return True
    both = old.members.keys() & new.members.keys()
    return any(old.members[oid][0] != new.members[oid][0] for oid in both)
