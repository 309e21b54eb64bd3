"""``remend evaluate``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from remend.cli import options
from remend.cli.words import plain

if TYPE_CHECKING:
    from remend.evaluation import Report


def evaluate(
    model: options.Model,
    data: Annotated[str, typer.Option(metavar="FILE", help="Requests as JSON lines, or atlas:test.")],
    editor: options.EditorFolder = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many requests.")] = None,
    max_new_tokens: options.NewTokens = 32,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    quantise: options.Quantise = None,
    seed: options.Seed = 0,
    json: options.Json = None,
) -> None:
    """Make each edit from the untouched model and measure success, generality and locality over the whole file."""
    from remend.core.layers import device_of
    from remend.data import read_source
    from remend.evaluation import evaluate as measure

    requests = read_source(data)[:limit]
    chosen = options.load_editor(editor, model)
    base, tokenizer = options.load_model(model, device, seed, dtype, quantise)
    console = Console()
    with Progress(console=console) as bar:
        task = bar.add_task("editing", total=len(requests))
        report = measure(
            base, tokenizer, chosen.to(device_of(base)), requests,
            data=data, max_new_tokens=max_new_tokens, on_progress=lambda done, _: bar.update(task, completed=done),
        )  # fmt: skip
    console.print(_table(report))
    console.print(f"{1000 * report.seconds_per_edit:.1f} ms an edit")
    if json is not None:
        report.save(json)


def _table(report: Report) -> Table:
    table = Table(
        title=f"{len(report.cases)} single edits of {plain(report.model)}, {plain(report.data)}", title_justify="left"
    )
    for column in ("metric", "generated", "95 %", "teacher forced", "edits"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for name, modes in report.metrics().items():
        free, forced = modes["generated"], modes["teacher_forced"]
        interval = f"{free.ci95[0]:.3f} – {free.ci95[1]:.3f}"
        table.add_row(name.replace("_", " "), f"[bold]{free.mean:.3f}[/]", interval, f"{forced.mean:.3f}", str(free.n))
    return table
