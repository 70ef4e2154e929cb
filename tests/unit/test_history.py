"""The files of the change log: temporary until they are committed, whole when a glob sees them, in their folders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from cdc.errors import SinkError
from cdc.sink.history import META, History, HistoryFile, as_log


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    """A history in a folder that does not exist yet."""
    made = History(tmp_path / "deep" / "history")
    yield made
    made.close()


def log_of(lsn: int, seq: int, *values: str, op: str = "I") -> pa.Table:
    n = len(values)
    return as_log(
        np.full(n, ord(op), np.uint8),
        np.full(n, lsn, np.uint64),
        np.arange(seq, seq + n),
        np.full(n, 700, np.uint32),
        np.full(n, 1_709_210_096_789_000),
        ["v"],
        [pa.array(values)],
    )


def seen(history: History, pattern: str = "*/*/*.parquet") -> list[str]:
    assert history.root is not None
    return sorted(str(path.relative_to(history.root)) for path in history.root.glob(pattern))


def test_the_columns_of_the_log() -> None:
    """Design, The history: names, types and order."""
    log = log_of(2**63 + 5, -3, "a", "b", op="S")
    assert log.column_names == [*META, "v"]
    types = [pa.string(), pa.uint64(), pa.int64(), pa.uint32(), pa.timestamp("us", "UTC"), pa.string()]
    assert log.schema.types == types
    assert log.drop_columns("_commit_ts").to_pylist() == [
        {"_op": "S", "_lsn": 2**63 + 5, "_seq": -3, "_xid": 700, "v": "a"},
        {"_op": "S", "_lsn": 2**63 + 5, "_seq": -2, "_xid": 700, "v": "b"},
    ]
    assert log["_commit_ts"].cast(pa.string()).to_pylist() == ["2024-02-29 12:34:56.789000Z"] * 2


def test_a_glob_sees_what_is_published(history: History) -> None:
    """Design, The history: until the commit a file has a name that no glob for Parquet matches."""
    history.write("public", "t", log_of(10, 1, "a"))
    history.write("public", "t", log_of(10, 2, "b"))
    history.write("public", "t", log_of(11, 1).slice(0, 0))  # no rows, no file
    files = history.settle()
    assert [(file.rows, file.first_lsn, file.last_lsn) for file in files] == [(1, 10, 10), (1, 10, 10)]
    assert seen(history) == []
    assert len(seen(history, "*/*/*")) == 2
    history.publish()
    assert seen(history) == [file.path for file in files] == seen(history, "*/*/*")
    assert files[0].path == "public/t/000000000000000a-0000000000000001.parquet"
    rows = duckdb.connect().execute(
        f"SELECT _lsn, _seq, v FROM read_parquet('{history.root}/public/t/*.parquet') ORDER BY 1, 2"
    )
    assert rows.fetchall() == [(10, 1, "a"), (10, 2, "b")]
    assert history.settle() == []  # nothing is left for the next transaction


def test_the_order_of_names(history: History) -> None:
    """Design, The history: fixed-width names; a copy's, whose seq is negative, stand apart from every other."""
    copy = history.describe("public", "t", log_of(10, -(1 << 59), "a")).path
    rows = history.describe("public", "t", log_of(10, -(1 << 59) + 1, "a")).path
    large = history.describe("public", "t", log_of(2**64 - 1, 2**62, "a")).path
    assert copy == "public/t/000000000000000a-s800000000000000.parquet"
    assert rows == "public/t/000000000000000a-s7ffffffffffffff.parquet"
    assert large == "public/t/ffffffffffffffff-4000000000000000.parquet"
    assert len({len(path) for path in (copy, rows, large)}) == 1


@pytest.mark.parametrize(
    "name",
    [
        "..",
        ".",
        "a/b",
        "/etc",
        "a*?[b]",
        "x.tmp",
        "x.parquet",
        "%2E",
        " ",
        "a\nb",
        "😀" * 15,
        "\\",
        "~",
        "A",
        "é" * 31,
        "'\"",
    ],
)
def test_no_name_leaves_its_folder(history: History, name: str) -> None:
    """B1: whatever a schema or table is called, its files lie two folders below the root, and in no other's."""
    history.write(name, name, log_of(1, 1, "a"))
    history.write("plain", name, log_of(1, 1, "b"))
    files = history.settle()
    history.publish()
    assert history.root is not None
    for file in files:
        path = history.root / file.path
        assert path.is_file()
        assert path.resolve().parents[2] == history.root.resolve()
        assert (file.schema, file.table) in {(name, name), ("plain", name)}
    assert len(seen(history)) == 2


