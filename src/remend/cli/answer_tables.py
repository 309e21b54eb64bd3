"""Tables of the answers before and after an edit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from remend.cli.escaping import plain

if TYPE_CHECKING:
    from remend.evaluation.before_after import AnswerComparison

_STYLE = {"prompt": "bold cyan", "paraphrase": "cyan", "unseen paraphrase": "cyan", "near": "yellow", "far": "green"}


def answers_table(title: str, answers: Sequence[AnswerComparison]) -> Table:
    """Return a table with a row for each prompt: its kind, the answers before and after, and whether that is right.

    Where no prompt has a right answer (what :func:`remend.evaluation.before_after.ask` gives), neither is told.
    """
    judged = any(answer.ok is not None for answer in answers)
    table = Table(title=title, title_justify="left", title_style="bold", expand=False, pad_edge=False)
    if judged:
        table.add_column("asked as", no_wrap=True)
    table.add_column("prompt")
    table.add_column("before")
    table.add_column("after")
    if judged:
        table.add_column("right", no_wrap=True)
    for previous, answer in zip([None, *answers], answers, strict=False):
        section = previous is not None and (answer.kind in ("near", "far")) and previous.kind != answer.kind
        if section:
            table.add_section()
        cells = [
            plain(answer.prompt),
            plain(answer.before),
            f"[bold]{plain(answer.after)}[/]" if answer.after != answer.before else plain(answer.after),
        ]
        if judged:
            mark = "" if answer.ok is None else "[green]✓[/]" if answer.ok else "[red]✗[/]"
            cells = [f"[{_STYLE.get(answer.kind, 'default')}]{answer.kind}[/]", *cells, mark]
        table.add_row(*cells)
    return table


def plain_table(answers: Sequence[AnswerComparison]) -> Table:
    """Return a table with a row for each prompt and the unedited model's answer."""
    table = Table("prompt", "answer", pad_edge=False)
    for answer in answers:
        table.add_row(plain(answer.prompt), plain(answer.before))
    return table


def as_json(answers: Sequence[AnswerComparison]) -> list[dict[str, object]]:
    """Return the answers as JSON objects."""
    return [answer.to_json() for answer in answers]
