"""Values of Postgres and of DuckDB in one form, so that they can be compared by value.

Postgres' side is the text that the server prints, with nothing of ours or of a driver's between; DuckDB's is what
DuckDB itself gives. Which form a value takes follows from the DuckDB type of its column. All of it takes a step per
value, the plainest way: nothing here is shared with what is tested.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Hashable
from typing import Any

__all__ = ["PINNED", "array_elements", "fits", "from_duckdb", "from_postgres", "logged", "picked"]

PINNED = (
    "-c timezone=UTC -c datestyle=ISO -c intervalstyle=postgres -c extra_float_digits=3 -c bytea_output=hex "
    "-c lc_monetary=C -c search_path= -c client_encoding=UTF8 -c quote_all_identifiers=off"
)
"""Startup options of a session that prints values so."""

_INTEGERS = ("SMALLINT", "INTEGER", "BIGINT")
_FLOATS = ("FLOAT", "DOUBLE")


def from_postgres(text: str | None, kind: str, delimiter: str = ",") -> Hashable:  # noqa: PLR0911 -- one per kind
    """Return the form of what Postgres prints, for a column that is of type `kind` in DuckDB.

    Args:
        delimiter: of the elements of an array.
    """
    if text is None:
        return None
    if kind.endswith("[]"):
        return tuple(from_postgres(element, kind[:-2]) for element in array_elements(text, delimiter))
    if kind == "BOOLEAN":
        return {"t": True, "f": False}[text]
    if kind in _INTEGERS:
        return int(text)
    if kind in _FLOATS:
        return _float(float(text), kind)
    if kind == "BLOB":
        return bytes.fromhex(text.removeprefix("\\x"))
    return _interval(text) if kind == "INTERVAL" else text


_LAST_MOMENT = (294247, "-01-10 04:00:54.775806")


def fits(text: str, kind: str, delimiter: str = ",") -> bool:
    """Whether docs/types.md lets a column of type `kind` in DuckDB hold what Postgres prints."""
    if kind.endswith("[]"):
        if text.startswith(("[", "{{")):  # another lower bound; more than one dimension
            return False
        return all(element is None or fits(element, kind[:-2]) for element in array_elements(text, delimiter))
    if kind.startswith("DECIMAL"):
        return text != "NaN"
    if kind.startswith("TIMESTAMP"):
        year, rest = re.split("(?=-)", text, maxsplit=1) if text[0].isdigit() else ("0", "")
        return text.endswith("BC") or (int(year), rest.removesuffix("+00")) <= _LAST_MOMENT
    if kind == "INTERVAL":
        return "infinity" not in text
    return kind != "JSON" or not any(
        "\ud800" <= character <= "\udfff"
        for string in re.findall(r'(?s)"(?:[^"\\]|\\.)*"', text)
        for character in json.loads(string, strict=False)
    )


def picked(value: str, kind: str) -> str:
    """Return SQL for what `from_duckdb` takes, from SQL for a value of type `kind`."""
    element = kind.rstrip("[]")
    native = element in (*_INTEGERS, *_FLOATS, "BOOLEAN", "BLOB")
    return value if native else f"CAST({value} AS VARCHAR{'[]' if kind.endswith('[]') else ''})"


def logged(value: str, kind: str, logged_kind: str) -> str:
    """Return SQL for a value of type `kind`, from SQL for what the change log has, of type `logged_kind`."""
    if kind == "INTERVAL" and logged_kind.startswith("STRUCT"):
        return f"to_months({value}.months) + to_days({value}.days) + to_microseconds({value}.microseconds)"
    if kind == "INTERVAL[]" and logged_kind.startswith("STRUCT"):
        return f"list_transform({value}, lambda x: {logged('x', 'INTERVAL', logged_kind)})"
    return f"TRY_CAST({value} AS {kind})"


def from_duckdb(value: Any, kind: str) -> Hashable:
    """Return the form of what DuckDB gives for `picked`."""
    if value is None:
        return None
    if kind.endswith("[]"):
        return tuple(from_duckdb(element, kind[:-2]) for element in value)
    if kind in _FLOATS:
        return _float(value, kind)
    if kind.startswith("DECIMAL"):
        return re.sub(r"^-?(?=\.)", r"\g<0>0", value)  # .5 is 0.5
    if kind in ("DATE", "TIMESTAMP", "TIMESTAMP WITH TIME ZONE"):
        found = re.fullmatch(r"(\d+-\d\d-\d\d) \(BC\)(.*)", value)
        return f"{found[1]}{found[2]} BC" if found else value
    return _interval(value) if kind == "INTERVAL" else value


def _float(value: float, kind: str) -> str:
    """Return digits that tell every float from every other, and -0 from 0; NaN is itself."""
    return repr(struct.unpack("f", struct.pack("f", value))[0] if kind == "FLOAT" else value)


def _interval(text: str) -> tuple[int, int, int] | str:
    """Return months, days and microseconds of ``1 year 2 mons -3 days +04:05:06.7``; infinity as it is."""
    if "infinity" in text:
        return text
    months = days = microseconds = 0
    for number, unit in re.findall(r"([+-]?\d+) (year|mon|day)", text):
        months += {"year": 12, "mon": 1, "day": 0}[unit] * int(number)
        days += int(number) if unit == "day" else 0
    if clock := re.search(r"([+-]?)(\d+):(\d+):(\d+)(?:\.(\d+))?$", text):
        sign, hours, minutes, seconds, fraction = clock.groups()
        whole = (int(hours) * 60 + int(minutes)) * 60 + int(seconds)
        microseconds = (whole * 10**6 + int((fraction or "").ljust(6, "0"))) * (-1 if sign == "-" else 1)
    return months, days, microseconds


def array_elements(text: str, delimiter: str = ",") -> list[str | None]:
    """Return the elements of an array of one dimension, as array_out prints it."""
    assert text[:1] + text[-1:] == "{}", text
    elements: list[str | None] = []
    at = 1
    while at < len(text) - 1:
        found = re.compile(rf'(?s)"((?:[^"\\]|\\.)*)"|([^"{delimiter}{{}}]+)').match(text, at)
        assert found is not None, text[at:]
        quoted, plain = found.groups()
        if quoted is not None:
            elements.append(re.sub(r"(?s)\\(.)", r"\1", quoted))
        else:
            elements.append(None if plain == "NULL" else plain)
        at = found.end() + 1
        assert text[at - 1] == (delimiter if at < len(text) else "}"), text[at - 1 :]
    return elements
