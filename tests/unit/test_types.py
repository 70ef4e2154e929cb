"""The table of types: each of its rows has its row here, and so has each kind of value that a type cannot hold."""

from __future__ import annotations

import datetime as dt
import math
import struct
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc.pgoutput.types import ColumnType, column_type
from cdc.pgoutput.types.table import BY_OID, TYPES

UTC = dt.UTC


def numeric(precision: int, scale: int) -> int:
    """Compute a typmod the way that numerictypmodin does."""
    return (precision << 16 | scale & 0x7FF) + 4


INTERVAL = pa.struct({"months": pa.int32(), "days": pa.int32(), "microseconds": pa.int64()})


def interval(months: int = 0, days: int = 0, microseconds: int = 0) -> dict[str, int]:
    return {"months": months, "days": days, "microseconds": microseconds}


# Name, typmod, Arrow type, DuckDB type, and values as Postgres prints them with what becomes of them.
TABLE = [
    ("bool", -1, pa.bool_(), "BOOLEAN", {"t": True, "f": False}),
    ("bytea", -1, pa.binary(), "BLOB", {
        r"\x": b"", r"\x00": b"\0", "\\x" + bytes(range(256)).hex(): bytes(range(256))}),
    ("int8", -1, pa.int64(), "BIGINT", {"-9223372036854775808": -(2**63), "9223372036854775807": 2**63 - 1, "0": 0}),
    ("int2", -1, pa.int16(), "SMALLINT", {"-32768": -32768, "32767": 32767}),
    ("int4", -1, pa.int32(), "INTEGER", {"-2147483648": -(2**31), "2147483647": 2**31 - 1}),
    ("json", -1, pa.string(), "JSON", {'{"b":1, "a":1,"a":2}': '{"b":1, "a":1,"a":2}', "null": "null"}),
    ("json", -1, pa.string(), "JSON", {r'"\ud83d\uDE00\\ud800\u00e9\ud7ff"': r'"\ud83d\uDE00\\ud800\u00e9\ud7ff"'}),
    ("jsonb", -1, pa.string(), "JSON", {'{"a": 1e400}': '{"a": 1e400}'}),
    ("float4", -1, pa.float32(), "FLOAT", {
        "1.1": struct.unpack("f", struct.pack("f", 1.1))[0], "-Infinity": -math.inf,
        "3.4028235e+38": 3.4028234663852886e38, "1e-45": 1.401298464324817e-45}),
    ("float8", -1, pa.float64(), "DOUBLE", {
        "1e-310": 1e-310, "Infinity": math.inf, "5e-324": 5e-324, "1.7976931348623157e+308": 1.7976931348623157e308,
        "0.1": 0.1}),
    ("date", -1, pa.date32(), "DATE", {
        "0001-01-01": dt.date(1, 1, 1), "9999-12-31": dt.date(9999, 12, 31), "2000-02-29": dt.date(2000, 2, 29),
        "1582-10-10": dt.date(1582, 10, 10)}),
    ("time", -1, pa.time64("us"), "TIME", {
        "00:00:00": dt.time(), "23:59:59.999999": dt.time(23, 59, 59, 999999),
        "12:00:00.1": dt.time(12, 0, 0, 100000)}),
    ("timestamp", -1, pa.timestamp("us"), "TIMESTAMP", {text: dt.datetime.fromisoformat(text) for text in (
        "0001-01-01 00:00:00", "1969-12-31 23:59:59.999999", "9999-12-31 23:59:59.999999", "2024-02-29 12:34:56.12")}),
    ("timestamptz", -1, pa.timestamp("us", "UTC"), "TIMESTAMP WITH TIME ZONE", {
        "2024-02-29 12:34:56.12+00": dt.datetime(2024, 2, 29, 12, 34, 56, 120000, UTC),
        "1883-11-18 12:03:57+00": dt.datetime(1883, 11, 18, 12, 3, 57, tzinfo=UTC)}),
    ("interval", -1, INTERVAL, "INTERVAL", {
        "1 year 2 mons -3 days +04:05:06.7": interval(14, -3, 14706700000), "00:00:00": interval(),
        "-1 days -00:00:00.000001": interval(0, -1, -1)}),
    ("numeric", numeric(12, 2), pa.decimal128(12, 2), "DECIMAL(12,2)",
     {"9999999999.99": Decimal("9999999999.99"), "-0.01": Decimal("-0.01"), "1.00": Decimal("1.00")}),
    ("numeric", numeric(38, 38), pa.decimal128(38, 38), "DECIMAL(38,38)", {"0." + "9" * 38: Decimal("0." + "9" * 38)}),
    ("numeric", numeric(38, 0), pa.decimal128(38, 0), "DECIMAL(38,0)", {"-" + "9" * 38: Decimal("-" + "9" * 38)}),
    ("numeric", numeric(1, 0), pa.decimal128(1, 0), "DECIMAL(1,0)", {"9": Decimal(9)}),
    *(("numeric", typmod, pa.string(), "VARCHAR", {text: text for text in texts}) for typmod, texts in (
        (-1, ("NaN", "Infinity", "1.000", "1" + "0" * 1000, "9" * 131072 + "." + "9" * 16383)),
        (numeric(39, 0), ("9" * 39,)),
        (numeric(5, -3), ("12345000",)),
        (numeric(3, 5), ("0.00123",)),
        (numeric(1000, -1000), ("0",)))),
    ("uuid", -1, pa.string(), "UUID", {
        "550e8400-e29b-41d4-a716-446655440000": "550e8400-e29b-41d4-a716-446655440000"}),
    *((name, typmod, pa.string(), "VARCHAR", {text: text for text in texts}) for name, typmod, *texts in (
        ("text", -1, "", "\\N", "a\nb\tc\\", "é😀\uffff", "NULL"),
        ("varchar", 14, "a "), ("bpchar", 7, "a  "), ("name", -1, "pg_class"), ('"char"', -1, "", "a", r"\377"),
        ("money", -1, "-$1,234.56"), ("bit", 3, "101"), ("varbit", -1, "", "1"),
        ("timetz", -1, "24:00:00-15:59:59"), ("jsonpath", -1, '$."a"[*]?(@ > 1)'), ("xml", -1, "<a b='1'>é</a>"),
        ("tsvector", -1, "'a':1 'b c':2A"), ("tsquery", -1, "'a' & !'b'"),
        ("int4range", -1, "empty", "[1,5)"), ("int8range", -1, "(,)"), ("numrange", -1, "[1.0,2.50]"),
        ("daterange", -1, "[-infinity,infinity)"), ("tsrange", -1, '["2024-01-01 00:00:00",)'),
        ("tstzrange", -1, '["2024-01-01 00:00:00+00","2024-01-02 00:00:00+00")'),
        ("int4multirange", -1, "{}", "{[1,3),[5,7)}"), ("int8multirange", -1, "{(,)}"),
        ("nummultirange", -1, "{[1.0,2.50]}"), ("datemultirange", -1, "{[2024-01-01,)}"),
        ("tsmultirange", -1, '{["2024-01-01 00:00:00",)}'), ("tstzmultirange", -1, "{}"),
        ("inet", -1, "10.0.0.1/8", "2001:db8::"), ("cidr", -1, "10.0.0.0/8"), ("macaddr", -1, "08:00:2b:01:02:03"),
        ("macaddr8", -1, "08:00:2b:01:02:03:04:05"),
        ("point", -1, "(1e-300,Infinity)"), ("line", -1, "{1,-1,0}"), ("lseg", -1, "[(0,0),(1,1)]"),
        ("box", -1, "(1,1),(0,0)"), ("path", -1, "((0,0),(1,1))", "[(0,0),(1,1)]"), ("polygon", -1, "((0,0),(1,1))"),
        ("circle", -1, "<(0,0),1>"),
        ("oid", -1, "4294967295"), ("xid", -1, "3"), ("xid8", -1, "18446744073709551615"), ("cid", -1, "0"),
        ("tid", -1, "(4294967295,65535)"), ("pg_lsn", -1, "FFFFFFFF/FFFFFFFF"), ("pg_snapshot", -1, "10:20:10,14"),
        ("txid_snapshot", -1, "10:20:"), ("refcursor", -1, "c"), ("regclass", -1, "pg_class", "4294967295"),
        ("regcollation", -1, '"C"'), ("regconfig", -1, "english"), ("regdictionary", -1, "simple"),
        ("regnamespace", -1, "public"), ("regoper", -1, "pg_catalog.||/"), ("regoperator", -1, "+(integer,integer)"),
        ("regproc", -1, "now"), ("regprocedure", -1, "now()"), ("regrole", -1, "postgres"), ("regtype", -1, "integer"),
        ("aclitem", -1, "postgres=r/postgres"), ("int2vector", -1, "1 2"), ("oidvector", -1, "23 25"),
        ("gtsvector", -1, "1 true bits, 0 false bits"), ("pg_node_tree", -1, "{CONST}"), ("pg_ndistinct", -1, "{}"),
        ("pg_dependencies", -1, "{}"), ("pg_mcv_list", -1, r"\x00"), ("pg_brin_bloom_summary", -1, "{}"),
        ("pg_brin_minmax_multi_summary", -1, "{}"))),
]  # fmt: skip
OIDS = {row.name: row.oid for row in TYPES}
IDS = [f"{row[0]}-{row[3]}-{row[1]}" for row in TABLE]
DOCS = Path(__file__).parents[2] / "docs" / "types.md"


