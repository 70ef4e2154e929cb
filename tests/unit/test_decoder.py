"""The decoder against a slow reference, and against streams that no server sends."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdc.errors import ProtocolError
from cdc.pgoutput import frames as framing
from cdc.pgoutput.decoder import Decoded, Decoder, RelationRows, TableChanges, decode_rows
from cdc.pgoutput.messages import Column, Relation, WireBatch
from tests.unit import wire
from tests.unit.wire import UNCHANGED, Reference, Row

OID = 16384
T = wire.table()
FULL = wire.table(identity="f")


def decode(*frames: bytes, skip_below: int = 0) -> Decoded:
    return Decoder(skip_below).decode(wire.batch(*frames))


def changes(*frames: bytes, described: Relation = T) -> TableChanges:
    """Decode one transaction that touches one table."""
    (rows,) = decode(wire.begin(100), wire.relation(described), *frames, wire.commit(100)).rows
    return decode_rows(rows)


def cells(decoded: TableChanges) -> list[tuple[object, ...]]:
    return [tuple(row) for row in zip(*(column.to_pylist() for column in decoded.columns), strict=True)]


def ops(decoded: TableChanges) -> str:
    return decoded.op.tobytes().decode()


def test_insert_update_delete() -> None:
    """C1."""
    decoded = changes(
        wire.insert(OID, "1", "a"), wire.update(OID, "1", None), wire.delete(OID, "1", None), wire.insert(OID, "2", "")
    )
    assert ops(decoded) == "IUDI"
    assert cells(decoded) == [(1, "a"), (1, None), (1, None), (2, "")]
    assert decoded.seq.tolist() == [1, 2, 3, 4]
    assert decoded.unchanged == {}
    assert decoded.unfit == []


def test_transactions_carry_lsn_xid_and_time() -> None:
    decoded = decode(
        wire.begin(100, xid=7, commit_ts=1_700_000_000_000_000),
        wire.relation(T),
        wire.insert(OID, "1", "a"),
        wire.commit(100, 108, 1_700_000_000_000_000),
        wire.begin(200, xid=4_294_967_295, commit_ts=-5),
        wire.insert(OID, "2", "b"),
        wire.insert(OID, "3", "c"),
        wire.commit(200, 2**64 - 1, -5),
    )
    (rows,) = decoded.rows
    assert rows.lsn.tolist() == [100, 200, 200]
    assert rows.seq.tolist() == [1, 1, 2]
    assert rows.xid.tolist() == [7, 4_294_967_295, 4_294_967_295]
    assert rows.commit_ts.tolist() == [1_700_000_000_000_000, -5, -5]
    assert (decoded.transactions, decoded.end_lsn, decoded.commit_ts) == (2, 2**64 - 1, -5)
    assert [a.dtype for a in (rows.start, rows.end, rows.lsn, rows.seq, rows.xid, rows.commit_ts)] == [
        *[np.int64, np.int64, np.uint64, np.int64, np.uint32, np.int64]
    ]


def test_key_change_is_a_delete_and_an_insert() -> None:
    """C5, trap 6: 'n' in a K tuple is filler."""
    decoded = changes(
        wire.insert(OID, "9", "z"),
        wire.update(OID, "2", "a", key=("1", None)),
        wire.update(OID, "3", UNCHANGED, key=("2", None)),
        wire.insert(OID, "4", "b"),
    )
    assert ops(decoded) == "IDIDII"
    assert cells(decoded) == [(9, "z"), (1, None), (2, "a"), (2, None), (3, None), (4, "b")]
    assert decoded.seq.tolist() == [1, 2, 3, 4, 5, 6]
    assert {column: mask.tolist() for column, mask in decoded.unchanged.items()} == {
        1: [False, False, False, False, True, False]
    }


def test_toasted_key_comes_from_the_old_tuple() -> None:
    """D6, trap 5: U = K (the whole key) + N with 'u' in the key column."""
    described = wire.table(types="tti", key=(0, 2))
    decoded = changes(wire.update(OID, UNCHANGED, UNCHANGED, "2", key=("long" * 9, None, "1")), described=described)
    assert cells(decoded) == [("long" * 9, None, 1), ("long" * 9, None, 2)]
    assert {column: mask.tolist() for column, mask in decoded.unchanged.items()} == {1: [False, True]}


def test_full_identity_fills_unchanged_toast() -> None:
    """D1 and C10: an O tuple is whole, so nothing stays unresolved, NULL included."""
    decoded = changes(
        wire.update(OID, "2", UNCHANGED, old=("1", "v" * 20)),
        wire.update(OID, "2", UNCHANGED, old=("1", None)),
        wire.delete(OID, "2", "w", whole=True),
        described=FULL,
    )
    assert ops(decoded) == "DIDID"
    assert cells(decoded) == [(1, "v" * 20), (2, "v" * 20), (1, None), (2, None), (2, "w")]
    assert decoded.seq.tolist() == [1, 2, 3, 4, 5]
    assert decoded.unchanged == {}


def test_unchanged_toast_without_old_tuple_is_told_from_null() -> None:
    """D1, D10."""
    decoded = changes(wire.update(OID, "1", UNCHANGED), wire.update(OID, "2", None))
    assert ops(decoded) == "UU"
    assert cells(decoded) == [(1, None), (2, None)]
    assert {column: mask.tolist() for column, mask in decoded.unchanged.items()} == {1: [True, False]}


def test_truncate_of_several_tables() -> None:
    """E2, E4: one ordinal for the message, one row in each of its tables."""
    other = wire.table(OID + 1, types="tit", name="u")
    decoded = decode(
        wire.begin(100),
        wire.relation(T),
        wire.relation(other),
        wire.insert(OID, "1", "a"),
        wire.truncate(OID + 1, OID, options=3),
        wire.insert(OID + 1, "x", "1", "y"),
        wire.insert(OID, "2", "b"),
        wire.commit(100),
    )
    first, second = (decode_rows(rows) for rows in decoded.rows)
    assert (first.relation, second.relation) == (T, other)
    assert (ops(first), first.seq.tolist(), cells(first)) == ("ITI", [1, 2, 4], [(1, "a"), (None, None), (2, "b")])
    assert (ops(second), second.seq.tolist()) == ("TI", [2, 3])
    assert cells(second) == [(None, None, None), ("x", 1, "y")]


def test_truncate_in_the_midst_of_one_table() -> None:
    """E4: rows stay in stream order, also where the table is the only one of the batch."""
    decoded = changes(
        wire.insert(OID, "1", "a"), wire.truncate(OID), wire.update(OID, "3", "c", key=("2", None)), wire.truncate(OID)
    )
    assert ops(decoded) == "ITDIT"
    assert decoded.seq.tolist() == [1, 2, 3, 4, 5]
    assert cells(decoded) == [(1, "a"), (None, None), (2, None), (3, "c"), (None, None)]


def test_truncate_of_nothing() -> None:
    assert decode(wire.begin(1), wire.truncate(), wire.commit(1)).rows == []


def test_only_truncates() -> None:
    decoded = changes(wire.truncate(OID), wire.truncate(OID))
    assert (ops(decoded), cells(decoded)) == ("TT", [(None, None)] * 2)


def test_skips_whole_transactions_below() -> None:
    """Trap 1 and J1: a commit LSN that equals the checkpoint is NOT skipped."""
    stream = (
        wire.begin(100),
        wire.relation(T),
        wire.insert(OID, "1", "a"),
        wire.logical_message("p", b"1"),
        wire.commit(100, 150),
        wire.logical_message("p", b"2", transactional=False),
        wire.begin(150),
        wire.insert(OID, "2", "b"),
        wire.logical_message("p", b"3"),
        wire.commit(150, 160),
    )
    decoded = decode(*stream, skip_below=150)
    assert decoded.rows[0].lsn.tolist() == [150]
    assert decoded.transactions == 1
    assert [message.content for message in decoded.messages] == [b"2", b"3"]
    nothing = decode(*stream, skip_below=151)
    assert (nothing.rows, nothing.transactions, nothing.end_lsn) == ([], 0, 160)


def test_relation_of_a_skipped_transaction_counts() -> None:
    decoder = Decoder(150)
    decoder.decode(wire.batch(wire.begin(100), wire.relation(T), wire.insert(OID, "1", "a"), wire.commit(100)))
    assert decoder.decode(wire.batch(wire.begin(150), wire.insert(OID, "1", "a"), wire.commit(150))).rows


def test_equal_relation_changes_nothing() -> None:
    decoded = decode(
        wire.begin(1), wire.relation(T), wire.insert(OID, "1", "a"), wire.relation(T), wire.insert(OID, "2", "b"),
        wire.commit(1),
    )  # fmt: skip
    assert [len(rows) for rows in decoded.rows] == [2]


def test_relation_that_differs_in_bytes_only_changes_nothing() -> None:
    """A column flag that has no meaning yet."""
    plain = wire.relation(T)
    flagged = plain.replace(b"\1c0\0", b"\3c0\0")
    assert flagged != plain
    stream = (plain, wire.insert(OID, "1", "a"), flagged, wire.insert(OID, "2", "b"))
    decoded = decode(wire.begin(1), *stream, wire.commit(1))
    assert [len(rows) for rows in decoded.rows] == [2]


def test_changed_relation_begins_a_version() -> None:
    """H2: ALTER within a transaction; and back again is a third version."""
    wider = wire.table(types="itt")
    decoded = decode(
        wire.begin(1),
        wire.relation(T),
        wire.insert(OID, "1", "a"),
        wire.relation(wider),
        wire.insert(OID, "2", "b", "c"),
        wire.truncate(OID),
        wire.relation(T),
        wire.insert(OID, "3", "d"),
        wire.commit(1),
    )
    assert [(rows.relation, rows.seq.tolist()) for rows in decoded.rows] == [(T, [1]), (wider, [2, 3]), (T, [4])]
    assert [cells(decode_rows(rows)) for rows in decoded.rows] == [
        [(1, "a")],
        [(2, "b", "c"), (None, None, None)],
        [(3, "d")],
    ]


def test_versions_of_interleaved_tables_are_in_stream_order() -> None:
    other = wire.table(OID + 1, name="u")
    decoded = decode(
        wire.begin(1),
        wire.relation(T),
        wire.relation(other),
        wire.insert(OID + 1, "1", "a"),
        wire.insert(OID, "2", "b"),
        wire.relation(dataclasses.replace(other, name="v")),
        wire.insert(OID + 1, "3", "c"),
        wire.commit(1),
    )
    assert [(rows.relation.name, rows.seq.tolist()) for rows in decoded.rows] == [("u", [1]), ("t", [2]), ("v", [3])]


def test_transaction_over_several_batches() -> None:
    """C17, L2: lsn, xid, time and ordinals go on."""
    decoder = Decoder(0)
    pieces = [
        wire.batch(wire.begin(500, 9, 77), wire.relation(T), wire.update(OID, "2", "a", key=("1", None)),
                   complete=False),
        wire.batch(wire.insert(OID, "3", "b"), complete=False),
        wire.batch(complete=False),
        wire.batch(wire.insert(OID, "4", "c"), wire.commit(500, 508, 77), wire.begin(600), wire.insert(OID, "5", "d"),
                   complete=False),
        wire.batch(wire.commit(600, 608)),
    ]  # fmt: skip
    decoded = [decoder.decode(piece) for piece in pieces]
    tables = [decode_rows(rows) for part in decoded for rows in part.rows]
    assert [(int(lsn), int(seq), int(xid), int(ts)) for t in tables
            for lsn, seq, xid, ts in zip(t.lsn, t.seq, t.xid, t.commit_ts, strict=True)] == [
        (500, 1, 9, 77), (500, 2, 9, 77), (500, 3, 9, 77), (500, 4, 9, 77), (600, 1, 1, 0),
    ]  # fmt: skip
    assert [part.transactions for part in decoded] == [0, 0, 0, 1, 1]
    assert [part.end_lsn for part in decoded] == [None, None, None, 508, 608]
    assert [part.commit_ts for part in decoded] == [None, None, None, 77, 0]


def test_skipped_transaction_over_several_batches() -> None:
    decoder = Decoder(501)
    assert decoder.decode(wire.batch(wire.begin(500), wire.relation(T), complete=False)).rows == []
    rest = decoder.decode(wire.batch(wire.insert(OID, "1", "a"), wire.logical_message("p", b""), wire.commit(500)))
    assert (rest.rows, rest.messages, rest.transactions, rest.end_lsn) == ([], [], 0, 508)


def test_table_without_columns() -> None:
    """B4."""
    decoded = changes(wire.insert(OID), wire.insert(OID), described=wire.table(types="", key=()))
    assert (ops(decoded), decoded.columns) == ("II", [])


def test_messages_origins_and_types() -> None:
    """I7, I8."""
    decoded = decode(
        wire.logical_message("é", b"\0\xff", lsn=5, transactional=False),
        wire.begin(1),
        wire.origin(),
        wire.type_(),
        wire.relation(T),
        wire.logical_message("", b"", lsn=6),
        wire.commit(1),
    )
    assert [(m.transactional, m.lsn, m.prefix, m.content) for m in decoded.messages] == [
        (False, 5, "é", b"\0\xff"),
        (True, 6, "", b""),
    ]
    assert decoded.rows == []


def test_names_are_kept() -> None:
    """B1: quotes, spaces, emoji; '' as the namespace is pg_catalog; no UTF-8 becomes escapes (J20)."""
    columns = (Column('a "b\\', 25, -1, True), Column("😀 ", 25, -1, False))
    described = Relation(OID, "S p", "naïve.t", "d", columns)
    assert changes(wire.insert(OID, "", ""), described=described).relation == described
    catalog = dataclasses.replace(T, namespace="")
    assert changes(wire.insert(OID, "1", ""), described=catalog).relation.namespace == "pg_catalog"
    latin = wire.relation(dataclasses.replace(T, name="naive")).replace(b"naive", b"na\xefve")
    decoded = decode(wire.begin(1), latin, wire.insert(OID, "1", ""), wire.commit(1))
    assert decoded.rows[0].relation.name == "na\\xefve"


def test_relation_flags() -> None:
    assert changes(wire.insert(OID, "1", "a"), described=FULL).relation.key == ()
    described = wire.table(types="tit", key=(2, 0), identity="i")
    assert changes(wire.insert(OID, "1", "2", "a"), described=described).relation.key == (0, 2)


def test_invalid_utf8_is_unfit() -> None:
    """J20: NULL in the column, backslash escapes beside it."""
    decoded = changes(wire.insert(OID, "1", b"caf\xe9"), wire.insert(OID, b"\xff", "ok"), wire.insert(OID, "3", "é"))
    assert cells(decoded) == [(1, None), (None, "ok"), (3, "é")]
    assert [(u.column, u.rows.tolist(), u.texts) for u in decoded.unfit] == [
        (0, [1], ["\\xff"]),
        (1, [0], ["caf\\xe9"]),
    ]


def test_values_that_do_not_fit() -> None:
    """A3, A6: NULL in the column, the exact text beside it; in the old tuple and the new."""
    described = Relation(
        OID, "public", "t", "f", (Column("n", 1700, (5 << 16 | 1) + 4, True), Column("d", 1007, -1, True))
    )
    decoded = changes(
        wire.insert(OID, "1.5", "{1}"),
        wire.update(OID, "NaN", "{{1}}", old=("Infinity", "{1}")),
        described=described,
    )
    assert [column.null_count for column in decoded.columns] == [2, 1]
    assert [(u.column, u.rows.tolist(), u.texts) for u in decoded.unfit] == [
        (0, [1, 2], ["Infinity", "NaN"]),
        (1, [2], ["{{1}}"]),
    ]


def test_many_rows_cross_the_chunks() -> None:
    """NULLs and long values in some chunks only."""
    n = 20_000
    expected = [(i, None if i % 9000 == 5 else "é" * (i % 23)) for i in range(n)]
    decoded = changes(*(wire.insert(OID, str(number), text) for number, text in expected))
    assert cells(decoded) == expected
    assert decoded.unchanged == {}


def test_batch_larger_than_a_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch is cut where its positions would no longer fit; nothing else changes."""
    stream = [wire.begin(1), wire.relation(T), *(wire.insert(OID, str(i), "x" * i) for i in range(50)), wire.commit(1)]
    (whole,) = decode(*stream).rows
    monkeypatch.setattr(framing, "_MOST_BYTES", 200)
    decoded = decode(*stream)
    assert len(decoded.rows) > 5
    assert (decoded.transactions, decoded.end_lsn) == (1, 9)
    assert [row for rows in decoded.rows for row in cells(decode_rows(rows))] == cells(decode_rows(whole))
    assert np.concatenate([rows.seq for rows in decoded.rows]).tolist() == whole.seq.tolist()
    with pytest.raises(ProtocolError, match="at most"):
        decode(wire.frame(b"M" + b"x" * 300))


