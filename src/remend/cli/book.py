"""``remend book``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from remend.cli import options
from remend.cli.escaping import plain
from remend.cli.export import FORMAT_HELP
from remend.errors import EditError, FileError, ModelError
from remend.registries import FORMATS

if TYPE_CHECKING:
    from remend.apps.patch_registry import PatchEntry, PatchRegistry
    from remend.tasks import Task

app = typer.Typer(
    no_args_is_help=True, help="A record of every edit of a deployed model: who, when, why, and which of them act."
)

Folder = Annotated[Path, typer.Argument(metavar="BOOK", help="The book's folder.")]
Number = Annotated[int, typer.Argument(metavar="EDIT", help="An edit's number, as remend book list shows it.")]
Why = Annotated[str, typer.Option(help="What for; kept in the record.")]
Who = Annotated[str | None, typer.Option(help="Who does it; by default this user.")]
Model = Annotated[
    str | None,
    typer.Option(help="The model that the book is of, if it is not where the book says: a folder or hub id."),
]


@app.command()
def init(book: Folder, model: Annotated[str, typer.Option(help="The model whose edits it records.")]) -> None:
    """Make an empty book."""
    from remend.models import skeleton

    _room().create(book, skeleton(model))
    Console().print(f"[bold]{plain(str(book))}[/] is a book of {plain(model)}; add edits: remend book add")


@app.command()
def add(
    book: Folder,
    edit: Annotated[Path, typer.Argument(metavar="DIR", help="An edit saved by remend edit.")],
    why: Why = "",
    who: Who = None,
) -> None:
    """Record an edit, as a draft: it does not act yet."""
    from remend.edit import Edit

    opened, console = _room()(book), Console()
    before = {entry.id for entry in opened.entries}
    entry = opened.add(Edit.load(edit), why, who)
    if entry.id in before:
        console.print(f"it is edit [bold]{entry.id}[/] of {plain(str(book))} already ({entry.state})", soft_wrap=True)
    if entry.state != "active":
        command = f"remend book activate {plain(str(book))} {entry.id}"
        console.print(f"edit [bold]{entry.id}[/] does not act yet; have it act: {command}", soft_wrap=True)


@app.command("list")
def list_(book: Folder) -> None:
    """All edits of a book, and which of them act."""
    opened = _room()(book)
    table = Table("edit", "state", "added", "who", "what", "why", title=f"of {plain(opened.model)}", pad_edge=False)
    for entry in opened.entries:
        table.add_row(
            str(entry.id), _coloured(entry.state), entry.added[:16], plain(entry.who), _what(entry), plain(entry.why)
        )
    Console().print(table)


@app.command()
def show(book: Folder, edit: Number) -> None:
    """One edit: what it does, what was measured of it, and what was done with it."""
    opened, console = _room()(book), Console()
    entry = opened.entry(edit)
    console.print(f"edit [bold]{entry.id}[/]: {_coloured(entry.state)}, of {plain(opened.model)}")
    for request in entry.requests:
        console.print(f"  {plain(request.get('prompt', '…'))} → [green]{plain(request.get('target', '…'))}[/]")
    try:
        ranks = ", ".join(f"{plain(name)} (rank {c.rank})" for name, c in opened.load(edit).changes.items())
        console.print(f"changes {ranks}", highlight=False)
    except FileError as error:  # what is known of it is shown all the same
        console.print(f"[red]lost[/]: {plain(error)}", soft_wrap=True, highlight=False)
    console.print(f"file {entry.file}", highlight=False)
    for event in opened.events:
        if event.edit == edit:
            console.print(_line(event.at, event.what, event.who, event.why, event.measured), highlight=False)


@app.command()
def history(book: Folder) -> None:
    """Everything that was done, in order; each line's number is a revision that can be had again."""
    console = Console()
    for event in _room()(book).events:
        line = _line(event.at, event.what, event.who, event.why, event.measured)
        console.print(f"{event.id:4d}  edit {event.edit}: {line}", highlight=False, soft_wrap=True)


