"""A report's figures as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from remend.cli.escaping import plain

if TYPE_CHECKING:
    from remend.evaluation import Report
    from remend.evaluation.reports.report import Run


def print_report(report: Report, console: Console) -> None:
    """The figures as tables."""
    for run in report.runs:
        console.print(_table(report, run))
    if kept := report.retention():
        told = ", ".join(f"{sum(row):.0f} of {len(row)}" for row in kept)
        console.print(f"edits that are still there (their own prompt is answered): {told}")
    if report.frontier:
        console.print(_frontier(report))
    if report.general:
        console.print(_general(report))
    for reason, count in report.left_out.items():
        console.print(f"not judged: {count} {plain(reason)}")
    if report.text:
        console.print(
            f"perplexity of the unedited model on {report.text['tokens']:,.0f} tokens of text: "
            f"{report.text['perplexity']:.2f}"
        )
    if seconds := report.runs[-1].seconds_per_edit:
        console.print(f"{1000 * seconds:.1f} ms an edit")


def _table(report: Report, run: Run) -> Table:
    from remend.evaluation.reports.html_report import figure

    count = len(run.cases)
    how = {
        "single": "each alone",
        "batched": f"{run.edits} at once",
        "sequential": "one after another",
        "checkpoints": "in another checkpoint",
    }[report.protocol]
    by = f" by {plain(report.editor)}" if report.editor else ""
    title = f"{count} edit{'s' if count > 1 else ''} of {plain(report.model)}{by}, {plain(report.data)}: {how}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    beside = report.beside(run)
    columns = (
        "metric",
        "generated\nor value",
        "95 %",
        "teacher\nforced",
        *(name.replace("_", "\n") for name in beside),
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "metric" else "right", no_wrap=True)
    parent = ""
    for name, modes in run.metrics().items():
        if parent and name.startswith(f"{parent}_"):  # one kind of what stands above it
            label = f"– {name.removeprefix(f'{parent}_')}"
        else:
            label, parent = name, name
        free = modes.get("generated") or modes["value"]
        others = [own[name].get("generated") or own[name]["value"] if name in own else None for own in beside.values()]
        table.add_row(
            label.replace("_", " ") + ("" if free.n == count else f" ({free.n})"),
            f"[bold]{figure(free.mean)}[/]",
            "" if free.n == 1 else f"{figure(free.ci95[0])}–{figure(free.ci95[1])}",
            figure(modes["teacher_forced"].mean) if "teacher_forced" in modes else "",
            *("" if other is None else figure(other.mean) for other in others),
        )
    return table


def _frontier(report: Report) -> Table:
    """Generated answers at each scale, with a bar for each share."""
    found = {
        scale: {n: m["generated"].mean for n, m in own.items() if "generated" in m}
        for scale, own in report.frontier_metrics().items()
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


def _general(report: Report) -> Table:
    """lm-eval's tasks before and after."""
    from remend.evaluation.metrics.lm_eval import after_what
    from remend.evaluation.reports.html_report import figure

    title = f"general ability (lm-eval), after {after_what(report)}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("task", "metric", "before", "after", "difference"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for task, metrics in report.general.items():
        for metric, both in metrics.items():
            before, after = both["before"], both["after"]
            table.add_row(
                plain(task), plain(metric), figure(before), f"[bold]{figure(after)}[/]", f"{after - before:+.3f}"
            )
    return table
