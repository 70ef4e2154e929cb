"""Stage 1 of decoding: a batch of frames becomes the change messages of each relation, with LSN and ordinal.

The layout of every message stands in messages.py. Kinds, relations and transactions of all messages are read at once,
as arrays; only the rare messages (R, Y, O, T, M) are looked at one by one.

State, owned by Decoder alone: the relations that this connection has announced, and the transaction that the last
batch left open. Rules:

- B and C take turns. I, U, D, T and a transactional M stand between them; R, Y, O and other M stand anywhere.
- A transaction whose commit LSN (known from B) is below `skip_below` is dropped whole; what it says about relations
  counts nevertheless.
- Changes are numbered from 1 within their transaction, over all tables: a U with an old tuple takes two numbers, since
  it becomes a D and an I; everything else takes one, and so does a T however many relations it names.
- A Relation that equals the one known changes nothing (Postgres repeats them often); another one begins a new version,
  and the rows before it belong to the old version.

Decoder.decode -> RelationRows (rows.py) -> decode_rows -> TableChanges (changes.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from cdc.errors import ProtocolError
from cdc.pgoutput.changes import TableChanges, Unfit, decode_rows
from cdc.pgoutput.frames import Wire, cut
from cdc.pgoutput.messages import (
    LogicalMessage,
    Relation,
    WireBatch,
    check_origin,
    check_type,
    parse_logical_message,
    parse_relation,
    parse_truncate,
)
from cdc.pgoutput.rows import RelationRows

__all__ = ["Decoded", "Decoder", "RelationRows", "TableChanges", "Unfit", "decode_rows"]

Bytes = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
Positions = npt.NDArray[np.int64]

_BEGIN, _COMMIT, _RELATION, _TYPE, _ORIGIN, _UPDATE, _TRUNCATE = b"BCRYOUT"
_KEY, _OLD = b"KO"
_TAG_OFFSET = 5  # kind u8, relation u32, then the tag of the first tuple


def _are(kinds: bytes) -> Mask:
    """Return, by kind byte, whether it is one of `kinds`."""
    table = np.zeros(256, np.bool_)
    table[list(kinds)] = True
    return table


_IS_CHANGE, _IS_RARE = _are(b"IUDT"), _are(b"RYOM")


@dataclasses.dataclass(frozen=True, slots=True)
class Decoded:
    """What a batch holds.

    Attributes:
        rows: per relation version that has any, in the order of their first rows; several per table only if the
            relation changed within the batch (or the batch is larger than 1 GiB).
        messages: M messages of transactions that are not skipped, and all that are not transactional, in order.
        transactions: number of Commits, without those of skipped transactions.
        end_lsn: end LSN of the last Commit, of a skipped transaction too; None: the batch has no Commit.
        commit_ts: of that Commit, microseconds since 1970 UTC.
    """

    rows: list[RelationRows]
    messages: list[LogicalMessage]
    transactions: int
    end_lsn: int | None
    commit_ts: int | None


@dataclasses.dataclass(frozen=True, slots=True)
class _Open:
    """The transaction that a batch left open; `seq` is the last number given to one of its changes."""

    lsn: int
    xid: int
    commit_ts: int
    seq: int


@dataclasses.dataclass(frozen=True, slots=True)
class _Transactions:
    """The transactions of a batch, t of them; the first is the one carried over (meaningless if there is none).

    Attributes:
        begin: int64[t], index of the B message; -1 for the first.
        commit: int64[t], index of the C message; one past the last message where it is not in this batch; -1 for the
            first if nothing was carried over.
        lsn, xid, commit_ts: [t].
        skipped: bool[t].
    """

    begin: Positions
    commit: Positions
    lsn: npt.NDArray[np.uint64]
    xid: npt.NDArray[np.uint32]
    commit_ts: npt.NDArray[np.int64]
    skipped: Mask


@dataclasses.dataclass(frozen=True, slots=True)
class _Changes:
    """The change messages that are not skipped: index of the message, of its transaction, and its number; int64[n]."""

    index: Positions
    transaction: Positions
    seq: Positions


class Decoder:
    """Owns the relations announced on ONE connection, and the transaction left open.

    A new connection needs a new Decoder; so does whoever goes on after a ProtocolError.
    """

    def __init__(self, skip_below: int) -> None:
        """Transactions whose commit LSN is below `skip_below` are dropped."""
        self._skip_below = skip_below
        self._relations: dict[int, Relation] = {}
        self._announced: dict[int, bytes] = {}
        self._open: _Open | None = None

    def decode(self, batch: WireBatch) -> Decoded:
        """Sort out the messages of `batch`, the next one of the connection.

        Raises:
            ProtocolError: the stream is malformed.
        """
        parts = [self._decode(wire) for wire in cut(batch.frames)]
        if len(parts) == 1:
            return parts[0]
        last = next((part for part in reversed(parts) if part.end_lsn is not None), None)
        return Decoded(
            [rows for part in parts for rows in part.rows],
            [message for part in parts for message in part.messages],
            sum(part.transactions for part in parts),
            None if last is None else last.end_lsn,
            None if last is None else last.commit_ts,
        )

    def _decode(self, wire: Wire) -> Decoded:
        transactions, commits = self._read_transactions(wire)
        changes = self._number(wire, transactions)
        versions, messages = self._read_rare(wire, transactions)
        end_lsn = commit_ts = None
        if len(commits):
            end_lsn = int(wire.numbers(wire.start[commits[-1:]] + 10, "u8")[0])
            commit_ts = int(wire.timestamps(wire.start[commits[-1:]] + 18)[0])
        committed = (transactions.commit >= 0) & (transactions.commit < len(wire.kind)) & ~transactions.skipped
        return Decoded(
            self._by_relation(wire, transactions, changes, versions),
            messages,
            int(np.count_nonzero(committed)),
            end_lsn,
            commit_ts,
        )

    def _read_transactions(self, wire: Wire) -> tuple[_Transactions, Positions]:
        """Read B and C; return the transactions, and the indexes of the Cs."""
        begins, commits = np.flatnonzero(wire.kind == _BEGIN), np.flatnonzero(wire.kind == _COMMIT)
        self._check_turns(wire, begins, commits)
        carried = self._open or _Open(0, 0, 0, 0)
        at = wire.start[begins]
        lsn = np.append(np.uint64(carried.lsn), wire.numbers(at + 1, "u8"))
        commit_ts = np.append(np.int64(carried.commit_ts), wire.timestamps(at + 9))
        xid = np.append(np.uint32(carried.xid), wire.numbers(at + 17, "u4").astype(np.uint32))
        commit = np.full(len(lsn), len(wire.kind), np.int64)
        if self._open is None:
            commit[0] = -1
        first = 0 if self._open else 1
        commit[first : first + len(commits)] = commits
        _check_commits(wire, commits, lsn[first : first + len(commits)])
        skipped = lsn < np.uint64(self._skip_below)
        return _Transactions(np.append(-1, begins), commit, lsn, xid, commit_ts, skipped), commits

    def _check_turns(self, wire: Wire, begins: Positions, commits: Positions) -> None:
        """Raise ProtocolError unless B and C take turns."""
        both = np.sort(np.concatenate([begins, commits]))
        inside = np.append(self._open is not None, wire.kind[both] == _BEGIN)
        wrong = inside[1:] == inside[:-1]
        if wrong.any():
            at = int(wire.start[both[int(wrong.argmax())]])
            found = "a Begin within a transaction" if inside[1:][wrong][0] else "a Commit without a Begin"
            raise ProtocolError(f"expected Begin and Commit to take turns, found {found}", at)

    def _number(self, wire: Wire, transactions: _Transactions) -> _Changes:
        """Number the changes, remember the transaction that stays open, and leave out what is skipped."""
        index = np.flatnonzero(_IS_CHANGE[wire.kind])
        before = np.searchsorted(index, transactions.begin)
        transaction = np.repeat(np.arange(len(before)), np.diff(before, append=len(index)))
        outside = index > transactions.commit[transaction]
        if outside.any():
            at = int(wire.start[index[int(outside.argmax())]])
            raise ProtocolError("expected a Begin before a change, found a change outside a transaction", at)
        total = np.arange(len(index) + 1)
        updates = np.flatnonzero(wire.kind[index] == _UPDATE)
        if len(updates):
            tag = wire.buffer[wire.start[index[updates]] + _TAG_OFFSET]
            double = np.zeros(len(index), np.int64)
            double[updates] = (tag == _KEY) | (tag == _OLD)
            total[1:] += np.cumsum(double)
            seq = total[1:] - double
        else:
            seq = total[1:]
        base = total[before]
        base[0] = -self._open.seq if self._open else 0
        seq = seq - base[transaction]
        self._remember_open(transactions, int(total[-1] - base[-1]), len(wire.kind))
        skipped = transactions.skipped[transaction]
        if skipped.any():
            kept = ~skipped
            return _Changes(index[kept], transaction[kept], seq[kept])
        return _Changes(index, transaction, seq)

    def _remember_open(self, transactions: _Transactions, seq: int, n_messages: int) -> None:
        if transactions.commit[-1] < n_messages:
            self._open = None
            return
        lsn, xid, commit_ts = transactions.lsn[-1], transactions.xid[-1], transactions.commit_ts[-1]
        self._open = _Open(int(lsn), int(xid), int(commit_ts), seq)

    def _read_rare(
        self, wire: Wire, transactions: _Transactions
    ) -> tuple[dict[int, list[tuple[int, Relation]]], list[LogicalMessage]]:
        """Read R, Y, O and M one by one.

        Returns:
            By OID, the versions of the relation that is valid from which message on (-1: from before), and the M
            messages.
        """
        versions = {oid: [(-1, relation)] for oid, relation in self._relations.items()}
        messages: list[LogicalMessage] = []
        for index in np.flatnonzero(_IS_RARE[wire.kind]).tolist():
            kind, offset, message = wire.kind[index], int(wire.start[index]), wire.message(index)
            if kind == _RELATION:
                relation = self._announce(message, offset)
                if relation is not None:
                    versions.setdefault(relation.oid, []).append((index, relation))
            elif kind == _TYPE:
                check_type(message, offset)
            elif kind == _ORIGIN:
                check_origin(message, offset)
            else:
                parsed = parse_logical_message(message, offset)
                if not parsed.transactional or not _is_skipped(transactions, index, offset):
                    messages.append(parsed)
        return versions, messages

    def _announce(self, message: bytes, offset: int) -> Relation | None:
        """Take note of an R message; return the relation if it differs from the one known."""
        oid = int.from_bytes(message[1:5], "big")
        if self._announced.get(oid) == message:
            return None
        relation = parse_relation(message, offset)
        self._announced[oid] = message
        if self._relations.get(oid) == relation:
            return None
        self._relations[oid] = relation
        return relation

    def _by_relation(
        self,
        wire: Wire,
        transactions: _Transactions,
        changes: _Changes,
        versions: dict[int, list[tuple[int, Relation]]],
    ) -> list[RelationRows]:
        """Divide the changes by relation and version."""
        pieces = [
            (int(changes.index[group[0]]), relation, group)
            for oid, rows in _by_oid(wire, changes)
            for relation, group in _by_version(wire, changes, oid, rows, versions)
        ]
        pieces.sort(key=lambda piece: piece[0])
        return [_rows(wire, transactions, changes, relation, group) for _, relation, group in pieces]


def _check_commits(wire: Wire, commits: Positions, begun: npt.NDArray[np.uint64]) -> None:
    """Raise ProtocolError unless each C has no flags, its B's commit LSN, and an end that is not before it."""
    at = wire.start[commits]
    commit_lsn, end_lsn = wire.numbers(at + 2, "u8"), wire.numbers(at + 10, "u8")
    good = (wire.buffer[at + 1] == 0) & (commit_lsn == begun) & (end_lsn >= commit_lsn)
    if not good.all():
        wrong = int(good.argmin())
        raise ProtocolError("expected a Commit without flags, with the commit LSN of its Begin", int(at[wrong]))


