"""Bad input: whatever is wrong is said in one line, with one hint and the exit status promised, and nothing is lost.

After each refusal the same consumer, put right, brings everything in. Scenarios J10, J11, J14, J16, J17, L5.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from urllib.parse import quote

import duckdb
import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from cdc.embedded import EmbeddedServer
from cdc.installation import installations
from cdc.source.connection import connect_replication, run_command
from tests.conftest import REQUIRED_MAJOR, Database, Lake, _drop
from tests.integration.refusals import Middleman, call, complete, eventually, fatal, reader, refused, rows, spawn, took
from tests.mirror import Consumer, differences, states, warehouse_rows
from tests.program import spawned

pg18 = pytest.mark.parametrize("server", [18], indirect=True, ids=["pg18"])

PASSWORD = "hunter2 @/%?"
SECRETS = (PASSWORD, "hunter2", quote(PASSWORD, safe=""))

SLOT = (
    "SELECT active_pid, (confirmed_flush_lsn - '0/0')::int8, plugin::text FROM pg_replication_slots "
    "WHERE slot_name = 'cdc'"
)
MADE = "SELECT (SELECT count(*) FROM pg_replication_slots), (SELECT count(*) FROM pg_publication)"


@pytest.fixture(scope="module")
def _guarded_server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer(installations()[REQUIRED_MAJOR], password=PASSWORD) as server:
        yield server


@pytest.fixture
def guarded(_guarded_server: EmbeddedServer) -> Iterator[Database]:
    """A fresh database on a server that asks for a password, and stops for nobody else."""
    server = _guarded_server
    name = f"guarded_{secrets.token_hex(4)}"
    server.psql(f"CREATE DATABASE {name} TEMPLATE template0")
    database = Database(server, name, server.dsn(name), [])
    yield database
    database.close()
    server.start()
    _drop(database)


@pytest.fixture
def role(database: Database) -> Iterator[str]:
    """A role that may log in and replicate, and nothing else."""
    name = f"r_{database.name[-8:]}"
    database.execute(f"CREATE ROLE {name} LOGIN REPLICATION")
    yield name
    database.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")


def keeps_secrets(done: subprocess.CompletedProcess[str]) -> None:
    """Assert that no password is in what was printed."""
    for secret in SECRETS:
        assert secret not in done.stdout + done.stderr


def checkpoint(lake: Lake) -> int:
    """Return the position up to which everything is in the warehouse."""
    ((lsn,),) = warehouse_rows(lake, "SELECT lsn FROM _cdc.checkpoint")
    assert isinstance(lsn, int)
    return lsn


def not_confirmed_beyond(database: Database, lake: Lake) -> None:
    """Assert that Postgres still has all that the warehouse has not."""
    ((_, confirmed, _),) = database.execute(SLOT)
    assert confirmed <= checkpoint(lake)


# The source


def test_dsn_that_leads_nowhere(guarded: Database, lake: Lake) -> None:
    """J17: no such host, port, socket, database or user."""
    rows(guarded, 1)
    for changes, words, hint in (
        ({"host": "nowhere.invalid"}, "nowhere.invalid", "check the host"),
        ({"port": "1"}, "server 127.0.0.1:1: Connection refused", "is the server running there"),
        ({"host": "/nowhere"}, "No such file", "Unix socket"),
        ({"dbname": "nothing_here"}, 'database "nothing_here" does not exist', "the name of the database"),
        ({"user": "nobody_here"}, 'password authentication failed for user "nobody_here"', "check the password"),
        ({"sslmode": "require"}, "SSL", "sslmode"),
    ):
        done = call(lake, make_conninfo(guarded.dsn, **changes), "run", "--once")
        error, advice = refused(done)
        assert words in error
        assert hint in advice
        keeps_secrets(done)
    assert not lake.warehouse.exists()
    complete(guarded, lake)


def test_dsn_that_cannot_be_read(guarded: Database, lake: Lake) -> None:
    """J17: exit status 2, and what could be a password is not repeated, wherever it slipped to."""
    rows(guarded, 1)
    for dsn in (
        "postgresql://u:hunter2@[h/d",
        "postgres:/u:hunter2@h/d",
        "mysql://u:hunter2@h/d",
        "postgresql://u:hunter2@h:port/d",
        "postgresql://u:hunter2/@h:5432/d",
        "postgresql://u:a hunter2@h/d",
        "postgresql://u:hunter2%zz@h/d",
        "postgresql://u:hunter2@h/d?sslmod=require",
        "postgresql://u:hunter2@h/d?connect_timeout=soon",
        "password=hunter2 nonsense=1",
        "PASSWORD=hunter2",
        "host=h port=x password hunter2",
        "postgresql://h:99999/d",
    ):
        done = call(lake, dsn, "--debug", "run", "--once")
        assert done.returncode == 2, f"{dsn}: {done.stderr}"
        keeps_secrets(done)
        traceback, _, said = done.stderr.partition("\nerror: ")
        assert "Traceback" in traceback
        assert said.startswith("CDC_DSN is no connection string"), said
        assert "hint: write it as postgresql://" in said
    assert "at least" not in refused(call(lake, "nonsense=1", "run"), 2)[0]
    complete(guarded, lake)


def test_wrong_password(guarded: Database, lake: Lake) -> None:
    """J17, J18: every command that connects; a traceback comes with --debug alone, wherever that stands."""
    rows(guarded, 1)
    wrong = guarded.dsn.replace(quote(PASSWORD, safe=""), "hunter2wrong")
    complete(guarded, lake)
    for command in (
        ["run"],
        ["run", "--once", "--fresh"],
        ["status", "--json"],
        ["check"],
        ["setup"],
        ["teardown"],
        ["resync", "--all"],
    ):
        done = call(lake, wrong, *command)
        error, hint = refused(done)
        assert 'password authentication failed for user "postgres"' in error
        assert "check the password" in hint
        keeps_secrets(done)
    done = call(lake, wrong, "run", "--debug")
    assert (done.returncode, done.stderr.count("Traceback")) == (1, 1)
    assert done.stderr.splitlines()[-2].startswith("error: ")
    keeps_secrets(done)
    error, _ = refused(
        call(lake, make_conninfo("", host="127.0.0.1", port=guarded.server.port, user="postgres"), "run")
    )
    assert "no password supplied" in error
    rows(guarded, 2)
    said = complete(guarded, lake)
    assert not any(secret in said for secret in SECRETS)
    for path in lake.root.rglob("*"):
        assert path.is_dir() or b"hunter2" not in path.read_bytes(), path


def test_wal_level(guarded: Database, lake: Lake) -> None:
    """J17."""
    rows(guarded, 1)
    guarded.server.restart(wal_level="replica")
    assert guarded.execute("SHOW wal_level") == [("replica",)]
    error, hint = refused(call(lake, guarded.dsn, "run"))
    assert error == "wal_level is replica, not logical"
    assert "ALTER SYSTEM SET wal_level = 'logical'" in hint
    assert guarded.execute(MADE) == [(0, 0)]
    guarded.server.restart(wal_level="logical")
    complete(guarded, lake)


def test_older_postgres(database: Database, lake: Lake) -> None:
    """J17: what is too old is refused by its name, before anything is asked that it would not understand."""
    rows(database, 1)
    with Middleman(database.dsn, version="14.12") as old:
        error, hint = refused(call(lake, old.dsn, "run"))
        assert old.forwarded
        assert error == "PostgreSQL 14 is older than 15, the oldest that is supported"
        assert "upgrade the server" in hint
        found = call(lake, old.dsn, "check")
        assert (found.returncode, error in found.stdout) == (3, True)
    complete(database, lake)


@pg18
@pytest.mark.parametrize("parameter", ["options", "replication"])
def test_port_of_a_pooler(database: Database, lake: Lake, parameter: str) -> None:
    """J17: PgBouncer takes neither our settings nor, where those are ignored, `replication`."""
    rows(database, 1)
    words = {
        "options": "unsupported startup parameter in options: datestyle",
        "replication": "unsupported startup parameter: replication",
    }[parameter]

    def answer(startup: bytes) -> bytes | None:
        return fatal(words) if b"\0" + parameter.encode() + b"\0" in startup else None

    with Middleman(database.dsn, answer) as pooler:
        error, hint = refused(call(lake, pooler.dsn, "run"))
        assert words in error
        assert "a connection pooler is in between: use the port of the server itself" in hint
        assert pooler.refused
        assert bool(pooler.forwarded) == (parameter == "replication")
        found = call(lake, pooler.dsn, "check")
        if parameter == "replication":
            assert found.returncode == 3
            assert words in found.stdout
        else:
            refused(found)
    assert database.execute(MADE) == [(0, 0)]
    complete(database, lake)


# Rights


def test_role_that_may_not_replicate(database: Database, lake: Lake, role: str) -> None:
    """J17: the hint is the statement that mends it."""
    rows(database, 1)
    database.execute(f"ALTER ROLE {role} NOREPLICATION; GRANT CREATE ON DATABASE {database.name} TO {role}")
    database.execute(f"ALTER TABLE t OWNER TO {role}")
    dsn = make_conninfo(database.dsn, user=role)
    error, hint = refused(call(lake, dsn, "run"))
    assert error == f"role {role} may not replicate"
    assert database.execute(MADE) == [(0, 0)]
    database.execute(hint.partition(";")[0])
    complete(database, lake, dsn)


def test_table_that_may_not_be_read(database: Database, lake: Lake, role: str) -> None:
    """J17, K9: at the first start nothing begins without it; later on its copy is not needed any more."""
    rows(database, 1)
    database.execute(f"CREATE TABLE other (id int PRIMARY KEY); GRANT SELECT ON other TO {role}")
    assert call(lake, database.dsn, "setup", "--apply", "--role", role).returncode == 0
    database.execute(f"REVOKE SELECT ON t FROM {role}")
    dsn = make_conninfo(database.dsn, user=role)
    for _ in range(2):
        error, hint = refused(call(lake, dsn, "run", "--once"))
        assert error == "no right to read table public.t"
        assert hint == f'GRANT SELECT ON "public"."t" TO "{role}"'
        assert database.execute(MADE) == [(0, 2)]
        duckdb.connect(str(lake.warehouse)).close()  # what a start that is refused later leaves
    database.execute(hint)
    complete(database, lake, dsn)
    database.execute(f"REVOKE SELECT ON t FROM {role}")
    rows(database, 2)
    complete(database, lake, dsn)


def test_publication_that_may_not_be_made(database: Database, lake: Lake, role: str) -> None:
    """J17: the hint names `cdc setup`, and what that prints is enough."""
    rows(database, 1)
    dsn = make_conninfo(database.dsn, user=role)
    ((may,),) = database.execute("SELECT has_database_privilege(%s, current_database(), 'CREATE')", [role])
    assert not may
    error, hint = refused(call(lake, dsn, "run"))
    assert error == "publication cdc is missing, and we may not create it"
    assert "`cdc setup`" in hint
    assert database.execute(MADE) == [(0, 0)]
    database.psql(call(lake, database.dsn, "setup", "--role", role).stdout)
    complete(database, lake, dsn)


def test_publication_of_tables_that_are_not_ours(database: Database, lake: Lake, role: str) -> None:
    """J17: CREATE on the database is not enough to publish somebody else's table."""
    rows(database, 1)
    database.execute(f"GRANT CREATE ON DATABASE {database.name} TO {role}; GRANT SELECT ON t TO {role}")
    dsn = make_conninfo(database.dsn, user=role)
    error, hint = refused(call(lake, dsn, "run"))
    assert error == "table public.t is not ours to publish"
    assert database.execute(MADE) == [(0, 0)]
    database.execute(hint.removeprefix("as its owner: "))
    complete(database, lake, dsn)


