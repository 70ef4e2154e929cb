"""The one table of types: Postgres type OID -> Arrow type, DuckDB type, and the parser of Postgres' text output.

The text is what a session with the pinned settings prints (ISO dates, UTC, hex bytea, shortest floats), in the stream
and in COPY alike. A type that is not in the table is text, because the last row of the table says so.

A value that the type cannot hold (NaN in a decimal, an infinite date, a year before 1 or after 9999) comes back as
NULL and is marked, never as another value. Parsing casts the whole column at once; only when Arrow refuses does the
slow path look for the values at fault: first by a pattern, then one by one among what still fails.

Source: PostgreSQL manual, "Data Types"; pg_type.dat for the OIDs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

__all__ = ["ColumnType", "column_type"]

Mask = npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True, slots=True)
class ColumnType:
    """How a Postgres column is held.

    Attributes:
        arrow: the Arrow type that `parse` returns.
        duckdb: the DuckDB column type, as SQL. Where `arrow` is string and this is not VARCHAR (UUID, JSON), DuckDB
            casts on insert.
    """

    arrow: pa.DataType
    duckdb: str
    _cast: Callable[[pa.StringArray], pa.Array]
    _fits: str

    def parse(self, text: pa.StringArray) -> tuple[pa.Array, Mask | None]:
        """Parse n values of Postgres' text output.

        Returns:
            An array of type `arrow` and length n, and bool[n]: which values did not fit and are NULL in the array
            without being NULL in `text`. None: all fit.
        """
        try:
            return self._cast(text), None
        except pa.ArrowInvalid:
            return self._parse_what_fits(text)

    def _parse_what_fits(self, text: pa.StringArray) -> tuple[pa.Array, Mask]:
        """Slow path: NULL the values that do not look as they must, then those that Arrow still refuses."""
        text = text.cast(pa.string())  # without the offset that a slice may carry
        fits = pc.match_substring_regex(text, self._fits)
        likely = pc.if_else(fits, text, pa.scalar(None, pa.string()))
        array = self._parse_one_by_one(likely)
        return array, _bools(pc.and_(pc.is_valid(text), pc.is_null(array)))

    def _parse_one_by_one(self, text: pa.StringArray) -> pa.Array:
        """Slow path: halve what Arrow refuses until the refused values stand alone; they become NULL."""
        try:
            return self._cast(text)
        except pa.ArrowInvalid:
            if len(text) == 1:
                return pa.nulls(1, self.arrow)
        half = len(text) // 2
        return pa.concat_arrays([self._parse_one_by_one(text[:half]), self._parse_one_by_one(text[half:])])


def _bools(array: pa.BooleanArray) -> Mask:
    """Return an Arrow boolean array without NULLs as NumPy's."""
    mask: Mask = array.to_numpy(zero_copy_only=False)
    return mask


# Made once: for each Python string that it turns into a scalar, pyarrow looks for pandas anew where that is absent.
_T, _F, _FIRST_DAY, _SPACE = (pa.scalar(text) for text in ("t", "f", "1970-01-01", " "))


def _keep(text: pa.StringArray) -> pa.Array:
    """Text stays as it is."""
    return text


def _bool(text: pa.StringArray) -> pa.Array:
    """Postgres prints t and f."""
    true = pc.equal(text, _T)
    if pc.all(pc.or_(true, pc.equal(text, _F))).as_py() is False:  # None: nothing but NULLs
        raise pa.ArrowInvalid("expected t or f")
    return true


def _json(text: pa.StringArray) -> pa.Array:
    r"""Postgres' json keeps halves of surrogate pairs (``\ud800``), which DuckDB's refuses; jsonb never has them."""
    suspects = pc.or_(pc.match_substring(text, r"\ud"), pc.match_substring(text, r"\uD"))
    if pc.any(suspects).as_py() and not pc.all(pc.match_substring_regex(text.filter(suspects), _PAIRED)).as_py():
        raise pa.ArrowInvalid("expected surrogates in pairs")
    return text


def _time(text: pa.StringArray) -> pa.Array:
    """Arrow has no cast from text to time, but one by way of a timestamp on the first day; it refuses 24:00:00."""
    moment = pc.cast(pc.binary_join_element_wise(_FIRST_DAY, text, _SPACE), pa.timestamp("us"))
    return pc.cast(moment, pa.time64("us"))


def _hex_values() -> npt.NDArray[np.uint8]:
    """Return, by character, the value of a hexadecimal digit; 255: it is none."""
    values = np.full(256, 255, np.uint8)
    for value, digit in enumerate(b"0123456789abcdef"):
        values[digit] = value
    return values


_HEX_VALUES = _hex_values()


