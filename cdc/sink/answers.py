"""The consumer answers questions to the warehouse while it holds the file. See reader.py for what is said.

Each client has a thread, and a connection of its own to the open database, in a transaction that cannot write: it sees
what is committed, and the stream goes on beside it. As long as a client is there, the file is not let go of.
"""

from __future__ import annotations

import socketserver
import threading
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from cdc.errors import CdcError
from cdc.sink.reader import ANSWER, ERROR, FREE, LENGTH, READY, answer, failed, socket_paths
from cdc.sink.warehouse import Warehouse

__all__ = ["Answers"]

LONGEST_QUESTION_BYTES = 10_000_000

_PATIENCE_S = 30.0
"""A client that says nothing, or takes nothing, for so long is sent away: it keeps others from the file."""

_TURN_S = 0.1


class Answers:
    """The server. `start` it once the consumer's lock is taken; `stop` it before the warehouse is closed for good."""

    def __init__(self, warehouse: Warehouse) -> None:
        self._warehouse = warehouse
        self._server: _Server | None = None

    def start(self) -> None:
        """Listen, in a thread.

        Raises:
            OSError: there is no place for a socket.
        """
        refused: OSError | None = None
        for path in socket_paths(self._warehouse.path):
            try:
                self._server = _Server(path, self._warehouse)
            except OSError as error:  # some file systems have no sockets
                refused = error
                continue
            serve = self._server.serve_forever
            threading.Thread(target=serve, args=[_TURN_S], name="cdc-answers", daemon=True).start()
            return
        assert refused is not None
        raise refused

    def stop(self) -> None:
        """End it; queries that still run are broken off."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
            self._warehouse.dismiss()


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, path: Path, warehouse: Warehouse) -> None:
        self.warehouse = warehouse
        self.path = path
        super().__init__(str(path), _Client, bind_and_activate=False)
        try:
            path.unlink(missing_ok=True)  # of a consumer that was killed: we have its lock
            self.server_bind()
            path.chmod(0o600)
            self.server_activate()
        except BaseException:
            super().server_close()
            raise

    def server_close(self) -> None:
        super().server_close()
        self.path.unlink(missing_ok=True)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away in the middle of an answer is none of our troubles."""


class _Client(socketserver.StreamRequestHandler):
    timeout = _PATIENCE_S
    server: _Server

    def handle(self) -> None:
        with self.server.warehouse.guest() as connection:
            if connection is None:
                self.wfile.write(FREE)
                return
            self.wfile.write(READY)
            while (question := self._question()) is not None:
                self._answer(connection, question)

    def _question(self) -> str | None:
        head = self.rfile.read(LENGTH.size)
        if len(head) < LENGTH.size or (length := LENGTH.unpack(head)[0]) > LONGEST_QUESTION_BYTES:
            return None
        return self.rfile.read(length).decode()

    def _answer(self, connection: duckdb.DuckDBPyConnection, question: str) -> None:
        connection.execute("BEGIN TRANSACTION READ ONLY")
        try:
            found = answer(connection, question)
            first = _first(found)
            self.wfile.write(ANSWER)
            with pa.ipc.new_stream(self.wfile, found.schema) as out:
                for batch in first:
                    out.write_batch(batch)
                for batch in found:
                    out.write_batch(batch)
        except CdcError as error:
            message = str(error).encode()
            self.wfile.write(ERROR + LENGTH.pack(len(message)) + message)
        finally:
            connection.execute("ROLLBACK")


def _first(found: pa.RecordBatchReader) -> list[pa.RecordBatch]:
    """Return the first batch, if there is one: most of what can go wrong in a query goes wrong before it."""
    try:
        return [found.read_next_batch()]
    except StopIteration:
        return []
    except (pa.ArrowException, OSError, duckdb.Error) as error:
        raise failed(error) from None
