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
    """Return a table with a row for each prompt: its kind, the answers before and after, and whether that is right."""
    table = Table(title=title, title_justify="left", title_style="bold", expand=False, pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("prompt")
    table.add_column("before")
    table.add_column("after")
    table.add_column("", no_wrap=True)
    for previous, answer in zip([None, *answers], answers, strict=False):
        section = previous is not None and (answer.kind in ("near", "far")) and previous.kind != answer.kind
        if section:
            table.add_section()
        table.add_row(
            f"[{_STYLE.get(answer.kind, 'default')}]{answer.kind}[/]",
            plain(answer.prompt),
            plain(answer.before),
            f"[bold]{plain(answer.after)}[/]" if answer.after != answer.before else plain(answer.after),
            "" if answer.ok is None else "[green]✓[/]" if answer.ok else "[red]✗[/]",
        )
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
