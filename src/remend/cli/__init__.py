"""The command line: ``remend demo | edit | show | ask | train | evaluate``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click
import typer
from rich.console import Console
from rich.markup import escape

from remend.cli import asking, demo, editing, evaluating, training
from remend.errors import ConfigError, RemendError, RequestError

app = typer.Typer(
    name="remend",
    help="Change what a trained model says about one thing, leave the rest, and keep the change as a small file.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog="Exit codes: 0 done, 1 failed, 2 wrong use.",
)
app.command()(demo.demo)
app.command()(editing.edit)
app.command()(asking.show)
app.command()(asking.ask)
app.command()(training.train)
app.command()(evaluating.evaluate)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code: 0 done, 1 failed, 2 wrong use, 130 interrupted."""
    console = Console(stderr=True)
    try:
        result = app(args=list(arguments), prog_name="remend", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        console.print("interrupted")
        return 130
    except RemendError as error:
        console.print(f"[bold red]{type(error).__name__}[/]: {escape(str(error))}", soft_wrap=True)
        return 2 if isinstance(error, RequestError | ConfigError) else 1
    return result if isinstance(result, int) else 0


def main() -> None:
    """The ``remend`` program."""
    sys.exit(run(sys.argv[1:]))
