"""Debezium's envelopes, made by the optional package pgoutput-decoder.

That package reads from a server and from nothing else: it takes host, port and slot, and there is no way to hand it a
message. A temporary slot belongs to the connection that made it, though, and a lasting one would hold the server's WAL
if we were killed. So it is given a server: a socket in a folder that only this user can enter, which says what
Postgres says at START_REPLICATION, and then passes on the frames that our own connection has received. It also spares
it what it cannot do: TLS, passwords from elsewhere, pinned settings.

It runs in a process of its own (`main`), because version 0.1 now and then crashes at its end. That process ends at
once when its stdin does, so it never outlives the one that started it.

Source: PostgreSQL manual, "Message Formats" and "Streaming Replication Protocol".
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
import os
import queue
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from cdc.errors import CdcError

if TYPE_CHECKING:
    from cdc.pgoutput.decoder import RelationRows

__all__ = ["Envelopes", "main"]

PACKAGE = "pgoutput_decoder"
PATIENCE_S = 30.0

# Where libpq and those who follow it look for the socket of port 5432.
_SOCKET = ".s.PGSQL.5432"
_KIND, _OID = 25, slice(26, 30)
_LENGTH = struct.Struct("!I")


class Envelopes:
    """The envelopes of changes; a context manager."""

    def __init__(self, database: str) -> None:
        """Create one without a process yet; `database` is the name that the envelopes tell.

        Raises:
            CdcError: the package is not installed.
        """
        if importlib.util.find_spec(PACKAGE) is None:
            raise CdcError(
                "--format debezium needs a package that is not installed: pgoutput-decoder",
                "pip install 'pg-duckdb-cdc[debezium]' (Python 3.12 or newer, on x86-64 Linux)",
            )
        self._database = database
        self._stack = contextlib.ExitStack()
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cdc-")))
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(str(folder / _SOCKET))
            listener.listen()
            self._errors = stack.enter_context((folder / "errors").open("w+"))
            self._process = stack.enter_context(self._start(folder))
            self._thread = threading.Thread(target=self._read, name="cdc-envelopes", daemon=True)
            self._thread.start()
            stack.callback(self._end)
            self._socket = stack.enter_context(self._accept(listener))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def of(self, frames: Sequence[bytes], rows: Sequence[RelationRows]) -> Iterator[str]:
        """Return the envelopes of the changes in `frames` to the tables of `rows`, one line each; of TRUNCATE none.

        Args:
            frames: of a batch, each batch of the connection in its turn.

        Raises:
            CdcError: the package has failed.
        """
        oids = {each.relation.oid.to_bytes(4, "big") for each in rows}
        changes = 0
        passed: list[bytes] = []
        for frame in frames:
            is_change = frame[_KIND] in b"IUD"
            if frame[_KIND] in b"BCR" or (is_change and frame[_OID] in oids):
                passed.append(_message(b"d", frame))
                changes += is_change
        try:
            self._discard()
            self._socket.sendall(b"".join(passed))
        except OSError as error:
            raise self._failed() from error
        for _ in range(changes):
            yield self._next()

    def _discard(self) -> None:
        """Read what the package confirms, of which nobody needs to know, before it fills the socket."""
        self._socket.settimeout(0)
        with contextlib.suppress(BlockingIOError):
            while self._socket.recv(65536):
                pass
        self._socket.settimeout(PATIENCE_S)

    def _next(self) -> str:
        try:
            line = self._lines.get(timeout=PATIENCE_S)
        except queue.Empty:
            raise self._failed() from None
        if not line:
            raise self._failed()
        return line.rstrip("\n")

    def _read(self) -> None:
        """Take lines all along: while nobody does, the process takes no frames."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _start(self, folder: Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "cdc.debezium", str(folder), self._database],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for us
        )

    def _end(self) -> None:
        """End the process by the end of its stdin, and then the thread, by that of its stdout."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._thread.join()

    def _accept(self, listener: socket.socket) -> socket.socket:
        """Return the connection of the package's reader, up to its START_REPLICATION."""
        listener.settimeout(0.2)
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                connection, _ = listener.accept()
                break
            except TimeoutError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise self._failed() from None
        connection.settimeout(PATIENCE_S)
        try:
            (length,) = _LENGTH.unpack(_exactly(connection, 4))
            _exactly(connection, length - 4)
            ready = _message(b"R", bytes(4)), _message(b"S", b"server_version\x0018.0\0"), _message(b"Z", b"I")
            connection.sendall(b"".join(ready))
            kind, (length,) = _exactly(connection, 1), _LENGTH.unpack(_exactly(connection, 4))
            command = _exactly(connection, length - 4)
            if kind != b"Q" or not command.startswith(b"START_REPLICATION"):
                raise CdcError(
                    f"pgoutput-decoder says {command[:40]!r} to a server", "this version is not known to cdc"
                )
            connection.sendall(_message(b"W", bytes(3)))
        except OSError as error:
            connection.close()
            raise self._failed() from error
        except BaseException:
            connection.close()
            raise
        return connection

    def _failed(self) -> CdcError:
        """Return the error for a process that does not do what it should."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        self._errors.seek(0)
        said = self._errors.read().strip().splitlines()
        status = self._process.returncode
        why = said[-1] if said else "it does not answer" if status is None else f"it ended with status {status}"
        return CdcError(f"pgoutput-decoder failed: {why}", "--format json prints the same changes without it")


def _message(kind: bytes, content: bytes) -> bytes:
    return kind + _LENGTH.pack(len(content) + 4) + content


def _exactly(source: socket.socket, size: int) -> bytes:
    content = b""
    while len(content) < size:
        chunk = source.recv(size - len(content))
        if not chunk:
            raise ConnectionError("the other side hung up")
        content += chunk
    return content


async def _relay(folder: str, database: str) -> None:
    reader = importlib.import_module(PACKAGE).LogicalReplicationReader(
        publication_name="cdc", slot_name="cdc", host=folder, database=database
    )
    async for message in reader:
        sys.stdout.write(message.json(None) + "\n")
        sys.stdout.flush()


def main(folder: str, database: str) -> None:
    """The process: envelopes to stdout, until stdin ends. Never returns."""

    def watch() -> None:
        sys.stdin.read()
        os._exit(0)

    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # meant for all of us, who end in our own order
    threading.Thread(target=watch, daemon=True).start()
    asyncio.run(_relay(folder, database))


if __name__ == "__main__":
    main(*sys.argv[1:])
