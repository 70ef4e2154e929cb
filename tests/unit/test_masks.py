"""Masked columns: the messages say what they would have said, had the source itself held the masks."""

from __future__ import annotations

import hashlib
import hmac
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc.pgoutput.copy import decode_copy
from cdc.pgoutput.decoder import Decoder, decode_rows
from cdc.pgoutput.masks import Mask, chosen, mask_rows, missing
from cdc.pgoutput.messages import Column
from tests.unit import wire

KEY = b"k" * 70  # longer than a block of SHA-256
MASKS = {1: Mask("hash"), 2: Mask("null"), 4: Mask("hmac", KEY)}


def masked(index: int, cell: Any) -> Any:
    """Return the cell as `MASKS` have it, by Python's own digests."""
    if index == 2:
        return None
    if cell is None or cell is wire.UNCHANGED or index not in MASKS:
        return cell
    content = cell if isinstance(cell, bytes) else cell.encode()
    return hashlib.sha256(content).hexdigest() if index == 1 else hmac.new(KEY, content, "sha256").hexdigest()


def cells(key: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    value = st.none() | st.just(wire.UNCHANGED) | st.text("aé\0\n", max_size=20) | st.binary(max_size=30)
    return st.tuples(key, value, value, value, value)


ROW = cells(st.integers(0, 99).map(str))
CHANGE = st.one_of(
    st.tuples(st.just("insert"), ROW, st.just({})),
    st.tuples(st.just("update"), ROW, st.just({})),
    st.tuples(st.just("update"), ROW, st.fixed_dictionaries({"old": ROW})),
    st.tuples(
        st.just("update"), ROW, st.fixed_dictionaries({"key": cells(st.just("1")).map(lambda c: (c[0], *4 * [None]))})
    ),
    st.tuples(st.just("delete"), ROW, st.just({"whole": True})),
    st.tuples(st.just("truncate"), st.just(()), st.just({})),
)


def message(change: tuple[str, tuple[Any, ...], dict[str, Any]], *, by_hand: bool) -> bytes:
    kind, row, more = change

    def of(values: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(masked(i, v) for i, v in enumerate(values)) if by_hand else values

    if kind == "truncate":
        return wire.truncate(7)
    given_more = {name: of(value) if isinstance(value, tuple) else value for name, value in more.items()}
    encoded: bytes = getattr(wire, kind)(7, *of(row), **given_more)
    return encoded


@given(st.lists(CHANGE, min_size=1, max_size=12))
def test_the_messages_are_those_of_a_masked_source(changes: list[Any]) -> None:
    """Of inserts, updates with and without old rows, deletes and truncates, with NULLs and unchanged values."""
    table = wire.table(7, "f", "ititt")
    outcomes = []
    for by_hand in (False, True):
        frames = [message(change, by_hand=by_hand) for change in changes]
        (rows,) = Decoder(0).decode(wire.batch(wire.begin(9), wire.relation(table), *frames, wire.commit(9))).rows
        outcomes.append(rows if by_hand else mask_rows(rows, MASKS))
    found, expected = ([bytes(r.buffer[a:b]) for a, b in zip(r.start, r.end, strict=True)] for r in outcomes)
    assert found == expected
    assert [c.type_oid for c in outcomes[0].relation.columns] == [23, 25, 23, 25, 25]


def test_what_is_masked_is_decoded_as_text() -> None:
    """An integer's digest is no integer; what comes of it goes through the warehouse's buffer and back."""
    frames = [wire.insert(7, "1", "42", "x"), wire.update(7, "1", None, wire.UNCHANGED)]
    table = wire.table(7, "d", "iit")
    (rows,) = Decoder(0).decode(wire.batch(wire.begin(9), wire.relation(table), *frames, wire.commit(9))).rows
    found = mask_rows(rows, {1: Mask("hash"), 2: Mask("hmac", b"k")})
    changes = decode_rows(type(found).from_ipc(found.to_ipc()))
    assert changes.columns[0].to_pylist() == [1, 1]
    assert changes.columns[1].to_pylist() == [hashlib.sha256(b"42").hexdigest(), None]
    assert changes.columns[2].to_pylist() == [hmac.new(b"k", b"x", "sha256").hexdigest(), None]
    assert changes.unchanged[2].tolist() == [False, True]
    assert changes.unfit == []


def test_a_copy_has_the_digests_of_the_stream() -> None:
    columns = [Column("a", 23, -1, is_key=True), Column("b", 17, -1, is_key=False), Column("c", 23, -1, is_key=False)]
    arrays, unfit = decode_copy(b'1,"\\x00",5\n2,,\n', columns, {1: Mask("hash"), 2: Mask("null")})
    assert [array.to_pylist() for array in arrays] == [
        [1, 2], [hashlib.sha256(rb"\x00").hexdigest(), None], [None, None],
    ]  # fmt: skip
    assert arrays[2].type == pa.int32()
    assert unfit == []


@pytest.mark.parametrize("key", [b"k", b"k" * 64, b"k" * 65])
def test_hmac_is_that_of_rfc_2104(key: bytes) -> None:
    values = [b"", b"x" * 1000, None, bytes(range(256))]
    found = Mask("hmac", key).apply(pa.array(values, pa.binary())).to_pylist()
    assert found == [v if v is None else hmac.new(key, v, "sha256").hexdigest().encode() for v in values]


def test_many_values_keep_their_order() -> None:
    values = pa.array(np.arange(300_000).astype(str)).cast(pa.binary())
    found = Mask("hash").apply(values)
    assert [found[i].as_py() for i in (0, 150_000, 299_999)] == [
        hashlib.sha256(str(i).encode()).hexdigest().encode() for i in (0, 150_000, 299_999)
    ]


def test_names() -> None:
    """By either name of a table; what a table lacks is told."""
    masks = {"public.t.a": Mask("null"), "public.t.gone": Mask("hash"), "public.tt.b": Mask("null")}
    assert chosen(masks, ["public.new", "public.t"], ["x", "a"]) == {1: Mask("null")}
    assert chosen(masks, ["public.u"], ["a"]) == {}
    assert missing(masks, ["public.t"], ["a", "b"]) == ["public.t.gone"]
    assert "k" * 70 not in repr(Mask("hmac", KEY))
    assert Mask("hmac", KEY).label != Mask("hmac", b"other").label
