"""The change log: Parquet files that hold every change of every table, in the order of (LSN, seq).

A file is written under a temporary name that no ``*.parquet`` matches, and fsynced; the batch's DuckDB transaction
names it in ``_cdc.files``; after that commit it gets its own name. So a glob never sees an uncommitted row. A crash
leaves at most temporary files: `recover` gives those that the manifest names their name, and removes the others.

This module owns the files of the history. It is idempotent: what is written again under the same name is the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote as percent

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cdc.errors import SinkError
from cdc.failpoints import reach
from cdc.sink.warehouse import no_space

__all__ = ["META", "History", "HistoryFile", "as_log"]

META = ("_op", "_lsn", "_seq", "_xid", "_commit_ts")
"""The change log's own columns; the table's columns follow."""

TEMPORARY = ".tmp"


@dataclasses.dataclass(frozen=True, slots=True)
class HistoryFile:
    """One file of the change log, as the manifest names it.

    Attributes:
        path: relative to the history's folder.
    """

    path: str
    schema: str
    table: str
    rows: int
    first_lsn: int
    last_lsn: int


def as_log(
    op: npt.NDArray[np.uint8],
    lsn: npt.NDArray[np.uint64],
    seq: npt.NDArray[np.int64],
    xid: npt.NDArray[np.uint32],
    commit_ts: npt.NDArray[np.int64],
    names: Sequence[str],
    columns: Sequence[pa.Array],
) -> pa.Table:
    """Return changes as a table of the change log: META's columns, then the table's.

    Args:
        op: ASCII codes of I, U, D, T or S, shape (n,); all other arrays have that length too.
        commit_ts: microseconds since 1970 UTC.
    """
    letters = pa.array([chr(code) for code in range(ord("Z") + 1)], pa.string())
    ops = letters.take(pa.array(op))
    meta = [ops, pa.array(lsn), pa.array(seq), pa.array(xid), pa.array(commit_ts).cast(pa.timestamp("us", "UTC"))]
    return pa.table([*meta, *columns], names=[*META, *names])


class History:
    """The writer of the change log in `root`; None: there is no history, and nothing is written."""

    def __init__(self, root: Path | None) -> None:
        self.root = root
        self._pending: list[HistoryFile] = []
        self._writes: list[Future[None]] = []
        # One thread of its own, so that Parquet is compressed while DuckDB works: both let go of the GIL.
        self._writer = ThreadPoolExecutor(1, "history")

    def recover(self, known: Callable[[Sequence[str]], set[str]]) -> None:
        """After a start: finish the renames that the manifest names, remove other temporary files.

        Args:
            known: returns those of some paths that the manifest names.

        Raises:
            SinkError: the folder cannot be written.
        """
        if self.root is None:
            return
        with _explained(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            probe = self.root / ".writable"
            probe.touch()
            probe.unlink()
            left = {t: t.with_name(t.name.removesuffix(TEMPORARY)) for t in self.root.rglob("*.parquet" + TEMPORARY)}
            named = known([str(final.relative_to(self.root)) for final in left.values()])
            for temporary, final in left.items():
                if str(final.relative_to(self.root)) in named:
                    temporary.replace(final)
                    _fsync_folder(final.parent)
                else:
                    temporary.unlink()

    def write(self, schema: str, table: str, log: pa.Table) -> None:
        """Write `log` (see `as_log`, at least one row) to a temporary file, in the background; `settle` waits."""
        if self.root is not None and log.num_rows:
            file = self.describe(schema, table, log)
            self._pending.append(file)
            self._writes.append(self._writer.submit(self.write_temporary, file, log))

    def describe(self, schema: str, table: str, log: pa.Table) -> HistoryFile:
        """Return the file that `log` is to be kept in."""
        first_lsn, first_seq = log["_lsn"][0].as_py(), log["_seq"][0].as_py()
        bounds = pc.min_max(log["_lsn"]).as_py()
        seq = f"s{-first_seq:015x}" if first_seq < 0 else f"{first_seq:016x}"
        path = f"{_folder(schema)}/{_folder(table)}/{first_lsn:016x}-{seq}.parquet"
        return HistoryFile(path, schema, table, log.num_rows, bounds["min"], bounds["max"])

    def write_temporary(self, file: HistoryFile, log: pa.Table) -> None:
        """Write `log` under `file`'s temporary name and make it durable.

        Raises:
            SinkError: it cannot be written.
        """
        assert self.root is not None
        reach("before_parquet_tmp")
        target = self._temporary(file)
        with _explained(self.root):
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as out:
                # Dictionaries for our own columns alone: tried on all, they cost time, and zstd is the smaller for it.
                pq.write_table(log, out, compression="zstd", compression_level=1, use_dictionary=list(META))
                out.flush()
                os.fsync(out.fileno())
        reach("after_parquet_tmp")

    def _temporary(self, file: HistoryFile) -> Path:
        assert self.root is not None
        return self.root / (file.path + TEMPORARY)

    def add(self, files: Sequence[HistoryFile]) -> None:
        """Let files that `write_temporary` has written take part in the open transaction."""
        self._pending += files

    def settle(self) -> list[HistoryFile]:
        """Wait for the writes of the open transaction and return its files, for the manifest.

        Raises:
            SinkError: one of them cannot be written.
        """
        writes, self._writes = self._writes, []
        for write in writes:
            write.result()
        return list(self._pending)

    def publish(self) -> None:
        """After the commit: give the files their names."""
        files, self._pending = self._pending, []
        if not files or self.root is None:
            return
        reach("before_rename")
        with _explained(self.root):
            for file in files:
                self._temporary(file).replace(self.root / file.path)
            for folder in {(self.root / file.path).parent for file in files}:
                _fsync_folder(folder)
        reach("after_rename")

    def discard(self) -> None:
        """After a rollback: remove what was written for it."""
        with contextlib.suppress(Exception):
            self.settle()
        files, self._pending = self._pending, []
        self.remove_temporary(files)

    def leave(self) -> None:
        """After a commit that may have happened: keep what was written for it; `recover` knows."""
        self._pending = []

    def remove_temporary(self, files: Sequence[HistoryFile]) -> None:
        """Remove files that `write_temporary` has written and that take part in no transaction."""
        for file in files:
            self._temporary(file).unlink(missing_ok=True)

    def close(self) -> None:
        """Stop the writing thread."""
        self._writer.shutdown()


def _folder(name: str) -> str:
    """Return `name` as one folder's name; '.', '/' and what a glob would read otherwise are escaped."""
    return percent(name, safe="").replace(".", "%2E")


def _fsync_folder(folder: Path) -> None:
    """Make renames in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _explained(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = "it is no folder" if isinstance(error, FileExistsError) else error.strerror or str(error)
        if no_space(reason):
            hint = "free some space on the disk; nothing was confirmed to Postgres, and the consumer goes on from there"
        else:
            hint = "give this user the right to write there, or set CDC_HISTORY; nothing was confirmed to Postgres"
        raise SinkError(f"history {root} cannot be written: {reason}", hint) from None
