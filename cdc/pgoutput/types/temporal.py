"""Dates, times and intervals, as a session with ISO dates, intervals in Postgres' style and UTC prints them.

Each of the functions named fast casts n values at once and raises ArrowInvalid where it cannot read one of them;
each one named slow also reads what the other does not (years before 1 and after 9999, infinity, 24:00:00), and
returns NULL for what does not fit.

Infinity is DuckDB's own: the greatest integer of the type and its negative, which no finite value ever becomes.
DuckDB's intervals have none. The end of a day, 24:00:00, is a time to DuckDB and in Parquet files; Arrow holds it, but
its full validation calls it out of range.

Source: PostgreSQL manual, "Date/Time Types"; EncodeDateTime and EncodeInterval in datetime.c.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cdc.pgoutput.types.column import Mask, Scalar, bools

__all__ = ["DATE", "INTERVAL", "TIME", "TIMESTAMP", "TIMESTAMPTZ"]

Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]

_DATE = pa.date32()
_TIME = pa.time64("us")
_TIMESTAMP = pa.timestamp("us")
_TIMESTAMPTZ = pa.timestamp("us", "UTC")
_INTERVAL = pa.struct({"months": pa.int32(), "days": pa.int32(), "microseconds": pa.int64()})

_SECOND = 1_000_000
_DAY_SECONDS = 86_400
_INFINITE_DAYS = 2**31 - 1
_INFINITE_MICROSECONDS = 2**63 - 1
# DuckDB's TIMESTAMP begins with the day 290309-12-22 BC, and ends one microsecond before infinity
_FIRST_SECOND = -9_223_372_022_400
_LAST_SECOND, _LAST_MICROSECOND = divmod(_INFINITE_MICROSECONDS - 1, _SECOND)
_MOST_HOURS = 2_562_047_788  # of an interval
_INTERVAL_BLOCK = 1 << 14  # so many that they stay in the processor's cache

# Of a date, a time and an offset from UTC in this order, which numbers are what; only fractions are not counted.
_YEAR, _MONTH, _DAY, _HOUR, _, _, _ZONE_HOUR, _, _, _N_PARTS = range(10)
_IN_SECONDS = np.array([3600, 60, 1])

# No pattern lets through more digits than an int64 holds.
_DAY_PATTERN = "[0-9]{4,7}-[0-9]{2}-[0-9]{2}"
_CLOCK_PATTERN = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?"
_ZONE_PATTERN = "[+-][0-9]{2}(:[0-9]{2}){0,2}"
_DATE_PATTERN = f"^{_DAY_PATTERN}( BC)?$"
_TIME_PATTERN = f"^{_CLOCK_PATTERN}$"
_TIMESTAMP_PATTERN = f"^{_DAY_PATTERN} {_CLOCK_PATTERN}( BC)?$"
_TIMESTAMPTZ_PATTERN = f"^{_DAY_PATTERN} {_CLOCK_PATTERN}{_ZONE_PATTERN}( BC)?$"
_INTERVAL_PATTERN = (
    "^(-?[0-9]{1,9} years?( |$))?([+-]?[0-9]{1,9} mons?( |$))?([+-]?[0-9]{1,10} days?( |$))?"
    r"([+-]?[0-9]{2,10}:[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?)?$"
)

# Made once: for each Python string that it turns into a scalar, pyarrow looks for pandas anew where that is absent.
_FIRST_DAY, _INFINITY, _MINUS_INFINITY, _DAY_END = (
    pa.scalar(text) for text in ("1970-01-01", "infinity", "-infinity", "24:00:00")
)
_NOTHING, _SPACE, _NEWLINE = (pa.scalar(text) for text in ("", " ", "\n"))
_NULL = pa.scalar(None, pa.string())
_DAY_END_TIME = pa.scalar(_DAY_SECONDS * _SECOND, pa.int64()).cast(_TIME)


def _date_fast(text: pa.StringArray) -> pa.Array:
    """Years of four digits."""
    _refuse_shorter(text, len("2000-01-01"))
    return pc.cast(text, _DATE)


def _timestamp_fast(text: pa.StringArray) -> pa.Array:
    """Years of four digits."""
    _refuse_shorter(text, len("2000-01-01 00:00:00"))
    return pc.cast(text, _TIMESTAMP)


def _timestamptz_fast(text: pa.StringArray) -> pa.Array:
    """Years of four digits."""
    _refuse_shorter(text, len("2000-01-01 00:00:00+00"))
    return pc.cast(text, _TIMESTAMPTZ)


def _refuse_shorter(text: pa.StringArray, length: int) -> None:
    """Find infinity at once: Arrow's cast does not stop at it, and takes a microsecond for each that it refuses."""
    shortest = pc.min(pc.binary_length(text)).as_py()
    if shortest is not None and shortest < length:
        raise pa.ArrowInvalid(f"expected {length} characters or more")


