"""Dates, times and intervals: all that Postgres prints, against Python's own calendar and a printer of intervals."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from typing import Any

import duckdb
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc.pgoutput.types.column import Scalar
from cdc.pgoutput.types.temporal import DATE, INTERVAL, TIME, TIMESTAMP, TIMESTAMPTZ

KINDS = {"date": DATE, "time": TIME, "timestamp": TIMESTAMP, "timestamptz": TIMESTAMPTZ, "interval": INTERVAL}

SECOND, DAY = 10**6, 86_400 * 10**6
FOREVER = 2**63 - 1
EPOCH = dt.date(1970, 1, 1).toordinal()


def us(*moment: int) -> int:
    """Return microseconds since 1970."""
    return (dt.datetime(*moment) - dt.datetime(1970, 1, 1)) // dt.timedelta(microseconds=1)  # type: ignore[arg-type]  # noqa: DTZ001


def plain(array: pa.Array) -> list[Any]:
    """Return days, microseconds, or tuples of the parts of intervals."""
    if pa.types.is_struct(array.type):
        return [value if value is None else tuple(value.values()) for value in array.to_pylist()]
    found: list[Any] = array.cast(pa.int32() if array.type == DATE.arrow else pa.int64()).to_pylist()
    return found


def parsed(kind: Scalar, texts: list[str | None]) -> list[Any]:
    """Return what comes of the texts, which is marked as a misfit where it is NULL and the text is not."""
    array, misfits = kind.parse(pa.array(texts, pa.string()))
    assert array.type == kind.arrow
    if kind is not TIME:  # Arrow itself thinks that no time is 24:00:00
        array.validate(full=True)
    values = plain(array)
    unfit = [value is None and text is not None for value, text in zip(values, texts, strict=True)]
    assert unfit == ([False] * len(texts) if misfits is None else misfits.tolist())
    assert misfits is None or misfits.any()
    return values


# Values as Postgres prints them, with days or microseconds; None: does not fit.
VALUES: list[tuple[str, dict[str, Any]]] = [
    ("date", {
        "1970-01-01": 0, "1969-12-31": -1, "0001-01-01": 1 - EPOCH, "9999-12-31": dt.date.max.toordinal() - EPOCH,
        "0001-12-31 BC": -EPOCH, "0001-02-29 BC": -EPOCH - 306, "4713-01-01 BC": -2440550, "4714-11-24 BC": -2440588,
        "10000-01-01": dt.date.max.toordinal() - EPOCH + 1, "5874897-12-31": 2145042905,
        "infinity": 2**31 - 1, "-infinity": -(2**31 - 1),
        "9999999-12-31": None, "2023-02-29": None, "2023-13-01": None, "2023-00-01": None, "2023-01-00": None,
        "0000-01-01 BC": None, "2023-01-01 AD": None, "Infinity": None, "": None, "1-1-1": None,
        "12345678-01-01": None, "0002-02-29 BC": None, "1900-02-29": None, "2023-04-31": None, "10000-02-29": 2932956,
    }),
    ("time", {
        "00:00:00": 0, "23:59:59.999999": DAY - 1, "12:00:00.1": DAY // 2 + 100_000, "24:00:00": DAY,
        "24:00:01": None, "24:00:00.0": None, "12:60:00": None, "12:00:60": None, "": None, "12:00:00+00": None,
    }),
    ("timestamp", {
        "1970-01-01 00:00:00": 0, "1969-12-31 23:59:59.999999": -1,
        "2024-02-29 12:34:56.7": us(2024, 2, 29, 12, 34, 56, 700_000),
        "infinity": FOREVER, "-infinity": -FOREVER,
        "0001-12-31 23:59:59.999999 BC": us(1, 1, 1) - 1, "4714-11-24 00:00:00 BC": -2440588 * DAY,
        "10000-01-01 00:00:00.000001": us(9999, 12, 31) + DAY + 1,
        "294247-01-10 04:00:54.775806": FOREVER - 1, "294247-01-10 04:00:54.775": FOREVER - 807,
        "294247-01-10 04:00:54.775807": None, "294247-01-10 04:00:54.775808": None, "294247-01-10 04:00:54.8": None,
        "294247-01-10 04:00:55": None, "294276-12-31 23:59:59.999999": None,
        "294247-01-10 04:00:53.999999": FOREVER - 775_808,
        "290309-12-22 00:00:00 BC": -9_223_372_022_400_000_000, "290309-12-21 23:59:59.999999 BC": None,
        "290309-12-21 19:59:05.224192 BC": None, "290309-12-21 19:59:05.224193 BC": None,
        "999999-01-01 00:00:00 BC": None,
        "2024-01-01 24:00:00": None, "2024-01-01 00:00:00+00": None, "2024-02-30 00:00:00": None, "now": None,
        "2024-01-01 00:00:00.1234567": None, "2024-01-01 00:00:00.": None, "2024-01-01 00:00:00 BC ": None,
    }),
    ("timestamptz", {
        "1970-01-01 00:00:00+00": 0, "2024-02-29 12:34:56.7+00": us(2024, 2, 29, 12, 34, 56, 700_000),
        "infinity": FOREVER, "-infinity": -FOREVER,
        "4714-11-24 00:00:00+00 BC": -2440588 * DAY, "0001-12-31 23:59:59.999999+00 BC": us(1, 1, 1) - 1,
        "1883-11-18 12:03:57-04:56:02": us(1883, 11, 18, 16, 59, 59),
        "1883-11-18 12:03:57-04:56": us(1883, 11, 18, 16, 59, 57),
        "1883-11-18 12:03:57-00:00:02": us(1883, 11, 18, 12, 3, 59),
        "1883-11-18 12:03:57+00:01:02": us(1883, 11, 18, 12, 2, 55),
        "10000-01-01 05:30:00.5+05:30": us(9999, 12, 31) + DAY + 500_000,
        "294247-01-10 04:00:54.775806+00": FOREVER - 1, "294247-01-10 04:00:54.775807+00": None,
        "294247-01-10 05:00:54.775806+01": FOREVER - 1, "294247-01-10 03:00:54.775807-01": None,
        "294276-12-31 23:59:59.999999+00": None, "0044-03-15 00:00:00 BC": None, "2024-01-01 00:00:00": None,
        "0044-03-15 00:00:00 BC+00": None,
    }),
    ("interval", {
        "00:00:00": (0, 0, 0), "3 days": (0, 3, 0), "1 day": (0, 1, 0), "1 mon": (1, 0, 0), "-1 years": (-12, 0, 0),
        "-00:00:01": (0, 0, -SECOND), "00:00:00.000001": (0, 0, 1), "-00:00:00.1": (0, 0, -100_000),
        "1 year 2 mons -3 days +04:05:06.7": (14, -3, 14_706_700_000),
        "-1 years -2 mons +3 days -04:05:06.789": (-14, 3, -14_706_789_000),
        "1 year -1 mons": (11, 0, 0), "-1 days +00:00:00.000001": (0, -1, 1),
        "1 mon 100:00:00": (1, 0, 100 * 3600 * SECOND),
        "2562047788:00:54.775807": (0, 0, FOREVER), "-2562047788:00:54.775808": (0, 0, -FOREVER - 1),
        "178956970 years 7 mons": (2**31 - 1, 0, 0), "-178956970 years -8 mons": (-(2**31), 0, 0),
        "2147483647 days": (0, 2**31 - 1, 0), "-2147483648 days": (0, -(2**31), 0),
        "178956970 years 7 mons 2147483647 days 2562047788:00:54.775806": (2**31 - 1, 2**31 - 1, FOREVER - 1),
        "infinity": None, "-infinity": None, "": None, "2562047788:00:54.775808": None,
        "-2562047788:00:54.775809": None,
        "2562047789:00:00": None, "9999999999:59:59": None, "178956970 years 8 mons": None,
        "-178956970 years -9 mons": None,
        "2147483648 days": None, "-2147483649 days": None, "1": None, "1 day 1 mon": None, "P1D": None,
        "00:60:00": None,
        "00:00:60": None, "1 days 00:00": None, "99999999999 days": None, "3 hours": None, "00:00:00.1234567": None,
    }),
]  # fmt: skip
ROWS = [
    pytest.param(KINDS[name], text, value, id=f"{name} {text}") for name, row in VALUES for text, value in row.items()
]


@pytest.mark.parametrize(("kind", "text", "value"), ROWS)
def test_a_value(kind: Scalar, text: str, value: Any) -> None:
    """A6, A7: alone, and between NULLs."""
    assert parsed(kind, [text]) == [value]
    assert parsed(kind, [None, text, None]) == [None, value, None]


@pytest.mark.parametrize("name", KINDS)
def test_all_values_in_one_column(name: str) -> None:
    """In a slice of a column, whose offsets begin elsewhere; and the slow way alone, whatever the other reads."""
    values = dict(VALUES)[name]
    array, misfits = KINDS[name].parse(pa.array(["x", None, *values, "y"])[2:-1])
    assert plain(array) == list(values.values())
    assert misfits is not None
    assert misfits.tolist() == [value is None for value in values.values()]
    assert plain(KINDS[name].slow(pa.array(["x", None, *values, "y"])[2:-1])) == list(values.values())


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("n", [0, 1, 5])
def test_nothing_but_null(name: str, n: int) -> None:
    kind = KINDS[name]
    for read in (kind.fast, kind.slow):
        array = read(pa.nulls(n, pa.string()))
        array.validate(full=True)
        assert (array.type, array.to_pylist()) == (kind.arrow, [None] * n)
    assert parsed(kind, [None] * n) == [None] * n


@pytest.mark.parametrize("name", KINDS)
def test_among_thousands(name: str) -> None:
    """Each kind of value in the middle of others, with all blocks of the column in between."""
    values = dict(VALUES)[name]
    usual = next(iter(values))
    texts: list[str | None] = [usual] * 20_000
    for index, text in enumerate(values):
        texts[137 + 401 * index] = text
    texts[5_000] = None
    assert parsed(KINDS[name], texts) == [None if text is None else values[text] for text in texts]


@pytest.mark.parametrize("text", ["infinity", "-infinity", "0044-03-15 BC", "x"])
def test_the_fast_way_refuses(text: str) -> None:
    usual = {name: next(iter(row)) for name, row in VALUES}
    for name, kind in KINDS.items():
        with pytest.raises(pa.ArrowInvalid):
            kind.fast(pa.array([usual[name], None, text]))


def test_duckdb_reads_what_was_meant() -> None:
    """Infinity and the end of the day are DuckDB's own."""
    table = pa.table(
        {
            "d": DATE.parse(pa.array(["infinity", "-infinity", "0044-03-15 BC", "5874897-12-31"]))[0],
            "ts": TIMESTAMP.parse(
                pa.array(["infinity", "-infinity", "0044-03-15 01:02:03 BC", "294247-01-10 04:00:54.7"])
            )[0],
            "tz": TIMESTAMPTZ.parse(
                pa.array(["infinity", "-infinity", "0044-03-15 01:02:03+00 BC", "10000-01-01 00:00:00+00"])
            )[0],
            "t": TIME.parse(pa.array(["24:00:00", "00:00:00", None, "23:59:59.999999"]))[0],
        }
    )
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        connection.register("source", table)
        rows = connection.sql("SELECT d::VARCHAR, ts::VARCHAR, tz::VARCHAR, t::VARCHAR FROM source").fetchall()
    assert rows == [
        ("infinity", "infinity", "infinity", "24:00:00"),
        ("-infinity", "-infinity", "-infinity", "00:00:00"),
        ("0044-03-15 (BC)", "0044-03-15 (BC) 01:02:03", "0044-03-15 (BC) 01:02:03+00", None),
        ("5874897-12-31", "294247-01-10 04:00:54.7", "10000-01-01 00:00:00+00", "23:59:59.999999"),
    ]


