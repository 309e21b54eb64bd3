"""``remend book``: commands for a patch registry, the record of every edit of a deployed model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from remend.cli import options
from remend.cli.edit_formats import FORMAT_HELP
from remend.cli.escaping import plain
from remend.errors import EditError, FileError, ModelError
from remend.registries import FORMATS

if TYPE_CHECKING:
    from remend.apps.patch_registry import PatchEntry, PatchRegistry

app = typer.Typer(
    no_args_is_help=True,
    help="Record every edit of a deployed model: who made it, when and why, and which edits are active.",
)

Folder = Annotated[Path, typer.Argument(metavar="BOOK", help="The book's folder.")]
Number = Annotated[int, typer.Argument(metavar="EDIT", help="An edit's number, as remend book list shows it.")]
Why = Annotated[str, typer.Option(help="The reason; kept in the record.")]
Who = Annotated[str | None, typer.Option(help="Who does it; by default this user.")]
Model = Annotated[
    str | None,
    typer.Option(help="The book's model (a folder or hub id), if it is not where the book says."),
]


@app.command()
def init(book: Folder, model: Annotated[str, typer.Option(help="The model whose edits it records.")]) -> None:
    """Create an empty book."""
    from remend.models import skeleton

    _registry_class().create(book, skeleton(model, options.TRUST.get().trust_remote_code))
    console = Console()
    console.print(f"[bold]{plain(str(book))}[/] is a book of {plain(model)}; add edits: remend book add")
    if Path(model).is_dir():
        console.print(
            f"no path is recorded: say where the model is with --model {plain(model)} when you activate and export",
            soft_wrap=True,
        )


@app.command()
def add(
    book: Folder,
    edit: Annotated[Path, typer.Argument(metavar="DIR", help="An edit saved by remend edit.")],
    why: Why = "",
    who: Who = None,
) -> None:
    """Add an edit as a draft: it is not active yet."""
    from remend.edit import Edit

    registry, console = _registry_class()(book), Console()
    known = {entry.id for entry in registry.entries}
    entry = registry.add(Edit.load(edit), why, who)
    if entry.id in known:
        console.print(f"it is already edit [bold]{entry.id}[/] of {plain(str(book))} ({entry.state})", soft_wrap=True)
    if entry.state != "active":
        command = f"remend book activate {plain(str(book))} {entry.id}"
        console.print(f"edit [bold]{entry.id}[/] is not active yet; activate it: {command}", soft_wrap=True)


@app.command("list")
def list_(book: Folder) -> None:
    """List all edits of a book, and which of them are active."""
    registry = _registry_class()(book)
    table = Table(
        "edit", "state", "added", "who", "request", "why", title=f"of {plain(registry.model)}", pad_edge=False
    )
    for entry in registry.entries:
        table.add_row(
            str(entry.id),
            _colored_state(entry.state),
            entry.added[:16],
            plain(entry.who),
            _first_request(entry),
            plain(entry.why),
        )
    Console().print(table)


@app.command()
def show(book: Folder, edit: Number) -> None:
    """Show one edit: what it does, what was measured, and what was done with it."""
    registry, console = _registry_class()(book), Console()
    entry = registry.entry(edit)
    console.print(f"edit [bold]{entry.id}[/]: {_colored_state(entry.state)}, of {plain(registry.model)}")
    for request in entry.requests:
        console.print(f"  {plain(request.get('prompt', '…'))} → [green]{plain(request.get('target', '…'))}[/]")
    try:
        ranks = ", ".join(f"{plain(name)} ({c.describe})" for name, c in registry.load(edit).changes.items())
        console.print(f"changes {ranks}", highlight=False)
    except FileError as error:  # the record is shown although the files are lost
        console.print(f"[red]lost[/]: {plain(error)}", soft_wrap=True, highlight=False)
    console.print(f"file {entry.file}", highlight=False)
    for event in registry.events:
        if event.edit == edit:
            console.print(_event_line(event.at, event.what, event.who, event.why, event.measured), highlight=False)


@app.command()
def history(book: Folder) -> None:
    """List everything that was done, in order; the number of a line is a revision that can be restored."""
    console = Console()
    for event in _registry_class()(book).events:
        line = _event_line(event.at, event.what, event.who, event.why, event.measured)
        console.print(f"{event.id:4d}  edit {event.edit}: {line}", highlight=False, soft_wrap=True)


@app.command()
def activate(
    book: Folder,
    edit: Number,
    model: Model = None,
    acceptance: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Acceptance criteria as JSON; by default the standard ones.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Activate it also if it fails or conflicts; that is recorded.")
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Revert active edits that want other answers: the later one wins.")
    ] = False,
    why: Why = "",
    who: Who = None,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
) -> None:
    """Activate an edit, if it is accepted and does not conflict with the active ones. The exit code is 1 if not."""
    from remend.apps.acceptance import STANDARD_CRITERIA, AcceptanceCriteria, RejectedError
    from remend.apps.patch_registry import ConflictError
    from remend.cli.edit_formats import refuse_lost_folder, suggest_model_option
    from remend.cli.guard import print_result

    registry, console = _registry_class()(book), Console()
    criteria = STANDARD_CRITERIA if acceptance is None else AcceptanceCriteria.read(acceptance)
    registry.entry(edit)
    if model is None:
        refuse_lost_folder(registry.load(edit), registry.model)
    with suggest_model_option("the book", model is None, registry.model):
        task = options.load_model(model or registry.model, device, 0, dtype)
    try:
        conflicts, result = registry.activate(edit, task, criteria, why, who, force, replace)
    except RejectedError as error:
        print_result(console, error.result)
        console.print(f"edit {edit} stays as it is (--force activates it all the same)")
        raise typer.Exit(1) from None
    except ConflictError as error:
        for conflict in error.conflicts:
            console.print(f"[red]{conflict.kind}[/]: {plain(conflict.description)}", soft_wrap=True)
        advice = "revert the other edit first (--replace does so with those that disagree"
        console.print(f"edit {edit} stays as it is: {advice}; --force activates it all the same)", soft_wrap=True)
        raise typer.Exit(1) from None
    print_result(console, result)
    for conflict in conflicts:
        console.print(f"[yellow]{conflict.kind}[/]: {plain(conflict.description)}", soft_wrap=True)
    console.print(f"edit [bold]{edit}[/] acts")


@app.command()
def revert(book: Folder, edit: Number, why: Why = "", who: Who = None) -> None:
    """Deactivate an edit. It stays in the book and can be activated again."""
    _registry_class()(book).revert(edit, why, who)
    Console().print(f"edit [bold]{edit}[/] acts no more")


@app.command()
def verify(
    book: Folder,
    repair: Annotated[bool, typer.Option("--repair", help="Remove what killed processes left behind.")] = False,
) -> None:
    """Check the records and the files. The exit code is 1 if anything is wrong and not repaired."""
    registry, console = _registry_class()(book), Console()
    faults = registry.verify(repair)
    for fault in faults:
        mark = "[green]repaired[/]" if fault.repaired else "[red]lost[/]" if fault.lost else "[yellow]left[/]"
        console.print(f"{mark}: {plain(fault.what)}", soft_wrap=True)
    remaining = [fault for fault in faults if not fault.repaired]
    if not remaining:
        console.print(f"[green]all is well[/]: {len(registry.entries)} edits, {len(registry.active())} of them act")
        return
    if all(not fault.lost for fault in remaining):
        advice = f"check that {plain(str(book))} and the disk can be written to" if repair else "--repair removes it"
        console.print(f"no edit is lost; something was left behind: {advice}", soft_wrap=True)
    raise typer.Exit(1)


@app.command()
def export(
    book: Folder,
    to: Annotated[str, typer.Option(metavar="FORMAT", help=FORMAT_HELP)],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write.")],
    model: Model = None,
    revision: Annotated[
        int | None,
        typer.Option(min=0, help="Export the edits that were active after this event; by default, the active ones."),
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="The largest rank of a matrix's change.")] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
) -> None:
    """Write all active edits as one adapter, one model, or one edit."""
    from remend.cli.edit_formats import write_edit

    FORMATS.get(to)  # an unknown format is an error before the book is read
    registry = _registry_class()(book)
    edit = registry.edit(revision)
    if edit is None:
        raise EditError(f"no edit of {book} acts{'' if revision is None else ' there'}: there is nothing to export")
    write_edit(Console(), edit, out, to, model or registry.model, model is None, rank, device, dtype)


def _registry_class() -> type[PatchRegistry]:
    """Import the class of patch registries.

    Raises:
        ModelError: a library that it needs is not installed.
    """
    try:
        from remend.apps.patch_registry import PatchRegistry
    except ModuleNotFoundError as error:
        raise ModelError(f"a book needs {error.name}, which is missing here: pip install 'remend[book]'") from None
    return PatchRegistry


def _colored_state(state: str) -> str:
    """Return a state with rich's markup."""
    return {"active": "[green]active[/]", "reverted": "[yellow]reverted[/]"}.get(state, state)


def _first_request(entry: PatchEntry) -> str:
    """Return an edit's first request, and how many more there are."""
    if not entry.requests:
        return "no requests"
    first = entry.requests[0]
    more = f" and {len(entry.requests) - 1} more" if len(entry.requests) > 1 else ""
    return f"{plain(first.get('prompt', '…'))} → {plain(first.get('target', '…'))}{more}"


def _event_line(at: str, what: str, who: str, why: str, measured: Mapping[str, Any] | None) -> str:
    """Return an event as a line of text."""
    line = f"{at[:19]}  {what} by {plain(who)}" + (f": {plain(why)}" if why else "")
    if not measured:
        return line
    acceptance, conflicts = measured.get("verdict") or {}, measured.get("conflicts") or []
    outcome = "accepted" if acceptance.get("ok") else "not accepted"
    edits = dict.fromkeys(f"edit {conflict.get('edit')}" for conflict in conflicts)
    outcome += f", against {', '.join(edits)}" if edits else ""
    return f"{line} ({outcome}{', forced' if measured.get('forced') else ''})"
