"""What a consumer that was killed has left behind, and what must hold of it before anybody mends it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import duckdb

from cdc.source import slot
from cdc.source.connection import connect
from tests.conftest import Database, Lake
from tests.mirror import open_warehouse, until

__all__ = ["Remains", "glob", "remains", "temporaries"]


def glob(lake: Lake) -> set[str]:
    """Return the files that a reader's glob of the history finds, relative to its folder."""
    return _below(lake.history, "*.parquet")


def temporaries(lake: Lake) -> set[str]:
    """Return the names that the history's temporary files are to get, relative to its folder."""
    return {path.removesuffix(".tmp") for path in _below(lake.history, "*.tmp")}


def _below(folder: Path, pattern: str) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob(pattern)}


@dataclasses.dataclass(frozen=True, slots=True)
class Remains:
    """Source, warehouse and history after a consumer has died.

    Attributes:
        confirmed: the slot's confirmed_flush_lsn; None: there is no slot.
        checkpoint: the warehouse's position; None: it has none yet.
        states: of the tables, by schema.name.
        tables: schema.name of what a reader finds in the warehouse, without the copies that are being made.
        manifest: paths in ``_cdc.files``.
        found: what a glob finds.
        temporary: names of the temporary files, without their suffix.
    """

    confirmed: int | None
    checkpoint: int | None
    states: dict[str, str]
    tables: set[str]
    manifest: set[str]
    found: set[str]
    temporary: set[str]

    @property
    def unpublished(self) -> bool:
        """Whether the death came between a commit and the end of its renames."""
        return not self.manifest <= self.found

    @property
    def uncommitted(self) -> bool:
        """Whether the death came in the middle of a batch (or copy) that has written files."""
        return not self.temporary <= self.manifest

    @property
    def unconfirmed(self) -> bool:
        """Whether the server does not know yet how much is durable."""
        return self.checkpoint is not None and self.confirmed is not None and self.confirmed < self.checkpoint

    def check(self) -> None:
        """Fail if a row shows that is not committed, a committed one is lost, or too much was confirmed (J4, J7)."""
        assert self.found <= self.manifest, f"a glob sees uncommitted files: {sorted(self.found - self.manifest)[:3]}"
        gone = self.manifest - self.found - self.temporary
        assert not gone, f"files that were committed are gone: {sorted(gone)[:3]}"
        if self.confirmed is not None and self.checkpoint is not None:
            assert self.confirmed <= self.checkpoint, "the slot was confirmed beyond what is durable"
        hidden = {name for name, state in self.states.items() if state in ("pending", "copying")}
        assert not self.tables & hidden, "a table shows before its copy is complete"

    def check_clean(self) -> None:
        """Fail if a consumer that has ended in order left anything unfinished."""
        self.check()
        assert not self.temporary, f"temporary files are left: {sorted(self.temporary)[:3]}"
        assert self.found == self.manifest
        assert set(self.states.values()) <= {"streaming"}, self.states
        assert self.tables == set(self.states)


def remains(database: Database, lake: Lake, slot_name: str = "cdc") -> Remains:
    """Look at what is left once the server has noticed that the consumer is gone."""

    def gone() -> bool:
        with connect(database.dsn) as connection:
            found = slot.read(connection, slot_name)
        return found is None or not found.active

    until(gone, what="the server lets go of the slot")
    with connect(database.dsn) as connection:
        found = slot.read(connection, slot_name)
    confirmed = None if found is None else found.confirmed_flush_lsn
    checkpoint: int | None = None
    states: dict[str, str] = {}
    tables: set[str] = set()
    manifest: set[str] = set()
    if lake.warehouse.exists():
        warehouse = open_warehouse(lake)
        try:
            query = "SELECT schema_name || '.' || table_name FROM duckdb_tables() WHERE schema_name <> '_cdc'"
            tables = {name for (name,) in warehouse.execute(query).fetchall() if "._cdc_copy_" not in name}
            (checkpoint,) = warehouse.execute("SELECT lsn FROM _cdc.checkpoint").fetchall()[0]
            states = dict(
                warehouse.execute("SELECT schema_name || '.' || table_name, state FROM _cdc.tables").fetchall()
            )
            manifest = {path for (path,) in warehouse.execute("SELECT path FROM _cdc.files").fetchall()}
        except duckdb.CatalogException:
            assert not tables  # it died before the intent: the file is there, and nothing is in it
        finally:
            warehouse.close()
    return Remains(confirmed, checkpoint, states, tables, manifest, glob(lake), temporaries(lake))
