"""The one table of types: every built-in type that a column can have, and how it is held.

Types of users and of extensions are held as a built-in one: see basis.py. What stands in neither is text, because the
last rule of `column_type` says so. Tests and docs/types.md have a row for each row here.

Source: pg_type.dat for OIDs and delimiters; PostgreSQL manual, "Data Types".
"""

from __future__ import annotations

import dataclasses
import functools

from cdc.pgoutput.types.arrays import ListType
from cdc.pgoutput.types.column import ColumnType
from cdc.pgoutput.types.scalars import (
    BIGINT,
    BLOB,
    BOOLEAN,
    DOUBLE,
    INTEGER,
    JSON,
    REAL,
    SMALLINT,
    UUID,
    VARCHAR,
    decimal,
)
from cdc.pgoutput.types.temporal import DATE, INTERVAL, TIME, TIMESTAMP, TIMESTAMPTZ

__all__ = ["BY_ARRAY_OID", "BY_OID", "NUMERIC", "TYPES", "Type", "column_type", "decimal_typmod"]


@dataclasses.dataclass(frozen=True, slots=True)
class Type:
    """A built-in type.

    Attributes:
        oid, name, array_oid, delimiter: of pg_type; array_oid 0: there is no array of it.
        column: how it is held without a type modifier.
    """

    oid: int
    name: str
    array_oid: int
    column: ColumnType
    delimiter: str = ","


