"""A table as the catalog has it now, in the terms of the sink: names, types after masking, defaults, storage."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import pyarrow as pa

from cdc.pgoutput.masks import Mask, Masks, chosen
from cdc.pgoutput.messages import Column, Relation
from cdc.sink.schema import LiveColumn, LiveTable
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
    columns = tuple(_column(attribute, masked.get(index)) for index, attribute in enumerate(there))
    hidden = {attribute.attnum for attribute in definition.attributes if attribute not in there}
    return LiveTable(definition.storage, columns, definition.natts, frozenset(hidden))


def _column(attribute: Attribute, mask: Mask | None) -> LiveColumn:
    a = attribute
    if mask is None:
        return LiveColumn(a.name, a.type_oid, a.typmod, a.attnum, a.missing)
    held = mask.column(Column(a.name, a.type_oid, a.typmod, is_key=False))
    (missing,) = mask.apply(pa.array([a.missing], pa.string()).cast(pa.binary())).cast(pa.string()).to_pylist()
    return LiveColumn(a.name, held.type_oid, held.typmod, a.attnum, missing, mask.label)


def relation_of(definition: TableDefinition, live: LiveTable) -> Relation:
    """Return the table as the stream would describe it."""
    full = definition.replica_identity == "f"
    columns = tuple(Column(c.name, c.type_oid, c.typmod, full or c.attnum in definition.key) for c in live.columns)
    return Relation(definition.oid, definition.schema, definition.name, definition.replica_identity, columns)
