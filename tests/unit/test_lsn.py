"""Positions in the write-ahead log as text and as numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc.lsn import format_lsn, parse_lsn


@given(st.integers(0, 2**64 - 1))
def test_every_position_comes_back(lsn: int) -> None:
    assert parse_lsn(format_lsn(lsn)) == lsn


@pytest.mark.parametrize(
    ("text", "lsn"),
    [("0/0", 0), ("16/B374D848", 0x16B374D848), ("FFFFFFFF/FFFFFFFF", 2**64 - 1), ("1/0", 2**32), ("0/a", 10)],
)
def test_the_text_of_postgres(text: str, lsn: int) -> None:
    assert parse_lsn(text) == lsn
    assert format_lsn(lsn) == text.upper()


@pytest.mark.parametrize(
    "text", ["", "/", "0", "0/", "/0", "0/0/0", "0/100000000", "123456789/0", "x/0", "0/-1", "0/ 1", "+1/0"]
)
def test_what_is_no_position(text: str) -> None:
    with pytest.raises(ValueError, match="not an LSN"):
        parse_lsn(text)