TYPES = (
    # Truth, numbers, money
    Type(16, "bool", 1000, BOOLEAN),
    Type(21, "int2", 1005, SMALLINT),
    Type(23, "int4", 1007, INTEGER),
    Type(20, "int8", 1016, BIGINT),
    Type(1700, "numeric", 1231, VARCHAR),  # but numeric(p,s): see `column_type`
    Type(700, "float4", 1021, REAL),
    Type(701, "float8", 1022, DOUBLE),
    Type(790, "money", 791, VARCHAR),
    # Text and bytes
    Type(25, "text", 1009, VARCHAR),
    Type(1043, "varchar", 1015, VARCHAR),
    Type(1042, "bpchar", 1014, VARCHAR),
    Type(19, "name", 1003, VARCHAR),
    Type(18, '"char"', 1002, VARCHAR),
    Type(17, "bytea", 1001, BLOB),
    Type(1560, "bit", 1561, VARCHAR),
    Type(1562, "varbit", 1563, VARCHAR),
    # Time
    Type(1082, "date", 1182, DATE),
    Type(1114, "timestamp", 1115, TIMESTAMP),
    Type(1184, "timestamptz", 1185, TIMESTAMPTZ),
    Type(1083, "time", 1183, TIME),
    Type(1266, "timetz", 1270, VARCHAR),
    Type(1186, "interval", 1187, INTERVAL),
    # Structured
    Type(2950, "uuid", 2951, UUID),
    Type(114, "json", 199, JSON),
    Type(3802, "jsonb", 3807, JSON),
    Type(4072, "jsonpath", 4073, VARCHAR),
    Type(142, "xml", 143, VARCHAR),
    Type(3614, "tsvector", 3643, VARCHAR),
    Type(3615, "tsquery", 3645, VARCHAR),
    # Ranges
    Type(3904, "int4range", 3905, VARCHAR),
    Type(3926, "int8range", 3927, VARCHAR),
    Type(3906, "numrange", 3907, VARCHAR),
    Type(3912, "daterange", 3913, VARCHAR),
    Type(3908, "tsrange", 3909, VARCHAR),
    Type(3910, "tstzrange", 3911, VARCHAR),
    Type(4451, "int4multirange", 6150, VARCHAR),
    Type(4536, "int8multirange", 6157, VARCHAR),
    Type(4532, "nummultirange", 6151, VARCHAR),
    Type(4535, "datemultirange", 6155, VARCHAR),
    Type(4533, "tsmultirange", 6152, VARCHAR),
    Type(4534, "tstzmultirange", 6153, VARCHAR),
    # Addresses and geometry
    Type(869, "inet", 1041, VARCHAR),
    Type(650, "cidr", 651, VARCHAR),
    Type(829, "macaddr", 1040, VARCHAR),
    Type(774, "macaddr8", 775, VARCHAR),
    Type(600, "point", 1017, VARCHAR),
    Type(628, "line", 629, VARCHAR),
    Type(601, "lseg", 1018, VARCHAR),
    Type(603, "box", 1020, VARCHAR, ";"),
    Type(602, "path", 1019, VARCHAR),
    Type(604, "polygon", 1027, VARCHAR),
    Type(718, "circle", 719, VARCHAR),
    # The system's own
    Type(26, "oid", 1028, VARCHAR),
    Type(28, "xid", 1011, VARCHAR),
    Type(5069, "xid8", 271, VARCHAR),
    Type(29, "cid", 1012, VARCHAR),
    Type(27, "tid", 1010, VARCHAR),
    Type(3220, "pg_lsn", 3221, VARCHAR),
    Type(5038, "pg_snapshot", 5039, VARCHAR),
    Type(2970, "txid_snapshot", 2949, VARCHAR),
    Type(1790, "refcursor", 2201, VARCHAR),
    Type(2205, "regclass", 2210, VARCHAR),
    Type(4191, "regcollation", 4192, VARCHAR),
    Type(3734, "regconfig", 3735, VARCHAR),
    Type(3769, "regdictionary", 3770, VARCHAR),
    Type(4089, "regnamespace", 4090, VARCHAR),
    Type(2203, "regoper", 2208, VARCHAR),
    Type(2204, "regoperator", 2209, VARCHAR),
    Type(24, "regproc", 1008, VARCHAR),
    Type(2202, "regprocedure", 2207, VARCHAR),
    Type(4096, "regrole", 4097, VARCHAR),
    Type(2206, "regtype", 2211, VARCHAR),
    Type(1033, "aclitem", 1034, VARCHAR),
    Type(22, "int2vector", 1006, VARCHAR),
    Type(30, "oidvector", 1013, VARCHAR),
    Type(3642, "gtsvector", 3644, VARCHAR),
    Type(194, "pg_node_tree", 0, VARCHAR),
    Type(3361, "pg_ndistinct", 0, VARCHAR),
    Type(3402, "pg_dependencies", 0, VARCHAR),
    Type(5017, "pg_mcv_list", 0, VARCHAR),
    Type(4600, "pg_brin_bloom_summary", 0, VARCHAR),
    Type(4601, "pg_brin_minmax_multi_summary", 0, VARCHAR),
)

BY_OID = {row.oid: row for row in TYPES}
BY_ARRAY_OID = {row.array_oid: row for row in TYPES if row.array_oid}
NUMERIC = 1700


@functools.lru_cache(maxsize=4096)
def column_type(type_oid: int, typmod: int) -> ColumnType:
    """Return how a column of type `type_oid` with modifier `typmod` (-1: none) is held."""
    if type_oid in BY_ARRAY_OID:
        element = BY_ARRAY_OID[type_oid]
        return ListType(column_type(element.oid, typmod), element.delimiter)
    if type_oid == NUMERIC and typmod >= 0:
        return decimal(*_precision_and_scale(typmod)) or VARCHAR
    return BY_OID[type_oid].column if type_oid in BY_OID else VARCHAR


def _precision_and_scale(typmod: int) -> tuple[int, int]:
    """Take a modifier of numeric apart; the scale has 11 bits and a sign."""
    return (typmod - 4) >> 16 & 0xFFFF, ((typmod - 4) & 0x7FF ^ 0x400) - 0x400


def decimal_typmod(precision: int, scale: int) -> int:
    """Return the modifier of numeric(precision,scale)."""
    return (precision << 16 | scale & 0x7FF) + 4
