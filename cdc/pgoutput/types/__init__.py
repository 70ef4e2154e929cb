"""How Postgres' types are held: the table (table.py), what stands for other types (basis.py), and parsers by family."""

from cdc.pgoutput.types.basis import TEXT, Basis, Declarations, Declared, basis, is_built_in
from cdc.pgoutput.types.choices import may_be, read_choice
from cdc.pgoutput.types.column import ColumnType
from cdc.pgoutput.types.table import column_type

__all__ = [
    "TEXT",
    "Basis",
    "ColumnType",
    "Declarations",
    "Declared",
    "basis",
    "column_type",
    "is_built_in",
    "may_be",
    "read_choice",
]
