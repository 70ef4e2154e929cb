"""Faults put into the package on purpose, one at a time: each has to turn a test red.

    python -m tests.mutations            all of them
    python -m tests.mutations toast key  those whose names contain one of the words

Works on a copy of the checkout; exit status 1 if one survives.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent

DML = "tests/integration/test_mirror_dml.py"
TOAST = "tests/integration/test_mirror_toast.py"
DDL = "tests/integration/test_mirror_ddl.py"
DRIFT = "tests/integration/test_drift.py"
VALUES = "tests/integration/test_mirror_values.py"
POSITIONS = "tests/crash/test_positions.py"
POINTS = "tests/crash/test_points.py"


@dataclasses.dataclass(frozen=True, slots=True)
class Mutation:
    """A fault.

    Attributes:
        name: what it is.
        file: where, below cdc/.
        old: text that is there exactly once.
        new: what takes its place.
        tests: files and names (`::`) of tests, at least one of which has to fail.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTATIONS = (
    Mutation(
        "takes any new storage for a TRUNCATE's",
        "drift.py",
        "truncated = told and member.columns_xid < member.xid",
        "truncated = True",
        (f"{DRIFT}::test_rows_that_change_unseen",),
    ),
    Mutation(
        "takes the storage after a TRUNCATE for that of a rewrite",
        "drift.py",
        "truncated = told and member.columns_xid < member.xid",
        "truncated = False",
        (f"{DRIFT}::test_truncates_are_no_rewrites",),
    ),
    Mutation(
        "thinks that every partition was born one",
        "drift.py",
        "if member.is_leaf and not member.born and member.oid not in empty:",
        "if False:",
        (f"{DRIFT}::test_partitions_that_change_unseen",),
    ),
    Mutation(
        "takes a renamed column for a dropped and an added one",
        "sink/columns.py",
        "elif name == column.name and name not in later:",
        "elif name == column.name:",
        ("tests/unit/test_schema.py::test_versions_behind",),
    ),
    Mutation(
        "does not look at a table without a change",
        "tables.py",
        "misled = [oid for oid in seen.definitions if self._judge(oid, seen)]",
        "misled = []",
        (f"{DRIFT}::test_ddl_without_a_change",),
    ),
    Mutation(
        "leaves the history of a renamed table behind",
        "sink/evolve.py",
        "self._log_rows(renamed, moment)",
        "pass",
        (f"{DRIFT}::test_tables_that_get_other_names",),
    ),
    Mutation(
        "masks the copy, but not the stream",
        "sink/sink.py",
        "rows = self._masked(table, rows)",
        "self._masked(table, rows)",
        ("tests/integration/test_mask.py::test_changes_that_are_kept_for_a_copy",),
    ),
    Mutation(
        "skips the transaction at the checkpoint, too (<= for <)",
        "pgoutput/decoder.py",
        "skipped = lsn < np.uint64(self._skip_below)",
        "skipped = lsn <= np.uint64(self._skip_below)",
        (f"{POSITIONS}::test_a_stop_between_commit_records_that_touch",),
    ),
    Mutation(
        "skips nothing",
        "pgoutput/decoder.py",
        "skipped = lsn < np.uint64(self._skip_below)",
        "skipped = lsn < np.uint64(0)",
        ("tests/unit/test_decoder.py",),  # today's servers skip them, too, from the position that they are given on
    ),
    Mutation(
        "confirms before the commit",
        "pipeline.py",
        "                self._sink.apply(decoded)\n",
        "                self._sink.apply(decoded)\n"
        "                if decoded.end_lsn: self._subscription.confirm(decoded.end_lsn)\n",
        (f"{POINTS}::test_in_the_stream",),
    ),
    Mutation(
        "confirms a keepalive's position as soon as it comes",
        "source/stream.py",
        "        self._see(wal_end)\n",
        "        self._see(wal_end)\n        self._feedback.confirm(wal_end)\n",
        (f"{POSITIONS}::test_nothing_is_confirmed_that_is_not_durable",),
    ),
    Mutation(
        "takes the first column for the key, whatever the replica identity is",
        "pgoutput/messages.py",
        "return tuple(i for i, column in enumerate(self.columns) if column.is_key)",
        "return (0,)",
        (f"{DML}::test_identity_by_an_index", f"{DML}::test_composite_keys"),
    ),
    Mutation(
        "takes unchanged TOAST for NULL",
        "pgoutput/changes.py",
        "unchanged = {index: mask for index, mask in enumerate(tuples.unchanged) if mask is not None}",
        "unchanged = {}",
        (f"{TOAST}::test_unchanged_values",),
    ),
    Mutation(
        "takes the NULLs of a key tuple for the old values",
        "pgoutput/changes.py",
        "known = unchanged if column.is_key else unchanged & is_whole",
        "known = unchanged",
        (f"{TOAST}::test_unchanged_values_under_a_new_key",),
    ),
    Mutation(
        "looks unchanged TOAST up at the new key",
        "sink/rows.py",
        "asks = np.where(op == INSERT, here - 1, here)",
        "asks = here",
        (f"{TOAST}::test_unchanged_values_under_a_new_key",),
    ),
    Mutation(
        "keeps the first change of a key",
        "sink/rows.py",
        "first, last = order[starts], order[ends]",
        "first, last = order[starts], order[starts]",
        (f"{DML}::test_one_key_several_times",),
    ),
    Mutation(
        "believes the first Relation of a table for ever",
        "pgoutput/decoder.py",
        "if self._announced.get(oid) == message:",
        "if oid in self._announced:",
        (DDL,),
    ),
    Mutation(
        "ignores TRUNCATE",
        "sink/apply.py",
        "if segment.op[0] == rows.TRUNCATE:",
        "if False:",
        (f"{DML}::test_truncates",),
    ),
    Mutation(
        "publishes the history's files before the commit",
        "sink/sink.py",
        '        reach("before_duck_commit")\n        self._make_durable()\n',
        '        self.history.publish()\n        reach("before_duck_commit")\n        self._make_durable()\n',
        (f"{POINTS}::test_in_the_stream",),
    ),
    Mutation(
        "commits the checkpoint behind the data",
        "sink/sink.py",
        "        self.ledger.advance(lsn, commit_ts, commit_ts if as_of is None else as_of)\n"
        '        reach("before_duck_commit")\n'
        "        self._make_durable()\n"
        '        reach("after_duck_commit")\n',
        '        reach("before_duck_commit")\n'
        "        self._make_durable()\n"
        '        reach("after_duck_commit")\n'
        "        self.warehouse.begin()\n"
        "        self.ledger.advance(lsn, commit_ts, commit_ts if as_of is None else as_of)\n"
        "        self.warehouse.commit()\n",
        (f"{POINTS}::test_in_the_stream",),
    ),
    Mutation(
        "leaves out of a copy what was committed at its LSN",
        "pgoutput/rows.py",
        "wanted = self.lsn >= np.uint64(lsn)",
        "wanted = self.lsn > np.uint64(lsn)",
        ("tests/unit", "tests/integration/test_copy.py"),
    ),
    Mutation(
        "applies to a copy what it holds already",
        "pgoutput/rows.py",
        "wanted = self.lsn >= np.uint64(lsn)",
        "wanted = self.lsn >= np.uint64(0)",
        ("tests/integration/test_copy.py", "tests/integration/test_copy_resync.py"),
    ),
    Mutation(
        "takes the end of time for infinity",
        "pgoutput/types/temporal.py",
        "divmod(_INFINITE_MICROSECONDS - 1, _SECOND)",
        "divmod(_INFINITE_MICROSECONDS, _SECOND)",
        ("tests/unit/test_temporal.py",),
    ),
    Mutation(
        "leaves the escapes in the elements of an array",
        "pgoutput/types/arrays.py",
        "at[quotes | escapes]",
        "at[quotes]",
        ("tests/unit/test_arrays.py",),
    ),
    Mutation(
        "forgets the modifier of a domain",
        "pgoutput/types/basis.py",
        "return basis(*found.domain_of, declared)",
        "return basis(found.domain_of.type_oid, -1, declared)",
        (f"{VALUES}::test_values_by_every_path",),
    ),
    Mutation(
        "leaves what is replaced in the quarantine as current",
        "sink/quarantine.py",
        "if known and keys is not None:",
        "if known and keys is None:",
        (f"{VALUES}::test_what_the_rows_still_hold",),
    ),
    Mutation(
        "keeps a key column as it is, whatever it holds",
        "sink/quarantine.py",
        "        if unfit.column in changes.relation.key:\n",
        "        if not changes.relation.key:\n",
        (f"{VALUES}::test_keys_that_do_not_fit",),
    ),
    Mutation(
        "carries the clear values of deleted rows past a new mask",
        "sink/tombstones.py",
        " and before[column.attnum].mask == column.mask",
        "",
        ("tests/integration/test_mask.py::test_what_was_there_before_the_mask",),
    ),
    Mutation(
        "keeps what did not fit of a column that is hidden by now",
        "sink/staging.py",
        "shown & (copied.hidden | masked)",
        "shown & masked",
        ("tests/integration/test_exclude.py::test_what_did_not_fit_goes_too",),
    ),
    Mutation(
        "looks for what did not fit by a key that is no longer the key",
        "sink/evolve.py",
        "if unknown or before == now or",
        "if not unknown or",
        (f"{VALUES}::test_the_quarantine_goes_by_the_key",),
    ),
    Mutation(
        "carries deleted rows that the stream has brought already",
        "sink/tombstones.py",
        'f" WHERE g.deleted_at NOT IN ({since})"',
        '" WHERE true"',
        ("tests/integration/test_mirror_soft.py::test_rows_without_a_key_that_go_while_their_table_is_copied_anew",),
    ),
    Mutation(
        "takes a living row for a deleted one when its enum has other labels",
        "sink/tombstones.py",
        "return not (printed_anew and",
        "return not (False and",
        ("tests/unit/test_tombstones.py::test_who_is_absent",),
    ),
)


