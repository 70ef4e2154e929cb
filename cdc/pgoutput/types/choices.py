"""What users may choose to hold a column as, in place of what the table of types says: CDC_TYPES."""

from __future__ import annotations

import re

from cdc.pgoutput.types.basis import TEXT, Basis
from cdc.pgoutput.types.table import NUMERIC, decimal_typmod

__all__ = ["may_be", "read_choice"]

_DOUBLE = Basis(701, -1)
_DECIMAL = re.compile(r"DECIMAL\((\d{1,2}),(\d{1,2})\)")
_LARGEST_PRECISION = 38


def read_choice(text: str) -> Basis | None:
    """Return the built-in type that ``VARCHAR``, ``DOUBLE`` or ``DECIMAL(p,s)`` means; None: it is none of these."""
    text = re.sub(r"\s", "", text.upper())
    if text in ("VARCHAR", "DOUBLE"):
        return TEXT if text == "VARCHAR" else _DOUBLE
    found = _DECIMAL.fullmatch(text)
    if found is None or not (0 <= int(found[2]) <= int(found[1]) <= _LARGEST_PRECISION) or found[1] == "0":
        return None
    return Basis(NUMERIC, decimal_typmod(int(found[1]), int(found[2])))


def may_be(natural: Basis, chosen: Basis, *, is_key: bool) -> bool:
    """Whether a column of type `natural` can be held as `chosen`: anything as text, numeric as a number too.

    Args:
        is_key: it identifies rows, of which two could have the same double.
    """
    if natural.type_oid == NUMERIC:
        return not (is_key and chosen == _DOUBLE)
    return chosen in (natural, TEXT)