def printed_day(days: int) -> tuple[str, str]:
    """Print a date by Python's calendar, which repeats itself every 400 years of 146097 days; return the era apart."""
    cycles, rest = divmod(days + EPOCH - 1, 146_097)
    date = dt.date.fromordinal(rest + 1)
    year = date.year + 400 * cycles
    return f"{year if year > 0 else 1 - year:04}-{date.month:02}-{date.day:02}", "" if year > 0 else " BC"


def printed_time(microseconds: int) -> str:
    """Print what may be more than a day, as Postgres does: without zeros at the end."""
    seconds, fraction = divmod(microseconds, SECOND)
    text = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
    return f"{text}.{fraction:06}".rstrip("0") if fraction else text


def printed_interval(months: int, days: int, microseconds: int) -> str:
    """Print as EncodeInterval does: a plus behind a negative part, and nothing for a part that is 0."""
    years = abs(months) // 12 * (1 if months > 0 else -1)
    words: list[str] = []
    negative = False
    for number, unit in ((years, "year"), (months - 12 * years, "mon"), (days, "day")):
        if number:
            plus = "+" if negative and number > 0 else ""
            words.append(f"{plus}{number} {unit}{'' if number == 1 else 's'}")
            negative = number < 0
    if microseconds or not words:
        sign = "-" if microseconds < 0 else "+" if negative else ""
        words.append(sign + printed_time(abs(microseconds)))
    return " ".join(words)