def killed_by(mutation: Mutation) -> str | None:
    """Return the first test that fails under `mutation`; None: it survives.

    Raises:
        ValueError: the text to be replaced is not there exactly once.
        RuntimeError: no test ran.
    """
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        copy = Path(folder)
        copy.chmod(0o755)  # servers run as another user when this is root
        for name in ("cdc", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        file = copy / "cdc" / mutation.file
        text = file.read_text(encoding="utf-8")
        if text.count(mutation.old) != 1:
            raise ValueError(f"{mutation.file} has {text.count(mutation.old)} times: {mutation.old}")
        file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", *mutation.tests],
            cwd=copy,
            env=os.environ | {"PYTHONPATH": folder},  # ahead of the checkout, for the commands that the tests start
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode not in (0, 1):
        raise RuntimeError(f"no test ran:\n{done.stdout}{done.stderr}")
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0].split(" - ")[0].split(" ", 1)[1] if failed else None


def main() -> int:
    """Try the mutations named on the command line, or all."""
    words = sys.argv[1:]
    chosen = [m for m in MUTATIONS if not words or any(word in m.name for word in words)]
    survivors = 0
    for mutation in chosen:
        began = time.monotonic()
        found = killed_by(mutation)
        survivors += found is None
        print(f"{time.monotonic() - began:5.0f} s  {mutation.name}: {found or 'SURVIVES'}", flush=True)
    print(f"{len(chosen)} faults, {survivors} survived")
    return 1 if survivors or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