# The lake

# Drops CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH by PR_CAPBSET_DROP.
_DROP_PRIVILEGE = """
import ctypes, os, sys
if os.geteuid() == 0:
    for capability in (1, 2):
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)
os.execv(sys.executable, [sys.executable, "-c", *sys.argv[1:]])
"""
WITHOUT_PRIVILEGE = (sys.executable, "-c", _DROP_PRIVILEGE, "from cdc.cli import main; main()")
"""`cdc` as a user whom the permissions of files bind, which they do not bind root."""


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Make the consumers of this test respect the permissions of files."""
    folder = tmp_path / "probe"
    folder.mkdir()
    folder.chmod(0o555)
    program = [*WITHOUT_PRIVILEGE[:3], f"open({str(folder / 'probe')!r}, 'w')"]
    probe = subprocess.run(program, capture_output=True, text=True, check=False)
    if "PermissionError" not in probe.stderr:
        pytest.skip("root's right to write everywhere cannot be taken away here")
    monkeypatch.setattr("tests.mirror.start", partial(spawned, program=WITHOUT_PRIVILEGE))


@pg18
@pytest.mark.parametrize("what", ["warehouse", "history"])
def test_unwritable_place(database: Database, lake: Lake, what: str) -> None:
    """L5: below a file, and where nobody may make a file."""
    rows(database, 1)
    (lake.root / "file").write_text("mine")
    for place in (lake.root / "file" / "x", Path("/proc/x"), Path("/proc/1/x/y")):
        error, hint = refused(call(lake, database.dsn, "run", **{what: str(place)}))
        assert "cannot be written" in error
        assert f"CDC_{what.upper()}" in hint
        ((slots, _),) = database.execute(MADE)
        assert slots == 0
        found = call(lake, database.dsn, "check", **{what: str(place)})
        assert (found.returncode, f"set CDC_{what.upper()}" in found.stdout) == (3, True), found.stdout
    assert (lake.root / "file").read_text() == "mine"
    complete(database, lake)


@pg18
@pytest.mark.usefixtures("bound")
def test_folder_that_may_not_be_written(database: Database, lake: Lake) -> None:
    """L5: permissions, for warehouse and history."""
    rows(database, 1)
    folder = lake.root / "theirs"
    folder.mkdir()
    folder.chmod(0o555)
    for what in ({"warehouse": str(folder / "w.duckdb")}, {"history": str(folder / "history")}):
        error, _ = refused(spawn(lake, database.dsn, "run", **what))
        assert str(folder) in error
        assert "cannot be written: Permission denied" in error
    complete(database, lake)
    lake.warehouse.chmod(0o444)
    rows(database, 2)
    error, hint = refused(spawn(lake, database.dsn, "run"))
    assert "Permission denied" in error
    assert "CDC_WAREHOUSE" in hint
    lake.warehouse.chmod(0o644)
    complete(database, lake)


@pg18
@pytest.mark.usefixtures("bound")
def test_history_that_becomes_unwritable(database: Database, lake: Lake) -> None:
    """L5, J4: the consumer stops in mid-stream, and nothing of the batch is in the warehouse, or confirmed."""
    rows(database, 1)
    complete(database, lake)
    before = checkpoint(lake)
    folder = lake.history / "public" / "t"
    with Consumer(lake, database.dsn) as consumer:
        eventually(consumer, lambda: "streaming" in consumer.output)
        folder.chmod(0o555)
        rows(database, 2)
        assert consumer.wait(30) == 1
        assert consumer.output.count("error: ") == consumer.output.count("hint: ") == 1
        assert f"history {lake.history} cannot be written: Permission denied" in consumer.output
        assert "Traceback" not in consumer.output
    folder.chmod(0o755)
    assert warehouse_rows(lake, "SELECT id FROM public.t") == [(1,)]
    assert before <= checkpoint(lake)
    not_confirmed_beyond(database, lake)
    complete(database, lake)


LIMITED = (
    "import resource, sys; size = int(sys.argv.pop(1)); resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)); "
    "from cdc.cli import main; main()"
)

BULK = (
    "INSERT INTO t SELECT i, (SELECT string_agg(md5((i * j)::text), '') FROM generate_series(1, 20) j) "
    "FROM generate_series(10, 4000) i"
)
"""2.5 MB that do not compress."""


@pg18
@pytest.mark.parametrize(
    ("phase", "size", "history", "file"),
    [
        ("first start", 6_000, False, ".new"),
        ("copy", 300_000, True, "history"),
        ("copy", 14_000, False, ".wal"),
        ("copy", 300_000, False, ".wal"),
        ("stream", 300_000, True, "history"),
        ("stream", 300_000, False, ".wal"),
    ],
)
def test_no_room(
    database: Database,
    lake: Lake,
    monkeypatch: pytest.MonkeyPatch,
    phase: str,
    size: int,
    history: bool,
    file: str,
) -> None:
    """L5: no file may grow beyond a limit, as under a quota: in the history, in DuckDB, at its very creation."""
    settings = {} if history else {"history": ""}
    rows(database, 1)
    if phase == "stream":
        complete(database, lake, **settings)
    if phase != "first start":
        database.execute(BULK)
    with monkeypatch.context() as limit:
        limit.setattr("tests.mirror.start", partial(spawned, program=(sys.executable, "-c", LIMITED, str(size))))
        error, hint = refused(spawn(lake, database.dsn, "run", "--once", **settings))
    assert "File too large" in error
    assert file in error
    assert "free some space on the disk" in hint
    if phase == "stream":
        assert warehouse_rows(lake, "SELECT id FROM public.t") == [(1,)]
        not_confirmed_beyond(database, lake)
    rows(database, 2)
    complete(database, lake, **settings)
    assert not list(lake.root.rglob("*.tmp"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("no file system can be mounted here; test_no_room has another way to run out of space")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pg18
@pytest.mark.parametrize("history", [True, False], ids=["history", "no history"])
def test_disk_that_fills_up(database: Database, small_disk: Path, tmp_path: Path, history: bool) -> None:
    """L5, J4: a running consumer meets ENOSPC, and goes on where it was once there is room."""
    root = small_disk / "lake"
    root.mkdir()
    elsewhere = tmp_path / "logs"
    elsewhere.mkdir()
    lake = Lake(elsewhere, root / "warehouse.duckdb", root / "history")
    settings = {} if history else {"history": ""}
    rows(database, 1)
    complete(database, lake, **settings)
    with Consumer(lake, database.dsn, flush_interval="0.1", **settings) as consumer:
        eventually(consumer, lambda: "streaming" in consumer.output)
        for begin in itertools.count(1, 4000):
            database.execute(BULK.replace("generate_series(10, 4000)", f"generate_series({begin + 9}, {begin + 3999})"))
            if begin > 12000 or not consumer.running:
                break
        assert consumer.wait(60) == 1
        assert "o space left on device" in consumer.output, consumer.output
        assert consumer.output.count("error: ") == consumer.output.count("hint: ") == 1
        assert "free some space on the disk" in consumer.output
        assert "Traceback" not in consumer.output
    ballast = small_disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as out:
        while True:
            out.write(b"x" * 4096)
    refused(call(lake, database.dsn, "run", "--once", **settings))
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    not_confirmed_beyond(database, lake)
    complete(database, lake, **settings)


def test_second_consumer(database: Database, lake: Lake) -> None:
    """J10: refused at once, also with other settings; the first goes on."""
    rows(database, 1)
    with Consumer(lake, database.dsn, flush_interval="0.1") as first:
        eventually(first, lambda: states(lake).get("public.t") == "streaming")
        for command in (["run"], ["run", "--once"], ["run", "--fresh"]):
            error, hint = refused(call(lake, database.dsn, *command, slot="another"))
            assert error == f"warehouse {lake.warehouse} already has a consumer (process {first.pid})"
            assert "stop that one first" in hint
        ((pid, _, _),) = database.execute(SLOT)
        assert pid is not None
        rows(database, 2)
        eventually(first, lambda: len(warehouse_rows(lake, "FROM public.t")) == 2)
        assert first.stop() == 0
    complete(database, lake)


@pg18
def test_warehouse_that_is_being_read(database: Database, lake: Lake) -> None:
    """L5: a reader is waited for, by its PID, at the start and in between; when it leaves, everything comes in."""
    rows(database, 1)
    complete(database, lake)
    rows(database, 2)
    with reader(lake.warehouse) as pid, Consumer(lake, database.dsn, flush_interval="0.1") as consumer:
        eventually(consumer, lambda: "waiting for the warehouse" in consumer.output)
        assert f"held by process {pid}" in consumer.output
        assert "close the program that has the file open" in consumer.output
        assert "streaming" not in consumer.output
        not_confirmed_beyond(database, lake)
    with Consumer(lake, database.dsn, flush_interval="0.1") as consumer:
        eventually(consumer, lambda: len(warehouse_rows(lake, "FROM public.t")) == 2)
        with reader(lake.warehouse) as pid:
            rows(database, 3)
            eventually(consumer, lambda: f"held by process {pid}" in consumer.output)
            assert "waiting for the warehouse" in consumer.output
            rows(database, 4)
            assert consumer.running
            not_confirmed_beyond(database, lake)
        eventually(consumer, lambda: len(warehouse_rows(lake, "FROM public.t")) == 4)
        assert consumer.stop() == 0
    assert "error" not in consumer.output
    complete(database, lake)


# Settings


@pg18
def test_settings_that_nobody_knows(database: Database, lake: Lake) -> None:
    """In the environment, in cdc.toml, as a flag: exit status 2, and the one that may have been meant."""
    rows(database, 1)
    assert refused(call(lake, database.dsn, "run", flush_row="1"), 2) == (
        "unknown setting CDC_FLUSH_ROW",
        "did you mean CDC_FLUSH_ROWS?",
    )
    error, hint = refused(call(lake, database.dsn, "run", "--flush-row", "1"), 2)
    assert "No such option '--flush-row'" in error
    assert "cdc run --help" in hint
    file = lake.root / "cdc.toml"
    for text, words, advice in (
        ("flush_row = 1\n", "unknown setting flush_row in cdc.toml", "did you mean flush_rows?"),
        ("CDC_FLUSH_ROWS = 1\n", "unknown setting CDC_FLUSH_ROWS in cdc.toml", "did you mean flush_rows?"),
        ("flush_rows = \n", "cdc.toml cannot be read", "mend the file"),
        ("slot = '\xe9'\n", "cdc.toml cannot be read", "mend the file"),
        ("flush_rows = 'many'\n", "CDC_FLUSH_ROWS: must be a valid integer, and is 'many'", "number of changes"),
    ):
        file.write_bytes(text.encode("latin-1"))
        error, hint = refused(call(lake, database.dsn, "run"), 2)
        assert words in error
        assert advice in hint
    file.unlink()
    complete(database, lake)


@pg18
def test_settings_of_no_use(database: Database, lake: Lake) -> None:
    """Exit status 2, with the name of the setting and what it means, by environment and by flag."""
    rows(database, 1)
    for name, value, words in (
        ("flush_interval", "soon", "not a duration such as 1s or 200ms: 'soon'"),
        ("flush_bytes", "lots", "not a size such as 64MB: 'lots'"),
        ("slot", "No-Slot", "must match pattern"),
        ("deletes", "never", "must be 'hard' or 'soft', and is 'never'"),
        ("warehouse", "", "must be the path of a file"),
    ):
        said = refused(call(lake, database.dsn, "run", **{name: value}), 2)
        assert said[0].startswith(f"CDC_{name.upper()}: ")
        assert words in said[0]
        assert said[1].startswith("what it means: ")
        assert refused(call(lake, database.dsn, "run", f"--{name.replace('_', '-')}", value), 2) == said
    complete(database, lake)


@pg18
def test_settings_that_contradict_the_warehouse(database: Database, lake: Lake) -> None:
    """What a warehouse was begun with stays; each refusal says how to get what was asked for."""
    rows(database, 1)
    complete(database, lake)
    before = database.execute(MADE)
    for settings, words in (
        ({"slot": "another"}, "CDC_SLOT is another, but"),
        ({"publication": "another"}, "CDC_PUBLICATION is another, but"),
        ({"deletes": "soft"}, "CDC_DELETES is soft, but table public.t was copied with hard"),
    ):
        error, hint = refused(call(lake, database.dsn, "run", **settings), 2)
        assert words in error
        assert "set" in hint
        assert database.execute(MADE) == before
    rows(database, 2)
    complete(database, lake)
    assert "cdc resync --all" in hint
    assert call(lake, database.dsn, "resync", "--all", deletes="soft").returncode == 0
    assert call(lake, database.dsn, "run", "--once", deletes="soft").returncode == 0
    assert warehouse_rows(lake, "SELECT id, _deleted_at FROM public.t ORDER BY id") == [(1, None), (2, None)]


# What does not belong together


def test_warehouse_of_another_database(database: Database, guarded: Database, lake: Lake) -> None:
    """J14: another database of the server, and one of the same name on another server; nothing is made there."""
    rows(database, 1)
    complete(database, lake)
    other = f"{database.name[:40]}_other"
    database.execute(f"CREATE DATABASE {other} TEMPLATE template0")
    guarded.execute(f"CREATE DATABASE {database.name} TEMPLATE template0")
    try:
        for dsn in (database.server.dsn(other), guarded.server.dsn(database.name)):
            with psycopg.connect(dsn, autocommit=True) as connection:
                connection.execute("CREATE TABLE t (id int PRIMARY KEY, v text)")
                before = connection.execute(MADE).fetchall()
                for command in (["run"], ["run", "--once"], ["resync", "--all"]):
                    error, hint = refused(call(lake, dsn, *command))
                    assert f"mirrors database {database.name} of system" in error
                    assert "CDC_DSN leads to" in error
                    assert "set CDC_DSN back" in hint
                assert connection.execute(MADE).fetchall() == before
                found = call(lake, dsn, "check")
                assert found.returncode == 3
                assert "CDC_DSN leads to" in found.stdout or f"belongs to database {database.name}" in found.stdout
    finally:
        database.execute(f"DROP DATABASE {other}")
        guarded.execute(f"DROP DATABASE {database.name}")
    rows(database, 2)
    complete(database, lake)


@pg18
@pytest.mark.parametrize("kind", ["TABLE", "VIEW"])
def test_duckdb_file_with_a_table_in_our_place(database: Database, lake: Lake, kind: str) -> None:
    """A file that is not ours keeps what it has, with --fresh too; what is not in our way may be there."""
    rows(database, 1)
    with duckdb.connect(str(lake.warehouse)) as theirs:
        theirs.execute(f"CREATE SCHEMA public; CREATE {kind} public.T AS SELECT 42 AS answer")
        theirs.execute("CREATE TABLE public.other AS SELECT 43 AS answer")
    for command in (["run"], ["run", "--fresh"]):
        error, hint = refused(call(lake, database.dsn, *command))
        assert error == f"DuckDB file {lake.warehouse} has a public.t that cdc did not make and would have to replace"
        assert "set CDC_WAREHOUSE to another file" in hint
    for command in (["status"], ["resync", "--all"]):
        error, _ = refused(call(lake, database.dsn, *command))
        assert error == f"{lake.warehouse} is no warehouse of cdc"
    ((slots, _),) = database.execute(MADE)
    assert slots == 0
    assert warehouse_rows(lake, "FROM public.t") == [(42,)]
    with duckdb.connect(str(lake.warehouse)) as theirs:
        theirs.execute(f"DROP {kind} public.t")
    complete(database, lake)
    assert warehouse_rows(lake, "FROM public.other") == [(43,)]


@pg18
def test_table_of_somebody_else_that_comes_in_our_place_later(database: Database, lake: Lake) -> None:
    """One table's trouble is its own: the new table is put aside, what is there stays, and the others go on."""
    rows(database, 1)
    complete(database, lake)
    with duckdb.connect(str(lake.warehouse)) as theirs:
        theirs.execute("CREATE TABLE public.report AS SELECT 42 AS answer")
    database.execute("CREATE TABLE report (id int PRIMARY KEY); INSERT INTO report VALUES (1)")
    rows(database, 2)
    with Consumer(lake, database.dsn, flush_interval="0.1") as consumer:
        eventually(consumer, lambda: states(lake).get("public.report") == "error")
        assert "DuckDB has a public.report that cdc did not make" in consumer.output
        assert warehouse_rows(lake, "FROM public.report") == [(42,)]
        rows(database, 3)
        eventually(consumer, lambda: len(warehouse_rows(lake, "FROM public.t")) == 3)
        assert consumer.stop() == 0
    with duckdb.connect(str(lake.warehouse)) as theirs:
        theirs.execute("ALTER TABLE public.report RENAME TO my_report")
    assert call(lake, database.dsn, "resync", "public.report").returncode == 0
    complete(database, lake)
    assert differences(database, lake, "public.report", ["id"]) == ""
    assert warehouse_rows(lake, "FROM public.my_report") == [(42,)]