def test_names_do_not_meet(history: History) -> None:
    """B1: different names have different folders, also when one is the escape of the other."""
    names = ["a.b", "a%2Eb", "a%252Eb", "a b", "a+b", "a%20b", "A.b"]
    assert len({history.describe(name, "t", log_of(1, 1, "a")).path for name in names}) == len(names)


def test_a_rollback_leaves_nothing(history: History) -> None:
    history.write("public", "t", log_of(10, 1, "a"))
    history.discard()
    assert seen(history, "*/*/*") == []
    history.publish()
    assert history.settle() == []
    history.write("public", "t", log_of(10, 1, "b"))  # the same again, after the rollback
    history.settle()
    history.publish()
    assert len(seen(history)) == 1


def test_a_start_finishes_what_a_crash_left(history: History) -> None:
    """L6: what the manifest names gets its name, other temporary files go, and everything else stays."""
    history.write("public", "t", log_of(10, 1, "committed"))
    history.write("public", "t", log_of(11, 1, "not committed"))
    committed, other = history.settle()
    history.write_temporary(copied := history.describe("public", "u", log_of(9, -5, "copied")), log_of(9, -5, "copied"))
    assert history.root is not None
    (history.root / "public" / "readme.txt").write_text("mine")
    (history.root / "other.tmp").mkdir()
    again = History(history.root)
    asked: list[str] = []

    def known(paths: list[str]) -> set[str]:
        asked.extend(paths)
        return {committed.path}

    again.recover(known)  # type: ignore[arg-type]
    assert sorted(asked) == sorted([committed.path, other.path, copied.path])
    assert seen(again, "**/*.parquet*") == [committed.path]
    assert (history.root / "public" / "readme.txt").exists()
    assert (history.root / "other.tmp").is_dir()
    again.recover(known)  # type: ignore[arg-type]
    assert seen(again, "**/*.parquet*") == [committed.path]
    again.close()


def test_files_of_a_copy_join_a_transaction(history: History) -> None:
    """K4: what a copy has written takes part in the transaction that swaps it in, or is removed."""
    kept, dropped = (history.describe("public", "t", log_of(lsn, -5, "a")) for lsn in (1, 2))
    for file, lsn in ((kept, 1), (dropped, 2)):
        history.write_temporary(file, log_of(lsn, -5, "a"))
    history.remove_temporary([dropped])
    history.add([kept])
    history.write("public", "t", log_of(1, -6, "t", op="T"))
    assert len(history.settle()) == 2
    history.publish()
    assert seen(history, "*/*/*") == sorted([kept.path, "public/t/0000000000000001-s000000000000006.parquet"])


def test_without_a_history(tmp_path: Path) -> None:
    """Design, Settings: an empty CDC_HISTORY means that nothing is written anywhere."""
    nothing = History(None)
    nothing.recover(set)
    nothing.write("public", "t", log_of(1, 1, "a"))
    assert nothing.settle() == []
    nothing.publish()
    nothing.discard()
    nothing.close()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """L5: an error of ours, with a hint; and nothing is left to be committed once it is rolled back."""
    (tmp_path / "history").write_text("a file where the folder should be")
    history = History(tmp_path / "history")
    with pytest.raises(SinkError, match="cannot be written"):
        history.recover(set)
    history.write("public", "t", log_of(1, 1, "a"))
    with pytest.raises(SinkError, match="cannot be written") as caught:
        history.settle()
    assert caught.value.hint
    history.close()


def test_a_file_in_the_manifest() -> None:
    """The manifest's row and the file's facts are one."""
    log = pa.concat_tables([log_of(5, 1, "a", "b"), log_of(9, 1, "c")])
    found = History(None).describe("s", "t", log)
    assert found == HistoryFile("s/t/0000000000000005-0000000000000001.parquet", "s", "t", 3, 5, 9)
