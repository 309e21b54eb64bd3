"""The command line, ``remend``: one module for each command, named like it; ``options`` holds shared options."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, TextIO

import typer
from rich.console import Console

from remend.cli import (
    ask,
    book,
    compare,
    data,
    demo,
    doctor,
    edit,
    evaluate,
    expand,
    export,
    guard,
    import_,
    options,
    push,
    recipe,
    show,
    studio,
    train,
)
from remend.cli.escaping import plain
from remend.cli.progress_lines import ProgressLines
from remend.cli.repeated_options import refuse_repeated_options
from remend.errors import ConfigError, RemendError, RequestError
from remend.progress import reported_to
from remend.staging import disk_failure

app = typer.Typer(
    name="remend",
    help="Change what a trained model says about one thing, leave the rest, and keep the change as a small file.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog="Exit codes: 0 done, 1 failed, 2 wrong use, 130 interrupted.",
)


def _print_version(requested: bool) -> None:
    if requested:
        from importlib.metadata import version

        typer.echo(f"remend {version('remend')}")
        raise typer.Exit


@app.callback()
def _remend(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that a model's folder or repository holds.")
    ] = False,
    allow_bin: Annotated[
        bool, typer.Option("--allow-bin", help="Read weights from pytorch_model.bin too, which may hold code.")
    ] = False,
) -> None:
    options.TRUST.set(options.Trust(trust_remote_code, use_safetensors=not allow_bin))


app.command()(demo.demo)
app.command()(edit.edit)
app.command()(expand.expand)
app.command()(show.show)
app.command()(ask.ask)
app.command()(export.export)
app.command("import")(import_.import_)
app.command()(push.push)
app.command()(guard.guard)
app.command()(studio.studio)
app.command()(doctor.doctor)
app.command()(train.train)
app.command()(evaluate.evaluate)
app.command()(compare.compare)
app.add_typer(book.app, name="book")
app.add_typer(data.app, name="data")
app.add_typer(recipe.app, name="recipe")
refuse_repeated_options(app)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code: 0 done, 1 failed, 2 wrong use, 130 interrupted."""
    console = Console(stderr=True)

    def warn(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if options.process_rank() == 0:
            console.print(f"[yellow]warning[/]: {plain(str(message))}", soft_wrap=True)

    listener = ProgressLines(console) if options.process_rank() == 0 else lambda what, done, total: None
    with warnings.catch_warnings(), reported_to(listener):
        warnings.showwarning = warn
        try:
            app(args=list(arguments), prog_name="remend")
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else 1
        except RemendError as error:
            rank = options.process_rank()
            where = f" in process {rank}" if rank else ""  # it may be the only one that fails
            console.print(f"[bold red]{type(error).__name__}[/]{where}: {plain(str(error))}", soft_wrap=True)
            return 2 if isinstance(error, RequestError | ConfigError) else 1
        except Exception as error:
            # Libraries read and write files too: caches, temporary files, standard output.
            if (reason := disk_failure(error)) is None:
                raise
            place = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
            advice = "check that the disk has room and that you may read and write there"
            console.print(f"[bold red]FileError[/]: {plain(f'{place}{reason}; {advice}')}", soft_wrap=True)
            return 1
    return 0


def main() -> None:
    """Run the ``remend`` program."""
    # Large tensors in huge pages: touching memory for the first time is a good part of a train step on a CPU. Read
    # by torch when it first allocates, so it is set before torch is imported; and only here, never by an import.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    sys.exit(run(sys.argv[1:]))
