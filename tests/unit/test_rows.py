"""What a batch does to one table, against a reference that goes through it row by row with a dictionary."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cdc.pgoutput.changes import TableChanges, Unfit
from cdc.pgoutput.messages import Column, Relation
from cdc.sink.rows import DELETE, INSERT, TRUNCATE, UPDATE, collapse, key_codes, segments, trace

TEXT = 25


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
    """One row of a batch: which key, what, and whether the value of the column in question was left out."""

    key: int
    op: int
    unchanged: bool = False


@st.composite
def batches(draw: st.DrawFn) -> list[Change]:
    """Draw what Postgres could send: no key is inserted twice or changed while it is not there."""
    there = set(draw(st.sets(st.integers(0, 5))))
    changes: list[Change] = []
    for _ in range(draw(st.integers(0, 25))):
        kind, key, other, unchanged = draw(
            st.tuples(st.sampled_from("IUDM"), st.integers(0, 5), st.integers(0, 5), st.booleans())
        )
        if kind == "I" and key not in there:
            there.add(key)
            changes.append(Change(key, INSERT))
        elif kind == "U" and key in there:
            changes.append(Change(key, UPDATE, unchanged))
        elif kind == "D" and key in there:
            there.remove(key)
            changes.append(Change(key, DELETE))
        elif kind == "M" and key in there and (other == key or other not in there):  # the key changes: D and I
            there.remove(key)
            there.add(other)
            changes += [Change(key, DELETE), Change(other, INSERT, unchanged)]
    return changes


def arrays(changes: Sequence[Change]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return (
        np.array([change.key for change in changes], np.int64),
        np.array([change.op for change in changes], np.uint8),
        np.array([change.unchanged for change in changes], np.bool_),
    )


@given(batches())
def test_collapse(changes: list[Change]) -> None:
    """C3 to C5: per key the first, the last, and the last that has values, in the order of the last ones."""
    assume(changes)
    codes, op, _ = arrays(changes)
    kept = collapse(codes, op)
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    valued: dict[int, int] = {}
    for row, change in enumerate(changes):
        first.setdefault(change.key, row)
        last[change.key] = row
        if change.op != DELETE:
            valued[change.key] = row
    order = sorted(last, key=lambda key: last[key])
    assert kept.first.tolist() == [first[key] for key in order]
    assert kept.last.tolist() == [last[key] for key in order]
    assert kept.valued.tolist() == [valued.get(key, -1) for key in order]


@given(batches())
def test_trace(changes: list[Change]) -> None:
    """D1 to D4: a value comes from the row that brought it, over key changes, else from the OLD key's row."""
    codes, op, unchanged = arrays(changes)
    # by key, where its value is: (row of the batch, -1), or (-1, the key under which the warehouse has it)
    place: dict[int, tuple[int, int]] = {}
    expected = []
    for row, change in enumerate(changes):
        before = place.pop(change.key, (-1, change.key))
        if change.op == DELETE:
            moved = before
            continue
        found = (moved if change.op == INSERT else before) if change.unchanged else (row, -1)
        place[change.key] = found
        if change.unchanged:
            expected.append((row, *found))
    sources = trace(codes, op, unchanged)
    found_keys = np.where(sources.donors < 0, codes[sources.keyed], -1)
    assert list(zip(sources.rows.tolist(), sources.donors.tolist(), found_keys.tolist(), strict=True)) == expected


def test_trace_of_a_long_chain() -> None:
    """D2: a value that went through a thousand keys in one batch is found, without as many steps."""
    n = 1000
    changes = [Change(0, INSERT)]
    for key in range(n):
        changes += [
            Change(key, DELETE),
            Change(key + 1, INSERT, unchanged=True),
            Change(key + 1, UPDATE, unchanged=True),
        ]
    sources = trace(*arrays(changes))
    assert (sources.donors == 0).all()
    assert len(sources.rows) == 2 * n
    sources = trace(*arrays(changes[1:]))
    assert (sources.donors == -1).all()
    assert (arrays(changes[1:])[0][sources.keyed] == 0).all()


