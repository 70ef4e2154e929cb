"""The command line: one file per command. These modules are the only ones that print.

Exit status: 0 done; 1 failed; 2 wrong usage or setting; 3 it worked and found something.
"""

from __future__ import annotations

import os
import signal
import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line of this process."""
    if "run" in sys.argv[1:]:
        # To load everything takes a second, in which a signal has to end `cdc run` in peace, too: nothing is in hand.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: os._exit(0))
    from cdc.cli.group import invoke  # noqa: PLC0415 -- see above

    invoke()
