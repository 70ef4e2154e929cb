"""Rows of ``COPY ... TO STDOUT (FORMAT csv)`` become columns, by the same parsers as the stream's.

CSV, because it tells an empty string (``""``) from NULL (nothing), and Arrow splits it without a step per row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.csv

from cdc.errors import ProtocolError
from cdc.pgoutput.changes import Unfit, decode_column
from cdc.pgoutput.masks import Mask
from cdc.pgoutput.messages import Column

__all__ = ["decode_copy"]

_PARSE = pyarrow.csv.ParseOptions(newlines_in_values=True, ignore_empty_lines=False)


def decode_copy(
    data: bytes, columns: Sequence[Column], masks: Mapping[int, Mask]
) -> tuple[list[pa.Array], list[Unfit]]:
    """Decode whole rows.

    Args:
        data: CopyData messages of format csv, joined; less than 2 GiB.
        columns: what was selected, in that order, at least one.
        masks: what stands in place of a column's values, by its index.

    Returns:
        One array of length n per column, of Column.kind.arrow (masked ones of their mask's type),
        and the values that did not fit.

    Raises:
        ProtocolError: the rows do not have these columns.
    """
    if not data:
        raise ProtocolError("a copy of no rows was given to be decoded", 0)
    names = [str(index) for index in range(len(columns))]
    try:
        table = pyarrow.csv.read_csv(
            pa.BufferReader(data),
            # One block: a row never straddles two, whatever its size.
            pyarrow.csv.ReadOptions(column_names=names, block_size=len(data) + 1, use_threads=False),
            _PARSE,
            pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.binary()),
                check_utf8=False,  # looked at, value by value where need be, when the text is parsed
                null_values=[""],
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
            ),
        )
    except pa.ArrowInvalid as error:
        raise ProtocolError(f"rows of COPY cannot be read as {len(columns)} columns: {error}", 0) from None
    arrays: list[pa.Array] = []
    unfit: list[Unfit] = []
    for index, column in enumerate(columns):
        raw = pa.concat_arrays(table.column(index).chunks)
        if (mask := masks.get(index)) is not None:
            raw, column = mask.apply(raw), mask.column(column)  # noqa: PLW2901
        array, misfits = decode_column(index, column, raw)
        arrays.append(array)
        if misfits is not None:
            unfit.append(misfits)
    return arrays, unfit
