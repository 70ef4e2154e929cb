"""The settings as flags of a command: ``flush_rows`` is ``--flush-rows``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

from cdc.settings import Settings, load, read_seconds

__all__ = ["Seconds", "with_settings"]


class Seconds(click.ParamType[float]):
    """A duration such as 60s, in seconds once read."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Read it as the settings do."""
        try:
            return read_seconds(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def with_settings(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command flags for the settings `names` (none: all), and pass it `settings`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        chosen = names or tuple(Settings.model_fields)

        @functools.wraps(command)
        def wrapper(**given: Any) -> None:
            flags = {name: value for name in chosen if (value := given.pop(name)) is not None}
            command(settings=load(flags), **given)

        decorated: Callable[..., None] = wrapper
        for name in reversed(chosen):
            field = Settings.model_fields[name]
            decorated = click.option(
                "--" + name.replace("_", "-"), name, metavar="VALUE", help=f"{field.description} [CDC_{name.upper()}]"
            )(decorated)
        return decorated

    return decorate
