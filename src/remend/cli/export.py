"""``remend export``: write edits as a LoRA adapter, a merged checkpoint, or in another registered format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from remend.cli import options
from remend.cli.edit_formats import FORMAT_HELP, write_edit
from remend.errors import ConfigError, nearest
from remend.registries import FORMATS

if TYPE_CHECKING:
    from remend.edit import Edit


def export(
    edits: Annotated[list[Path], typer.Argument(metavar="EDIT…", help="Saved edits; several are added up.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where it is written.")],
    to: Annotated[str, typer.Option(metavar="FORMAT", help=FORMAT_HELP)],
    model: Annotated[
        str | None,
        typer.Option(help="The model that the edit is for; without it, the one that the edit names. Of an adapter, a "
        "folder with its config.json will do."),
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option(metavar="PROMPT", help="Leave out the request with this prompt; all others still act as they do."),
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
    edit = _leave_out(Edit.sum([Edit.load(path) for path in edits]), without or [])
    write_edit(Console(), edit, out, to, model or edit.base.name, model is None, rank, device, dtype)


def _leave_out(edit: Edit, prompts: Sequence[str]) -> Edit:
    """Return an edit without its requests of some prompts."""
    numbers = []
    for prompt in prompts:
        of_prompt = [number for number, request in enumerate(edit.requests) if str(request.prompt) == prompt]
        if not of_prompt:
            asked = [str(request.prompt) for request in edit.requests]
            raise ConfigError(
                f"no request of the edit has the prompt {prompt!r}; {nearest(prompt, asked)} (remend show lists them)"
            )
        numbers += of_prompt
    return edit.without(*numbers)