@app.command()
def activate(
    book: Folder,
    edit: Number,
    model: Model = None,
    acceptance: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What is asked of it, as JSON; without it, the standard.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Have it act whatever is found; that is recorded.")] = False,
    why: Why = "",
    who: Who = None,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
) -> None:
    """Have an edit act, if it is accepted and goes together with those that do. Exit code 1 if it does not."""
    from remend.apps.acceptance import STANDARD_CRITERIA, AcceptanceCriteria, RejectedError
    from remend.apps.patch_registry import ConflictError
    from remend.cli.guard import show as show_verdict

    opened, console = _room()(book), Console()
    asked = STANDARD_CRITERIA if acceptance is None else AcceptanceCriteria.read(acceptance)
    opened.entry(edit)
    task = _load(opened, model, device, dtype)
    try:
        conflicts, verdict = opened.activate(edit, task, asked, why, who, force)
    except RejectedError as error:
        show_verdict(console, error.result)
        console.print(f"edit {edit} stays as it is (--force has it act all the same)")
        raise typer.Exit(1) from None
    except ConflictError as error:
        for conflict in error.conflicts:
            console.print(f"[red]{conflict.kind}[/]: {plain(conflict.description)}", soft_wrap=True)
        console.print(f"edit {edit} stays as it is: revert the other one first (--force has it act all the same)")
        raise typer.Exit(1) from None
    show_verdict(console, verdict)
    for conflict in conflicts:
        console.print(f"[yellow]{conflict.kind}[/]: {plain(conflict.description)}", soft_wrap=True)
    console.print(f"edit [bold]{edit}[/] acts")


@app.command()
def revert(book: Folder, edit: Number, why: Why = "", who: Who = None) -> None:
    """Have an edit act no more. It stays in the book, and can be activated again."""
    _room()(book).revert(edit, why, who)
    Console().print(f"edit [bold]{edit}[/] acts no more")


@app.command()
def verify(
    book: Folder,
    repair: Annotated[bool, typer.Option("--repair", help="Remove what stopped processes left behind.")] = False,
) -> None:
    """Compare the record with the files, and with itself. Exit code 1 if anything is wrong that was not repaired."""
    opened, console = _room()(book), Console()
    faults = opened.verify(repair)
    for fault in faults:
        mark = "[green]repaired[/]" if fault.repaired else "[red]lost[/]" if fault.lost else "[yellow]left[/]"
        console.print(f"{mark}: {plain(fault.what)}", soft_wrap=True)
    wrong = [fault for fault in faults if not fault.repaired]
    if not wrong:
        console.print(f"[green]all is well[/]: {len(opened.entries)} edits, {len(opened.active())} of them act")
        return
    if all(not fault.lost for fault in wrong):
        console.print("no edit is lost; --repair removes what was left behind")
    raise typer.Exit(1)


@app.command()
def export(
    book: Folder,
    to: Annotated[str, typer.Option(metavar="FORMAT", help=FORMAT_HELP)],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where it is written.")],
    model: Model = None,
    revision: Annotated[int | None, typer.Option(min=0, help="As it was after this event, not as it is.")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="The most factor pairs of a matrix.")] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
) -> None:
    """Write all edits that act as one adapter, one model, or one edit."""
    from remend.cli.export import write

    FORMATS.get(to)  # before the book is read
    opened = _room()(book)
    edit = opened.edit(revision)
    if edit is None:
        raise EditError(f"no edit of {book} acts{'' if revision is None else ' there'}: there is nothing to export")
    write(Console(), edit, out, to, model or opened.model, model is None, rank, device, dtype)


def _room() -> type[PatchRegistry]:
    """The book, if what it needs is installed.

    Raises:
        ModelError: it is not.
    """
    try:
        from remend.apps.patch_registry import PatchRegistry
    except ModuleNotFoundError as error:
        raise ModelError(f"a book needs {error.name}, which is missing here: pip install 'remend[book]'") from None
    return PatchRegistry


def _load(book: PatchRegistry, model: str | None, device: str, dtype: str | None) -> Task:
    """The book's model."""
    from remend.cli.export import named_by

    with named_by("the book", model is None, book.model):
        return options.load_model(model or book.model, device, 0, dtype)


def _coloured(state: str) -> str:
    return {"active": "[green]active[/]", "reverted": "[yellow]reverted[/]"}.get(state, state)


def _what(entry: PatchEntry) -> str:
    """An edit's first request, and how many more there are."""
    if not entry.requests:
        return "no requests"
    first = entry.requests[0]
    more = f" and {len(entry.requests) - 1} more" if len(entry.requests) > 1 else ""
    return f"{plain(first.get('prompt', '…'))} → {plain(first.get('target', '…'))}{more}"


def _line(at: str, what: str, who: str, why: str, measured: Mapping[str, Any] | None) -> str:
    description = f"{at[:19]}  {what} by {plain(who)}" + (f": {plain(why)}" if why else "")
    if not measured:
        return description
    verdict, conflicts = measured.get("verdict") or {}, measured.get("conflicts") or []
    found = "accepted" if verdict.get("ok") else "not accepted"
    against = dict.fromkeys(f"edit {one.get('edit')}" for one in conflicts)
    found += f", against {', '.join(against)}" if against else ""
    return f"{description} ({found}{', forced' if measured.get('forced') else ''})"