def _date_slow(text: pa.StringArray) -> pa.Array:
    """Any year, and infinity; all of Postgres' dates fit."""
    readable = _matches(text, _DATE_PATTERN)
    given = text.filter(readable)
    days, fits = _days(given, _numbers(given).parts())
    fits &= np.abs(days) < _INFINITE_DAYS
    return _with_infinity(text, readable, days.astype(np.int32), fits).cast(_DATE)


def _timestamp_slow(text: pa.StringArray) -> pa.Array:
    """Any year, and infinity; NULL for what is beyond DuckDB's range."""
    return _timestamps(text, _TIMESTAMP_PATTERN).cast(_TIMESTAMP)


def _timestamptz_slow(text: pa.StringArray) -> pa.Array:
    """The same with an offset, which is printed before BC."""
    return _timestamps(text, _TIMESTAMPTZ_PATTERN).cast(_TIMESTAMPTZ)


def _time_fast(text: pa.StringArray) -> pa.Array:
    """Arrow has no cast from text to time, but one by way of a timestamp on the first day; it refuses 24:00:00."""
    if pc.index(text, _DAY_END).as_py() >= 0:
        raise pa.ArrowInvalid("expected less than 24:00:00")  # at once, see `_refuse_shorter`
    moment = pc.cast(pc.binary_join_element_wise(_FIRST_DAY, text, _SPACE), _TIMESTAMP)
    return pc.cast(moment, _TIME)


def _time_slow(text: pa.StringArray) -> pa.Array:
    """The end of the day as well."""
    within = _time_fast(pc.if_else(_matches(text, _TIME_PATTERN), text, _NULL))
    return pc.if_else(pc.fill_null(pc.equal(text, _DAY_END), False), _DAY_END_TIME, within)


def _interval_fast(text: pa.StringArray) -> pa.Array:
    """Months, days and microseconds."""
    if pc.any(pc.ends_with(text, "infinity")).as_py():
        raise pa.ArrowInvalid("expected no infinity")  # before all the others are read
    array = _interval_slow(text)
    if array.null_count != text.null_count:
        raise pa.ArrowInvalid("expected a finite interval")
    return array


def _interval_slow(text: pa.StringArray) -> pa.Array:
    """NULL for what does not fit."""
    blocks = [text[low : low + _INTERVAL_BLOCK] for low in range(0, max(len(text), 1), _INTERVAL_BLOCK)]
    return pa.concat_arrays([_intervals(block) for block in blocks])


def _intervals(text: pa.StringArray) -> pa.Array:
    """Years count as months; the sign of the time is that of its hours, minutes and seconds alike."""
    readable = pc.and_(_matches(text, _INTERVAL_PATTERN), pc.fill_null(pc.not_equal(text, _NOTHING), False))
    numbers = _numbers(text.filter(readable))
    months = numbers.signed(numbers.unit == ord("y")) * 12 + numbers.signed(numbers.unit == ord("m"))
    days = numbers.signed(numbers.unit == ord("d"))
    microseconds, fits = numbers.clock()
    for values in (months, days):
        fits &= (values >= -(2**31)) & (values < 2**31)
    unfit = pa.array(~_spread(readable, fits))
    parts = (months.astype(np.int32), days.astype(np.int32), microseconds)
    return pa.StructArray.from_arrays(
        [pa.array(_spread(readable, part)) for part in parts], fields=list(_INTERVAL), mask=unfit
    )


