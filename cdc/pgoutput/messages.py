"""The messages of the logical-replication protocol, under Postgres' own names.

Wire layout (big endian; ``z`` is a NUL-terminated string), protocol version 1:

    B Begin     final_lsn u64, commit_ts i64, xid u32
    C Commit    flags u8 = 0, commit_lsn u64, end_lsn u64, commit_ts i64
    O Origin    origin_lsn u64, name z
    R Relation  oid u32, namespace z ('' is pg_catalog), name z, replica identity u8 (d n f i), ncols i16,
                per column: flags u8 (1: part of the replica identity), name z, type oid u32, typmod i32
    Y Type      oid u32, namespace z, name z
    I Insert    oid u32, 'N', tuple
    U Update    oid u32, ['K' tuple | 'O' tuple], 'N' tuple
    D Delete    oid u32, 'K' tuple | 'O' tuple
    T Truncate  nrels i32, options u8 (1: CASCADE, 2: RESTART IDENTITY), oid u32 each
    M Message   flags u8 (1: transactional), lsn u64, prefix z, length i32, content

    tuple       ncols i16, per column: 'n' NULL | 'u' unchanged TOAST | 't' length i32, bytes

Timestamps are microseconds since 2000-01-01 UTC on the wire. Each message comes in one XLogData frame:
'w', dataStart u64, walEnd u64, sendTime i64, then the message.

Source: PostgreSQL manual, "Logical Replication Message Formats" and "Streaming Replication Protocol".
"""

from __future__ import annotations

import dataclasses
import struct

from cdc.errors import ProtocolError
from cdc.pgoutput.types import ColumnType, column_type

__all__ = [
    "FRAME_HEADER_BYTES",
    "POSTGRES_EPOCH_US",
    "Column",
    "LogicalMessage",
    "Relation",
    "WireBatch",
    "check_origin",
    "check_type",
    "parse_logical_message",
    "parse_relation",
    "parse_truncate",
]

FRAME_HEADER_BYTES = 25
"""Length of the XLogData header in front of each message."""

POSTGRES_EPOCH_US = 946_684_800_000_000
"""2000-01-01 UTC in microseconds since 1970-01-01 UTC."""


@dataclasses.dataclass(frozen=True, slots=True)
class WireBatch:
    """A run of XLogData frames, as received.

    Attributes:
        frames: whole frames, header included, in stream order; begins at a Begin, or within the transaction that
            the previous batch left open.
        complete: whether the last frame is a Commit. If not, the transaction goes on in the next batch.
        full: whether it was cut for its size: the next one is likely on its way.
    """

    frames: list[bytes]
    complete: bool
    full: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Column:
    """One column of a Relation.

    Attributes:
        is_key: part of the replica identity (all are, under REPLICA IDENTITY FULL).
    """

    name: str
    type_oid: int
    typmod: int
    is_key: bool

    @property
    def kind(self) -> ColumnType:
        """How a column of this type is held."""
        return column_type(self.type_oid, self.typmod)


@dataclasses.dataclass(frozen=True, slots=True)
class Relation:
    """A table as the stream describes it.

    Attributes:
        replica_identity: ``d`` default, ``n`` nothing, ``f`` full, ``i`` index.
    """

    oid: int
    namespace: str
    name: str
    replica_identity: str
    columns: tuple[Column, ...]

    @property
    def key(self) -> tuple[int, ...]:
        """Indexes of the columns that identify a row; empty where only the whole row can (FULL), or nothing does."""
        if self.replica_identity not in ("d", "i"):
            return ()
        return tuple(i for i, column in enumerate(self.columns) if column.is_key)

    def __str__(self) -> str:
        return f"{self.namespace}.{self.name}"


@dataclasses.dataclass(frozen=True, slots=True)
class LogicalMessage:
    """What ``pg_logical_emit_message`` wrote."""

    transactional: bool
    lsn: int
    prefix: str
    content: bytes


