"""compose.yaml, the Dockerfile and its entrypoint: what they promise, as far as no Docker is needed to see it."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from cdc.cli.status import status
from cdc.settings import load
from tests.conftest import Database, Lake
from tests.integration.refusals import rows
from tests.mirror import warehouse_rows
from tests.program import PROGRAM

ROOT = Path(__file__).parents[2]
PROGRAM_OF_THE_IMAGE = "/opt/cdc/bin/cdc"


def services() -> Any:
    """Return the services of compose.yaml, with the defaults of its variables filled in."""
    text = re.sub(r"\$\{[A-Z_]+:-([^}]*)\}", r"\1", (ROOT / "compose.yaml").read_text())
    assert "$" not in text
    return yaml.safe_load(text)["services"]


def instructions(name: str) -> list[str]:
    """Return what follows an instruction of the Dockerfile, each time."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    return re.findall(rf"^{name} +(.*)$", text, flags=re.MULTILINE)


def test_postgres() -> None:
    """On this machine's port 5437, as analyst, with the settings and the SQL of postgres/."""
    postgres = services()["postgres"]
    assert postgres["image"] == "postgres:18"
    assert postgres["ports"] == ["127.0.0.1:5437:5432"]
    assert postgres["environment"] == {
        "POSTGRES_USER": "analyst",
        "POSTGRES_PASSWORD": "analyst",
        "POSTGRES_DB": "analytics",
    }
    mounts = dict(volume.split(":")[:2] for volume in postgres["volumes"])
    assert mounts["./postgres/init"] == "/docker-entrypoint-initdb.d"
    assert f"config_file={mounts['./postgres/postgresql.conf']}" in postgres["command"]
    assert mounts["postgres"] == "/var/lib/postgresql"
    assert "postgres" in yaml.safe_load((ROOT / "compose.yaml").read_text())["volumes"]
    # the server that runs init/ does not listen there
    assert "--host=127.0.0.1" in postgres["healthcheck"]["test"]


def test_mounts_are_there() -> None:
    """What is missing Docker would make, as an empty folder; and init/ holds nothing that is not for the image."""
    for service in services().values():
        for source in (volume.split(":")[0] for volume in service["volumes"]):
            assert not source.startswith("./") or source == "./lake" or (ROOT / source).exists(), source
    assert {path.suffix for path in (ROOT / "postgres/init").iterdir()} == {".sql"}


def test_consumer() -> None:
    """It runs as a plain user who may be chosen, with settings that it takes, and has time to end."""
    cdc = services()["cdc"]
    assert cdc["command"] == ["run"]
    assert cdc["user"] == "1000:1000"
    assert "./lake:/lake" in cdc["volumes"]
    load({}, environ=cdc["environment"])  # it would refuse a name that it does not know
    assert cdc["environment"]["CDC_WAREHOUSE"].startswith("/lake/")
    assert cdc["environment"]["CDC_HISTORY"].startswith("/lake/")
    assert int(cdc["stop_grace_period"].removesuffix("s")) > 10
    assert cdc["restart"] == "unless-stopped"
    assert cdc["depends_on"]["postgres"] == {"condition": "service_healthy"}
    text = (ROOT / "compose.yaml").read_text()
    assert 'user: "${LAKE_UID:-1000}:${LAKE_GID:-1000}"' in text
    assert 'LAKE_UMASK: "${LAKE_UMASK:-022}"' in text


def test_folder_is_given_to_the_consumer() -> None:
    """Docker makes a missing ./lake as root."""
    lake, cdc = services()["lake"], services()["cdc"]
    assert lake["entrypoint"] == ["chown", "--recursive", cdc["user"], "/lake"]
    assert lake["volumes"] == ["./lake:/lake"]
    assert cdc["depends_on"]["lake"] == {"condition": "service_completed_successfully"}
    assert lake["build"] == cdc["build"], "one image"


def test_health_check() -> None:
    """The image's and the service's are one, of a command and of options that exist."""
    test = services()["cdc"]["healthcheck"]["test"]
    (of_the_image,) = instructions("HEALTHCHECK")
    assert test == ["CMD", *json.loads(of_the_image.split("CMD ", 1)[1])]
    assert test[:3] == ["CMD", "cdc", "status"]
    options = {option for parameter in status.params for option in parameter.opts}
    assert {word for word in test if word.startswith("--")} <= options


