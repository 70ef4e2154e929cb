r"""The first copy of a table: by psql's \copy to /dev/null, and by `cdc run --once` into DuckDB and Parquet.

psql has one connection. By turns; `cdc` has a fresh slot, warehouse and history each time, and is timed from the start
of its process to its end. At the end every warehouse and history is compared with the source.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from bench.workload import TABLE, Consumer, Run, arguments, create_table, describe, fill, measure, report, start_server
from cdc.embedded import EmbeddedServer


def main() -> None:
    """Run the benchmark and print what it found."""
    options = arguments(__doc__.partition("\n")[0]).parse_args()
    with start_server(options.major) as server, tempfile.TemporaryDirectory(prefix="cdc-bench-") as directory:
        print(f"Snapshot: {describe(server, options)}", flush=True)
        run(server, options, Path(directory))


def run(server: EmbeddedServer, options: argparse.Namespace, directory: Path) -> None:
    """Fill the table, and let both copy it by turns."""
    create_table(server)
    fill(server, options.rows)
    dsn = server.dsn(unix=options.unix)
    consumers: list[Consumer] = []
    copied: list[Run] = []
    mirrored: list[Run] = []
    psql = (server.bin / "psql", "-X", "-q", "-c", f"\\copy {TABLE} to /dev/null")
    for n in range(options.rounds):
        copied.append(measure(psql, server.environment(unix=options.unix), directory))
        if not options.peer_only:
            consumer = Consumer(directory / f"round{n}", f"cdc_{n}", dsn)
            mirrored.append(consumer.run_once())
            consumers.append(consumer)
            server.psql(f"SELECT pg_drop_replication_slot('{consumer.slot}')")
    report(options.rows, {"psql \\copy": copied, "cdc run --once": mirrored})
    for consumer in consumers:
        consumer.verify(options.rows, "S")


if __name__ == "__main__":
    main()
