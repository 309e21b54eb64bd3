"""What ``remend reproduce`` does with recipes."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from remend.cli.escaping import plain


def list_recipes() -> None:
    """Show the recipes with what they take."""
    from rich.table import Table

    from remend.reproduction.recipe import recipes

    table = Table()
    table.add_column("recipe", no_wrap=True)
    for heading in ("model", "paper: success / drawdown", "GB", "hours (a guess)"):
        table.add_column(heading, overflow="fold")
    for name, own in recipes().items():
        paper = own.paper
        told = "" if paper is None else f"{paper.edit_success} / {paper.drawdown}"
        table.add_row(name, own.model or "to be given", told, f"{own.memory_gb:.0f}", f"{own.hours:g}")
    Console().print(table)


def run_named(name: str, out: Path, given: Mapping[str, Any]) -> None:
    """Run one recipe, and say where its summary is.

    Args:
        name: of the recipe, or of its file.
        out: where everything is kept.
        given: what :func:`remend.reproduction.running.run_recipe` is given in place of the recipe's own.
    """
    from remend.reproduction.recipe import load_recipe
    from remend.reproduction.running import run_recipe

    console = Console()
    command = typed(["remend", "reproduce", name], {"out": out, **given})
    with console.status("reading") as status:
        run_recipe(
            load_recipe(name), out, command=command, on_progress=lambda what: status.update(plain(what)), **given
        )
    console.print(f"the figures, beside the paper's, are in [bold]{plain(out / 'summary.md')}[/]", soft_wrap=True)


def typed(words: Sequence[str], given: Mapping[str, Any]) -> str:
    """A command line with the options that were given, for a shell; paths stay as they were typed."""
    told = [(option(name), str(value)) for name, value in given.items() if value is not None]
    return shlex.join([*words, *(word for own in told if own != ("--device", "auto") for word in own)])


def option(name: str) -> str:
    """What an argument is called on the command line."""
    return f"--{name.replace('_', '-')}"
