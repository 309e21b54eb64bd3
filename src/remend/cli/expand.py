"""``remend expand``: make the set of prompts that should move with a request, for a person to review."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from remend.cli import options
from remend.cli.escaping import plain
from remend.errors import FileError, RequestError

if TYPE_CHECKING:
    from remend.expansion import Expansion

ROLE_WORDS = {"phrasing": "ask the same", "implication": "follow from it", "near": "must stay"}
"""What the prompts of each role do, in words."""
EXAMPLES_SHOWN = 3
"""Prompts of each role that are printed."""


def expand(
    model: options.Model,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the set is written, as JSON lines.")],
    prompt: Annotated[list[str] | None, typer.Option(help="The prompt that is answered wrongly.")] = None,
    target: Annotated[str | None, typer.Option(help="What it should answer.")] = None,
    subject: Annotated[str | None, typer.Option(help="What the prompt is about, as it stands there.")] = None,
    chat: options.Chat = False,
    pool: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Prompts that must stay, one a line: those that a trial edit disturbs join."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=0, help="The most trial edits.")] = 2,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE.")] = False,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    quantise: options.Quantise = None,
    seed: options.Seed = 0,
) -> None:
    """Make a set from one request: other ways to ask, what follows from it, and what must stay.

    Strike or mend its lines, then make the edit: remend edit MODEL --requests FILE --out DIR.
    """
    if not prompt or len(prompt) != 1 or target is None:
        raise RequestError("give one --prompt and --target")
    (parsed,) = options.parse_prompts(prompt, chat, False)
    if out.exists() and not overwrite:
        raise FileError(f"{out} exists already: choose another file, or give --overwrite")
    if not out.parent.is_dir():
        raise FileError(f"{out.parent} is no folder, so {out.name} cannot be written there")
    texts = _read_pool(pool)
    from pydantic import ValidationError

    from remend.data.edit_sets import write_edit_sets
    from remend.expansion import ExpandConfig
    from remend.expansion import expand as make_set
    from remend.request import EditRequest

    try:
        request = EditRequest(prompt=parsed, target=target, subject=subject)
    except ValidationError as error:
        raise RequestError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None
    task = options.load_model(model, device, seed, dtype, quantise)
    expansion = make_set(task, request, ExpandConfig(rounds=rounds), texts, seed=seed)
    write_edit_sets(out, [expansion.edit_set])
    _print(Console(), expansion)
    Console().print(
        f"written to [bold]{plain(out)}[/]; review it, then: remend edit {plain(model)} --requests {plain(out)} "
        "--out DIR",
        soft_wrap=True,
    )


def _read_pool(file: Path | None) -> list[str]:
    """Return the lines of a file of prompts, without blank ones."""
    if file is None:
        return []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"cannot read {file} as UTF-8 text: {error}") from None
    if not (texts := [line.strip() for line in lines if line.strip()]):
        raise RequestError(f"{file} holds no prompt: one a line was expected")
    return texts


def _print(console: Console, expansion: Expansion) -> None:
    """Print what a set holds, and what making it took."""
    request = expansion.edit_set.request
    console.print(
        f"[bold]{plain(request.prompt)}[/] → [green]{plain(request.target)}[/], about {plain(request.subject)}"
    )
    for role, words in ROLE_WORDS.items():
        items = [item for item in expansion.edit_set.items if item.item == role]
        kinds = ", ".join(f"{count} {plain(kind)}" for kind, count in Counter(item.kind for item in items).items())
        console.print(f"{len(items)} {words}{': ' + kinds if items else ''}", soft_wrap=True)
        for item in items[:EXAMPLES_SHOWN]:
            answer = item.target or item.answer
            console.print(f"  {plain(item.prompt)}{f' … {plain(answer)}' if answer else ''}", soft_wrap=True)
    for number, found in enumerate(expansion.rounds, start=1):
        console.print(f"trial edit {number} disturbs {found.disturbed} of {found.pool} prompts; {found.added} added")
    for sentence in expansion.missing:
        console.print(f"[yellow]{plain(sentence)}[/]", soft_wrap=True)
    if expansion.seconds:
        spent = ", ".join(f"{name} {value:.1f}" for name, value in expansion.seconds.items())
        console.print(f"CPU seconds: {spent}", soft_wrap=True)
