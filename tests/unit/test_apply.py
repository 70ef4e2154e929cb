"""Changes applied to one table of a warehouse, against a model of its rows."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cdc.pgoutput.changes import TableChanges
from cdc.pgoutput.messages import Column, Relation
from cdc.sink.apply import apply
from cdc.sink.checkpoint import Ledger
from cdc.sink.rows import DELETE, INSERT
from cdc.sink.stored import Table
from cdc.sink.warehouse import Warehouse
from tests.unit.conftest import INTENT

Row = tuple[int, int, int]

COLUMNS = tuple(Column(name, type_oid, -1, is_key=True) for name, type_oid in (("id", 20), ("writer", 23), ("v", 23)))
RELATION = Relation(1, "main", "t", "f", COLUMNS)


@pytest.fixture
def warehouse(tmp_path: Path) -> Iterator[Warehouse]:
    """A warehouse that is held, with a table that is changed and one that is not."""
    made = Warehouse(tmp_path / "w.duckdb", 200_000_000, 1)
    made.acquire()
    made.begin()
    Ledger(made).create(INTENT)
    made.execute("CREATE TABLE beside AS SELECT i::BIGINT AS id, i % 7 AS writer, i % 31 AS v FROM range(300) r(i)")
    made.commit()
    yield made
    made.release()


def changes(rows: Sequence[tuple[int, Row]]) -> TableChanges:
    """Return (op, row) pairs as the decoder would."""
    n = len(rows)
    ids, writers, values = zip(*(row for _, row in rows), strict=True)
    return TableChanges(
        RELATION,
        np.array([op for op, _ in rows], np.uint8),
        np.full(n, 10, np.uint64),
        np.arange(1, n + 1),
        np.zeros(n, np.uint32),
        np.full(n, 1_000_000),
        [pa.array(ids, pa.int64()), pa.array(writers, pa.int32()), pa.array(values, pa.int32())],
        {},
        [],
    )


@pytest.mark.parametrize("deletes", ["hard", "soft"])
def test_rows_without_a_key_come_and_go_within_a_transaction(warehouse: Warehouse, deletes: str) -> None:
    """C7, C16: deletes meet rows of this transaction and of earlier ones. DuckDB 2.0.0 corrupts memory if both at once.

    The corruption needs some luck; without the precaution a run of this length has never been without it.
    """
    rng = random.Random(3)
    soft = ", _deleted_at TIMESTAMPTZ" if deletes == "soft" else ""
    warehouse.execute(f"CREATE TABLE t (id BIGINT, writer INTEGER, v INTEGER{soft})")
    table = Table(1, "main", "t", "streaming", deletes=deletes)
    target = warehouse.name("main", "t")
    expected: Counter[Row] = Counter()
    number = 0
    for _ in range(120):
        warehouse.begin()
        for _ in range(rng.randint(1, 3)):
            added = [(number + i, rng.randrange(8), rng.randrange(30)) for i in range(rng.randint(1, 300))]
            number += len(added)
            expected.update(added)
            alive = list(expected.elements())
            gone = rng.sample(alive, rng.randint(1, min(len(alive), rng.choice([5, 50, 300]))))
            expected.subtract(gone)
            expected = +expected
            apply(
                warehouse,
                table,
                target,
                changes([*((INSERT, row) for row in added), *((DELETE, row) for row in gone)]),
                None,
                limit=0,
            )
            living = "WHERE _deleted_at IS NULL" if soft else ""
            assert Counter(warehouse.execute(f"SELECT id, writer, v FROM {target} {living}")) == expected
            untouched = warehouse.execute("SELECT count(*) FROM beside WHERE writer = id % 7 AND v = id % 31")
            assert untouched == [(300,)]
        warehouse.commit()
        if len(expected) > 3000:
            warehouse.execute(f"DELETE FROM {target}")
            expected.clear()
