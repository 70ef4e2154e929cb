"""Builds the frames of a logical-replication stream from Python values, and decodes them again, slowly.

The encoder follows the layout in cdc/pgoutput/messages.py, and so does the reference decoder, which walks row by row
with nothing of the columnar one but Relation and Column: two readings of the same manual that the tests compare.
"""

from __future__ import annotations

import dataclasses
import struct

from cdc.pgoutput.messages import POSTGRES_EPOCH_US, Column, Relation, WireBatch

Value = str | bytes | None | object
UNCHANGED = object()
"""Stands for unchanged TOAST in a tuple."""


def frame(message: bytes, lsn: int = 0) -> bytes:
    return struct.pack("!cQQq", b"w", lsn, lsn, 0) + message


def begin(lsn: int, xid: int = 1, commit_ts: int = 0) -> bytes:
    """Encode B; `commit_ts` is in microseconds since 1970."""
    return frame(b"B" + struct.pack("!QqI", lsn, commit_ts - POSTGRES_EPOCH_US, xid))


def commit(lsn: int, end_lsn: int | None = None, commit_ts: int = 0, flags: int = 0) -> bytes:
    end = lsn + 8 if end_lsn is None else end_lsn
    return frame(b"C" + struct.pack("!BQQq", flags, lsn, end, commit_ts - POSTGRES_EPOCH_US), end)


def origin(lsn: int = 1, name: str = "origin") -> bytes:
    return frame(b"O" + struct.pack("!Q", lsn) + name.encode() + b"\0")


def type_(oid: int = 20000, namespace: str = "public", name: str = "mood") -> bytes:
    return frame(b"Y" + struct.pack("!I", oid) + namespace.encode() + b"\0" + name.encode() + b"\0")


def relation(described: Relation) -> bytes:
    head = struct.pack("!I", described.oid) + described.namespace.encode() + b"\0" + described.name.encode() + b"\0"
    columns = b"".join(
        struct.pack("!B", column.is_key)
        + column.name.encode()
        + b"\0"
        + struct.pack("!Ii", column.type_oid, column.typmod)
        for column in described.columns
    )
    identity = described.replica_identity.encode()
    return frame(b"R" + head + identity + struct.pack("!h", len(described.columns)) + columns)


def values(*cells: Value) -> bytes:
    """Encode a tuple: str or bytes as text, None as NULL, UNCHANGED as such."""
    encoded = [struct.pack("!h", len(cells))]
    for cell in cells:
        if cell is None:
            encoded.append(b"n")
        elif cell is UNCHANGED:
            encoded.append(b"u")
        else:
            content = cell if isinstance(cell, bytes) else str(cell).encode()
            encoded.append(b"t" + struct.pack("!i", len(content)) + content)
    return b"".join(encoded)


def insert(oid: int, *cells: Value) -> bytes:
    return frame(b"I" + struct.pack("!I", oid) + b"N" + values(*cells))


def update(
    oid: int, *cells: Value, key: tuple[Value, ...] | None = None, old: tuple[Value, ...] | None = None
) -> bytes:
    before = b"" if key is None else b"K" + values(*key)
    before = before if old is None else b"O" + values(*old)
    return frame(b"U" + struct.pack("!I", oid) + before + b"N" + values(*cells))


def delete(oid: int, *cells: Value, whole: bool = False) -> bytes:
    return frame(b"D" + struct.pack("!I", oid) + (b"O" if whole else b"K") + values(*cells))


def truncate(*oids: int, options: int = 0) -> bytes:
    return frame(b"T" + struct.pack("!iB", len(oids), options) + struct.pack(f"!{len(oids)}I", *oids))


def logical_message(prefix: str, content: bytes, lsn: int = 1, transactional: bool = True) -> bytes:
    head = struct.pack("!BQ", transactional, lsn) + prefix.encode() + b"\0"
    return frame(b"M" + head + struct.pack("!i", len(content)) + content)


def batch(*frames: bytes, complete: bool = True) -> WireBatch:
    return WireBatch(list(frames), complete)


