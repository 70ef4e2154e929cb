"""The demo: an embedded Postgres, pgbench's traffic, and a consumer that mirrors it live.

Everything lies below one folder; nothing is left running.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cdc.embedded import EmbeddedServer
from cdc.errors import CdcError
from cdc.installation import installations

__all__ = ["BALANCES", "EmbeddedServer", "installations", "run_demo"]

BALANCES = """
SELECT (SELECT sum(abalance) FROM public.pgbench_accounts) AS accounts,
       (SELECT sum(bbalance) FROM public.pgbench_branches) AS branches,
       (SELECT sum(tbalance) FROM public.pgbench_tellers) AS tellers,
       (SELECT sum(delta) FROM public.pgbench_history) AS history
"""
"""TPC-B's invariant: four sums that are equal after every transaction."""

COPY_TIMEOUT_S = 120.0


def run_demo(lake: Path, seconds: int, scale: int, say: Callable[[str], None]) -> None:
    """Mirror pgbench's traffic for a while into `lake`, then show where things stand.

    Args:
        lake: folder for the warehouse and the history; it must not hold any yet.
        seconds: how long the traffic lasts.
        scale: pgbench's: 100,000 accounts each.
        say: prints one line.

    Raises:
        CdcError: something of it failed.
    """
    if (lake / "warehouse.duckdb").exists():
        raise CdcError(f"{lake} holds a warehouse already", "choose another folder with --lake, or delete this one")
    with EmbeddedServer() as server:
        say(f"PostgreSQL {server.version} is running at {server.dsn()}")
        server.run("pgbench", "--initialize", "--quiet", f"--scale={scale}")
        say(f"pgbench has filled its tables: {scale * 100_000:,} accounts")
        environment = _environment(server, lake)
        with _consumer(environment) as consumer:
            _await_copies(environment, consumer)
            say(f"every table is copied; {seconds} s of pgbench's transactions follow")
            traffic = server.run("pgbench", "--client=4", f"--time={seconds}", "--no-vacuum")
            say(next((line for line in traffic.stdout.splitlines() if line.startswith("tps")), ""))
        _cdc(environment, "run", "--once")
        _cdc(environment, "status")
        say("the sums that every transaction keeps equal, as DuckDB has them:")
        _cdc(environment, "query", BALANCES)
        _cdc(environment, "teardown")
    say(f"the warehouse is {lake / 'warehouse.duckdb'}, the change log is in {lake / 'history'}; ask it something:")
    say(f"  cdc query --warehouse {lake / 'warehouse.duckdb'} 'SELECT count(*) FROM public.pgbench_history'")


def _environment(server: EmbeddedServer, lake: Path) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("CDC_", "PG", "POSTGRES_"))}
    return own | {
        "CDC_DSN": server.dsn(),
        "CDC_WAREHOUSE": str(lake / "warehouse.duckdb"),
        "CDC_HISTORY": str(lake / "history"),
    }


_PROGRAM = (sys.executable, "-c", "from cdc.cli import main; main()")


def _cdc(environment: dict[str, str], *arguments: str) -> None:
    sys.stdout.flush()
    if subprocess.run([*_PROGRAM, *arguments], env=environment, check=False).returncode:
        raise CdcError(f"cdc {arguments[0]} failed", "its own message stands above")


@contextlib.contextmanager
def _consumer(environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A consumer in a process of its own, ended by SIGTERM."""
    process = subprocess.Popen([*_PROGRAM, "run"], env=environment)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=20)


def _await_copies(environment: dict[str, str], consumer: subprocess.Popen[bytes]) -> None:
    """Return when every table streams."""
    deadline = time.monotonic() + COPY_TIMEOUT_S
    question = "SELECT count(*) FILTER (state = 'streaming') FROM _cdc.tables"
    while time.monotonic() < deadline:
        if consumer.poll() is not None:
            raise CdcError("the consumer has ended", "its own message stands above")
        answer = subprocess.run(
            [*_PROGRAM, "query", "--format", "csv", question],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if answer.returncode == 0 and answer.stdout.split()[-1] == "4":
            return
        time.sleep(0.5)
    raise CdcError("the tables were not copied in time", "the consumer's own messages stand above")
