"""The consumer outlives the connection: server restarts, cut and busy connections, TLS (J8, J9, J10, J18)."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest

from cdc.embedded import EmbeddedServer
from cdc.installation import installations
from tests.conftest import Database, Lake
from tests.mirror import Consumer, differences, mirror_once, run_cdc, states, until, warehouse_rows


class Scissors:
    """A TCP proxy that cuts each connection once the server has sent so many bytes over it.

    Attributes:
        dsn: the same database, through the proxy.
        cuts: how many connections were cut in the middle of what the server sent.
    """

    def __init__(self, dsn: str) -> None:
        parts = urlsplit(dsn)
        self._server = (parts.hostname or "", parts.port or 0)
        self._listener = socket.create_server(("127.0.0.1", 0))
        user = parts.netloc.rpartition("@")[0]
        self.dsn = urlunsplit(parts._replace(netloc=f"{user}@127.0.0.1:{self._listener.getsockname()[1]}"))
        self.after_bytes: int | None = None
        self.cuts = 0
        self._sockets = [self._listener]
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def close(self) -> None:
        """Cut what is left."""
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in list(self._threads):
            thread.join(5)
        for each in self._sockets:
            each.close()

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._sockets.append(client)
                server = socket.create_connection(self._server)
                self._sockets.append(server)
                self._start(self._pass, client, server, False)
                self._start(self._pass, server, client, True)

    def _pass(self, source: socket.socket, target: socket.socket, downwards: bool) -> None:
        size = 0
        with contextlib.suppress(OSError):
            while data := source.recv(4096):
                limit = self.after_bytes if downwards else None
                if limit is not None and size + len(data) > limit:
                    target.sendall(data[: max(0, limit - size)])
                    self.cuts += 1
                    break
                size += len(data)
                target.sendall(data)
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def scissors(database: Database) -> Iterator[Scissors]:
    """A proxy in front of the test's database, which cuts nothing yet."""
    proxy = Scissors(database.dsn)
    yield proxy
    proxy.close()


def streaming(lake: Lake, table: str) -> bool:
    """Whether the table streams."""
    return states(lake).get(table) == "streaming"


def has(lake: Lake, rows: int) -> bool:
    """Whether the warehouse has so many rows of public.t."""
    return warehouse_rows(lake, "SELECT count(*) FROM public.t") == [(rows,)]


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_server_restart(database: Database, lake: Lake, mode: Literal["fast", "immediate"]) -> None:
    """J9: the server stops (57P01, refused connections, 57P03 while it starts) and comes back; nothing is missing."""
    database.execute("CREATE TABLE t (id int PRIMARY KEY, v text)")
    with Consumer(lake, database.dsn, flush_interval="100ms") as consumer:
        until(lambda: streaming(lake, "public.t"))
        for n in range(3):
            database.execute(f"INSERT INTO t SELECT i, 'v' FROM generate_series({n}000, {n}499) i")
            database.server.restart(mode)
            database.execute(f"INSERT INTO t SELECT i, 'w' FROM generate_series({n}500, {n}999) i")
            until(lambda n=n: has(lake, 1000 * (n + 1)), what=consumer.output)  # type: ignore[misc]
        assert consumer.output.count("connection lost") >= 3, "the restarts were not noticed"
        assert consumer.stop() == 0
    assert differences(database, lake, "public.t", ["id"]) == ""


def test_terminated_walsender(database: Database, lake: Lake) -> None:
    """J9, J10: the walsender is terminated again and again; the slot may still be busy (55006) when we come back."""
    database.execute("CREATE TABLE t (id int PRIMARY KEY)")
    with Consumer(lake, database.dsn, flush_interval="100ms") as consumer:
        until(lambda: streaming(lake, "public.t"))
        terminated = 0
        for n in range(10):
            database.execute(f"INSERT INTO t SELECT generate_series({n}00, {n}99)")
            terminated += len(
                database.execute(
                    "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots "
                    "WHERE slot_name = 'cdc' AND active_pid IS NOT NULL"
                )
            )
            until(lambda n=n: has(lake, 100 * (n + 1)), what=consumer.output)  # type: ignore[misc]
        assert terminated >= 5
        assert consumer.stop() == 0
    assert differences(database, lake, "public.t", ["id"]) == ""


