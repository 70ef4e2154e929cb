"""Tells for what the consumer waits, while it does: a line every few seconds, whatever it is."""

from __future__ import annotations

import time
from typing import Any

from cdc.copies import Observer
from cdc.errors import WarehouseBusy
from cdc.source.slot import Blocker, Slot

__all__ = ["Waits"]

_WARNING_S = 5.0


class Waits:
    """See the module. Each method is told, over and over, for how many seconds something has kept us by now."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._told_at = 0.0

    def for_warehouse(self, busy: WarehouseBusy, waited_s: float) -> None:
        """Somebody else has the warehouse open."""
        if waited_s >= _WARNING_S:
            self._tell("waiting for the warehouse", reason=str(busy), waited_s=round(waited_s), hint=busy.hint)

    def for_transactions(self, blockers: list[Blocker], waited_s: float, table: str = "") -> None:
        """A slot cannot be made, for a table's copy or the first one, before these have ended."""
        who = "; ".join(f"pid {b.pid}, {b.age_s:.0f} s old: {b.description}" for b in blockers[:3])
        self._tell("waiting for running transactions to end", table=table, waited_s=round(waited_s), transactions=who)

    def for_slot(self, found: Slot, waited_s: float) -> None:
        """Somebody else uses our slot."""
        if waited_s >= _WARNING_S:
            self._tell(
                "waiting for the replication slot", slot=found.name, used_by=found.active_pid, waited_s=round(waited_s)
            )

    def _tell(self, name: str, **fields: Any) -> None:
        if time.monotonic() - self._told_at >= _WARNING_S:
            self._told_at = time.monotonic()
            self._observer.event(name, **fields)