def _is_skipped(transactions: _Transactions, index: int, offset: int) -> bool:
    """Return whether the transaction around the message `index` is skipped."""
    at = int(np.searchsorted(transactions.begin, index)) - 1
    if index > transactions.commit[at]:
        raise ProtocolError("expected a Begin before a transactional M", offset)
    return bool(transactions.skipped[at])


def _by_oid(wire: Wire, changes: _Changes) -> Iterator[tuple[int, Positions]]:
    """Divide the changes by relation: OID, and indexes into `changes`; a T is in each of its relations."""
    row, oid = _oids(wire, changes)
    if not len(oid):
        return
    if oid[0] == oid[-1] and (oid == oid[0]).all():
        yield int(oid[0]), np.sort(row)
        return
    order = np.lexsort((row, oid))
    row, oid = row[order], oid[order]
    bounds = np.flatnonzero(np.diff(oid)) + 1
    for group, first in zip(np.split(row, bounds), np.append(0, bounds).tolist(), strict=True):
        yield int(oid[first]), group


def _oids(wire: Wire, changes: _Changes) -> tuple[Positions, npt.NDArray[np.uint64]]:
    """Return indexes into `changes` with the relation that each belongs to; a T yields as many as it has relations."""
    truncate = wire.kind[changes.index] == _TRUNCATE
    row = np.flatnonzero(~truncate)
    oid = wire.numbers(wire.start[changes.index[row]] + 1, "u4")
    rows, oids = [row], [oid]
    for at in np.flatnonzero(truncate).tolist():
        index = changes.index[at]
        truncated = parse_truncate(wire.message(index), int(wire.start[index]))
        rows.append(np.full(len(truncated), at))
        oids.append(np.array(truncated, np.uint64))
    return np.concatenate(rows), np.concatenate(oids)


