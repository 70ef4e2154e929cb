"""The table of types: each of its rows has its row here, and so has each kind of value that a type cannot hold."""

from __future__ import annotations

import datetime as dt
import math
import struct
from decimal import Decimal

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc.pgoutput import types
from cdc.pgoutput.types import ColumnType, column_type

UTC = dt.UTC


def numeric(precision: int, scale: int) -> int:
    """Compute a typmod the way that numerictypmodin does."""
    return (precision << 16 | scale & 0x7FF) + 4


# OID, typmod, Arrow type, DuckDB type, and values as Postgres prints them with what becomes of them.
TABLE = [
    (16, -1, pa.bool_(), "BOOLEAN", {"t": True, "f": False}),
    (17, -1, pa.binary(), "BLOB", {r"\x": b"", r"\x00": b"\0", "\\x" + bytes(range(256)).hex(): bytes(range(256))}),
    (18, -1, pa.string(), "VARCHAR", {"": "", "a": "a", r"\377": r"\377"}),
    (19, -1, pa.string(), "VARCHAR", {"pg_class": "pg_class"}),
    (20, -1, pa.int64(), "BIGINT", {"-9223372036854775808": -(2**63), "9223372036854775807": 2**63 - 1, "0": 0}),
    (21, -1, pa.int16(), "SMALLINT", {"-32768": -32768, "32767": 32767}),
    (23, -1, pa.int32(), "INTEGER", {"-2147483648": -(2**31), "2147483647": 2**31 - 1}),
    (25, -1, pa.string(), "VARCHAR", {text: text for text in ("", "\\N", "a\nb\tc\\", "é😀\uffff", "NULL")}),
    (114, -1, pa.string(), "JSON", {'{"b":1, "a":1,"a":2}': '{"b":1, "a":1,"a":2}', "null": "null"}),
    (114, -1, pa.string(), "JSON", {r'"\ud83d\uDE00\\ud800\u00e9\ud7ff"': r'"\ud83d\uDE00\\ud800\u00e9\ud7ff"'}),
    (700, -1, pa.float32(), "FLOAT", {"1.1": struct.unpack("f", struct.pack("f", 1.1))[0], "-Infinity": -math.inf,
                                      "3.4028235e+38": 3.4028234663852886e38, "1e-45": 1.401298464324817e-45}),
    (701, -1, pa.float64(), "DOUBLE", {"1e-310": 1e-310, "Infinity": math.inf, "5e-324": 5e-324,
                                       "1.7976931348623157e+308": 1.7976931348623157e308, "0.1": 0.1}),
    (1042, 7, pa.string(), "VARCHAR", {"a  ": "a  "}),
    (1043, 14, pa.string(), "VARCHAR", {"a ": "a "}),
    (1082, -1, pa.date32(), "DATE", {"0001-01-01": dt.date(1, 1, 1), "9999-12-31": dt.date(9999, 12, 31),
                                     "2000-02-29": dt.date(2000, 2, 29), "1582-10-10": dt.date(1582, 10, 10)}),
    (1083, -1, pa.time64("us"), "TIME", {"00:00:00": dt.time(), "23:59:59.999999": dt.time(23, 59, 59, 999999),
                                         "12:00:00.1": dt.time(12, 0, 0, 100000)}),
    (1114, -1, pa.timestamp("us"), "TIMESTAMP", {text: dt.datetime.fromisoformat(text) for text in (
        "0001-01-01 00:00:00", "1969-12-31 23:59:59.999999", "9999-12-31 23:59:59.999999", "2024-02-29 12:34:56.12")}),
    (1184, -1, pa.timestamp("us", "UTC"), "TIMESTAMP WITH TIME ZONE",
     {"2024-02-29 12:34:56.12+00": dt.datetime(2024, 2, 29, 12, 34, 56, 120000, UTC),
      "1883-11-18 12:03:57+00": dt.datetime(1883, 11, 18, 12, 3, 57, tzinfo=UTC)}),
    (1186, -1, pa.string(), "VARCHAR", {"1 year 2 mons -3 days +04:05:06.7": "1 year 2 mons -3 days +04:05:06.7"}),
    (1700, numeric(12, 2), pa.decimal128(12, 2), "DECIMAL(12,2)",
     {"9999999999.99": Decimal("9999999999.99"), "-0.01": Decimal("-0.01"), "1.00": Decimal("1.00")}),
    (1700, numeric(38, 38), pa.decimal128(38, 38), "DECIMAL(38,38)", {"0." + "9" * 38: Decimal("0." + "9" * 38)}),
    (1700, numeric(38, 0), pa.decimal128(38, 0), "DECIMAL(38,0)", {"-" + "9" * 38: Decimal("-" + "9" * 38)}),
    (1700, numeric(1, 0), pa.decimal128(1, 0), "DECIMAL(1,0)", {"9": Decimal(9)}),
    (1700, -1, pa.string(), "VARCHAR", {"NaN": "NaN", "1.000": "1.000", "1" + "0" * 1000: "1" + "0" * 1000}),
    (1700, numeric(39, 0), pa.string(), "VARCHAR", {"9" * 39: "9" * 39}),
    (1700, numeric(5, -3), pa.string(), "VARCHAR", {"12345000": "12345000"}),
    (1700, numeric(3, 5), pa.string(), "VARCHAR", {"0.00123": "0.00123"}),
    (1700, numeric(1000, -1000), pa.string(), "VARCHAR", {"0": "0"}),
    (2950, -1, pa.string(), "UUID", {"550e8400-e29b-41d4-a716-446655440000": "550e8400-e29b-41d4-a716-446655440000"}),
    (3802, -1, pa.string(), "JSON", {'{"a": 1e400}': '{"a": 1e400}'}),
    (26, -1, pa.string(), "VARCHAR", {"4294967295": "4294967295"}),
    (1007, -1, pa.string(), "VARCHAR", {"{1,NULL}": "{1,NULL}"}),
    (4_000_000_000, 77, pa.string(), "VARCHAR", {"anything": "anything"}),
]  # fmt: skip
IDS = [f"{row[0]}-{row[3]}-{row[1]}" for row in TABLE]


