"""Log sequence numbers: 64-bit byte positions in the write-ahead log.

Inside, an LSN is an `int`; text such as ``16/B374D848`` is for people and for SQL alone.
Source: PostgreSQL manual, "pg_lsn Type".
"""

from __future__ import annotations

import re

__all__ = ["format_lsn", "parse_lsn"]

_LSN = re.compile("([0-9A-Fa-f]{1,8})/([0-9A-Fa-f]{1,8})")


def parse_lsn(text: str) -> int:
    """Return the position that `text` names: two hexadecimal numbers with a slash between them.

    Raises:
        ValueError: `text` is not an LSN.
    """
    found = _LSN.fullmatch(text)
    if found is None:
        raise ValueError(f"not an LSN: {text!r}")
    return (int(found[1], 16) << 32) | int(found[2], 16)


def format_lsn(lsn: int) -> str:
    """Return `lsn` as Postgres prints it, for example ``16/B374D848``."""
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"
