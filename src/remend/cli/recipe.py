"""``remend recipe list | show | run``: settings for full-size models and data sets, kept as data, and their runs."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from remend.cli import options
from remend.cli.escaping import plain

app = typer.Typer(
    help="Train and evaluate MEND at full size: the paper's models, and recent ones.", no_args_is_help=True
)
Name = Annotated[str, typer.Argument(metavar="RECIPE", help="A name from remend recipe list, or a JSON file.")]
Source = Annotated[str | None, typer.Option(metavar="SOURCE", help="Requests, in place of the recipe's.")]


@app.command("list")
def list_() -> None:
    """List the recipes with the paper's figures and what they take."""
    from rich.table import Table

    from remend.recipes import recipes

    table = Table()
    table.add_column("recipe", no_wrap=True)
    for heading in ("model", "paper: success / drawdown", "GB", "hours (a guess)"):
        table.add_column(heading, overflow="fold")
    for name, recipe in recipes().items():
        published = recipe.paper
        figures = "" if published is None else f"{published.edit_success} / {published.drawdown}"
        table.add_row(name, recipe.model or "to be given", figures, f"{recipe.memory_gb:.0f}", f"{recipe.hours:g}")
    Console().print(table)


@app.command()
def show(recipe: Name) -> None:
    """Print a recipe as JSON: edit a copy to run it with other settings."""
    from remend.recipes import load_recipe

    typer.echo(load_recipe(recipe).model_dump_json(indent=2, exclude_defaults=True))


@app.command()
def run(
    recipe: Name,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where the editor and the report go; by default the recipe's name."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="A folder or hub id, in place of the recipe's.")] = None,
    train: Source = None,
    validation: Source = None,
    test: Source = None,
    text: Annotated[str | None, typer.Option(metavar="FILE", help="Passages on which perplexity is measured.")] = None,
    writer: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The model that writes the targets of passages.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="One of the recipe's seeds, or another; else its first.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many requests of each split, to try it.")] = None,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Training steps at most, to try it.")] = None,
    device: options.Device = "auto",
) -> None:
    """Train an editor as a recipe says, evaluate its edits, and write the figures beside the paper's.

    The same command continues a run that was stopped.
    """
    from remend.recipes import load_recipe, run_recipe

    out = out or Path(Path(recipe).stem)
    options_given: dict[str, Any] = {
        "model": model, "train": train, "validation": validation, "test": test, "limit": limit, "max_steps": max_steps,
        "seed": seed, "text": text, "writer": writer, "device": device,
    }  # fmt: skip
    command = shell_command(["remend", "recipe", "run", recipe], {"out": out, **options_given})
    console = Console()
    with console.status("reading") as status:
        run_recipe(
            load_recipe(recipe),
            out,
            command=command,
            on_progress=lambda what: status.update(plain(what)),
            **options_given,
        )
    console.print(f"the figures, beside the paper's, are in [bold]{plain(out / 'summary.md')}[/]", soft_wrap=True)


def shell_command(words: Sequence[str], options_given: Mapping[str, Any]) -> str:
    """Return a command line for a shell, with the options that have a value; paths stay as the user typed them."""
    pairs = [(option_name(name), str(value)) for name, value in options_given.items() if value is not None]
    return shlex.join([*words, *(word for pair in pairs if pair != ("--device", "auto") for word in pair)])


def option_name(parameter: str) -> str:
    """Return the command-line option of a parameter: ``--max-steps`` of ``max_steps``."""
    return f"--{parameter.replace('_', '-')}"
