"""Write edits in registered formats, with messages: shared by ``remend export``, ``import`` and ``book export``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from remend.cli import options
from remend.cli.escaping import plain
from remend.errors import ModelError
from remend.registries import FORMATS

if TYPE_CHECKING:
    from remend.edit import Edit

FORMAT_HELP = "peft (a LoRA adapter), merged (a checkpoint), native (an edit), or the format of another package."


def write_edit(
    console: Console,
    edit: Edit,
    out: Path,
    to: str,
    model: str,
    implied: bool,
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
        implied: whether the model was not named on the command line.
        rank: the largest rank of a matrix's change.
        device: the device of a model that is loaded to be merged.
        dtype: its dtype; by default, the checkpoint's.

    Raises:
        RegistryError: there is no such format.
    """
    import torch

    from remend.models import skeleton
    from remend.saved_folders import check_replaceable
    from remend.tasks import load

    edit_format = FORMATS.load(to)()
    if rank is not None:
        edit = edit.compressed(rank)
        print_loss(console, f"compressed to rank {rank}", edit.editor["lost"])
    options.check_dtype(dtype)
    check_replaceable(out, edit_format.replaceable)  # before the model is loaded
    task: Any = None
    if edit_format.needs != "nothing" and implied:
        refuse_lost_folder(edit, model)
    with suggest_model_option("the edit", implied, model):
        if edit_format.needs == "structure":
            task = skeleton(model, options.TRUST.get().trust_remote_code)
        elif edit_format.needs == "weights":
            task = load(model, device, getattr(torch, dtype) if dtype else "auto", None, *options.TRUST.get())
    lost = edit_format.write(edit, out, task)
    if lost:
        print_loss(console, f"rounded to {task.model.dtype}".replace("torch.", ""), lost)
    ranks = sorted({change.rank for change in edit.changes.values() if not change.reads})
    units = sum(change.rank for change in edit.changes.values() if change.reads)
    of_rank = f" of rank {rank_range(ranks)}" if edit_format.low_rank and ranks else ""
    of_rank += f" with {units} hidden unit{'s' * (units > 1)} more" if units else ""
    title = FORMATS.get(to).title or f"in the format {to}"
    console.print(f"[bold]{plain(str(out))}[/] is {plain(title)}{of_rank} for {plain(edit.base.name)}", soft_wrap=True)
    for line in edit_format.usage(edit):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def refuse_lost_folder(edit: Edit, model: str) -> None:
    """Refuse the name of a folder that is not here: on the hub, the same name is another model's.

    Raises:
        ModelError: the edit's model was in a folder of that name, and none is here.
    """
    if edit.base.in_folder and not Path(model).exists():
        raise ModelError(f"the edit is for a model that was in a folder {model!r}: say with --model where it is")


@contextmanager
def suggest_model_option(source: str, implied: bool, model: str) -> Iterator[None]:
    """Add a hint to give --model to a ModelError, where the model was not named on the command line.

    Args:
        source: what named the model instead, for the message: "the edit" or "the book".
        implied: whether it was named by ``source``.
        model: the model.
    """
    try:
        yield
    except ModelError as error:
        if not implied:
            raise
        raise ModelError(
            f"{error}. {model!r} is the model that {source} was made for: say with --model where it is"
        ) from None


def print_loss(console: Console, step: str, lost: Mapping[str, float]) -> None:
    """Print how much of the change a step lost, in the matrix that lost most."""
    name, share = max(lost.items(), key=lambda item: item[1])
    loss = "nothing" if share < 1e-6 else f"{share:.2%}"
    console.print(f"{step}: {loss} of the change is lost" + (f" (most in {plain(name)})" if share >= 1e-6 else ""))


def rank_range(ranks: Sequence[int]) -> str:
    """Return sorted ranks as ``8`` or ``4 to 8``."""
    return str(ranks[0]) if ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}"
