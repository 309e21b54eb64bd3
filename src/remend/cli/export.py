"""``remend export`` and ``remend import``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from remend.cli import options
from remend.cli.escaping import plain
from remend.errors import ConfigError, FileError, ModelError, nearest

if TYPE_CHECKING:
    from remend.edit import Edit

FORMS = ("peft", "merged", "native")


def export(
    edits: Annotated[list[Path], typer.Argument(metavar="EDIT…", help="Saved edits; several are added up.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where it is written.")],
    to: Annotated[str, typer.Option(metavar="peft|merged|native", help="A LoRA adapter, a checkpoint, or an edit.")],
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

    if to not in FORMS:
        raise ConfigError(f"there is no form {to!r}; {nearest(to, FORMS)}")
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
    """Write an edit in one of :data:`FORMS`, and tell what it has become.

    Args:
        console: where it is told.
        edit: the edit.
        out: where it is written.
        to: the form.
        model: what it is for.
        unsaid: whether only the edit or the book named the model.
        rank: the most factor pairs.
        device: where a model is loaded that is to be merged.
        dtype: in which; as it is stored by default.
    """
    import torch

    from remend.formats import save_adapter, save_merged
    from remend.models import load, skeleton
    from remend.serialization import check_replaceable

    if rank is not None:
        edit = edit.compressed(rank)
        _tell(console, f"compressed to rank {rank}", edit.editor["lost"])
    ranks = sorted({change.rank for change in edit.changes.values()})
    if to == "native":
        edit.save(out)
    elif to == "peft":
        with named_by("the edit", unsaid, model):
            structure = skeleton(model)
        save_adapter(edit, out, structure)
    else:
        named = options.known_dtype(dtype)
        check_replaceable(out, lambda there: False)  # before the model is loaded
        with named_by("the edit", unsaid, model):
            base, tokenizer = load(model, device, getattr(torch, named) if named else "auto")
        found = save_merged(edit, out, base, tokenizer)
        _tell(console, f"rounded to {base.dtype}".replace("torch.", ""), found.lost)
    what = {"peft": "a LoRA adapter", "merged": "a model", "native": "an edit"}[to]
    of_rank = f" of rank {_span(ranks)}" if to != "merged" and ranks else ""
    console.print(f"[bold]{plain(str(out))}[/] is {what}{of_rank} for {plain(edit.base.name)}", soft_wrap=True)
    if to == "peft":
        if ranks[-1] > 64:
            console.print("[yellow]servers limit ranks[/]: --rank N compresses it, and says what is lost")
        console.print(
            "In Python: peft.PeftModel.from_pretrained(model, DIR), or model.load_adapter(DIR). Served: vllm serve "
            f"MODEL --enable-lora --max-lora-rank {_served(ranks[-1])} --lora-modules NAME=DIR",
            soft_wrap=True,
            highlight=False,
        )


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
    from remend.formats import diff_checkpoints, load_adapter
    from remend.formats.peft import CONFIG
    from remend.serialization import check_replaceable

    console = Console()
    check_replaceable(out)
    if not source.is_dir():
        raise FileError(f"there is no folder {source}: give an adapter's, or that of a changed model's checkpoint")
    base, _ = options.load_model(model, device, 0)
    if (source / CONFIG).exists():
        edit = load_adapter(source, base)
        edit = edit.compressed(rank) if rank is not None else edit
        lost: Mapping[str, float] = edit.editor.get("lost", {})
    else:
        found = diff_checkpoints(base, options.load_model(str(source), device, 0)[0], rank)
        edit, lost = found.edit, found.lost
        others = found.other_parameters
        if others and not leave_rest:
            raise FileError(
                f"{source} also differs in {len(others)} parameters that no edit can change "
                f"({', '.join(others[:3])}): the edit would not be all of it. Give --leave-rest to leave them out"
            )
        if others:
            console.print(f"[yellow]left out[/]: {len(others)} parameters ({plain(', '.join(others[:3]))} …)")
    if rank is not None:
        _tell(console, f"of rank {rank}", lost)
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


def _served(rank: int) -> int:
    """The smallest rank that vLLM can be told to make room for."""
    return next((size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= rank), rank)