def quoted(text: str | None) -> str:
    """Return an element as array_out may print it: in quotes."""
    return "NULL" if text is None else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


@pytest.mark.parametrize(("name", "typmod", "arrow", "duckdb", "values"), TABLE, ids=IDS)
def test_table(name: str, typmod: int, arrow: pa.DataType, duckdb: str, values: dict[str, object]) -> None:
    """A1 to A11, A14, A18 to A20: every value, with a NULL before, between and behind, which stays NULL."""
    kind = column_type(OIDS[name], typmod)
    assert (kind.arrow, kind.duckdb) == (arrow, duckdb)
    texts = [text for value in values for text in (None, value)] + [None]
    expected = [value for text in values for value in (None, values[text])] + [None]
    array, misfits = kind.parse(pa.array(texts, pa.string()))
    assert array.type == arrow
    assert array.to_pylist() == expected
    assert misfits is None


ARRAYS = [row for row in TABLE if BY_OID[OIDS[row[0]]].array_oid]


@pytest.mark.parametrize(
    ("name", "typmod", "arrow", "duckdb", "values"), ARRAYS, ids=[f"{r[0]}-{r[1]}" for r in ARRAYS]
)
def test_arrays(name: str, typmod: int, arrow: pa.DataType, duckdb: str, values: dict[str, object]) -> None:
    """A13: a list of each type, by the delimiter that it has."""
    row = BY_OID[OIDS[name]]
    kind = column_type(row.array_oid, typmod)
    assert (kind.arrow, kind.duckdb) == (pa.list_(arrow), f"{duckdb}[]")
    elements = [None, *values, None]
    text = "{" + row.delimiter.join(map(quoted, elements)) + "}"
    array, misfits = kind.parse(pa.array([text, None, "{}", text]))
    expected = [None, *values.values(), None]
    assert array.to_pylist() == [expected, None, [], expected]
    assert misfits is None


