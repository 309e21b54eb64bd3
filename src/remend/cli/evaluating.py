"""``remend evaluate``."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from remend.cli import options
from remend.cli.words import plain
from remend.errors import ConfigError

if TYPE_CHECKING:
    from remend.evaluation import Report


def evaluate(
    model: options.Model,
    data: Annotated[str, typer.Option(metavar="FILE", help="Requests as JSON lines, or atlas:test, questions:test, …")],
    editor: options.EditorFolder = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many requests, drawn with the seed.")] = None,
    max_new_tokens: options.NewTokens = 32,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    quantise: options.Quantise = None,
    seed: options.Seed = 0,
    frontier: Annotated[bool, typer.Option(help="Also judge the edits at 0.25 to 2 times their strength.")] = True,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw that as a picture (.png, .svg, .pdf).")
    ] = None,
    json: options.Json = None,
) -> None:
    """Make each edit from the untouched model and measure success, generality and locality over the whole file.

    An editor that is right at one strength may be so by luck: the frontier shows what more and less strength would do.
    """
    from remend.core.layers import device_of
    from remend.data import read_source
    from remend.evaluation import evaluate as measure
    from remend.evaluation.plot import check_plot, draw_frontier
    from remend.evaluation.single import SCALES

    if plot is not None:
        check_plot(plot)
        if not frontier:
            raise ConfigError("--plot draws the frontier, and --no-frontier leaves it out: give one of them")
    requests = read_source(data)
    if limit is not None and limit < len(requests):
        requests = [requests[i] for i in sorted(random.Random(seed).sample(range(len(requests)), limit))]
    if plot is not None and not any(request.near for request in requests):
        raise ConfigError(f"{data}: no request names near prompts, so there is no near locality to draw (--plot)")
    chosen = options.load_editor(editor, model)
    base, tokenizer = options.load_model(model, device, seed, dtype, quantise)
    console = Console()
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("editing", total=len(requests))
        report = measure(
            base, tokenizer, chosen.to(device_of(base)), requests,
            data=data, max_new_tokens=max_new_tokens, scales=SCALES if frontier else (),
            name=Path(editor or model).name,
            on_progress=lambda done, _: bar.update(task, completed=done),
        )  # fmt: skip
    console.print(_table(report))
    if report.frontier:
        console.print(_frontier(report))
    console.print(f"{1000 * report.seconds_per_edit:.1f} ms an edit")
    if plot is not None:
        draw_frontier({f"{report.editor} on {report.data}, {len(report.cases)} edits": report}, plot)
        console.print(f"drawn in [bold]{plain(plot)}[/]", soft_wrap=True)
    if json is not None:
        report.save(json)
        console.print(f"every edit is in [bold]{plain(json)}[/]", soft_wrap=True)


def _table(report: Report) -> Table:
    count = len(report.cases)
    title = f"{count} single edit{'s' if count > 1 else ''} of {plain(report.model)}, {plain(report.data)}"
    table = Table(title=title, title_justify="left")
    for column in ("metric", "generated", "95 %", "teacher forced", "edits"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for name, modes in report.metrics().items():
        free, forced = modes["generated"], modes["teacher_forced"]
        interval = f"{free.ci95[0]:.3f} – {free.ci95[1]:.3f}"
        table.add_row(name.replace("_", " "), f"[bold]{free.mean:.3f}[/]", interval, f"{forced.mean:.3f}", str(free.n))
    return table


def _frontier(report: Report) -> Table:
    """Generated answers at each scale, with a bar for each share."""
    found = {
        scale: {n: m["generated"].mean for n, m in own.items()} for scale, own in report.frontier_metrics().items()
    }
    shown = [n for n in ("reliability", "generality", "locality_near", "locality_far") if n in found[1.0]]
    table = Table(title="the edits, scaled", title_justify="left")
    table.add_column("scale", justify="right")
    for name in shown:
        table.add_column(name.replace("_", " "))
    for scale, own in found.items():
        bars = [f"{own[name]:.3f} {'█' * round(5 * own[name])}" for name in shown]
        table.add_row(f"{scale:g}", *bars, style="bold" if scale == 1 else None)
    return table
