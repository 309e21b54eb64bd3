"""``remend show``: print what a saved edit is for, and where and how strongly it acts."""

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

TAKEN = {
    True: "the model gave these answers when the edit was made",
    False: "[yellow]the model did not give all of these answers[/] when the edit was made; it was kept all the same",
    None: "[yellow]not checked[/]: nothing says that the model takes it (remend guard MODEL DIR tells)",
}
"""What is known of whether an edit takes (:attr:`Edit.taken`)."""


def show(
    edit: Annotated[Path, typer.Argument(metavar="DIR", help="An edit saved by remend edit.")],
    json: options.Json = None,
) -> None:
    """Show what a saved edit is for, and where and how strongly it acts."""
    from remend.edit import Edit
    from remend.request import SEPARATOR_NAMES
    from remend.saved_folders import resolve_folder, write_json

    console = Console()
    loaded = Edit.load(edit)
    size = sum(file.stat().st_size for file in resolve_folder(edit).iterdir())
    editor_name = loaded.editor.get("name", "an unnamed editor")
    console.print(f"[bold]{plain(str(edit))}[/]  {size / 1024:.0f} KiB")
    console.print(f"for {plain(loaded.base.name)}, made {plain(loaded.created)} by {plain(editor_name)}")
    if (scale := loaded.editor.get("scale", 1)) != 1:
        console.print(f"[bold]{scale:g}[/] times as strong as it was made")
    forms = zip(loaded.requests, loaded.separators_by_request(), loaded.ends_by_request(), strict=True)
    for request, between, ends in forms:
        notes = [] if between is None else [f"after {SEPARATOR_NAMES[between]}"]
        notes += ["no end taught"] if ends is False else []
        note = f" ({', '.join(notes)})" if notes else ""
        console.print(f"  {plain(request.prompt)} → [green]{plain(request.target)}[/]{note}")
    console.print(TAKEN[loaded.taken])
    console.print(_matrix_table(loaded))
    if json is not None:
        requests = [request.to_json() for request in loaded.requests]
        ranks = {name: change.rank for name, change in loaded.changes.items()}
        kinds = {name: change.describe for name, change in loaded.changes.items()}
        write_json(
            json,
            {"base": loaded.base.name, "created": loaded.created, "editor": dict(loaded.editor), "bytes": size,
             "requests": requests, "separators": list(loaded.separators), "ends": list(loaded.ends),
             "taken": loaded.taken, "ranks": ranks, "norms": loaded.norms(), "changes": kinds},
        )  # fmt: skip


def _matrix_table(edit: Edit) -> Table:
    """Return a table with a row for each matrix and a bar for the norm of its change."""
    norms = edit.norms()
    largest = max(norms.values(), default=0.0) or 1.0
    table = Table(Column("matrix", overflow="fold"), "shape", "change", "‖ΔW‖", "")
    for name, change in edit.changes.items():
        bar = "█" * max(1, round(12 * norms[name] / largest)) if norms[name] else ""
        shape = f"{change.u.shape[-1]} → {change.delta.shape[-1]}"
        table.add_row(plain(name), shape, change.describe, f"{norms[name]:.4g}", f"[cyan]{bar}[/]")
    return table
