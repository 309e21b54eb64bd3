"""``remend guard``."""

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
        Path | None, typer.Option(metavar="FILE", help="What is asked of it, as JSON; without it, the standard.")
    ] = None,
    beneath: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="Edits that act already; may be given several times.")
    ] = None,
    max_new_tokens: options.NewTokens = 32,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    quantise: options.Quantise = None,
    seed: options.Seed = 0,
    json: options.Json = None,
) -> None:
    """Try an edit and say whether it does what it must, and nothing that it must not. Exit code 0 if so, else 1."""
    from remend.apps.acceptance import STANDARD_CRITERIA, AcceptanceCriteria, check_acceptance
    from remend.edit import Edit
    from remend.serialization import write_json

    asked = STANDARD_CRITERIA if acceptance is None else AcceptanceCriteria.read(acceptance)
    made, under = Edit.load(edit), [Edit.load(path) for path in beneath or []]
    task = options.load_model(model, device, seed, dtype, quantise)
    verdict = check_acceptance(task, made, asked, under, max_new_tokens, seed)
    show(Console(), verdict)
    if json is not None:
        write_json(json, verdict.to_json())
    if not verdict.ok:
        raise typer.Exit(1)


def show(console: Console, verdict: AcceptanceResult) -> None:
    """The checks as a table, then the answers that are not what they should be, then the verdict."""
    from remend.apps.acceptance.result import CHECK_TITLES
    from remend.cli.answer_tables import answers_table

    table = Table("", "asked", "found", "needed", "of", pad_edge=False)
    for check in verdict.checks:
        most = check.name in ("perplexity", "size")
        shown = f"{check.measured:.3f}" if most else f"{check.measured:.1%}"
        bound = f"≤ {check.bound:g}" if most else f"≥ {check.bound:.0%}"
        mark = "[green]✓[/]" if check.ok else "[red]✗[/]"
        table.add_row(mark, CHECK_TITLES[check.name], shown, bound, str(check.count))
    console.print(table)
    wrong = [answer for check in verdict.checks if not check.ok for answer in check.failed]
    if wrong:
        console.print(answers_table("answers that are not what they should be", wrong[:20]))
    for name in verdict.unmet:
        console.print(f"[red]asked, with nothing to measure it on[/]: {plain(CHECK_TITLES[name])}", soft_wrap=True)
    if rest := [name for name in verdict.missing if name not in verdict.unmet]:
        names = ", ".join(CHECK_TITLES[name] for name in rest)
        console.print(
            f"[yellow]not measured[/], since nothing was given to measure it by: {plain(names)}", soft_wrap=True
        )
    console.print("[green]accepted[/]" if verdict.ok else "[red]not accepted[/]")