def table(
    oid: int = 16384, identity: str = "d", types: str = "it", key: tuple[int, ...] = (0,), name: str = "t"
) -> Relation:
    """Describe a table; `types` has a letter per column: i int4, t text."""
    oids = {"i": 23, "t": 25}
    columns = tuple(
        Column(f"c{index}", oids[letter], -1, identity == "f" or index in key) for index, letter in enumerate(types)
    )
    return Relation(oid, "public", name, identity, columns)


@dataclasses.dataclass(frozen=True)
class Row:
    """A change as the reference decoder sees it; cells are bytes, None, or UNCHANGED."""

    op: str
    lsn: int
    seq: int
    xid: int
    commit_ts: int
    cells: tuple[Value, ...]


class Reference:
    """The decoder as one would first write it: message by message, value by value."""

    def __init__(self, skip_below: int = 0) -> None:
        self.skip_below = skip_below
        self.rows: dict[int, list[tuple[Relation, Row]]] = {}
        self.relations: dict[int, Relation] = {}
        self.lsn = self.xid = self.commit_ts = self.seq = 0

    def feed(self, data: bytes) -> None:
        """Take one frame."""
        message = data[25:]
        kind = message[:1]
        if kind == b"B":
            self.lsn, wire_ts, self.xid = struct.unpack("!QqI", message[1:])
            self.commit_ts, self.seq = wire_ts + POSTGRES_EPOCH_US, 0
        elif kind == b"R":
            self._relation(message)
        elif kind == b"T":
            self.seq += 1
            count = struct.unpack_from("!i", message, 1)[0]
            for oid in struct.unpack_from(f"!{count}I", message, 6):
                self._add(oid, "T", (None,) * len(self.relations[oid].columns))
        elif kind in (b"I", b"U", b"D"):
            self._change(kind.decode(), message)

    def _relation(self, message: bytes) -> None:
        oid = struct.unpack_from("!I", message, 1)[0]
        namespace, name, rest = message[5:].split(b"\0", 2)
        identity, count = chr(rest[0]), struct.unpack_from("!h", rest, 1)[0]
        rest = rest[3:]
        columns = []
        for _ in range(count):
            flags, (column, rest) = rest[0], rest[1:].split(b"\0", 1)
            type_oid, typmod = struct.unpack_from("!Ii", rest)
            rest = rest[8:]
            columns.append(Column(column.decode(), type_oid, typmod, flags == 1))
        self.relations[oid] = Relation(oid, namespace.decode(), name.decode(), identity, tuple(columns))

    def _change(self, kind: str, message: bytes) -> None:
        oid = struct.unpack_from("!I", message, 1)[0]
        tag, (first, rest) = message[5:6], self._tuple(message[6:])
        self.seq += 1
        if tag == b"N" or kind == "D":
            self._add(oid, kind, first)
            return
        self._add(oid, "D", first)
        self.seq += 1
        second, _ = self._tuple(rest[1:])
        columns = self.relations[oid].columns
        cells = [
            old if new is UNCHANGED and (tag == b"O" or column.is_key) else new
            for old, new, column in zip(first, second, columns, strict=True)
        ]
        self._add(oid, "I", tuple(cells))

    def _tuple(self, data: bytes) -> tuple[tuple[Value, ...], bytes]:
        count, data = struct.unpack_from("!h", data)[0], data[2:]
        cells: list[Value] = []
        for _ in range(count):
            kind, data = data[:1], data[1:]
            if kind == b"t":
                length = struct.unpack_from("!i", data)[0]
                cells.append(data[4 : 4 + length])
                data = data[4 + length :]
            else:
                cells.append(UNCHANGED if kind == b"u" else None)
        return tuple(cells), data

    def _add(self, oid: int, op: str, cells: tuple[Value, ...]) -> None:
        if self.lsn >= self.skip_below:
            row = Row(op, self.lsn, self.seq, self.xid, self.commit_ts, cells)
            self.rows.setdefault(oid, []).append((self.relations[oid], row))
