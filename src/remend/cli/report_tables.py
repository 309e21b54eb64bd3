"""The tables that ``remend evaluate`` prints of a report."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from remend.cli.escaping import plain

if TYPE_CHECKING:
    from remend.evaluation import Report
    from remend.evaluation.reports.report import Run

PERTURBED_SHOWN = ("reliability", "generality", "locality_near")
"""Metrics that are printed of edits with inexact numbers."""


def print_report(report: Report, console: Console) -> None:
    """Print the results of a report as tables."""
    for run in report.runs:
        console.print(_metrics_table(report, run))
        for line in _perturbed_lines(report, run):
            console.print(line, soft_wrap=True)
    if retention := report.retention():
        counts = ", ".join(f"{sum(row):.0f} of {len(row)}" for row in retention)
        console.print(f"retained edits (their prompt is still answered with the target): {counts}")
    for run in report.runs:
        if run.abilities:
            kept = ", ".join(f"{plain(n.replace('_', ' '))} {s.mean:.3f} of {s.n}" for n, s in run.abilities.items())
            console.print(f"what stays right after {run.edits} edits: {kept}", soft_wrap=True)
    if report.frontier:
        console.print(_frontier_table(report))
    if report.general:
        console.print(_lm_eval_table(report))
    for reason, count in report.left_out.items():
        console.print(f"not evaluated: {count} {plain(reason)}")
    if report.text:
        console.print(f"ordinary text: {report.text_in_words}")
    if seconds := report.runs[-1].seconds_per_edit:
        console.print(f"{1000 * seconds:.1f} ms an edit")


def _perturbed_lines(report: Report, run: Run) -> Iterator[str]:
    """Yield what edits with inexact numbers do, in a line each; every metric of theirs is in the report's file."""
    from remend.evaluation.perturbed_edits import PERTURBATIONS
    from remend.evaluation.reports.html_report import format_number
    from remend.evaluation.reports.metric_titles import main_value, title_of

    for name, metrics in report.baseline_metrics(run).items():
        if name in PERTURBATIONS:
            kind, share = name.split("_")
            found = [
                f"{title_of(metric)} {format_number(main_value(metrics[metric]).mean)}"
                for metric in PERTURBED_SHOWN
                if metric in metrics
            ]
            with_words = {"noise": f"with noise of {share}", "mask": f"without {share} of their numbers"}
            yield f"edits {with_words[kind]}: {', '.join(found)}"


def _metrics_table(report: Report, run: Run) -> Table:
    """Return the table of a run's metrics, beside those of the baselines."""
    from remend.evaluation.perturbed_edits import PERTURBATIONS
    from remend.evaluation.reports.html_report import format_number
    from remend.evaluation.reports.metric_titles import main_value

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
    baselines = {name: found for name, found in report.baseline_metrics(run).items() if name not in PERTURBATIONS}
    columns = (
        "metric",
        "generated\nor value",
        "95 %",
        "teacher\nforced",
        *(name.replace("_", "\n") for name in baselines),
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "metric" else "right", no_wrap=True)
    previous = ""
    for name, modes in run.metrics().items():
        label, previous = _label(name, previous)
        summary = main_value(modes)
        of_baselines = [main_value(metrics[name]) if name in metrics else None for metrics in baselines.values()]
        table.add_row(
            label + ("" if summary.n == count else f" ({summary.n})"),
            f"[bold]{format_number(summary.mean)}[/]",
            "" if not summary.has_interval else f"{format_number(summary.ci95[0])}–{format_number(summary.ci95[1])}",
            format_number(modes["teacher_forced"].mean) if "teacher_forced" in modes else "",
            *("" if baseline is None else format_number(baseline.mean) for baseline in of_baselines),
        )
    return table


def _label(name: str, parent: str) -> tuple[str, str]:
    """Return the label of a metric's row, and the metric that the rows below it may be kinds of."""
    from remend.evaluation.reports.metric_titles import title_of

    if parent and name.startswith(f"{parent}_"):
        return f"– {name.removeprefix(f'{parent}_').replace('_', ' ')}", parent
    return title_of(name), name


def _frontier_table(report: Report) -> Table:
    """Return the table of generated answers at each strength, with a bar for each share."""
    from remend.evaluation.reports.metric_titles import title_of

    means = {
        strength: {name: modes["generated"].mean for name, modes in metrics.items() if "generated" in modes}
        for strength, metrics in report.frontier_metrics().items()
    }
    names = [n for n in ("reliability", "generality", "locality_near", "locality_far") if n in means[1.0]]
    table = Table(title="the edits, scaled", title_justify="left")
    table.add_column("scale", justify="right")
    for name in names:
        table.add_column(title_of(name))
    for strength, at_strength in means.items():
        bars = [f"{at_strength[name]:.3f} {'█' * round(5 * at_strength[name])}" for name in names]
        table.add_row(f"{strength:g}", *bars, style="bold" if strength == 1 else None)
    return table


def _lm_eval_table(report: Report) -> Table:
    """Return the table of lm-eval's scores before and after."""
    from remend.evaluation.metrics.lm_eval import edits_of_scores
    from remend.evaluation.reports.html_report import format_number

    title = f"general ability (lm-eval), after {edits_of_scores(report)}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("task", "metric", "before", "after", "difference"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for task, metrics in report.general.items():
        for metric, scores in metrics.items():
            before, after = scores["before"], scores["after"]
            table.add_row(
                plain(task),
                plain(metric),
                format_number(before),
                f"[bold]{format_number(after)}[/]",
                f"{after - before:+.3f}",
            )
    return table
