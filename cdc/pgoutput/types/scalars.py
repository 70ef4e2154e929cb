"""Numbers, text, bytes and the like: column types without a calendar.

The text is what a session with the pinned settings prints (hex bytea, shortest floats), in the stream and in COPY.

Source: PostgreSQL manual, "Data Types".
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cdc.pgoutput.types.column import Scalar, likely

__all__ = [
    "BIGINT",
    "BLOB",
    "BOOLEAN",
    "DOUBLE",
    "INTEGER",
    "JSON",
    "REAL",
    "SMALLINT",
    "UUID",
    "VARCHAR",
    "decimal",
]

# Made once: for each Python string that it turns into a scalar, pyarrow looks for pandas anew where that is absent.
_T, _F, _NAN = (pa.scalar(text) for text in ("t", "f", "NaN"))


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


_INTEGER = "^-?[0-9]+$"
_NUMBER = r"^-?[0-9]+(\.[0-9]+)?$"
_PAIRED = (  # JSON in which every \\u of a surrogate is half of a pair
    r"(?s)^([^\\]|\\[^u]|\\u[^dD]...|\\u[dD][0-7]..|\\u[dD][89abAB]..\\u[dD][c-fC-F]..)*$"
)


def _float(text: pa.StringArray, arrow: pa.DataType) -> pa.Array:
    """Cast to a float; digits that are too many for one (of a numeric: a float8 prints none such) are refused."""
    values = pc.cast(text, arrow)
    infinite = pc.is_inf(values)
    if pc.any(infinite).as_py() and pc.any(pc.match_substring_regex(text.filter(infinite), "[0-9]")).as_py():
        raise pa.ArrowInvalid("expected a number that a float can hold")
    return values


def _by_arrow(arrow: pa.DataType, duckdb: str, pattern: str) -> Scalar:
    """Return a type for which Arrow's own cast reads exactly what Postgres prints, or refuses.

    Args:
        pattern: of what may fit, looked at only where the cast has refused.
    """
    fast = functools.partial(pc.cast, target_type=arrow)
    return Scalar(arrow, duckdb, fast, likely(fast, pattern))


VARCHAR = Scalar(pa.string(), "VARCHAR", _keep, _keep)
BOOLEAN = Scalar(pa.bool_(), "BOOLEAN", _bool, likely(_bool, "^[tf]$"))
BLOB = Scalar(pa.binary(), "BLOB", _bytea, likely(_bytea, r"^\\x([0-9a-f]{2})*$"))
# Text to Arrow; DuckDB takes and gives it as text, too.
JSON = Scalar(pa.string(), "JSON", _json, likely(_json, _PAIRED), "CAST({} AS JSON)", "CAST({} AS VARCHAR)")
UUID = Scalar(pa.string(), "UUID", _keep, _keep, "CAST({} AS UUID)", "CAST({} AS VARCHAR)")
SMALLINT = _by_arrow(pa.int16(), "SMALLINT", _INTEGER)
INTEGER = _by_arrow(pa.int32(), "INTEGER", _INTEGER)
BIGINT = _by_arrow(pa.int64(), "BIGINT", _INTEGER)
# 0 and -0 are equal and print otherwise.
_real, _double = (functools.partial(_float, arrow=arrow) for arrow in (pa.float32(), pa.float64()))
REAL = Scalar(pa.float32(), "FLOAT", _real, likely(_real, ""), equal=False)
DOUBLE = Scalar(pa.float64(), "DOUBLE", _double, likely(_double, ""), equal=False)


def decimal(precision: int, scale: int) -> Scalar | None:
    """Return the type of numeric(precision,scale) where DuckDB has one: 1 <= p <= 38 and 0 <= s <= p."""
    if not (1 <= precision <= 38 and 0 <= scale <= precision):
        return None
    arrow = pa.decimal128(precision, scale)

    def fast(text: pa.StringArray) -> pa.Array:
        # Found at once: the cast goes on to the end, and takes a microsecond for each value that it refuses.
        if pc.index(text, _NAN).as_py() >= 0:
            raise pa.ArrowInvalid("expected no NaN")
        return pc.cast(text, arrow)

    return Scalar(arrow, f"DECIMAL({precision},{scale})", fast, likely(fast, _NUMBER))
