"""``remend compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from remend.cli.escaping import plain
from remend.errors import ConfigError


def compare(
    reports: Annotated[
        list[Path], typer.Argument(metavar="A.json B.json …", help="Reports of remend evaluate --json.")
    ],
    mode: Annotated[
        str, typer.Option(help="generated, teacher_forced, contains, token_f1 or value (divergences and the like).")
    ] = "generated",
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the differences as a picture (.png, .svg, .pdf).")
    ] = None,
) -> None:
    """Put evaluations of the same requests side by side: each difference from the first report, with its interval.

    Intervals are of the differences edit by edit (paired bootstrap), so what is hard for all of them cancels. A
    difference is marked where its interval leaves out 0.
    """
    from remend.evaluation.reports.comparison import MODES
    from remend.evaluation.reports.comparison import compare as differences_of
    from remend.evaluation.reports.plots import check_plot, differences, save
    from remend.evaluation.reports.schema import read_report

    if len(reports) < 2:
        raise ConfigError("there is nothing to compare one report with: give at least two")
    if mode not in MODES:
        raise ConfigError(f"--mode is one of {', '.join(MODES)}, not {mode!r}")
    if plot is not None:
        check_plot(plot)
    names = _names(reports)
    read = dict(zip(names, map(read_report, reports), strict=True))
    first, *others = read.values()
    found = {
        name: [own for own in differences_of(first, other, (names[0], name)) if own.mode == mode]
        for name, other in zip(names[1:], others, strict=True)
    }
    if not any(found.values()):
        raise ConfigError(f"the reports share no metric with the mode {mode!r}: give another --mode")
    console = Console()
    for name, report in read.items():
        run = report.runs[-1]
        at_work = "" if report.protocol == "single" else f", {run.edits} at work"
        console.print(f"{plain(name)}: {plain(report.editor)}, {len(run.cases)} edits, {report.protocol}{at_work}")
    if len({(report.protocol, report.runs[-1].edits) for report in read.values()}) > 1:
        console.print("[yellow]these are not alike: differences are of the protocols, too[/]")
    for name, own in found.items():
        count = max((difference.difference.n for difference in own), default=0)
        table = Table(
            title=f"{plain(name)} against {plain(names[0])}: {count} edits that both have, {mode.replace('_', ' ')}",
            title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0),
        )  # fmt: skip
        for column in ("metric", plain(names[0]), plain(name), "difference", "95 %", ""):
            table.add_column(column, justify="left" if column == "metric" else "right")
        for one in own:
            low, high = one.difference.ci95
            table.add_row(
                one.metric.replace("_", " "),
                f"{one.first:.3f}",
                f"{one.other:.3f}",
                f"[bold]{one.difference.mean:+.3f}[/]",
                f"{low:+.3f} – {high:+.3f}",
                "*" if one.clear else "",
            )
        console.print(table)
    if any(one.clear for own in found.values() for one in own):
        console.print("* the interval leaves out 0")
    if plot is not None:
        save(differences(found, mode), plot)
        console.print(f"drawn in [bold]{plain(plot)}[/]", soft_wrap=True)


def _names(reports: list[Path]) -> list[str]:
    """Names to tell the reports apart by: of their files, or their paths, or with a number."""
    for names in ([path.stem for path in reports], [str(path) for path in reports]):
        if len(set(names)) == len(names):
            return names
    return [f"{path} ({number})" for number, path in enumerate(reports, start=1)]
