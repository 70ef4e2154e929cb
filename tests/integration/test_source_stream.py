"""The receiver against real servers: what it puts, what it confirms, how it ends."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from cdc.errors import ConnectionLost, StateError
from cdc.pgoutput.messages import WireBatch
from cdc.source import feedback, fence, slot
from cdc.source.connection import connect, connect_replication
from cdc.source.stream import Idle, Item, Limits, Receiver, StreamEnded
from tests.conftest import Database

WIDE = Limits(rows=100_000, bytes=64_000_000, age_s=0.05)
PATIENCE_S = 20.0


class Consumer:
    """A receiver with its inbox, and a slot of its own."""

    def __init__(
        self,
        database: Database,
        *,
        limits: Limits = WIDE,
        start_lsn: int | None = None,
        dsn: str | None = None,
        publications: tuple[str, ...] = ("p",),
        capacity: int = 0,
        slot_name: str | None = None,
    ) -> None:
        self.slot = slot_name or f"s_{database.name[-8:]}"
        self.inbox: queue.Queue[Item] = queue.Queue(capacity)
        self.database = database
        if self.state() is None:
            pgconn = connect_replication(database.dsn)
            slot.create(pgconn, self.slot)
            pgconn.finish()
        state = self.state()
        assert state is not None
        assert state.confirmed_flush_lsn is not None
        start = state.confirmed_flush_lsn if start_lsn is None else start_lsn
        self.receiver = Receiver(dsn or database.dsn, self.slot, publications, start, limits, self.inbox)

    def start(self) -> Consumer:
        self.receiver.connect()
        self.receiver.start()
        return self

    def state(self) -> slot.Slot | None:
        with connect(self.database.dsn) as connection:
            return slot.read(connection, self.slot)

    def confirmed(self) -> int:
        state = self.state()
        assert state is not None
        assert state.confirmed_flush_lsn is not None
        return state.confirmed_flush_lsn

    def next(self, kind: type[Any], timeout_s: float = PATIENCE_S) -> Any:
        """Return the next item of `kind`."""
        deadline = time.monotonic() + timeout_s
        while True:
            item = self.inbox.get(timeout=max(0.01, deadline - time.monotonic()))
            if isinstance(item, kind):
                return item
            assert not isinstance(item, StreamEnded), item.error

    def until_fence(self) -> list[WireBatch]:
        """Emit a fence; return all batches up to the one that holds it."""
        with connect(self.database.dsn) as connection:
            token = fence.emit(connection)
        batches: list[WireBatch] = []
        while not batches or not any(token in frame for frame in batches[-1].frames):
            batches.append(self.next(WireBatch))
        return batches

    def stop(self) -> None:
        self.receiver.stop()
        if self.receiver.ident is not None:
            self.receiver.join(5)
            assert not self.receiver.is_alive()


@pytest.fixture
def consume(database: Database) -> Iterator[Callable[..., Consumer]]:
    """Make consumers of `database`, which has a table `t` and a publication `p`; all end with the test."""
    database.execute("CREATE TABLE t (id bigint PRIMARY KEY, v text); CREATE PUBLICATION p FOR TABLE t")
    made: list[Consumer] = []

    def make(**options: Any) -> Consumer:
        made.append(Consumer(database, **options))
        return made[-1]

    yield make
    for consumer in made:
        consumer.stop()


def kinds(batches: list[WireBatch]) -> str:
    return "".join(chr(frame[25]) for batch in batches for frame in batch.frames)


def commit_lsns(batches: list[WireBatch]) -> list[tuple[int, int]]:
    """(commit LSN, end LSN) of each Commit."""
    return [
        (int.from_bytes(frame[27:35], "big"), int.from_bytes(frame[35:43], "big"))
        for batch in batches
        for frame in batch.frames
        if frame[25] == ord("C")
    ]


def wait_until(condition: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)


def test_batches_are_whole_transactions_in_order(database: Database, consume: Callable[..., Consumer]) -> None:
    consumer = consume(limits=Limits(rows=7, bytes=1 << 20, age_s=10)).start()
    for i in range(10):
        database.execute(f"INSERT INTO t SELECT g, 'x' FROM generate_series({i * 3}, {i * 3 + 2}) g")
    batches = consumer.until_fence()
    assert all(batch.complete and batch.frames[0][25] == ord("B") for batch in batches)
    assert all(batch.frames[-1][25] == ord("C") for batch in batches)
    assert kinds(batches).replace("R", "") == "BIIIC" * 10 + "BMC"
    assert [kinds([batch]).count("I") for batch in batches] == [6, 6, 6, 6, 6]
    assert consumer.receiver.received >= commit_lsns(batches)[-1][1]


def test_a_fence_ends_its_batch_before_its_age(consume: Callable[..., Consumer]) -> None:
    consumer = consume(limits=Limits(rows=10**6, bytes=1 << 30, age_s=3600)).start()
    started = time.monotonic()
    consumer.until_fence()
    assert time.monotonic() - started < 5


def test_a_large_transaction_comes_in_pieces(database: Database, consume: Callable[..., Consumer]) -> None:
    """C17: what was whole before it comes first; no piece is much larger than the limit."""
    consumer = consume(limits=Limits(rows=1000, bytes=1 << 30, age_s=60)).start()
    database.execute("INSERT INTO t VALUES (-1, 'small')")
    database.execute("INSERT INTO t SELECT g, 'x' FROM generate_series(1, 10000) g")
    batches = consumer.until_fence()
    assert kinds(batches[:1]).replace("R", "") == "BIC"
    pieces = [batch for batch in batches if not batch.complete]
    assert len(pieces) == 9
    assert all(len(piece.frames) <= 1003 for piece in pieces)
    assert kinds(batches[1:]) == "B" + "I" * 10000 + "C" + "BMC"


def test_age_cuts_a_batch_while_nothing_comes(database: Database, consume: Callable[..., Consumer]) -> None:
    consumer = consume(limits=Limits(rows=10**6, bytes=1 << 30, age_s=0.3)).start()
    database.execute("INSERT INTO t VALUES (1, 'x')")
    assert consumer.next(WireBatch, 5).complete


def test_sends_again_what_was_not_confirmed(database: Database, consume: Callable[..., Consumer]) -> None:
    """J1, traps 1 and 2: a transaction comes again iff its commit LSN is not below the start."""
    consumer = consume().start()
    for i in range(3):
        database.execute(f"INSERT INTO t VALUES ({i}, 'x')")
    ends = commit_lsns(consumer.until_fence())
    consumer.stop()
    wait_until(lambda: not getattr(consumer.state(), "active", True))
    again = consume(start_lsn=ends[0][1]).start()
    assert commit_lsns(again.until_fence())[: len(ends) - 1] == ends[1:]


def test_confirms_what_it_is_told_and_no_more(database: Database, consume: Callable[..., Consumer]) -> None:
    """J4."""
    consumer = consume().start()
    before = consumer.confirmed()
    database.execute("INSERT INTO t VALUES (1, 'x')")
    (_, first), *_ = commit_lsns(consumer.until_fence())
    database.execute("INSERT INTO t VALUES (2, 'x')")
    consumer.until_fence()
    assert consumer.confirmed() == before
    consumer.receiver.confirm(first)
    wait_until(lambda: consumer.confirmed() == first, 2)
    consumer.receiver.confirm(before)
    time.sleep(0.2)
    assert consumer.confirmed() == first


def test_stop_sends_the_last_confirmation(database: Database, consume: Callable[..., Consumer]) -> None:
    consumer = consume().start()
    database.execute("INSERT INTO t VALUES (1, 'x')")
    end = commit_lsns(consumer.until_fence())[-1][1]
    consumer.receiver.confirm(end)
    consumer.stop()
    wait_until(lambda: consumer.confirmed() == end, 2)
    assert consumer.inbox.empty() or not isinstance(consumer.inbox.queue[-1], StreamEnded)


def test_idle_positions_follow_unpublished_traffic(database: Database, consume: Callable[..., Consumer]) -> None:
    """J2: WAL that holds nothing for us is passed, and can be confirmed."""
    database.execute("CREATE TABLE other (id int)")
    consumer = consume().start()
    database.execute("INSERT INTO other SELECT generate_series(1, 1000)")
    ((target,),) = database.execute("SELECT (pg_current_wal_lsn() - '0/0')::bigint")
    before = time.time()
    consumer.receiver.wanted = target
    idle = consumer.next(Idle)
    while idle.lsn < target:
        idle = consumer.next(Idle)
    assert abs(idle.at / 1e6 - before) < 60
    consumer.receiver.confirm(idle.lsn)
    wait_until(lambda: consumer.confirmed() == idle.lsn)


def test_no_idle_overtakes_a_batch(database: Database, consume: Callable[..., Consumer]) -> None:
    consumer = consume(limits=Limits(rows=10**6, bytes=1 << 30, age_s=1.0)).start()
    consumer.receiver.wanted = 0
    seen = 0
    for i in range(20):
        database.execute(f"INSERT INTO t VALUES ({i}, 'x')")
        database.execute("SELECT pg_logical_emit_message(true, 'other', 'x')")
    commits = 0
    while commits < 20:
        item = consumer.inbox.get(timeout=PATIENCE_S)
        if isinstance(item, Idle):
            assert item.lsn > seen
            seen = item.lsn
        elif isinstance(item, WireBatch):
            found = commit_lsns([item])
            assert found[0][0] >= seen
            seen = found[-1][1]
            commits += sum(1 for frame in item.frames if frame[25] == ord("I"))


def test_a_full_inbox_does_not_cost_the_connection(database: Database, consume: Callable[..., Consumer]) -> None:
    """J3: feedback goes on while the applier is busy for longer than wal_sender_timeout."""
    dsn = make_conninfo(database.dsn, options="-c wal_sender_timeout=1s")
    consumer = consume(limits=Limits(rows=1, bytes=1 << 20, age_s=0), dsn=dsn, capacity=1).start()
    for i in range(5):
        database.execute(f"INSERT INTO t VALUES ({i}, 'x')")
    time.sleep(3)
    assert kinds(consumer.until_fence()).count("I") == 5


def test_a_large_backlog_against_a_slow_applier(database: Database, consume: Callable[..., Consumer]) -> None:
    """J3 with the server blocked in sending."""
    dsn = make_conninfo(database.dsn, options="-c wal_sender_timeout=1s")
    consumer = consume(limits=Limits(rows=1000, bytes=1 << 20, age_s=1), dsn=dsn, capacity=1).start()
    database.execute("INSERT INTO t SELECT g, repeat('x', 2000) FROM generate_series(1, 20000) g")
    time.sleep(3)
    assert kinds(consumer.until_fence()).count("I") == 20000


def test_fast_shutdown_of_the_server_completes(database: Database, consume: Callable[..., Consumer]) -> None:
    """J5, J9: the server waits for the confirmation of everything; then the stream ends."""
    consumer = consume().start()
    database.execute("INSERT INTO t VALUES (1, 'x')")
    ended: list[StreamEnded] = []

    def confirm_all() -> None:
        while not ended:
            item = consumer.inbox.get(timeout=PATIENCE_S)
            if isinstance(item, StreamEnded):
                ended.append(item)
            elif isinstance(item, Idle):
                consumer.receiver.confirm(item.lsn)
            else:
                consumer.receiver.confirm(commit_lsns([item])[-1][1])

    applier = threading.Thread(target=confirm_all)
    applier.start()
    started = time.monotonic()
    database.server.stop("fast")
    assert time.monotonic() - started < 10
    applier.join(PATIENCE_S)
    assert isinstance(ended[0].error, ConnectionLost)


def test_a_terminated_walsender_is_a_lost_connection(database: Database, consume: Callable[..., Consumer]) -> None:
    """J9."""
    consumer = consume().start()
    consumer.until_fence()
    database.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_replication")
    ended = consumer.inbox.get(timeout=PATIENCE_S)
    while not isinstance(ended, StreamEnded):
        ended = consumer.inbox.get(timeout=PATIENCE_S)
    assert isinstance(ended.error, ConnectionLost)


def test_drain_hands_over_what_is_whole_and_goes_on_confirming(
    database: Database, consume: Callable[..., Consumer]
) -> None:
    consumer = consume(limits=Limits(rows=10**6, bytes=1 << 30, age_s=3600)).start()
    database.execute("INSERT INTO t VALUES (1, 'x')")
    wait_until(lambda: "I" in kinds([WireBatch(list(consumer.receiver._assembly._frames), complete=False)]))
    consumer.receiver.drain()
    batch = consumer.next(WireBatch)
    ended = consumer.inbox.get(timeout=PATIENCE_S)
    assert isinstance(ended, StreamEnded)
    assert ended.error is None
    end = commit_lsns([batch])[-1][1]
    consumer.receiver.confirm(end)
    wait_until(lambda: consumer.confirmed() == end, 2)


def test_drain_while_the_inbox_is_full(database: Database, consume: Callable[..., Consumer]) -> None:
    consumer = consume(limits=Limits(rows=1, bytes=1 << 20, age_s=0), capacity=1).start()
    for i in range(5):
        database.execute(f"INSERT INTO t VALUES ({i}, 'x')")
    wait_until(consumer.inbox.full)
    consumer.receiver.drain()
    while not isinstance(item := consumer.inbox.get(timeout=PATIENCE_S), StreamEnded):
        assert isinstance(item, Idle) or item.complete


def test_stop_while_the_inbox_is_full(database: Database, consume: Callable[..., Consumer]) -> None:
    consumer = consume(limits=Limits(rows=1, bytes=1 << 20, age_s=0), capacity=1).start()
    for i in range(5):
        database.execute(f"INSERT INTO t VALUES ({i}, 'x')")
    wait_until(consumer.inbox.full)
    started = time.monotonic()
    consumer.stop()
    assert time.monotonic() - started < 2


def test_slot_in_use_or_missing(database: Database, consume: Callable[..., Consumer]) -> None:
    """J10, J11: the second consumer is refused and may try again; the first is unharmed."""
    first = consume().start()
    second = consume()
    with pytest.raises(ConnectionLost, match="active for PID"):
        second.receiver.connect()
    assert first.until_fence()
    missing = Receiver(database.dsn, "missing", ["p"], 0, WIDE, queue.Queue())
    with pytest.raises(StateError, match="slot missing is missing"):
        missing.connect()
    missing.stop()


def test_slot_that_lost_its_wal(database: Database, consume: Callable[..., Consumer]) -> None:
    """J13."""
    consumer = consume()
    database.execute("ALTER SYSTEM SET max_slot_wal_keep_size = '1MB'")
    try:
        database.execute("SELECT pg_reload_conf()")
        for _ in range(20):
            database.execute("INSERT INTO t SELECT g, 'x' FROM generate_series(1, 100) g; DELETE FROM t")
            database.execute("SELECT pg_switch_wal()")
            database.execute("CHECKPOINT")
            state = consumer.state()
            assert state is not None
            if state.wal_status == "lost":
                break
        assert state is not None
        assert state.wal_status == "lost"
        with pytest.raises(StateError, match="cannot be used"):
            consumer.receiver.connect()
    finally:
        database.execute("ALTER SYSTEM RESET max_slot_wal_keep_size")
        database.execute("SELECT pg_reload_conf()")


def test_missing_publication_ends_the_stream(database: Database, consume: Callable[..., Consumer]) -> None:
    """G7, trap 11: an error up to PostgreSQL 17; in 18 a warning, after which changes would be skipped in silence."""
    consumer = consume(publications=("p", "gone")).start()
    database.execute("INSERT INTO t VALUES (1, 'x')")
    deadline = time.monotonic() + PATIENCE_S
    while not isinstance(item := consumer.inbox.get(timeout=PATIENCE_S), StreamEnded):
        assert isinstance(item, Idle)
        assert time.monotonic() < deadline
    assert isinstance(item.error, StateError)
    assert "gone" in str(item.error)


def test_names_that_need_quoting(database: Database) -> None:
    """G3."""
    name = """a "b", c'd"""
    database.execute("CREATE TABLE t (id int PRIMARY KEY)")
    with database.connect() as connection:
        connection.execute(sql.SQL("CREATE PUBLICATION {} FOR TABLE t").format(sql.Identifier(name)))
        connection.execute("CREATE PUBLICATION other")
    consumer = Consumer(database, publications=(name, "other")).start()
    try:
        database.execute("INSERT INTO t VALUES (1)")
        assert "I" in kinds(consumer.until_fence())
    finally:
        consumer.stop()


