"""Refuse an option that takes one value and is given twice: click would keep the last value and say nothing."""

from __future__ import annotations

from itertools import takewhile
from typing import Any

import typer
from typer.core import TyperCommand

from remend.errors import RequestError


class _Command(TyperCommand):
    """A command that refuses repeated options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments.

        Raises:
            RequestError: an option that takes one value is given several times.
        """
        given = list(takewhile(lambda argument: argument != "--", args))
        parameters: list[Any] = list(self.params)  # of typer's own classes or of click's, by the version of typer
        for option in parameters:
            if option.param_type_name != "option" or option.multiple or option.is_flag or option.count:
                continue
            times = sum(text == name or text.startswith(f"{name}=") for text in given for name in option.opts)
            if times > 1:
                raise RequestError(f"{option.opts[0]} takes one value, and is given {times} times")
        return super().parse_args(ctx, args)


def refuse_repeated_options(app: typer.Typer) -> None:
    """Make all commands of a program refuse them."""
    for command in app.registered_commands:
        command.cls = _Command
    for group in app.registered_groups:
        if group.typer_instance is not None:
            refuse_repeated_options(group.typer_instance)
