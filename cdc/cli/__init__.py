"""The command line: one file per command. These modules are the only ones that print.

Exit status: 0 done; 1 failed; 2 wrong usage or setting; 3 it worked and found something.
"""

from __future__ import annotations

import os
import sys

import click

from cdc.cli.check import check
from cdc.cli.demo import demo
from cdc.cli.query import query
from cdc.cli.resync import resync
from cdc.cli.run import run
from cdc.cli.setup import setup
from cdc.cli.status import status
from cdc.cli.teardown import teardown
from cdc.errors import CdcError

__all__ = ["main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="pg-duckdb-cdc", prog_name="cdc")
@click.option("--debug", is_flag=True, help="show a traceback with an error")
def cdc(debug: bool) -> None:
    """Keep a DuckDB warehouse and a Parquet change log exactly in step with a Postgres database.

    Settings come from flags, from CDC_... variables and from cdc.toml, in that order of precedence.
    """
    click.get_current_context().obj = debug


for command in (demo, setup, check, run, status, query, resync, teardown):
    cdc.add_command(command)


def main() -> None:
    """Run the command line of this process."""
    debug = "--debug" in sys.argv
    try:
        cdc.main(standalone_mode=False)
    except CdcError as error:
        if debug:
            raise
        click.echo(f"error: {error}", err=True)
        if error.hint:
            click.echo(f"hint: {error.hint}", err=True)
        sys.exit(error.exit_status)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read our output has had enough; there is nobody to tell. Python would complain at exit otherwise.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