def test_text_that_is_not_utf8_does_not_stop_the_stream(database: Database) -> None:
    """J20: a SQL_ASCII database may hold any bytes."""
    name = f"{database.name[:50]}_ascii"
    database.execute(f"CREATE DATABASE {name} ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
    other = Database(database.server, name, database.server.dsn(name), [])
    try:
        other.execute("CREATE TABLE t (id int PRIMARY KEY, v text); CREATE PUBLICATION p FOR TABLE t")
        consumer = Consumer(other, slot_name=f"ascii_{database.name[-8:]}").start()
        try:
            other.execute("INSERT INTO t VALUES (1, E'caf\\xe9')")
            batches = consumer.until_fence()
        finally:
            consumer.stop()
        assert any(b"caf\xe9" in frame for batch in batches for frame in batch.frames)
        wait_until(lambda: not getattr(consumer.state(), "active", True))
        with connect(other.dsn) as connection:
            slot.drop(connection, consumer.slot)
    finally:
        database.execute(f"DROP DATABASE {name} WITH (FORCE)")


class Proxy:
    """Passes bytes between one client and the server until `silent` is set: then it passes none, and stays open."""

    def __init__(self, host: str, port: int) -> None:
        self.silent = threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.target = (host, port)
        self.sockets: list[socket.socket] = [self.listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        client, _ = self.listener.accept()
        server = socket.create_connection(self.target)
        self.sockets += [client, server]
        for pair in ((client, server), (server, client)):
            threading.Thread(target=self._pass, args=pair, daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                if not self.silent.is_set():
                    target.sendall(data)
        except OSError:
            pass

    def close(self) -> None:
        for each in self.sockets:
            each.close()


def test_a_connection_that_is_only_half_there_is_given_up(
    database: Database, consume: Callable[..., Consumer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """J8."""
    monkeypatch.setattr(feedback, "SILENCE_S", 1.0)
    info = psycopg.conninfo.conninfo_to_dict(database.dsn)
    proxy = Proxy("127.0.0.1", int(str(info["port"])))
    try:
        dsn = make_conninfo(
            database.dsn, host="127.0.0.1", port=proxy.port, options="-c wal_sender_timeout=1s", gssencmode="disable"
        )
        consumer = consume(dsn=dsn).start()
        consumer.until_fence()
        time.sleep(3)  # an idle server is no silent one
        assert consumer.receiver.is_alive()
        proxy.silent.set()
        started = time.monotonic()
        while not isinstance(item := consumer.inbox.get(timeout=PATIENCE_S), StreamEnded):
            assert isinstance(item, Idle)
        assert isinstance(item.error, ConnectionLost)
        assert "silent" in str(item.error)
        assert time.monotonic() - started < 6
    finally:
        proxy.close()