def test_image() -> None:
    """A current Python, the extra `debezium`, no root."""
    assert tuple(map(int, instructions("ARG")[0].removeprefix("PYTHON=").split("."))) >= (3, 13)
    assert any("pip install" in command and ".[debezium]" in command for command in instructions("RUN"))
    assert instructions("USER") == ["${LAKE_UID}:${LAKE_GID}"]
    assert {argument.split("=")[0] for argument in instructions("ARG")} == {"PYTHON", "LAKE_UID", "LAKE_GID"}
    assert services()["cdc"]["build"]["args"] == {"LAKE_UID": 1000, "LAKE_GID": 1000}
    assert instructions("ENTRYPOINT") == ['["cdc"]']
    assert instructions("CMD") == ['["run"]']
    assert f"exec {PROGRAM_OF_THE_IMAGE} " in (ROOT / "docker/entrypoint.sh").read_text()


def test_image_has_what_it_copies() -> None:
    """The files are there, and .dockerignore lets them in."""
    let_in = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [
        word
        for line in instructions("COPY")
        if "--from" not in line
        for word in line.split()[:-1]
        if not word.startswith("--")
    ]
    assert sorted(copied) == sorted(let_in)
    assert all((ROOT / name).exists() for name in copied)
    assert os.access(ROOT / "docker/entrypoint.sh", os.X_OK)
    assert (ROOT / "postgres/changes.sql").samefile(ROOT / "cdc/changes.sql"), "one copy, in the package"


@pytest.mark.parametrize("machine", ["x86_64", "aarch64", "arm64"])
def test_extra_debezium(machine: str) -> None:
    """Where its only package has no wheel, the extra is empty instead of breaking the build."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (wanted,) = project["optional-dependencies"]["debezium"]
    marker = Requirement(wanted).marker
    assert marker is not None
    environment = {"platform_machine": machine, "sys_platform": "linux", "python_version": "3.13"}
    assert marker.evaluate(environment) == (machine == "x86_64")


def entrypoint(folder: Path, program: str) -> Path:
    """Return a copy of the entrypoint that runs `program`, a shell script, in the image's program's place."""
    stand_in, script = folder / "program", folder / "cdc"
    stand_in.write_text(f"#!/bin/sh\n{program}\n")
    stand_in.chmod(0o755)
    script.write_text((ROOT / "docker/entrypoint.sh").read_text().replace(PROGRAM_OF_THE_IMAGE, str(stand_in)))
    script.chmod(0o755)
    return script


@pytest.mark.parametrize(("umask", "expected"), [(None, "0022"), ("022", "0022"), ("007", "0007"), ("0", "0000")])
def test_entrypoint(tmp_path: Path, umask: str | None, expected: str) -> None:
    """It becomes the program: the same process, with its arguments and its umask, and the signals reach it."""
    script = entrypoint(tmp_path, 'trap "exit 7" TERM; umask; echo $$ "$#" "$2"; while :; do sleep 0.1; done')
    environment = {"PATH": os.environ["PATH"]} | ({} if umask is None else {"LAKE_UMASK": umask})
    with subprocess.Popen(
        [script, "query", "SELECT 'a  b'"], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == expected
        assert process.stdout.readline() == f"{process.pid} 2 SELECT 'a  b'\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 7


def test_entrypoint_refuses_a_umask_that_is_none(tmp_path: Path) -> None:
    script = entrypoint(tmp_path, "echo started")
    environment = {"PATH": os.environ["PATH"], "LAKE_UMASK": "u=rwx,nonsense"}
    done = subprocess.run([script], env=environment, capture_output=True, text=True, check=False, timeout=10)
    assert done.returncode != 0
    assert done.stdout == ""
    assert "umask" in done.stderr


@pytest.mark.parametrize("server", [18], indirect=True, ids=["pg18"])
@pytest.mark.parametrize(("umask", "others"), [("022", 0o044), ("027", 0o040), ("077", 0)])
def test_umask_rules_every_file(database: Database, lake: Lake, tmp_path: Path, umask: str, others: int) -> None:
    """What the host may open is what LAKE_UMASK says, of the warehouse and of the change log."""
    rows(database, 1, 2, 3)
    script = entrypoint(tmp_path, f'exec {PROGRAM[0]} {PROGRAM[1]} "{PROGRAM[2]}" "$@"')
    environment = lake.environment(database.dsn) | {"LAKE_UMASK": umask}
    done = subprocess.run(
        [script, "run", "--once"],
        env=environment,
        cwd=lake.root,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert warehouse_rows(lake, "SELECT count(*) FROM public.t") == [(3,)]
    assert list(lake.history.rglob("*.parquet"))
    for path in lake.root.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode & 0o044 == others, f"{path.name}: {mode:o}"
        assert mode & 0o022 == 0, f"{path.name}: {mode:o}"
