"""What the README says one can type, typed."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cdc.cli.group import cdc
from cdc.embedded import EmbeddedServer
from cdc.settings import PREDECESSOR, Settings
from tests.conftest import Database
from tests.integration.test_compose import services
from tests.integration.test_compose_source import analytics, compose_server, dsn_of  # noqa: F401 -- fixtures
from tests.program import PROGRAM

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()


def section(title: str) -> str:
    """Return the text below a heading."""
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def shell(tmp_path: Path) -> dict[str, str]:
    """An environment in which `cdc` and `python` are ours."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, command in (("cdc", shlex.join(PROGRAM)), ("python", sys.executable)):
        (programs / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (programs / name).chmod(0o755)
    own = {name: value for name, value in os.environ.items() if not name.startswith(("CDC_", "PG", "POSTGRES_"))}
    return own | {"PATH": f"{programs}:{os.environ['PATH']}"}


def run(script: str, environment: dict[str, str], folder: Path) -> str:
    done = subprocess.run(
        ["/bin/sh", "-e", "-c", script], env=environment, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture
def shop(server: EmbeddedServer) -> Iterator[EmbeddedServer]:
    """A server with the database of the README, and the role that it makes gone afterwards."""
    server.psql("CREATE DATABASE shop")
    server.psql("CREATE TABLE orders (id int PRIMARY KEY, total numeric(10,2))", dbname="shop")
    server.psql("INSERT INTO orders SELECT i, i FROM generate_series(1, 25) AS i", dbname="shop")
    yield server
    server.psql("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE database = 'shop'")
    server.psql("DROP DATABASE shop WITH (FORCE)")
    server.psql("DROP ROLE cdc")


@pytest.mark.parametrize("server", [18], indirect=True, ids=["pg18"])
def test_your_own_database(shop: EmbeddedServer, shell: dict[str, str], tmp_path: Path) -> None:
    """From setup to the last question."""
    _, script = blocks(section("Your own database"), "sh")
    for role, user in (("owner", "postgres"), ("cdc", "cdc")):
        assert f"postgresql://{role}@localhost/shop" in script
        script = script.replace(f"postgresql://{role}@localhost/shop", shlex.quote(shop.dsn("shop", user)))
    shell["PATH"] = f"{shop.bin}:{shell['PATH']}"
    said = run(script, shell, tmp_path)
    assert "nothing stands in the way" in said
    assert "public.orders" in said
    (questions,) = blocks(section("Ask it"), "sh")
    answers = run(questions, shell, tmp_path)
    assert "25" in answers
    assert "10,10.00" in answers
    (program,) = blocks(section("Ask it"), "python")
    (tmp_path / "ask.py").write_text(program)
    assert "25" in run("python ask.py", shell, tmp_path)
    (query,) = blocks(section("Ask it"), "sql")
    assert "25" in run(f"cdc query {shlex.quote(query)}", shell, tmp_path)


def test_with_docker(analytics: Database, shell: dict[str, str], tmp_path: Path) -> None:  # noqa: F811 -- the fixture
    """Every command that is run inside of the container, with the environment that it has there."""
    (script,) = blocks(section("With Docker"), "sh")
    up, *inside = script.splitlines()
    assert up == "docker compose up --detach --build"
    shell |= {name: dsn_of(analytics, name) for name in ("CDC_DSN", "CDC_DEMO_DSN")}
    assert set(services()["cdc"]["environment"]) >= {"CDC_DSN", "CDC_DEMO_DSN"}
    run("cdc run --once", shell, tmp_path)
    prefix = "docker compose exec cdc "
    assert all(line.startswith(prefix) for line in inside)
    answers = [run(line.removeprefix(prefix), shell, tmp_path) for line in inside]
    assert "public.subscriptions" in answers[0]
    assert "soft-deleted" in answers[1]
    assert "enterprise" in answers[2]


def test_make() -> None:
    """The targets are there: CI runs `make test`, test_demo.py what `make demo` does."""
    named = {line.split()[1] for block in blocks(README, "sh") for line in block.splitlines() if line[:5] == "make "}
    assert named == {"demo", "test", "soak", "mutations", "bench"}
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert named <= set(targets)


def test_tables() -> None:
    """Every command, every setting and every variable of the predecessor is in it."""
    commands = set(re.findall(r"^\| `cdc ([a-z]+)", README, re.MULTILINE))
    assert commands == set(cdc.commands)
    listed = set(re.findall(r"`CDC_([A-Z_]+)`", section("Settings")))
    assert listed == {name.upper() for name in Settings.model_fields}
    assert all(f"`{name}`" in section("Settings") for name in PREDECESSOR)


def test_links() -> None:
    """Every file that it points to is there."""
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
