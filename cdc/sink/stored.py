"""What ``_cdc`` holds of a source and its tables, as the rest of the package knows it.

A table's state:

    pending ──▶ copying ──▶ streaming ──▶ resyncing ──▶ streaming
                   │            │             │
                   └────────────┴─────────────┴──▶ error, dropped   (pending again by `cdc resync`, or when published)
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any, Literal

from cdc.pgoutput.types import Basis, ColumnType, column_type

__all__ = ["Checkpoint", "SchemaChange", "State", "StoredColumn", "Table"]

State = Literal["pending", "copying", "streaming", "resyncing", "dropped", "error"]


@dataclasses.dataclass(frozen=True, slots=True)
class Checkpoint:
    """Which source this warehouse mirrors, and how far.

    Attributes:
        lsn: everything that was committed before it is in, nothing that was committed from it on; None: the slot is
            about to be created (an intent, which tells our own unfinished slot from a foreign one).
    """

    system_identifier: str
    database: str
    slot: str
    publication: str
    lsn: int | None


@dataclasses.dataclass(frozen=True, slots=True)
class StoredColumn:
    """A column as the warehouse has it, with what it was in Postgres.

    Attributes:
        type_oid, typmod: of a column that is masked by digests, which is text, those of text.
        attnum: pg_attribute.attnum: it tells a renamed column from a dropped and an added one.
        mask: `Mask.label`; '': it is not masked.
        alias: its name here, where that is another.
        held_as: the built-in type as which it is held, where that is another.
        is_key: it is one of those that identify a row; None: not known, an earlier version has written it.
    """

    name: str
    type_oid: int
    typmod: int
    attnum: int
    mask: str = ""
    alias: str = ""
    held_as: Basis | None = None
    is_key: bool | None = None

    @property
    def here(self) -> str:
        """Its name in DuckDB and in the change log."""
        return self.alias or self.name

    @property
    def basis(self) -> Basis:
        """The built-in type as which it is held."""
        return self.held_as or Basis(self.type_oid, self.typmod)

    @property
    def kind(self) -> ColumnType:
        """How it is held."""
        return column_type(*self.basis)

    @classmethod
    def read(cls, values: Sequence[Any]) -> StoredColumn:
        """Return the column that `_cdc.tables` has, as JSON; earlier formats had fewer values of it."""
        read = cls(*values)
        return dataclasses.replace(read, held_as=Basis(*read.held_as)) if read.held_as else read


@dataclasses.dataclass(frozen=True, slots=True)
class Table:
    """One row of ``_cdc.tables``.

    Attributes:
        storage: `TableDefinition.storage`, as it was when the table was last found to have been rewritten by nobody;
            behind it `truncated` notes the last TRUNCATE since then. '': unknown.
        copy_lsn: the L of its copy: what was committed before is in the copy, what was committed from there on is not.
        natts: the highest attnum that was ever used when it had `columns`; a column that is added has a higher one.
        types: `TableDefinition.types`, as they were when the table was last found to print as before.
        deletes: hard or soft, as it was when the table was copied.
        publication: by which entries of which publications it is published, and what these publish (reconcile.py writes
            it): as that changes, so does what comes of it in the stream.
        alias: its name here, where that is another.
        widened: attnums of columns that are held as text, because their type here cannot hold what they have.
    """

    oid: int
    schema: str
    name: str
    state: State
    reason: str = ""
    storage: str = ""
    copy_lsn: int | None = None
    columns: tuple[StoredColumn, ...] = ()
    natts: int = 0
    types: str = "{}"
    deletes: str = "hard"
    publication: str = ""
    alias: str = ""
    widened: tuple[int, ...] = ()

    @property
    def here(self) -> tuple[str, str]:
        """Its schema and name in DuckDB and in the change log."""
        return self.schema, self.alias or self.name

    @property
    def publishes(self) -> frozenset[str]:
        """The first letters of insert, update, delete and truncate, as far as the stream has them."""
        return _publishes(self.publication)

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}"


@functools.lru_cache(maxsize=4096)
def _publishes(publication: str) -> frozenset[str]:
    if not publication.startswith("["):
        return frozenset("iudt")
    _, entries = json.loads(publication)
    return frozenset(kind for _, _, _, publishes, _ in entries for kind in publishes)


@dataclasses.dataclass(frozen=True, slots=True)
class SchemaChange:
    """DDL that was followed.

    Attributes:
        lsn, seq: the first change of the table after it; of DDL without one, a position of the stream and 0. What is
            noted for one of them happened at once: two columns may swap their names.
        text: what changed.
        old_name, new_name: of a column that was renamed; of one that was added or dropped one of them; else None.
        default_value: what rows from before have in a column that was added, as Postgres prints it; None: NULL.
        attnum: of a column that was added.
    """

    lsn: int
    seq: int
    text: str
    old_name: str | None = None
    new_name: str | None = None
    default_value: str | None = None
    attnum: int | None = None
