"""The faults that are put in on purpose can be put in; `make mutations` does it."""

from __future__ import annotations

import pytest

from tests.mutations import MUTATIONS, ROOT, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[mutation.name for mutation in MUTATIONS])
def test_fault(mutation: Mutation) -> None:
    """What it changes is there once, and the tests that have to find it are there."""
    assert (ROOT / "cdc" / mutation.file).read_text().count(mutation.old) == 1
    for test in mutation.tests:
        file, _, name = test.partition("::")
        assert f"def {name.partition('[')[0]}(" in (ROOT / file).read_text() if name else (ROOT / file).exists()
