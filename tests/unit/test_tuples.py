"""Slicing and gathering by themselves: masks appear only where they are needed, views are proper Arrow."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc.errors import ProtocolError
from cdc.pgoutput import tuples
from cdc.pgoutput.tuples import PADDING_BYTES, Tuples, gather, slice_tuples, views_of
from tests.unit import wire
from tests.unit.wire import UNCHANGED


def _slice(*rows: tuple[wire.Value, ...]) -> tuple[tuples.Bytes, Tuples]:
    encoded = [wire.values(*row) for row in rows]
    end = np.cumsum([len(row) for row in encoded])
    buffer = np.frombuffer(b"".join(encoded) + bytes(PADDING_BYTES), np.uint8)
    start = end - np.array([len(row) for row in encoded])
    return buffer, slice_tuples(buffer, start, end, len(rows[0]))


def test_masks_exist_only_where_needed() -> None:
    buffer, sliced = _slice(("1", "a", None, UNCHANGED), ("2", None, None, "b"), ("", "c", None, UNCHANGED))
    assert [mask if mask is None else mask.tolist() for mask in sliced.valid] == [
        None, [True, False, True], [False] * 3, [False, True, False],
    ]  # fmt: skip
    assert [mask if mask is None else mask.tolist() for mask in sliced.unchanged] == [
        None, None, None, [True, False, True],
    ]  # fmt: skip
    columns = [gather(buffer, v, mask).to_pylist() for v, mask in zip(sliced.views, sliced.valid, strict=True)]
    assert columns == [[b"1", b"2", b""], [b"a", None, b"c"], [None] * 3, [None, b"b", None]]


@given(st.lists(st.one_of(st.none(), st.binary(max_size=30), st.binary(min_size=11, max_size=14)), min_size=1))
def test_views_are_valid_arrow(cells: list[bytes | None]) -> None:
    """Inline up to 12 bytes and padded with zeros, prefix and position beyond: as Arrow's own check demands."""
    buffer, sliced = _slice(*[(cell,) for cell in cells])
    viewed = pa.Array.from_buffers(
        pa.binary_view(), len(cells), [None, pa.py_buffer(sliced.views[0].view(np.uint8)), pa.py_buffer(buffer)]
    )
    viewed.validate(full=True)
    assert viewed.to_pylist() == [cell or b"" for cell in cells]
    assert gather(buffer, sliced.views[0], sliced.valid[0]).to_pylist() == cells


@given(st.lists(st.binary(max_size=30)))
def test_views_of_any_slices(slices: list[bytes]) -> None:
    raw = bytes(4) + b"".join(slices) + bytes(PADDING_BYTES)
    length = np.array([len(content) for content in slices], np.int64)
    start = 4 + np.cumsum(length) - length
    buffer = np.frombuffer(raw, np.uint8)
    assert gather(buffer, views_of(buffer, start, length), None).to_pylist() == slices


def test_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask that begins in a later chunk covers the earlier ones too."""
    monkeypatch.setattr(tuples, "_CHUNK_ROWS", 3)
    cells = ["a", "b", "c", "d", "e", None, "x" * 20, UNCHANGED]
    buffer, sliced = _slice(*[(cell, str(i)) for i, cell in enumerate(cells)])
    assert sliced.valid[1] is None
    assert sliced.unchanged[0] is not None
    assert sliced.unchanged[0].tolist() == [False] * 7 + [True]
    values = gather(buffer, sliced.views[0], sliced.valid[0]).to_pylist()
    assert values == [b"a", b"b", b"c", b"d", b"e", None, b"x" * 20, None]
    assert gather(buffer, sliced.views[1], None).to_pylist() == [str(i).encode() for i in range(8)]


def test_end_is_behind_each_tuple() -> None:
    _, sliced = _slice(("1", None), ("22", "a"), (None, UNCHANGED))
    assert sliced.end.tolist() == [9, 9 + 2 + 7 + 6, 9 + 2 + 7 + 6 + 4]


def test_no_rows() -> None:
    buffer = np.zeros(PADDING_BYTES, np.uint8)
    nothing = np.zeros(0, np.int64)
    sliced = slice_tuples(buffer, nothing, nothing, 2)
    assert [len(gather(buffer, views, None)) for views in sliced.views] == [0, 0]


def test_error_names_the_first_bad_value() -> None:
    good, bad = wire.values("1", "2"), wire.values("1", "2").replace(b"t\0\0\0\1" + b"2", b"b\0\0\0\1" + b"2")
    buffer = np.frombuffer(good + bad + good + bytes(PADDING_BYTES), np.uint8)
    start = np.arange(3) * len(good)
    with pytest.raises(ProtocolError, match="kind n, u or t") as error:
        slice_tuples(buffer, start, start + len(good), 2)
    assert error.value.offset == len(good) + 2 + 6


@pytest.mark.parametrize("n_columns", [0, 1, 2])
def test_least_padding(n_columns: int) -> None:
    """16 bytes behind the last message are enough, also for finding that it was cut short."""
    for whole in (wire.values(*["12"] * n_columns), wire.values(*[None] * n_columns)):
        for length in range(len(whole) + 1):
            buffer = np.frombuffer(whole[:length] + bytes(16), np.uint8)
            bounds = np.array([0]), np.array([length])
            if length == len(whole):
                assert slice_tuples(buffer, *bounds, n_columns).end.tolist() == [length]
            else:
                with pytest.raises(ProtocolError):
                    slice_tuples(buffer, *bounds, n_columns)
