"""A warehouse without a source, for the tests of what is done to one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cdc.sink.checkpoint import Ledger
from cdc.sink.stored import Checkpoint
from cdc.sink.warehouse import Warehouse

INTENT = Checkpoint("7300000000000000001", "shop", "cdc", "cdc", None)


@pytest.fixture
def warehouse(tmp_path: Path) -> Iterator[Warehouse]:
    """A new DuckDB file, held."""
    made = Warehouse(tmp_path / "w.duckdb", 256_000_000, 1)
    made.acquire()
    yield made
    made.release()


@pytest.fixture
def ledger(warehouse: Warehouse) -> Ledger:
    """A ledger with an intent, committed."""
    made = Ledger(warehouse)
    warehouse.begin()
    made.create(INTENT)
    warehouse.commit()
    return made