def test_a_type_that_is_not_there() -> None:
    """A21: what stands in no table is text."""
    kind = column_type(4_000_000_000, 77)
    assert kind.duckdb == "VARCHAR"
    assert kind.parse(pa.array(["anything"]))[0].to_pylist() == ["anything"]


def test_every_row_is_tested() -> None:
    """Every type of the table of types has its row here, and an OID of its own."""
    assert {row.name for row in TYPES} == {row[0] for row in TABLE}
    oids = [oid for row in TYPES for oid in (row.oid, row.array_oid) if oid]
    assert len(set(oids)) == len(oids)


def test_every_row_is_documented() -> None:
    """docs/types.md has each type, with the DuckDB type that it has."""
    rows = [line.strip("| ").split(" | ") for line in DOCS.read_text().splitlines() if line.startswith("| ")]
    documented = {name.strip(): row[1] for row in rows for name in row[0].split(",")}
    assert {row.name: documented.get(row.name) for row in TYPES} == {row.name: row.column.duckdb for row in TYPES}
    assert "DECIMAL(p,s)" in DOCS.read_text()


@pytest.mark.parametrize(("name", "typmod", "arrow"), [row[:3] for row in TABLE], ids=IDS)
@pytest.mark.parametrize("n", [0, 1, 3])
def test_nothing_but_null(name: str, typmod: int, arrow: pa.DataType, n: int) -> None:
    array, misfits = column_type(OIDS[name], typmod).parse(pa.nulls(n, pa.string()))
    assert (array.type, array.to_pylist(), misfits) == (arrow, [None] * n, None)


UNFIT = [
    (16, -1, "t", ["true", "", "T"]),
    (17, -1, r"\x01", [r"\x0", r"\x0g", r"\000", "x", "\\", "", "\\y00", "ab"]),
    (
        114,
        -1,
        r'"\ud83d\ude00"',
        [r'"\ud800"', r'["\uDE00"]', r'"\ud83d\\\ude00"', r'{"\\\ud83dx":1}', r'"\ud83d\ud83d\ude00"'],
    ),
    (20, -1, "1", ["9223372036854775808", "", "1.0"]),
    (21, -1, "1", ["32768"]),
    (23, -1, "1", ["2147483648"]),
    (700, -1, "1", ["", "x"]),
    (701, -1, "1", ["one"]),
    (1082, -1, "2024-01-01", ["yesterday", "2024-13-01"]),
    (1083, -1, "01:02:03", ["24:00:01", "1"]),
    (1114, -1, "2024-01-01 00:00:00", ["294276-12-31 23:59:59.999999", "2024-01-01 00:00:00+00"]),
    (1184, -1, "2024-01-01 00:00:00+00", ["294247-01-10 04:00:54.775807+00", "2024-01-01 00:00:00"]),
    (1186, -1, "1 day", ["infinity", "-infinity", "P1D"]),
    (1007, -1, "{1}", ["{{1,2},{3,4}}", "[0:1]={1,2}", "{x}"]),
    (1700, numeric(5, 2), "1.00", ["NaN", "Infinity", "-Infinity", "1000.00", "1.001"]),
    (1700, numeric(38, 0), "1", ["1" + "0" * 38, "NaN"]),
]


