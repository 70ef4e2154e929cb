"""Everything that can go wrong on purpose, as one tree.

CdcError                    one line of message, one of hint; exit status 1
├── SettingsError           a setting is missing, unknown or not usable; exit status 2
├── SourceError             Postgres refuses, or is not as it must be
│   └── ConnectionLost      Postgres went away or is not ready yet: worth another try
├── ProtocolError           the stream holds what the protocol does not allow
├── SinkError               the warehouse or the history cannot be written
│   ├── WarehouseBusy       another process holds the DuckDB file
│   └── TableError          one table cannot be applied; the others can
│       ├── MaskError       nothing of it may be kept, for its masks cannot be
│       └── Resync          it has to be copied anew, which happens by itself
│           └── Widen       and one of its columns become text
└── StateError              slot, warehouse and history do not belong together
"""

from __future__ import annotations

__all__ = [
    "CdcError",
    "ConnectionLost",
    "MaskError",
    "ProtocolError",
    "Resync",
    "SettingsError",
    "SinkError",
    "SourceError",
    "StateError",
    "TableError",
    "WarehouseBusy",
    "Widen",
]


class CdcError(Exception):
    """Base of all our errors.

    Attributes:
        hint: how to put it right, one sentence; empty where nothing sensible can be said.
    """

    exit_status = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class SettingsError(CdcError):
    """A setting is missing, unknown or not usable."""

    exit_status = 2


class SourceError(CdcError):
    """Postgres refuses, or is not as it must be.

    Attributes:
        sqlstate: the server's five-character error code; empty where there is none.
    """

    def __init__(self, message: str, hint: str = "", sqlstate: str = "") -> None:
        super().__init__(message, hint)
        self.sqlstate = sqlstate


class ConnectionLost(SourceError):
    """Postgres went away, restarts or is still starting: the same step may succeed later."""


class ProtocolError(CdcError):
    """The stream holds what the protocol does not allow.

    Attributes:
        offset: byte offset within the batch's buffer at which it was noticed.
    """

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(
            f"malformed pgoutput data at byte {offset}: {message}",
            "nothing was confirmed; restart the consumer, and report this if it comes again",
        )
        self.offset = offset


class SinkError(CdcError):
    """The warehouse or the history cannot be written."""


class WarehouseBusy(SinkError):
    """Another process holds the DuckDB file.

    Attributes:
        pid: the process that holds it, where DuckDB names it.
    """

    def __init__(self, message: str, hint: str = "", pid: int | None = None) -> None:
        super().__init__(message, hint)
        self.pid = pid


class TableError(SinkError):
    """One table cannot be applied; the others can.

    Attributes:
        oid: the table's OID in the source.
    """

    def __init__(self, message: str, oid: int, hint: str = "") -> None:
        super().__init__(message, hint)
        self.oid = oid


class MaskError(TableError):
    """A table's masks cannot be kept: nothing of it may be, and no copy mends that."""


class Resync(TableError):
    """The stream alone can no longer make this table right: it has to be copied again."""


class Widen(Resync):
    """A column's type cannot hold what Postgres has in it: it has to become text, by a new copy.

    Attributes:
        attnum: of the column.
    """

    def __init__(self, message: str, oid: int, hint: str, attnum: int) -> None:
        super().__init__(message, oid, hint)
        self.attnum = attnum


class StateError(CdcError):
    """Slot, warehouse and history do not belong together."""