def _by_version(
    wire: Wire, changes: _Changes, oid: int, rows: Positions, versions: dict[int, list[tuple[int, Relation]]]
) -> Iterator[tuple[Relation, Positions]]:
    """Divide the changes to one relation at its versions; versions without changes are left out."""
    index = changes.index[rows]
    known = versions.get(oid, [])
    bounds = np.searchsorted(index, [first for first, _ in known]).tolist()
    if not known or bounds[0] > 0:
        at = int(wire.start[index[0]])
        raise ProtocolError(f"expected a Relation message for {oid} before its changes, found none", at)
    for (_, relation), first, last in zip(known, bounds, [*bounds[1:], len(rows)], strict=True):
        if first < last:
            yield relation, rows[first:last]


def _rows(
    wire: Wire, transactions: _Transactions, changes: _Changes, relation: Relation, group: Positions
) -> RelationRows:
    """Assemble the rows at the indexes `group` into `changes`."""
    if len(group) == len(changes.index) and not np.any(wire.kind[changes.index] == _TRUNCATE):
        index, transaction, seq = changes.index, changes.transaction, changes.seq  # the only relation: no copies
    else:
        index, transaction, seq = changes.index[group], changes.transaction[group], changes.seq[group]
    return RelationRows(
        relation,
        wire.buffer,
        wire.start[index],
        wire.end[index],
        transactions.lsn[transaction],
        seq,
        transactions.xid[transaction],
        transactions.commit_ts[transaction],
    )
