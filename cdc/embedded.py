"""A Postgres of our own: for the demo, the tests and the benchmarks.

Owns one data directory, the server process that runs on it, and a watchdog that ends the server when this process dies
without a word (SIGKILL, `os._exit`). Unless a data directory is given, everything lies in one temporary directory and
goes when the server is closed.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import quote

from cdc.errors import SourceError
from cdc.installation import copy_programs, everyone_may_enter, major_version, newest, unprivileged_user

__all__ = ["EmbeddedServer"]

Mode = Literal["smart", "fast", "immediate"]

_SIGNALS: Mapping[Mode, signal.Signals] = {
    "smart": signal.SIGTERM,
    "fast": signal.SIGINT,
    "immediate": signal.SIGQUIT,
}
# below the range from which systems draw the ports of outgoing connections: a restart finds its port still free
_PORTS = range(20000, 32000)
_START_TIMEOUT_S = 60.0
_START_ATTEMPTS = 5
_SETTINGS: Mapping[str, object] = {
    "wal_level": "logical",
    "max_wal_senders": 20,
    "max_replication_slots": 20,
    "max_prepared_transactions": 10,
    # it is thrown away with its machine's state; a benchmark of commits asks for fsync=on
    "fsync": "off",
    "max_wal_size": "4GB",
    "log_line_prefix": "%m [%p] %d ",
}
# Reads until the parent closes the pipe; "done" before that means that nothing is left to do. The process is only ended
# when it really runs in our data directory: the number in a stale file may be somebody else's by now.
_WATCHDOG = """
read -r line && exit 0
pid=$(head -n 1 "$1/postmaster.pid" 2>/dev/null)
if [ -n "$pid" ] && { [ ! -e /proc/self/cwd ] || [ "$(readlink "/proc/$pid/cwd")" = "$1" ]; }; then
    kill -QUIT "$pid"
    for _ in 1 2 3 4 5 6 7 8 9 10; do kill -0 "$pid" 2>/dev/null || break; sleep 1; done
