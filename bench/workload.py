"""What the benchmarks share: a table with ten columns, rows for it, runs that are timed, and what they print."""

from __future__ import annotations

import argparse
import dataclasses
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb
import psycopg

from cdc.embedded import EmbeddedServer
from cdc.installation import installations

__all__ = [
    "Consumer",
    "Run",
    "arguments",
    "create_table",
    "describe",
    "fill",
    "measure",
    "report",
    "scalar",
    "start_server",
]

TABLE = "public.events"
ROWS_PER_TRANSACTION = 1000
RUN_TIMEOUT_S = 900.0
# ru_maxrss is in kibibytes on Linux, in bytes on macOS
MAXRSS_PER_MB = 1024**2 if sys.platform == "darwin" else 1024

# About 209 MB of pgoutput messages per million rows.
_COLUMNS = """
    id bigint PRIMARY KEY,
    customer int NOT NULL,
    name text NOT NULL,
    note text,
    amount numeric(12,2) NOT NULL,
    quantity int NOT NULL,
    paid boolean NOT NULL,
    created_at timestamptz NOT NULL,
    updated_at timestamptz NOT NULL,
    state text NOT NULL
"""
_SELECT = """
    SELECT i, i * 7919 % 100000, 'customer number ' || i % 100000, 'some note on ' || md5(i::text),
           (i * 137 % 10000000)::numeric / 100, i % 50, i % 3 = 0,
           timestamptz '2026-01-01 00:00:00.123456+00' + i * interval '1 second',
           timestamptz '2026-02-01 00:00:00.654321+00' + i * interval '1 second',
           (ARRAY['new', 'open', 'shipped', 'delivered'])[i % 4 + 1]
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """One timed run of a program.

    Attributes:
        wall_s: from its start to its end.
        cpu_s: user and system time of it and its children.
        peak_rss_mb: the most memory it had at once, in MiB.
    """

    wall_s: float
    cpu_s: float
    peak_rss_mb: float


@dataclasses.dataclass(frozen=True, slots=True)
class Consumer:
    """One consumer: a directory, a slot and the publication.

    Attributes:
        directory: holds its warehouse and history, and is its working directory.
        slot: name of its slot.
        dsn: the source.
    """

    directory: Path
    slot: str
    dsn: str

    def run_once(self) -> Run:
        """Time `cdc run --once`, the start of the process included."""
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("CDC_", "PG", "POSTGRES_"))},
            "CDC_DSN": self.dsn,
            "CDC_WAREHOUSE": str(self.directory / "warehouse.duckdb"),
            "CDC_HISTORY": str(self.directory / "history"),
            "CDC_SLOT": self.slot,
            "CDC_PUBLICATION": "cdc",
        }
        self.directory.mkdir(exist_ok=True)
        command = [sys.executable, "-c", "import sys; from cdc.cli import main; sys.exit(main())", "run", "--once"]
        return measure(command, environment, self.directory)

    def verify(self, changes: int, op: str) -> None:
        """Compare warehouse and history with the source.

        Args:
            changes: how many changes the history has to hold.
            op: the value of `_op` that they have.

        Raises:
            SystemExit: they differ.
        """
        sums = "count(*), sum(id), sum(amount), sum(length(note)), max(updated_at)::text"
        with psycopg.connect(self.dsn, autocommit=True, options="-c timezone=UTC") as source:
            expected = source.execute(f"SELECT {sums} FROM {TABLE}".encode()).fetchone()
        with duckdb.connect(str(self.directory / "warehouse.duckdb"), read_only=True) as warehouse:
            warehouse.execute("SET TimeZone = 'UTC'")
            found = warehouse.execute(f"SELECT {sums} FROM {TABLE}").fetchone()
            files = str(self.directory / "history" / "public" / "events" / "*.parquet")
            logged = warehouse.execute(
                "SELECT count(*) FROM read_parquet(?, union_by_name = true) WHERE _op = ?",
                [files, op],
            ).fetchone()
        if found != expected:
            raise SystemExit(f"FAILED: the warehouse of {self.slot} has {found}, the source {expected}")
        if logged != (changes,):
            raise SystemExit(f"FAILED: the history of {self.slot} has {logged} rows, expected {changes}")


def arguments(description: str) -> argparse.ArgumentParser:
    """Return the parser of what every benchmark against a server accepts."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the table (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, by turns (%(default)s)")
    parser.add_argument("--major", type=int, help=f"PostgreSQL version, of {sorted(installations())} (the newest)")
    parser.add_argument("--unix", action="store_true", help="a Unix socket instead of TCP on loopback")
    parser.add_argument("--peer-only", action="store_true", help="leave cdc out")
    return parser