class _Reader:
    """Reads one message from front to back; whatever lies beyond its end raises ProtocolError."""

    def __init__(self, message: bytes, offset: int) -> None:
        self._message = message
        self._offset = offset
        self._at = 1

    def number(self, layout: struct.Struct) -> int:
        """Return the number of `layout` (one field) at the cursor."""
        at = self._at
        if at + layout.size > len(self._message):
            raise self.error(f"expected {layout.size} more bytes, the message has {len(self._message) - at}")
        self._at = at + layout.size
        value: int = layout.unpack_from(self._message, at)[0]
        return value

    def string(self) -> str:
        """Return the NUL-terminated string at the cursor; bytes that are no UTF-8 (SQL_ASCII) as backslash escapes."""
        stop = self._message.find(b"\0", self._at)
        if stop < 0:
            raise self.error("expected a NUL-terminated string, found no NUL")
        text = self._message[self._at : stop].decode("utf-8", "backslashreplace")
        self._at = stop + 1
        return text

    def content(self, length: int) -> bytes:
        """Return the next `length` bytes."""
        if not 0 <= length <= len(self._message) - self._at:
            raise self.error(f"expected {length} bytes, the message has {len(self._message) - self._at}")
        content = self._message[self._at : self._at + length]
        self._at += length
        return content

    def finish(self) -> None:
        """Raise ProtocolError unless everything was read."""
        left = len(self._message) - self._at
        if left:
            raise self.error(f"expected the end of the message, found {left} more bytes")

    def error(self, message: str) -> ProtocolError:
        """Return a ProtocolError at the cursor."""
        return ProtocolError(f"{chr(self._message[0])} message: {message}", self._offset + self._at)


_U8, _I16, _I32 = struct.Struct("!B"), struct.Struct("!h"), struct.Struct("!i")
_U32, _U64 = struct.Struct("!I"), struct.Struct("!Q")

# Each function below takes a whole message from its kind byte on (that byte is known to be right), and the offset of
# that byte for errors. Each raises ProtocolError if the message is shorter or longer than its layout.


def parse_relation(message: bytes, offset: int) -> Relation:
    """Parse an R message."""
    reader = _Reader(message, offset)
    oid = reader.number(_U32)
    namespace = reader.string() or "pg_catalog"
    name = reader.string()
    identity = chr(reader.number(_U8))
    if identity not in "dnfi":
        raise reader.error(f"expected a replica identity d, n, f or i, found {identity!r}")
    n_columns = reader.number(_I16)
    if n_columns < 0:
        raise reader.error(f"expected a number of columns, found {n_columns}")
    columns = tuple(_parse_column(reader) for _ in range(n_columns))
    reader.finish()
    return Relation(oid, namespace, name, identity, columns)


def _parse_column(reader: _Reader) -> Column:
    flags = reader.number(_U8)
    name = reader.string()
    type_oid = reader.number(_U32)
    return Column(name, type_oid, reader.number(_I32), bool(flags & 1))


def parse_truncate(message: bytes, offset: int) -> tuple[int, ...]:
    """Parse a T message: the OIDs of the relations it empties."""
    reader = _Reader(message, offset)
    count = reader.number(_I32)
    reader.number(_U8)  # CASCADE and RESTART IDENTITY: the cascaded tables are listed too, and we keep no sequences
    if not 0 <= count <= len(message) // _U32.size:
        raise reader.error(f"expected a number of relations, found {count}")
    oids = tuple(reader.number(_U32) for _ in range(count))
    reader.finish()
    return oids


def parse_logical_message(message: bytes, offset: int) -> LogicalMessage:
    """Parse an M message."""
    reader = _Reader(message, offset)
    flags = reader.number(_U8)
    if flags not in (0, 1):
        raise reader.error(f"expected flags 0 or 1, found {flags}")
    lsn = reader.number(_U64)
    prefix = reader.string()
    content = reader.content(reader.number(_I32))
    reader.finish()
    return LogicalMessage(flags == 1, lsn, prefix, content)


def check_type(message: bytes, offset: int) -> None:
    """Check the layout of a Y message; types are known by their OIDs alone, so nothing of it is kept."""
    reader = _Reader(message, offset)
    reader.number(_U32)
    reader.string()
    reader.string()
    reader.finish()


def check_origin(message: bytes, offset: int) -> None:
    """Check the layout of an O message; where a transaction came from first makes no difference here."""
    reader = _Reader(message, offset)
    reader.number(_U64)
    reader.string()
    reader.finish()