@pg18
def test_file_that_is_no_duckdb_file(database: Database, lake: Lake) -> None:
    """It stays as it is, whatever the command."""
    rows(database, 1)
    mine = lake.root / "letter.txt"
    mine.write_text("Dear Sirs,\n" * 1000)
    for command in (["run"], ["run", "--fresh"], ["status"], ["query", "SELECT 1"], ["resync", "--all"]):
        error, hint = refused(call(lake, database.dsn, *command, warehouse=str(mine)))
        assert "not a valid DuckDB database file" in error
        assert "CDC_WAREHOUSE must name a DuckDB file" in hint
    error, _ = refused(call(lake, database.dsn, "run", warehouse=str(lake.root)))
    assert f"warehouse {lake.root} cannot be opened" in error
    assert mine.read_text() == "Dear Sirs,\n" * 1000
    assert database.execute(MADE) == [(0, 0)]
    complete(database, lake)


@pg18
def test_warehouse_of_a_newer_version(database: Database, lake: Lake) -> None:
    """It is refused, not downgraded."""
    rows(database, 1)
    complete(database, lake)
    with duckdb.connect(str(lake.warehouse)) as later:
        later.execute("UPDATE _cdc.meta SET format = format + 1")
    error, hint = refused(call(lake, database.dsn, "run"))
    assert "was written by a newer cdc" in error
    assert hint == "upgrade pg-duckdb-cdc"
    with duckdb.connect(str(lake.warehouse)) as later:
        later.execute("UPDATE _cdc.meta SET format = format - 1")
    rows(database, 2)
    complete(database, lake)


