"""``remend guard``: check an edit against acceptance criteria."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from remend.cli import options
from remend.cli.escaping import plain

if TYPE_CHECKING:
    from remend.apps.acceptance import AcceptanceResult


def guard(
    model: options.Model,
    edit: Annotated[Path, typer.Option(metavar="DIR", help="An edit saved by remend edit.")],
    acceptance: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Acceptance criteria as JSON; by default the standard ones.")
    ] = None,
    beneath: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="An edit that is active already; may be given several times."),
    ] = None,
    max_new_tokens: options.NewTokens = 32,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    quantise: options.Quantise = None,
    seed: options.Seed = 0,
    json: options.Json = None,
) -> None:
    """Check whether an edit does what it must, and nothing that it must not. The exit code is 0 if so, else 1."""
    from remend.apps.acceptance import STANDARD_CRITERIA, AcceptanceCriteria, check_acceptance
    from remend.edit import Edit
    from remend.saved_folders import write_json

    criteria = STANDARD_CRITERIA if acceptance is None else AcceptanceCriteria.read(acceptance)
    loaded, active = Edit.load(edit), [Edit.load(path) for path in beneath or []]
    task = options.load_model(model, device, seed, dtype, quantise)
    result = check_acceptance(task, loaded, criteria, active, max_new_tokens)
    print_result(Console(), result)
    if json is not None:
        write_json(json, result.to_json())
    if not result.ok:
        raise typer.Exit(1)


def print_result(console: Console, result: AcceptanceResult) -> None:
    """Print the checks as a table, the wrong answers, what was not measured, and whether the edit is accepted."""
    from remend.apps.acceptance.check import CHECK_TITLES, MULTIPLES_OF
    from remend.cli.answer_tables import answers_table

    table = Table("", "check", "measured", "bound", "count", pad_edge=False)
    for check in result.checks:
        unit = MULTIPLES_OF.get(check.name)
        measured = f"{check.measured:.3f} times {unit}" if unit else f"{check.measured:.1%}"
        bound = f"≤ {check.bound:g}" if unit else f"≥ {check.bound:.0%}"
        mark = "[green]✓[/]" if check.ok else "[red]✗[/]"
        table.add_row(mark, CHECK_TITLES[check.name], measured, bound, str(check.count))
    console.print(table)
    console.print(result.elsewhere.description, soft_wrap=True)
    wrong = [answer for check in result.checks if not check.ok for answer in check.failed]
    if wrong:
        console.print(answers_table("answers that are not what they should be", wrong[:20]))
    for name in result.unmet:
        console.print(f"[red]required, with nothing to measure it on[/]: {plain(CHECK_TITLES[name])}", soft_wrap=True)
    if unmeasured := [name for name in result.missing if name not in result.unmet]:
        names = ", ".join(CHECK_TITLES[name] for name in unmeasured)
        console.print(
            f"[yellow]not measured[/], since there was nothing to measure it on: {plain(names)}", soft_wrap=True
        )
    console.print("[green]accepted[/]" if result.ok else "[red]not accepted[/]")
