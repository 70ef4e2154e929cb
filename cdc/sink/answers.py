"""The consumer answers questions to the warehouse while it holds the file. See reader.py for what is said.

Each client has a thread, and a connection of its own to the open database, in a transaction that cannot write: it sees
what is committed, and the stream goes on beside it. As long as a client is there, the file is not let go of; so none is
let in once it was held for long, and one that is silent, slow or gone is sent away.

What could do harm is not answered: to read a file by SQL would open and close it, and if it is the database's own, the
process would lose its lock (POSIX). Whoever asks for that does it himself, once the file is free.
"""

from __future__ import annotations

import itertools
import json
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from cdc.errors import CdcError
from cdc.sink.reader import (
    ANSWER,
    DONE,
    ERROR,
    FREE,
    LENGTH,
    READY,
    SOCKET_TIMEOUT_S,
    WAIT,
    answer,
    failed,
    socket_paths,
)
from cdc.sink.warehouse import Warehouse

__all__ = ["Answers"]

LONGEST_QUESTION_BYTES = 10_000_000

CLIENTS = 8
"""Served at once; another one is sent away, and tries again."""

_SILENCE_S = 10.0
"""Longest time that a client takes to put a question, or to take what it is given."""

_TURN_S = 0.05

_FUNCTIONS = ("range", "generate_series", "unnest", "duckdb_tables", "duckdb_columns", "duckdb_views", "duckdb_schemas")
"""Table functions that touch nothing but the database."""


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
            self._warehouse.dismiss(for_good=True)


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, path: Path, warehouse: Warehouse) -> None:
        self.warehouse = warehouse
        self.path = path
        self.clients: set[_Client] = set()
        self._places = threading.BoundedSemaphore(CLIENTS)
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

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def service_actions(self) -> None:
        """Every turn: send away who has gone, or takes too long."""
        for client in list(self.clients):
            client.look()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away in the middle of an answer is none of our troubles."""


class _Client(socketserver.StreamRequestHandler):
    timeout = _SILENCE_S
    server: _Server

    def handle(self) -> None:
        self._lent: duckdb.DuckDBPyConnection | None = None
        self._asking_since = time.monotonic()
        self._running_since: float | None = None
        with self.server.warehouse.guest() as lent:
            if lent is None:
                self.wfile.write(FREE)
                return
            self._lent = lent
            self.server.clients.add(self)
            try:
                self.wfile.write(READY)
                while (question := self._question()) is not None:
                    self._running_since = time.monotonic()
                    self._answer(lent, question)
                    self._running_since, self._asking_since = None, time.monotonic()
            finally:
                self.server.clients.discard(self)

    def look(self) -> None:
        """Break off what nobody waits for any more; called by the server's thread."""
        now, running = time.monotonic(), self._running_since
        if running is None:
            if now - self._asking_since > _SILENCE_S:
                self._hang_up()
            return
        if (self._is_gone() or now - running > SOCKET_TIMEOUT_S) and self._lent is not None:
            try:
                self._lent.interrupt()
            except duckdb.Error:  # it has just been closed
                self._hang_up()

    def _is_gone(self) -> bool:
        try:
            return not self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _hang_up(self) -> None:
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it has gone by itself

    def _question(self) -> str | None:
        head = self.rfile.read(LENGTH.size)
        if len(head) < LENGTH.size or (length := LENGTH.unpack(head)[0]) > LONGEST_QUESTION_BYTES:
            return None
        question = self.rfile.read(length)
        return question.decode() if len(question) == length else None

    def _answer(self, lent: duckdb.DuckDBPyConnection, question: str) -> None:
        lent.execute("BEGIN TRANSACTION READ ONLY")
        try:
            if not _harmless(lent, question):
                self.wfile.write(WAIT)
                return
            found = answer(lent, question)
            first = _first(found)
            self.wfile.write(ANSWER)
            # Not as a context: an answer that is broken off must not look whole.
            out = pa.ipc.new_stream(self.wfile, found.schema)
            for batch in itertools.chain(first, found):
                out.write_batch(batch)
            out.close()
            self.wfile.write(DONE)
        except CdcError as error:
            message = str(error).encode()
            self.wfile.write(ERROR + LENGTH.pack(len(message)) + message)
        finally:
            lent.execute("ROLLBACK")


def _first(found: pa.RecordBatchReader) -> list[pa.RecordBatch]:
    """Return the first batch, if there is one: most of what can go wrong in a query goes wrong before it."""
    try:
        return [found.read_next_batch()]
    except StopIteration:
        return []
    except (pa.ArrowException, OSError, duckdb.Error) as error:
        raise failed(error) from None


def _harmless(lent: duckdb.DuckDBPyConnection, question: str) -> bool:
    """Whether a query names nothing but tables and views of the database, and functions that touch nothing else.

    What is no query at all is so, too: `answer` refuses it.
    """
    ((text,),) = lent.execute("SELECT json_serialize_sql(?)", [question]).fetchall()
    tree = json.loads(text)
    if tree.get("error"):
        return True
    here = "SELECT lower(table_name) FROM duckdb_tables() UNION SELECT lower(view_name) FROM duckdb_views()"
    known = {name for (name,) in lent.execute(here).fetchall()}
    known |= {str(entry["key"]).lower() for node in _nodes(tree) for entry in node.get("cte_map", {}).get("map", [])}
    for node in _nodes(tree):
        if node.get("type") == "BASE_TABLE" and str(node.get("table_name")).lower() not in known:
            return False
        if node.get("type") == "TABLE_FUNCTION" and node["function"].get("function_name") not in _FUNCTIONS:
            return False
    return True


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """Yield every object of a tree of JSON."""
    if isinstance(tree, dict):
        yield tree
    for child in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from _nodes(child)
