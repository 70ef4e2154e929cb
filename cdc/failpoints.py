"""Named points at which a test makes the consumer die, as if the machine had lost power.

``CDC_CRASH_AT=before_duck_commit:3`` kills the process with SIGKILL when it reaches that point for the third time.
Without the variable a point costs one dictionary look-up in an empty dictionary.
"""

from __future__ import annotations

import os
import signal
import threading
import time

__all__ = ["POINTS", "arm", "reach"]

POINTS = (
    "after_recv",
    "before_duck_begin",
    "mid_duck_apply",
    "mid_txn",
    "during_ddl_apply",
    "before_parquet_tmp",
    "after_parquet_tmp",
    "before_duck_commit",
    "after_duck_commit",
    "before_rename",
    "after_rename",
    "before_ack",
    "after_ack",
    "after_intent",
    "after_slot_create",
    "during_copy",
    "before_swap",
    "after_swap",
    "during_idle",
)
"""Every name that may be reached, in about the order in which a batch meets them."""


_countdown: dict[str, int] = {}
_lock = threading.Lock()

_LINGER_S = 0.1
"""What other threads were told too early gets out before the death, and shows."""


def arm(text: str) -> None:
    """Take on what CDC_CRASH_AT says: the name of a point, and after a colon at which visit; '': nothing."""
    _countdown.clear()
    point, _, nth = text.partition(":")
    if point and point not in POINTS:
        raise ValueError(f"CDC_CRASH_AT names no crash point: {point!r}")
    if point:
        _countdown[point] = int(nth or 1)


arm(os.environ.get("CDC_CRASH_AT", ""))


def reach(point: str) -> None:
    """Die here if a test asked for it."""
    if point not in _countdown:
        return
    with _lock:
        _countdown[point] -= 1
        if _countdown[point] == 0:
            time.sleep(_LINGER_S)
            os.kill(os.getpid(), signal.SIGKILL)
