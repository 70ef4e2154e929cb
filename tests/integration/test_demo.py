"""`cdc demo`: what it shows, what it leaves, and that it leaves nothing running."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
from pathlib import Path

import duckdb
import pytest

from tests.integration.refusals import refused
from tests.mirror import until
from tests.program import PROGRAM

QUICK = ("demo", "--seconds", "8", "--events", "20000")


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*PROGRAM, *(arguments or QUICK)], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def is_over(output: str) -> None:
    """Assert that the demo's server is gone."""
    found = re.search(r"127\.0\.0\.1:(\d+)", output)
    assert found is not None, output
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(found[1]))) != 0, "the server is still there"


def consumers(folder: Path) -> list[Path]:
    """Return the processes whose environment names a warehouse in `folder`."""
    wanted = f"CDC_WAREHOUSE={folder}".encode()
    found = []
    for each in Path("/proc").glob("[0-9]*/environ"):
        try:
            if wanted in each.read_bytes():
                found.append(each)
        except OSError:
            continue
    return found


def test_the_demo_twice(tmp_path: Path) -> None:
    """It copies, streams, kills, compares and asks; a second one takes the place of the first."""
    for _ in range(2):
        output, errors = start(tmp_path).communicate(timeout=110)
        assert errors == ""
        for words in ("copied 25,001 rows", "changes/s", "slot lag", "commit to visible", "kill -9", "DuckDB", " ms"):
            assert words in output
        assert "After the kill -9" in output
        is_over(output)
    with duckdb.connect(str(tmp_path / "lake" / "demo" / "warehouse.duckdb"), read_only=True) as warehouse:
        ((events, left),) = warehouse.execute(
            "SELECT (SELECT count(*) FROM public.usage_events), count(deleted_at) FROM public.subscriptions"
        ).fetchall()
    assert events > 20000
    assert left > 0


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes by /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_an_end_in_the_middle(tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C and SIGTERM: neither server nor consumer stays."""
    demo = start(tmp_path, "demo", "--seconds", "60", "--events", "20000")
    assert demo.stdout is not None
    lines: list[str] = []
    while "changes/s" not in "".join(lines):
        lines.append(demo.stdout.readline())
        assert lines[-1], "it has ended too early"
    lake = tmp_path / "lake" / "demo"
    assert consumers(lake)
    demo.send_signal(number)
    _, errors = demo.communicate(timeout=40)
    assert (demo.returncode, errors.strip()) == (130, "")
    is_over("".join(lines))
    until(lambda: not consumers(lake), 10, "the consumer to go")


def test_a_folder_with_something_else_in_it(tmp_path: Path) -> None:
    """It is left as it is."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("Dear Sirs")
    done = subprocess.run(
        [*PROGRAM, "demo", "--lake", "mine"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
    )
    error, hint = refused(done)
    assert error == "mine is not empty, and not by a demo"
    assert "--lake" in hint
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter"]
