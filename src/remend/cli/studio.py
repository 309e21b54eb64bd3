"""``remend studio``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from remend.cli import options
from remend.cli.escaping import plain
from remend.errors import ConfigError, ModelError


def studio(
    model: options.Model,
    editor: options.EditorFolder = None,
    book: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A book for accepted edits; made if it is not there.")
    ] = None,
    acceptance: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What is asked of an edit before it acts, as JSON.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="The address to listen at: this machine alone, if not said otherwise.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="By default the first free one from 7860 on.")
    ] = None,
    password: Annotated[
        str | None,
        typer.Option(
            envvar="REMEND_PASSWORD", help="Ask for it (the user's name is remend); better in REMEND_PASSWORD."
        ),
    ] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    quantise: options.Quantise = None,
    seed: options.Seed = 0,
) -> None:
    """A web page on which a wrong answer is put right: ask, edit, look at what changes, accept, export."""
    try:
        from remend.apps.patch_registry import PatchRegistry
        from remend.apps.studio.app import serve
    except ModuleNotFoundError as error:
        raise ModelError(
            f"the studio needs {error.name}, which is missing here: pip install 'remend[studio]'"
        ) from None
    from remend.apps.acceptance import STANDARD_CRITERIA, AcceptanceCriteria
    from remend.apps.studio import Workspace

    console = Console()
    asked = STANDARD_CRITERIA if acceptance is None else AcceptanceCriteria.read(acceptance)
    chosen = options.find_editor(editor, model, None, seed)
    if chosen.info.result == "outside":
        raise ConfigError(f"{editor} changes no weight, so there is no edit to accept or export: choose another editor")
    task = options.load_model(model, device, seed, dtype, quantise)
    opened = None
    if book is not None:
        opened = PatchRegistry(book) if book.exists() else PatchRegistry.create(book, task.model)
    desk = Workspace(task, chosen.make(task), opened, asked)
    if host not in ("127.0.0.1", "localhost", "::1") and not password:
        console.print(f"[yellow]warning[/]: whoever reaches {plain(host)} can use this page: give --password")
    page = serve(desk, model, host, port, password, block=False)
    console.print(f"remend studio of {plain(model)}: [bold]{page.local_url}[/] (Ctrl-C ends it)", soft_wrap=True)
    page.block_thread()