def test_after() -> None:
    (rows,) = decode(
        wire.begin(1), wire.relation(T), wire.insert(OID, "1", "a"), wire.commit(1),
        wire.begin(5), wire.insert(OID, "2", "b"), wire.commit(5),
    ).rows  # fmt: skip
    assert rows.after(1) is rows
    assert cells(decode_rows(rows.after(5))) == [(2, "b")]
    empty = rows.after(2**64 - 1)
    assert len(empty) == 0
    assert cells(decode_rows(empty)) == []
    assert decode_rows(empty).columns[0].type == pa.int32()
    assert len(RelationRows.from_ipc(empty.to_ipc())) == 0


def test_ipc_round_trip() -> None:
    described = Relation(OID, 'p"q', "té", "f", (Column("a", 23, -1, True), Column("😀", 1700, 655366, True)))
    stream = [
        wire.begin(2**63, 2**32 - 1, 123), wire.relation(described), wire.insert(OID, "1", "1.50"),
        wire.truncate(OID, OID), wire.update(OID, "2", UNCHANGED, old=("1", None)), wire.insert(OID, None, None),
        wire.commit(2**63),
    ]  # fmt: skip
    (rows,) = decode(*stream).rows
    again = RelationRows.from_ipc(rows.to_ipc())
    assert again.relation == rows.relation
    before, after = decode_rows(rows), decode_rows(again)
    assert cells(before) == cells(after)
    for name in ("op", "lsn", "seq", "xid", "commit_ts"):
        assert getattr(before, name).tolist() == getattr(after, name).tolist()
        assert getattr(before, name).dtype == getattr(after, name).dtype
    assert again.to_ipc() == rows.to_ipc()