def _matches(text: pa.StringArray, pattern: str) -> pa.BooleanArray:
    """Return which values match; NULL does not."""
    return pc.fill_null(pc.match_substring_regex(text, pattern), False)


@dataclasses.dataclass(frozen=True, slots=True)
class _Numbers:
    """The k numbers in the text of n values, of which each has one at least.

    Attributes:
        n: how many values.
        row: int64[k], the value that each is in.
        size: int64[k], without sign; a fraction of a second in microseconds.
        before, after: uint8[k], the characters next to it.
        unit: uint8[k], what follows it, but for a space.
    """

    n: int
    row: Integers
    size: Integers
    before: Bytes
    after: Bytes
    unit: Bytes

    def signed(self, which: Mask) -> Integers:
        """Return the number of each value among those of a kind, of which it has one at most; 0 if it has none."""
        numbers = np.zeros(self.n, np.int64)
        numbers[self.row[which]] = np.where(self.before[which] == ord("-"), -self.size[which], self.size[which])
        return numbers

    def fraction(self) -> Integers:
        """Return the microseconds in the fractions of seconds."""
        return self.signed(self.before == ord("."))

    def clock(self) -> tuple[Integers, Mask]:
        """Return the times of intervals in microseconds, and bool[n]: which of them are in range."""
        colon_before, colon_after = self.before == ord(":"), self.after == ord(":")
        hour = colon_after & ~colon_before
        negative = np.zeros(self.n, np.bool_)
        negative[self.row[hour]] = self.before[hour] == ord("-")
        hours = np.abs(self.signed(hour))
        fits = hours <= _MOST_HOURS
        seconds = np.where(fits, hours, 0) * 3600 + self.signed(colon_before & colon_after) * 60
        seconds += self.signed(colon_before & ~colon_after)
        # unsigned, since the least one has no positive counterpart; so many hours are far from 2**64
        size = seconds.astype(np.uint64) * np.uint64(_SECOND) + self.fraction().astype(np.uint64)
        fits &= size <= np.uint64(_INFINITE_MICROSECONDS) + negative
        return np.where(negative, -size, size).view(np.int64), fits

    def parts(self) -> Integers:
        """Return int64[9, n], the parts of moments from the year to the offset's seconds; 0 for what is left out."""
        counted = np.flatnonzero(self.before != ord("."))
        row = self.row[counted]
        ordinal = np.arange(len(row)) - np.flatnonzero(np.diff(row, prepend=-1))[row]
        parts = np.zeros((_N_PARTS, self.n), np.int64)
        parts[ordinal, row] = self.size[counted]
        parts[_ZONE_HOUR:, row[(ordinal == _ZONE_HOUR) & (self.before[counted] == ord("-"))]] *= -1
        return parts


def _numbers(text: pa.StringArray) -> _Numbers:
    """Find the runs of digits, each of which an int64 holds; no value is NULL."""
    lines = pc.binary_join_element_wise(text, _NEWLINE, _NOTHING)  # so that no run goes on in the next value
    offsets = np.frombuffer(lines.buffers()[1], np.int32, len(lines) + 1)
    data = np.full(offsets[-1] + 2, ord("\n"), np.uint8)  # there is a byte before each run, and two behind it
    data[1:-1] = np.frombuffer(lines.buffers()[2], np.uint8, offsets[-1])
    is_digit = (data - np.uint8(ord("0"))) < 10  # what is less than 0 wraps around
    edges = np.flatnonzero(is_digit[1:] != is_digit[:-1]) + 1
    start, end = edges[0::2], edges[1::2]
    length = end - start
    size = np.zeros(len(start), np.int64)
    for position in range(length.max(initial=0)):
        longer = np.flatnonzero(length > position)
        size[longer] = size[longer] * 10 + (data[start[longer] + position] - ord("0"))
    before, after = data[start - 1], data[end]
    fraction = before == ord(".")
    size[fraction] *= 10 ** (6 - length[fraction])
    unit = np.where(after == ord(" "), data[end + 1], after)
    row = np.searchsorted(offsets, start) - 1  # `start` counts the byte in front of all values
    return _Numbers(len(text), row, size, before, after, unit)


