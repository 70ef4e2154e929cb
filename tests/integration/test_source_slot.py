"""Replication slots."""

from __future__ import annotations

import threading
import time

import pytest

from cdc.errors import SourceError
from cdc.source import slot
from cdc.source.connection import connect, connect_replication
from tests.conftest import Database


def test_a_slot_s_life(database: Database) -> None:
    name = f"s_{database.name[-8:]}"
    pgconn = connect_replication(database.dsn)
    with connect(database.dsn) as connection:
        assert slot.read(connection, name) is None
        lsn = slot.create(pgconn, name)
        found = slot.read(connection, name)
        assert found is not None
        assert (found.name, found.plugin, found.database) == (name, "pgoutput", database.name)
        assert found.confirmed_flush_lsn == lsn
        assert found.restart_lsn is not None
        assert found.restart_lsn <= lsn
        assert found.retained_bytes is not None
        assert not found.active
        assert not found.temporary
        assert found.wal_status == "reserved"
        assert name in [each.name for each in slot.inactive(connection)]
        with pytest.raises(SourceError, match="already exists") as caught:
            slot.create(pgconn, name)
        assert caught.value.sqlstate == "42710"
        assert slot.drop(connection, name)
        assert not slot.drop(connection, name)
    pgconn.finish()


def test_a_temporary_slot_exports_a_snapshot_at_its_position(database: Database) -> None:
    """K3: importers outlive the slot."""
    database.execute("CREATE TABLE t (id int); INSERT INTO t VALUES (1)")
    name = f"x_{database.name[-8:]}"
    pgconn = connect_replication(database.dsn)
    lsn, snapshot = slot.create_temporary(pgconn, name)
    assert lsn > 0
    database.execute("INSERT INTO t VALUES (2)")
    with connect(database.dsn) as connection:
        connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        connection.execute(f"SET TRANSACTION SNAPSHOT '{snapshot}'".encode())
        found = slot.read(connection, name)
        assert found is not None
        assert found.temporary
        slot.drop_on(pgconn, name)
        assert connection.execute("SELECT array_agg(id) FROM public.t").fetchall() == [([1],)]
        connection.execute("COMMIT")
        assert slot.read(connection, name) is None
    pgconn.finish()


def test_identify(database: Database) -> None:
    pgconn = connect_replication(database.dsn)
    system = slot.identify(pgconn)
    ((identifier,),) = database.execute("SELECT system_identifier::text FROM pg_control_system()")
    assert (system.system_identifier, system.dbname) == (identifier, database.name)
    assert system.timeline >= 1
    assert system.lsn > 0
    pgconn.finish()


def test_creation_waits_for_writers_and_names_them(database: Database) -> None:
    """K2: sessions and prepared transactions, in any database; the wait can be given up."""
    database.execute("CREATE TABLE t (id int)")
    writer = database.connect(autocommit=False)
    writer.execute("INSERT INTO t VALUES (1)")
    seen: list[list[slot.Blocker]] = []
    pgconn = connect_replication(database.dsn)
    with connect(database.dsn) as connection:

        def give_up(waited_s: float) -> None:
            seen.append(slot.blockers(connection))
            raise TimeoutError(waited_s)

        with pytest.raises(TimeoutError):
            slot.create(pgconn, f"s_{database.name[-8:]}", give_up)
        pids = [blocker.pid for blocker in seen[0]]
        assert writer.info.backend_pid in pids
        description = seen[0][pids.index(writer.info.backend_pid)].description
        assert database.name in description
        assert slot.read(connection, f"s_{database.name[-8:]}") is None
        made: list[int] = []
        creation = threading.Thread(target=lambda: made.append(slot.create(pgconn, f"s_{database.name[-8:]}")))
        creation.start()
        time.sleep(0.3)
        assert not made
        writer.commit()
        creation.join(20)
        assert made
    pgconn.finish()


def test_prepared_transactions_are_named(database: Database) -> None:
    with connect(database.dsn) as connection:
        if connection.execute("SHOW max_prepared_transactions").fetchall() == [("0",)]:
            pytest.skip("the server takes no prepared transactions")
        database.execute("CREATE TABLE t (id int)")
        with database.connect() as other:
            other.execute("BEGIN")
            other.execute("INSERT INTO t VALUES (1)")
            other.execute("PREPARE TRANSACTION 'two phases'")
            found = [blocker for blocker in slot.blockers(connection) if blocker.pid is None]
            assert "two phases" in found[0].description
            other.execute("ROLLBACK PREPARED 'two phases'")


def test_a_slot_of_an_unknown_plugin_is_read_too(database: Database) -> None:
    name = f"p_{database.name[-8:]}"
    database.execute(f"SELECT pg_create_physical_replication_slot('{name}')")
    with connect(database.dsn) as connection:
        found = slot.read(connection, name)
        assert found is not None
        assert (found.plugin, found.database, found.restart_lsn, found.retained_bytes) == (None, None, None, None)
        slot.drop(connection, name)
