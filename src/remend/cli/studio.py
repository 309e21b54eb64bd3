"""``remend studio``: serve the studio's web page."""

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
        Path | None,
        typer.Option(metavar="DIR", help="The book for accepted edits; it is created if it does not exist."),
    ] = None,
    acceptance: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Acceptance criteria as JSON; by default the standard ones.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="The address to listen at; by default only this machine can connect.")
    ] = "127.0.0.1",
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A name by which others call the page, if it has another one than --host; again for more.",
        ),
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="By default the first free one from 7860 on.")
    ] = None,
    password: Annotated[
        str | None,
        typer.Option(
            envvar="REMEND_PASSWORD",
            help="Protect the page with it (the user's name is remend); better set in REMEND_PASSWORD.",
        ),
    ] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    quantise: options.Quantise = None,
    seed: options.Seed = 0,
) -> None:
    """Serve a web page for correcting wrong answers: ask, edit, see what changes, accept, export."""
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
    criteria = STANDARD_CRITERIA if acceptance is None else AcceptanceCriteria.read(acceptance)
    choice = options.find_editor(editor, model, None, seed)
    if choice.info.result == "outside":
        raise ConfigError(f"{editor} changes no weight, so there is no edit to accept or export: choose another editor")
    task = options.load_model(model, device, seed, dtype, quantise)
    registry = None
    if book is not None:
        registry = PatchRegistry(book) if book.exists() else PatchRegistry.create(book, task.model)
    workspace = Workspace(task, choice.make(task), registry, criteria)
    if host not in ("127.0.0.1", "localhost", "::1") and not password:
        console.print(f"[yellow]warning[/]: whoever reaches {plain(host)} can use this page: give --password")
    page = serve(workspace, model, host, port, password, block=False, allowed_hosts=allow_host or ())
    console.print(f"remend studio of {plain(model)}: [bold]{page.local_url}[/] (Ctrl-C ends it)", soft_wrap=True)
    page.block_thread()