def test_slot_without_warehouse(database: Database, lake: Lake) -> None:
    """J11: it may be somebody else's: it is left alone, unless --fresh says that it is ours to take."""
    rows(database, 1)
    database.execute("SELECT pg_create_logical_replication_slot('cdc', 'pgoutput')")
    rows(database, 2)
    before = database.execute(SLOT)
    for _ in range(2):
        error, hint = refused(call(lake, database.dsn, "run"))
        assert error == f"replication slot cdc exists, but warehouse {lake.warehouse} knows nothing of it"
        assert "cdc run --fresh" in hint
    found = call(lake, database.dsn, "check")
    assert (found.returncode, error in found.stdout) == (3, True), found
    assert database.execute(SLOT) == before
    assert call(lake, database.dsn, "run", "--once", "--fresh").returncode == 0
    complete(database, lake)


@pg18
def test_history_without_warehouse(database: Database, lake: Lake) -> None:
    """The change log of a warehouse that is gone is set aside, not mixed with the next one's."""
    rows(database, 1)
    complete(database, lake)
    lake.warehouse.unlink()
    database.execute("SELECT pg_drop_replication_slot('cdc')")
    kept = {path.name: path.read_bytes() for path in lake.history.rglob("*.parquet")}
    assert kept
    error, hint = refused(call(lake, database.dsn, "run"))
    assert error == f"history {lake.history} holds the change log of another warehouse"
    assert "cdc run --fresh" in hint
    assert call(lake, database.dsn, "run", "--once", "--fresh").returncode == 0
    complete(database, lake)
    (aside,) = lake.root.glob("history-*")
    assert {path.name: path.read_bytes() for path in aside.rglob("*.parquet")} == kept


