"""A TCP proxy in front of a server, at which a test can make a consumer's connections wait.

It makes what is a matter of milliseconds last as long as a test wants: a copy that has its slot and not its sessions
yet, or one that is half read.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit, urlunsplit

__all__ = ["Gate"]

_CHUNK = 65536
# Small, so that a server whose rows are held is soon unable to send any more.
_BUFFER = 65536


class Gate:
    """A context manager; `dsn` leads through it. At its end all connections are cut.

    Attributes:
        dsn: connection URL of the same database, through the gate.
    """

    def __init__(self, dsn: str) -> None:
        parts = urlsplit(dsn)
        assert parts.hostname is not None
        assert parts.port is not None
        self._server = (parts.hostname, parts.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        user = parts.netloc.rpartition("@")[0]
        netloc = f"{user}@127.0.0.1:{self._listener.getsockname()[1]}"
        self.dsn = urlunsplit(parts._replace(netloc=netloc))
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._changed = threading.Condition()
        self._closed = False
        self._newcomers_wait = False
        self._most_bytes: int | None = None
        self._streams_wait = False
        self._waiting = 0
        self._admitted = 0

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for each in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        for thread in self._threads:
            thread.join(5)

    @property
    def waiting(self) -> int:
        """How many connections wait at the gate just now."""
        return self._waiting

    def hold_newcomers(self) -> None:
        """From now on, let no new connection through; those that there are go on."""
        self._set(newcomers_wait=True)

    def admit(self) -> None:
        """Let one of the connections that wait through; the others go on waiting."""
        with self._changed:
            self._admitted += 1
            self._changed.notify_all()

    def hold_rows(self, most_bytes: int) -> None:
        """Hold the server's side of each connection that has brought so many bytes, but for replication's."""
        self._set(most_bytes=most_bytes)

    def hold_streams(self) -> None:
        """Hold what the server streams, but not its answers to other commands on replication connections."""
        self._set(streams_wait=True)

    def open(self) -> None:
        """Let everything through."""
        self._set()

    def _set(self, *, newcomers_wait: bool = False, most_bytes: int | None = None, streams_wait: bool = False) -> None:
        with self._changed:
            self._newcomers_wait, self._most_bytes, self._streams_wait = newcomers_wait, most_bytes, streams_wait
            self._admitted = 0
            self._changed.notify_all()

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closed:
            # Closing a socket does not wake the accept of another thread.
            if not select.select([self._listener], [], [], 0.1)[0]:
                continue
            with contextlib.suppress(OSError):
                client, _ = self._listener.accept()
                self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        self._sockets.append(client)
        self._wait(self._turned_away)
        if self._closed:
            return
        server = socket.socket()
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        self._sockets.append(server)
        replicates, streams = threading.Event(), threading.Event()
        with contextlib.suppress(OSError):
            server.connect(self._server)
            for each in (client, server):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._start(self._upwards, client, server, replicates, streams)
            self._downwards(server, client, replicates, streams)

    def _turned_away(self) -> bool:
        if self._newcomers_wait and self._admitted:
            self._admitted -= 1
            return False
        return self._newcomers_wait

    @staticmethod
    def _upwards(
        client: socket.socket, server: socket.socket, replicates: threading.Event, streams: threading.Event
    ) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(_CHUNK):
                # The startup packet, which may come after a question about encryption.
                if not replicates.is_set() and b"replication\0" in data:
                    replicates.set()
                if replicates.is_set() and b"START_REPLICATION" in data:
                    streams.set()
                server.sendall(data)
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_WR)

    def _downwards(
        self, server: socket.socket, client: socket.socket, replicates: threading.Event, streams: threading.Event
    ) -> None:
        size = 0

        def held() -> bool:
            if replicates.is_set():
                return self._streams_wait and streams.is_set()
            return self._most_bytes is not None and size > self._most_bytes

        with contextlib.suppress(OSError):
            while data := server.recv(_CHUNK):
                size += len(data)
                self._wait(held)
                client.sendall(data)
        for each in (server, client):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _wait(self, held: Callable[[], bool]) -> None:
        with self._changed:
            if not held() or self._closed:
                return
            self._waiting += 1
            self._changed.wait_for(lambda: self._closed or not held())
            self._waiting -= 1
