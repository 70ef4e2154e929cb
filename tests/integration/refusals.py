"""What the tests of the command line share: how a refusal looks, and servers and readers that get in the way."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self
from unittest import mock
from urllib.parse import urlsplit, urlunsplit

from cdc.cli import main
from tests.conftest import Database, Lake
from tests.mirror import Consumer, differences, run_cdc, until

__all__ = [
    "LOG_LINE",
    "Middleman",
    "await_sent",
    "call",
    "complete",
    "eventually",
    "fatal",
    "reader",
    "refused",
    "rows",
    "spawn",
    "took",
]

LOG_LINE = re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+Z [a-z]")
"""How a line of normal operation begins."""

_SSL, _GSS = 80877103, 80877104


def refused(done: subprocess.CompletedProcess[str], status: int = 1) -> tuple[str, str]:
    """Assert that a command failed as promised; return its error and its hint, without the words before.

    One line of error and one of hint at the end of stderr, nothing but log lines before, nothing on stdout.
    """
    assert done.returncode == status, f"exit status {done.returncode}: {done.stderr}"
    assert done.stdout == ""
    *log, error, hint = done.stderr.splitlines()
    assert error.startswith("error: "), done.stderr
    assert hint.startswith("hint: "), done.stderr
    strange = [line for line in log if not LOG_LINE.match(line)]
    assert not strange, f"neither log nor error: {strange}"
    said = error.removeprefix("error: "), hint.removeprefix("hint: ")
    assert all(part.strip() for part in said), done.stderr
    return said


def call(lake: Lake, dsn: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run one command of cdc to its end, by the function that is the script, in this process: a second less per call.

    What is left open in it is an error of the test. `spawn` where it has to be a process of its own.
    """
    out, err = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    status = 0
    with (
        mock.patch.dict(os.environ, lake.environment(dsn, **settings), clear=True),
        mock.patch("sys.argv", ["cdc", *arguments]),
        contextlib.chdir(lake.root),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return subprocess.CompletedProcess(["cdc", *arguments], status, out.getvalue(), err.getvalue())


def spawn(lake: Lake, dsn: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run one command of cdc in a process of its own to its end."""
    return run_cdc(lake, dsn, *arguments, **settings)


def rows(database: Database, *ids: int) -> None:
    """Insert rows into public.t, which is made if it is not there."""
    database.execute("CREATE TABLE IF NOT EXISTS t (id int PRIMARY KEY, v text)")
    for each in ids:
        database.execute("INSERT INTO t VALUES (%s, %s)", [each, f"row {each}"])


def complete(database: Database, lake: Lake, dsn: str = "", **settings: str) -> str:
    """Assert that a run now brings everything in, and public.t is the same everywhere; return what it said."""
    done = call(lake, dsn or database.dsn, "run", "--once", **settings)
    assert done.returncode == 0, done.stderr
    key = ["id"] if settings.get("history") != "" else None
    assert differences(database, lake, "public.t", key) == ""
    return done.stderr


@contextlib.contextmanager
def reader(path: Path) -> Iterator[int]:
    """Hold a DuckDB file open for reading in a process of its own; give its PID."""
    program = (
        "import sys, time, duckdb\n"
        "while True:\n"
        "    try:\n"
        "        held = duckdb.connect(sys.argv[1], read_only=True)\n"
        "        break\n"
        "    except duckdb.IOException:\n"
        "        time.sleep(0.005)\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "held\n"
            yield process.pid
        finally:
            process.kill()


def fatal(text: str, sqlstate: str = "08P01") -> bytes:
    """Return an ErrorResponse of severity FATAL, as PgBouncer sends it."""
    fields = b"SFATAL\0VFATAL\0C" + sqlstate.encode() + b"\0M" + text.encode() + b"\0\0"
    return b"E" + struct.pack("!I", len(fields) + 4) + fields


class Middleman:
    """A TCP server between client and Postgres that reads startup packets; a context manager.

    Attributes:
        dsn: connection URL of the same database, through it.
        refused: how many connections it has answered itself.
        forwarded: how many it has passed on.
    """

    def __init__(
        self, dsn: str, answer: Callable[[bytes], bytes | None] = lambda _startup: None, version: str = ""
    ) -> None:
        """Create one that does not listen yet.

        Args:
            answer: returns what a client with this startup packet is told, and then hung up on; None: it is passed on.
            version: what the server is made to say that it is.
        """
        parts = urlsplit(dsn)
        assert parts.hostname is not None
        assert parts.port is not None
        self._server = (parts.hostname, parts.port)
        self._answer = answer
        self._version = version
        self._listener = socket.create_server(("127.0.0.1", 0))
        user = parts.netloc.rpartition("@")[0]
        self.dsn = urlunsplit(parts._replace(netloc=f"{user}@127.0.0.1:{self._listener.getsockname()[1]}"))
        self.refused = self.forwarded = 0
        self._sockets: list[socket.socket] = [self._listener]

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._sockets.append(client)
                threading.Thread(target=self._serve, args=[client], daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError):
            startup = self._startup(client)
            answer = self._answer(startup)
            if answer is not None:
                self.refused += 1
                client.sendall(answer)
                client.shutdown(socket.SHUT_RDWR)
                return
            self.forwarded += 1
            server = socket.create_connection(self._server)
            self._sockets.append(server)
            server.sendall(startup)
            threading.Thread(target=_pump, args=[client, server], daemon=True).start()
            if self._version:
                self._greet(server, client)
            _pump(server, client)

    @staticmethod
    def _startup(client: socket.socket) -> bytes:
        """Return the startup packet; questions about encryption are answered with no."""
        while True:
            head = _exactly(client, 8)
            length, code = struct.unpack("!II", head)
            if code not in (_SSL, _GSS):
                return head + _exactly(client, length - 8)
            client.sendall(b"N")

    def _greet(self, server: socket.socket, client: socket.socket) -> None:
        """Pass on what the server says until it is ready, with another version."""
        while True:
            head = _exactly(server, 5)
            kind, body = head[:1], _exactly(server, struct.unpack("!I", head[1:])[0] - 4)
            if kind == b"S" and body.startswith(b"server_version\0"):
                body = b"server_version\0" + self._version.encode() + b"\0"
            client.sendall(kind + struct.pack("!I", len(body) + 4) + body)
            if kind == b"Z":
                return


def _exactly(source: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        chunk = source.recv(size - len(data))
        if not chunk:
            raise OSError("the other side hung up")
        data += chunk
    return data


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    for each in (source, target):
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)


def eventually(consumer: Consumer, condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    """Return once `condition` holds; fail if it does not come to that, or the consumer ends before."""

    def holds() -> object:
        found = condition()
        assert found or consumer.running, consumer.output
        return found

    until(holds, timeout_s, f"see {consumer.log}")


def took(work: Callable[[], object]) -> float:
    """Return how many seconds `work` takes."""
    began = time.monotonic()
    work()
    return time.monotonic() - began


def await_sent(database: Database, lsn: str) -> None:
    """Return once the walsender has sent everything up to `lsn`, as the server knows it."""
    query = "SELECT 1 FROM pg_stat_replication WHERE sent_lsn >= %s::pg_lsn AND application_name = 'cdc'"
    until(lambda: database.execute(query, [lsn]), what=f"{lsn} to be sent")