def test_slot_that_is_gone(database: Database, lake: Lake) -> None:
    """J11: never made anew by itself; `resync --all` and a run make it whole, deleted rows too."""
    rows(database, 1, 2)
    complete(database, lake)
    database.execute("SELECT pg_drop_replication_slot('cdc'); DELETE FROM t WHERE id = 1; UPDATE t SET v = 'new'")
    rows(database, 3)
    for _ in range(2):
        error, hint = refused(call(lake, database.dsn, "run", "--once"))
        assert error == "replication slot cdc is gone: changes may be missing"
        assert "`cdc resync --all`, and then `cdc run`" in hint
        assert database.execute(SLOT) == []
    found = call(lake, database.dsn, "check")
    assert (found.returncode, error in found.stdout) == (3, True), found
    assert call(lake, database.dsn, "resync", "--all").returncode == 0
    assert len(warehouse_rows(lake, "FROM public.t")) == 2, "readers see the old content until the new one is there"
    complete(database, lake)


@pg18
@pytest.mark.slow
def test_slot_in_use(database: Database, lake: Lake) -> None:
    """J10: waited for as long as the server takes to notice that a consumer is gone, then refused, by its PID."""
    rows(database, 1)
    complete(database, lake)
    rows(database, 2)
    patient = make_conninfo(database.dsn, options="-c wal_sender_timeout=7s")
    elsewhere = connect_replication(database.dsn)
    try:
        run_command(
            elsewhere,
            "START_REPLICATION SLOT cdc LOGICAL 0/0 (proto_version '1', publication_names 'cdc')",
        )
        ((pid, confirmed, _),) = database.execute(SLOT)
        assert pid == elsewhere.backend_pid
        done: list[subprocess.CompletedProcess[str]] = []
        assert 7 < took(lambda: done.append(call(lake, patient, "run"))) < 20
        error, hint = refused(done[0])
        assert error == f"replication slot cdc is in use by process {pid} of the server"
        assert "stop the consumer that uses it" in hint
        assert f"waiting for the replication slot slot=cdc used_by={pid}" in done[0].stderr
        for command in (["run", "--fresh"], ["teardown"]):
            error, _ = refused(call(lake, patient, *command))
            assert f"in use by process {pid}" in error
        ((still, where, _),) = database.execute(SLOT)
        assert (still, where) == (pid, confirmed)
        with Consumer(lake, patient) as consumer:
            eventually(consumer, lambda: "waiting for the replication slot" in consumer.output)
            elsewhere.finish()
            eventually(consumer, lambda: len(warehouse_rows(lake, "FROM public.t")) == 2)
            assert consumer.stop() == 0
    finally:
        elsewhere.finish()
    complete(database, lake)