def start_server(major: int | None) -> EmbeddedServer:
    """Start a server that keeps all of the benchmark's WAL and does nothing on its own while it is timed."""
    binaries = installations().get(major) if major is not None else None
    if major is not None and binaries is None:
        raise SystemExit(f"PostgreSQL {major} was not found, only {sorted(installations())}")
    server = EmbeddedServer(
        binaries, shared_buffers="256MB", max_wal_size="16GB", checkpoint_timeout="1h", autovacuum="off"
    )
    server.start()
    return server


def create_table(server: EmbeddedServer) -> None:
    """Create the empty table."""
    server.psql(f"CREATE TABLE {TABLE} ({_COLUMNS})")


def fill(server: EmbeddedServer, rows: int) -> None:
    """Insert `rows` rows in transactions of 1000, then write everything out so that the server is quiet."""
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute(
            f"""DO $$
            BEGIN
                FOR part IN 0 .. {(rows - 1) // ROWS_PER_TRANSACTION} LOOP
                    INSERT INTO {TABLE} {_SELECT} FROM generate_series(
                        part::bigint * {ROWS_PER_TRANSACTION} + 1,
                        least((part::bigint + 1) * {ROWS_PER_TRANSACTION}, {rows})
                    ) AS i;
                    COMMIT;
                END LOOP;
            END $$""".encode()
        )
        # the hint bits are set now, not by whoever reads the table first
        connection.execute(f"VACUUM ANALYZE {TABLE}".encode())
        connection.execute("CHECKPOINT")


def measure(command: Sequence[str | Path], environment: Mapping[str, str], directory: Path) -> Run:
    """Run `command` to its end and time it; its output is kept and shown only when it fails.

    Raises:
        SystemExit: it failed, or took longer than the limit.
    """
    with tempfile.TemporaryFile() as output:
        begin = time.perf_counter()
        process = subprocess.Popen(
            command, env=environment, cwd=directory, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
        limit = threading.Timer(RUN_TIMEOUT_S, process.kill)
        limit.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            limit.cancel()
        wall_s = time.perf_counter() - begin
        # wait4 has taken the child's status, so Popen cannot
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            shown = output.read()[-4000:].decode(errors="replace")
            raise SystemExit(f"FAILED with status {process.returncode}: {' '.join(map(str, command))}\n{shown}")
    return Run(wall_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / MAXRSS_PER_MB)


def describe(server: EmbeddedServer, options: argparse.Namespace) -> str:
    """Return what every figure has to name: version, transport, rows, cores."""
    transport = "a Unix socket" if options.unix else "TCP on loopback"
    return f"PostgreSQL {server.version} over {transport}, {options.rows:,} rows, {os.cpu_count()} cores"


def report(rows: int, runs: Mapping[str, Sequence[Run]]) -> None:
    """Print each program's runs and median, and the ratio of the first one's median to every other's."""
    medians = {name: statistics.median(run.wall_s for run in timed) for name, timed in runs.items() if timed}
    width = max(map(len, runs))
    own_rss_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MAXRSS_PER_MB
    for name, median_s in medians.items():
        timed = runs[name]
        walls = " ".join(f"{run.wall_s:6.2f}" for run in timed)
        cpu_s = statistics.median(run.cpu_s for run in timed)
        peak_rss_mb = max(run.peak_rss_mb for run in timed)
        # a child is counted with what its parent had when it was forked: only what lies above that is its own
        memory = f", peak RSS {peak_rss_mb:.0f} MB" if peak_rss_mb > 2 * own_rss_mb else ""
        print(
            f"{name:{width}}  {walls} s   median {median_s:.2f} s, {rows / median_s:,.0f} rows/s, "
            f"CPU {cpu_s:.2f} s{memory}"
        )
    peer, *others = medians
    for name in others:
        print(f"ratio time({peer}) / time({name}): {medians[peer] / medians[name]:.2f}")


def scalar(dsn: str, statement: str) -> Any:
    """Return the one value that `statement` yields."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        row = connection.execute(statement.encode()).fetchone()
    return row[0] if row else None