# Malformed streams

MALFORMED: dict[str, Callable[[], list[bytes]]] = {
    "short frame": lambda: [b"w" * 25],
    "empty frame": lambda: [b""],
    "no XLogData": lambda: [b"k" + wire.begin(1)[1:]],
    "unknown kind": lambda: [wire.frame(b"S" + bytes(30))],
    "streamed commit": lambda: [wire.frame(b"c" + bytes(30))],
    "prepared transaction": lambda: [wire.frame(b"b" + bytes(30))],
    "short Begin": lambda: [wire.begin(1)[:-1]],
    "long Begin": lambda: [wire.begin(1) + b"\0"],
    "long Commit": lambda: [wire.begin(1), wire.commit(1) + b"\0"],
    "short Commit": lambda: [wire.begin(1), wire.commit(1)[:-1]],
    "Commit with flags": lambda: [wire.begin(1), wire.commit(1, flags=1)],
    "Commit of another LSN": lambda: [wire.begin(1), wire.commit(2)],
    "Commit that ends before itself": lambda: [wire.begin(5), wire.commit(5, 4)],
    "Commit without Begin": lambda: [wire.commit(1)],
    "second Commit": lambda: [wire.begin(1), wire.commit(1), wire.commit(1)],
    "Begin within a transaction": lambda: [wire.begin(1), wire.begin(2)],
    "change outside a transaction": lambda: [wire.relation(T), wire.insert(OID, "1", "a")],
    "change after the Commit": lambda: [wire.begin(1), wire.relation(T), wire.commit(1), wire.insert(OID, "1", "a")],
    "transactional message outside": lambda: [wire.logical_message("p", b"")],
    "transactional message after the Commit": lambda: [wire.begin(1), wire.commit(1), wire.logical_message("p", b"")],
    "unknown relation": lambda: [wire.begin(1), wire.insert(OID, "1", "a"), wire.commit(1)],
    "relation announced too late": lambda: [wire.begin(1), wire.insert(OID, "1", "a"), wire.relation(T)],
    "truncate of an unknown relation": lambda: [wire.begin(1), wire.relation(T), wire.truncate(OID, 5)],
    "truncate of fewer": lambda: [wire.begin(1), wire.relation(T), wire.truncate(OID) + bytes(4)],
    "truncate of more": lambda: [wire.begin(1), wire.relation(T), wire.truncate(OID, OID)[:-4]],
    "truncate of a negative number": lambda: [wire.begin(1), wire.frame(b"T\xff\xff\xff\xff\0")],
    "truncate of very many": lambda: [wire.begin(1), wire.frame(b"T\x7f\xff\xff\xff\0")],
    "long Relation": lambda: [wire.relation(T) + b"\0"],
    "short Relation": lambda: [wire.relation(T)[:-1]],
    "Relation without a name's end": lambda: [wire.frame(b"R\0\0\0\1abc")],
    "Relation with a strange identity": lambda: [wire.relation(dataclasses.replace(T, replica_identity="x"))],
    "Relation with a negative number of columns": lambda: [wire.frame(b"R\0\0\0\1a\0b\0d\xff\xff")],
    "long Type": lambda: [wire.type_() + b"\0"],
    "short Type": lambda: [wire.type_()[:-1]],
    "long Origin": lambda: [wire.origin() + b"\0"],
    "short Origin": lambda: [wire.frame(b"O123")],
    "message with strange flags": lambda: [wire.frame(b"M\2" + bytes(13))],
    "message longer than it says": lambda: [wire.logical_message("p", b"", transactional=False) + b"x"],
    "message shorter than it says": lambda: [wire.logical_message("p", b"xy", transactional=False)[:-1]],
    "message of negative length": lambda: [wire.frame(b"M\0" + bytes(9) + b"\xff" * 4)],
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_stream(name: str) -> None:
    with pytest.raises(ProtocolError) as error:
        decode(*MALFORMED[name]())
    assert error.value.offset >= 0


def _change(kind: bytes, rest: bytes) -> bytes:
    return wire.frame(kind + OID.to_bytes(4, "big") + rest)


MALFORMED_CHANGES: dict[str, bytes] = {
    "one column too few": wire.insert(OID, "1"),
    "one column too many": wire.insert(OID, "1", "a", "b"),
    "another column count": wire.insert(OID, "1", "a").replace(b"N\0\2", b"N\0\3"),
    "left over": wire.insert(OID, "1", "a") + b"n",
    "left over NULL": wire.update(OID, "1", None) + b"\0",
    "cut in a value": wire.insert(OID, "1", "abc")[:-1],
    "cut in a length": wire.insert(OID, "1", "")[:-1],
    "cut before a column": wire.insert(OID, "1", None)[:-1],
    "negative length": _change(b"I", b"N\0\2nt\xff\xff\xff\xff"),
    "length beyond everything": _change(b"I", b"N\0\2nt\x7f\xff\xff\xff"),
    "binary value": _change(b"I", b"N\0\2nb\0\0\0\1x"),
    "unknown value": _change(b"I", b"N\0\2nx"),
    "insert of a key": _change(b"I", b"K\0\2nn"),
    "delete of a new tuple": _change(b"D", b"N\0\2nn"),
    "unknown tuple": _change(b"U", b"X\0\2nn"),
    "update without new tuple": _change(b"U", b"K\0\2nn"),
    "update with two old tuples": _change(b"U", b"K\0\2nnO\0\2nn"),
    "update with a short new tuple": _change(b"U", b"K\0\2nnN\0\2n"),
    "update without column count": _change(b"U", b"K\0\2nnN\0"),
    "update with more behind": _change(b"U", b"K\0\2nnN\0\2nnn"),
    "delete with more behind": _change(b"D", b"K\0\2nnN\0\2nn"),
}


@pytest.mark.parametrize("name", MALFORMED_CHANGES)
@pytest.mark.parametrize("last", [True, False])
def test_malformed_change(name: str, last: bool) -> None:
    """Malformed as the last message of the buffer, and with others behind it; the offset is within the message."""
    bad = MALFORMED_CHANGES[name]
    frames = [wire.begin(1), wire.relation(T), wire.insert(OID, "1", "ok"), bad]
    (rows,) = decode(*frames, *([] if last else [wire.insert(OID, "1", "ok"), wire.commit(1)])).rows
    with pytest.raises(ProtocolError) as error:
        decode_rows(rows)
    before = sum(map(len, frames[:3]))
    assert before + 25 <= error.value.offset <= before + len(bad)


@pytest.mark.parametrize("kind", [b"I", b"U", b"D"])
def test_change_without_tuple(kind: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(wire.begin(1), wire.relation(T), wire.frame(kind + OID.to_bytes(4, "big") + b"N\0"))


# The reference decoder

LETTERS = "itt"
CELLS = {
    "i": st.one_of(st.none(), st.integers(-(2**31), 2**31 - 1).map(str)),
    "t": st.one_of(
        st.none(),
        st.just(UNCHANGED),
        st.text(max_size=14),
        st.text("ab\\'\n é😀", min_size=10, max_size=14),
        st.just("x" * 70),
    ),
}


@st.composite
def _relations(draw: st.DrawFn, oid: int) -> Relation:
    identity = draw(st.sampled_from("ddfin"))
    types = draw(st.text("it", max_size=4))
    key = tuple(i for i in range(len(types)) if draw(st.booleans())) if identity in "di" else ()
    return wire.table(oid, identity, types, key, draw(st.sampled_from(["a", "b"])))


@st.composite
def _tuples(draw: st.DrawFn, described: Relation, unchanged: bool) -> tuple[wire.Value, ...]:
    cells = [draw(CELLS["i" if column.type_oid == 23 else "t"]) for column in described.columns]
    return tuple(None if cell is UNCHANGED and not unchanged else cell for cell in cells)


@st.composite
def _changes(draw: st.DrawFn, described: Relation) -> bytes:
    kind = draw(st.sampled_from("IIIUUKOD"))
    new, old = draw(_tuples(described, True)), draw(_tuples(described, False))
    key = tuple(cell if column.is_key else None for cell, column in zip(old, described.columns, strict=True))
    if kind == "I":
        return wire.insert(described.oid, *new)
    if kind == "U":
        return wire.update(described.oid, *new)
    if kind == "K":
        return wire.update(described.oid, *new, key=key)
    if kind == "O":
        return wire.update(described.oid, *new, old=old)
    return wire.delete(described.oid, *key) if draw(st.booleans()) else wire.delete(described.oid, *old, whole=True)


@st.composite
def streams(draw: st.DrawFn) -> list[bytes]:
    """Draw a well-formed stream of a few transactions on up to three tables that change their shape."""
    known: dict[int, Relation] = {}
    frames: list[bytes] = []
    lsn = 0
    for _ in range(draw(st.integers(1, 5))):
        lsn += draw(st.integers(0, 3)) + 1
        frames.append(wire.begin(lsn, draw(st.integers(0, 2**32 - 1)), draw(st.integers(-(2**60), 2**60))))
        for _ in range(draw(st.integers(0, 12))):
            oid = draw(st.integers(1, 3))
            if oid not in known or draw(st.integers(0, 9)) == 0:
                known[oid] = draw(_relations(oid))
                frames.append(wire.relation(known[oid]))
            other = draw(st.integers(0, 19))
            if other == 0:
                frames.append(wire.truncate(*draw(st.sets(st.sampled_from(sorted(known))))))
            elif other == 1:
                frames.append(draw(st.sampled_from([wire.relation(known[oid]), wire.type_(), wire.origin()])))
            else:
                frames.append(draw(_changes(known[oid])))
        frames.append(wire.commit(lsn))
    return frames


def _cut(frames: list[bytes], cuts: set[int]) -> list[WireBatch]:
    bounds = [0, *sorted(cut for cut in cuts if cut < len(frames)), len(frames)]
    return [
        WireBatch(frames[first:last], last > first and frames[last - 1][25:26] == b"C")
        for first, last in itertools.pairwise(bounds)
    ]


def _as_rows(decoded: TableChanges) -> list[tuple[Relation, Row]]:
    """Turn columns into the reference's rows."""
    out = []
    for i in range(len(decoded.op)):
        values: list[wire.Value] = []
        for index, column in enumerate(decoded.columns):
            value = column[i].as_py()
            if index in decoded.unchanged and decoded.unchanged[index][i]:
                assert value is None
                value = UNCHANGED
            elif value is not None:
                value = str(value).encode()
            values.append(value)
        numbers = (decoded.lsn[i], decoded.seq[i], decoded.xid[i], decoded.commit_ts[i])
        lsn, seq, xid, commit_ts = map(int, numbers)
        out.append((decoded.relation, Row(chr(decoded.op[i]), lsn, seq, xid, commit_ts, tuple(values))))
    return out


@settings(max_examples=300, deadline=None)
@given(frames=streams(), cuts=st.sets(st.integers(1, 60), max_size=6), skip_below=st.integers(0, 12), ipc=st.booleans())
def test_agrees_with_the_reference(frames: list[bytes], cuts: set[int], skip_below: int, ipc: bool) -> None:
    """L2: wherever the stream is cut, the columnar decoder sees what the simple one sees."""
    reference = Reference(skip_below)
    for frame in frames:
        reference.feed(frame)
    decoder = Decoder(skip_below)
    seen: dict[int, list[tuple[Relation, Row]]] = {}
    for batch in _cut(frames, cuts):
        for rows in decoder.decode(batch).rows:
            kept = RelationRows.from_ipc(rows.to_ipc()) if ipc else rows
            seen.setdefault(rows.relation.oid, []).extend(_as_rows(decode_rows(kept)))
    assert seen == reference.rows


def _decodes_or_refuses(frames: list[bytes]) -> None:
    try:
        tables = [decode_rows(rows) for rows in decode(*frames).rows]
    except ProtocolError:
        return
    for table in tables:
        for column in table.columns:
            assert len(column) == len(table.op)
            column.validate(full=True)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), frames=streams())
def test_mutations_decode_or_are_refused(data: st.DataObject, frames: list[bytes]) -> None:
    """Whatever bytes are changed, nothing but ProtocolError comes out."""
    at = data.draw(st.integers(0, len(frames) - 1))
    frame = bytearray(frames[at])
    for _ in range(data.draw(st.integers(1, 4))):
        byte = st.one_of(st.sampled_from(b"\0\1\x7f\x80\xffntubNKOIUDTRBC"), st.integers(0, 255))
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(byte)
    frames[at] = bytes(frame)
    _decodes_or_refuses(frames)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), frames=streams())
def test_truncations_decode_or_are_refused(data: st.DataObject, frames: list[bytes]) -> None:
    """A frame cut short, a frame missing, a frame twice: nothing but ProtocolError comes out."""
    at = data.draw(st.integers(0, len(frames) - 1))
    how = data.draw(st.sampled_from(["short", "missing", "twice", "end"]))
    if how == "short":
        frames[at] = frames[at][: data.draw(st.integers(0, len(frames[at]) - 1))]
    elif how == "missing":
        del frames[at]
    elif how == "twice":
        frames.insert(at, frames[at])
    else:
        del frames[at:]
    _decodes_or_refuses(frames)
