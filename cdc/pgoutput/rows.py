"""The change messages of one version of a relation, cut out of a batch but not decoded: cheap to filter and to keep."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cdc.pgoutput.messages import Column, Relation
from cdc.pgoutput.tuples import PADDING_BYTES, gather, views_of

__all__ = ["RelationRows"]

_LEAD_BYTES = 16
"""What stands before the first message in a buffer made by `from_ipc`: `views_of` reads a little before a slice."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class RelationRows:
    """n change messages (I, U, D, T) of one relation version, in stream order.

    Attributes:
        relation: the version that was valid for all of them.
        buffer: uint8, all messages of the batch, followed by at least 16 bytes; other bytes may stand in between.
        start: int64[n], position of each message's kind byte; at least 4.
        end: int64[n], one past each message's last byte.
        lsn: uint64[n], commit LSN of the transaction.
        seq: int64[n], ordinal of the change within its transaction, from 1, counted over all tables.
        xid: uint32[n].
        commit_ts: int64[n], microseconds since 1970 UTC.
    """

    relation: Relation
    buffer: npt.NDArray[np.uint8]
    start: npt.NDArray[np.int64]
    end: npt.NDArray[np.int64]
    lsn: npt.NDArray[np.uint64]
    seq: npt.NDArray[np.int64]
    xid: npt.NDArray[np.uint32]
    commit_ts: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.start)

    def after(self, lsn: int) -> RelationRows:
        """Return the rows whose transaction committed at `lsn` or later."""
        wanted = self.lsn >= np.uint64(lsn)
        if wanted.all():
            return self
        return RelationRows(
            self.relation,
            self.buffer,
            self.start[wanted],
            self.end[wanted],
            self.lsn[wanted],
            self.seq[wanted],
            self.xid[wanted],
            self.commit_ts[wanted],
        )

    def to_ipc(self) -> bytes:
        """Return these rows, without the rest of the batch, as an Arrow IPC stream that `from_ipc` reads."""
        views = views_of(self.buffer, self.start, self.end - self.start)
        batch = pa.record_batch(
            [
                pa.array(self.lsn),
                pa.array(self.seq),
                pa.array(self.xid),
                pa.array(self.commit_ts),
                gather(self.buffer, views, None),
            ],
            schema=_ipc_schema(self.relation),
        )
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        content: bytes = sink.getvalue().to_pybytes()
        return content

    @classmethod
    def from_ipc(cls, content: bytes) -> RelationRows:
        """Return the rows that `to_ipc` wrote.

        Raises:
            pyarrow.ArrowInvalid: `content` is no such stream.
        """
        with pa.ipc.open_stream(content) as reader:
            batch = reader.read_next_batch()
            relation = _relation_from_json(reader.schema.metadata[b"relation"])
        lsn, seq, xid, commit_ts = (batch.column(i).to_numpy() for i in range(4))
        return cls.of_messages(relation, batch.column(4), lsn, seq, xid, commit_ts)

    @classmethod
    def of_messages(
        cls,
        relation: Relation,
        messages: pa.BinaryArray,
        lsn: npt.NDArray[np.uint64],
        seq: npt.NDArray[np.int64],
        xid: npt.NDArray[np.uint32],
        commit_ts: npt.NDArray[np.int64],
    ) -> RelationRows:
        """Return n rows whose messages are the elements of an Arrow array (of offset 0, without NULLs)."""
        _, offsets_buffer, data = messages.buffers()
        offsets = np.frombuffer(offsets_buffer, np.int32, len(messages) + 1).astype(np.int64)
        content = np.frombuffer(data, np.uint8, int(offsets[-1]))
        buffer = np.zeros(_LEAD_BYTES + len(content) + PADDING_BYTES, np.uint8)
        buffer[_LEAD_BYTES : _LEAD_BYTES + len(content)] = content
        offsets += _LEAD_BYTES
        return cls(relation, buffer, offsets[:-1], offsets[1:], lsn, seq, xid, commit_ts)


def _ipc_schema(relation: Relation) -> pa.Schema:
    """Return the schema of the stream: the columns, and the relation as metadata."""
    fields = [("lsn", pa.uint64()), ("seq", pa.int64()), ("xid", pa.uint32()), ("commit_ts", pa.int64())]
    return pa.schema([*fields, ("message", pa.binary())], {"relation": _relation_to_json(relation)})


def _relation_to_json(relation: Relation) -> str:
    return json.dumps(dataclasses.asdict(relation))


def _relation_from_json(text: bytes) -> Relation:
    fields = json.loads(text)
    columns = tuple(Column(**column) for column in fields.pop("columns"))
    return Relation(columns=columns, **fields)
