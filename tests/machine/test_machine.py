"""Anything may happen to the source and to the consumer, in any order: at every drain the mirror is the source's equal.

Hypothesis draws tables, DML, DDL and partitions over three connections with open transactions, and a consumer that
runs, stops, is killed or dies at a named point in between. Postgres is the oracle. A failure is shrunk, and printed as
the SQL script of the whole run: one statement a line, with the number of its connection.

    MACHINE_EXAMPLES=2000 SOAK=1 pytest tests/machine    other examples at every run; --hypothesis-seed=N repeats one
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from cdc.embedded import EmbeddedServer
from cdc.failpoints import POINTS
from tests.conftest import DRAWN, SOAK, Database, Lake, fresh_database
from tests.machine import actions
from tests.machine.sessions import Script, Session
from tests.mirror import Consumer, mirror_once, mirrored_rows, one_look, replayed, source_rows, warehouse_rows

EXPECTED_ERRORS: tuple[str, ...] = ()
"""Parts of the reasons for which a table may be in state error."""

EXAMPLES = int(os.environ.get("MACHINE_EXAMPLES", "500" if SOAK else "6"))
STEPS = 25

_NAMES = ("t0", "t1", "t2")
_PATIENCE_S = 60.0
_SLOW_S = 3.0

_sessions = st.integers(0, 2)
_tables = st.sampled_from(("t1", "t1", "t0", "t2"))
_numbers = st.integers(0, 7)
_ids = st.integers(1, 12)
_counts = st.sampled_from((3, 1, 8))
_limits = st.fixed_dictionaries(
    {"flush_rows": st.sampled_from(("100000", "1", "2", "7")), "flush_bytes": st.sampled_from(("64MB", "1000"))}
)
_kinds = st.lists(st.sampled_from(actions.KINDS), min_size=1, max_size=4)

_VALUES = ("values", "large", "nothing")
_KEYS = ("key", "swap", "move")
_TREES = ("new", "attach empty", "attach", "detach", "drop", "truncate leaf", "recreate", "rename table")


@dataclasses.dataclass(frozen=True, slots=True)
class _Known:
    """A row of ``_cdc.tables``."""

    oid: int
    state: str
    reason: str
    copy_lsn: int


class Mirror(RuleBasedStateMachine):
    """See the module."""

    server: ClassVar[EmbeddedServer]

    def __init__(self) -> None:
        super().__init__()
        self.script = Script()
        self.deletes = "hard"
        self.consumer: Consumer | None = None
        self.rekeyed: dict[int, int | None] = {}
        self._stack = contextlib.ExitStack()
        root = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="machine-")))
        self.lake = Lake(root, root / "warehouse.duckdb", root / "history")
        self.database: Database = self._stack.enter_context(fresh_database(self.server, "machine"))
        self.sessions = [Session(number, self.database.dsn, self.script) for number in range(3)]

    def teardown(self) -> None:
        """Drain once more, unless something has failed already; then leave nothing behind."""
        try:
            if sys.exc_info()[0] is None:
                self._drain()
        finally:
            note(f"-- the run, deletes={self.deletes}\n{self.script}")
            for session in self.sessions:
                session.close()
            if self.consumer is not None:
                self.consumer.kill()
            self._stack.close()

    # The source

    @initialize(
        deletes=st.sampled_from(("hard", "hard", "soft")),
        shapes=st.lists(st.sampled_from(actions.SHAPES), min_size=3, max_size=3, unique=True),
        kinds=_kinds,
        mirrored=st.sampled_from((True, True, False)),
        limits=_limits,
    )
    def first(self, deletes: str, shapes: list[str], kinds: list[str], mirrored: bool, limits: dict[str, str]) -> None:
        """Three tables with some rows; they may be mirrored before anything else happens."""
        self.deletes = deletes
        self.sessions[0].run([actions.PRELUDE])
        for name, shape in zip(_NAMES, shapes, strict=True):
            # A large value in each row: few updates touch it, and then it is not sent.
            self.sessions[0].run(actions.create(name, shape, [actions.KINDS[0], *kinds]))
            if table := self._table(self.sessions[0], name):
                self.sessions[0].run(actions.insert(table, 1, 8, 1))
        if mirrored:
            self._mirror(limits)

    @rule(who=_sessions, how=st.sampled_from(("begin", "commit", "commit", "back", "roll back")))
    def transact(self, who: int, how: str) -> None:
        """Open a transaction, or a savepoint in it; or end one, or go back to its last savepoint."""
        there = [session for session in self.sessions if session.open]
        if how == "begin" or not there:
            self.sessions[who].begin()
        elif how == "back":
            there[who % len(there)].back()
        else:
            there[who % len(there)].end(commit=how == "commit")

    @rule(who=_sessions, name=_tables, first=_ids, count=_counts, salt=_numbers)
    def insert(self, who: int, name: str, first: int, count: int, salt: int) -> None:
        self._do(who, name, lambda table: actions.insert(table, first, count, salt))

    @rule(who=_sessions, name=_tables, how=st.sampled_from(_VALUES), first=_ids, count=_counts, salt=_numbers)
    def update(self, who: int, name: str, how: str, first: int, count: int, salt: int) -> None:
        """Other values, or the same."""
        self._update(who, name, how, (first, count, salt))

    @rule(who=_sessions, name=_tables, how=st.sampled_from(_KEYS), first=_ids, count=_counts, salt=_numbers)
    def move(self, who: int, name: str, how: str, first: int, count: int, salt: int) -> None:
        """Other keys, or another partition."""
        self._update(who, name, how, (first, count, salt))

    def _update(self, who: int, name: str, how: str, numbers: tuple[int, int, int]) -> None:
        make = actions.UPDATES[how]
        self._do(who, name, lambda table: make(table, *numbers) if table.followed else [])

    @rule(who=_sessions, name=_tables, first=_ids, count=_counts)
    def delete(self, who: int, name: str, first: int, count: int) -> None:
        self._do(who, name, lambda table: actions.delete(table, first, count))

    @rule(
        who=_sessions,
        names=st.lists(st.sampled_from(_NAMES), min_size=1, max_size=2, unique=True),
        cascade=st.booleans(),
    )
    def truncate(self, who: int, names: list[str], cascade: bool) -> None:
        tables = [table for name in names if (table := self._table(self.sessions[who], name))]
        self._run(who, actions.truncate(tables, cascade=cascade))

    @rule(who=_sessions, name=_tables, how=st.sampled_from(list(actions.ALTERATIONS)), number=_numbers)
    def alter(self, who: int, name: str, how: str, number: int) -> None:
        """DDL of one table, in the open transaction or alone."""
        table = self._table(self.sessions[who], name)
        if table is None or (how == "vacuum full" and (who == 2 or self.sessions[who].open)):
            return
        done = self._run(who, actions.ALTERATIONS[how](table, number))
        if done and how in ("primary key", "replica identity"):
            self.rekeyed[table.oid] = None

    @rule(who=_sessions, name=_tables, how=st.sampled_from(_TREES), number=_numbers, kinds=_kinds)
    def reshape(self, who: int, name: str, how: str, number: int, kinds: list[str]) -> None:
        """Partitions come and go; tables do; names change."""
        if how == "recreate":
            self._recreate(who, name, actions.SHAPES[number % len(actions.SHAPES)], kinds)
        elif how == "rename table":
            self._rename(who, name, _NAMES[number % 3])
        else:
            self._do(who, name, lambda table: actions.partition(table, how, number % 4))

    def _recreate(self, who: int, name: str, shape: str, kinds: list[str]) -> None:
        """Drop a table, if it is there, and make another of its name."""
        detached = [leaf for number in range(4) if self._table(self.sessions[who], leaf := f"{name}_p{number}")]
        drops = [f"DROP TABLE IF EXISTS {each} CASCADE" for each in (name, *detached)]
        self._run(who, [*drops, *actions.create(name, shape, kinds)])
        self._do(who, name, lambda table: actions.insert(table, 1, 5, 2))

    def _rename(self, who: int, name: str, other: str) -> None:
        """Give a table another name, or swap the names of two."""
        there = {each for each in (name, other) if self._table(self.sessions[who], each)}
        if name != other and name in there:
            swap = ((name, "aside"), (other, name), ("aside", other))
            steps = swap if other in there else ((name, other),)
            self._run(who, [f"ALTER TABLE {old} RENAME TO {new}" for old, new in steps])

    def _do(self, who: int, name: str, make: Callable[[actions.Table], list[str]]) -> None:
        if table := self._table(self.sessions[who], name):
            self._run(who, make(table))

    def _run(self, who: int, statements: list[str]) -> bool:
        return bool(statements) and self.sessions[who].run(statements)

    def _table(self, session: Session, name: str) -> actions.Table | None:
        return actions.describe(session.look, name)

    # The consumer

    @precondition(lambda self: self.consumer is None)
    @rule(limits=_limits)
    def mirror(self, limits: dict[str, str]) -> None:
        """Run the consumer to the end of what is committed; what is open stays open, unless it is waited for."""
        self._mirror(limits)

    @rule(
        how=st.sampled_from(("drain", "process")),
        end=st.sampled_from(("stop", "kill")),
        crash=st.one_of(st.none(), st.tuples(st.sampled_from(POINTS), st.sampled_from((1, 2, 7)))),
        pause=st.sampled_from((0.0, 1.5, 0.3)),
        limits=_limits,
    )
    def consume(self, how: str, end: str, crash: tuple[str, int] | None, pause: float, limits: dict[str, str]) -> None:
        """Bring everything to an end, and compare; or start the consumer as a process.

        The process goes on over the next rules, and this one ends it. It may also die at a named point: in the
        background, or as `run --once`, while nothing else happens.
        """
        if self.consumer is not None:
            time.sleep(pause)
            self._end_consumer(end)
        elif how == "drain":
            self._drain()
        else:
            dying = {"crash_at": f"{crash[0]}:{crash[1]}"} if crash else {}
            once = ["--once"] if crash and end == "kill" else []
            self.script.note(f"cdc run {' '.join(once)} {_shown(limits | dying)} &")
            self.consumer = self._consumer(*once, flush_interval="50ms", **limits, **dying)
            if once:
                consumer = self.consumer
                self._await(lambda: not consumer.running)
                self._end_consumer("wait")

    def _consumer(self, *arguments: str, **given: str) -> Consumer:
        return Consumer(self.lake, self.database.dsn, *arguments, deletes=self.deletes, threads="2", **given)

    def _end_consumer(self, how: str) -> None:
        """End the consumer in the background, which may have died at its named point."""
        if self.consumer is None:
            return
        self.script.note(f"the consumer in the background: {how}")
        consumer, self.consumer = self.consumer, None
        with consumer:
            if how == "wait":
                assert consumer.wait() in (0, -signal.SIGKILL), consumer.output
            elif not consumer.running:
                assert consumer.wait() == -signal.SIGKILL, consumer.output
            elif how == "kill":
                consumer.kill()
            else:
                # SIGTERM ends a process that has not come to be `cdc` yet.
                early = () if consumer.output else (-signal.SIGTERM,)
                assert consumer.stop() in (0, -signal.SIGKILL, *early), consumer.output

    def _mirror(self, limits: dict[str, str]) -> str:
        """Do what `cdc run --once` does, in a thread: if it waits for our transactions, these have to end."""
        self.script.note(f"cdc run --once {_shown(limits)}")
        said: list[str] = []
        failed: list[BaseException] = []

        def work() -> None:
            try:
                given = {**limits, "deletes": self.deletes, "threads": "2"}
                said.append(mirror_once(self.lake, self.database.dsn, **given))
            except BaseException as error:  # noqa: BLE001 -- raised again below
                failed.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        self._await(lambda: not thread.is_alive())
        if failed:
            raise failed[0]
        return said[0]

    def _await(self, done: Callable[[], bool]) -> None:
        """Wait for a consumer that ends by itself; once it waits for our transactions, commit them all."""
        began = time.monotonic()
        while not done():
            waited_s = time.monotonic() - began
            assert waited_s < _PATIENCE_S, "the consumer does not come to an end"
            if any(session.open for session in self.sessions) and (waited_s > _SLOW_S or self._waits()):
                self._commit()
            time.sleep(0.02)

    def _waits(self) -> bool:
        """Whether somebody of the consumer's waits for a lock, or for a transaction to end."""
        query = (
            "SELECT count(*) FROM pg_stat_activity a JOIN pg_locks l USING (pid) "
            "WHERE a.application_name = 'cdc' AND NOT l.granted"
        )
        return bool(self.database.execute(query)[0][0])

    def _commit(self) -> None:
        for session in self.sessions:
            session.end(commit=True)

    # The comparison

    def _drain(self) -> None:
        self._commit()
        self._end_consumer("stop")
        names = [name for (name,) in self.sessions[0].look(_USER_TABLES)]
        tables = {name: table for name in names if (table := self._table(self.sessions[0], name))}
        for _ in range(3):
            said = self._mirror({})
            known = self._known()
            if all(name in known and known[name].state == "streaming" for name in tables):
                break
        self.script.note("drain")
        with one_look(self.lake):
            wrong = [difference for table in tables.values() if (difference := self._difference(table, known))]
        surplus = sorted(name for name in known.keys() - tables.keys() if known[name].state != "dropped")
        wrong += [f"{name} is {known[name].state}, but not in Postgres" for name in surplus]
        assert not wrong, "\n".join([*wrong, "the consumer's last words:", said])

    def _known(self) -> dict[str, _Known]:
        rows = warehouse_rows(self.lake, "SELECT table_name, oid, state, reason, copy_lsn FROM _cdc.tables")
        return {row[0]: _Known(*row[1:]) for row in rows}

    def _difference(self, table: actions.Table, all_known: dict[str, _Known]) -> str:
        """Return how the mirror of a table is not what it has to be; '' if it is."""
        name, known = f"public.{table.name}", all_known.get(table.name)
        if known is None:
            return f"{name} is not known"
        if known.state == "error" and any(reason in known.reason for reason in EXPECTED_ERRORS):
            return ""
        if known.state != "streaming":
            return f"{name} is {known.state}: {known.reason}"
        source = source_rows(self.database, self.lake, name)
        living = "_deleted_at IS NULL" if self.deletes == "soft" else "true"
        sides = {"warehouse": mirrored_rows(self.database, self.lake, name, living)}
        if self._replays(known):
            key = () if table.identity == "f" or not table.followed else self._key(table)
            sides["history"] = replayed(self.database, self.lake, name, key)
        return "\n".join(
            f"{side} of {name}: missing {_some(source - rows)}, too many {_some(rows - source)}"
            for side, rows in sides.items()
            if rows != source
        )

    def _replays(self, known: _Known) -> bool:
        """Whether the history alone has to give the table: it has kept its key since its newest copy."""
        if known.oid in self.rekeyed:
            if self.rekeyed[known.oid] in (None, known.copy_lsn):
                self.rekeyed[known.oid] = known.copy_lsn
                return False
            del self.rekeyed[known.oid]
        return True

    def _key(self, table: actions.Table) -> Sequence[str]:
        return ("alt",) if table.identity == "i" else table.key


_USER_TABLES = """
    SELECT relname::text FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p')
    AND NOT relispartition ORDER BY relname"""


def _some(rows: Counter[tuple[Any, ...]]) -> str:
    return f"{rows.total()} ({str(list(rows)[:2])[:300]})"


def _shown(given: dict[str, str]) -> str:
    return " ".join(f"CDC_{name.upper()}={value}" for name, value in given.items())


@pytest.mark.timeout(0 if SOAK else 900)  # a minute, or what it takes to shrink a failure
def test_mirror_is_equal_whatever_happens(server: EmbeddedServer) -> None:
    """C, D, E, F, H, L1, L2, J7: a mirror of anything that may happen, see the module."""
    Mirror.server = server
    run_state_machine_as_test(
        Mirror,
        settings=settings(DRAWN, max_examples=EXAMPLES, stateful_step_count=STEPS),
    )
