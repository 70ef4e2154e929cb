"""Cutting a stream into batches, on frames made here: any stream, any limits, cut at any place by the network."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc.errors import ProtocolError
from cdc.pgoutput.messages import WireBatch
from cdc.source.assembly import Assembly, Limits

END = (0, memoryview(b""))
KEEPALIVE = b"k" + bytes(17)


def frame(kind: str, size: int = 0) -> bytes:
    return b"w" + bytes(24) + kind.encode() + bytes(size)


def message(prefix: str, *, transactional: bool = True) -> bytes:
    return frame("M") + bytes([transactional]) + bytes(8) + prefix.encode() + b"\0" + bytes(4)


def transaction(rows: int, size: int = 10) -> list[bytes]:
    return [frame("B"), frame("R"), *(frame("I", size) for _ in range(rows)), frame("C")]


class Wire:
    """Gives out messages as PQgetCopyData does, and 0 wherever `None` stands."""

    def __init__(self, messages: list[bytes | None]) -> None:
        self.messages = messages[::-1]

    def __call__(self, _: int) -> tuple[int, memoryview]:
        if not self.messages:
            return END
        data = self.messages.pop()
        return END if data is None else (len(data), memoryview(data))


def feed(assembly: Assembly, messages: list[bytes]) -> None:
    wire = Wire(list(messages))
    while assembly.take(wire):
        pass


@pytest.fixture
def batches() -> list[WireBatch]:
    return []


@pytest.fixture
def make(batches: list[WireBatch]) -> Callable[[int, int], Assembly]:
    def made(rows: int, size: int) -> Assembly:
        return Assembly(Limits(rows, size, 3600), batches.append, lambda _: None)

    return made


def test_a_transaction_at_the_limit_is_one_batch(
    make: Callable[[int, int], Assembly], batches: list[WireBatch]
) -> None:
    feed(make(3, 10**6), transaction(3) + transaction(3))
    assert [(len(batch.frames), batch.complete) for batch in batches] == [(6, True), (6, True)]


def test_a_transaction_past_the_limit_comes_after_what_was_whole(
    make: Callable[[int, int], Assembly], batches: list[WireBatch]
) -> None:
    feed(make(4, 10**6), transaction(2) + transaction(6))
    assert [(len(batch.frames), batch.complete) for batch in batches] == [(5, True), (7, False), (2, True)]


def test_a_transaction_past_the_limit_after_an_empty_one(
    make: Callable[[int, int], Assembly], batches: list[WireBatch]
) -> None:
    feed(make(1, 10**6), transaction(0) + transaction(2))
    assert [(len(batch.frames), batch.complete) for batch in batches] == [(3, True), (4, False), (1, True)]


def test_a_fence_cuts_at_its_commit(make: Callable[[int, int], Assembly], batches: list[WireBatch]) -> None:
    assembly = make(1000, 10**6)
    feed(assembly, [*transaction(1), frame("B"), message("cdc"), frame("I"), frame("C"), frame("B")])
    assert [len(batch.frames) for batch in batches] == [8]
    assert assembly.open
    feed(assembly, [message("cdcx"), frame("C"), frame("B"), message("other"), frame("C")])
    assert len(batches) == 1


def test_a_fence_in_the_open_transaction_outlives_a_cut(
    make: Callable[[int, int], Assembly], batches: list[WireBatch]
) -> None:
    assembly = make(1000, 10**6)
    feed(assembly, [*transaction(1), frame("B"), message("cdc")])
    assembly.cut()
    feed(assembly, [frame("C")])
    assert [len(batch.frames) for batch in batches] == [4, 3]


def test_messages_outside_of_transactions(make: Callable[[int, int], Assembly], batches: list[WireBatch]) -> None:
    """I7: they go with the next batch, or alone when that is due; they are no open transaction."""
    assembly = make(1000, 10**6)
    feed(assembly, [message("cdc", transactional=False)])
    assert not batches
    assert not assembly.open
    assert not assembly.empty
    assembly.cut()
    assert batches == [WireBatch([message("cdc", transactional=False)], complete=True)]
    feed(assembly, [message("x", transactional=False), frame("B"), frame("I")])
    assembly.cut()
    assert len(batches[1].frames) == 1
    feed(assembly, [frame("C")])
    assembly.cut()
    assert len(batches[2].frames) == 3
    assert assembly.empty


def test_frames_too_short_are_refused(make: Callable[[int, int], Assembly]) -> None:
    for bad in (b"w" + bytes(24), b"k", b"x" * 18):
        with pytest.raises(ProtocolError):
            feed(make(1, 1), [bad])


def test_the_end_is_told(make: Callable[[int, int], Assembly]) -> None:
    assembly = make(1, 1)
    assert assembly.take(lambda _: (-1, memoryview(b""))) == 0
    assert assembly.ended


@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 60)), max_size=12),
    st.integers(1, 20),
    st.integers(1, 3000),
    st.randoms(use_true_random=False),
)
def test_nothing_is_lost_and_batches_keep_the_limits(
    shape: list[tuple[int, int]], rows: int, size: int, rng: random.Random
) -> None:
    """L2's ground: the frames come out as they went in, whatever the limits and wherever the network cut them."""
    sent = [each for count, width in shape for each in transaction(count, width)]
    messages: list[bytes | None] = []
    for each in sent:
        messages += [None] * (rng.random() < 0.2)
        messages += [KEEPALIVE] * (rng.random() < 0.2)
        messages.append(each)
    batches: list[WireBatch] = []
    keepalives: list[bool] = []
    assembly = Assembly(Limits(rows, size, 3600), batches.append, lambda _: keepalives.append(assembly.open))
    wire = Wire(messages)
    while wire.messages:
        assembly.take(wire)
        if rng.random() < 0.1:
            assembly.cut()
    assembly.cut()
    assert [each for batch in batches for each in batch.frames] == sent
    assert assembly.empty
    assert len(keepalives) == messages.count(KEEPALIVE)
    for batch in batches:
        assert batch.complete == (batch.frames[-1][25] == ord("C"))
        changes = [each for each in batch.frames if each[25] == ord("I")]
        if batch.complete and batch.frames[0][25] == ord("B"):
            # 54 bytes: the Begin and Commit that a batch cannot do without
            assert len(changes) <= rows
            assert sum(map(len, batch.frames)) <= size + 54
