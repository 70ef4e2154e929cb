"""What values cost: columns of each family of types, and values that do not fit: `python -m bench.values [rows]`.

Columns are parsed in batches of 100,000, on one core, without a server. What one value that does not fit costs is
told twice: of the numerics alone, and of the decoding of whole rows, of which they are one column in ten. Each figure
is the best of several runs, taken by turns.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import pyarrow as pa

from bench.decode import decode, frames
from cdc.pgoutput.types import column_type
from cdc.pgoutput.types.table import decimal_typmod

_BATCH_ROWS = 100_000
_RUNS = 7
_NUMERIC = (1700, decimal_typmod(12, 2))
_MONEY = [f"{n * 137 % 10_000_000 / 100:.2f}" for n in range(_BATCH_ROWS)]

# What it is, type OID and modifier, and a batch of it.
_COLUMNS: Sequence[tuple[str, tuple[int, int], Callable[[int], str]]] = (
    ("integer", (23, -1), str),
    ("numeric(12,2)", _NUMERIC, lambda n: _MONEY[n]),
    ("numeric(12,2), every 10th NaN", _NUMERIC, lambda n: _MONEY[n] if n % 10 else "NaN"),
    ("timestamptz", (1184, -1), lambda n: f"2026-02-{n % 28 + 1:02} 12:{n % 60:02}:07.{n:06}+00"),
    ("timestamptz, every 2nd infinity", (1184, -1), lambda n: "2026-02-01 12:00:07+00" if n % 2 else "infinity"),
    ("date before our era", (1082, -1), lambda n: f"{n % 4000 + 1:04}-03-15 BC"),
    ("interval", (1186, -1), lambda n: f"{n % 12} mons -{n % 30} days +{n % 24:02}:05:06.7"),
    ("bytea", (17, -1), lambda n: f"\\x{n:032x}"),
    ("integer[]", (1007, -1), lambda n: f"{{{n},NULL,{n % 7}}}"),
    ("integer[], every 10th of two dimensions", (1007, -1), lambda n: f"{{{n},1}}" if n % 10 else "{{1,2},{3,4}}"),
    ("text[] with quotes", (1009, -1), lambda n: f'{{"number {n}","q\\"uote",plain}}'),
    ("jsonb", (3802, -1), lambda n: f'{{"id": {n}, "name": "\\u00e9", "tags": ["a", "b"]}}'),
)


def main() -> None:
    """Measure and print."""
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    pa.set_cpu_count(1)
    print(f"Columns of {rows:,} values, in batches of {_BATCH_ROWS:,}, one core")
    for name, kind, value in _COLUMNS:
        batch = pa.array([value(n) for n in range(_BATCH_ROWS)])
        seconds = _best(functools.partial(_parse, kind, [batch] * (rows // _BATCH_ROWS)))
        print(f"  {name:40}  {rows / seconds / 1e6:6.2f} M values/s")

    plain = [pa.array(_MONEY)] * (rows // _BATCH_ROWS)
    odd = [*plain[:-1], pa.array([*_MONEY[: _BATCH_ROWS // 2], "NaN", *_MONEY[_BATCH_ROWS // 2 + 1 :]])]
    cost = _cost(lambda: _parse(_NUMERIC, plain), lambda: _parse(_NUMERIC, odd), runs=101)
    print(f"one NaN in {rows:,} numerics costs {cost:+.1%}")
    plain_frames, odd_frames = frames(rows), frames(rows, odd=rows // 2)
    cost = _cost(lambda: decode(plain_frames), lambda: decode(odd_frames), runs=_RUNS)
    print(f"the same in rows of ten columns: {cost:+.1%}")


def _parse(kind: tuple[int, int], batches: Sequence[pa.StringArray]) -> None:
    held = column_type(*kind)
    for batch in batches:
        held.parse(batch)


def _best(work: Callable[[], object]) -> float:
    """Return the shortest time that `work` takes, in seconds of CPU."""
    return min(_seconds(work) for _ in range(_RUNS))


def _cost(plain: Callable[[], object], odd: Callable[[], object], *, runs: int) -> float:
    """Return by how much `odd` takes longer: the median of runs in turn, for the machine is not always as fast."""
    return statistics.median(_seconds(odd) / _seconds(plain) for _ in range(runs)) - 1


def _seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


if __name__ == "__main__":
    main()
