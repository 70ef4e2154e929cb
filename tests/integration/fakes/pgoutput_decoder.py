"""Stands for the package pgoutput-decoder where that cannot be installed: the same API, the same losses.

Version 0.1.0 has a reader that connects to a server by itself and yields messages; there is no way to make or to feed
either. With FAKE_FAILS in the environment it fails at the first change instead.
"""

from __future__ import annotations

import asyncio
import json
import os
import struct
from collections.abc import AsyncIterator
from typing import Any

__all__ = ["LogicalReplicationReader", "ReplicationMessage"]

Column = tuple[str, int]

_OPERATIONS = {"I": "c", "U": "u", "D": "d"}


class ReplicationMessage:
    """One change, as a Debezium envelope."""

    def __init__(self, op: str, before: Any, after: Any, source: dict[str, Any]) -> None:
        self.op, self.before, self.after, self.source = op, before, after, source

    def json(self, indent: int | None = None) -> str:
        return json.dumps(
            {"op": self.op, "before": self.before, "after": self.after, "source": self.source}, indent=indent
        )


class LogicalReplicationReader:
    """Iterates over the changes of a slot."""

    def __init__(  # noqa: PLR0917 -- as it is there
        self,
        publication_name: str,
        slot_name: str,
        host: str,
        database: str,
        port: int = 5432,
        user: str = "postgres",
        password: str = "",
        start_lsn: int | None = None,
        auto_acknowledge: bool = True,
    ) -> None:
        self._command = f"START_REPLICATION SLOT {slot_name} LOGICAL 0/0 (publication_names '{publication_name}')\0"
        self._path, self._database, self._user = f"{host}/.s.PGSQL.{port}", database, user
        self._relations: dict[int, tuple[str, str, list[Column]]] = {}
        assert not password
        assert start_lsn is None
        assert auto_acknowledge

    async def __aiter__(self) -> AsyncIterator[ReplicationMessage]:
        reader, writer = await asyncio.open_unix_connection(self._path)
        startup = f"\0\3\0\0user\0{self._user}\0database\0{self._database}\0replication\0database\0\0".encode()
        writer.write(struct.pack("!I", len(startup) + 4) + startup)
        while await self._receive(reader) != (b"Z", b"I"):
            pass
        writer.write(b"Q" + struct.pack("!I", len(self._command) + 4) + self._command.encode())
        assert (await self._receive(reader))[0] == b"W"
        while True:
            kind, frame = await self._receive(reader)
            assert (kind, frame[:1]) == (b"d", b"w")
            _, end_lsn, _ = struct.unpack("!QQq", frame[1:25])
            writer.write(b"d" + struct.pack("!IcQQQqB", 38, b"r", end_lsn, end_lsn, end_lsn, 0, 0))
            message = self._read(frame[25:])
            if message is not None:
                yield message

    @staticmethod
    async def _receive(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
        kind = await reader.readexactly(1)
        (length,) = struct.unpack("!I", await reader.readexactly(4))
        return kind, await reader.readexactly(length - 4)

    def _read(self, message: bytes) -> ReplicationMessage | None:
        kind, (oid,) = chr(message[0]), struct.unpack("!I", message[1:5])
        if kind == "R":
            schema, table, rest = message[5:].split(b"\0", 2)
            self._relations[oid] = schema.decode(), table.decode(), self._columns(rest[3:])
        if kind not in _OPERATIONS:
            return None
        if "FAKE_FAILS" in os.environ:
            raise RuntimeError("no such luck")
        schema_name, table_name, columns = self._relations[oid]
        rows: dict[str, dict[str, Any]] = {}
        rest = message[5:]
        while rest:
            tag, rest = chr(rest[0]), rest[3:]
            rows[tag], rest = self._tuple(columns, rest)
        source = {"schema": schema_name, "table": table_name, "db": self._database}
        return ReplicationMessage(_OPERATIONS[kind], rows.get("K", rows.get("O")), rows.get("N"), source)

    @staticmethod
    def _columns(rest: bytes) -> list[Column]:
        columns = []
        while rest:
            name, rest = rest[1:].split(b"\0", 1)
            columns.append((name.decode(), struct.unpack("!I", rest[:4])[0]))
            rest = rest[8:]
        return columns

    @staticmethod
    def _tuple(columns: list[Column], rest: bytes) -> tuple[dict[str, Any], bytes]:
        row: dict[str, Any] = {}
        for name, type_oid in columns:
            kind, rest = rest[:1], rest[1:]
            row[name] = None
            if kind == b"t":
                (length,) = struct.unpack("!I", rest[:4])
                text, rest = rest[4 : 4 + length].decode(), rest[4 + length :]
                row[name] = {23: int, 1700: float}.get(type_oid, str)(text)
        return row, rest
