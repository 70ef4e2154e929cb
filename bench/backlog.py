"""A backlog of inserts, drained by pg_recvlogical to /dev/null and by `cdc run --once` into DuckDB and Parquet.

Both read the same WAL, by turns, each time from a slot of its own that was created before the backlog was written.
`cdc` is timed from the start of its process to its end; its slot, and the copy of the table while it was still empty,
come from an earlier `cdc run --once`. At the end every warehouse and history is compared with the source.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from bench.workload import Consumer, Run, arguments, create_table, describe, fill, measure, report, scalar, start_server
from cdc.embedded import EmbeddedServer

PUBLICATION = "cdc"


def main() -> None:
    """Run the benchmark and print what it found."""
    options = arguments(__doc__.partition("\n")[0]).parse_args()
    with start_server(options.major) as server, tempfile.TemporaryDirectory(prefix="cdc-bench-") as directory:
        print(f"Backlog: {describe(server, options)}", flush=True)
        run(server, options, Path(directory))


def run(server: EmbeddedServer, options: argparse.Namespace, directory: Path) -> None:
    """Prepare the slots, write the backlog, and let both drain it by turns."""
    create_table(server)
    dsn = server.dsn(unix=options.unix)
    consumers = [Consumer(directory / f"round{n}", f"cdc_{n}", dsn) for n in range(options.rounds)]
    if options.peer_only:
        consumers = []
        server.psql(f"CREATE PUBLICATION {PUBLICATION} FOR TABLE public.events")
    for consumer in consumers:
        consumer.run_once()
    slots = [f"recvlogical_{n}" for n in range(options.rounds)]
    for slot in [*slots, "look"]:
        server.psql(f"SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput')")
    fill(server, options.rows)
    end = str(scalar(dsn, "SELECT pg_current_wal_insert_lsn()"))
    print(f"{message_bytes(dsn) / 1e6:.0f} MB of messages", flush=True)

    received: list[Run] = []
    mirrored: list[Run] = []
    for n, slot in enumerate(slots):
        received.append(receive(server, slot, end, directory, unix=options.unix))
        if consumers:
            mirrored.append(consumers[n].run_once())
    report(options.rows, {"pg_recvlogical": received, "cdc run --once": mirrored})
    for consumer in consumers:
        consumer.verify(options.rows, "I")


def receive(server: EmbeddedServer, slot: str, end: str, directory: Path, *, unix: bool) -> Run:
    """Time pg_recvlogical from the slot's position to `end`."""
    command = (
        *(server.bin / "pg_recvlogical", "--dbname", "postgres", "--slot", slot),
        *("--start", "--endpos", end, "--file", "/dev/null"),
        *("-o", "proto_version=1", "-o", f"publication_names={PUBLICATION}"),
    )
    return measure(command, server.environment(unix=unix), directory)


def message_bytes(dsn: str) -> int:
    """Return the size of all the backlog's messages, and leave the slot `look` dropped."""
    size = scalar(
        dsn,
        "SELECT sum(length(data)) FROM pg_logical_slot_peek_binary_changes("
        f"'look', NULL, NULL, 'proto_version', '1', 'publication_names', '{PUBLICATION}')",
    )
    scalar(dsn, "SELECT pg_drop_replication_slot('look')")
    return int(size)


if __name__ == "__main__":
    main()
