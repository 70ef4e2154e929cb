"""All commands, and what becomes of their errors."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any, NoReturn

import click

from cdc.cli.check import check
from cdc.cli.demo import demo
from cdc.cli.query import query
from cdc.cli.resync import resync
from cdc.cli.run import run
from cdc.cli.setup import setup
from cdc.cli.status import status
from cdc.cli.tail import tail
from cdc.cli.teardown import teardown
from cdc.errors import CdcError

__all__ = ["cdc", "invoke"]


class _Group(click.Group):
    """Ends in peace when whoever read our output has had enough; click itself would call that a failure."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python would complain at exit otherwise
            ctx.exit(0)
        return result


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="pg-duckdb-cdc", prog_name="cdc")
@click.option("--debug", is_flag=True, help="show a traceback with an error")
def cdc(debug: bool) -> None:
    """Keep a DuckDB warehouse and a Parquet change log exactly in step with a Postgres database.

    Settings come from flags, from CDC_... variables and from cdc.toml, in that order of precedence.
    """
    click.get_current_context().obj = debug


for command in (demo, setup, check, run, status, query, tail, resync, teardown):
    command.context_settings.setdefault("help_option_names", ["-h", "--help"])
    # click's mark for lines that stay as they are, which a raw docstring spells out
    command.help = (command.help or "").replace("\\b\n", "\b\n")
    cdc.add_command(command)


def invoke() -> None:
    """Run the command line of this process."""
    # Wherever it stands: it is thought of when a command has failed, and added at its end.
    debug = "--debug" in sys.argv[1:]
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        cdc.main(arguments, prog_name="cdc", standalone_mode=False)
    except CdcError as error:
        if debug:
            traceback.print_exc()
        _fail(str(error), error.hint, error.exit_status)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        context = error.ctx if isinstance(error, click.UsageError) else None
        _fail(error.format_message(), f"see `{context.command_path if context else 'cdc'} --help`", 2)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except Exception as bug:  # noqa: BLE001 -- one line for a bug, too
        if debug:
            traceback.print_exc()
        _fail(f"{type(bug).__name__}: {bug}", "this is a bug in cdc: run it again with --debug, and report that", 1)


def _fail(message: str, hint: str, status: int) -> NoReturn:
    """End the process with one line of error and one of hint."""
    click.echo(f"error: {' '.join(message.split())}", err=True)
    click.echo(f"hint: {' '.join(hint.split()) or 'run it again with --debug to see where it failed'}", err=True)
    sys.exit(status)