def _days(text: pa.StringArray, parts: Integers) -> tuple[Integers, Mask]:
    """Return days since 1970, and bool[n]: which ones are a date that exists."""
    year, month, day = parts[_YEAR], parts[_MONTH], parts[_DAY]
    fits = (year > 0) & (month >= 1) & (month <= 12) & (day >= 1)
    year = np.where(bools(pc.ends_with(text, "BC")), 1 - year, year)
    months = (year - 1970) * 12 + month - 1
    first, following = (
        m.astype("datetime64[M]").astype("datetime64[D]").astype(np.int64) for m in (months, months + 1)
    )
    return first + day - 1, fits & (day <= following - first)


def _timestamps(text: pa.StringArray, pattern: str) -> pa.Array:
    """Return microseconds since 1970; only seconds in range are multiplied, so that nothing wraps around."""
    readable = _matches(text, pattern)
    given = text.filter(readable)
    numbers = _numbers(given)
    parts, microseconds = numbers.parts(), numbers.fraction()
    days, fits = _days(given, parts)
    seconds = days * _DAY_SECONDS + _IN_SECONDS @ (parts[_HOUR:_ZONE_HOUR] - parts[_ZONE_HOUR:])
    fits &= (seconds >= _FIRST_SECOND) & (seconds <= _LAST_SECOND)
    fits &= (seconds < _LAST_SECOND) | (microseconds <= _LAST_MICROSECOND)
    return _with_infinity(text, readable, np.where(fits, seconds, 0) * _SECOND + microseconds, fits)


def _with_infinity(text: pa.StringArray, readable: pa.BooleanArray, values: npt.NDArray[Any], fits: Mask) -> pa.Array:
    """Return the values of what is readable, the two infinities where the text says so, and NULL for the rest."""
    infinity = np.iinfo(values.dtype).max
    values, fits = _spread(readable, values), _spread(readable, fits)
    for name, value in ((_INFINITY, infinity), (_MINUS_INFINITY, -infinity)):
        here = bools(pc.fill_null(pc.equal(text, name), False))
        values[here] = value
        fits |= here
    return pa.array(values, mask=~fits)


def _spread(where: pa.BooleanArray, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return an array of n values, with those given where `where` is true, and 0 elsewhere."""
    whole = np.zeros(len(where), values.dtype)
    whole[bools(where)] = values
    return whole


DATE = Scalar(_DATE, "DATE", _date_fast, _date_slow)
TIME = Scalar(_TIME, "TIME", _time_fast, _time_slow)
TIMESTAMP = Scalar(_TIMESTAMP, "TIMESTAMP", _timestamp_fast, _timestamp_slow)
TIMESTAMPTZ = Scalar(_TIMESTAMPTZ, "TIMESTAMP WITH TIME ZONE", _timestamptz_fast, _timestamptz_slow)
# In parentheses, or a table or column of that name would come first.
INTERVAL = Scalar(
    _INTERVAL,
    "INTERVAL",
    _interval_fast,
    _interval_slow,
    "(to_months(({}).months) + to_days(({}).days) + to_microseconds(({}).microseconds))",
    "CASE WHEN {} IS NOT NULL THEN struct_pack("
    "months := (datepart('year', {}) * 12 + datepart('month', {}))::INTEGER, days := datepart('day', {})::INTEGER, "
    "microseconds := datepart('hour', {}) * 3600000000 + datepart('minute', {}) * 60000000 "
    "+ datepart('microsecond', {})) END",
    equal=False,  # a month is 30 days
)
