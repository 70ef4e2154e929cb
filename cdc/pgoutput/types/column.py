"""How a column is held: its Arrow and DuckDB types, and the parser of Postgres' text output.

A value that the type cannot hold comes back as NULL and is marked, never as another value. Parsing casts the whole
column at once. Only when that refuses, it goes on by eighths, and eighths of what is refused again; only small blocks
are looked at closely: one odd value in a million costs little, and a column full of them costs no step per value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

__all__ = ["ColumnType", "Mask", "Scalar", "bools", "likely"]

Mask = npt.NDArray[np.bool_]

_PARTS = 8
_BLOCK_VALUES = 2048


class ColumnType(Protocol):
    """How a Postgres column is held.

    Attributes:
        arrow: the Arrow type that `parse` returns, and that the change log has.
        duckdb: the DuckDB column type, as SQL.
    """

    @property
    def arrow(self) -> pa.DataType:
        """See the class."""

    @property
    def duckdb(self) -> str:
        """See the class."""

    def parse(self, text: pa.StringArray) -> tuple[pa.Array, Mask | None]:
        """Parse n values of Postgres' text output.

        Returns:
            An array of type `arrow` and length n, and bool[n]: which values did not fit and are NULL in the array
            without being NULL in `text`. None: all fit.
        """

    def load(self, value: str) -> str:
        """Return SQL for a value of type `duckdb`, from SQL for one of type `arrow`."""

    def unload(self, value: str) -> str:
        """Return SQL for a value that Arrow's export gives as type `arrow`, from SQL for one of type `duckdb`."""

    def exact(self, value: str) -> str:
        """Return SQL that is equal for values of type `duckdb` only if they print alike."""


@dataclasses.dataclass(frozen=True, slots=True)
class Scalar:
    """A column type that is no list.

    Attributes:
        fast: casts n values at once; raises ArrowInvalid where it cannot read one of them.
        slow: the same for what `fast` refuses: values that do not fit are NULL.
        loaded, unloaded: templates of `load` and `unload`.
        equal: whether values that are equal to DuckDB print alike.
    """

    arrow: pa.DataType
    duckdb: str
    fast: Callable[[pa.StringArray], pa.Array]
    slow: Callable[[pa.StringArray], pa.Array]
    loaded: str = "{}"
    unloaded: str = "{}"
    equal: bool = True

    def parse(self, text: pa.StringArray) -> tuple[pa.Array, Mask | None]:
        """See `ColumnType`."""
        try:
            return self.fast(text), None
        except pa.ArrowInvalid:
            array = self._parse_refused(text)
        misfits = bools(pc.and_(pc.is_valid(text), pc.is_null(array)))
        return array, misfits if misfits.any() else None

    def _parse_refused(self, text: pa.StringArray) -> pa.Array:
        if len(text) <= _BLOCK_VALUES:
            return self.slow(pa.concat_arrays([text]))  # without the offset that a slice carries
        size = -(-len(text) // _PARTS)
        return pa.concat_arrays([self._parse_part(text[low : low + size]) for low in range(0, len(text), size)])

    def _parse_part(self, text: pa.StringArray) -> pa.Array:
        try:
            return self.fast(text)
        except pa.ArrowInvalid:
            return self._parse_refused(text)

    def load(self, value: str) -> str:
        """See `ColumnType`."""
        return self.loaded.replace("{}", value)

    def unload(self, value: str) -> str:
        """See `ColumnType`."""
        return self.unloaded.replace("{}", value)

    def exact(self, value: str) -> str:
        """See `ColumnType`."""
        return value if self.equal else f"CAST({value} AS VARCHAR)"


def likely(fast: Callable[[pa.StringArray], pa.Array], pattern: str) -> Callable[[pa.StringArray], pa.Array]:
    """Return a `Scalar.slow` that gives `fast` what matches `pattern`, and looks for the rest of what it refuses."""

    def slow(text: pa.StringArray) -> pa.Array:
        fits = pc.match_substring_regex(text, pattern)
        return _halve(fast, pc.if_else(fits, text, pa.scalar(None, pa.string())))

    return slow


def _halve(fast: Callable[[pa.StringArray], pa.Array], text: pa.StringArray) -> pa.Array:
    """Halve what `fast` refuses until the refused values stand alone; they become NULL."""
    try:
        return fast(text)
    except pa.ArrowInvalid:
        half = len(text) // 2
        if half:
            return pa.concat_arrays([_halve(fast, text[:half]), _halve(fast, text[half:])])
        return pa.nulls(1, fast(pa.nulls(1, pa.string())).type)


def bools(array: pa.BooleanArray) -> Mask:
    """Return an Arrow boolean array without NULLs as NumPy's."""
    mask: Mask = array.to_numpy(zero_copy_only=False)
    return mask