@pytest.mark.parametrize(("oid", "typmod", "arrow", "duckdb", "values"), TABLE, ids=IDS)
def test_table(oid: int, typmod: int, arrow: pa.DataType, duckdb: str, values: dict[str, object]) -> None:
    """A1 to A11: every value, with a NULL before, between and behind, which stays NULL."""
    kind = column_type(oid, typmod)
    assert (kind.arrow, kind.duckdb) == (arrow, duckdb)
    texts = [text for value in values for text in (None, value)] + [None]
    expected = [value for text in values for value in (None, values[text])] + [None]
    array, misfits = kind.parse(pa.array(texts, pa.string()))
    assert array.type == arrow
    assert array.to_pylist() == expected
    assert misfits is None


def test_every_row_is_tested() -> None:
    assert set(types._TYPES) <= {row[0] for row in TABLE}


@pytest.mark.parametrize(("oid", "typmod", "arrow"), [row[:3] for row in TABLE], ids=IDS)
@pytest.mark.parametrize("n", [0, 1, 3])
def test_nothing_but_null(oid: int, typmod: int, arrow: pa.DataType, n: int) -> None:
    array, misfits = column_type(oid, typmod).parse(pa.nulls(n, pa.string()))
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
    (
        1082,
        -1,
        "2024-01-01",
        ["infinity", "-infinity", "0044-03-15 BC", "4713-01-01 BC", "5874897-12-31", "10000-01-01"],
    ),
    (1083, -1, "01:02:03", ["24:00:00"]),
    (
        1114,
        -1,
        "2024-01-01 00:00:00",
        [
            "infinity",
            "-infinity",
            "294276-12-31 23:59:59.999999",
            "0001-01-01 00:00:00 BC",
            "2024-01-01 00:00:00+00",
            "10000-01-01 00:00:00",
        ],
    ),
    (
        1184,
        -1,
        "2024-01-01 00:00:00+00",
        [
            "infinity",
            "4714-11-24 00:00:00+00 BC",
            "1883-11-18 12:03:57-04:56:02",
            "10000-01-01 00:00:00+00",
            "2024-01-01 00:00:00",
        ],
    ),
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