@given(st.lists(st.tuples(st.integers(0, 3) | st.none(), st.sampled_from(["", "a", "b", "\0", "1"])), min_size=1))
def test_codes_of_several_columns(rows: list[tuple[int | None, str]]) -> None:
    """C6: rows have one code if, and only if, all parts of their keys are equal."""
    codes = key_codes([pa.array([a for a, _ in rows], pa.int32()), pa.array([b for _, b in rows])]).tolist()
    for i, one in enumerate(rows):
        assert [codes[i] == code for code in codes] == [one == other for other in rows]


def test_codes_of_many_columns() -> None:
    """C6: 32 columns of many values each do not overflow into each other."""
    n = 300
    columns = [pa.array(np.random.default_rng(seed).permutation(n)) for seed in range(31)]
    same = np.arange(n) // 2
    columns = [column.take(pa.array(same)) for column in columns]
    codes = key_codes([*columns, pa.array(np.zeros(n))])
    assert len(set(codes.tolist())) == n // 2
    assert (codes[::2] == codes[1::2]).all()


@pytest.mark.parametrize("kind", [pa.float32(), pa.float64()])
def test_codes_of_floats(kind: pa.DataType) -> None:
    """C7: -0 and 0 are one key, and so is NaN; the infinities are two."""
    nan, infinity = float("nan"), float("inf")
    codes = key_codes([pa.array([0.0, -0.0, nan, nan, infinity, -infinity, 1.0], kind)]).tolist()
    assert codes[0] == codes[1]
    assert codes[2] == codes[3]
    assert len(set(codes)) == 5


def changes_of(ops: str, *, unchanged: Sequence[int] = (), unfit: dict[int, str] | None = None) -> TableChanges:
    n = len(ops)
    mask = np.isin(np.arange(n), unchanged)
    rows = sorted(unfit or {})
    return TableChanges(
        Relation(1, "public", "t", "d", (Column("id", TEXT, -1, is_key=True), Column("v", TEXT, -1, is_key=False))),
        np.frombuffer(ops.encode(), np.uint8),
        np.arange(n, dtype=np.uint64),
        np.arange(n, dtype=np.int64),
        np.zeros(n, np.uint32),
        np.zeros(n, np.int64),
        [pa.array([f"k{i}" for i in range(n)]), pa.array([f"v{i}" for i in range(n)])],
        {1: mask} if mask.any() else {},
        [Unfit(1, np.array(rows), [(unfit or {})[row] for row in rows])] if rows else [],
    )


@pytest.mark.parametrize(
    ("ops", "pieces"),
    [
        ("IUD", ["IUD"]),
        ("T", ["T"]),
        ("TIU", ["TIU"]),
        ("IUT", ["IU", "T"]),
        ("IUTIUTTD", ["IU", "TIU", "T", "TD"]),
    ],
)
def test_segments(ops: str, pieces: list[str]) -> None:
    """E4: a TRUNCATE is the first row of what it stands in."""
    found = list(segments(changes_of(ops)))
    assert [bytes(segment.op).decode() for segment in found] == pieces
    assert [key for segment in found for key in segment.columns[0].to_pylist()] == [f"k{i}" for i in range(len(ops))]
    assert [int(lsn) for segment in found for lsn in segment.lsn] == list(range(len(ops)))


def test_segments_take_their_share() -> None:
    """Rows that are named by number are named by their number in the segment."""
    whole = changes_of("IUTUUTI", unchanged=[1, 3, 4], unfit={0: "a", 4: "b", 6: "c"})
    one, two, three = segments(whole)
    assert one.unchanged[1].tolist() == [False, True]
    assert two.unchanged[1].tolist() == [False, True, True]
    assert three.unchanged == {}
    assert [(u.rows.tolist(), u.texts) for s in (one, two, three) for u in s.unfit] == [
        ([0], ["a"]),
        ([2], ["b"]),
        ([1], ["c"]),
    ]
    assert next(segments(changes_of("IU"))).op.tolist() == [INSERT, UPDATE]
    assert [s.op.tolist() for s in segments(changes_of("IT"))] == [[INSERT], [TRUNCATE]]