@pg18
@pytest.mark.parametrize("kind", ["plugin", "physical", "database"])
def test_slot_of_somebody_else(database: Database, lake: Lake, kind: str) -> None:
    """J12: what cannot be ours is never dropped or moved, not by --fresh, by `resync --all` or by `teardown` either."""
    rows(database, 1)
    complete(database, lake)
    database.execute("SELECT pg_drop_replication_slot('cdc')")
    make, words = {
        "plugin": ("pg_create_logical_replication_slot('cdc', 'test_decoding')", "has the plugin test_decoding"),
        "physical": ("pg_create_physical_replication_slot('cdc', true)", "is a physical one"),
        "database": ("pg_create_logical_replication_slot('cdc', 'pgoutput')", "belongs to database postgres"),
    }[kind]
    with psycopg.connect(database.server.dsn() if kind == "database" else database.dsn, autocommit=True) as other:
        other.execute(f"SELECT {make}".encode())
    before = database.execute(SLOT)
    try:
        for command in (["run"], ["run", "--once"], ["run", "--fresh"], ["resync", "--all"], ["teardown"]):
            error, hint = refused(call(lake, database.dsn, *command))
            assert error.startswith(f"replication slot cdc {words}"), (command, error)
            assert "CDC_SLOT" in hint
        found = call(lake, database.dsn, "check")
        assert (found.returncode, words in found.stdout) == (3, True), found
        assert database.execute(SLOT) == before
    finally:
        database.execute("SELECT pg_drop_replication_slot('cdc')")
    rows(database, 2)
    assert call(lake, database.dsn, "resync", "--all").returncode == 0
    complete(database, lake)


def test_warehouse_restored_from_an_older_copy(database: Database, lake: Lake) -> None:
    """J16: the slot is confirmed beyond it: what lies between is gone from Postgres, and is copied anew on request."""
    rows(database, 1)
    complete(database, lake)
    older = lake.warehouse.read_bytes()
    assert not lake.warehouse.with_name(lake.warehouse.name + ".wal").exists()
    rows(database, 2)
    complete(database, lake)
    lake.warehouse.write_bytes(older)
    ((_, confirmed, _),) = database.execute(SLOT)
    assert confirmed > checkpoint(lake)
    for _ in range(2):
        error, hint = refused(call(lake, database.dsn, "run", "--once"))
        assert error.startswith("replication slot cdc was confirmed up to ")
        assert "what lies between is lost" in error
        assert "`cdc resync --all`, and then `cdc run`" in hint
    found = call(lake, database.dsn, "check")
    assert (found.returncode, "was confirmed up to" in found.stdout) == (3, True), found
    assert call(lake, database.dsn, "resync", "--all").returncode == 0
    rows(database, 3)
    complete(database, lake)
