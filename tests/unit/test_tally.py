"""The summary of a minute."""

from __future__ import annotations

import time

from cdc.pgoutput.decoder import Decoded
from cdc.tally import INTERVAL_S, Tally


def test_summary() -> None:
    tally = Tally()
    assert not tally.due()
    tally.began = time.monotonic() - INTERVAL_S
    assert tally.due()
    for transactions in (2, 3):
        tally.count(Decoded([], [], transactions, None, None))
    tally.as_of = 1_700_000_000_123_456
    told = tally.summary(0x100, 0x180)
    assert (told["transactions"], told["changes"], told["batches"], told["behind_bytes"]) == (5, 0, 2, 0x80)
    assert (told["position"], told["as_of"]) == ("0/100", "2023-11-14T22:13:20.123+00:00")
    assert not tally.due()
    again = tally.summary(0x180, 0x100)
    assert (again["transactions"], again["batches"], again["behind_bytes"]) == (0, 0, 0)
