"""``remend import``: make an edit of a LoRA adapter or of a changed checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from remend.cli import options
from remend.cli.edit_formats import print_loss, rank_range
from remend.cli.escaping import plain
from remend.errors import FileError


def import_(
    source: Annotated[
        Path, typer.Argument(metavar="DIR", help="A LoRA adapter, or a checkpoint of the changed model.")
    ],
    model: Annotated[str, typer.Option(help="The model that it changes: a folder or hub id.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the edit is saved.")],
    rank: Annotated[
        int | None, typer.Option(min=1, help="The most factor pairs of a matrix; else as many as it needs.")
    ] = None,
    leave_rest: Annotated[
        bool, typer.Option("--leave-rest", help="Leave out what no edit can change: embeddings, biases, norms.")
    ] = False,
    device: options.Device = "auto",
) -> None:
    """Make an edit of a LoRA adapter, or of the difference between two checkpoints: to inspect, evaluate and revert."""
    from remend.formats import detect_format
    from remend.saved_folders import check_replaceable

    console = Console()
    check_replaceable(out)
    edit_format = detect_format(source)
    task = options.load_model(model, device, 0)
    imported = edit_format.read(source, task, lambda path: options.load_model(str(path), device, 0), rank)
    edit, others = imported.edit, imported.other_parameters
    if others and not leave_rest:
        raise FileError(
            f"{source} also differs in {len(others)} parameters that no edit can change "
            f"({', '.join(others[:3])}): the edit would not be all of it. Give --leave-rest to leave them out"
        )
    if others:
        console.print(f"[yellow]left out[/]: {len(others)} parameters ({plain(', '.join(others[:3]))} …)")
    if imported.compared_in is not None:
        dtype = str(imported.compared_in).removeprefix("torch.")
        console.print(
            f"{plain(str(source))} was stored in {dtype}, which is coarser than the base: compared in {dtype}, and "
            "differences that it cannot hold are no changes",
            soft_wrap=True,
        )
    if rank is not None:
        print_loss(console, f"of rank {rank}", imported.lost)
    edit.save(out)
    ranks = sorted({change.rank for change in edit.changes.values()})
    console.print(
        f"[bold]{plain(str(out))}[/] changes {len(edit.changes)} matrices of {plain(edit.base.name)}, by rank "
        f"{rank_range(ranks)}: remend show {plain(str(out))}",
        soft_wrap=True,
        highlight=False,
    )
