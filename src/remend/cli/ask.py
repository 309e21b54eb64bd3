"""``remend show`` and ``remend ask``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from remend.cli import options
from remend.cli.escaping import plain

if TYPE_CHECKING:
    from remend.edit import Edit


def show(
    edit: Annotated[Path, typer.Argument(metavar="DIR", help="An edit saved by remend edit.")],
    json: options.Json = None,
) -> None:
    """Show what a saved edit is for, and where and how strongly it acts."""
    from remend.edit import Edit
    from remend.serialization import resolve_folder, write_json

    console = Console()
    loaded = Edit.load(edit)
    size = sum(file.stat().st_size for file in resolve_folder(edit).iterdir())
    made_by = loaded.editor.get("name", "an unnamed editor")
    console.print(f"[bold]{plain(str(edit))}[/]  {size / 1024:.0f} KiB")
    console.print(f"for {plain(loaded.base.name)}, made {plain(loaded.created)} by {plain(made_by)}")
    if (scale := loaded.editor.get("scale", 1)) != 1:
        console.print(f"[bold]{scale:g}[/] times as strong as it was made")
    for request in loaded.requests:
        console.print(f"  {plain(request.prompt)} → [green]{plain(request.target)}[/]")
    console.print(_matrices(loaded))
    if json is not None:
        requests = [request.to_json() for request in loaded.requests]
        ranks = {name: change.rank for name, change in loaded.changes.items()}
        write_json(
            json,
            {"base": loaded.base.name, "created": loaded.created, "editor": dict(loaded.editor), "bytes": size,
             "requests": requests, "ranks": ranks, "norms": loaded.norms()},
        )  # fmt: skip


def ask(
    model: options.Model,
    prompt: Annotated[list[str], typer.Option(help="What to ask; may be given several times.")],
    edit: Annotated[
        Path | None,
        typer.Option("--edit", metavar="DIR", help="An edit saved by remend edit; without, the model as it is."),
    ] = None,
    chat: options.Chat = False,
    pair: options.PairFlag = False,
    max_new_tokens: options.NewTokens = 32,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    quantise: options.Quantise = None,
    seed: options.Seed = 0,
    json: options.Json = None,
) -> None:
    """Ask the model, without and with an edit."""
    from remend.cli.answer_tables import answers_table, as_json, plain_table
    from remend.edit import Edit
    from remend.evaluation.before_after import ask as answers_to
    from remend.serialization import write_json

    loaded = Edit.load(edit) if edit is not None else None
    task = options.load_model(model, device, seed, dtype, quantise)
    answers = answers_to(task, loaded, options.asked(prompt, chat, pair), max_new_tokens)
    Console().print(plain_table(answers) if loaded is None else answers_table("", answers))
    if json is not None:
        write_json(json, {"answers": as_json(answers)})


def _matrices(edit: Edit) -> Table:
    """One row a matrix, with a bar for the size of its change."""
    norms = edit.norms()
    largest = max(norms.values(), default=0.0) or 1.0
    table = Table(Column("matrix", overflow="fold"), "shape", "rank", "‖ΔW‖", "")
    for name, change in edit.changes.items():
        bar = "█" * max(1, round(12 * norms[name] / largest)) if norms[name] else ""
        shape = f"{change.u.shape[-1]} → {change.delta.shape[-1]}"
        table.add_row(plain(name), shape, str(change.rank), f"{norms[name]:.4g}", f"[cyan]{bar}[/]")
    return table