def columns(values: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    return st.lists(st.none() | values, max_size=30)


def printed(values: list[Any], text: Callable[[Any], str]) -> list[str | None]:
    return [None if value is None else text(value) for value in values]


DAYS = st.integers(-2440588, 2145042905) | st.integers(-800_000, 3_000_000)
MOMENTS = st.integers(-2440588 * DAY, FOREVER - 1) | st.integers(-800_000 * DAY, 3_000_000 * DAY)
INT32 = st.integers(-(2**31), 2**31 - 1) | st.integers(-30, 30)
INT64 = st.integers(-(2**63), 2**63 - 1) | st.integers(-5 * SECOND, 5 * SECOND)


@given(columns(DAYS))
def test_any_date(values: list[int | None]) -> None:
    """A5."""
    assert parsed(DATE, printed(values, lambda days: "".join(printed_day(days)))) == values


@given(columns(st.integers(0, DAY) | st.just(DAY)))
def test_any_time(values: list[int | None]) -> None:
    """A7."""
    assert parsed(TIME, printed(values, printed_time)) == values


@given(columns(MOMENTS), st.integers(-57_599, 57_599))
def test_any_timestamp(values: list[int | None], offset: int) -> None:
    """A6: without offset, in UTC, and at the offset of some other session."""

    def text(microseconds: int, zone: str) -> str:
        days, clock = divmod(microseconds, DAY)
        day, era = printed_day(days)
        return f"{day} {printed_time(clock)}{zone}{era}"

    assert parsed(TIMESTAMP, printed(values, lambda value: text(value, ""))) == values
    assert parsed(TIMESTAMPTZ, printed(values, lambda value: text(value, "+00"))) == values
    size = abs(offset)
    zone = f"{'-' if offset < 0 else '+'}{size // 3600:02}:{size // 60 % 60:02}:{size % 60:02}"
    elsewhere = printed(values, lambda value: text(value + offset * SECOND, zone))
    assert parsed(TIMESTAMPTZ, elsewhere) == values


@given(columns(st.tuples(INT32, INT32, INT64)))
def test_any_interval(values: list[tuple[int, int, int] | None]) -> None:
    """Each part has its own sign."""
    assert parsed(INTERVAL, printed(values, lambda value: printed_interval(*value))) == values
