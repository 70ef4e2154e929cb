"""`cdc` in processes of its own, as Python starts it, or forked from a process that has loaded it already.

To load everything takes a second of processor time, and most tests run several commands.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import IO, Protocol

from cdc import failpoints
from cdc.cli import main

__all__ = ["PROGRAM", "Process", "Start", "forked", "run", "spawned"]

PROGRAM = (sys.executable, "-c", "from cdc.cli import main; main()")


class Process(Protocol):
    """What tests do with a running command; as of `subprocess.Popen`."""

    @property
    def pid(self) -> int:
        """Its process ID."""

    def poll(self) -> int | None:
        """Return the exit status, None: it is running."""

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status once it has ended."""

    def send_signal(self, sig: int) -> None:
        """Send a signal, unless it has ended."""


class Start(Protocol):
    """Starts a command; it writes to files, which a forked process inherits no pipe for."""

    def __call__(
        self, arguments: Sequence[str], *, env: Mapping[str, str], cwd: Path, out: IO[bytes], err: IO[bytes]
    ) -> Process:
        """Start `cdc` with `arguments`."""


def spawned(
    arguments: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: Path,
    out: IO[bytes],
    err: IO[bytes],
    program: Sequence[str] = PROGRAM,
) -> Process:
    """Start it as a program."""
    return subprocess.Popen([*program, *arguments], env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=out, stderr=err)


def forked(arguments: Sequence[str], *, env: Mapping[str, str], cwd: Path, out: IO[bytes], err: IO[bytes]) -> Process:
    """Fork it."""
    told = (list(arguments), dict(env), str(cwd), out.name, err.name)
    process = _server().Process(target=_become, args=told, daemon=True)
    process.start()
    return _Forked(process)


class _Forked:
    def __init__(self, process: ForkServerProcess) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        status = self.poll()
        assert status is not None, f"still running after {timeout} s"
        return status

    def send_signal(self, sig: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self.poll() is None:
                os.kill(self.pid, sig)


@functools.lru_cache
def _server() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "cdc.cli.group"])
    return context


def _become(arguments: list[str], env: dict[str, str], cwd: str, out: str, err: str) -> None:
    for path, number in ((out, 1), (err, 2)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    failpoints.arm(env.get("CDC_CRASH_AT", ""))
    sys.argv = ["cdc", *arguments]
    main()


def run(
    start: Start, arguments: Sequence[str], *, env: Mapping[str, str], cwd: Path, timeout_s: float
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, and return what came of it."""
    with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as err:
        process = start(arguments, env=env, cwd=cwd, out=out, err=err)
        try:
            status = process.wait(timeout_s)
        finally:
            process.send_signal(signal.SIGKILL)
        return subprocess.CompletedProcess(arguments, status, Path(out.name).read_text(), Path(err.name).read_text())
