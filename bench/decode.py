"""Decode 1M inserts of 10 columns, in batches of whole transactions, on one core: `python bench/decode.py [rows]`.

The columns are those of the other benchmarks: bigint key, int, 2 text, numeric(12,2), int, bool, 2 timestamptz, text.
Prints rows per second of both stages, the best of several runs. Needs no server: the frames are built here.
"""

from __future__ import annotations

import random
import struct
import sys
import time

import pyarrow as pa

from cdc.pgoutput.decoder import Decoder, decode_rows
from cdc.pgoutput.messages import WireBatch

_TRANSACTION_ROWS = 1000
_BATCH_TRANSACTIONS = 100
_RUNS = 5
_COLUMNS = (
    ("id", 20, -1),
    ("customer_id", 23, -1),
    ("status", 25, -1),
    ("note", 25, -1),
    ("total", 1700, (12 << 16 | 2) + 4),
    ("quantity", 23, -1),
    ("paid", 16, -1),
    ("created_at", 1184, -1),
    ("updated_at", 1184, -1),
    ("address", 25, -1),
)


def _frame(message: bytes, lsn: int) -> bytes:
    return struct.pack("!cQQq", b"w", lsn, lsn, 0) + message


def _relation() -> bytes:
    columns = b"".join(
        struct.pack("!B", name == "id") + name.encode() + b"\0" + struct.pack("!Ii", oid, typmod)
        for name, oid, typmod in _COLUMNS
    )
    return b"R" + struct.pack("!I", 16384) + b"public\0orders\0d" + struct.pack("!h", len(_COLUMNS)) + columns


def _insert(key: int, draw: random.Random, *, odd: bool) -> bytes:
    moment = f"2026-{draw.randint(1, 12):02}-{draw.randint(1, 28):02} 12:{draw.randint(0, 59):02}:07"
    values = (
        str(key),
        str(draw.randint(1, 1_000_000)),
        draw.choice(("new", "paid", "shipped", "delivered", "cancelled by customer")),
        "x" * draw.randint(0, 60),
        "NaN" if odd else f"{draw.randint(0, 99_999)}.{draw.randint(0, 99):02}",
        str(draw.randint(1, 100)),
        draw.choice("tf"),
        f"{moment}.{draw.randint(1, 999_999):06}+00",
        f"{moment}+00",
        f"{draw.randint(1, 999)} Main Street",
    )
    cells = b"".join(struct.pack("!ci", b"t", len(value)) + value.encode() for value in values)
    return b"I" + struct.pack("!I", 16384) + b"N" + struct.pack("!h", len(values)) + cells


def frames(n_rows: int, odd: int | None = None) -> list[WireBatch]:
    """Return inserts in transactions of 1000, in batches; row `odd` has NaN in its numeric."""
    draw = random.Random(1)
    batches: list[WireBatch] = []
    found = [_frame(_relation(), 0)]
    for first in range(0, n_rows, _TRANSACTION_ROWS):
        lsn = (first + 1) << 8
        found.append(_frame(b"B" + struct.pack("!QqI", lsn, first, 700 + first), lsn))
        found += [
            _frame(_insert(key, draw, odd=key == odd), lsn)
            for key in range(first, min(first + _TRANSACTION_ROWS, n_rows))
        ]
        found.append(_frame(b"C" + struct.pack("!BQQq", 0, lsn, lsn + 48, first), lsn + 48))
        if len(found) >= _BATCH_TRANSACTIONS * _TRANSACTION_ROWS:
            batches.append(WireBatch(found, True))
            found = []
    if found:
        batches.append(WireBatch(found, True))
    return batches


def decode(batches: list[WireBatch]) -> tuple[float, float]:
    """Return the seconds that the two stages take."""
    decoder = Decoder(0)
    stage1_s = stage2_s = 0.0
    for batch in batches:
        began = time.perf_counter()
        decoded = decoder.decode(batch)
        between = time.perf_counter()
        for rows in decoded.rows:
            decode_rows(rows)
        stage1_s += between - began
        stage2_s += time.perf_counter() - between
    return stage1_s, stage2_s


def main() -> None:
    """Build the frames, decode them several times, print the best."""
    n_rows = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    pa.set_cpu_count(1)
    batches = frames(n_rows)
    size = sum(len(frame) for batch in batches for frame in batch.frames)
    stage1_s, stage2_s = min((decode(batches) for _ in range(_RUNS)), key=sum)
    total_s = stage1_s + stage2_s
    print(
        f"{n_rows} rows of {len(_COLUMNS)} columns, {size / 1e6:.0f} MB, batches of {len(batches[0].frames)} messages"
    )
    print(f"stage 1 {stage1_s:.3f} s, stage 2 {stage2_s:.3f} s: {n_rows / total_s:,.0f} rows/s")


if __name__ == "__main__":
    main()
