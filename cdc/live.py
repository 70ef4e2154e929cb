"""A table as the catalog has it now, in the terms of the sink: names, types after masking, defaults, storage."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import pyarrow as pa

from cdc.pgoutput.masks import Mask, Masks, chosen
from cdc.pgoutput.messages import Column, Relation
from cdc.sink.columns import LiveTable
from cdc.sink.stored import StoredColumn
from cdc.source.catalog import Attribute, TableDefinition

__all__ = ["live_table", "relation_of"]


def live_table(
    definition: TableDefinition, published: Collection[str], masks: Masks, names: Sequence[str]
) -> LiveTable:
    """Return the table.

    Args:
        published: names of the columns that are.
        masks: CDC_MASK.
        names: by which the table is known.
    """
    there = [attribute for attribute in definition.attributes if attribute.name in published]
    masked = chosen(masks, names, [attribute.name for attribute in there])
    columns = tuple(_column(attribute, masked.get(index), definition.key) for index, attribute in enumerate(there))
    defaults = ((a.attnum, _default(a.missing, masked.get(index))) for index, a in enumerate(there))
    hidden = {attribute.attnum for attribute in definition.attributes if attribute not in there}
    known = {attnum: default for attnum, default in defaults if default is not None}
    return LiveTable(definition.storage, columns, definition.natts, frozenset(hidden), known)


def _column(attribute: Attribute, mask: Mask | None, key: Collection[int]) -> StoredColumn:
    column = Column(attribute.name, attribute.type_oid, attribute.typmod, is_key=attribute.attnum in key)
    held, label = (column, "") if mask is None else (mask.column(column), mask.label)
    return StoredColumn(held.name, held.type_oid, held.typmod, attribute.attnum, label, is_key=held.is_key)


def _default(text: str | None, mask: Mask | None) -> str | None:
    if text is None or mask is None:
        return text
    (masked,) = mask.apply(pa.array([text]).cast(pa.binary())).cast(pa.string()).to_pylist()
    return None if masked is None else str(masked)


def relation_of(definition: TableDefinition, live: LiveTable) -> Relation:
    """Return the table as the stream would describe it."""
    full = definition.replica_identity == "f"
    columns = tuple(Column(c.name, c.type_oid, c.typmod, full or c.attnum in definition.key) for c in live.columns)
    return Relation(definition.oid, definition.schema, definition.name, definition.replica_identity, columns)
