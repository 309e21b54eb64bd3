"""``remend compare``: show how reports of the same requests differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from remend.cli.escaping import plain
from remend.errors import ConfigError

if TYPE_CHECKING:
    from remend.evaluation.reports.comparison import MetricDifference


def compare(
    reports: Annotated[
        list[Path], typer.Argument(metavar="A.json B.json …", help="Reports of remend evaluate --json.")
    ],
    mode: Annotated[
        str, typer.Option(help="generated, teacher_forced, contains, token_f1 or value (divergences and the like).")
    ] = "generated",
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the differences into a file (.png, .svg, .pdf).")
    ] = None,
) -> None:
    """Put evaluations of the same requests side by side: each difference from the first report, with its interval.

    Intervals are those of the differences edit by edit (paired bootstrap), so that edits which are hard for all cancel
    out. A difference is marked where its interval leaves out 0.
    """
    from remend.evaluation.reports.comparison import compare as compare_reports
    from remend.evaluation.reports.figure_style import check_plot, save_figure
    from remend.evaluation.reports.metric_titles import all_modes
    from remend.evaluation.reports.plots import differences as plot_differences
    from remend.evaluation.reports.report_reader import read_report

    if len(reports) < 2:
        raise ConfigError("one report was given: give at least two to compare")
    if mode not in all_modes():
        raise ConfigError(f"there is no mode {mode!r}; --mode is one of {', '.join(all_modes())}")
    if plot is not None:
        check_plot(plot)
    names = _names(reports)
    by_name = dict(zip(names, map(read_report, reports), strict=True))
    differences = {
        name: [
            difference
            for difference in compare_reports(by_name[names[0]], by_name[name], (names[0], name))
            if difference.mode == mode
        ]
        for name in names[1:]
    }
    if not any(differences.values()):
        raise ConfigError(f"no metric of the mode {mode!r} is in two reports: give another --mode")
    console = Console()
    for name, report in by_name.items():
        run = report.runs[-1]
        at_work = "" if report.protocol == "single" else f", {run.edits} at work"
        console.print(f"{plain(name)}: {plain(report.editor)}, {len(run.cases)} edits, {report.protocol}{at_work}")
    if len({(report.protocol, report.runs[-1].edits) for report in by_name.values()}) > 1:
        console.print("[yellow]the protocols differ, so the differences are not of the editors alone[/]")
    for name, of_report in differences.items():
        console.print(_table(names[0], name, of_report, mode))
    if any(difference.significant for of_report in differences.values() for difference in of_report):
        console.print("* the interval leaves out 0 ([green]better[/] or [red]worse[/] than the first report)")
    if plot is not None:
        save_figure(plot_differences(differences, mode), plot)
        console.print(f"drawn in [bold]{plain(plot)}[/]", soft_wrap=True)


def _table(first: str, name: str, differences: Sequence[MetricDifference], mode: str) -> Table:
    """Return the table of the differences of one report from the first."""
    from remend.evaluation.reports.metric_titles import title_of

    count = max((difference.difference.n for difference in differences), default=0)
    table = Table(
        title=f"{plain(name)} against {plain(first)}: {count} edits that both have, {mode.replace('_', ' ')}",
        title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0),
    )  # fmt: skip
    for column in ("metric", plain(first), plain(name), "difference", "95 %", ""):
        table.add_column(column, justify="left" if column == "metric" else "right")
    colours = {True: "green", False: "red", None: "default"}
    for difference in differences:
        low, high = difference.difference.ci95
        table.add_row(
            title_of(difference.metric),
            f"{difference.first:.3f}",
            f"{difference.other:.3f}",
            f"[bold]{difference.difference.mean:+.3f}[/]",
            f"{low:+.3f} – {high:+.3f}",
            f"[{colours[difference.better]}]*[/]" if difference.significant else "",
        )
    return table


def _names(reports: list[Path]) -> list[str]:
    """Return names that tell the reports apart: of their files, or their paths, or with a number."""
    for names in ([path.stem for path in reports], [str(path) for path in reports]):
        if len(set(names)) == len(names):
            return names
    return [f"{path} ({number})" for number, path in enumerate(reports, start=1)]