@pytest.mark.parametrize(("oid", "typmod", "good", "bad"), UNFIT, ids=[f"{row[0]}-{row[1]}" for row in UNFIT])
def test_unfit(oid: int, typmod: int, good: str, bad: list[str]) -> None:
    """A3, A5, A6, A7: NULL and marked, never another value; the others of the column are not touched."""
    kind = column_type(oid, typmod)
    texts = [good, None, *[text for value in bad for text in (value, good)], None]
    array, misfits = kind.parse(pa.array(texts))
    assert misfits is not None
    assert misfits.tolist() == [text in bad for text in texts]
    (expected,) = kind.parse(pa.array([good]))[0].to_pylist()
    assert array.to_pylist() == [expected if text == good else None for text in texts]
    assert array.type == kind.arrow


def test_a_slice_of_a_column() -> None:
    """Offsets of Arrow arrays are respected, on the fast path and on the slow one."""
    whole = pa.array(["zz", r"\x0102", None, r"\x", r"\xff", "zz"])
    array, misfits = column_type(17, -1).parse(whole[1:5])
    assert (array.to_pylist(), misfits) == ([b"\1\2", None, b"", b"\xff"], None)
    array, misfits = column_type(17, -1).parse(whole[1:6])
    assert array.to_pylist() == [b"\1\2", None, b"", b"\xff", None]
    assert misfits is not None
    assert misfits.tolist() == [False] * 4 + [True]
    array, misfits = column_type(23, -1).parse(pa.array(["x", "1", "y", "2"])[1:])
    assert array.to_pylist() == [1, None, 2]
    assert misfits is not None
    assert misfits.tolist() == [False, True, False]


def test_nan() -> None:
    """A2: floats hold NaN and the sign of zero."""
    array, misfits = column_type(701, -1).parse(pa.array(["NaN", "-0"]))
    assert math.isnan(array[0].as_py())
    assert math.copysign(1, array[1].as_py()) == -1
    assert misfits is None


def _round_trips(kind: ColumnType, texts: list[str | None], expected: list[object]) -> None:
    array, misfits = kind.parse(pa.array(texts, pa.string()))
    assert array.to_pylist() == expected
    assert misfits is None


@given(st.lists(st.one_of(st.none(), st.binary(max_size=40))))
def test_any_bytea(values: list[bytes | None]) -> None:
    """A10."""
    _round_trips(column_type(17, -1), [v if v is None else "\\x" + v.hex() for v in values], list(values))


@given(st.lists(st.one_of(st.none(), st.decimals(-(10**10), 10**10, places=2).filter(lambda d: abs(d) < 10**10))))
def test_any_decimal(values: list[Decimal | None]) -> None:
    """A3: exact, at any scale up to the declared one."""
    _round_trips(column_type(1700, numeric(12, 2)), [v if v is None else f"{v:f}" for v in values], list(values))


@given(st.lists(st.one_of(st.none(), st.datetimes())))
def test_any_timestamp(values: list[dt.datetime | None]) -> None:
    """A6: microseconds, trailing zeros left out as Postgres does."""
    texts = [v if v is None else v.isoformat(" ").rstrip("0" if v.microsecond else "") for v in values]
    _round_trips(column_type(1114, -1), texts, list(values))
    _round_trips(
        column_type(1184, -1),
        [text if text is None else text + "+00" for text in texts],
        [v if v is None else v.replace(tzinfo=UTC) for v in values],
    )


@given(st.lists(st.one_of(st.none(), st.times())))
def test_any_time(values: list[dt.time | None]) -> None:
    """A7."""
    _round_trips(column_type(1083, -1), [v if v is None else v.isoformat() for v in values], list(values))


@given(st.lists(st.floats(allow_nan=False)))
def test_any_double(values: list[float]) -> None:
    """A2: the shortest text that reads back the same."""
    texts: list[str | None] = [repr(v).replace("inf", "Infinity") for v in values]
    _round_trips(column_type(701, -1), texts, list(values))