fi
rm -rf "$2"
"""


class EmbeddedServer:
    """One Postgres server on 127.0.0.1 and in a Unix socket directory, started and stopped at will.

    A context manager: starts on entry, and on exit stops and removes what is temporary. So does the end of the process,
    however it ends. Not for use from several threads at once.

    Attributes:
        bin: directory of the client and server programs.
        version: major version.
        data: the data directory.
        log: the file that holds the server's log.
        socket_directory: where its Unix socket is.
        port: the TCP port; the same over restarts.
        settings: postgresql.conf settings, written at every start; ALTER SYSTEM takes precedence over them.
    """

    def __init__(
        self,
        binaries: Path | None = None,
        *,
        data: Path | None = None,
        port: int | None = None,
        password: str | None = None,
        **settings: object,
    ) -> None:
        """Prepare a server; nothing is started or written outside a new temporary directory.

        Args:
            binaries: `bin` directory of an installation; the newest one found by default.
            data: data directory to create or to go on with, and to keep; a temporary one by default.
            port: TCP port; a free one by default.
            password: makes every connection give a password (scram-sha-256), and this one is the superuser's;
                without it everybody on this machine is trusted.
            settings: postgresql.conf settings, over the defaults for a throw-away server.

        Raises:
            SourceError: no installation was found.
        """
        self.bin = binaries if binaries is not None else newest()
        self.version = major_version(self.bin)
        self.settings: dict[str, object] = {**_SETTINGS, **settings}
        self._user = unprivileged_user()
        self._base = _temporary_directory(self._user)
        self._password = password
        self._given_port = port
        self._server: subprocess.Popen[bytes] | None = None
        self.data = data.absolute() if data is not None else self._base / "data"
        self.log = self._base / "server.log"
        self.socket_directory = self._base
        self.port = port if port is not None else _free_port()
        self._programs = self._reachable_programs()
        self._watchdog = self._start_watchdog()
        atexit.register(self.close)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "running" if self.running else "stopped"
        return f"<PostgreSQL {self.version} on port {self.port}, {state}>"

    # Lifecycle

    @property
    def running(self) -> bool:
        """Whether the server process lives."""
        return self._server is not None and self._server.poll() is None

    def start(self) -> None:
        """Create the data directory if need be, start the server and wait until it accepts connections.

        Does nothing when it runs already.

        Raises:
            SourceError: it does not start; the message has the end of its log.
        """
        if self.running:
            return
        if not (self.data / "PG_VERSION").exists():
            self._initialise()
        for attempt in range(1, _START_ATTEMPTS + 1):
            self._write_settings()
            output = self._start_once()
            if output is None:
                return
            # somebody took the port between our look and the server's: only a port of our choice may change
            if self._given_port is not None or "could not bind" not in output or attempt == _START_ATTEMPTS:
                raise SourceError(f"PostgreSQL {self.version} did not start: {output}", f"its log: {self.log}")
            self.port = _free_port()

    def stop(self, mode: Mode = "fast", timeout_s: float = 60.0) -> None:
        """Stop the server as `pg_ctl stop` does; does nothing when it does not run.

        Raises:
            TimeoutError: it still runs after `timeout_s` seconds.
        """
        server = self._server
        if server is None:
            return
        if server.poll() is None:
            server.send_signal(_SIGNALS[mode])
            try:
                server.wait(timeout_s)
            except subprocess.TimeoutExpired:
                raise TimeoutError(f"{self!r} did not stop within {timeout_s} s ({mode})") from None
        self._server = None

    def kill(self) -> None:
        """Stop the server as if it had crashed: no checkpoint, connections cut; the next start recovers."""
        self.stop("immediate", timeout_s=30)

    def restart(self, mode: Mode = "fast", **settings: object) -> None:
        """Stop and start again on the same port, with `settings` changed."""
        self.stop(mode)
        self.settings.update(settings)
        self.start()

    def reload(self, **settings: object) -> None:
        """Change `settings` that need no restart; the server reads them a moment later."""
        self.settings.update(settings)
        self._write_settings()
        if self._server is not None:
            self._server.send_signal(signal.SIGHUP)

    def close(self) -> None:
        """Stop the server whatever it takes, and remove what is temporary. May be called again."""
        atexit.unregister(self.close)
        if not self.data.is_relative_to(self._base):
            # data that stay are worth a checkpoint, but an open consumer may hold up a fast stop for ever
            with contextlib.suppress(TimeoutError):
                self.stop("fast", timeout_s=10)
        with contextlib.suppress(TimeoutError):
            self.stop("immediate", timeout_s=10)
        if self._server is not None:
            self._server.kill()
            self._server.wait()
            self._server = None
        shutil.rmtree(self._base, ignore_errors=True)
        if self._watchdog.returncode is None:
            self._watchdog.communicate(b"done\n")

    # Use

    def dsn(
        self, dbname: str = "postgres", user: str = "postgres", password: str | None = None, *, unix: bool = False
    ) -> str:
        """Return a connection URL over TCP on loopback, or over the Unix socket.

        The superuser's password is filled in; another user's has to be given.
        """
        if password is None and user == "postgres":
            password = self._password
        login = quote(user, safe="") + (f":{quote(password, safe='')}" if password is not None else "")
        database = quote(dbname, safe="")
        if unix:
            host = quote(str(self.socket_directory), safe="")
            return f"postgresql://{login}@/{database}?host={host}&port={self.port}"
        return f"postgresql://{login}@127.0.0.1:{self.port}/{database}"

    def environment(self, dbname: str = "postgres", user: str = "postgres", *, unix: bool = False) -> dict[str, str]:
        """Return this process's environment with libpq's variables set for this server, and no others of libpq's."""
        environment = _clean_environment()
        environment.update(
            PGHOST=str(self.socket_directory) if unix else "127.0.0.1",
            PGPORT=str(self.port),
            PGUSER=user,
            PGDATABASE=dbname,
        )
        if self._password is not None and user == "postgres":
            environment["PGPASSWORD"] = self._password
        return environment

    def run(
        self,
        program: str,
        *arguments: str,
        dbname: str = "postgres",
        user: str = "postgres",
        unix: bool = False,
        timeout_s: float = 300.0,
    ) -> subprocess.CompletedProcess[str]:
        """Run a client program of this installation (`pgbench`, `psql`, `pg_dump`) on this server, to its end.

        Raises:
            subprocess.CalledProcessError: it failed; `stderr` says why.
            subprocess.TimeoutExpired: it took longer than `timeout_s` seconds.
        """
        return subprocess.run(
            [self.bin / program, *arguments],
            env=self.environment(dbname, user, unix=unix),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
            timeout=timeout_s,
        )

    def popen(
        self,
        program: str,
        *arguments: str,
        dbname: str = "postgres",
        user: str = "postgres",
        unix: bool = False,
        **options: Any,
    ) -> subprocess.Popen[Any]:
        """Start a client program of this installation on this server, and leave it to the caller.

        `options` go to `subprocess.Popen`.
        """
        environment = self.environment(dbname, user, unix=unix)
        return subprocess.Popen([self.bin / program, *arguments], env=environment, stdin=subprocess.DEVNULL, **options)

    def psql(self, sql: str, dbname: str = "postgres", user: str = "postgres") -> str:
        """Run `sql`, one statement or several separated by semicolons, in one transaction; return psql's output.

        The output is unaligned, without headings, and stripped at its end.

        Raises:
            subprocess.CalledProcessError: the server refused it; `stderr` says why.
        """
        arguments = ("-X", "-A", "-q", "-t", "-v", "ON_ERROR_STOP=1", "-c", sql)
        return self.run("psql", *arguments, dbname=dbname, user=user).stdout.rstrip()

    # How it is done

    def _initialise(self) -> None:
        """Create the data directory, owned by the server's user."""
        self.data.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._give_away(self.data)
        arguments = ["-D", str(self.data), "-U", "postgres", "-E", "UTF8", "--no-locale", "--no-sync"]
        if self._password is None:
            arguments += ["-A", "trust"]
        else:
            password_file = self._base / "password"
            password_file.touch(0o600)
            password_file.write_text(self._password + "\n")
            self._give_away(password_file)
            arguments += ["-A", "scram-sha-256", "--pwfile", str(password_file)]
        done = subprocess.run(
            [self._programs / "initdb", *arguments],
            cwd=self._base,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            **self._as_user(),
        )
        if done.returncode:
            raise SourceError(f"initdb failed: {done.stderr.strip()}", f"see whether {self.data} is writable")
        with (self.data / "postgresql.conf").open("a") as configuration:
            configuration.write("\ninclude_if_exists = 'embedded.conf'\n")

    def _write_settings(self) -> None:
        settings = {
            **self.settings,
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": self.socket_directory,
        }
        quoted = {name: str(value).replace("'", "''") for name, value in settings.items()}
        path = self.data / "embedded.conf"
        path.write_text("".join(f"{name} = '{value}'\n" for name, value in quoted.items()))
        self._give_away(path)

    def _start_once(self) -> str | None:
        """Start the server; return None when it is ready, and the end of its log when it ended instead."""
        with self.log.open("ab") as log:
            begin = log.tell()
            # A session of its own: Ctrl-C on the terminal is for us, and we end the server in our own order.
            self._server = subprocess.Popen(
                [self._programs / "postgres", "-D", self.data],
                cwd=self._base,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **self._as_user(),
            )
        deadline = time.monotonic() + _START_TIMEOUT_S
        while self._server.poll() is None:
            if self._is_ready():
                return None
            if time.monotonic() > deadline:
                self.kill()
                break
            time.sleep(0.02)
        self._server = None
        with self.log.open("rb") as log:
            log.seek(begin)
            return log.read()[-2000:].decode(errors="replace").strip()

    def _is_ready(self) -> bool:
        """Whether the server says in its PID file that it accepts connections (its eighth line)."""
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        ours = self._server is not None and lines[:1] == [str(self._server.pid)]
        return ours and len(lines) >= 8 and lines[7].strip() == "ready"

    def _as_user(self) -> dict[str, Any]:
        """Return the `subprocess` arguments that make a child the server's user, with a clean environment."""
        arguments: dict[str, Any] = {"env": {**_clean_environment(), "LC_ALL": "C"}}
        if self._user is not None:
            arguments |= {"user": self._user.pw_uid, "group": self._user.pw_gid, "extra_groups": []}
        return arguments

    def _give_away(self, path: Path) -> None:
        if self._user is not None:
            os.chown(path, self._user.pw_uid, self._user.pw_gid)

    def _reachable_programs(self) -> Path:
        """Return `bin`, or the `bin` of a copy where the server's user cannot run what is in there."""
        try:
            subprocess.run(
                [self.bin / "postgres", "--version"],
                cwd=self._base,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                check=True,
                **self._as_user(),
            )
        except (PermissionError, subprocess.CalledProcessError):
            return copy_programs(self.bin, self._base)
        return self.bin

    def _start_watchdog(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            ["/bin/sh", "-c", _WATCHDOG, "watchdog", self.data, self._base],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )


def _clean_environment() -> dict[str, str]:
    """Return this process's environment without libpq's variables: they name some other server."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PG")}


def _temporary_directory(user: pwd.struct_passwd | None) -> Path:
    """Return a new directory of `user`, one that it can reach; its path is short, for a socket's has a limit."""
    parent = tempfile.gettempdir()
    if user is not None and not everyone_may_enter(Path(parent)):
        parent = "/tmp"  # noqa: S108 # mkdtemp makes a directory of its own in it
    directory = Path(tempfile.mkdtemp(prefix="cdc-pg-", dir=parent)).resolve()
    if user is not None:
        os.chown(directory, user.pw_uid, user.pw_gid)
    return directory


def _free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nobody listens on just now.

    Raises:
        SourceError: none was found.
    """
    for port in random.sample(_PORTS, 200):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port
    raise SourceError("no free TCP port was found on 127.0.0.1", "")
