"""``remend export`` and ``remend import``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from remend.cli import options
from remend.cli.escaping import plain
from remend.errors import FileError, ModelError
from remend.registries import FORMATS

if TYPE_CHECKING:
    from remend.edit import Edit

FORMAT_HELP = "peft (a LoRA adapter), merged (a checkpoint), native (an edit), or the format of another package."


def export(
    edits: Annotated[list[Path], typer.Argument(metavar="EDIT…", help="Saved edits; several are added up.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where it is written.")],
    to: Annotated[str, typer.Option(metavar="FORMAT", help=FORMAT_HELP)],
    model: Annotated[
        str | None,
        typer.Option(help="The model that the edit is for; without it, the one that the edit names. Of an adapter, a "
        "folder with its config.json will do."),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="The most factor pairs of a matrix: servers of adapters limit ranks.")
    ] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
) -> None:  # fmt: skip
    """Write an edit in another form: as a LoRA adapter to be loaded and served, or as a model that has it inside.

    A merged model is written in the dtype in which the checkpoint is stored, or in --dtype.
    """
    from remend.edit import Edit

    FORMATS.get(to)  # before the edits are read
    edit: Edit = reduce(add, [Edit.load(path) for path in edits])
    write(Console(), edit, out, to, model or edit.base.name, model is None, rank, device, dtype)


def write(
    console: Console,
    edit: Edit,
    out: Path,
    to: str,
    model: str,
    unsaid: bool,
    rank: int | None,
    device: str,
    dtype: str | None,
) -> None:
    """Write an edit in one of the registered formats and print what was written.

    Args:
        console: where to print.
        edit: the edit.
        out: the folder to write.
        to: the name of the format.
        model: the model that the edit is for.
        unsaid: whether only the edit or the book named the model.
        rank: the largest rank of a matrix's change.
        device: the device of a model that is loaded to be merged.
        dtype: its dtype; by default, the checkpoint's.

    Raises:
        RegistryError: there is no such format.
    """
    import torch

    from remend.models import skeleton
    from remend.serialization import check_replaceable
    from remend.tasks import load

    edit_format = FORMATS.load(to)()
    if rank is not None:
        edit = edit.compressed(rank)
        _tell(console, f"compressed to rank {rank}", edit.editor["lost"])
    named = options.known_dtype(dtype)
    check_replaceable(out, edit_format.replaceable)  # before the model is loaded
    task: Any = None
    with named_by("the edit", unsaid, model):
        if edit_format.needs == "structure":
            task = skeleton(model)
        elif edit_format.needs == "weights":
            task = load(model, device, getattr(torch, named) if named else "auto")
    lost = edit_format.write(edit, out, task)
    if lost:
        _tell(console, f"rounded to {task.model.dtype}".replace("torch.", ""), lost)
    ranks = sorted({change.rank for change in edit.changes.values()})
    of_rank = f" of rank {_span(ranks)}" if edit_format.low_rank and ranks else ""
    title = FORMATS.get(to).title or f"in the format {to}"
    console.print(f"[bold]{plain(str(out))}[/] is {plain(title)}{of_rank} for {plain(edit.base.name)}", soft_wrap=True)
    for line in edit_format.usage(edit):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


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
    from remend.serialization import check_replaceable

    console = Console()
    check_replaceable(out)
    if not source.is_dir():
        raise FileError(f"there is no folder {source}: give an adapter's, or that of a changed model's checkpoint")
    edit_format = next((found for name in FORMATS.names() if (found := FORMATS.load(name)()).detect(source)), None)
    if edit_format is None:
        raise FileError(
            f"{source} is in none of the formats {', '.join(FORMATS.names())}: give an adapter's folder, or that of a "
            "changed model's checkpoint"
        )
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
    if rank is not None:
        _tell(console, f"of rank {rank}", imported.lost)
    edit.save(out)
    ranks = sorted({change.rank for change in edit.changes.values()})
    console.print(
        f"[bold]{plain(str(out))}[/] changes {len(edit.changes)} matrices of {plain(edit.base.name)}, by rank "
        f"{_span(ranks)}: remend show {plain(str(out))}",
        soft_wrap=True,
        highlight=False,
    )


@contextmanager
def named_by(what: str, unsaid: bool, source: str) -> Iterator[None]:
    """Within it, a model that cannot be had, and that only ``what`` named, is asked for."""
    try:
        yield
    except ModelError as error:
        if not unsaid:
            raise
        raise ModelError(f"{error}. {source!r} is what {what} was made for: say with --model where it is") from None


def _tell(console: Console, how: str, lost: Mapping[str, float]) -> None:
    """Say what was lost, in the matrix that lost most."""
    name, share = max(lost.items(), key=lambda own: own[1])
    shown = "nothing" if share < 1e-6 else f"{share:.2%}"
    console.print(f"{how}: {shown} of the change is lost" + (f" (most in {plain(name)})" if share >= 1e-6 else ""))


def _span(ranks: Sequence[int]) -> str:
    return str(ranks[0]) if ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}"