@pytest.mark.parametrize(
    "after_bytes", [pytest.param(3000, marks=pytest.mark.slow), 50_000, pytest.param(400_001, marks=pytest.mark.slow)]
)
def test_connection_cut_within_a_message(database: Database, lake: Lake, scissors: Scissors, after_bytes: int) -> None:
    """J8: every connection is cut after so many bytes, in mid-message, mid-transaction and mid-COPY; then no more."""
    database.execute("CREATE TABLE t (id int PRIMARY KEY, v text)")
    database.execute("INSERT INTO t SELECT i, repeat('x', 90) FROM generate_series(1, 5000) i")
    with Consumer(lake, scissors.dsn, flush_interval="100ms", flush_rows="1000") as consumer:
        until(lambda: streaming(lake, "public.t"))
        scissors.after_bytes = after_bytes
        database.execute("INSERT INTO t SELECT i, repeat('y', 90) FROM generate_series(5001, 15000) i")
        database.execute("UPDATE t SET v = 'z' WHERE id % 3 = 0")
        database.execute("CREATE TABLE u AS SELECT i AS id, repeat('u', 90) AS v FROM generate_series(1, 8000) i")
        database.execute("SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = 'cdc'")
        until(lambda: scissors.cuts >= 4, what=consumer.output)
        scissors.after_bytes = None
        until(lambda: streaming(lake, "public.u"), what=consumer.output)
        until(lambda: not differences(database, lake, "public.t"), what=consumer.output)
        assert consumer.stop() == 0
    assert differences(database, lake, "public.t", ["id"]) == ""
    assert differences(database, lake, "public.u", []) == ""


def test_slot_in_use_elsewhere(database: Database, lake: Lake) -> None:
    """J10: while another connection holds the slot (55006) the consumer waits for it, and harms nobody."""
    database.execute("CREATE TABLE t (id int PRIMARY KEY)")
    mirror_once(lake, database.dsn)
    database.execute("INSERT INTO t VALUES (1)")
    options = ("-o", "proto_version=1", "-o", "publication_names=cdc")
    other = database.server.popen(
        *(
            "pg_recvlogical",
            "--dbname",
            database.name,
            "--slot",
            "cdc",
            "--start",
            "--file",
            "/dev/null",
            "--no-loop",
            *options,
        ),
        dbname=database.name,
        stderr=subprocess.DEVNULL,
    )
    try:
        active = "SELECT active FROM pg_replication_slots WHERE slot_name = 'cdc'"
        until(lambda: database.execute(active) == [(True,)])
        with Consumer(lake, database.dsn, flush_interval="100ms") as consumer:
            until(lambda: "waiting for the replication slot" in consumer.output, what=consumer.output)
            assert other.poll() is None, "the one that had the slot was thrown out"
            assert consumer.running
            # Killed, so that it confirms nothing of what it has received.
            other.kill()
            until(lambda: has(lake, 1), what=consumer.output)
            assert consumer.stop() == 0
    finally:
        other.kill()
        other.wait()


def test_tls(tmp_path: Path, lake: Lake) -> None:
    """J18: libpq's own settings for TLS and SCRAM apply to every connection, the stream's and the copies' too."""
    binaries, openssl = installations().get(15), shutil.which("openssl")
    if binaries is None or openssl is None:
        pytest.skip("needs a server built with TLS (PostgreSQL 15) and openssl for a certificate")
    key, certificate = tmp_path / "server.key", tmp_path / "server.crt"
    subprocess.run(
        [
            *(openssl, "req", "-new", "-x509", "-nodes", "-days", "2", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    with EmbeddedServer(binaries, password="secret of the test") as server:
        owner = server.data.stat()
        for file in (key, certificate):
            there = server.data / file.name
            shutil.copy(file, there)
            there.chmod(0o600)
            shutil.chown(there, owner.st_uid, owner.st_gid)
        server.restart(ssl="on")
        server.psql("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t SELECT generate_series(1, 1000)")
        dsn = server.dsn(password="secret of the test")
        verified = f"{dsn}?sslmode=verify-full&sslrootcert={certificate}"
        done = run_cdc(lake, verified, "run", "--once")
        assert done.returncode == 0, done.stderr
        assert warehouse_rows(lake, "SELECT count(*) FROM public.t") == [(1000,)]
        with Consumer(lake, verified) as consumer:
            encrypted = "SELECT s.ssl FROM pg_stat_replication JOIN pg_stat_ssl s USING (pid)"
            with psycopg.connect(dsn, autocommit=True) as connection:
                until(lambda: connection.execute(encrypted).fetchall() == [(True,)], what=consumer.output)
            assert consumer.stop() == 0
        refused = run_cdc(lake, f"{dsn}?sslmode=verify-full&sslrootcert=/nonexistent", "run", "--once")
        assert refused.returncode == 1
        assert "hint: " in refused.stderr
        assert "secret" not in refused.stderr
