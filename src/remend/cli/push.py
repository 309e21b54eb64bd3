"""``remend push``: publish a saved edit or editor on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from remend.cli.escaping import plain


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A saved edit or editor.")],
    to: Annotated[
        str, typer.Option(metavar="OWNER/NAME", help="The hub repository; it is created if it does not exist.")
    ],
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A report that remend evaluate or guard wrote with --json, for the card."),
    ] = None,
    license_id: Annotated[
        str | None, typer.Option("--license", help="The hub's identifier of the license: apache-2.0 …")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The base model's hub id, if the edit has another name for it.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    card: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Only write the card to this file, and publish nothing.")
    ] = None,
) -> None:
    """Publish an edit or an editor on the Hugging Face hub, with a model card."""
    from remend.apps.hub import push as publish
    from remend.apps.hub import render_model_card
    from remend.apps.hub.evaluation_rows import evaluation_rows
    from remend.apps.hub.push import check_repo_name
    from remend.saved_folders import read_verified_manifest, write_text

    console, evaluation = Console(), evaluation_rows(report)
    check_repo_name(to)
    if card is not None:
        write_text(card, render_model_card(read_verified_manifest(folder), to, license_id, base, evaluation))
        console.print(f"the card was written to [bold]{plain(str(card))}[/]; nothing was published")
        return
    url = publish(folder, to, license_id=license_id, base=base, evaluation=evaluation, private=private or None)
    console.print(f"published: {plain(url)}; others load it as hf:{plain(to)}", soft_wrap=True)