def _bytea(text: pa.StringArray) -> pa.Array:
    r"""Postgres prints ``\x`` and two digits a byte: all values are decoded at once, the ``\x`` as if a byte too."""
    text = pa.concat_arrays([text])  # offsets from 0, whatever slice of another array it was
    validity, offsets_buffer, data = text.buffers()
    offsets = np.frombuffer(offsets_buffer, np.int32, len(text) + 1, text.offset * 4)
    digits = np.frombuffer(data if data is not None else b"", np.uint8)[offsets[0] : offsets[-1]]
    offsets = offsets - offsets[0]
    filled = offsets[:-1][np.diff(offsets) > 0]
    if (offsets & 1).any() or len(filled) != len(text) - text.null_count:
        raise pa.ArrowInvalid("expected an even number of digits")
    high, low = _HEX_VALUES[digits[0::2]], _HEX_VALUES[digits[1::2]]
    prefix = np.zeros(len(high), np.bool_)
    prefix[filled >> 1] = True
    if (digits[filled] != ord("\\")).any() or (digits[filled + 1] != ord("x")).any():
        raise pa.ArrowInvalid(r"expected \x")
    content = ~prefix
    if ((high | low)[content] > 15).any():
        raise pa.ArrowInvalid("expected hexadecimal digits")
    values = (high[content] << 4) | low[content]
    prefixes_before = np.zeros(len(text) + 1, np.int32)
    np.cumsum(np.diff(offsets) > 0, out=prefixes_before[1:])
    ends = pa.py_buffer((offsets >> 1) - prefixes_before)
    return pa.Array.from_buffers(pa.binary(), len(text), [validity, ends, pa.py_buffer(values)], text.null_count)


_ANY = ""
_INTEGER = "^-?[0-9]+$"
_NUMBER = r"^-?[0-9]+(\.[0-9]+)?$"
_DATE = "[0-9]{4}-[0-9]{2}-[0-9]{2}"
_TIME = r"[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?"
_ZONE = "[+-][0-9]{2}(:[0-9]{2})?"
_PAIRED = (  # JSON in which every \\u of a surrogate is half of a pair
    r"(?s)^([^\\]|\\[^u]|\\u[^dD]...|\\u[dD][0-7]..|\\u[dD][89abAB]..\\u[dD][c-fC-F]..)*$"
)


def _by_arrow(arrow: pa.DataType, duckdb: str, fits: str) -> ColumnType:
    """Return a type for which Arrow's own cast reads exactly what Postgres prints, or refuses."""
    return ColumnType(arrow, duckdb, functools.partial(pc.cast, target_type=arrow), fits)


_VARCHAR = ColumnType(pa.string(), "VARCHAR", _keep, _ANY)
_JSON = ColumnType(pa.string(), "JSON", _json, _PAIRED)

# OID: type. The last argument is a pattern of what may fit, looked at only when the cast of a whole column has failed.
_TYPES = {
    16: ColumnType(pa.bool_(), "BOOLEAN", _bool, "^[tf]$"),
    17: ColumnType(pa.binary(), "BLOB", _bytea, r"^\\x([0-9a-f]{2})*$"),
    18: _VARCHAR,  # "char"
    19: _VARCHAR,  # name
    20: _by_arrow(pa.int64(), "BIGINT", _INTEGER),
    21: _by_arrow(pa.int16(), "SMALLINT", _INTEGER),
    23: _by_arrow(pa.int32(), "INTEGER", _INTEGER),
    25: _VARCHAR,  # text
    114: _JSON,  # json
    700: _by_arrow(pa.float32(), "FLOAT", _ANY),
    701: _by_arrow(pa.float64(), "DOUBLE", _ANY),
    1042: _VARCHAR,  # bpchar
    1043: _VARCHAR,  # varchar
    1082: _by_arrow(pa.date32(), "DATE", f"^{_DATE}$"),
    1083: ColumnType(pa.time64("us"), "TIME", _time, f"^{_TIME}$"),
    1114: _by_arrow(pa.timestamp("us"), "TIMESTAMP", f"^{_DATE} {_TIME}$"),
    1184: _by_arrow(pa.timestamp("us", "UTC"), "TIMESTAMP WITH TIME ZONE", f"^{_DATE} {_TIME}{_ZONE}$"),
    2950: ColumnType(pa.string(), "UUID", _keep, _ANY),
    3802: _JSON,  # jsonb
}

_NUMERIC = 1700


@functools.lru_cache(maxsize=4096)
def column_type(type_oid: int, typmod: int) -> ColumnType:
    """Return how a column of type `type_oid` with modifier `typmod` (-1: none) is held."""
    if type_oid == _NUMERIC:
        return _numeric(typmod)
    return _TYPES.get(type_oid, _VARCHAR)


def _numeric(typmod: int) -> ColumnType:
    """numeric(p,s) is a decimal where DuckDB has one: 1 <= p <= 38 and 0 <= s <= p; else the exact text."""
    if typmod < 4:
        return _VARCHAR
    precision, scale = (typmod - 4) >> 16 & 0xFFFF, (typmod - 4) & 0x7FF
    if not (1 <= precision <= 38 and scale <= precision):  # a negative scale is 1025..2047 here
        return _VARCHAR
    return _by_arrow(pa.decimal128(precision, scale), f"DECIMAL({precision},{scale})", _NUMBER)
