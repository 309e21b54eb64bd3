"""``remend expand``: make the sets of prompts that should move with requests, for a person to review."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from remend.cli import options
from remend.cli.escaping import plain
from remend.cli.request_options import read_edit_requests
from remend.errors import ConfigError, FileError, RequestError

if TYPE_CHECKING:
    from remend.data.edit_sets import EditSet
    from remend.expansion import Expansion
    from remend.expansion.writers import Writer

ROLE_WORDS = {"phrasing": "ask the same", "implication": "follow from it", "near": "must stay"}
"""What the prompts of each role do, in words."""
ADDRESS = ("http://", "https://")
"""How an address of a writer begins."""
EXAMPLES_SHOWN = 3
"""Prompts of each role that are printed."""


def expand(
    model: options.Model,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the set is written, as JSON lines.")],
    prompt: Annotated[list[str] | None, typer.Option(help="The prompt that is answered wrongly.")] = None,
    target: Annotated[str | None, typer.Option(help="What it should answer.")] = None,
    subject: Annotated[str | None, typer.Option(help="What the prompt is about, as it stands there.")] = None,
    requests: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A file of requests, instead: a set is made of each.")
    ] = None,
    chat: options.Chat = False,
    pool: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Prompts that must stay, one a line: those that a trial edit disturbs join."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=0, help="The most trial edits.")] = 2,
    writer: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL|URL",
            help="A chat model that writes phrasings, too: a folder, a name on the hub, or an OpenAI-compatible "
            "address (its key in $REMEND_WRITER_KEY).",
        ),
    ] = None,
    writer_model: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model's name at the address of --writer.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE.")] = False,
    resume: Annotated[bool, typer.Option(help="Go on with the sets that a stopped command had made.")] = False,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    quantise: options.Quantise = None,
    seed: options.Seed = 0,
) -> None:
    """Make a set from one request: other ways to ask, what follows from it, and what must stay.

    Strike or mend its lines, then make the edit: remend edit MODEL --editor fit --requests FILE --out DIR. Sets of many
    requests are what an editor can be trained on: remend train MODEL --data FILE.
    """
    edit_requests = read_edit_requests(prompt or [], target, requests, subject, chat=chat)
    if out.exists() and not overwrite:
        raise FileError(f"{out} exists already: choose another file, or give --overwrite")
    if not out.parent.is_dir():
        raise FileError(f"{out.parent} is no folder, so {out.name} cannot be written there")
    texts = _read_pool(pool)
    from remend.cli.unfinished_sets import UnfinishedSets
    from remend.data.edit_sets import EditSet, write_edit_sets
    from remend.expansion import ExpandConfig
    from remend.expansion import expand as make_set
    from remend.progress import report_progress

    console = Console()
    config = ExpandConfig(rounds=rounds)
    if writer_model is not None and (writer is None or not writer.startswith(ADDRESS)):
        raise ConfigError("--writer-model is the name of a model at an address: give that as --writer")
    writes = _load_writer(writer, writer_model, device, seed)
    task = options.load_model(model, device, seed, dtype, quantise)
    if requests is None:
        expansion = make_set(task, edit_requests[0], config, texts, seed=seed, writer=writes)
        write_edit_sets(out, [expansion.edit_set])
        _print(console, expansion)
    else:
        settings = {"model": model, "rounds": rounds, "pool": texts, "seed": seed, "writer": [writer, writer_model]}
        unfinished = UnfinishedSets(out.with_name(f"{out.name}.partial"), edit_requests, settings, resume)
        try:
            for number in range(len(unfinished.sets), len(edit_requests)):
                report_progress("making sets", number, len(edit_requests))
                try:
                    edit_set = make_set(task, edit_requests[number], config, texts, seed=seed, writer=writes).edit_set
                except RequestError as error:
                    edit_set = EditSet(edit_requests[number])
                    console.print(f"[yellow]no set of request {number + 1}[/]: {plain(error)}", soft_wrap=True)
                unfinished.add(edit_set)
        except KeyboardInterrupt:
            Console(stderr=True).print("stopped; go on with the same command and --resume")
            raise typer.Exit(130) from None
        write_edit_sets(out, unfinished.sets)
        unfinished.remove()
        _print_counts(console, unfinished.sets)
    console.print(
        f"written to [bold]{plain(out)}[/]; review it, then: remend edit {plain(model)} --editor fit "
        f"--requests {plain(out)} --out DIR",
        soft_wrap=True,
    )


def _load_writer(writer: str | None, name: str | None, device: str, seed: int) -> Writer | None:
    """Return the writer that the options name, if they name one."""
    from remend.expansion.writers import LocalWriter, remote_writer

    if writer is None:
        return None
    if writer.startswith(ADDRESS):
        return remote_writer(writer, name)
    return LocalWriter(options.load_model(writer, device, seed), Path(writer).name)


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


def _print_counts(console: Console, sets: Sequence[EditSet]) -> None:
    """Print what many sets hold together."""
    counts: Counter[str] = Counter(item.item for edit_set in sets for item in edit_set.items)
    held = ", ".join(f"{counts[role]} {words}" for role, words in ROLE_WORDS.items())
    console.print(f"{len(sets)} requests; of the prompts of their sets, {held}", soft_wrap=True)


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
