"""What the consumer has done since its last summary: one line a minute says that it is alive, and how far it is."""

from __future__ import annotations

import dataclasses
import datetime as dt
import time
from typing import Any

from cdc.lsn import format_lsn
from cdc.pgoutput.decoder import Decoded

__all__ = ["INTERVAL_S", "Tally"]

INTERVAL_S = 60.0


@dataclasses.dataclass(slots=True)
class Tally:
    """Counts since `began` (monotonic seconds).

    Attributes:
        as_of: everything committed by then is in; microseconds since 1970 UTC, None: nothing is yet.
    """

    began: float = dataclasses.field(default_factory=time.monotonic)
    batches: int = 0
    transactions: int = 0
    changes: int = 0
    schema_changes: int = 0
    as_of: int | None = None

    def count(self, decoded: Decoded) -> None:
        """Count a batch that is durable, or a part of one."""
        self.batches += 1
        self.transactions += decoded.transactions
        self.changes += sum(len(rows) for rows in decoded.rows)

    def due(self) -> bool:
        """Whether it is time for a summary."""
        return time.monotonic() - self.began >= INTERVAL_S

    def summary(self, position: int, received: int) -> dict[str, Any]:
        """Return the fields of a summary, and begin anew.

        Args:
            position: of the checkpoint.
            received: the newest position that the server has named.
        """
        seconds = max(time.monotonic() - self.began, 0.001)
        fields = {
            "transactions": self.transactions,
            "changes": self.changes,
            "changes_per_s": round(self.changes / seconds),
            "batches": self.batches,
            "schema_changes": self.schema_changes or "",
            "position": format_lsn(position),
            "behind_bytes": max(0, received - position),
            "as_of": "" if self.as_of is None else _iso(self.as_of),
        }
        self.began = time.monotonic()
        self.batches = self.transactions = self.changes = self.schema_changes = 0
        return fields


def _iso(timestamp_us: int) -> str:
    return dt.datetime.fromtimestamp(timestamp_us / 1e6, dt.UTC).isoformat(timespec="milliseconds")
